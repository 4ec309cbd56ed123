"""The demo ends well, and its artifacts, histories and weights are those of tests/pins.json, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from logonet.storage import object_store
from logonet.storage.artifacts import Artifact
from tools.chaos import timeless
from tools.demo import newest
from tools.s3server import S3Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[1]
PINS: dict[str, Any] = json.loads((ROOT / "tests" / "pins.json").read_text())["demo"]
STAGES = ("pretrain", "finetune", "evaluation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the demo has run, as `make demo` runs it."""
    folder = tmp_path_factory.mktemp("demo")
    env = {
        k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "RAY_", "MLFLOW_", "LOGONET_HOME"))
    }
    done = subprocess.run(
        [sys.executable, "-m", "tools.demo", "--dir", str(folder)],
        cwd=ROOT,
        env={**env, "OMP_NUM_THREADS": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return folder


@pytest.fixture(scope="module")
def made(folder: Path) -> dict[str, tuple[Artifact, list[dict[str, Any]]]]:
    """Each stage's artifact and history."""
    with S3Server(folder / "s3") as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.env().items():
            patch.setenv(name, value)
        found = {}
        for stage in STAGES:
            artifact = newest(stage)
            found[stage] = artifact, timeless(object_store.read_json(artifact.uri_of("history.json")))
        return found


def test_the_demo_leaves_a_page_and_label_maps(folder: Path) -> None:
    page = (folder / "index.html").read_text()
    assert "python jobs/pretrain.py --recipe demo" in page
    assert (folder / "mlflow.db").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_ids_are_the_pinned_ones(made: dict[str, Any], stage: str) -> None:
    artifact, history = made[stage]
    assert [artifact.fingerprint] == PINS[stage]["ids"]
    assert len(history) == len(PINS[stage]["history"])


@pytest.mark.parametrize("stage", STAGES)
def test_histories_and_weights_are_the_pinned_ones(made: dict[str, Any], stage: str) -> None:
    here = {"cpu": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}
    recorded = {key: PINS[key] for key in here}
    if here != recorded:
        pytest.skip(f"the pinned bits are those of {recorded}; this is {here}")
    if (os.cpu_count() or 1) > 3:
        pytest.skip(
            "the pinned bits are those of one thread a worker; with more cores a worker has more threads"
        )
    artifact, history = made[stage]
    assert history == PINS[stage]["history"]
    assert {name: artifact.files[name].sha256 for name in PINS[stage]["sha256"]} == PINS[stage]["sha256"]
