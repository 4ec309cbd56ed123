"""docs/cluster.md on machines of its own kind: its units start a cluster, its commands and sentences are true there.

    make docs-run

Three machines (tests/machines.py) as the page's "Machines of your own" has them, a real S3 server and a real MLflow
server beside them. Commands are read from the page, so that one that is changed there is run here.
"""

from __future__ import annotations

import functools
import json
import os
import re
import secrets
import shlex
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from machines import HERE, Machine, machines

from logonet.data import phantom
from logonet.storage import object_store
from tools import s3server
from tools.mlflow_server import MLflowServer
from tools.s3server import S3Server

pytestmark = [pytest.mark.docs_run, pytest.mark.timeout(1800)]
REPO = Path(__file__).parents[1]
PAGE = (REPO / "docs/cluster.md").read_text()
BIN = Path(sys.executable).parent
DASHBOARD = "http://127.0.0.1:8265"
SHORT = (
    "train.epochs=2 train.steps_per_epoch=4 train.global_batch=4 train.batch_size=2 train.warmup_epochs=0 "
)
SHORT += "crops.per_scan=2 clusterers.n=2 clusterers.iterations=10 split=null"


def blocks(language: str, after: str) -> list[str]:
    """The code blocks of the page's section ``after``, with lines that go on joined."""
    section = PAGE.split(f"\n## {after}\n")[1].split("\n## ")[0]
    found = re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)
    return [block.replace("\\\n", " ") for block in found]


def command(start: str, after: str) -> list[str]:
    """The words of the command of section ``after`` that begins so."""
    lines = (line for block in blocks("bash", after) for line in block.splitlines())
    return shlex.split(next(line for line in lines if line.startswith(start)))


def start_commands() -> tuple[str, str, dict[str, str]]:
    """What systemd starts on the head and on the other machines, and the environment that the units set."""
    head, worker = blocks("ini", "Machines of your own")
    lines = [re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE) for unit in (head, worker)]
    env = dict(re.findall(r"^Environment=(\w+)=(.*)$", head + worker, re.MULTILINE))
    starts = [" ".join(line[1].split()) for line in lines if line]
    return starts[0], starts[1], env


class Cluster:
    """The machines, the head first, and how a user on the head talks to the cluster."""

    def __init__(self, nodes: list[Machine], logs: Path, token: str) -> None:
        self.nodes, self.head, self.logs, self.token = nodes, nodes[0], logs, token
        self.head_start, self.worker_start, self.env = start_commands()

    def start(self, index: int) -> None:
        line = self.worker_start if index else self.head_start
        line = line.replace("<head>", self.head.address).replace("/opt/logonet/.venv/bin", str(BIN))
        # Two cores that all three share; a real machine tells Ray of its own.
        line += f" --node-ip-address={self.nodes[index].address} --object-store-memory={150 << 20}"
        line += " --num-cpus=3" * (index > 0)
        shell = f"ulimit -n 65536; exec {line}"  # LimitNOFILE
        self.nodes[index].start(self.logs / f"node-{index}.log", "sh", "-c", shell)

    def submit(self, *words: str, options: tuple[str, ...] = (), limit_s: float = 600) -> str:
        """What ``ray job submit`` prints."""
        done = self.head.run("ray", "job", "submit", *options, "--", *words, limit_s=limit_s, **self.client())
        return done.stdout

    def client(self) -> dict[str, str]:
        return {"RAY_ADDRESS": DASHBOARD}

    def alive(self) -> int:
        """How many machines the cluster has."""
        return self.head.run("ray", "list", "nodes", **self.client()).stdout.count("ALIVE")

    def log(self, job: str) -> str:
        """What a job has printed so far."""
        return self.head.run("ray", "job", "logs", job, **self.client()).stdout

    def wait_for(self, text: str, job: str) -> None:
        """Until ``job`` has printed ``text``."""
        until = time.monotonic() + 600
        while text not in (said := self.log(job)):
            assert time.monotonic() < until, said
            time.sleep(2)

    def get(self, path: str) -> Any:
        """What the dashboard answers, asked on the head."""
        asks = f"curl -sf -H 'Authorization: Bearer {self.token}' {DASHBOARD}{path}"
        return json.loads(self.head.run("sh", "-c", asks).stdout)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=20) as reply:
            return reply.status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    token = secrets.token_hex(16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3server, "HOST", HERE)  # where all machines reach it
        env = {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "HOME": "/tmp",
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(REPO),
        }
        env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "OMP_NUM_THREADS": "1"}
        # Otherwise 15: whatever else runs here would go first.
        env |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", **start_commands()[2]}
        with (
            machines(3, env) as nodes,
            S3Server(folder / "s3") as store,
            MLflowServer(str(folder), HERE) as mlflow,
        ):
            for node in nodes:
                node.env |= {**store.env(), "MLFLOW_TRACKING_URI": mlflow.uri}
            for name, value in store.env().items():
                patch.setenv(name, value)
            object_store.create_bucket("s3://bucket")
            phantom.write_dataset("s3://bucket/scans", 4, size_vox=(40, 40, 40))
            made = Cluster(nodes, folder, token)
            for index in range(3):
                made.start(index)
            until = time.monotonic() + 240
            while not (made.alive() == 3 and answers(f"{mlflow.uri}/health")):
                assert time.monotonic() < until, (folder / "node-0.log").read_text()[-3000:]
                time.sleep(2)
            yield made


