"""The store against a real S3 server, a fault-injecting proxy before it, and the local disk."""

from __future__ import annotations

import errno
import hashlib
import itertools
import multiprocessing
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
import tenacity
from faultproxy import FaultProxy

from logonet.core.errors import UserError
from logonet.storage import object_store
from tools.s3server import S3Server

MB = 1_000_000


def pattern(size_bytes: int, salt: int = 0) -> bytes:
    """Bytes in which no shifted or stale piece looks like the right one."""
    return hashlib.shake_256(salt.to_bytes(4, "little")).digest(size_bytes)


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(params=["path", "file", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return object_store.join(request.getfixturevalue("bucket"), "some folder")
    return str(tmp_path) if request.param == "path" else f"file://{tmp_path}"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few attempts, for faults that do not end."""
    monkeypatch.setattr(object_store, "REQUEST_ATTEMPTS", 2)
    monkeypatch.setattr(object_store, "CONTACT_ATTEMPTS", 1)


def temps(folder: Path) -> list[Path]:
    return list(folder.rglob(f"{object_store.TEMP_MARK}*"))


# -------------------------------------------------------------------------------- the same everywhere


def test_an_object_comes_back_as_it_was_written(root: str) -> None:
    uri, data = object_store.join(root, "a", "b.bin"), pattern(MB)
    assert object_store.stat(uri) is None
    stored = object_store.write(uri, memoryview(data))
    assert stored == object_store.Stored(MB, sha(data))
    assert object_store.read(uri) == data
    assert object_store.read(uri, size_bytes=stored.size_bytes, sha256=stored.sha256) == data
    assert object_store.exists(uri)


def test_replacing_an_object_changes_its_version(root: str) -> None:
    uri = object_store.join(root, "x")
    object_store.write(uri, b"one")
    first = object_store.stat(uri)
    object_store.write(uri, b"two")
    second = object_store.stat(uri)
    assert first is not None
    assert second is not None
    assert first.version != second.version
    assert object_store.read(uri) == b"two"


def test_empty_objects_are_objects(root: str) -> None:
    uri = object_store.join(root, "empty")
    stored = object_store.write(uri, b"")
    assert object_store.read(uri, size_bytes=0, sha256=stored.sha256) == b""


@pytest.mark.parametrize(("start", "length"), [(0, 10), (7, 1), (990, 10), (990, None), (0, 1000), (5, 0)])
def test_a_range_is_verified_by_its_own_digest(root: str, start: int, length: int | None) -> None:
    uri, data = object_store.join(root, "x"), pattern(1000)
    object_store.write(uri, data)
    want = data[start : None if length is None else start + length]
    assert object_store.read(uri, start=start, length=length, size_bytes=1000, sha256=sha(want)) == want


@pytest.mark.parametrize(("start", "length"), [(995, 10), (1000, 1), (2000, 5)])
def test_a_range_beyond_the_end_is_refused(root: str, start: int, length: int) -> None:
    uri = object_store.join(root, "x")
    object_store.write(uri, pattern(1000))
    with pytest.raises(object_store.IntegrityError, match="write it again"):
        object_store.read(uri, start=start, length=length)


@pytest.mark.parametrize("promise", [{"size_bytes": 999}, {"sha256": "0" * 64}])
def test_other_bytes_than_promised_are_refused(root: str, tmp_path: Path, promise: dict[str, Any]) -> None:
    uri, target = object_store.join(root, "x"), tmp_path / "out" / "y"
    object_store.write(uri, pattern(1000))
    with pytest.raises(object_store.IntegrityError) as caught:
        object_store.read(uri, **promise)
    assert uri in str(caught.value)
    with pytest.raises(object_store.IntegrityError):
        object_store.read_to_file(uri, str(target), **promise)
    assert list(target.parent.iterdir()) == []


def test_files_go_both_ways(root: str, tmp_path: Path) -> None:
    source, back, uri = tmp_path / "source", tmp_path / "deep" / "back", object_store.join(root, "x")
    source.write_bytes(pattern(3 * MB))
    stored = object_store.write_file(str(source), uri)
    assert stored == object_store.Stored(3 * MB, sha(pattern(3 * MB)))
    object_store.read_to_file(uri, str(back), size_bytes=stored.size_bytes, sha256=stored.sha256)
    assert back.read_bytes() == source.read_bytes()


def test_json_round_trip_and_torn_json(root: str) -> None:
    uri = object_store.join(root, "x.json")
    object_store.write_json(uri, {"a": [1, 2.5, None], "ü": "x"})
    assert object_store.read_json(uri) == {"a": [1, 2.5, None], "ü": "x"}
    object_store.write(uri, b'{"a": [1, 2')
    with pytest.raises(object_store.IntegrityError, match=r"x\.json"):
        object_store.read_json(uri)


def test_listing_is_recursive_and_in_byte_order(root: str) -> None:
    names = ["a.txt", "a/b", "a/b.c/d", "a0", "B", "über", "a b+c%20d", "z/1", "z/10", "z/2"]
    for name in names:
        object_store.write(object_store.join(root, name), name.encode())
    object_store.write(object_store.join(root + "-sibling", "x"), b"not below root")
    entries = list(object_store.listing(root))
    assert [object_store.relative(e.uri, root) for e in entries] == sorted(names, key=str.encode)
    assert all(e == object_store.stat(e.uri) for e in entries)
    assert [e.uri for e in object_store.listing(root + "/")] == [e.uri for e in entries]
    assert list(object_store.listing(object_store.join(root, "nothing here"))) == []


def test_deleting(root: str) -> None:
    for name in ("keep/x", "drop/x", "drop/y/z", "dropped"):
        object_store.write(object_store.join(root, name), b"1")
    object_store.delete(object_store.join(root, "keep/none"))
    for _ in range(2):  # the second time nothing is there
        object_store.delete_prefix(object_store.join(root, "drop"))
    assert [object_store.relative(e.uri, root) for e in object_store.listing(root)] == ["dropped", "keep/x"]
    object_store.delete(object_store.join(root, "dropped"))
    assert not object_store.exists(object_store.join(root, "dropped"))


def test_what_is_missing_is_named(root: str) -> None:
    uri = object_store.join(root, "nothing")
    with pytest.raises(UserError, match=r"nothing: no such (file|object)"):
        object_store.read(uri)
    with pytest.raises(UserError, match=r"nothing: no such (file|object)"):
        object_store.read(uri, size_bytes=3)


def test_names() -> None:
    assert object_store.join("s3://b/", "/x/", "", "y") == "s3://b/x/y"
    assert object_store.join("/", "x") == "/x"
    assert object_store.relative("s3://b/x/y/z", "s3://b/x/") == "y/z"
    assert object_store.local_path("file:///a%20b") == "/a%20b"
    assert object_store.is_s3("s3://b")
    assert not object_store.is_s3("/s3://b")
    with pytest.raises(AssertionError):
        object_store.relative("s3://b/xy/z", "s3://b/x")


@pytest.mark.parametrize("uri", ["gs://b/x", "s3a://b/x", "http://host/x", "s3:///x"])
def test_places_that_are_not_places_are_refused(uri: str) -> None:
    with pytest.raises(UserError, match="s3://bucket/key"):
        object_store.write(uri, b"1")


# ----------------------------------------------------------------------------------------- local disk


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EIO, "check the disk"),
    ],
)
def test_a_disk_that_refuses_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, says: str
) -> None:
    uri = str(tmp_path / "x")
    object_store.write(uri, b"old")

    def refuse(fd: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=says) as caught:
        object_store.write(uri, b"new")
    assert uri in str(caught.value)
    assert object_store.read(uri) == b"old"
    assert temps(tmp_path) == []


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tiny disk takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named_and_left_as_it_was(tiny_disk: Path) -> None:
    uri = str(tiny_disk / "x")
    object_store.write(uri, pattern(MB // 2))
    with pytest.raises(UserError, match="disk is full"):
        object_store.write(uri, pattern(MB, 1))
    assert object_store.read(uri) == pattern(MB // 2)
    assert temps(tiny_disk) == []


def _write_for_ever(uri: str, ready: Event) -> None:
    blocks = [bytes([n]) * 8_000_000 for n in (1, 2)]
    for turn in itertools.count():
        object_store.write(uri, blocks[turn % 2])
        ready.set()


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    uri, fork = str(tmp_path / "x"), multiprocessing.get_context("fork")
    turn = seen_temps = 0
    while turn < 6 or (not seen_temps and turn < 100):  # the time that a write takes depends on the machine
        ready = fork.Event()
        writer = fork.Process(target=_write_for_ever, args=(uri, ready))
        writer.start()
        assert ready.wait(60)
        time.sleep(0.013 * (turn % 8))  # somewhere else in the cycle each time
        writer.kill()
        writer.join()
        data = object_store.read(uri)
        assert len(data) == 8_000_000
        assert data.count(data[:1]) == 8_000_000
        seen_temps += len(temps(tmp_path))
        assert [e.uri for e in object_store.listing(str(tmp_path))] == [uri]
        for path in temps(tmp_path):
            path.unlink()
        turn += 1
    assert seen_temps, "no writer was killed during a write; the test proves nothing"


# ------------------------------------------------------------------------------------------------- S3


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "MULTIPART_BYTES", 10 << 20)  # parts of 5 MiB, S3's minimum


@pytest.mark.parametrize("from_file", [False, True])
def test_large_objects_go_in_parts(
    proxy: FaultProxy, bucket: str, small_parts: None, tmp_path: Path, from_file: bool
) -> None:
    uri, data = object_store.join(bucket, "big"), pattern(11 << 20)
    proxy.add("status", method="PUT", key="partNumber=2")
    if from_file:
        (tmp_path / "big").write_bytes(data)
        stored = object_store.write_file(str(tmp_path / "big"), uri)
    else:
        stored = object_store.write(uri, data)
    assert sum("partNumber" in r.target for r in proxy.requests) == 3 + 1
    assert object_store.read(uri, size_bytes=stored.size_bytes, sha256=stored.sha256) == data


@pytest.mark.slow
def test_more_keys_than_one_reply_holds(bucket: str) -> None:
    names = [f"{n:05d}" for n in range(1005)]
    for name in reversed(names):
        object_store.write(object_store.join(bucket, "many", name), b"")
    assert [
        e.uri.rpartition("/")[2] for e in object_store.listing(object_store.join(bucket, "many"))
    ] == names
    object_store.delete_prefix(bucket)
    assert list(object_store.listing(bucket)) == []


def test_a_read_of_known_size_is_one_request(proxy: FaultProxy, bucket: str) -> None:
    uri = object_store.join(bucket, "x")
    data = pattern(1000)
    object_store.write(uri, data)
    proxy.requests.clear()
    object_store.read(uri, start=10, length=20, sha256=sha(data[10:30]))
    object_store.read(uri, size_bytes=1000)
    assert [r.method for r in proxy.requests] == ["GET", "GET"]


def _read_in_child(uri: str) -> tuple[int, bytes]:
    return os.getpid(), object_store.read(uri)


def test_a_forked_child_makes_its_own_connection(bucket: str) -> None:
    uri = object_store.join(bucket, "x")
    object_store.write(uri, b"data")
    with multiprocessing.get_context("fork").Pool(1) as pool:
        pid, data = pool.apply(_read_in_child, (uri,))
    assert (pid != os.getpid(), data) == (True, b"data")
    assert object_store.read(uri) == b"data"


Options = dict[str, Any]
FAULTS: dict[str, Options] = {
    "503 twice": {"kind": "status", "times": 2},
    "500 once": {"kind": "status", "status": 500, "code": "InternalError"},
    "reset before the reply": {"kind": "reset_before"},
    "reset in the body": {"kind": "reset_body", "at": 700_000, "times": 2},
    "closed in the body": {"kind": "close_body", "at": 700_000, "times": 2},
    "closed before the body": {"kind": "close_body", "at": 0},
    "short with a short length": {"kind": "short", "at": 100_000, "times": 2},
    "a byte flipped": {"kind": "flip", "at": 1_234_567, "times": 2},
    "an error page with status 200": {"kind": "ok_error", "times": 2},
}
KNOWN: dict[str, Options] = {
    "size and digest": {"size_bytes": 3 * MB, "sha256": sha(pattern(3 * MB))},
    "size": {"size_bytes": 3 * MB},
    "nothing": {},
    "range": {"start": 500_000, "length": 2 * MB},
    "range to the end": {"start": 500_000},
}
# botocore's retries (a second of backoff for each 503) do not depend on what the caller knows, and only a
# digest shows a flipped byte.
FIRST_KNOWN_ONLY = ("503 twice", "500 once", "reset before the reply", "a byte flipped")


@pytest.mark.parametrize(
    ("fault", "known"),
    [(f, k) for f in FAULTS for k in KNOWN if k == "size and digest" or f not in FIRST_KNOWN_ONLY],
)
def test_a_fault_in_a_read_ends_in_the_right_bytes(
    proxy: FaultProxy, bucket: str, fault: str, known: str
) -> None:
    uri, data, ask = object_store.join(bucket, "scan"), pattern(3 * MB), KNOWN[known]
    object_store.write(uri, data)
    proxy.add(method="GET", key="scan", **FAULTS[fault])
    start = ask.get("start", 0)
    assert object_store.read(uri, **ask) == data[start : start + ask.get("length", 3 * MB)]
    assert len(proxy.faults()) == FAULTS[fault].get("times", 1)


def test_a_read_goes_on_from_the_byte_reached(proxy: FaultProxy, bucket: str, tmp_path: Path) -> None:
    uri, data = object_store.join(bucket, "scan"), pattern(5 * MB)
    stored = object_store.write(uri, data)
    proxy.add("close_body", method="GET", at=4 * MB)
    object_store.read_to_file(uri, str(tmp_path / "x"), size_bytes=stored.size_bytes, sha256=stored.sha256)
    assert (tmp_path / "x").read_bytes() == data
    again = proxy.requests[-1].headers
    reached = int(again["range"].removeprefix("bytes=").rstrip("-"))
    assert 2 * MB < reached <= 4 * MB
    assert "if-match" in again


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ETag", '"another"'),
        ("Content-Range", "bytes 500001-2500000/3000000"),
        ("Content-Range", "bytes */9"),
    ],
)
def test_a_reply_that_is_not_the_one_asked_for_is_not_believed(
    proxy: FaultProxy, bucket: str, name: str, value: str
) -> None:
    """As from a store or cache that ignores If-Match or the range."""
    uri, data = object_store.join(bucket, "scan"), pattern(3 * MB)
    object_store.write(uri, data)
    proxy.add("close_body", method="GET", at=0)  # after it, an ETag is pinned
    proxy.add("header", method="GET", name=name, value=value)
    want = data[500_000:2_500_000]
    assert object_store.read(uri, start=500_000, length=2 * MB, sha256=sha(want)) == want
    # More requests where the machine is so busy that one times out.
    faults = [r.fault for r in proxy.requests if r.method == "GET"]
    assert (faults[:2], set(faults[2:])) == (["close_body", "header"], {None})


@pytest.mark.parametrize(
    "fault",
    ["short with a short length", "closed in the body", "a byte flipped", "an error page with status 200"],
)
def test_a_fault_that_does_not_end_is_an_error(
    proxy: FaultProxy, bucket: str, fault: str, tmp_path: Path
) -> None:
    uri, data = object_store.join(bucket, "scan"), pattern(3 * MB)
    stored = object_store.write(uri, data)
    proxy.add(method="GET", **(FAULTS[fault] | {"times": 99, "at": 5}))
    with pytest.raises(UserError) as caught:
        object_store.read_to_file(
            uri, str(tmp_path / "x"), size_bytes=stored.size_bytes, sha256=stored.sha256
        )
    assert uri in str(caught.value)
    assert isinstance(caught.value, object_store.IntegrityError) == (fault != "closed in the body")
    assert len(proxy.faults()) == object_store.BODY_ATTEMPTS  # not multiplied by botocore's
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_keeps_failing_is_an_error(proxy: FaultProxy, bucket: str, impatient: None) -> None:
    uri = object_store.join(bucket, "scan")
    proxy.add("status", times=99)
    for call in (
        lambda: object_store.read(uri, size_bytes=1),
        lambda: object_store.write(uri, b"x"),
        lambda: list(object_store.listing(uri)),
    ):
        with pytest.raises(UserError, match="kept failing"):
            call()
    assert len(proxy.faults()) == 3 * 2


@pytest.mark.parametrize("length", [3 * MB, MB, 4 * MB], ids=["same length", "shorter", "longer"])
@pytest.mark.parametrize("known", ["size and digest", "nothing"])
def test_an_object_replaced_while_it_is_read(
    proxy: FaultProxy, bucket: str, length: int, known: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine the write may take longer than the first timeout; the read must not go on before it.
    monkeypatch.setattr(object_store, "READ_TIMEOUTS_S", (30.0,))
    uri, old, new = object_store.join(bucket, "scan"), pattern(3 * MB), pattern(length, salt=1)
    object_store.write(uri, old)
    proxy.add("run", method="GET", at=2 * MB, action=lambda: object_store.write(uri, new))
    if KNOWN[known]:
        with pytest.raises(object_store.IntegrityError, match="replaced"):
            object_store.read(uri, **KNOWN[known])
    else:
        assert object_store.read(uri) == new


@pytest.mark.parametrize(
    "fault",
    [{"kind": "status"}, {"kind": "reset_before"}, {"kind": "lost_reply"}, {"kind": "status", "status": 500}],
)
def test_a_fault_in_a_write_ends_in_the_new_object(proxy: FaultProxy, bucket: str, fault: Options) -> None:
    uri, new = object_store.join(bucket, "scan"), pattern(MB, 1)
    object_store.write(uri, pattern(MB))
    proxy.add(method="PUT", **fault)
    stored = object_store.write(uri, new)
    assert len(proxy.faults()) == 1
    assert object_store.read(uri, size_bytes=stored.size_bytes, sha256=stored.sha256) == new


def test_a_write_that_fails_keeps_the_old_object(proxy: FaultProxy, bucket: str, impatient: None) -> None:
    uri = object_store.join(bucket, "scan")
    object_store.write(uri, b"old")
    proxy.add("status", method="PUT", times=99)
    with pytest.raises(UserError, match="kept failing"):
        object_store.write(uri, b"new")
    assert object_store.read(uri) == b"old"


# --------------------------------------------------------------------------- what the user set up wrong

CALLS = {
    "read": lambda uri: object_store.read(uri),
    "read a range": lambda uri: object_store.read(uri, start=1, length=2),
    "write": lambda uri: object_store.write(uri, b"x"),
    "stat": lambda uri: object_store.stat(uri),
    "list": lambda uri: list(object_store.listing(uri)),
    "delete": lambda uri: object_store.delete(uri),
    "delete_prefix": lambda uri: object_store.delete_prefix(uri),
}


def failures(uri: str, match: str) -> list[UserError]:
    """The error of each call, all in one test: other settings mean other clients, which take a while to make."""
    errors = []
    for name, call in CALLS.items():
        with pytest.raises(UserError, match=match) as caught:
            call(uri)
        assert uri in str(caught.value), name
        errors.append(caught.value)
    return errors


def test_a_missing_bucket_is_named(bucket: str) -> None:
    failures(f"{bucket}-not/x", "the bucket does not exist")


@pytest.mark.parametrize("wrong", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_wrong_keys_are_named_and_never_shown(
    bucket: str, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    right = os.environ["AWS_SECRET_ACCESS_KEY"]
    monkeypatch.setenv(wrong, "x-wrong-and-private")
    for error in failures(object_store.join(bucket, "x"), "AWS_SECRET_ACCESS_KEY"):
        told = f"{error} {error.__cause__}"
        for private in ("x-wrong-and-private", right, os.environ["AWS_ACCESS_KEY_ID"]):
            assert private not in told


def test_absent_credentials_are_named(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    failures(object_store.join(bucket, "x"), "no credentials")


def _closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_an_unreachable_endpoint_is_named(
    bucket: str, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = _closed_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://user:hunter2@127.0.0.1:{port}")
    for error in failures(object_store.join(bucket, "x"), "AWS_ENDPOINT_URL_S3"):
        assert f"http://127.0.0.1:{port} " in str(error)
        assert "hunter2" not in str(error)


def test_a_wrong_address_fails_after_few_attempts(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{_closed_port()}")
    attempts = []

    def counted(retry_state: tenacity.RetryCallState) -> float:
        attempts.append(retry_state.attempt_number)
        return 0

    monkeypatch.setattr(object_store, "WAIT", counted)
    with pytest.raises(UserError, match="cannot reach the object store"):
        object_store.read(object_store.join(bucket, "x"))
    assert len(attempts) <= object_store.CONTACT_ATTEMPTS


def test_an_endpoint_that_goes_away_is_named(
    s3_server: S3Server, bucket: str, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultProxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        object_store.write(object_store.join(bucket, "x"), b"x")
    with pytest.raises(UserError, match="cannot reach the object store at http://127"):
        object_store.read(object_store.join(bucket, "x"))


@pytest.mark.parametrize(
    ("name", "value"), [("AWS_ENDPOINT_URL_S3", "not an address"), ("AWS_PROFILE", "no-such-profile")]
)
def test_settings_that_make_no_sense_are_named(
    bucket: str, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=name):
        object_store.read(object_store.join(bucket, "x"))


def test_a_bucket_may_be_made_twice(bucket: str) -> None:
    object_store.create_bucket(bucket)
    with pytest.raises(UserError, match=r"not a valid bucket|name is not valid"):
        object_store.create_bucket("s3://Not_A_Bucket!")
