"""SIGKILL in the middle, the same command again: the result must be that of the run never killed, bit for bit.

make test-chaos
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest

from logonet.cli.machines import ChaosArgs
from logonet.core import seeding
from logonet.data import phantom
from logonet.storage import artifacts
from logonet.sweep import records
from tools import chaos, processes
from tools.chaos import timeless
from tools.processes import kill

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1500)]
REPO = Path(__file__).parents[1]
WORKERS = 3  # from three on, the order in which gradients are added could differ
SETTINGS = [
    "split=null",
    "crops.per_scan=3",
    "train.epochs=6",
    "train.global_batch=6",
    "train.batch_size=2",
    "train.warmup_epochs=1",
    "train.checkpoint_every_s=0",
]


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("scans")
    phantom.write_dataset(str(folder), 4, size_vox=(40, 40, 40))
    return str(folder)


def start(scans: str, root: Path, *extra: str) -> subprocess.Popen[bytes]:
    command = ["jobs/pretrain.py", "--recipe", "demo", "--data", scans, "--root", str(root)]
    command += ["--workers", str(WORKERS), "--experiment", "chaos"]
    for setting in [*SETTINGS, *extra]:
        command += ["--set", setting]
    return launch(root, command)


def launch(root: Path, job: list[str], address: str | None = None) -> subprocess.Popen[bytes]:
    """A job script in a process group of its own, its words in ``<root>.log``; on its own Ray without ``address``."""
    command = [sys.executable, *job, "--object-store-mb", "300"]
    env = chaos.clean_environment(LOGONET_HOME=str(root / "home"))
    if address is not None:
        env["RAY_ADDRESS"] = address
    return processes.launch(command, str(root.parent / f"{root.name}.log"), env=env, cwd=REPO)


def finish(process: subprocess.Popen[bytes], root: Path) -> tuple[list[dict[str, Any]], str]:
    wait(process, root)
    history, files = outcome(root, "pretrain")
    return history, files["method.safetensors"]


def wait(process: subprocess.Popen[bytes], root: Path) -> None:
    assert process.wait(timeout=600) == 0, log_of(root)[-4000:]


def outcome(root: Path, stage: str) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The history of the finished run of ``stage``, and the SHA-256 of its files."""
    (manifest,) = (root / stage).glob("*/manifest.json")
    files = json.loads(manifest.read_text())["files"]
    history = json.loads((manifest.parent / "history.json").read_text())
    return timeless(history), {name: stored["sha256"] for name, stored in files.items()}


def log_of(root: Path) -> str:
    return (root.parent / f"{root.name}.log").read_text()


def wait_for(found: Callable[[], Any], process: subprocess.Popen[bytes], seconds: float = 300) -> Any:
    """The first true value of ``found``."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if value := found():
            return value
        assert process.poll() is None, f"the run, which was to be killed, ended ({process.returncode})"
        time.sleep(0.05)
    raise AssertionError(f"the run was not where it was to be killed within {seconds:g} s")


def checkpoint_done(root: Path, step: int, stage: str = "pretrain") -> Path | None:
    done = sorted((root / stage).glob(f"*/checkpoints/step-{step:08d}/manifest.json"))
    return done[0].parent if done else None


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
    time.sleep(seeding.rng(0, "chaos", str(torn)).uniform(0.05, 0.5))
    kill(first)
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
    kill(first)
    assert finish(start(scans, root), root) == undisturbed


# ------------------------------------------------------------------------- finetuning and prediction

FINETUNING = [
    "split.test_share=0",
    "split.folds=4",
    "train.epochs=4",
    "train.steps_per_epoch=8",
    "train.global_batch=3",
    "train.checkpoint_every_steps=3",
    "train.validate_every_epochs=1",
]
WEIGHTS = ("method.safetensors", "best.safetensors", "model/weights.safetensors")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A backbone to start from, as pretraining leaves it: a resumed run must not go back to it."""
    import torch
    from safetensors.torch import save_file

    from logonet import networks
    from logonet.recipes import TINY_LOGONET

    torch.manual_seed(1)
    net = networks.build(TINY_LOGONET.name, 1, 2, **TINY_LOGONET.config)
    path = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    save_file(net.state_dict(), path)
    return str(path)


