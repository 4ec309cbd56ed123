"""The pretraining head's forward and backward pass: ours, as it was before, and plain Algorithm 1.

    python benchmarks/head.py [--clusterers 8 80] [--threads 1] [--bf16]

Each row runs in a process of its own: batch 1, K = 500, 96^3 crops of 32 features. Seconds are processor seconds, for
the head alone and for its lines 7-12. Memory is the process's high-water mark above what it holds before the pass
(features and weights). The plain layers grow by 0.18 GiB a clusterer, so they run at 8 clusterers at most.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
import tyro
from _measure import machine, markdown, peak_bytes, reset_peak, resident_bytes, sentence
from torch import Tensor, nn

from logonet.methods import _cluster_head
from logonet.methods._cluster_head import Head

CHANNELS, MOST_PLAIN = 32, 8


class Before(Head):
    """As it was: lines 7-12 in chunks along N whose every map is computed again in the backward pass, with the
    statistics of line 10 from the covariance of line 9's input; chunks of 128 MiB on every device."""

    def _part_bytes(self, device: torch.device) -> float:
        return self.chunk_bytes

    def _lines_7_to_12(self, y_NBXZY: Tensor) -> Tensor:
        _, num_b, num_x, num_z, _ = y_NBXZY.shape
        num_k = self.conv7.out_channels
        weight_JX, bias_J = self.conv12.weight.flatten(1), cast(Tensor, self.conv12.bias)

        def lines_11_12(g_PK: Tensor) -> Tensor:
            g_RXM = g_PK.view(-1, num_x, num_z * num_k)  # R = n * B, M = Z * K
            q_RJM = torch.bmm(weight_JX.expand(len(g_RXM), -1, -1), g_RXM) + bias_J[:, None]
            return q_RJM.view(-1, num_b, len(bias_J), num_z, num_k)

        chunks = y_NBXZY.split(max(1, int(self.chunk_bytes // (4 * num_b * num_x * num_z * num_k))))
        layers = (self.conv7, self.norm8), (self.conv9, self.norm10)
        parts = _cluster_head._two_layers(chunks, lambda chunk: chunk.flatten(0, 3), *layers, lines_11_12)
        return torch.cat(parts)


class Plain(Head):
    """Algorithm 1 word for word."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm3(self.conv2(x)))
        x = F.gelu(self.norm5(self.conv4(x))).permute(0, 3, 2, 1, 4)
        x = F.gelu(self.norm8(self.conv7(x)))
        x = F.gelu(self.norm10(self.conv9(x))).permute(0, 2, 1, 3, 4)
        x = F.gelu(self.norm13(self.conv12(x)))
        x = F.gelu(self.norm15(self.conv14(x))).permute(0, 4, 3, 2, 1)
        x = F.gelu(self.norm18(self.conv17(x)))
        return F.relu(self.conv19(x)).squeeze(-1)


KINDS: dict[str, tuple[type[Head], dict[str, Any]]] = {
    "plain": (Plain, {}),
    "before": (Before, {}),
    "ours, computed again": (Head, {"keep": False}),
    "ours": (Head, {}),
}


@dataclass(frozen=True)
class Args:
    """Attributes:
    clusterers: N, one table row per head for each.
    classes: K.
    bf16: add rows under autocast.
    kind: measure this one alone, in this process.
    """

    clusterers: tuple[int, ...] = (8, 80)
    classes: int = 500
    size: int = 96
    threads: int = 1
    bf16: bool = False
    kind: str = ""


def measure(args: Args) -> dict[str, float]:
    """Processor seconds and memory of one pass of one head."""
    cls, options = KINDS[args.kind]
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tiny = cls(2, (2,) * 3, 2, 2, 128.0, **options)
    tiny(torch.randn(1, 2, 2, 2, 2)).sum().backward()  # torch imports parts of itself at first use
    head = cls(CHANNELS, (args.size,) * 3, args.clusterers[0], args.classes, 128.0, **options)
    lines_7_to_12_s = timed_lines(head) if cls is not Plain else [float("nan")]
    f_BFXYZ = torch.randn(1, CHANNELS, args.size, args.size, args.size)
    f_BFXYZ = f_BFXYZ.contiguous(
        memory_format=torch.channels_last_3d
    ).requires_grad_()  # as LoGoNet gives them
    reset_peak()
    before_bytes, start_s = resident_bytes(), time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
        loss = head(f_BFXYZ).float().square().mean()
    loss.backward()
    seconds = time.process_time() - start_s
    return {
        "s": seconds,
        "lines_7_to_12_s": sum(lines_7_to_12_s),
        "peak_gib": (peak_bytes() - before_bytes) / 2**30,
    }


def timed_lines(head: Head) -> list[float]:
    """Fills the list it returns with the processor seconds of lines 7-12, forward and backward."""
    seconds: list[float] = []
    run = head._lines_7_to_12

    def lines(y_NBXZY: Tensor) -> Tensor:
        start_s = time.process_time()
        q_NBJZK = run(y_NBXZY)
        seconds.append(time.process_time() - start_s)
        marks: list[float] = []
        q_NBJZK.register_hook(lambda grad: marks.append(time.process_time()))
        y_NBXZY.register_hook(lambda grad: seconds.append(time.process_time() - marks[0]))
        return q_NBJZK

    nn.Module.__setattr__(head, "_lines_7_to_12", lines)
    return seconds


def main(args: Args) -> None:
    if args.kind:
        print(json.dumps(measure(args)))
        return
    about, rows = machine() | {"threads": args.threads}, []
    for bf16 in (False, True) if args.bf16 else (False,):
        for num_clusterers in args.clusterers:
            kinds = [kind for kind in KINDS if kind != "plain" or num_clusterers <= MOST_PLAIN]
            for kind in kinds:
                command = [sys.executable, __file__, "--kind", kind, "--clusterers", str(num_clusterers)]
                command += ["--threads", str(args.threads), "--classes", str(args.classes)]
                command += ["--size", str(args.size), "--bf16" if bf16 else "--no-bf16"]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                rows.append({"head": kind, "N": num_clusterers, "bf16": bf16, **json.loads(done.stdout)})
                print(rows[-1], file=sys.stderr, flush=True)
    print(table(rows))
    print(sentence(about))
    print(json.dumps({"benchmark": "head", **about, "rows": rows}))


def table(rows: list[dict[str, Any]]) -> str:
    base = {r["N"]: r for r in rows if r["head"] == "before" and not r["bf16"]}
    lines = []
    for r in rows:
        old = base[r["N"]]
        shares = [f"{r[key] / old[key]:.2f}" for key in ("s", "lines_7_to_12_s")]
        kind = f"{r['head']}, bf16" if r["bf16"] else r["head"]
        numbers = [f"{r['s']:.1f}", shares[0], f"{r['lines_7_to_12_s']:.1f}", shares[1]]
        lines.append([kind, str(r["N"]), *numbers, f"{r['peak_gib']:.2f}"])
    return markdown(["head", "N", "s", "of before", "lines 7-12, s", "of before", "peak GiB"], lines)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
