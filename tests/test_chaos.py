"""SIGKILL in the middle, the same command again: the result must be that of the run never killed, bit for bit.

make test-chaos
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import timeless

from logonet import draws, phantom

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1500)]
REPO = Path(__file__).parents[1]
WORKERS = 3  # from three on, the order in which gradients are added could differ
SETTINGS = [
    "crops.per_scan=3",
    "train.epochs=6",
    "train.global_batch=6",
    "train.batch_size=2",
    "train.warmup_epochs=1",
]


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("scans")
    phantom.write_dataset(str(folder), 4, size_vox=(40, 40, 40))
    return str(folder)


def start(scans: str, root: Path, *extra: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "jobs/pretrain.py", "--recipe", "demo", "--data", scans, "--root", str(root)]
    command += ["--workers", str(WORKERS), "--object-store-mb", "300", "--experiment", "chaos"]
    for setting in [*SETTINGS, *extra]:
        command += ["--set", setting]
    env = {**os.environ, "LOGONET_HOME": str(root / "home"), "OMP_NUM_THREADS": "1"}
    env.pop("RAY_ADDRESS", None)
    log = open(root.parent / f"{root.name}.log", "ab")
    return subprocess.Popen(
        command, cwd=REPO, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


def finish(process: subprocess.Popen[bytes], root: Path) -> tuple[list[dict[str, Any]], str]:
    assert process.wait(timeout=600) == 0, (root.parent / f"{root.name}.log").read_text()[-4000:]
    (manifest,) = (root / "pretrain").glob("*/manifest.json")
    files = json.loads(manifest.read_text())["files"]
    history = json.loads((manifest.parent / "history.json").read_text())
    return timeless(history), files["method.safetensors"]["sha256"]


def wait_for(found: Callable[[], Any], process: subprocess.Popen[bytes], seconds: float = 300) -> Any:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if value := found():
            return value
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    raise AssertionError("it never came to that")


def checkpoint_done(root: Path, step: int) -> Path | None:
    done = sorted((root / "pretrain").glob(f"*/checkpoints/step-{step:08d}/manifest.json"))
    return done[0].parent if done else None


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL the driver; then whatever of its Ray outlives it, by pid."""
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    for child in alive:
        child.kill()
    psutil.wait_procs(alive, timeout=20)


@pytest.fixture(scope="module")
def undisturbed(scans: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    root = tmp_path_factory.mktemp("undisturbed") / "root"
    root.mkdir()
    return finish(start(scans, root), root)


@pytest.mark.parametrize("torn", [False, True], ids=["sound", "torn-newest-checkpoint"])
def test_driver_and_workers_killed_mid_epoch(
    scans: str, undisturbed: tuple[list[dict[str, Any]], str], tmp_path: Path, torn: bool
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    first = start(scans, root)
    newest = wait_for(lambda: checkpoint_done(root, 6 * 2), first)  # epoch 2 of 6 is over
    time.sleep(draws.rng(0, "chaos", str(torn)).uniform(0.05, 0.5))
    kill_all(first)
    done = sorted(p.parent for p in newest.parent.glob("*/manifest.json"))
    assert not list((root / "pretrain").glob("*/manifest.json"))
    if torn:
        weights = done[-1] / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    assert finish(start(scans, root), root) == undisturbed
    log = (tmp_path / "root.log").read_text()
    resumed_at = int(done[-2 if torn else -1].name.removeprefix("step-"))
    assert f"resumed after step {resumed_at:,}" in log


def test_a_killed_worker_is_replaced_while_the_run_goes_on(
    scans: str, undisturbed: tuple[list[dict[str, Any]], str], tmp_path: Path
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    process = start(scans, root)
    wait_for(lambda: checkpoint_done(root, 6 * 2), process)
    workers = [
        p
        for p in psutil.Process(process.pid).children(recursive=True)
        if "RayTrainWorker" in " ".join(p.cmdline())
    ]
    assert len(workers) >= WORKERS
    workers[-1].kill()
    assert finish(process, root) == undisturbed
    assert "resumed after step" in (tmp_path / "root.log").read_text()


def test_a_kill_while_clusterers_are_fitted(
    scans: str, undisturbed: tuple[list[dict[str, Any]], str], tmp_path: Path
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    first = start(scans, root)
    wait_for(lambda: list((root / "clusterers").glob("*/fits/*.safetensors")), first)
    kill_all(first)
    assert finish(start(scans, root), root) == undisturbed
