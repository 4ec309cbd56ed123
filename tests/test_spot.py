"""Machines that come and go on a real Ray cluster of several raylets: the same loss curve, and no step twice.

make test-chaos
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from logonet.data import phantom
from tools import drill

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]
EPOCHS = 3  # of ten steps


def test_machines_come_and_go_and_the_head_is_lost(tmp_path: Path) -> None:
    """What `make drill` does: a planned change loses no step, an unplanned one at most two."""
    lost, came, noticed, new_head = drill.drill(str(tmp_path / "drill"), epochs=10).events
    assert came.resumed >= came.stored
    assert noticed.resumed >= noticed.stored
    for event in (lost, new_head):
        assert event.stored - event.resumed <= 2, event


def test_sigterm_to_a_worker_and_to_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fixed number of workers: bit for bit what it would have been."""
    monkeypatch.setenv("LOGONET_HOME", str(tmp_path / "home"))
    scans = phantom.write_dataset(str(tmp_path / "scans"), 4, size_vox=(40, 40, 40))
    job = drill.pretraining(scans, "spot", EPOCHS)

    def start() -> drill.Run:
        return drill.Run(str(tmp_path / "root"), str(tmp_path / "root.log"), *job, "--workers", "2")

    undisturbed = drill.undisturbed(str(tmp_path), 2, job)
    run = start()
    try:
        run.wait_for(lambda: run.world_reached(2), "2 workers stored a step")
        run.workers()[-1].send_signal(signal.SIGTERM)
        run.wait_for(lambda: "workers were asked to go" in run.said(), "the workers were asked to go")
        first = int(run.said().split("workers were asked to go: step ")[1].split()[0])
        run.wait_for(lambda: f"resumed after step {first:,} of" in run.said(), "the run went on")
        run.wait_for(lambda: run.world_reached(2, first), "2 workers stored another step")
        second = run.stop()
        run = start()
        run.end()
    finally:
        run.kill()
    print("left after steps", first, "and", second)
    assert f"resumed after step {second:,} of" in run.said()
    assert run.history() == undisturbed.history()
    ours, theirs = (one.weights(10 * EPOCHS) for one in (run, undisturbed))
    assert drill.apart(ours, theirs) == 0
