"""Which samples a step takes, and at what learning rate: pure functions of the step."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from logonet.core import seeding

if TYPE_CHECKING:  # that file imports torch, which data tasks do without
    from logonet.training.config import Config


@dataclass(frozen=True)
class SampleSchedule:
    """The samples of every step of a run, as one sequence of positions.

    Step ``s`` takes ``global_batch`` positions. A pass is a seeded permutation of all samples, filled up from its own
    start to whole steps. A rank takes a contiguous part of each step (see `shard_micro_batches`), so another number of
    workers sees the same samples at the same steps.

    Attributes:
        num_samples: P.
        global_batch: samples of one step, over all workers.
        epoch_steps: steps that count as an epoch; None is one pass. With it, runs on few and on many samples are
            equally long (as nnU-Net's 250 iterations).
    """

    num_samples: int
    global_batch: int
    seed: int
    epoch_steps: int | None = None

    @classmethod
    def of(cls, num_samples: int, cfg: Config) -> SampleSchedule:
        return cls(num_samples, cfg.global_batch, cfg.seed, cfg.steps_per_epoch)

    @property
    def steps_per_pass(self) -> int:
        return -(-self.num_samples // self.global_batch)

    @property
    def steps_per_epoch(self) -> int:
        return self.epoch_steps or self.steps_per_pass

    def at(self, step: int, slot: int) -> tuple[int, int]:
        """(repeat, sample) of position ``slot`` (0 .. global_batch - 1) of step ``step``.

        ``repeat`` is another number each time a sample comes, so that samples repeated to fill a pass get new crops and
        new augmentation: 16 copies of the same crops of one scan would teach no more than one.
        """
        number, within = divmod(step, self.steps_per_pass)
        order = _epoch_order(self.seed, number, self.num_samples)
        position = within * self.global_batch + slot
        repeats_per_pass = -(-self.steps_per_pass * self.global_batch // self.num_samples)
        repeat, place = divmod(position, self.num_samples)
        return number * repeats_per_pass + repeat, int(order[place])


def shard_micro_batches(count: int, rank: int, world: int) -> range:
    """Which of a step's ``count`` micro-batches a rank takes: a contiguous part, evenly but for one."""
    return range(rank * count // world, (rank + 1) * count // world)


@dataclass(frozen=True)
class MicroBatches:
    """One rank's micro-batches from ``start_step`` to before ``stop_step``, as (step, slot) positions."""

    schedule: SampleSchedule
    batch_size: int
    start_step: int
    stop_step: int
    rank: int = 0
    world: int = 1

    @property
    def own(self) -> range:
        return shard_micro_batches(self.schedule.global_batch // self.batch_size, self.rank, self.world)

    def __len__(self) -> int:
        return (self.stop_step - self.start_step) * len(self.own)

    def __getitem__(self, i: int) -> list[tuple[int, int]]:
        step, place = self.start_step + i // len(self.own), self.own[i % len(self.own)]
        return [(step, place * self.batch_size + k) for k in range(self.batch_size)]


_epoch_order = functools.lru_cache(maxsize=4)(seeding.epoch_order)


def lr_at(step: int, cfg: Config, steps_per_epoch: int) -> float:
    """Learning rate of optimizer step ``step``: linear warm-up to the peak, then the schedule (cosine: paper Table 2).

    Epochs in which the encoder is frozen come first and are a linear warm-up of their own.
    """
    total, warmup, frozen = (
        round(epochs * steps_per_epoch) for epochs in (cfg.epochs, cfg.warmup_epochs, cfg.frozen_epochs)
    )
    if step < frozen:
        return cfg.lr * (step + 1) / frozen
    step, total = step - frozen, total - frozen
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    share = (step - warmup) / max(1, total - warmup)
    match cfg.schedule:
        case "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * share))
        case "poly":
            factor = (1 - share) ** cfg.poly_power
        case "step":
            factor = cfg.decay_factor ** sum(share >= at for at in cfg.decay_at)
        case "constant":
            factor = 1.0
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * factor
