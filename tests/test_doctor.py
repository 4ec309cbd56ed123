"""The doctor finds what would end a run later, names the mend, and leaves the store as it was."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import resource
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from faultproxy import FaultProxy

from logonet.core.errors import UserError
from logonet.distributed import cluster, doctor, ray_compat
from logonet.distributed.doctor import GIB, Check
from logonet.storage import object_store
from logonet.tracking import tracking_uri
from tools.s3server import S3Server


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture(autouse=True)
def ample_machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Usage]:
    """A machine on which nothing is wrong, whatever runs the tests; returns the disks, to be changed."""
    disks = {"/dev/shm": Usage(32 * GIB, 0, 32 * GIB), "disk": Usage(100 * GIB, 10 * GIB, 90 * GIB)}
    monkeypatch.setattr(ray_compat, "memory_bytes", lambda: 64 * GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disks.get(path, disks["disk"]))
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (65536, 65536))
    return disks


def status(checks: list[Check], what: str) -> str:
    (found,) = {c.status for c in checks if c.what.startswith(what)}
    return found


@pytest.fixture(params=["path", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    where = request.getfixturevalue("bucket") if request.param == "s3" else str(tmp_path)
    return object_store.join(where, "runs")


def test_a_sound_setup_passes_and_leaves_nothing_behind(root: str, tmp_path: Path) -> None:
    object_store.write(object_store.join(root, "mine"), b"kept")
    checks = doctor.preflight(root, nodes=False, tracking=lambda: "http://tracker")
    assert [c for c in checks if c.status != "ok"] == []
    assert {c.what for c in checks} >= {
        "RAM",
        "open files",
        "version of torch",
        "store shared",
        "tracking server",
    }
    by = [c.what for c in checks if c.what.startswith("store by")]
    assert by == ["store by boto3" if object_store.is_s3(root) else "store by logonet"]
    assert [e.uri for e in object_store.listing(root)] == [object_store.join(root, "mine")]
    if not object_store.is_s3(root):
        assert os.listdir(root) == ["mine"]


@pytest.mark.parametrize(("ram_gib", "want"), [(3.9, "fail"), (4.1, "warn"), (7.9, "warn"), (8.1, "ok")])
def test_ram(monkeypatch: pytest.MonkeyPatch, ram_gib: float, want: str) -> None:
    monkeypatch.setattr(ray_compat, "memory_bytes", lambda: int(ram_gib * GIB))
    assert status(list(doctor._machine()), "RAM") == want


@pytest.mark.parametrize(("shm_gib", "want"), [(0.0625, "fail"), (1, "warn"), (19, "warn"), (20, "ok")])
def test_shared_memory_is_held_against_what_ray_takes(
    ample_machine: dict[str, Usage], shm_gib: float, want: str
) -> None:
    ample_machine["/dev/shm"] = Usage(int(shm_gib * GIB), 0, int(shm_gib * GIB))
    checks = list(doctor._machine())
    assert status(checks, "/dev/shm") == want
    assert want == "ok" or any("--shm-size=20g" in c.mend for c in checks)


@pytest.mark.parametrize(
    ("used", "free", "want"), [(10, 90, "ok"), (85, 15, "warn"), (96, 4, "fail"), (970, 30, "fail")]
)
def test_the_spill_disk(
    ample_machine: dict[str, Usage], monkeypatch: pytest.MonkeyPatch, used: int, free: int, want: str
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/spill")
    ample_machine["/spill"] = Usage((used + free) * GIB, used * GIB, free * GIB)
    assert status(list(doctor._machine()), "disk of /spill") == want


@pytest.mark.parametrize(("files", "want"), [(256, "fail"), (1024, "warn"), (65536, "ok")])
def test_the_open_files_limit(monkeypatch: pytest.MonkeyPatch, files: int, want: str) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (files, 1 << 20))
    assert status(list(doctor._machine()), "open files") == want


@pytest.mark.parametrize(
    ("version", "value", "want"),
    [
        (91002, "9.10.2", "fail"),
        (91499, "9.14.99", "fail"),
        (91500, "9.15.0", "ok"),
        (100000, "10.0.0", "ok"),
    ],
)
def test_a_cudnn_whose_convolutions_can_be_wrong_fails(
    monkeypatch: pytest.MonkeyPatch, version: int, value: str, want: str
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert list(doctor._gpu()) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    (check,) = doctor._gpu()
    assert (check.what, check.value, check.status) == ("cuDNN", value, want)
    assert ("install nvidia-cudnn-cu12>=9.15.0" in check.mend) == (want == "fail")


def test_a_package_that_is_missing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package == "monai":
            raise importlib.metadata.PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    checks = list(doctor._versions())
    assert status(checks, "version of monai") == "fail"
    assert status(checks, "version of torch") == "ok"


def test_nodes_that_differ_from_most_fail() -> None:
    same = [Check(n, "version of torch", "2.13.0") for n in ("a", "b")]
    odd = Check("c", "version of torch", "2.12.0")
    ram = [Check(n, "RAM", value) for n, value in (("a", "8 GiB"), ("b", "16 GiB"))]
    *kept, failed = doctor._agree([*same, *ram, odd])
    assert kept == [*same, *ram]
    assert (failed.node, failed.status) == ("c", "fail")
    assert "2.13.0" in failed.mend


def test_a_store_that_cannot_be_written_does_not_hide_the_rest(bucket: str) -> None:
    checks = doctor.preflight(f"{bucket}-not/runs", nodes=False, tracking=lambda: "http://tracker")
    assert [c.what for c in checks if c.status == "fail"] == ["store"]
    assert "bucket does not exist" in checks[0].mend
    assert status(checks, "RAM") == status(checks, "tracking server") == "ok"


def test_a_folder_that_another_node_does_not_see_fails(tmp_path: Path) -> None:
    checks = doctor.node_checks(str(tmp_path), str(tmp_path / "written elsewhere"))
    assert status(checks, "store shared") == "fail"
    assert status(checks, "store by") == "ok"


def test_a_refused_read_fails_the_round_trip_without_showing_credentials(
    s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultProxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        proxy.add("status", method="GET", status=403, code="AccessDenied", key="/probe", times=99)
        checks = list(doctor._round_trip_check(object_store.join(bucket, "runs")))
    assert status(checks, "store by boto3") == "fail"
    told = " ".join(c.mend for c in checks)
    assert "access is refused" in told
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in told


def test_a_tracking_server_that_is_down_is_only_a_warning(tmp_path: Path) -> None:
    def contact() -> str:
        raise UserError("no tracking server at http://tracker; start it")

    checks = doctor.preflight(str(tmp_path), nodes=False, tracking=contact)
    assert status(checks, "tracking server") == "warn"
    assert "start it" in checks[-1].mend


@pytest.mark.parametrize(("machines", "want"), [(1, "ok"), (2, "fail")])
def test_a_file_of_runs_is_for_one_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machines: int, want: str
) -> None:
    import ray

    def nodes() -> list[dict[str, Any]]:
        return [
            {"Alive": True, "Resources": {"CPU": 2.0}, "NodeManagerAddress": f"10.0.0.{i}"}
            for i in range(machines)
        ]

    def everywhere(root: str, token: str, tracking: Any) -> Iterator[Check]:
        for i in range(machines):
            yield from (replace(check, node=f"n{i}") for check in doctor.node_checks(root, token, tracking))

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", nodes)
    monkeypatch.setattr(doctor, "_all_nodes", everywhere)
    monkeypatch.setenv("LOGONET_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    checks = doctor.preflight(str(tmp_path), tracking=tracking_uri)
    found = [c for c in checks if c.what == "tracking server"]
    assert [c.status for c in found] == [want] * machines
    with contextlib.ExitStack() as stack:
        if want == "fail":
            assert all("MLFLOW_TRACKING_URI" in c.mend for c in found)
            stack.enter_context(pytest.raises(UserError, match="set MLFLOW_TRACKING_URI to a server"))
        cluster.check_tracking()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    cluster.check_tracking()


def test_a_head_without_cpus_waits_for_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    head = {"Alive": True, "Resources": {"memory": 1.0}, "NodeManagerAddress": "10.0.0.1"}
    monkeypatch.setattr(ray, "nodes", lambda: [head])
    assert cluster.machines() == 2
    monkeypatch.setattr(ray, "nodes", lambda: [{**head, "Resources": {"CPU": 1.0}}])
    assert cluster.machines() == 1


def test_the_table_shows_every_check(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    doctor.print_table(
        [
            Check("node-a", "RAM", "8.0 GiB"),
            Check("node-a", "disk", "[red]1 GiB", "fail", "free [some] space"),
            Check("node-b", "RAM", "4.0 GiB", "warn", "more"),
        ]
    )
    out = capsys.readouterr().out
    for text in ("node-a", "node-b", "8.0 GiB", "[red]1 GiB", "free [some] space", "ok", "warn", "fail"):
        assert text in out
    assert out.count("node-a") == 1


@pytest.fixture
def two_nodes(bucket: str) -> Iterator[Any]:
    import ray
    from ray.cluster_utils import Cluster

    options: dict[str, Any] = {"object_store_memory": 80 * 1024 * 1024}
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False} | options
    )
    try:
        cluster.add_node(num_cpus=1, **options)
        ray.init(address=cluster.address)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.slow
def test_every_node_of_a_cluster_answers(two_nodes: Any, bucket: str) -> None:
    checks = doctor.preflight(object_store.join(bucket, "runs"), tracking=lambda: "http://tracker")
    names = {c.node for c in checks}
    assert len(names) == 2
    for name in names:
        mine = [c for c in checks if c.node == name]
        assert status(mine, "store shared") == status(mine, "store by") == "ok"
        assert status(mine, "version of") == status(mine, "tracking server") == "ok"


@pytest.mark.slow
def test_a_node_without_the_endpoint_is_found(
    two_nodes: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as blindfold:
        blindfold.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
        blind = two_nodes.add_node(num_cpus=1, object_store_memory=80 * 1024 * 1024)
    checks = doctor.preflight(object_store.join(bucket, "runs"))
    failed = {c.node for c in checks if c.status == "fail"}
    assert [name.rpartition("/")[2] for name in failed] == [blind.node_id[:6]]
    assert any("AWS_ENDPOINT_URL_S3" in c.mend for c in checks if c.status == "fail")