def pretraining(*more: str) -> list[str]:
    """The page's command on AWS, with a recipe for two cores."""
    words = command("ray job submit -- python", "AWS")
    job = words[words.index("--") + 1 :]
    for name, value in (("--recipe", "demo"), ("--workers", "2"), ("--gpu", "False")):
        job[job.index(name) + 1] = value
    return [*job, "--object-store-mb", "300", *(w for s in SHORT.split() for w in ("--set", s)), *more]


def test_both_ways_to_start_are_one() -> None:
    """The units start what the launcher's file for the same machines starts."""
    told = yaml.safe_load((REPO / "deploy/on-premise.yaml").read_text())
    head, worker, env = start_commands()
    ours = [re.sub(r"^\S+/ray", "ray", line).replace(" --block", "") for line in (head, worker)]
    theirs = [told[f"{part}_start_ray_commands"][1] for part in ("head", "worker")]
    theirs[0] = theirs[0].replace(" --autoscaling-config=~/ray_bootstrap_config.yaml", "")
    theirs[1] = theirs[1].replace("$RAY_HEAD_IP", "<head>")
    assert [sorted(line.split()) for line in ours] == [sorted(line.split()) for line in theirs]
    assert f"--env RAY_JOB_STOP_WAIT_TIME_S={env['RAY_JOB_STOP_WAIT_TIME_S']}" in str(told["docker"])


def test_doctor_looks_at_every_node(cluster: Cluster) -> None:
    said = cluster.submit(*command("ray job submit -- logonet", "Before the first run")[4:])
    assert "succeeded" in said, said
    assert all(f"{node.name}/" in said for node in cluster.nodes), said


def test_a_job_pretrains_and_shows_itself(cluster: Cluster) -> None:
    said = cluster.submit(*pretraining())
    assert "succeeded" in said, said
    assert "2 workers x" in said, said
    assert re.search(r"epoch 2/2 .*samples|epoch 2/2 .*waiting for data", said), said
    runs = cluster.get("/api/train/v2/runs/v1")
    (run,) = runs["train_runs"]
    assert run["status"] == "FINISHED"
    assert object_store.exists(
        object_store.join(re.search(r"s3://bucket/runs/pretrain/\w+", said)[0], "manifest.json")
    )  # type: ignore[index]
    again = cluster.submit(*pretraining())
    assert "already there" in again.splitlines()[-12:].__str__(), again


