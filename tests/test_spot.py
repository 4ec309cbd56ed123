"""Machines that come and go on a real Ray cluster of several raylets: the same loss curve, and no step twice.

make test-chaos
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import timeless

from logonet import phantom
from logonet.s3server import free_ports

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1500)]
REPO = Path(__file__).parents[1]
EPOCHS, STEPS = 14, 10  # time enough to lose a machine and to find another
SETTINGS = [
    "split=null",
    "crops.per_scan=3",
    f"train.epochs={EPOCHS}",
    f"train.steps_per_epoch={STEPS}",
    "train.global_batch=10",  # five batches, which 2 and 4 workers share unequally
    "train.batch_size=2",
    "train.lr=1e-3",
    "train.warmup_epochs=1",
    "train.keep_checkpoints=1000",
]
NODE_CPUS = 4  # two workers, and one CPU for what feeds them
NOTICE_S = 40


class Run:
    """A pretraining in a process of its own."""

    def __init__(self, scans: str, root: Path, *flags: str, address: str | None = None):
        root.mkdir(exist_ok=True)
        self.root, self.log = root, root.parent / f"{root.name}.log"
        command = [
            sys.executable,
            "jobs/pretrain.py",
            "--recipe",
            "demo",
            "--data",
            scans,
            "--root",
            str(root),
        ]
        command += ["--experiment", "spot", "--object-store-mb", "300", *flags]
        for setting in SETTINGS:
            command += ["--set", setting]
        env = {**os.environ, "LOGONET_HOME": str(root / "home"), "OMP_NUM_THREADS": "1"}
        env.pop("RAY_ADDRESS", None)
        if address is not None:
            env |= {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"}
        self.process = subprocess.Popen(
            command,
            cwd=REPO,
            env=env,
            stdout=open(self.log, "ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait_for(self, found: Callable[[], Any], seconds: float = 400) -> Any:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if value := found():
                return value
            assert self.process.poll() is None, f"the run ended too early\n{self.said()[-4000:]}"
            time.sleep(0.1)
        raise AssertionError(f"it never came to that\n{self.said()[-4000:]}")

    def said(self) -> str:
        return self.log.read_text()

    def worlds(self) -> dict[int, int]:
        """Step -> how many ranks wrote its checkpoint."""
        found = {}
        for manifest in sorted(self.root.glob("pretrain/*/checkpoints/*/manifest.json")):
            facts = json.loads(manifest.read_text())["facts"]
            found[facts["step"]] = facts["world"]
        return found

    def world_reached(self, world: int, after: int = 0) -> int | None:
        """The first step after ``after`` that ``world`` ranks have stored."""
        return next((step for step, ranks in self.worlds().items() if ranks == world and step > after), None)

    def workers(self) -> list[psutil.Process]:
        mine = psutil.Process(self.process.pid).children(recursive=True)
        return [p for p in mine if "RayTrainWorker" in " ".join(p.cmdline())]

    def outcome(self) -> tuple[list[dict[str, Any]], str]:
        """The history, and the weights' SHA-256."""
        assert self.process.wait(timeout=900) == 0, self.said()[-4000:]
        (manifest,) = self.root.glob("pretrain/*/manifest.json")
        history = json.loads((manifest.parent / "history.json").read_text())
        files = json.loads(manifest.read_text())["files"]
        return timeless(history), files["method.safetensors"]["sha256"]


