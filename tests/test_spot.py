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
from test_spot_notice import AWS, aws_page, metadata

from logonet.data import phantom
from tools.demo_sweep import kill
from tools.s3server import free_ports

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1500)]
REPO = Path(__file__).parents[1]
EPOCHS, STEPS = 14, 10  # more than any of these runs comes to: they are stopped when all has happened
COMPARED = 4  # epochs
SETTINGS = [
    "split=null",
    "crops.per_scan=3",
    f"train.epochs={EPOCHS}",
    f"train.steps_per_epoch={STEPS}",
    "train.global_batch=10",  # five batches, which 2 and 4 workers share unequally
    "train.batch_size=2",
    "train.lr=1e-4",  # AdamW begins with signs of gradients: at 1e-3 rounding makes 1 % by epoch 3
    "train.warmup_epochs=1",
    "train.checkpoint_every_s=0",
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

    def history(self) -> list[dict[str, Any]]:
        """Of the newest checkpoint."""
        newest = max(self.root.glob("pretrain/*/checkpoints/*/manifest.json"), default=None)
        return [] if newest is None else timeless(json.loads(newest.read_text())["facts"]["history"])

    def weights(self, step: int) -> str:
        """SHA-256 of the model after ``step``."""
        (manifest,) = self.root.glob(f"pretrain/*/checkpoints/step-{step:08d}/manifest.json")
        return json.loads(manifest.read_text())["files"]["model.safetensors"]["sha256"]

    def stop(self) -> int:
        """SIGTERM to the driver; returns the step that it left after."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(timeout=300) == 128 + signal.SIGTERM, self.said()[-4000:]
        step = int(self.said().split("stopped after step ")[-1].split(",")[0])
        assert step == max(self.worlds())
        return step

    def kill(self) -> None:
        """Whatever is left of it."""
        if self.process.poll() is None:
            kill(self.process)


def losses_apart(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> list[float]:
    """How far the epochs' losses are apart, relatively; samples, masks and learning rates must be the same."""
    found, expected = found[:COMPARED], expected[:COMPARED]
    assert (
        [e["step"] for e in found]
        == [e["step"] for e in expected]
        == [STEPS * (k + 1) for k in range(COMPARED)]
    )
    assert [e["lr"] for e in found] == [e["lr"] for e in expected]
    for key in ("masked_share", "accuracy_floor"):
        assert [e[key] for e in found] == pytest.approx([e[key] for e in expected], rel=1e-12)
    return [abs(a["loss"] / b["loss"] - 1) for a, b in zip(found, expected)]


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("scans")
    phantom.write_dataset(str(folder), 4, size_vox=(40, 40, 40))
    return str(folder)


def undisturbed_run(scans: str, folder: Path, workers: int) -> Run:
    run = Run(scans, folder / "root", "--workers", str(workers))
    try:
        run.wait_for(lambda: len(run.history()) >= COMPARED, 1200)
        run.stop()
    finally:
        run.kill()
    return run


@pytest.fixture(scope="module")
def undisturbed(scans: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """On two workers, from the first step on."""
    return undisturbed_run(scans, tmp_path_factory.mktemp("undisturbed"), 2)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without CPUs, on which the driver's controller runs, and two nodes."""
    from ray.cluster_utils import Cluster

    for name in [n for n in os.environ if n.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv(
        "RAY_worker_niceness", "0"
    )  # 15 would have the times below be those of whatever else runs
    head = {"num_cpus": 0, "object_store_memory": 150 << 20, "include_dashboard": True}
    head |= {"dashboard_host": "127.0.0.1", "dashboard_port": free_ports()}
    made = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
    try:
        made.nodes = [made.add_node(num_cpus=NODE_CPUS) for _ in range(2)]
        yield made
    finally:
        made.shutdown()


def test_a_machine_is_lost_another_comes_and_goes_with_notice(
    scans: str, undisturbed: Run, cluster: Any, tmp_path: Path
) -> None:
    """2:4 workers on two machines of two each. One dies without a word, a third joins, and gets notice and is gone."""
    flags = ["--workers", "2:4", "--resize-every-s", "10", "--set", "train.checkpoint_every_steps=2"]
    run = Run(scans, tmp_path / "root", *flags, address=cluster.address)
    try:
        scenario(run, cluster, run.wait_for(lambda: run.world_reached(4)))
        run.wait_for(lambda: len(run.history()) >= COMPARED, 1200)
        run.stop()
    finally:
        run.kill()
    apart = losses_apart(run.history(), undisturbed.history())
    # What rounding alone makes of training: a number of workers that never changed, and another.
    (tmp_path / "four").mkdir()
    four = undisturbed_run(scans, tmp_path / "four", 4)
    rounding = losses_apart(four.history(), undisturbed.history())
    print("losses of the epochs apart, relatively:", *(f"{x:.1e}" for x in apart))
    print("those of four workers and of two:", *(f"{x:.1e}" for x in rounding))
    assert apart[0] < 1e-4
    # Rounding grows as training goes on: an order of magnitude between two such runs is usual. A sample counted twice
    # or a gradient weighed wrongly shows in the first epoch.
    assert max(apart) < 30 * max(rounding)


def scenario(run: Run, cluster: Any, on_four: int) -> None:
    cluster.remove_node(cluster.nodes[1], allow_graceful=False)
    lost = time.monotonic()
    on_two = run.wait_for(lambda: run.world_reached(2, on_four))
    print(f"lost after step {on_four}; 2 workers store step {on_two} {time.monotonic() - lost:.0f} s later")
    going = cluster.add_node(num_cpus=NODE_CPUS)
    came = time.monotonic()
    four_again = run.wait_for(lambda: run.world_reached(4, on_two))
    planned = max(step for step, world in run.worlds().items() if world == 2)
    print(
        f"2 workers leave after {planned}; 4 store {four_again} {time.monotonic() - came:.0f} s after the node came"
    )
    # The change was planned, so it lost nothing: the four began where the two left off.
    assert f"resumed after step {planned:,} of" in run.said().rpartition("2 workers")[2]

    # As on AWS: a page of the machine's metadata service, and the watch that the deploy files start.
    logonet, pages = str(Path(sys.executable).parent / "logonet"), dict[str, str]()
    with metadata(pages, "aws") as base:
        command = [logonet, "spot-watch", "--metadata", base, "--node-id", going.node_id]
        env = {**os.environ, "RAY_ADDRESS": cluster.address}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as watch:
            assert watch.stdout is not None
            assert "watching" in watch.stdout.readline()
            noticed = time.time() + NOTICE_S
            pages[AWS] = aws_page(noticed)
            assert watch.wait(timeout=NOTICE_S) == 0
    time.sleep(max(0.0, noticed - time.time()))
    assert "workers were asked to go" in run.said(), run.said()[-4000:]
    left = max(step for step, world in run.worlds().items() if world == 4)
    cluster.remove_node(going, allow_graceful=False)
    gone = time.monotonic()
    two_again = run.wait_for(lambda: run.world_reached(2, left))
    print(
        f"4 workers leave after {left}; 2 store {two_again} {time.monotonic() - gone:.0f} s after the node was gone"
    )
    assert f"workers were asked to go: step {left:,} is stored" in run.said()
    assert f"resumed after step {left:,} of" in run.said().rpartition("workers were asked to go")[2]


def test_sigterm_to_a_worker_and_to_the_driver(scans: str, undisturbed: Run, tmp_path: Path) -> None:
    """A fixed number of workers: bit for bit what it would have been."""
    run = Run(scans, tmp_path / "root", "--workers", "2")
    try:
        run.wait_for(lambda: run.world_reached(2))
        run.workers()[-1].send_signal(signal.SIGTERM)
        run.wait_for(lambda: "workers were asked to go" in run.said())
        first = int(run.said().split("workers were asked to go: step ")[1].split()[0])
        run.wait_for(lambda: f"resumed after step {first:,} of" in run.said())
        run.wait_for(lambda: run.world_reached(2, first))
        second = run.stop()
        run = Run(scans, tmp_path / "root", "--workers", "2")
        run.wait_for(lambda: len(run.history()) >= COMPARED, 1200)
        run.stop()
    finally:
        run.kill()
    print("left after steps", first, "and", second)
    assert f"resumed after step {second:,} of" in run.said()
    assert run.history()[:COMPARED] == undisturbed.history()[:COMPARED]
    assert run.weights(COMPARED * STEPS) == undisturbed.weights(COMPARED * STEPS)