def test_a_stopped_job_saves_its_step_and_goes_on(cluster: Cluster) -> None:
    longer = pretraining("--set", "train.epochs=40", "--set", "train.seed=1")
    said = cluster.submit(*longer, options=("--no-wait",))
    job = re.search(r"raysubmit_\w+", said)[0]  # type: ignore[index]
    cluster.wait_for("epoch 1/40", job)
    cluster.head.run("ray", "job", "stop", job, **cluster.client())
    step = int(re.search(r"stopped after step (\d+)", cluster.log(job))[1])  # type: ignore[index]
    resumed = cluster.submit(*longer, options=("--no-wait", "--submission-id", "again"))
    assert "again" in resumed, resumed
    cluster.wait_for(f"resumed after step {step}", "again")
    # A machine is shut down in order: its unit's end drains the node, and training goes on without it.
    (ray,) = [p for p in cluster.nodes[2].run("pgrep", "-f", "ray start --block").stdout.split()][-1:]
    cluster.nodes[2].run("kill", "-TERM", ray)
    cluster.wait_for("workers were asked to go", "again")
    cluster.start(2)  # Restart=always
    cluster.head.run("ray", "job", "stop", "again", **cluster.client())


def expected(start: str) -> str:
    """What the page's last table says one sees, of the row that begins so, without what varies."""
    rows = re.findall(r"^\| (.+?) \|", PAGE.split("## When it does not start")[1], re.MULTILINE)
    (row,) = [row for row in rows if row.strip("`").startswith(start)]
    return re.sub(r"\b[NM]\b", r"[0-9.]+", re.escape(row.strip("`")).replace(r"\.\.\.", ".*"))


def test_what_one_sees_when_it_does_not_start(cluster: Cluster) -> None:
    away = {"env_vars": {"MLFLOW_TRACKING_URI": ""}}
    new = functools.partial(pretraining, "--set", "train.seed=2")  # a finished run would be returned
    seen = {
        "N workers x M": cluster.submit(*new("--cpus-per-worker", "3")),
        "the cluster found no room": cluster.submit(*new("--gpu", "True", "--wait-s", "3")),
        "MLflow's runs": cluster.submit(*new(), options=("--runtime-env-json", json.dumps(away))),
        "--data ": cluster.submit(*new("--data", "scans")),
    }
    no_token = {"RAY_AUTH_MODE": "disabled", **cluster.client()}
    seen["Authentication required"] = cluster.head.run("ray", "job", "list", **no_token).stdout
    for start, said in seen.items():
        assert re.search(expected(start), said), f"{start}: {said[-3000:]}"
    cluster.head.run("sh", "-c", "mkdir /tmp/big && head -c 115000000 /dev/urandom > /tmp/big/scan.raw")
    assert "413" in expected("HTTP 413")
    assert "413" in cluster.submit("true", options=("--working-dir", "/tmp/big"))


def test_a_watch_without_a_metadata_service_says_so(cluster: Cluster) -> None:
    done = cluster.nodes[1].run("logonet", "spot-watch", limit_s=60)
    assert done.returncode != 0
    assert "169.254.169.254" in done.stdout
    assert "Traceback" not in done.stdout


def test_the_bill_is_what_the_page_says(cluster: Cluster) -> None:
    """Its last row: hours and dollars altogether."""
    row = next(line.split("|") for line in PAGE.splitlines() if line.startswith("| 4 x g5.12xlarge"))
    said = cluster.head.run(*command("logonet plan", "What a run costs")).stdout
    found = re.search(r"altogether +(\d+):(\d+):\d+, ([\d.]+) USD", said)
    assert found is not None, said
    hours, minutes, dollars = (float(value) for value in found.groups())
    assert float(row[5]) == round(hours + minutes / 60, 1)
    assert float(row[-2].strip(" *")) == round(dollars)
