"""Making a training sample from a crop: processor milliseconds of every method's ``prepare``.

    python benchmarks/prepare.py                                # all methods, 96^3, one channel, default settings
    python benchmarks/prepare.py --methods glmae --draws 10

One thread. A method's figure is the mean over ``draws`` samples, each with random numbers of its own, and the best of
the rounds, in which the methods take turns. The crop has been read before.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time

import _measure
import numpy as np
import torch
import tyro

from logonet import methods
from logonet.core import seeding
from logonet.planning import memory


@dataclasses.dataclass(frozen=True)
class Args:
    methods: tuple[str, ...] = tuple(methods.names())
    side: int = 96
    draws: int = 40
    rounds: int = 3


def main(args: Args) -> None:
    torch.set_num_threads(1)
    about = _measure.machine()
    # glibc keeps freed memory once a block as large as a data task's was freed; before that it gives a sample's arrays
    # back to the system, and new pages cost several ms a crop.
    np.ones(31 << 20, np.uint8)
    spec = methods.DataSpec((args.side,) * 3, cluster_sizes=(80,) * 80)
    crop = memory.raw_sample(spec, seeding.rng(0, "crop")) | {"labels_XYZ": np.zeros(spec.size_vox, np.uint8)}
    best_ms = dict.fromkeys(args.methods, math.inf)
    for _ in range(args.rounds):
        for name in args.methods:
            best_ms[name] = min(best_ms[name], mean_ms(name, crop, args.draws))
    rows = [[f"`{name}`", f"{ms:.2f}"] for name, ms in best_ms.items()]
    print(_measure.sentence(about))
    print(_measure.markdown(["method", "processor ms a crop"], rows))
    print(json.dumps({"processor_ms": best_ms, "args": dataclasses.asdict(args)} | about))


def mean_ms(name: str, crop: dict[str, np.ndarray], draws: int) -> float:
    prepare, cfg = methods.prepare(name), methods.config(name)
    prepare(crop, cfg, seeding.rng(0, "warm"))
    started_s = time.process_time()
    for draw in range(draws):
        prepare(crop, cfg, seeding.rng(0, "draw", draw))
    return 1000 * (time.process_time() - started_s) / draws


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
