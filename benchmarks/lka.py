"""Depthwise convolutions of large kernel attention: torch's own ``F.conv3d`` in both memory layouts, against ours.

    python benchmarks/lka.py [--threads 2] [--repeats 5]

Float32, batch 1, on the CPU, at the sizes a 96^3 crop gives the normal network, and at 128 channels on 24^3.
"dilated" is kernel 7 with dilation 3, the one that the summary is about; the ordinary depthwise ones are ours
in the backward pass only. A speedup is over the faster of torch's two layouts; each time is the best of the
repeats, the three ways taking turns so that a busy machine slows all alike.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from logonet.networks import _conv

# kernel, dilation, side of the map, channels, where
CASES = [
    (7, 3, 24, 128, "design"),
    (7, 3, 24, 64, "global 1"),
    (7, 3, 12, 128, "global 2"),
    (7, 3, 6, 256, "global 3"),
    (7, 3, 3, 512, "global 4"),
    (7, 3, 12, 64, "local 1"),
    (7, 3, 6, 128, "local 2"),
    (5, 1, 24, 64, "global 1"),
    (5, 1, 6, 128, "local 2"),
    (3, 1, 24, 512, "MLP, global 1"),
    (3, 1, 12, 512, "MLP, local 1"),
    (3, 1, 6, 1024, "MLP, local 2"),
]
WAYS = ("contiguous", "channels_last", "ours")


def one_way(way: str, kernel: int, dilation: int, side: int, channels: int) -> tuple[Callable[[], None], ...]:
    """The forward pass and the backward pass (gradients of input, weight and bias) as timed calls."""
    layout = torch.contiguous_format if way == "contiguous" else torch.channels_last_3d
    rng = torch.Generator().manual_seed(0)
    x = (
        torch.randn((1, channels, side, side, side), generator=rng)
        .contiguous(memory_format=layout)
        .requires_grad_()
    )
    weight = torch.randn((channels, 1, kernel, kernel, kernel), generator=rng).requires_grad_()
    bias = torch.randn(channels, generator=rng).requires_grad_()

    def convolve() -> Tensor:
        if way == "ours":
            return (_conv.dilated_depthwise if dilation == 3 else _conv.depthwise)(x, weight, bias)
        padding = dilation * (kernel // 2)
        return F.conv3d(x, weight, bias, padding=padding, dilation=dilation, groups=channels)

    def forward() -> None:
        with torch.no_grad():
            convolve()

    out = convolve()
    grad = torch.randn(out.shape, generator=rng).contiguous(memory_format=layout)

    def backward() -> None:
        torch.autograd.grad(out, (x, weight, bias), grad, retain_graph=True)

    return forward, backward


def best_ms(calls: list[Callable[[], None]], repeats: int) -> list[float]:
    best = [math.inf] * len(calls)
    for turn in range(repeats + 1):
        for i, call in enumerate(calls):
            start_s = time.perf_counter()
            call()
            if turn:  # the first is for warming up
                best[i] = min(best[i], 1e3 * (time.perf_counter() - start_s))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    table = Table(title=f"milliseconds, {args.threads} threads, torch {torch.__version__}")
    for column in (
        "conv",
        "map",
        "where",
        *(f"{p} {w}" for p in ("fwd", "bwd") for w in WAYS),
        "fwd x",
        "bwd x",
    ):
        table.add_column(column, justify="right")
    rows: list[dict[str, Any]] = []
    for kernel, dilation, side, channels, where in CASES:
        ways = [one_way(way, kernel, dilation, side, channels) for way in WAYS]
        forward_ms = best_ms([forward for forward, _ in ways], args.repeats)
        backward_ms = best_ms([backward for _, backward in ways], args.repeats)
        row: dict[str, Any] = {
            "conv": f"dilated {kernel}" if dilation > 1 else f"depthwise {kernel}",
            "map": f"{side}^3",
            "channels": channels,
            "where": where,
            "forward_ms": dict(zip(WAYS, forward_ms)),
            "backward_ms": dict(zip(WAYS, backward_ms)),
            "speedup_forward": min(forward_ms[:2]) / forward_ms[2],
            "speedup_backward": min(backward_ms[:2]) / backward_ms[2],
        }
        rows.append(row)
        times = [f"{ms:.2f}" for ms in (*forward_ms, *backward_ms)]
        speedups = [f"{row[f'speedup_{p}']:.1f}" for p in ("forward", "backward")]
        table.add_row(row["conv"], f"{channels} x {side}^3", where, *times, *speedups)
    Console(width=150).print(table)

    dilated = [row for row in rows if row["conv"] == "dilated 7"]
    summary = {
        f"speedup_{p}": math.exp(sum(math.log(row[f"speedup_{p}"]) for row in dilated) / len(dilated))
        for p in ("forward", "backward")
    }
    least = {
        f"least_speedup_{p}": min(row[f"speedup_{p}"] for row in dilated) for p in ("forward", "backward")
    }
    print("Summary: geometric mean (and least) of the dilated rows' speedups.")
    print(json.dumps({"rows": rows, **summary, **least, "threads": args.threads}))


if __name__ == "__main__":
    main()
