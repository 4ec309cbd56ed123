"""What a node keeps of a bucket: read once, within a budget, whole whatever is killed, and never somebody else's."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from faultproxy import FaultProxy
from helpers import stored_case

from logonet import cli
from logonet.core.errors import UserError
from logonet.data import cropping, phantom, prepared_scans
from logonet.storage import node_cache, object_store


def content(seed: int, size: int = 1000) -> tuple[bytes, str]:
    data = np.random.default_rng(seed).bytes(size)
    return data, hashlib.sha256(data).hexdigest()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(node_cache.DIR, str(tmp_path / "cache"))
    monkeypatch.setenv(node_cache.GB, "0.1")
    node_cache._opened.cache_clear()
    return tmp_path / "cache"


def gets(proxy: FaultProxy) -> int:
    return sum(r.method == "GET" for r in proxy.requests)


def test_a_second_read_asks_the_bucket_for_nothing(folder: Path, proxy: FaultProxy, bucket: str) -> None:
    data, sha256 = content(0)
    uri = f"{bucket}/a"
    object_store.write(uri, data)
    asked = {"start": 100, "length": 800, "sha256": hashlib.sha256(data[100:900]).hexdigest()}
    assert node_cache.read(uri, **asked) == data[100:900]
    first = gets(proxy)
    object_store.delete(uri)
    assert node_cache.read(uri, **asked) == data[100:900]
    assert gets(proxy) == first
    # Another place with the same content is the same file.
    assert node_cache.read(f"{bucket}/elsewhere", **asked) == data[100:900]
    with pytest.raises(UserError):
        node_cache.read(uri, start=0, length=10, sha256=sha256)


def test_only_a_buckets_bytes_with_a_known_digest_are_kept(folder: Path, bucket: str, tmp_path: Path) -> None:
    data, sha256 = content(1)
    for uri in (f"{bucket}/a", str(tmp_path / "a")):
        object_store.write(uri, data)
    assert node_cache.read(f"{bucket}/a", start=0, length=1000, sha256=None) == data
    assert node_cache.read(str(tmp_path / "a"), start=0, length=1000, sha256=sha256) == data
    assert node_cache.kept_bytes() == 0


def test_bytes_that_are_not_the_promised_ones_are_not_kept(folder: Path, bucket: str) -> None:
    data, _ = content(2)
    object_store.write(f"{bucket}/a", data)
    with pytest.raises(object_store.IntegrityError):
        node_cache.read(f"{bucket}/a", start=0, length=1000, sha256="0" * 64)
    assert node_cache.kept_bytes() == 0


def test_a_file_that_was_cut_short_is_fetched_again(folder: Path, bucket: str) -> None:
    data, sha256 = content(3)
    object_store.write(f"{bucket}/a", data)
    asked = {"start": 0, "length": 1000, "sha256": sha256}
    node_cache.read(f"{bucket}/a", **asked)
    (kept,) = [path for path, *_ in node_cache._files(folder)]
    kept.write_bytes(data[:500])
    assert node_cache.read(f"{bucket}/a", **asked) == data
    assert kept.read_bytes() == data


def test_what_was_not_read_for_the_longest_time_goes_first(folder: Path) -> None:
    cache = node_cache._Cache(folder, budget_bytes=10_000)
    names = []
    for seed in range(12):
        data, sha256 = content(seed)
        cache.put(sha256, data)
        if folder.joinpath(sha256[:2], sha256).exists():
            os.utime(cache.path(sha256), (seed, seed))
        names.append(sha256)
    cache.get(names[4], 1000)  # read just now
    cache.trim()
    left = {path.name for path, *_ in node_cache._files(folder)}
    assert node_cache.kept_bytes(folder) <= 9_000
    assert names[4] in left
    assert names[0] not in left
    assert names[11] in left


def test_the_budget_holds_while_many_write(folder: Path) -> None:
    caches = [node_cache._Cache(folder, budget_bytes=50_000) for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: caches[seed % 4].put(content(seed)[1], content(seed)[0]), range(400)))
    # Each process may write a fiftieth of the budget between two looks.
    assert node_cache.kept_bytes(folder) <= 50_000 * (1 + 4 * node_cache.CHECK_SHARE) + 8 * 1000


KILLED = """
import hashlib, sys
from pathlib import Path
from logonet.storage import node_cache
cache = node_cache._Cache(Path(sys.argv[1]), budget_bytes=2_000_000)
print("ready", flush=True)
for n in range(10**9):
    data = n.to_bytes(8, "little") * 2500
    cache.put(hashlib.sha256(data).hexdigest(), data)
"""


def test_a_kill_at_any_instant_leaves_whole_files_only(folder: Path) -> None:
    for patience_s in (0.02, 0.05, 0.11):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        try:
            process.wait(timeout=patience_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.wait()
        for path, *_ in node_cache._files(folder):
            if not path.name.startswith(node_cache.TEMP):
                assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    assert node_cache.kept_bytes(folder) > 0


def test_the_cache_can_be_turned_off_and_cleared(
    folder: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, sha256 = content(5)
    object_store.write(f"{bucket}/a", data)
    node_cache.read(f"{bucket}/a", start=0, length=1000, sha256=sha256)
    assert node_cache.kept_bytes() == 1000
    cli.main(["cache", "clear"])
    assert str(folder) in capsys.readouterr().out
    assert node_cache.kept_bytes() == 0
    monkeypatch.setenv(node_cache.GB, "0")
    node_cache.read(f"{bucket}/a", start=0, length=1000, sha256=sha256)
    assert node_cache.kept_bytes() == 0
    monkeypatch.setenv(node_cache.GB, "much")
    with pytest.raises(UserError, match="LOGONET_CACHE_GB is 'much'"):
        node_cache.read(f"{bucket}/a", start=0, length=1000, sha256=sha256)


def test_a_disk_that_takes_nothing_is_no_error(
    folder: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, sha256 = content(6)
    object_store.write(f"{bucket}/a", data)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert node_cache.read(f"{bucket}/a", start=0, length=1000, sha256=sha256) == data


def test_the_crops_of_later_epochs_come_from_the_disk(folder: Path, proxy: FaultProxy, bucket: str) -> None:
    scan, _ = phantom.phantom(0, (40, 36, 30))
    image_CXYZ = prepared_scans.prepare_image(scan, "CT", cropping.Config(), "a")
    ref = stored_case(bucket, "a", image_CXYZ)

    def crops() -> list[bytes]:
        prepared_scans._tensor.cache_clear()
        prepared_scans._header.cache_clear()
        rng = np.random.default_rng(0)
        corners = [prepared_scans.draw_corner(ref, (16, 16, 16), 0.1, rng) for _ in range(5)]
        return [prepared_scans.read_image(ref, c.tolist(), (16, 16, 16)).tobytes() for c in corners]

    first, asked = crops(), gets(proxy)
    assert crops() == first
    assert gets(proxy) == asked
