"""What a run tells of itself within an epoch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import LocalLoop, a_job, crops_dataset

from logonet.training import loop as training_loop
from logonet.training.batches import to_tensors
from logonet.training.local import local_batches
from logonet.training.progress import Reading
from logonet.training.schedule import MicroBatches
from logonet.training.step import step

pytestmark = pytest.mark.usefixtures("one_thread")


def run(folder: Path) -> tuple[LocalLoop, list[Reading]]:
    """A run of two steps an epoch, and what it has told."""
    loop, readings = LocalLoop(crops_dataset(folder / "crops"), a_job(str(folder / "run"), epochs=2)), []
    loop.restore()
    positions = MicroBatches(loop.schedule, loop.cfg.batch_size, loop.step, loop.total_steps)
    loop.run(to_tensors(local_batches(loop.dataset, positions), loop.device), watch=readings.append)
    return loop, readings


def test_a_reading_is_of_the_steps_since_the_last_and_changes_no_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unwatched, few = run(tmp_path / "unwatched")
    assert [r.step for r in few] == [
        e["step"] for e in unwatched.history
    ]  # epochs are shorter than what it waits
    assert " left" not in capsys.readouterr().out

    losses = []

    def noted(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        totals = step(*args, **kwargs)
        losses.append((totals["loss"][0] / totals["loss"][1]).item())
        return totals

    monkeypatch.setattr(training_loop, "step", noted)
    monkeypatch.setattr(training_loop, "TELL_S", 0.0)
    monkeypatch.setattr(training_loop, "WATCH_S", 0.0)
    loop, readings = run(tmp_path / "watched")
    assert [r.step for r in readings] == list(range(1, loop.total_steps + 1))
    assert [r.loss for r in readings[0::2]] == pytest.approx(losses[0::2])
    assert [r.loss for r in readings[1::2]] == [
        e["loss"] for e in loop.history
    ]  # an epoch's last step has its entry
    assert readings[0].remaining_s > readings[-1].remaining_s == 0
    assert all(0 <= r.data_wait_share <= 1 and r.samples_per_s > 0 for r in readings)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == len(loop.history)
    pattern = r"step 1/4  loss \d\.\d{4}  [\d.]+ crops/s, \d+% waiting for data  0:\d\d:\d\d left"
    assert re.fullmatch(pattern, lines[0])
    assert all(torch.equal(v, loop.method.state_dict()[k]) for k, v in unwatched.method.state_dict().items())
