"""Where work on many items runs: in this process here, on a Ray cluster in `logonet.distributed.executor`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol

from logonet.core.errors import Stopped

Fn = Callable[..., Any]
Workers = Literal["tasks", "data actors", "model actors"]


class Executor(Protocol):
    """Runs a function over items. What an item's answer is depends on the item alone, never on who computes it when."""

    @property
    def device(self) -> Any:
        """Where a model actor's network runs: "cuda" if each actor has a GPU, "cpu" if not."""

    def stream(
        self, fn: Fn, items: Sequence[Any], *, shared: Sequence[Any] = (), workers: Workers = "tasks"
    ) -> Iterator[tuple[int, Any]]:
        """(position, answer) of every item, as the answers come.

        Args:
            fn: called as ``fn(item, *shared)``; it and the items are pickled where work leaves this process.
            shared: large values that all calls read, held once on each machine.
            workers: "tasks" keep nothing between calls. Actors keep ``fn``, which may hold on to what it has built:
                "data actors" on the CPUs of the data tasks, "model actors" with a training worker's CPUs and GPU.
        """

    def quarantined(self, stage: str, scans: int) -> None:
        """Show where the run is watched that ``stage`` cannot use ``scans`` scans."""


class InProcess:
    """Runs everything in this process, one item after the other; a debugger can follow."""

    device: Any = "cpu"

    def stream(
        self, fn: Fn, items: Sequence[Any], *, shared: Sequence[Any] = (), workers: Workers = "tasks"
    ) -> Iterator[tuple[int, Any]]:
        for i, item in enumerate(items):
            yield i, fn(item, *shared)

    def quarantined(self, stage: str, scans: int) -> None:
        """Nobody watches this process."""


def attempt(fn: Fn, *args: Any) -> Any:
    """What ``fn`` gives, or the exception that it raises. `Stopped`, which concerns all, is raised."""
    try:
        return fn(*args)
    except Stopped:
        raise
    except Exception as err:
        return err


def run_all(
    executor: Executor,
    fn: Fn,
    items: Iterable[Any],
    *,
    shared: Sequence[Any] = (),
    workers: Workers = "tasks",
    note: Callable[[Any], None] = lambda answer: None,
) -> list[Any]:
    """The answers in the order of ``items``; ``note`` is called with each as it comes."""
    items = list(items)
    answers: dict[int, Any] = {}
    for i, answer in executor.stream(fn, items, shared=shared, workers=workers):
        answers[i] = answer
        note(answer)
    return [answers[i] for i in range(len(items))]