def finetune(scans: str, root: Path, weights: str) -> subprocess.Popen[bytes]:
    job = ["jobs/finetune.py", "--recipe", "demo", "--data", scans, "--root", str(root), "--init", weights]
    job += ["--workers", str(WORKERS), "--experiment", "chaos"]
    for setting in FINETUNING:
        job += ["--set", setting]
    return launch(root, job)


@pytest.fixture(scope="module")
def finetuned_undisturbed(scans: str, weights: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finetuned") / "root"
    root.mkdir()
    wait(finetune(scans, root, weights), root)
    return root


def test_finetuning_killed_mid_epoch(
    scans: str, weights: str, finetuned_undisturbed: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    first = finetune(scans, root, weights)
    wait_for(lambda: checkpoint_done(root, 12, "finetune"), first)  # in the middle of epoch 2 of 4
    time.sleep(seeding.rng(0, "chaos", "finetune").uniform(0.05, 0.5))
    kill(first)
    assert not list((root / "finetune").glob("*/manifest.json"))
    wait(finetune(scans, root, weights), root)
    (history, files), (expected, expected_files) = (
        outcome(r, "finetune") for r in (root, finetuned_undisturbed)
    )
    assert history == expected
    assert {name: files[name] for name in WEIGHTS} == {name: expected_files[name] for name in WEIGHTS}
    assert "resumed after step 1" in log_of(root)


@pytest.fixture(scope="module")
def bucket_of_scans(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("new")
    phantom.write_dataset(str(folder), 12, seed=1, size_vox=(64, 64, 64))
    return str(folder / "imagesTr")


def predict(model: Path, scans: str, output: Path) -> subprocess.Popen[bytes]:
    job = ["jobs/predict.py", "--model", str(model), "--input", scans, "--output", str(output)]
    return launch(output, [*job, "--workers", "2"])


def label_maps(output: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in output.glob("*.nii.gz")}


def test_prediction_killed_in_the_middle(
    finetuned_undisturbed: Path, bucket_of_scans: str, tmp_path: Path
) -> None:
    (model,) = (p.parent for p in (finetuned_undisturbed / "finetune").glob("*/manifest.json"))
    whole, output = tmp_path / "whole", tmp_path / "output"
    whole.mkdir()
    output.mkdir()
    wait(predict(model, bucket_of_scans, whole), whole)
    expected = label_maps(whole)
    assert len(expected) == 12

    first = predict(model, bucket_of_scans, output)
    wait_for(lambda: len(list(output.glob(".cases/*/row.json"))) >= 3, first)
    kill(first)
    rows = {p: p.stat().st_mtime_ns for p in output.glob(".cases/*/row.json")}
    assert 3 <= len(rows) < 12
    wait(predict(model, bucket_of_scans, output), output)
    assert label_maps(output) == expected
    assert all(p.stat().st_mtime_ns == then for p, then in rows.items())
    assert len(list(output.glob(".cases/*/row.json"))) == 12
    assert (output / "predictions.csv").exists()


# ------------------------------------------------------------------------------------------------ sweeps

GRID = "search:\n  method.phi1: {grid: [0.1, 0.2, 0.3]}\n"


def sweep(scans: str, root: Path, address: str | None = None) -> subprocess.Popen[bytes]:
    space = root.parent / "grid.yaml"
    space.write_text(GRID)
    job = ["jobs/sweep.py", "--recipe", "demo", "--data", scans, "--root", str(root), "--space", str(space)]
    job += ["--objective", "accuracy", "--no-stop-early", "--concurrent", "1"]
    # A head has more CPUs than a Ray of our own: without this a worker there has more threads, which add otherwise.
    job += ["--cpus-per-worker", str(min(2, os.cpu_count() or 1))]
    for setting in ("split=null", "crops.per_scan=3", "train.epochs=4", "train.warmup_epochs=1"):
        job += ["--set", setting]
    return launch(root, job, address)


def trials_of(root: Path) -> dict[int, Any]:
    uri = str(root / "sweep" / "grid")
    return {t.index: t for t in records.read_all(uri)} if (root / "sweep").exists() else {}


def one_ended_and_one_under_way(root: Path) -> dict[int, Any]:
    trials = trials_of(root)
    ended = {i: t for i, t in trials.items() if t.status == "done"}
    under_way = [t for t in trials.values() if t.status == "running" and t.history]
    return ended if under_way else {}


def weights_of(root: Path) -> dict[int, str]:
    """SHA-256 of what each trial has pretrained."""
    found = {i: artifacts.find(t.pretrain) for i, t in trials_of(root).items()}
    return {i: artifact.files["method.safetensors"].sha256 for i, artifact in found.items() if artifact}


@pytest.fixture(scope="module")
def swept_undisturbed(scans: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("swept") / "root"
    root.mkdir()
    wait(sweep(scans, root), root)
    return root


@pytest.fixture
def heads(tmp_path: Path) -> Iterator[Callable[[], chaos.Raylets]]:
    """Starts Ray heads, and stops them all at the end."""
    env = chaos.clean_environment(LOGONET_HOME=str(tmp_path / "root" / "home"))
    with contextlib.ExitStack() as stack, mock.patch.dict(os.environ, env, clear=True):

        def start() -> chaos.Raylets:
            head = chaos.Raylets(0, head_cpus=4)
            stack.callback(head.stop)
            return head

        yield start


@pytest.mark.parametrize("how", ["driver-killed", "ray-stopped"])
def test_a_sweep_goes_on(
    scans: str, swept_undisturbed: Path, tmp_path: Path, how: str, heads: Callable[[], Any]
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    if how == "driver-killed":
        first, address = sweep(scans, root), None
        before = wait_for(lambda: one_ended_and_one_under_way(root), first, 400)
        kill(first)
    else:
        head = heads()
        first = sweep(scans, root, head.address)
        before = wait_for(lambda: one_ended_and_one_under_way(root), first, 400)
        head.stop()
        assert first.wait(timeout=300) != 0, "a sweep without a cluster ended well"
        address = heads().address
    assert [t.status for t in trials_of(root).values()].count("done") < 3
    wait(sweep(scans, root, address), root)
    after = trials_of(root)
    assert {i: after[i] for i in before} == before, "a trial that had ended was touched"
    assert [t.status for t in after.values()] == ["done"] * 3
    assert weights_of(root) == weights_of(swept_undisturbed)
    expected = trials_of(swept_undisturbed)
    assert {i: timeless(t.history) for i, t in after.items()} == {
        i: timeless(t.history) for i, t in expected.items()
    }


# ------------------------------------------------------------------------------------------- logonet chaos


def test_every_kind_of_kill_on_several_raylets(tmp_path: Path) -> None:
    """What `make chaos` does to every stage, 20 times, done 10 times to pretraining."""
    cfg = ChaosArgs(dir=str(tmp_path), stages=("pretrain",), kills=10)
    (result,) = chaos.run(cfg)
    assert result.equal, result
    row = result.row()
    assert row["kills"] == 10 and all(row[kind] for kind in chaos.KINDS)
    assert row["restarts"] >= row["driver"] + row["checkpoint"]
    logged = [json.loads(line) for line in (tmp_path / "kills.jsonl").read_text().splitlines()]
    assert [note["kind"] for note in logged] == [k.kind for k in chaos.plan(0, "pretrain", 10)]
    assert chaos.run(cfg) == [result], "what is done is not done again"
