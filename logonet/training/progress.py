"""What a run tells of itself between the ends of two epochs."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from logonet.training.loop import Loop

TELL_S = 60.0  # between two lines of a log
WATCH_S = 10.0  # between two readings for monitoring, which Prometheus fetches about as often


@dataclass(frozen=True)
class Reading:
    """How training went over the last seconds.

    Attributes:
        step: that is done, of the whole run.
        loss: the mean over this rank's samples.
        samples_per_s: of all ranks together.
        data_wait_share: of the time, how much this rank waited for data.
        remaining_s: to the last epoch's end, at the pace of this process so far.
    """

    step: int
    loss: float
    samples_per_s: float
    data_wait_share: float
    remaining_s: float

    def line(self, total_steps: int, unit: str) -> str:
        """What a log shows of it."""
        left = timedelta(seconds=math.ceil(self.remaining_s))
        return (
            f"step {self.step:,}/{total_steps:,}  loss {self.loss:.4f}  {self.samples_per_s:.2f} {unit}/s, "
            f"{self.data_wait_share:.0%} waiting for data  {left} left"
        )


class Pace:
    """How long a loop's steps take, from its creation on."""

    def __init__(self, loop: Loop):
        self.loop, self.first_step, self.started = loop, loop.step, time.monotonic()

    def remaining_s(self) -> float:
        done = self.loop.step - self.first_step
        return (time.monotonic() - self.started) / done * (self.loop.total_steps - self.loop.step)


class Meter:
    """Reads a loop at most every ``every_s`` seconds, each time over the steps since it did so last.

    A reading copies one loss from the device; the steps between two readings cost a look at the clock.
    """

    def __init__(self, loop: Loop, pace: Pace, every_s: float):
        self.loop, self.pace, self.every_s = loop, pace, every_s
        self.restart()

    def restart(self) -> None:
        """Begin with the coming step; called after each epoch, as validating is not training."""
        loop = self.loop
        self.started, self.step, self.waited_s = time.monotonic(), loop.step, loop.timing["wait_s"]
        self.loss = loop.partial.get("loss", 0.0)

    def reading(self) -> Reading | None:
        """None where it is too early for one."""
        loop, wall_s = self.loop, time.monotonic() - self.started
        if wall_s < self.every_s:
            return None
        total, count = (loop.partial["loss"] - self.loss).tolist()
        read = Reading(
            loop.step,
            total / count if count else math.nan,
            (loop.step - self.step) * loop.cfg.global_batch / wall_s,
            (loop.timing["wait_s"] - self.waited_s) / wall_s,
            self.pace.remaining_s(),
        )
        self.restart()
        return read