def assert_same_curve(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """The same samples, masks and learning rates; losses to rounding, which the later steps make grow."""
    assert [e["step"] for e in found] == [e["step"] for e in expected]
    assert [e["lr"] for e in found] == [e["lr"] for e in expected]
    assert [e["masked_share"] for e in found] == pytest.approx(
        [e["masked_share"] for e in expected], rel=1e-12
    )
    worst = [abs(a["loss"] / b["loss"] - 1) for a, b in zip(found, expected)]
    print("largest difference of an epoch's loss:", max(worst), "of the first three:", max(worst[:3]))
    assert max(worst[:3]) < 1e-4
    assert max(worst) < 0.02


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("scans")
    phantom.write_dataset(str(folder), 4, size_vox=(40, 40, 40))
    return str(folder)


@pytest.fixture(scope="module")
def undisturbed(scans: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    """On two workers, from the first step to the last."""
    return Run(scans, tmp_path_factory.mktemp("undisturbed") / "root", "--workers", "2").outcome()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without CPUs, on which the driver's controller runs, and two nodes."""
    from ray.cluster_utils import Cluster

    for name in [n for n in os.environ if n.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    head = {"num_cpus": 0, "object_store_memory": 150 << 20, "include_dashboard": True}
    head |= {"dashboard_host": "127.0.0.1", "dashboard_port": free_ports()}
    made = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
    try:
        made.nodes = [made.add_node(num_cpus=NODE_CPUS) for _ in range(2)]
        yield made
    finally:
        made.shutdown()


def test_a_machine_that_is_lost_and_one_that_comes(
    scans: str, undisturbed: tuple[list[dict[str, Any]], str], cluster: Any, tmp_path: Path
) -> None:
    """2:4 workers on two machines; one dies without a word, and later another joins."""
    flags = ["--workers", "2:4", "--resize-every-s", "10", "--set", "train.checkpoint_every_steps=5"]
    run = Run(scans, tmp_path / "root", *flags, address=cluster.address)
    before = run.wait_for(lambda: run.world_reached(4))
    cluster.remove_node(cluster.nodes[1], allow_graceful=False)
    lost = time.monotonic()
    fewer = run.wait_for(lambda: run.world_reached(2, before))
    print(f"on 2 workers again {time.monotonic() - lost:.0f} s after the loss")
    cluster.add_node(num_cpus=NODE_CPUS)
    came = time.monotonic()
    more = run.wait_for(lambda: run.world_reached(4, fewer))
    print(f"on 4 workers again {time.monotonic() - came:.0f} s after another came")
    history, _ = run.outcome()
    worlds = run.worlds()
    print("steps stored by 4, 2 and 4 workers:", before, fewer, more, worlds)
    # The change from 2 to 4 was planned, so it lost nothing: the last checkpoint of the two is where the four began.
    planned = max(step for step, world in worlds.items() if world == 2)
    assert f"resumed after step {planned:,} of" in run.said()
    assert f"resumed after step {planned:,} of" in run.said().split("2 workers")[-1]
    assert_same_curve(history, undisturbed[0])


def test_a_machine_that_gives_notice_costs_no_step(
    scans: str, undisturbed: tuple[list[dict[str, Any]], str], cluster: Any, tmp_path: Path
) -> None:
    """Checkpoints at epochs' ends only, and yet nothing is computed twice: as clouds do it, notice and then the end."""
    run = Run(scans, tmp_path / "root", "--workers", "2:4", "--resize-every-s", "10", address=cluster.address)
    run.wait_for(lambda: run.world_reached(4))
    going = cluster.nodes[1]
    ray = str(Path(sys.executable).parent / "ray")
    command = [ray, "drain-node", "--address", cluster.address, "--node-id", going.node_id]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    subprocess.run([*command, "--deadline-remaining-seconds", str(NOTICE_S)], check=True, timeout=60)
    given = time.monotonic()
    time.sleep(NOTICE_S)
    assert "workers were asked to go" in run.said(), run.said()[-4000:]
    cluster.remove_node(going, allow_graceful=False)
    after = max(step for step, world in run.worlds().items() if world == 4)
    run.wait_for(lambda: run.world_reached(2, after))
    print(f"on 2 workers {time.monotonic() - given - NOTICE_S:.0f} s after the machine was gone")
    history, _ = run.outcome()
    extra = [step for step in run.worlds() if step % STEPS]
    print("stored within epochs:", extra, "left after", after)
    assert len(extra) == 2 or after % STEPS == 0  # one as the notice came, one as the time was nearly over
    assert f"step {after:,} is stored" in run.said()
    assert f"resumed after step {after:,} of" in run.said()
    assert_same_curve(history, undisturbed[0])


def test_sigterm_to_a_worker_and_to_the_driver(
    scans: str, undisturbed: tuple[list[dict[str, Any]], str], tmp_path: Path
) -> None:
    """A fixed number of workers: bit for bit what it would have been."""
    run = Run(scans, tmp_path / "root", "--workers", "2")
    run.wait_for(lambda: run.world_reached(2))
    run.workers()[-1].send_signal(signal.SIGTERM)
    run.wait_for(lambda: "workers were asked to go" in run.said())
    first = int(run.said().split("workers were asked to go: step ")[1].split()[0])
    run.wait_for(lambda: f"resumed after step {first:,} of" in run.said())
    run.wait_for(lambda: run.world_reached(2, first))
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(timeout=120) == 128 + signal.SIGTERM, run.said()[-4000:]
    second = int(run.said().split("stopped after step ")[1].split(",")[0])
    assert second == max(run.worlds())
    again = Run(scans, tmp_path / "root", "--workers", "2")
    found = again.outcome()
    print("left after steps", first, "and", second)
    assert f"resumed after step {second:,} of" in again.said()
    assert found == undisturbed
