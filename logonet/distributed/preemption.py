"""How a run hears that a machine is about to go, or that one has come: SIGTERM, Ray's preemption notice, and the word
of the driver or of Ray's controller.

The ranks hear of it at different moments and must all do the same, so each only says what it thinks is due at a step's
end (`Notices.due`), and `logonet.training.loop.Loop` has them agree on the most urgent.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from logonet.core import sigterm
from logonet.distributed import ray_compat
from logonet.training.loop import GO_ON, LEAVE, SAVE

ASK_EVERY_S = 1.0
LEAST_MARGIN_S = 5.0  # before a machine goes, beside what steps and saving take


class Notices:
    """What one rank has heard.

    Args:
        run: that `ray_compat.tell` names; only rank 0 listens to it.
        preemption: Ray's ``get_preemption_info``, which all ranks must call equally often.
    """

    def __init__(self, run: str, rank: int, preemption: Callable[[], Any]):
        self.run, self.rank, self.preemption = run, rank, preemption
        self._sigterm = threading.Event()
        self._told = False
        self._deadline_s: float | None = None  # Unix time when a machine goes; 0 where Ray does not know
        self._saved_for_s: float | None = None  # the deadline that a checkpoint was already written for
        self._asked_s = -math.inf

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Hear SIGTERM in this block, instead of ending by it."""
        if threading.current_thread() is not threading.main_thread():
            # Ray Train runs us in a thread, and Python lets only the main one set handlers: that runs actors' methods.
            _LISTENERS[self.run] = self._sigterm
            ray_compat.in_main_thread(_listen, self.run)
        with sigterm.listening(self._sigterm.set):
            yield

    def due(self, step_s: float, save_s: float) -> tuple[int, bool]:
        """What this rank thinks is due at the end of a step, and whether all ranks should call `ask` now.

        Args:
            step_s: what the step took.
            save_s: what writing a checkpoint took the last time; 0 when unknown.
        """
        if self._sigterm.is_set():
            return LEAVE, False
        if self.rank:
            return GO_ON, False
        ask = time.monotonic() - self._asked_s >= ASK_EVERY_S
        if ask:
            self._asked_s = time.monotonic()
            self._told = self._told or ray_compat.told(self.run)
        if self._told:
            return LEAVE, False
        if self._deadline_s is None:
            return GO_ON, ask
        # Two of each, since neither takes the same time twice.
        margin_s = LEAST_MARGIN_S + 2 * (step_s + save_s)
        if time.time() > self._deadline_s - margin_s:
            return LEAVE, False
        if self._saved_for_s != self._deadline_s:
            self._saved_for_s = self._deadline_s
            return SAVE, ask
        return GO_ON, ask

    def ask(self) -> None:
        """Ask Ray whether a machine is going. All ranks wait for each other here."""
        info = self.preemption()
        if info is not None:
            self._deadline_s = info.deadline_ms / 1000 if info.deadline_ms else 0.0

    def left(self) -> None:
        """Say that the ranks have saved and leave."""
        if self._told:
            ray_compat.say_left(self.run)


_LISTENERS: dict[str, threading.Event] = {}


def _listen(run: str) -> None:
    sigterm.listen(_LISTENERS[run].set)
