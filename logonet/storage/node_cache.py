"""Bytes from a bucket, kept on the node's own disk: later epochs read what the first one has fetched.

Files are named by the SHA-256 of their content, so that all processes of a node, and all runs, share them. One is
written under another name first and takes its own when it is whole, so a kill at any instant leaves a whole file or
none. Bytes are checked when they are fetched; a file of another length is fetched again.

    LOGONET_CACHE_DIR   the folder; by default below the system's temporary one
    LOGONET_CACHE_GB    the budget; by default a quarter of the disk that is free at first, 0 turns the cache off

When the budget is spent, the files that were not read for the longest time go first.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from logonet.core.errors import UserError
from logonet.storage import object_store

DIR, GB = "LOGONET_CACHE_DIR", "LOGONET_CACHE_GB"
FREE_SHARE = 0.25  # of the free disk, where no budget is given
KEPT = 0.9  # of the budget, after files were deleted
CHECK_SHARE = 0.02  # of the budget that a process writes between two looks at the whole
TEMP = ".tmp-"


@dataclass
class _Cache:
    folder: Path
    budget_bytes: int
    written_bytes: int = 0  # by this process since it last looked
    reads: dict[str, int] = field(default_factory=lambda: {"hit": 0, "miss": 0})  # by this process
    lock: threading.Lock = field(default_factory=threading.Lock)

    def path(self, sha256: str) -> Path:
        return self.folder / sha256[:2] / sha256

    def get(self, sha256: str, length: int | None) -> bytes | None:
        """The bytes, or None where they are not kept."""
        path = self.path(sha256)
        try:
            data = path.read_bytes()
            os.utime(path)  # read last now
        except OSError:
            return None
        return data if length in (None, len(data)) else None

    def put(self, sha256: str, data: bytes) -> None:
        """Keep ``data``; a full or read-only disk keeps nothing, and that is no error."""
        path = self.path(sha256)
        temp = path.with_name(f"{TEMP}{uuid.uuid4().hex}")
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temp.write_bytes(data)
                os.replace(temp, path)
            finally:
                temp.unlink(missing_ok=True)
        with self.lock:
            self.written_bytes += len(data)
            due = self.written_bytes >= CHECK_SHARE * self.budget_bytes
            self.written_bytes *= not due
        if due:
            self.trim()

    def trim(self) -> None:
        """Delete what was not read for the longest time.

        One process at a time: the others wait, because one that is at it does not see what they have just written.
        """
        with contextlib.suppress(OSError), open(self.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            kept = sorted(_files(self.folder), key=lambda entry: entry[1])
            total = sum(size for _, _, size in kept)
            for path, _, size in kept:
                if total <= KEPT * self.budget_bytes:
                    break
                path.unlink(missing_ok=True)
                total -= size


def _files(folder: Path) -> Iterator[tuple[Path, float, int]]:
    """(path, when it was read last, bytes) of every kept file, and of what killed processes left behind."""
    for path in folder.glob("??/*"):
        with contextlib.suppress(FileNotFoundError):
            info = path.stat()
            yield path, info.st_mtime, info.st_size


def folder() -> Path:
    """Where the node keeps its files."""
    user = os.getuid()
    return Path(os.environ.get(DIR) or os.path.join(tempfile.gettempdir(), f"logonet-cache-{user}"))


@functools.lru_cache(maxsize=4)
def _opened(place: Path, budget_gb: str) -> _Cache | None:
    """The cache of this process; None where it is turned off.

    Raises:
        UserError: the budget is no number.
    """
    try:
        budget_bytes = float(budget_gb) * 1e9 if budget_gb else -1.0
    except ValueError:
        raise UserError(f"{GB} is '{budget_gb}'; give a number of gigabytes, or 0 for no cache") from None
    with contextlib.suppress(OSError):
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        if place.stat().st_uid != os.getuid():  # someone else could put other bytes there
            return None
        if budget_bytes < 0:
            budget_bytes = FREE_SHARE * (shutil.disk_usage(place).free + kept_bytes(place))
    return _Cache(place, int(budget_bytes)) if budget_bytes > 0 else None


def kept_bytes(place: Path | None = None) -> int:
    """How much is kept."""
    return sum(size for *_, size in _files(place or folder()))


def read(uri: str, *, start: int, length: int, sha256: str | None) -> bytes:
    """`object_store.read`, from the node's own disk where the bytes lie there.

    Only bytes in a bucket whose digest is known are kept.
    """
    cache = _opened(folder(), os.environ.get(GB, "")) if sha256 and object_store.is_s3(uri) else None
    if cache is None or sha256 is None:
        return object_store.read(uri, start=start, length=length, sha256=sha256)
    data = cache.get(sha256, length)
    with cache.lock:
        cache.reads["miss" if data is None else "hit"] += 1
    if data is None:
        data = bytes(object_store.read(uri, start=start, length=length, sha256=sha256))
        cache.put(sha256, data)
    return data


def reads() -> dict[str, int]:
    """How often this process has found what it wanted ("hit"), and how often not ("miss")."""
    cache = _opened(folder(), os.environ.get(GB, ""))
    return dict(cache.reads) if cache else {}


def clear() -> int:
    """Delete everything that is kept; the number of bytes."""
    place = folder()
    total = kept_bytes(place)
    for path, *_ in _files(place):
        path.unlink(missing_ok=True)
    return total
