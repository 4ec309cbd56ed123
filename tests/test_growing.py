"""Jobs on a cluster that grows: pools that start empty, spot capacity that comes late, jobs that share or give up."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from autoscaling import GrowingCluster

from logonet.data import phantom
from tools.mlflow_server import MLflowServer

REPO = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
STORE = {"object_store_memory": 80 << 20}

# A stage on CPUs, and training. No GPU is here, so that Ray Train is replaced by what concerns nodes of it.
JOB = """
import sys, time
from types import SimpleNamespace
import ray, ray.train.torch
from ray.util.placement_group import placement_group
from logonet import training
from logonet.cli import sentences
from logonet.core.config import Component
from logonet.distributed import cluster, ray_compat
from logonet.distributed.executor import RayExecutor

class Trainer:
    def __init__(self, *args, scaling_config, **kwargs):
        self.bundles = [scaling_config.resources_per_worker] * scaling_config.num_workers
    def fit(self):
        assert placement_group(self.bundles).wait(60)
        print("training", flush=True)
        time.sleep({train_s})
        return SimpleNamespace(return_value={{}})

def gpus():
    return ray.cluster_resources().get("GPU", 0)

ray.train.torch.TorchTrainer = Trainer
resources = cluster.Resources(workers=2, gpu={gpu}, wait_s={wait_s})
cfg = training.Config(global_batch=2, batch_size=1, validate_every_epochs=0)
parts = dict(backbone=Component("dynunet"), method=Component("mae3d"), tracking=None)
job = SimpleNamespace(uri="runs/pretrain/f", fingerprint="f", train=cfg, **parts)
with sentences(), cluster.connected(resources, logs=False):
    executor = RayExecutor(resources)
    {code}
