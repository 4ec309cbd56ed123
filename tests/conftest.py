"""Fixtures shared by all tests. No torch here: a test of one module must not pay for it."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tenacity
from faultproxy import FaultProxy

from logonet.core.errors import UserError
from logonet.storage import object_store
from tools.s3server import S3Server, store_python


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``-n 2``: one process has all files whose tests work with Ray, the other the rest, file by file.

    Two Rays on one machine want twice the memory and are in each other's way. (xdist's own groups are not to be had:
    pytest 9.2 does not let it change the tests' names.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.split("::", 1)[0]
            return "ray" if path in with_ray else path

    tests = Path(__file__).parent
    asks = re.compile(r"\bray_local: ")  # the fixture that starts Ray
    with_ray = {f"tests/{file.name}" for file in tests.glob("test_*.py") if asks.search(file.read_text())}
    return ByFile(config, log)


@pytest.fixture(scope="session", autouse=True)
def no_node_cache() -> None:
    """What a test damages in a bucket must not come from this machine's disk; the cache's own tests turn it on."""
    os.environ["LOGONET_CACHE_GB"] = "0"


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server. In CI its absence is a failure: an integration test that is skipped proves nothing."""
    try:
        store_python()
    except UserError as err:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(err))
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def shared_proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    """One proxy before the S3 server: each new address costs clients of its own."""
    with FaultProxy(s3_server.endpoint, stall_s=0.6) as proxy:
        yield proxy


@pytest.fixture
def proxy(shared_proxy: FaultProxy, bucket: str, monkeypatch: pytest.MonkeyPatch) -> FaultProxy:
    """The way to the bucket leads through a proxy that can inject faults, and at first injects none."""
    shared_proxy.reset()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", shared_proxy.endpoint)
    return shared_proxy


@pytest.fixture(scope="session")
def mlflow_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with MLflow's tables, to be copied: creating the tables takes seconds."""
    from logonet import tracking

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    tracking.runs.connect(f"sqlite:///{path}").search_experiments(max_results=1)
    return path


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses between attempts at the store."""
    monkeypatch.setattr(object_store, "WAIT", tenacity.wait_none())


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Maps as small as those of most tests only make threads wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of a fresh bucket; the environment names the server, for this process and its children."""
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    nowhere = {
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "NO_PROXY": "127.0.0.1",
    }
    for name, value in (nowhere | s3_server.env()).items():
        monkeypatch.setenv(name, value)
    uri = f"s3://test-{uuid.uuid4().hex}"
    object_store.create_bucket(uri)
    return uri


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real scans beside the checkout."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real scans are wanted in {folder}; this checkout has none beside it")
    return folder


@pytest.fixture(scope="session")
def mlflow_session_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where MLflow's files of this session lie, for this process and for Ray's workers."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def ray_local(s3_server: S3Server, mlflow_session_home: Path) -> Iterator[None]:
    """One Ray for the whole session; its workers know the S3 server and keep MLflow's files to themselves."""
    from logonet.distributed import cluster

    settings = {
        **s3_server.env(),
        "LOGONET_HOME": str(mlflow_session_home),
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    # Idle worker processes are kept for the next test: Ray ends them after a second, and each costs seconds of imports.
    # Nor do they yield to the tests that the other process of `-n 2` runs.
    settings |= {"RAY_num_workers_soft_limit": "8", "RAY_idle_worker_killing_time_threshold_ms": "600000"}
    settings |= {"RAY_worker_niceness": "0"}
    kept = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    with cluster.connected(cluster.Resources(workers=2, object_store_mb=300)):
        yield
    for name, value in kept.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@pytest.fixture(scope="module")
def place(s3_server: S3Server, mlflow_session_home: Path) -> Iterator[str]:
    """One bucket for a whole file, so that what one test has made serves the next; MLflow's files lie apart."""
    with pytest.MonkeyPatch.context() as patch:
        settings = {
            **s3_server.env(),
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "NO_PROXY": "127.0.0.1",
            "LOGONET_HOME": str(mlflow_session_home),
        }
        for name, value in settings.items():
            patch.setenv(name, value)
        uri = f"s3://place-{uuid.uuid4().hex}"
        object_store.create_bucket(uri)
        yield uri


@pytest.fixture(scope="module")
def mlflow_folder(mlflow_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mlflow")
    shutil.copy(mlflow_template, folder)
    return folder


@pytest.fixture
def mlflow_home(mlflow_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where MLflow writes everything; one for the file."""
    from logonet import tracking

    monkeypatch.setenv("LOGONET_HOME", str(mlflow_folder))
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(name, raising=False)
    for name, value in tracking.MLFLOW_DEFAULTS.items():
        monkeypatch.setenv(name, value)
    return mlflow_folder
