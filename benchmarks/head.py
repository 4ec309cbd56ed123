"""Peak memory and time of the pretraining head's forward and backward pass: plain Algorithm 1 against ours.

    python benchmarks/head.py [--full] [--threads 2]

Each row runs in a process of its own, batch 1, K = 500, 96^3 crops of 32 features in float32. Memory is
the process's high-water mark above what it holds before the pass (features and weights). The plain
layers grow by 0.18 GiB per clusterer, so they are measured at N = 10 and 20 only; ``--full`` adds N = 80.
CPU seconds (all threads) are given beside wall seconds, because a busy machine stretches the latter.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from logonet.methods.masked_clusters import Head

SIDE_VOX, CHANNELS, NUM_CLASSES = 96, 32, 500


def plain(head: Head, x: Tensor) -> Tensor:
    """Algorithm 1 word for word."""
    x = F.gelu(head.norm3(head.conv2(x)))
    x = F.gelu(head.norm5(head.conv4(x))).permute(0, 3, 2, 1, 4)
    x = F.gelu(head.norm8(head.conv7(x)))
    x = F.gelu(head.norm10(head.conv9(x))).permute(0, 2, 1, 3, 4)
    x = F.gelu(head.norm13(head.conv12(x)))
    x = F.gelu(head.norm15(head.conv14(x))).permute(0, 4, 3, 2, 1)
    x = F.gelu(head.norm18(head.conv17(x)))
    return F.relu(head.conv19(x)).squeeze(-1)


def measure(kind: str, num_clusterers: int, chunk_mib: float, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    head = Head(CHANNELS, (SIDE_VOX,) * 3, num_clusterers, NUM_CLASSES, chunk_mib)
    f_BFXYZ = torch.randn(1, CHANNELS, SIDE_VOX, SIDE_VOX, SIDE_VOX, requires_grad=True)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    logits = plain(head, f_BFXYZ) if kind == "plain" else head(f_BFXYZ)
    logits.square().mean().backward()
    wall_s, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    return {"peak_gib": peak_kib / 2**20, "wall_s": wall_s, "cpu_s": cpu_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="add N = 80, minutes on a CPU")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", nargs=3, metavar=("KIND", "N", "MIB"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        kind, num_clusterers, chunk_mib = args.one
        print(json.dumps(measure(kind, int(num_clusterers), float(chunk_mib), args.threads)))
        return

    plan = [("plain", 10, 0), ("ours", 10, 32), ("ours", 10, 128), ("plain", 20, 0), ("ours", 20, 128)]
    plan += [("ours", 80, 128)] if args.full else []
    rows = []
    print(f"{'head':>6} {'N':>3} {'chunk MiB':>9} {'peak GiB':>9} {'wall s':>8} {'CPU s':>8}")
    for kind, num_clusterers, chunk_mib in plan:
        command = [sys.executable, __file__, "--threads", str(args.threads)]
        command += ["--one", kind, str(num_clusterers), str(chunk_mib)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        row = {"head": kind, "N": num_clusterers, "chunk_mib": chunk_mib, **json.loads(done.stdout)}
        rows.append(row)
        print(
            f"{kind:>6} {num_clusterers:>3} {chunk_mib:>9} {row['peak_gib']:>9.2f} "
            f"{row['wall_s']:>8.1f} {row['cpu_s']:>8.1f}",
            flush=True,
        )
    print(
        json.dumps({"benchmark": "head", "threads": args.threads, "torch": torch.__version__, "rows": rows})
    )


if __name__ == "__main__":
    main()
