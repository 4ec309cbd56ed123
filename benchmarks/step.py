"""Where a training step's time and memory go, at the paper's full size unless told otherwise.

    python benchmarks/step.py                          # LoGoNet normal, 96^3, N=80, K up to 500, batch 1
    python benchmarks/step.py --size 64 --clusterers 24 --k-max 100 --dims 16 32 64 128
    python benchmarks/step.py --head both              # and the same with the head as it was, for the ratio

One warm-up-free step is timed from the inside: the network's parts by hooks, the backward pass by when gradients
arrive at their seams. Seconds are processor seconds of all threads, beside the clock's for the whole. Resident memory
is read at each seam; the peak is the operating system's own.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import psutil
import torch
import tyro
from _measure import adamw, machine, one_step, sentence
from head import Before
from rich.console import Console
from rich.table import Table

from logonet import methods, training
from logonet.core import seeding
from logonet.core.config import Component
from logonet.methods import DataSpec


@dataclass(frozen=True)
class Args:
    size: int = 96
    clusterers: int = 80
    k_min: int = 80
    k_max: int = 500
    dims: tuple[int, ...] = ()
    threads: int = 2
    steps: int = 1
    checkpointing: bool = False
    head: Literal["ours", "before", "both"] = "ours"


class Seams:
    """Time and resident memory at named moments."""

    def __init__(self) -> None:
        self.process = psutil.Process(os.getpid())
        self.rows: list[tuple[str, float, float]] = []
        self.last_s = time.process_time()

    def mark(self, name: str) -> None:
        now_s = time.process_time()
        self.rows.append((name, now_s - self.last_s, self.process.memory_info().rss / 2**30))
        self.last_s = now_s


def batch_of(args: Args, sizes: tuple[int, ...], cfg: Any) -> dict[str, torch.Tensor]:
    """A smooth random crop: noise would make every patch alike."""
    rng = seeding.rng(0, "benchmark")
    coarse = torch.from_numpy(rng.random((1, 1, 8, 8, 8), dtype=np.float32))
    image = torch.nn.functional.interpolate(coarse, size=(args.size,) * 3, mode="trilinear")[0].numpy()
    labels_NZ = np.stack([rng.integers(0, k, args.size) for k in sizes]).astype(np.int16)
    sample = {"image_CXYZ": (image * 65535).astype(np.uint16), "labels_NZ": labels_NZ}
    prepared = methods.prepare("masked_clusters")(sample, cfg, rng)
    return {k: torch.from_numpy(v[None].copy()) for k, v in prepared.items()}


def main(args: Args) -> None:
    if args.head == "both":
        both(args)
    else:
        measure(args)


def both(args: Args) -> None:
    """Each in a process of its own."""
    about, found = machine() | {"threads": args.threads}, {}
    for head in ("before", "ours"):
        command = [sys.executable, __file__, "--head", head]
        for key, value in asdict(args).items():
            flag = f"--{key.replace('_', '-')}"
            if isinstance(value, bool):
                command += [flag if value else f"--no-{key}"]
            elif key != "head" and value != ():
                command += [flag, *(map(str, value) if isinstance(value, tuple) else (str(value),))]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        print(f"head: {head}\n{done.stdout}", flush=True)
        found[head] = json.loads(done.stdout.splitlines()[-1])
    ratio = {key: found["ours"][key] / found["before"][key] for key in ("step_s", "wall_s", "peak_gib")}
    print(
        f"of before: {ratio['step_s']:.2f} of the processor seconds, {ratio['wall_s']:.2f} of the clock's, "
        f"{ratio['peak_gib']:.2f} of the memory"
    )
    print(sentence(about))
    print(json.dumps({"benchmark": "step", **about, **found, "ratio": ratio}))


def measure(args: Args) -> None:
    torch.set_num_threads(args.threads)
    rng = seeding.rng(0, "counts")
    sizes = (args.k_max, *(int(k) for k in rng.integers(args.k_min, args.k_max + 1, args.clusterers - 1)))
    facts = DataSpec(size_vox=(args.size,) * 3, cluster_sizes=sizes, majority_labels=(0,) * len(sizes))
    seams = Seams()
    backbone: dict[str, Any] = {"name": "logonet", "checkpointing": args.checkpointing}
    if args.dims:
        backbone["dims"] = args.dims
    method = training.build_method(
        Component.of(backbone, "backbone"), Component("masked_clusters"), facts
    ).train()
    if args.head == "before":
        method.head.__class__ = Before  # the same layers, run as they were
    optimizer = adamw(method)
    batch = batch_of(args, sizes, methods.config("masked_clusters"))
    seams.mark("build")
    instrument(method, optimizer, seams)
    start_s = time.perf_counter()
    for number in range(args.steps):
        loss = one_step(method, optimizer, batch, number, torch.autocast("cpu", enabled=False))
        seams.mark("optimizer (AdamW)")
    wall_s = (time.perf_counter() - start_s) / args.steps
    num_params = sum(p.numel() for p in method.parameters() if p.requires_grad)
    report(args, num_params, seams, loss, wall_s)


def instrument(method: Any, optimizer: torch.optim.Optimizer, seams: Seams) -> None:
    """Mark the seams between the parts, forward by wrapping and backward by gradient hooks."""
    net = method.backbone
    encode, decode_features, head = net.encode, net.decode_features, method.head.forward

    def encode_marked(x: torch.Tensor) -> Any:
        seams.mark("prepare on device")
        feats = encode(x)
        seams.mark("forward: encoders")
        return feats

    def decode_marked(x: torch.Tensor, feats: Any) -> torch.Tensor:
        f = decode_features(x, feats)
        seams.mark("forward: decoders")
        feats[-1].register_hook(lambda grad: seams.mark("backward: decoders"))
        f.register_hook(lambda grad: seams.mark("backward: loss and head"))
        return f

    def head_marked(f: torch.Tensor) -> torch.Tensor:
        logits = head(f)
        seams.mark("forward: pretraining head")
        return logits

    net.encode, net.decode_features, method.head.forward = encode_marked, decode_marked, head_marked
    optimizer.register_step_pre_hook(lambda *_: seams.mark("backward: encoders"))


def report(args: Args, num_params: int, seams: Seams, loss: float, wall_s: float) -> None:
    steps = [row for row in seams.rows if row[0] != "build"]
    total_s = sum(s for _, s, _ in steps)
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    table = Table(
        title=f"One step, {args.size}^3, N={args.clusterers}, K<={args.k_max}, {args.threads} threads"
    )
    for column in ("part", "seconds", "share", "resident GiB after"):
        table.add_column(column, justify="left" if column == "part" else "right")
    merged: dict[str, tuple[float, float]] = {}
    for name, seconds, rss in steps:
        merged[name] = (merged.get(name, (0.0, 0.0))[0] + seconds, rss)
    for name, (seconds, rss) in merged.items():
        table.add_row(name, f"{seconds / args.steps:.2f}", f"{seconds / total_s:.0%}", f"{rss:.2f}")
    table.add_section()
    table.add_row("a step", f"{total_s / args.steps:.2f}", "", f"peak {peak_gib:.2f}")
    table.add_row("by the clock", f"{wall_s:.2f}", "", "")
    Console(width=100).print(table)
    print(
        f"{num_params:,} trainable parameters; weights, gradients and AdamW {16 * num_params / 2**30:.2f} GiB"
    )
    print(
        json.dumps(
            {
                "step_s": total_s / args.steps,
                "wall_s": wall_s,
                "peak_gib": peak_gib,
                "parts_s": {name: s / args.steps for name, (s, _) in merged.items()},
                "params": num_params,
                "loss": loss,
                "threads": args.threads,
            }
        )
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
