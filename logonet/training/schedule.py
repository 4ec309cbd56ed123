"""Which samples a step takes, and at what learning rate: pure functions of the step."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from logonet.core import seeding
from logonet.training.config import Config


@dataclass(frozen=True)
class SampleSchedule:
    """Which sample stands where: the whole run as one sequence of references.

    Step ``s`` uses positions ``s * global_batch`` up to the next step's; a pass is a seeded permutation
    of all samples, filled up from its own start to whole steps. A rank takes a contiguous part of each
    step (see `dealt`), so another number of workers sees the same samples at the same steps.

    ``epoch_steps`` is what counts as an epoch in steps; None is one pass. With it, runs on few and on many
    samples are equally long (as nnU-Net's 250 iterations).
    """

    num_samples: int
    global_batch: int
    seed: int
    epoch_steps: int | None = None

    @property
    def steps_per_pass(self) -> int:
        return -(-self.num_samples // self.global_batch)

    @property
    def steps_per_epoch(self) -> int:
        return self.epoch_steps or self.steps_per_pass

    def at(self, step: int, slot: int) -> tuple[int, int]:
        """(draw, sample) of position ``slot`` (0 .. global_batch - 1) of step ``step``.

        ``draw`` is the pass where passes are whole steps. Where they are filled up it still is another number each
        time a sample comes: 16 copies of the same crops of one case would teach no more than one.
        """
        number, within = divmod(step, self.steps_per_pass)
        order = _epoch_order(self.seed, number, self.num_samples)
        place = within * self.global_batch + slot
        draws_per_pass = -(-self.steps_per_pass * self.global_batch // self.num_samples)
        return number * draws_per_pass + place // self.num_samples, int(order[place % self.num_samples])


def shard_micro_batches(count: int, rank: int, world: int) -> range:
    """Which of a step's ``count`` micro-batches a rank takes: a contiguous part, evenly but for one."""
    return range(rank * count // world, (rank + 1) * count // world)


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    return seeding.epoch_order(seed, epoch, num_samples)


def lr_at(step: int, cfg: Config, steps_per_epoch: int) -> float:
    """Learning rate of optimizer step ``step``: linear warm-up to the peak, then cosine (paper Table 2)."""
    total, warmup = cfg.epochs * steps_per_epoch, round(cfg.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    share = (step - warmup) / max(1, total - warmup)
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * share))
