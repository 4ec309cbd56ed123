"""What deploy/ brings beside Ray, on the real programs: MLflow on PostgreSQL and S3; Prometheus and Grafana's queries.

make test-services
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from logonet import tracking
from logonet.data import phantom
from logonet.storage import object_store
from tools.processes import free_ports

pytestmark = [pytest.mark.services, pytest.mark.timeout(900)]
REPO = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
DEPLOY = REPO / "deploy"


def program(name: str) -> str:
    """Where a program is; the test is skipped where there is none. Debian keeps PostgreSQL's out of the PATH."""
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    found = str(debian[-1]) if debian else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is wanted; apt-get install postgresql prometheus")
    return found


def fetch(url: str, **headers: str) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as reply:
        return reply.read()


@contextlib.contextmanager
def running(
    command: Sequence[str], log: Path, ready: str | Sequence[str], **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """A process, once a URL answers or a command ends well; stopped at the end of the block."""
    with open(log, "ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True, **options)
    try:
        until = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                if isinstance(ready, str):
                    fetch(ready)
                else:
                    subprocess.run(ready, check=True, capture_output=True, env=options.get("env"))
                break
            assert time.monotonic() < until and process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.5)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


# ---------------------------------------------------------------------------------------------- MLflow


@pytest.fixture
def postgres() -> Iterator[tuple[int, str]]:
    """An empty PostgreSQL with the user and the database of deploy/mlflow; its port and password."""
    initdb, server, pg_isready = map(program, ("initdb", "postgres", "pg_isready"))
    folder, password, port = (
        Path(tempfile.mkdtemp(prefix="logonet-pg-")),
        secrets.token_urlsafe(16),
        free_ports(),
    )
    user: dict[str, Any] = {}
    if os.getuid() == 0:  # which PostgreSQL refuses to be
        user = {"user": "nobody", "group": "nogroup"}
        shutil.chown(folder, **user)
    (folder / "password").write_text(password)
    (folder / "password").chmod(0o644)
    data, log = f"{folder}/data", folder / "log"
    make = [
        initdb,
        "--pgdata",
        data,
        "--username=mlflow",
        "--auth=scram-sha-256",
        "--no-sync",
        "--encoding=UTF8",
    ]
    try:
        subprocess.run(
            [*make, f"--pwfile={folder}/password"], check=True, capture_output=True, cwd=folder, **user
        )
        command = [server, "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", str(folder)]
        with running(command, log, [pg_isready, "-h", "127.0.0.1", "-p", str(port)], cwd=folder, **user):
            yield port, password
    finally:
        shutil.rmtree(folder)


def sql(postgres: tuple[int, str], query: str, database: str = "mlflow") -> str:
    port, password = postgres
    command = ["psql", "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow", "-d", database, "-tAc", query]
    env = {**os.environ, "PGPASSWORD": password}
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.strip()


def test_mlflow_as_deployed_keeps_runs_in_postgres_and_artifacts_in_s3(
    postgres: tuple[int, str], bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image's command with the settings of compose.yaml; the server is killed in the middle of a run."""
    pytest.importorskip("psycopg2", reason="psycopg2 is wanted; pip install psycopg2-binary")
    sql(postgres, "CREATE DATABASE mlflow", "postgres")
    service = yaml.safe_load((DEPLOY / "mlflow/compose.yaml").read_text())["services"]["mlflow"]
    settings = {
        name: str(value) for name, value in service["environment"].items() if not name.startswith("AWS_")
    }
    uri = settings["MLFLOW_BACKEND_STORE_URI"]
    settings["MLFLOW_BACKEND_STORE_URI"] = uri.replace("@postgres/", f"@127.0.0.1:{postgres[0]}/")
    settings["MLFLOW_ARTIFACTS_DESTINATION"] = f"{bucket}/mlflow"
    (image,) = re.findall(r"^CMD (\[.+\])$", (DEPLOY / "mlflow/Dockerfile").read_text(), re.MULTILINE)
    port = free_ports()
    command = [
        {"mlflow": f"{BIN}/mlflow", "0.0.0.0": "127.0.0.1", "5000": str(port)}.get(w, w)
        for w in json.loads(image)
    ]
    home, env = tmp_path / "server", {**os.environ, **settings, "PGPASSWORD": postgres[1]}
    home.mkdir()
    url = f"http://localhost:{port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    for name, value in tracking.MLFLOW_DEFAULTS.items():
        monkeypatch.setenv(name, value)
    history = [{"epoch": e, "step": 10 * e, "loss": 5.0 - e} for e in range(4)]
    run = {
        "fingerprint": "f00d",
        "experiment": "cluster",
        "run_name": "a run",
        "params": {"a": 1},
        "tags": {},
    }

    def serve() -> Any:
        return running(command, tmp_path / "log", f"{url}/health", cwd=home, env=env)

    with serve() as server:
        assert tracking.check() == url
        fetch(f"{url}/api/2.0/mlflow/experiments/get?experiment_id=0", Host="mlflow.example.com:5000")
        with pytest.raises(urllib.error.HTTPError, match="403"):
            fetch(f"{url}/api/2.0/mlflow/experiments/get?experiment_id=0", Host="other.example.com")
        first = tracking.Tracker(**run)
        first.sync(history[:2])
        first.log_files({"report.html": b"<p>early</p>"})
        assert first.run_id() is not None
        os.killpg(server.pid, signal.SIGKILL)
    first.sync(history[:3])
    with serve():
        second = tracking.Tracker(**run)  # of the driver, or of a resumed job
        second.sync(history)
        second.log_files({"curves.png": b"late"})
        assert second.close(timeout_s=60)
        uri = tracking.register("logonet-encoder", {"a.json": b"{}"}, {"x": "1"}, kind="encoder")
        folder = tracking.download(uri, str(tmp_path / "models"))
    assert sql(postgres, "SELECT count(*), min(status) FROM runs WHERE name = 'a run'") == "1|FINISHED"
    assert sql(
        postgres, "SELECT string_agg(step || ' ' || value, ',' ORDER BY step) FROM metrics WHERE key = 'loss'"
    ) == ("0 5,10 4,20 3,30 2")
    assert sql(postgres, "SELECT name, version FROM model_versions") == "logonet-encoder|1"
    kept = {entry.uri.rsplit("/", 1)[1]: entry.uri for entry in object_store.listing(f"{bucket}/mlflow")}
    assert kept.keys() >= {"report.html", "curves.png", "a.json"}
    assert object_store.read(kept["curves.png"]) == b"late"
    assert (Path(folder) / "a.json").read_bytes() == b"{}"
    assert list(home.iterdir()) == []  # nothing in the container


# ------------------------------------------------------------------------------------------ Prometheus


@contextlib.contextmanager
def head(folder: Path, env: dict[str, str], *options: str) -> Iterator[int]:
    """A Ray of `ray start`; the first of its four ports: GCS, dashboard, agent, metrics."""
    port = free_ports()
    command = [f"{BIN}/ray", "start", "--head", "--block", "--temp-dir", str(folder), "--port", str(port)]
    command += ["--dashboard-port", str(port + 1), "--dashboard-agent-listen-port", str(port + 2)]
    command += ["--metrics-export-port", str(port + 3), "--object-store-memory", str(300 << 20), *options]
    ready = ["grep", "-q", "started", f"{folder}.log"]
    with running(command, Path(f"{folder}.log"), ready, env=env):
        yield port


def test_prometheus_has_what_grafana_draws_of_a_submitted_job(bucket: str) -> None:
    """Beside another Ray on the machine; and the job's log has no line in red."""
    prometheus = program("prometheus")
    folder = Path(tempfile.mkdtemp(prefix="lw-"))  # short: Ray's sockets lie in it
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "LOGONET_", "MLFLOW_"))}
    env |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    env |= {"LOGONET_HOME": f"{folder}/home", "LOGONET_CACHE_DIR": f"{folder}/cache"}
    env["PATH"] = f"{BIN}:{env['PATH']}"
    phantom.write_dataset(f"{bucket}/scans", 4, size_vox=(48, 48, 48))
    config = (DEPLOY / "monitoring/prometheus.yaml").read_text()
    for there, here in (("/tmp/ray/", f"{folder}/ray/"), ("scrape_interval: 10s", "scrape_interval: 2s")):
        assert there in config
        config = config.replace(there, here)
    (folder / "prometheus.yaml").write_text(config)
    port = free_ports()
    url = f"http://127.0.0.1:{port}"
    scraping = [prometheus, f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/tsdb"]
    scraping.append(f"--web.listen-address=127.0.0.1:{port}")
    job = f"ray job submit --working-dir . -- python jobs/pretrain.py --recipe demo --workers 2 --data {bucket}/scans/"
    job += f" --root {bucket}/runs clusterers.n=2 clusterers.iterations=2 split=null"
    job += " train.epochs=2 train.steps_per_epoch=12"
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.enter_context(head(folder / "other", env, "--num-cpus", "1", "--include-dashboard", "false"))
        own = head(folder / "ray", env, "--num-cpus", "4", "--dashboard-host", "127.0.0.1")
        api = f"http://127.0.0.1:{stack.enter_context(own) + 1}"
        stack.enter_context(running(scraping, folder / "prometheus.log", f"{url}/-/ready"))
        started = time.time()
        env["RAY_API_SERVER_ADDRESS"] = api
        done = subprocess.run(job.split(), cwd=REPO, env=env, capture_output=True, text=True)
        said = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
        assert done.returncode == 0, said[-5000:]

        def values(query: str) -> list[float]:
            span = {"start": started, "end": time.time(), "step": 2}
            asked = urllib.parse.urlencode({"query": query, **span})
            found = json.loads(fetch(f"{url}/api/v1/query_range?{asked}"))["data"]["result"]
            return [float(value) for series in found for _, value in series["values"]]

        board = json.loads((DEPLOY / "monitoring/grafana.json").read_text())
        queries = {
            target["expr"].replace("$run", "pretrain-.*"): panel["title"]
            for panel in board["panels"]
            for target in panel["targets"]
        }
        assert {title for query, title in queries.items() if not values(query)} == {"GPU"}  # there is none
        assert max(values("ray_logonet_step")) == 24
        assert 0 < max(values("ray_logonet_loss")) < 10
        assert max(values("ray_logonet_queued_bytes")) > 0
        assert max(values('sum(ray_logonet_cache_reads_total{result="hit"})')) > 0
        (told,) = json.loads(fetch(f"{api}/api/train/v2/runs/v1"))["train_runs"]
    assert told["status"] == "FINISHED"
    assert told["run_settings"]["train_loop_config"]["train"]["epochs"] == 2
    assert len(json.dumps(told["run_settings"])) < 10_000  # neither the dataset nor the run's files
    for red in (" E ", "Traceback", "Deprecat", "multiple active Ray instances", "constructor arguments"):
        assert red not in said
