"""Batches on their way to a GPU, which is played: in order, a few ahead, and gone when nobody wants them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from logonet.core.errors import BadScan
from logonet.training.batches import AHEAD, to_tensors

GPU = torch.device("cuda", 3)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is done on the GPU: the thread that does it, and what."""
    done: list[tuple[Any, ...]] = []

    def note(*what: Any) -> None:
        done.append((threading.current_thread().name, *what))

    def pin_memory(x: torch.Tensor) -> torch.Tensor:
        note("pin")
        return x

    def to(x: torch.Tensor, device: torch.device, non_blocking: bool) -> torch.Tensor:
        note("copy", device, non_blocking)
        return x

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: note("device", index))
    return done


def arrays(count: int, taken: list[int]) -> Iterator[dict[str, np.ndarray]]:
    for i in range(count):
        taken.append(i)
        yield {"x": np.full(2, i)}


def assert_no_thread() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("batches"):
            thread.join(30)
            assert not thread.is_alive()


def test_a_thread_of_the_same_gpu_moves_them_in_order(copies: list[tuple[Any, ...]]) -> None:
    got = [batch["x"].tolist() for batch in to_tensors(arrays(9, []), GPU)]
    assert got == [[i, i] for i in range(9)]
    assert [what for _, *what in copies] == [["device", 3], *([["pin"], ["copy", GPU, True]] * 9)]
    assert {name for name, *_ in copies} == {"batches_0"}
    assert_no_thread()


def test_it_is_a_few_ahead_and_ends_with_who_asks(copies: list[tuple[Any, ...]]) -> None:
    taken: list[int] = []
    batches = to_tensors(arrays(100, taken), GPU)
    for _ in range(3):
        next(batches)
    assert len(taken) <= 3 + AHEAD
    batches.close()  # type: ignore[attr-defined]
    assert_no_thread()
    assert len(taken) <= 3 + AHEAD


def test_what_goes_wrong_there_is_raised_here_and_in_order(copies: list[tuple[Any, ...]]) -> None:
    def broken() -> Iterator[dict[str, np.ndarray]]:
        yield from arrays(2, [])
        raise BadScan("torn")

    batches = to_tensors(broken(), GPU)
    assert [next(batches)["x"][0].item() for _ in range(2)] == [0, 1]
    with pytest.raises(BadScan, match="torn"):
        next(batches)
    assert_no_thread()


def test_a_batch_that_does_not_come_does_not_hold_up_the_end(copies: list[tuple[Any, ...]]) -> None:
    comes = threading.Event()

    def stuck() -> Iterator[dict[str, np.ndarray]]:
        yield from arrays(1, [])
        comes.wait()

    batches = to_tensors(stuck(), GPU)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    comes.set()
    assert_no_thread()
