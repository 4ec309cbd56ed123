"""Training in this process: no cluster, no other processes unless asked for. A debugger can follow every line."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from logonet.core import sigterm
from logonet.core.config import Component
from logonet.core.errors import Stopped
from logonet.core.execution import InProcess, attempt
from logonet.training import checkpoints
from logonet.training.batches import to_tensors
from logonet.training.config import Config, Job, accumulation
from logonet.training.dataset import Dataset
from logonet.training.loop import GO_ON, LEAVE, Left, Loop
from logonet.training.schedule import MicroBatches
from logonet.training.step import memory_watched
from logonet.training.validation import best_step


class LocalExecutor(InProcess):
    """Runs stages and training in this process, with the results of a cluster of one worker.

    Args:
        num_workers: processes that prepare batches; 0 prepares them here.
        device: where to train; None takes a GPU where there is one.
    """

    def __init__(self, num_workers: int = 0, device: str | None = None):
        self.num_workers = num_workers
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def check(self, cfg: Config, method: Component) -> None:
        """UserError when the batch sizes do not fit together."""
        accumulation(cfg, 1)

    def side_by_side(
        self, fn: Callable[[Any, Any], Any], items: Sequence[Any], at_once: int = 0
    ) -> Iterator[tuple[int, Any]]:
        """(position, answer or exception) of ``fn(executor, item)`` for every item, as they end.

        Args:
            at_once: so many calls, each in a process of its own; 0 or 1 calls here, one after the other.

        Raises:
            Stopped: SIGTERM came. What trained has stored its step, what else ran has come to its end.
        """
        if at_once < 2:
            for i, item in enumerate(items):
                yield i, attempt(fn, self, item)
            return
        asked = threading.Event()

        def ask_children() -> None:
            asked.set()
            for child in multiprocessing.active_children():
                child.terminate()

        spawn = multiprocessing.get_context("spawn")
        with (
            ProcessPoolExecutor(at_once, spawn, initializer=_listen) as pool,
            sigterm.listening(ask_children),
        ):
            position = {pool.submit(_unless_leaving, fn, self, item): i for i, item in enumerate(items)}
            try:
                for done in as_completed(position):
                    yield position[done], attempt(done.result)
            except Stopped:
                pool.shutdown(cancel_futures=True)
                raise
        if asked.is_set():
            raise Stopped(STOPPED)

    @memory_watched()
    def train(self, job: Job, dataset: Dataset) -> dict[str, Any]:
        """Train ``job``; returns {"history", "files", "tracked"}. Run again, it resumes.

        Raises:
            Diverged: a gradient or a validation's logits are not finite.
            OutOfMemory: the GPU's memory is too small.
            Stopped: SIGTERM came, which only the main thread hears; the step that was under way is stored.
        """
        loop = Loop(job, dataset.schedule, device=self.device, validation=dataset.validation)
        loop.restore()
        positions = MicroBatches(dataset.schedule, job.train.batch_size, loop.step, loop.total_steps)
        batches = to_tensors(local_batches(dataset, positions, self.num_workers), self.device)
        asked = Asked()
        with sigterm.listening(asked.event.set):
            try:
                history = loop.run(batches, interruptions=asked)
            except Left as left:
                raise Stopped(
                    f"stopped after step {left.step:,}, which is stored; the same call goes on from there"
                ) from None
        return finish(job, loop, history)


STOPPED = "stopped; the same call goes on from there"
_LEAVING = threading.Event()  # of a process of `LocalExecutor.side_by_side`


def _listen() -> None:
    sigterm.listen(_LEAVING.set)


def _unless_leaving(fn: Callable[[Any, Any], Any], executor: LocalExecutor, item: Any) -> Any:
    if _LEAVING.is_set():
        raise Stopped(STOPPED)
    try:
        return fn(executor, item)
    except Stopped:
        _LEAVING.set()  # or the call that waits in this process's queue would begin
        raise


class Asked:
    """Whether this process was asked to leave; one of `logonet.training.loop.Interruptions`."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def due(self, step_s: float, save_s: float) -> tuple[int, bool]:
        return (LEAVE if self.event.is_set() else GO_ON), False

    def ask(self) -> None:
        """There is nobody to ask."""

    def left(self) -> None:
        """There is nobody to tell."""


def local_batches(
    dataset: Dataset, positions: MicroBatches, num_workers: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """The prepared batches at ``positions``, in order, from a plain loader of ``num_workers`` processes."""
    prepared: Any = dataset  # which torch asks for the batch at each of the sampler's positions
    order = (positions[i] for i in range(len(positions)))
    # As dict, or torch would make tensors of the arrays.
    yield from DataLoader(prepared, batch_size=None, sampler=order, num_workers=num_workers, collate_fn=dict)


def finish(job: Job, loop: Loop, history: list[dict[str, Any]], tracked: bool = False) -> dict[str, Any]:
    """Store the trained weights; what `train` returns."""
    files = checkpoints.save_final(job.uri, loop.method, loop.network, history, best_step(history))
    return {"history": history, "files": {k: asdict(v) for k, v in files.items()}, "tracked": tracked}
