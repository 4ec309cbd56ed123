"""Preflight: does every node reach the store, have the room, and run the same software?

Most runs that die hours later with no reason given would have been stopped here: a node without the
endpoint variable, a 64 MiB /dev/shm, a full spill disk, two versions of torch.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import resource
import shutil
import socket
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from logonet.core.errors import UserError
from logonet.distributed import cluster, ray_compat
from logonet.storage import object_store

Status = Literal["ok", "warn", "fail"]

GIB = 1 << 30
PROBE_BYTES = 1 << 20
# A worker takes about 1 GiB once torch, MONAI and Ray are imported, and there are at least four of them.
RAM_FAIL_GIB, RAM_WARN_GIB = 4, 8
# Ray wants 30 % of the RAM as shared memory for its object store; in less it falls back to files in /tmp.
SHM_WARN_OF_RAM = 0.3
# Docker's default of 64 MiB holds not even one crop batch.
SHM_FAIL_GIB = 0.25
# Ray spills objects there, and from 95 % full on it refuses to (local_fs_capacity_threshold).
DISK_FAIL_USED, DISK_WARN_GIB = 0.95, 20
# Ray keeps sockets to every worker and node; its own documentation asks for 65536 in large clusters.
FILES_FAIL, FILES_WARN = 1024, 8192
# Earlier ones compute some 3D convolutions in bfloat16 wrong, and say nothing (pytorch#166643).
CUDNN = (9, 15, 0)
PACKAGES = ("logonet", "torch", "ray", "monai", "numpy", "mlflow")
SAME_SOFTWARE = "install the same constraints.txt on every node"
NODE_TIMEOUT_S = 120


@dataclass(frozen=True)
class Check:
    """One line of the table. ``mend`` says what to do where ``status`` is not "ok"."""

    node: str
    what: str
    value: str
    status: Status = "ok"
    mend: str = ""


def preflight(root_uri: str, *, nodes: bool = True, tracking: Callable[[], str] | None = None) -> list[Check]:
    """Check this machine or, when Ray is connected and ``nodes`` is set, every node of its cluster.

    Args:
        root_uri: where the run will keep its artifacts; a few objects are written there and deleted.
        tracking: contacts the tracking server and returns its address, or raises UserError; called on every node.
    """
    import ray

    token = object_store.join(root_uri, f".logonet-doctor-{uuid.uuid4().hex}")
    checks = []
    try:
        object_store.write(token, token.encode())
    except UserError as err:
        checks.append(Check(socket.gethostname(), "store", root_uri, "fail", str(err)))
        token = ""
    try:
        everywhere = nodes and ray.is_initialized()
        here = root_uri, token, tracking
        checks += _all_nodes(*here) if everywhere else node_checks(*here)
    finally:
        if token:
            object_store.delete(token)
    if everywhere and cluster.machines() > 1:
        checks = [_not_in_a_file(check) for check in checks]
    return _agree(checks)


def node_checks(root_uri: str, token: str, tracking: Callable[[], str] | None = None) -> list[Check]:
    """What can be said from where this runs.

    Args:
        token: an object below ``root_uri`` that the driver has written; empty when it could not.
    """
    node = socket.gethostname()
    found = [*_machine(), *_gpu(), *_versions()]
    if token:
        found += [_shared(root_uri, token), *_round_trip_check(root_uri)]
    if tracking is not None:
        found.append(_tracking_server(tracking))
    return [replace(check, node=node) for check in found]


# ---------------------------------------------------------------------------------------------- nodes


def _all_nodes(root_uri: str, token: str, tracking: Callable[[], str] | None) -> Iterator[Check]:
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # No CPU is asked for: a node that is busy, or reserved, is checked as well.
    task: Any = ray.remote(num_cpus=0, max_retries=0)(node_checks)  # Ray's stub knows no defaults
    answers = {}
    for node in ray.nodes():
        if node["Alive"]:
            name = f"{node['NodeManagerHostname']}/{node['NodeID'][:6]}"  # one machine may run several
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            answers[name] = task.options(scheduling_strategy=here).remote(root_uri, token, tracking)
    for name, answer in answers.items():
        try:
            yield from (replace(check, node=name) for check in ray.get(answer, timeout=NODE_TIMEOUT_S))
        except GetTimeoutError:
            said = f"no answer in {NODE_TIMEOUT_S} s"
            yield Check(name, "node", said, "fail", "see 'ray status'; restart the node")
        except RayError as err:
            reason = str(err).strip().splitlines()[-1][:120]
            yield Check(name, "node", reason, "fail", f"see the node's logs; {SAME_SOFTWARE}")


def _agree(checks: list[Check]) -> list[Check]:
    """Where nodes differ in a version, fail those that differ from most."""
    usual = {}
    for what in {c.what for c in checks if c.what.startswith("version of")}:
        usual[what] = Counter(c.value for c in checks if c.what == what).most_common(1)[0][0]
    return [
        replace(c, status="fail", mend=f"other nodes have {usual[c.what]}; {SAME_SOFTWARE}")
        if c.status == "ok" and c.value != usual.get(c.what, c.value)
        else c
        for c in checks
    ]


# -------------------------------------------------------------------------------------------- machine


def _machine() -> Iterator[Check]:
    ram = ray_compat.memory_bytes()
    mend, have = "use a larger machine or fewer workers", ram / GIB
    yield _graded("RAM", f"{have:.1f} GiB", have < RAM_FAIL_GIB, have < RAM_WARN_GIB, mend)
    if os.path.isdir("/dev/shm"):
        shm, want = shutil.disk_usage("/dev/shm").total / GIB, SHM_WARN_OF_RAM * ram / GIB
        mend = f"start the container with --shm-size={math.ceil(want)}g, or mount a memory emptyDir there"
        yield _graded("/dev/shm", f"{shm:.1f} GiB", shm < SHM_FAIL_GIB, shm < want, mend)
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    usage = shutil.disk_usage(folder)
    free, full = usage.free / GIB, usage.used / (usage.used + usage.free)
    value = f"{free:.1f} GiB free, {full:.0%} used"
    mend = f"free space in {folder}, or set RAY_TMPDIR and TMPDIR to a larger disk"
    yield _graded(f"disk of {folder}", value, full > DISK_FAIL_USED, free < DISK_WARN_GIB, mend)
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    mend = "raise it: ulimit -n 65536, or docker --ulimit nofile=65536:65536"
    yield _graded("open files", str(files), files < FILES_FAIL, files < FILES_WARN, mend)


def _gpu() -> Iterator[Check]:
    import torch

    if not torch.cuda.is_available():
        return
    number = torch.backends.cudnn.version() or 0
    have = number // 10000, number // 100 % 100, number % 100
    name, least = (".".join(map(str, version)) for version in (have, CUDNN))
    mend = f"its bfloat16 convolutions can be wrong: install nvidia-cudnn-cu{(torch.version.cuda or '13')[:2]}>={least}"
    yield _graded("cuDNN", name, have < CUDNN, False, mend)


def _graded(what: str, value: str, fail: bool, warn: bool, mend: str) -> Check:
    status: Status = "fail" if fail else "warn" if warn else "ok"
    return Check("", what, value, status, "" if status == "ok" else mend)


def _versions() -> Iterator[Check]:
    yield Check("", "version of python", platform.python_version())
    for package in PACKAGES:
        try:
            yield Check("", f"version of {package}", importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Check("", f"version of {package}", "not installed", "fail", SAME_SOFTWARE)


# ------------------------------------------------------------------------------------------- tracking

TRACKING = "tracking server"


def _tracking_server(contact: Callable[[], str]) -> Check:
    try:
        return Check("", TRACKING, contact())
    except UserError as err:
        return Check("", TRACKING, "not reached", "warn", f"{err}; runs go on without it")


def _not_in_a_file(check: Check) -> Check:
    """Where there are several machines, each would have a file of its own."""
    if check.what != TRACKING or not check.value.startswith("sqlite:"):
        return check
    return replace(check, status="fail", mend=cluster.SET_TRACKING)


# ---------------------------------------------------------------------------------------------- store


def _shared(root_uri: str, token: str) -> Check:
    """A local folder is only good for a cluster when every node sees the same one."""
    try:
        object_store.read(token, size_bytes=len(token.encode()))
    except UserError as err:
        unseen = "this node does not see the driver's folder; use s3:// or a disk that all nodes mount"
        mend = str(err) if object_store.is_s3(root_uri) else unseen
        return Check("", "store shared", root_uri, "fail", mend)
    return Check("", "store shared", root_uri)


def _round_trip_check(root_uri: str) -> Iterator[Check]:
    """One object written, read, listed and deleted."""
    folder = object_store.join(root_uri, f".logonet-doctor-{uuid.uuid4().hex}")
    what = f"store by {'boto3' if object_store.is_s3(root_uri) else 'logonet'}"
    begin = time.perf_counter()
    try:
        _round_trip(object_store.join(folder, "probe"), os.urandom(PROBE_BYTES))
    except UserError as err:
        yield Check("", what, root_uri, "fail", str(err))
    else:
        wall_ms = 1e3 * (time.perf_counter() - begin)
        yield Check("", what, f"wrote, read, listed, deleted 1 MiB in {wall_ms:.0f} ms")
    try:
        object_store.delete_prefix(folder)  # what a failed round trip left, and a local folder itself
    except UserError as err:
        yield Check("", "store clean-up", folder, "warn", str(err))


def _round_trip(uri: str, data: bytes) -> None:
    stored = object_store.write(uri, data)
    object_store.read(uri, size_bytes=stored.size_bytes, sha256=stored.sha256)
    if uri not in [entry.uri for entry in object_store.listing(os.path.dirname(uri))]:
        raise UserError(
            f"{uri} was written but is not listed; check the store's health and your right to list"
        )
    object_store.delete(uri)
    if object_store.exists(uri):
        raise UserError(f"{uri} was deleted but is still there; check the bucket's versioning and locks")


# ---------------------------------------------------------------------------------------------- table


def print_table(checks: list[Check]) -> None:
    """The checks as a table, a block of lines for each node, to standard output."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colour = {"ok": "green", "warn": "yellow", "fail": "red"}
    table = Table("node", "check", "value", "", "mend")
    for number, check in enumerate(checks):
        new = number == 0 or checks[number - 1].node != check.node
        if new and number:
            table.add_section()
        status = Text(check.status, style=colour[check.status])
        # Text, for rich would read the brackets of an error as markup
        node, what, value, mend = map(Text, (check.node if new else "", check.what, check.value, check.mend))
        table.add_row(node, what, value, status, mend)
    Console().print(table)