"""
TRAIN = "executor.train(job, None)"


class Run:
    """A job as a process, and what it has said."""

    def __init__(self, growing: GrowingCluster, log: Path, code: str = TRAIN, **options: object) -> None:
        told = {"train_s": 0, "gpu": None, "wait_s": 120, "code": code} | options
        env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        env |= {"RAY_ADDRESS": growing.address, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
        env |= {"PYTHONPATH": str(REPO)}
        self.log = log
        with open(log, "wb") as out:
            command = [sys.executable, "-c", JOB.format(**told)]
            self.process = subprocess.Popen(command, env=env, cwd=REPO, stdout=out, stderr=out)

    def said(self, text: str) -> bool:
        assert text in self.log.read_text() or self.process.poll() is None, self.log.read_text()[-3000:]
        return text in self.log.read_text()

    def end(self) -> tuple[int, str]:
        try:
            return self.process.wait(timeout=200), self.log.read_text()
        finally:
            self.process.kill()


def wait(until: Callable[[], bool], seconds: float = 120) -> float:
    """How long it took."""
    began = time.monotonic()
    while not until():
        assert time.monotonic() < began + seconds, f"not within {seconds} s"
        time.sleep(0.2)
    return time.monotonic() - began


@pytest.fixture(scope="module")
def growing() -> Iterator[GrowingCluster]:
    with GrowingCluster(cpu=({"CPU": 4, **STORE}, 2), gpu=({"CPU": 8, "GPU": 1, **STORE}, 2)) as cluster:
        yield cluster


@pytest.fixture
def no_capacity(growing: GrowingCluster) -> Iterator[Path]:
    """There are no GPU nodes, and none to be had until the test says so."""
    wait(lambda: growing.gpu_nodes() == 0)
    growing.no_capacity.touch()
    yield growing.no_capacity
    growing.no_capacity.unlink(missing_ok=True)


def asked_nothing(growing: GrowingCluster) -> bool:
    return not growing.requested()


def test_empty_pools(growing: GrowingCluster, tmp_path: Path) -> None:
    """Stages with more to do than the CPU pool can hold bring no GPU node; training waits for two, without --gpu."""
    stage = """for kind in ("data actors", "tasks"):
        print(kind, sum(1 for _ in executor.stream(time.sleep, [0.5] * 60, workers=kind)), gpus(), flush=True)"""
    code, said = Run(growing, tmp_path / "log", f"{stage}\n    {TRAIN}").end()
    assert code == 0, said
    assert "data actors 60 0\ntasks 60 0\n" in said
    assert "waiting up to 120 s for nodes for 2 workers, 1 GPU each\n" in said
    assert "\n2 workers x 6 CPUs, 1 GPU each\ntraining\n" in said
    wait(lambda: asked_nothing(growing), 60)


def test_what_a_pool_can_start(growing: GrowingCluster, tmp_path: Path) -> None:
    bundles = [{"GPU": 1}, {"GPU": 2}, {"CPU": 4}, {"CPU": 4, "TPU": 1}]
    code = f"print([ray_compat.comes(bundle) for bundle in {bundles}])"
    ended, said = Run(growing, tmp_path / "log", code).end()
    assert ended == 0, said
    assert "[True, False, True, False]" in said


def test_a_job_that_gives_up_leaves_no_request(
    growing: GrowingCluster, no_capacity: Path, tmp_path: Path
) -> None:
    code, said = Run(growing, tmp_path / "log", wait_s=6).end()
    assert code != 0
    assert "Traceback" not in said
    assert "the cluster found no room for nodes for 2 workers, 1 GPU each in 6 s" in said
    assert asked_nothing(growing)


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGKILL])
def test_a_job_that_is_stopped_leaves_no_request(
    growing: GrowingCluster, no_capacity: Path, tmp_path: Path, kill: signal.Signals
) -> None:
    run = Run(growing, tmp_path / "log")
    wait(lambda: run.said("waiting up to"))
    assert not asked_nothing(growing)
    run.process.send_signal(kill)
    assert run.end()[0] != 0
    wait(lambda: asked_nothing(growing), 10)


def test_capacity_that_comes_late_and_a_second_job(
    growing: GrowingCluster, no_capacity: Path, tmp_path: Path
) -> None:
    first = Run(growing, tmp_path / "first", train_s=300, gpu=True)
    wait(lambda: first.said("waiting up to"))
    no_capacity.unlink()
    wait(lambda: first.said("training"))
    second = Run(growing, tmp_path / "second", gpu=True)
    wait(lambda: second.said("waiting up to"))
    assert not second.said("training")
    first.process.kill()
    code, said = second.end()
    assert code == 0, said
    assert "2 workers x 6 CPUs, 1 GPU each\ntraining\n" in said
    wait(lambda: asked_nothing(growing), 10)


def test_models_begin_on_one_node_and_take_those_that_come(growing: GrowingCluster, tmp_path: Path) -> None:
    wait(lambda: growing.gpu_nodes() == 0)
    code = """
    def where(item):
        time.sleep(2)
        return ray.get_runtime_context().get_node_id()
    nodes = [node for _, node in executor.stream(where, list(range(40)), workers="model actors")]
    print(executor.device, len(nodes), len(set(nodes)), [nodes.count(n) for n in set(nodes)])
    """
    code, said = Run(growing, tmp_path / "log", code.strip()).end()
    assert code == 0, said
    assert "cuda 40 2 " in said
    wait(lambda: asked_nothing(growing), 60)


def test_pretraining_from_empty_pools(growing: GrowingCluster, tmp_path: Path) -> None:
    wait(lambda: growing.gpu_nodes() == 0)  # of the tests before, which have more CPUs
    phantom.write_dataset(str(tmp_path / "scans"), 4, size_vox=(40, 40, 40))
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "LOGONET_HOME": str(tmp_path / "home")}
    env |= {"RAY_ADDRESS": growing.address, "PYTHONPATH": str(REPO)}
    job = [sys.executable, "jobs/pretrain.py", "--recipe", "demo", "--workers", "2", "--gpu", "False"]
    job += ["--data", str(tmp_path / "scans"), "--root", str(tmp_path / "runs")]
    for setting in ("clusterers.n=2", "clusterers.iterations=2", "train.epochs=1", "split=null"):
        job += ["--set", setting]
    with MLflowServer(str(tmp_path)) as server:
        env["MLFLOW_TRACKING_URI"] = server.uri
        done = subprocess.run(job, cwd=REPO, env=env, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    assert re.search(r"\n2 workers x (1\.5|3) CPUs\n", said), said[-3000:]  # on one node or on both
    wait(lambda: asked_nothing(growing), 60)
