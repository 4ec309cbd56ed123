"""Object storage and local folders behind one URI: verified reads, atomic writes, listings.

A URI is ``s3://bucket/key``, ``file:///folder/name`` (taken literally, no percent-decoding) or a plain
local path. Credentials, region and endpoint come from the usual AWS chain; a self-hosted store is named
by ``AWS_ENDPOINT_URL_S3`` alone.

Why not s3fs, pyarrow or boto3's own download for the bytes we trust: under injected faults each of them
returned wrong bytes without an error (a short reply with a matching Content-Length, an object replaced
while it was read, an error page with status 200). ``read`` pins the ETag of the first good reply, asks
for the rest with If-Match, and checks length and SHA-256 against what the caller knows. Where the caller knows no
SHA-256, the object's ETag or the store's checksum must vouch for the bytes, or they are read twice.

Every request is repeated here and not by botocore, whose first pause is as long as a hundred reads, which waits
half a minute for a reply that will not come, and which believes an empty or a repeated page of a listing. A 403
that names no cause is repeated a few times too: rights that change take seconds to reach all of a store.

Every failure that a user can mend is a ``UserError`` of one sentence that names the URI; no message ever
holds a credential. This is the only module that imports boto3.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import re
import shutil
import socket
import threading
import time
import urllib.request
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from stat import S_ISREG
from typing import Any, BinaryIO, NoReturn, TypeVar
from urllib.parse import urlsplit

import boto3
import botocore.config
import tenacity
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    ConnectionError,
    CredentialRetrievalError,
    HTTPClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
)
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError as Urllib3Error

from logonet.core import config
from logonet.core.errors import UserError
from logonet.core.redaction import holds_credentials

T = TypeVar("T")
X = TypeVar("X")

S3 = "s3://"
TEMP_MARK = ".logonet-tmp-"  # unfinished local writes; listings skip them, abort_stale_uploads sweeps them
PIECE_BYTES = 1 << 20
MULTIPART_BYTES = 64 << 20
PARTS_AT_ONCE = 4
READS_AT_ONCE = 8
MAX_PARTS = 10_000  # S3's own limit
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 30
# A reader's, for the next byte: it changes nothing, so it may ask again early, then waiting longer each time. No
# shorter than SLOW times what nine of ten of the last replies took, or a slow store would have twice the work.
PATIENCE_S = (0.25, 0.5, 1.0, 2.0, 4.0, READ_TIMEOUT_S)
SLOW = 4
KNOWN_REPLIES = 4  # until then patience begins in the middle
WAIT = tenacity.wait_random_exponential(multiplier=0.1, max=8)  # between attempts
REQUEST_ATTEMPTS = 13  # about 25 s of pauses, enough for a store's restart
REQUEST_SECONDS = 240  # no further attempt after this long, for a store that answers nothing
REFUSED_ATTEMPTS = 5  # for a 403 that names no cause
BODY_ATTEMPTS = 8  # for what shows after a reply's headers
CONTACT_ATTEMPTS = 3  # first contact with an endpoint: a wrong address should not cost 25 s of backoff
POOL_CONNECTIONS = 32
PAGE_KEYS = 1000  # the most that one page of a listing holds
DELETE_BATCH = 1000  # the most keys one DeleteObjects takes


class NotGiven(UserError):
    """The store does not give this one object; of others that says nothing, and of its content neither."""


class IntegrityError(NotGiven):
    """Bytes that are not the ones the caller was promised: wrong size, wrong SHA-256, replaced, torn."""


class Refused(NotGiven):
    """The rights do not reach to this object, which is not to say that the credentials are wrong."""


@dataclass(frozen=True)
class Entry:
    """One stored object. ``version`` changes when it is replaced: the ETag on S3, mtime in ns locally."""

    uri: str
    size_bytes: int
    version: str


@dataclass(frozen=True)
class Stored:
    """What was written: hand it back to ``read`` and nothing else will be accepted."""

    size_bytes: int
    sha256: str


# ---------------------------------------------------------------------------------------------- names


def is_s3(uri: str) -> bool:
    return uri.startswith(S3)


def join(root: str, *parts: str) -> str:
    """``root/part/...`` with single slashes between: always a place below ``root``.

    Raises:
        UserError: for a part with ``..`` in it, since names come from manifests and listings too.
    """
    for part in parts:
        if ".." in part.split("/"):
            raise UserError(f"the name '{part}' leads out of {root}; use a name without '..'")
    return "/".join([root.rstrip("/"), *(p.strip("/") for p in parts if p.strip("/"))])


def relative(uri: str, root: str) -> str:
    """The part of ``uri`` below ``root``."""
    prefix = root.rstrip("/") + "/"
    assert uri.startswith(prefix), f"{uri} is not below {root}"
    return uri[len(prefix) :]


def local_path(uri: str) -> str:
    """The path of a local URI.

    Raises:
        UserError: for a scheme that is neither s3:// nor file://.
    """
    assert not is_s3(uri), f"{uri} is not local"
    if not uri.startswith("file://") and "://" in uri:
        raise UserError(f"{uri} is not a place logonet can use; give s3://bucket/key, file:///path or a path")
    path = uri.removeprefix("file://") if uri.startswith("file://") else os.path.expanduser(uri)
    try:
        if b"\0" not in os.fsencode(path):
            return path
    except UnicodeEncodeError:
        pass
    raise UserError(f"{uri}: this can be no file's name; correct it")


def _bucket_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix(S3).partition("/")
    if "@" in uri and holds_credentials(uri):
        raise UserError(
            f"{uri}: holds credentials, which would end up in logs; leave them out and set {_KEYS} or AWS_PROFILE"
        )
    if not bucket:
        raise UserError(f"{uri} names no bucket; write s3://bucket/key")
    try:
        key.encode()
    except UnicodeEncodeError:
        raise UserError(f"{uri}: this can be no object's key; correct it") from None
    return bucket, key


def _folder(uri: str) -> tuple[str, str]:
    """Bucket and key prefix of everything below ``uri``."""
    bucket, key = _bucket_key(uri)
    return bucket, key.rstrip("/") + "/" if key.strip("/") else ""


# --------------------------------------------------------------------------------------------- client

_client_lock = threading.Lock()  # boto3 sessions are not thread-safe while they make a client


def _client(read_timeout_s: float = READ_TIMEOUT_S) -> Any:
    """The process's S3 client for the current AWS_* variables: made on first use, never pickled or forked."""
    settings = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_")))
    with _client_lock:
        return _make_client(os.getpid(), settings, read_timeout_s)


@functools.lru_cache(maxsize=8 * len(PATIENCE_S))
def _make_client(pid: int, settings: tuple[tuple[str, str], ...], read_timeout_s: float) -> Any:
    config = botocore.config.Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=read_timeout_s,
        retries={"mode": "standard", "total_max_attempts": 1},
        max_pool_connections=POOL_CONNECTIONS,
        user_agent_extra="logonet",
    )
    try:
        client = _session(pid, settings).client("s3", config=config)
    except ProfileNotFound:
        raise UserError("AWS_PROFILE names a profile that does not exist; correct or unset it") from None
    except ValueError:
        raise UserError("AWS_ENDPOINT_URL_S3 is not an address; write it as http://host:port") from None
    _contact(pid, client.meta.endpoint_url)
    return client


@functools.lru_cache(maxsize=8)
def _session(pid: int, settings: tuple[tuple[str, str], ...]) -> Any:
    return boto3.session.Session()


@functools.lru_cache(maxsize=8)
def _contact(pid: int, endpoint: str) -> None:
    """Fail in seconds, with a sentence, where nothing listens at ``endpoint``; once it has answered, never again."""
    parts = urlsplit(endpoint)
    host = parts.hostname or ""
    if parts.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
        return  # only the proxy can tell
    address = (host, parts.port or (443 if parts.scheme == "https" else 80))
    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(CONTACT_ATTEMPTS),
        wait=tenacity.wait_random(0.5, 1.5),
        retry=tenacity.retry_if_exception_type(OSError),
        reraise=True,
    )
    try:
        retrying(socket.create_connection, address, timeout=CONNECT_TIMEOUT_S).close()
    except OSError as err:
        raise UserError(_unreachable(endpoint, err)) from None


def _unreachable(endpoint: str, err: Exception) -> str:
    why = err.strerror if isinstance(err, OSError) and err.strerror else type(err).__name__
    parts = urlsplit(endpoint)
    # An address may carry user:password@.
    named = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    return f"cannot reach the object store at {named} ({why}); start it or correct AWS_ENDPOINT_URL_S3"


# ------------------------------------------------------------------------------------------- requests

_READING = {"get_object", "head_object", "head_bucket", "list_objects_v2", "list_multipart_uploads"}
_PASSING = {  # codes of statuses that mostly mean a mistake: what was sent arrived damaged or not whole
    "BadDigest",
    "IncompleteBody",
    "InvalidDigest",
    "RequestTimeout",
    "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
}
# Of the last replies, by operation.
_silences_s: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=64))
_silences_lock = threading.Lock()


def _call(operation: str, *, impatience: int = 0, **args: Any) -> Any:
    """One request of the S3 API, repeated while that may help. What it raises in the end is botocore's.

    ``impatience`` is how often the caller has been left waiting for what it now asks for.
    """
    waits, refusals = impatience, 0

    def once() -> Any:
        nonlocal waits, refusals
        client = _client(_timeout_s(operation, waits))
        began = time.monotonic()
        try:
            reply = getattr(client, operation)(**args)
        except ReadTimeoutError:
            waits += 1
            raise
        except ClientError as err:
            refusals += _unexplained(err)
            raise
        with _silences_lock:
            _silences_s[operation].append(time.monotonic() - began)
        return reply

    def enough(state: tenacity.RetryCallState) -> bool:
        tried, seconds = state.attempt_number, state.seconds_since_start or 0
        return tried >= REQUEST_ATTEMPTS or refusals >= REFUSED_ATTEMPTS or seconds > REQUEST_SECONDS

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(_may_pass), stop=enough, wait=WAIT, reraise=True
    )(once)


def _timeout_s(operation: str, waits: int) -> float:
    if operation not in _READING:
        return READ_TIMEOUT_S
    with _silences_lock:
        last = sorted(_silences_s[operation])
    if len(last) < KNOWN_REPLIES:
        level = len(PATIENCE_S) // 2 - 1
    else:
        level = sum(patience_s < SLOW * last[len(last) * 9 // 10] for patience_s in PATIENCE_S)
    return PATIENCE_S[min(level + waits, len(PATIENCE_S) - 1)]


def _may_pass(err: BaseException) -> bool:
    """Whether the same request may succeed when it is made again."""
    if isinstance(err, ClientError):
        status = _status(err)
        ill = status in (408, 429) or (status >= 500 and status not in (501, 507))
        return ill or _code(err) in _PASSING or _unexplained(err)
    # A reply that is no XML was cut short or damaged on its way.
    return isinstance(err, HTTPClientError | ConnectionError | ResponseParserError)


def _unexplained(err: ClientError) -> bool:
    """A 403 that may be anything: a policy or a role that is being changed, a proxy's whim."""
    return _status(err) == 403 and _code(err) not in _MENDS


def _status(err: ClientError) -> int:
    return int(err.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code(err: ClientError) -> str:
    return str(err.response.get("Error", {}).get("Code", "unknown"))


class _Retry(Exception):
    """This attempt is worth repeating; ``final`` is what to raise when it was the last."""

    def __init__(self, final: UserError) -> None:
        self.final = final


def _insisting(attempt: Callable[[], T]) -> T:
    """What ``attempt`` returns, as soon as it raises no _Retry: for replies whose fault shows after their headers."""
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(_Retry),
        stop=tenacity.stop_after_attempt(BODY_ATTEMPTS),
        wait=WAIT,
        reraise=True,
    )
    try:
        return retrying(attempt)
    except _Retry as last:
        raise last.final from last.__cause__


# --------------------------------------------------------------------------------------------- errors

_KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_MENDS = {  # S3 error code -> what a user reads after the URI
    "SignatureDoesNotMatch": f"the object store rejects the secret key; correct {_KEYS}",
    "InvalidAccessKeyId": f"the object store does not know the access key; correct {_KEYS}",
    "ExpiredToken": "the session token has run out; log in again",
    "InvalidToken": "the session token is not accepted; log in again or unset AWS_SESSION_TOKEN",
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it",
    "NoSuchBucket": "the bucket does not exist; create it or correct its name",
    "NoSuchKey": "no such object; correct the key or run the stage that writes it",
    "NoSuchUpload": "the upload was aborted by someone else; run the command again",
    "InvalidBucketName": "the bucket's name is not valid; use 3 to 63 lowercase letters, digits and hyphens",
    "PermanentRedirect": "the bucket lives in another region; set AWS_DEFAULT_REGION",
    "AuthorizationHeaderMalformed": "the region is not the bucket's; set AWS_DEFAULT_REGION",
    "QuotaExceeded": "the object store is full; free space or raise the quota",
    "InsufficientStorage": "the object store is full; free space or raise the quota",
    "XMinioStorageFull": "the object store is full; free space",
    "BadDigest": "the bytes were damaged on their way to the object store; check the network, then run again",
}
_ERRNOS = {
    errno.ENOENT: "no such file; correct the path or run the stage that writes it",
    errno.EACCES: "permission denied; change the permissions or choose another folder",
    errno.EPERM: "permission denied; change the permissions or choose another folder",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOSPC: "the disk is full; free space or choose another disk",
    errno.EDQUOT: "the disk quota is used up; free space or choose another disk",
    errno.EISDIR: "this is a folder; name a file in it",
    errno.ENOTDIR: "a part of the path is a file; choose another folder",
}


@contextlib.contextmanager
def _plainly(uri: str) -> Iterator[None]:
    """Turn what the libraries raise into one sentence about ``uri``."""
    try:
        yield
    # Several of botocore's errors are OSErrors too, so its own come first.
    except ClientError as err:
        raise _client_error(uri, err) from err
    except (BotoCoreError, ResponseParserError, Urllib3Error) as err:
        raise UserError(f"{uri}: {_transport(err)}") from err
    except OSError as err:
        mend = _ERRNOS.get(
            err.errno or 0, f"{err.strerror or type(err).__name__}; check the disk and the path"
        )
        kind = Refused if err.errno in (errno.EACCES, errno.EPERM) else UserError
        raise kind(f"{uri}: {mend}") from err


def _client_error(uri: str, err: ClientError) -> UserError:
    # Only the code is shown: a store's message may repeat the access key or the string that was signed.
    code, status = _code(err), _status(err)
    if code in _MENDS:
        return UserError(f"{uri}: {_MENDS[code]}")
    if status == 403:
        return Refused(f"{uri}: access is refused ({code}); correct {_KEYS} or ask for rights on the bucket")
    if status == 416:
        return IntegrityError(
            f"{uri}: the object is shorter than the range that was asked for; write it again"
        )
    if status == 507:
        return UserError(f"{uri}: {_MENDS['InsufficientStorage']}")
    if status >= 500 or status == 429 or code == "SlowDown":
        return UserError(f"{uri}: the object store kept failing ({code}); check its health, then run again")
    return UserError(f"{uri}: the object store refused the request ({code}, status {status}); check the URI")


def _transport(err: Exception) -> str:
    if isinstance(err, NoCredentialsError | PartialCredentialsError):
        return f"no credentials for the object store; set {_KEYS}, AWS_PROFILE or an instance role"
    if isinstance(err, CredentialRetrievalError):
        return "the credentials could not be fetched; log in again"
    if isinstance(err, ParamValidationError):
        return "this is not a valid bucket and key; write s3://bucket/key"
    if isinstance(err, ConnectionError | ConnectionClosedError | ReadTimeoutError):
        return _unreachable(_client().meta.endpoint_url, err)
    return f"the transfer broke off ({type(err).__name__}); check the network, then run again"


def _need_bucket(uri: str) -> None:
    """HEAD has no body, so its bare 404 leaves open whether the key or the bucket is missing."""
    try:
        _call("head_bucket", Bucket=_bucket_key(uri)[0])
    except ClientError as err:
        if _status(err) == 404:
            raise UserError(f"{uri}: {_MENDS['NoSuchBucket']}") from err
        raise


# ---------------------------------------------------------------------------------------------- reads


def read(
    uri: str,
    *,
    size_bytes: int | None = None,
    sha256: str | None = None,
    start: int = 0,
    length: int | None = None,
) -> bytes:
    """The bytes of an object, or of its range ``[start, start + length)``, verified.

    Args:
        size_bytes: size that the whole object must have.
        sha256: hex digest of exactly the bytes asked for.
        start, length: the range in bytes; ``length=None`` means to the end.

    Raises:
        IntegrityError: wrong size or digest, an object replaced meanwhile, or a range that it lacks.
        UserError: missing, unreachable, refused.
    """
    sink = io.BytesIO()
    _copy_out(uri, sink, size_bytes, sha256, start, length)
    return sink.getvalue()


def read_to_file(uri: str, path: str, *, size_bytes: int | None = None, sha256: str | None = None) -> None:
    """Copy an object to a local file, which appears only once it is verified."""
    with _atomic(path) as out:
        _copy_out(uri, out, size_bytes, sha256, 0, None)


def read_text(uri: str) -> str:
    """The object as UTF-8 text, without a byte order mark.

    Raises:
        UserError: when it is something else.
    """
    try:
        return read(uri).decode("utf-8-sig")  # spreadsheets put one first
    except UnicodeDecodeError as err:
        raise UserError(f"{uri}: is not UTF-8 text ({err.reason}); save it as UTF-8") from None


def read_json(uri: str) -> Any:
    """The parsed object.

    Raises:
        IntegrityError: when it is not JSON.
    """
    try:
        return config.parse_json(read(uri))
    except ValueError:
        raise IntegrityError(f"{uri} is not valid JSON; it is torn or not ours, write it again") from None


def at_once(fn: Callable[[X], T], items: Iterable[X]) -> list[T]:
    """``fn`` of each, in their order, several at once: while one waits for the store, others work."""
    items = list(items)
    if len(items) < 2:
        return [fn(item) for item in items]
    with ThreadPoolExecutor(min(READS_AT_ONCE, len(items))) as pool:
        return list(pool.map(fn, items))


def _copy_out(
    uri: str, sink: BinaryIO, size_bytes: int | None, sha256: str | None, start: int, length: int | None
) -> None:
    assert start >= 0
    assert length is None or length >= 0
    source = _S3Read if is_s3(uri) else _LocalRead
    source(uri, sink, size_bytes, sha256, start, length).run()


class _Read:
    """One verified copy of ``[start, start + length)`` of ``uri`` into ``sink``."""

    def __init__(
        self,
        uri: str,
        sink: BinaryIO,
        size_bytes: int | None,
        sha256: str | None,
        start: int,
        length: int | None,
    ) -> None:
        self.uri, self.sink, self.size_bytes, self.sha256 = uri, sink, size_bytes, sha256
        self.start, self.length = start, length
        self.digest = self.blank()

    def blank(self) -> Any:
        """A fresh digest of what was promised; None where nothing was."""
        return hashlib.sha256() if self.sha256 else None

    def put(self, piece: bytes) -> None:
        self.sink.write(piece)
        if self.digest is not None:
            self.digest.update(piece)

    def restart(self) -> None:
        self.sink.seek(0)
        self.sink.truncate()
        self.digest = self.blank()

    def stop_for(self, total: int) -> int:
        """The byte to stop before, in an object of ``total`` bytes."""
        stop = total if self.length is None else self.start + self.length
        if max(self.start, stop) > total:
            raise IntegrityError(
                f"{self.uri} holds {total} bytes, not the asked {self.start} to {stop}; write it again"
            )
        return stop

    def wrong_size(self, total: int) -> IntegrityError:
        return IntegrityError(f"{self.uri} holds {total} bytes instead of {self.size_bytes}; write it again")

    def wrong_digest(self) -> IntegrityError:
        return IntegrityError(f"{self.uri}: its SHA-256 is not the recorded one; write it again")


def _without_waiting(path: str, flags: int) -> int:
    """Opening a named pipe waits for its writer, for ever if there is none."""
    return os.open(path, flags | os.O_NONBLOCK)


class _LocalRead(_Read):
    def run(self) -> None:
        with _plainly(self.uri), open(local_path(self.uri), "rb", opener=_without_waiting) as file:
            if not S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UserError(f"{self.uri} is a pipe or a device; name a file")
            total = os.fstat(file.fileno()).st_size
            if self.size_bytes not in (None, total):
                raise self.wrong_size(total)
            left = self.stop_for(total) - self.start
            file.seek(self.start)
            while left:
                piece = file.read(min(left, PIECE_BYTES))
                if not piece:
                    raise IntegrityError(f"{self.uri} shrank while it was read; write it again")
                self.put(piece)
                left -= len(piece)
        if self.sha256 and self.digest.hexdigest() != self.sha256:
            raise self.wrong_digest()


class _S3Read(_Read):
    """Repeats what `_call` cannot: faults of the body. It goes on from the byte it has reached."""

    etag: str | None = None
    total: int | None = None
    waits = 0  # how often the body stopped coming
    gone: IntegrityError | None = None  # the store has said that the object is another one now

    def blank(self) -> Any:
        return super().blank() or hashlib.md5(usedforsecurity=False)  # what most ETags are

    def run(self) -> None:
        if self.length == 0:
            return  # S3 has no empty ranges
        self.total = self.size_bytes
        _insisting(self.attempt)

    def attempt(self) -> None:
        vouched = self.fetch()
        found = self.digest.hexdigest()
        if self.sha256:
            if found != self.sha256:
                self.restart()
                raise self.gone or _Retry(self.wrong_digest())
        elif not vouched:
            self.restart()
            if not self.fetch() and self.digest.hexdigest() != found:
                self.restart()
                raise _Retry(
                    IntegrityError(f"{self.uri}: the object store gives it differently each time; check it")
                )

    def fetch(self) -> bool:
        """All bytes that are still missing, and whether the store vouches for the whole of them."""
        reply, stop, ranged = self.request()
        try:
            with contextlib.closing(reply["Body"]) as body:
                for piece in body.iter_chunks(PIECE_BYTES):
                    self.put(piece)
        except (BotoCoreError, Urllib3Error) as err:
            self.waits += isinstance(err, ReadTimeoutError)
            if type(err).__name__ == "FlexibleChecksumError":  # damaged in transit, no telling where
                self.restart()
            raise _Retry(UserError(f"{self.uri}: {_transport(err)}")) from err
        reached = self.start + self.sink.tell()
        if reached != stop:
            if reached > stop:
                self.restart()
            raise _Retry(
                IntegrityError(f"{self.uri}: the object store sent {reached} of {stop} bytes; check it")
            )
        if self.sha256 or self.start > 0 or self.length is not None:
            return False
        checked = not ranged and "ChecksumAlgorithm" in reply["ResponseMetadata"]
        return checked or self.is_etag()

    def is_etag(self) -> bool:
        """Whether the ETag is an MD5 of these bytes: of the whole, or of the digests of its parts."""
        etag = (self.etag or "").strip('"')
        if etag == self.digest.hexdigest():
            return True
        num_parts = int(etag.partition("-")[2]) if re.fullmatch(r"[0-9a-f]{32}-[0-9]+", etag) else 0
        total = self.sink.tell()
        for part_bytes in _PART_SIZES:
            if num_parts and -(-total // part_bytes) == num_parts:
                self.sink.seek(0)
                digests = (_md5(self.sink.read(part_bytes)).digest() for _ in range(num_parts))
                if f"{_md5(b''.join(digests)).hexdigest()}-{num_parts}" == etag:
                    return True
        return False

    def request(self) -> tuple[Any, int, bool]:
        """A reply known to be the pinned object from the byte reached on, the byte to stop before, and whether
        a range was asked for.
        """
        bucket, key = _bucket_key(self.uri)
        ranged = self.start > 0 or self.length is not None
        with _plainly(self.uri):
            if self.total is None and not ranged:
                # A whole object of unknown size has nothing else to check Content-Length against.
                self.pin_by_head(bucket, key)
            first = self.start + self.sink.tell()
            args: dict[str, Any] = {"IfMatch": self.etag} if self.etag else {}
            if first or ranged:
                last = self.start + self.length - 1 if self.length is not None else ""
                args["Range"] = f"bytes={first}-{last}"
            try:
                reply = _call("get_object", impatience=self.waits, Bucket=bucket, Key=key, **args)
            except ClientError as err:
                if _status(err) != 412:
                    raise
                self.replaced()
        try:
            return reply, self.check(reply, first, "Range" in args), "Range" in args
        except _Retry:
            reply["Body"].close()
            raise

    def pin_by_head(self, bucket: str, key: str) -> None:
        try:
            head = _call("head_object", Bucket=bucket, Key=key)
        except ClientError as err:
            if _status(err) == 404:
                _need_bucket(self.uri)
                raise UserError(f"{self.uri}: {_MENDS['NoSuchKey']}") from err
            raise
        self.etag, self.total = head["ETag"], head["ContentLength"]

    def check(self, reply: dict[str, Any], first: int, ranged: bool) -> int:
        """The byte to stop before, once the reply is known to be the pinned object from ``first`` on."""
        not_ours = _Retry(
            IntegrityError(f"{self.uri}: the object store's reply is not this object; check it")
        )
        etag, size = reply.get("ETag"), reply["ContentLength"]
        if not etag or (self.etag and etag != self.etag):
            raise not_ours
        if ranged:
            spans = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", reply.get("ContentRange", ""))
            if not spans:
                raise not_ours
            begin, total = map(int, spans.groups())
            if begin != first:
                raise not_ours
        else:
            total = size
        if self.total not in (None, total):
            if self.size_bytes is not None:
                raise self.gone or _Retry(self.wrong_size(total))
            raise not_ours
        stop = self.stop_for(total)
        self.etag, self.total = etag, total  # pinned: from now on only this version will do
        return stop

    def replaced(self) -> NoReturn:
        gone = IntegrityError(f"{self.uri} was replaced while it was read; run the command again")
        if self.gone is None and (self.size_bytes is not None or self.sha256):
            self.gone = gone  # unless only the first reply's ETag was wrong: the promise will tell
        self.restart()
        self.etag, self.total = None, self.size_bytes
        raise _Retry(gone)


# Of the usual uploaders.
_PART_SIZES = [n << 20 for n in (5, 8, 10, 15, 16, 25, 32, 50, 64, 100, 128, 256, 512)]


def _md5(data: bytes) -> Any:
    return hashlib.md5(data, usedforsecurity=False)


# --------------------------------------------------------------------------------------------- writes


def write(uri: str, data: bytes | memoryview) -> Stored:
    """Store ``data`` so that readers see the old object or the new one, never a part.

    Raises:
        UserError: full or read-only disk, missing bucket, refused, unreachable.
    """
    stored = Stored(memoryview(data).nbytes, hashlib.sha256(data).hexdigest())
    if not is_s3(uri):
        with _atomic(local_path(uri)) as out:
            out.write(data)
    elif stored.size_bytes < MULTIPART_BYTES:
        _put(uri, bytes(data), stored)
    else:
        _upload(uri, io.BytesIO(data), stored.size_bytes)
    return stored


def write_file(path: str, uri: str) -> Stored:
    """Store a local file under ``uri``, as ``write`` does, in bounded memory."""
    with _plainly(path), open(path, "rb") as file:
        stored = Stored(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())
        file.seek(0)
        if not is_s3(uri):
            with _atomic(local_path(uri)) as out:
                shutil.copyfileobj(file, out, PIECE_BYTES)
        elif stored.size_bytes < MULTIPART_BYTES:
            _put(uri, file.read(), stored)
        else:
            _upload(uri, file, stored.size_bytes)
    return stored


def write_json(uri: str, obj: Any) -> Stored:
    return write(uri, json_bytes(obj))


def json_bytes(obj: Any) -> bytes:
    """``obj`` as the text of a JSON file."""
    return (json.dumps(obj, indent=2) + "\n").encode()


def create_bucket(uri: str) -> None:
    """Make the bucket (or local folder) that ``uri`` names; one that is ours already is no error."""
    with _plainly(uri):
        if not is_s3(uri):
            os.makedirs(local_path(uri), exist_ok=True)
            return
        bucket, _ = _bucket_key(uri)
        region = _client().meta.region_name
        elsewhere = region not in ("us-east-1", "aws-global")  # the one region that may not be named
        args: Any = {"CreateBucketConfiguration": {"LocationConstraint": region}} if elsewhere else {}
        try:
            _call("create_bucket", Bucket=bucket, **args)
        except ClientError as err:
            if _code(err) != "BucketAlreadyOwnedByYou":
                raise


def _put(uri: str, data: bytes, stored: Stored) -> None:
    bucket, key = _bucket_key(uri)
    sums: dict[str, Any] = {
        "ChecksumSHA256": _base64(bytes.fromhex(stored.sha256)),
        "ContentMD5": _base64(_md5(data).digest()),
    }
    with _plainly(uri):
        _call("put_object", Bucket=bucket, Key=key, Body=data, **sums)


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


def _upload(uri: str, file: BinaryIO, size_bytes: int) -> None:
    """Write a large object in parts. What a lost reply or a kill leaves of it, `abort_stale_uploads` sweeps."""
    bucket, key = _bucket_key(uri)
    part_bytes = max(MULTIPART_BYTES // 4, -(-size_bytes // MAX_PARTS))
    reading = threading.Lock()

    def part(number: int) -> tuple[dict[str, Any], bytes]:
        with reading:
            file.seek((number - 1) * part_bytes)
            data = file.read(part_bytes)
        md5 = _md5(data).digest()
        # A store that knows nothing of CRC32 still compares the MD5.
        reply = _call("upload_part", PartNumber=number, Body=data, ContentMD5=_base64(md5), **upload)
        sums = {name: reply[name] for name in ("ETag", "ChecksumCRC32") if name in reply}
        return {"PartNumber": number, **sums}, md5

    with _plainly(uri):
        upload: dict[str, Any] = {"Bucket": bucket, "Key": key}
        upload["UploadId"] = _call("create_multipart_upload", **upload)["UploadId"]
        try:
            with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
                parts = list(pool.map(part, range(1, -(-size_bytes // part_bytes) + 1)))
            etag = f"{_md5(b''.join(md5 for _, md5 in parts)).hexdigest()}-{len(parts)}"
            _complete(upload, [told for told, _ in parts], size_bytes, etag)
        except BaseException:
            with contextlib.suppress(BotoCoreError, ClientError, ResponseParserError):
                _call("abort_multipart_upload", **upload)
            raise


def _complete(upload: dict[str, Any], parts: list[dict[str, Any]], size_bytes: int, etag: str) -> None:
    try:
        _call("complete_multipart_upload", MultipartUpload={"Parts": parts}, **upload)
    except ClientError as err:
        # A repetition after a reply that got lost finds no upload any more. Then the object is what was uploaded.
        if _code(err) != "NoSuchUpload":
            raise
        head = _call("head_object", Bucket=upload["Bucket"], Key=upload["Key"])
        if (head["ContentLength"], head["ETag"].strip('"')) != (size_bytes, etag):
            raise


@contextlib.contextmanager
def _atomic(path: str) -> Iterator[BinaryIO]:
    """A file that takes the name ``path``, durably, when the block ends well, and vanishes otherwise."""
    folder = os.path.dirname(os.path.abspath(path))
    temp = os.path.join(folder, f"{TEMP_MARK}{uuid.uuid4().hex}")
    with _plainly(path):
        os.makedirs(folder, exist_ok=True)
        try:
            with open(temp, "x+b") as out:
                yield out
                out.flush()
                os.fsync(out.fileno())
            os.replace(temp, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temp)
            raise
        fd = os.open(folder, os.O_RDONLY)  # the new name, too, must survive a power cut
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


# -------------------------------------------------------------------------------- listing and deleting


def stat(uri: str) -> Entry | None:
    """Size and version of an object, or None when there is none.

    Raises:
        UserError: when not even the bucket exists, or it may not be read.
    """
    if is_s3(uri):
        bucket, key = _bucket_key(uri)
        with _plainly(uri):
            try:
                head = _call("head_object", Bucket=bucket, Key=key)
            except ClientError as err:
                if _status(err) != 404:
                    raise
                _need_bucket(uri)
                return None
        return Entry(uri, head["ContentLength"], head["ETag"].strip('"'))
    with _plainly(uri):
        try:
            info = os.stat(local_path(uri))
        except OSError as err:
            if err.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            return None
    # folders, pipes and devices hold no bytes that could be read twice
    return Entry(uri, info.st_size, str(info.st_mtime_ns)) if S_ISREG(info.st_mode) else None


def exists(uri: str) -> bool:
    return stat(uri) is not None


def listing(prefix_uri: str) -> Iterator[Entry]:
    """Every object below the folder ``prefix_uri``, at any depth, in the byte order of the keys."""
    return _s3_listing(prefix_uri) if is_s3(prefix_uri) else _local_listing(prefix_uri)


def _s3_listing(prefix_uri: str) -> Iterator[Entry]:
    for page in _pages(prefix_uri):
        for item in page:
            if not item["Key"].endswith("/"):  # pyarrow's empty folder markers
                uri = f"{S3}{_bucket_key(prefix_uri)[0]}/{item['Key']}"
                yield Entry(uri, item["Size"], item["ETag"].strip('"'))


def _pages(prefix_uri: str) -> Iterator[list[dict[str, Any]]]:
    """The items below a prefix, page by page; a page that is torn, or the one before once more, is asked for again."""
    bucket, prefix = _folder(prefix_uri)
    before: set[str] = set()
    args: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": PAGE_KEYS}

    def whole_page() -> dict[str, Any]:
        page = _call("list_objects_v2", **args)
        items = page.get("Contents", [])
        keys = {item["Key"] for item in items}
        counted = page.get("KeyCount", len(items)) == len(items) == len(keys)
        ends = page.get("IsTruncated") is False
        if not (counted and (ends or "NextContinuationToken" in page)) or keys & before:
            raise _Retry(
                IntegrityError(
                    f"{prefix_uri}: a page of the object store's listing is torn or comes twice; check the store"
                )
            )
        return page

    while True:
        with _plainly(prefix_uri):
            page = _insisting(whole_page)
        items = page.get("Contents", [])
        yield items
        if not page["IsTruncated"]:
            return
        before = {item["Key"] for item in items}
        args["ContinuationToken"] = page["NextContinuationToken"]


def _local_listing(prefix_uri: str) -> Iterator[Entry]:
    names = (n for n in _walk(prefix_uri) if not os.path.basename(n).startswith(TEMP_MARK))
    for name in sorted(names, key=os.fsencode):
        entry = stat(join(prefix_uri, name))
        if entry is not None:  # another process may have deleted it meanwhile
            yield entry


def _walk(prefix_uri: str) -> Iterator[str]:
    """Paths of all files below a local folder, relative to it."""
    root = local_path(prefix_uri)

    def refuse(err: OSError) -> None:
        if not isinstance(err, FileNotFoundError):  # as on S3, a folder that is not there is empty
            raise err

    way_to = {root: {os.path.realpath(root)}}
    with _plainly(prefix_uri):
        for folder, below, files in os.walk(root, onerror=refuse, followlinks=True):
            # A link back to a folder on the way here would be followed for ever.
            here = way_to.pop(folder)
            real = {name: os.path.realpath(os.path.join(folder, name)) for name in below}
            below[:] = [name for name in below if real[name] not in here]
            way_to |= {os.path.join(folder, name): here | {real[name]} for name in below}
            for name in files:
                yield os.path.relpath(os.path.join(folder, name), root)


def delete(uri: str) -> None:
    """Delete one object; one that is not there is no error."""
    with _plainly(uri):
        if is_s3(uri):
            bucket, key = _bucket_key(uri)
            _call("delete_object", Bucket=bucket, Key=key)
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(local_path(uri))


def delete_prefix(uri: str) -> int:
    """Delete everything below the folder ``uri`` and return how many objects that were."""
    if not is_s3(uri):
        count = sum(1 for _ in listing(uri))
        with _plainly(uri), contextlib.suppress(FileNotFoundError):
            shutil.rmtree(local_path(uri))
        return count
    bucket, _ = _bucket_key(uri)
    count = 0
    with _plainly(uri):
        for keys in _batches(item["Key"] for page in _pages(uri) for item in page):
            _delete_all(bucket, keys)
            count += len(keys)
    return count


def _delete_all(bucket: str, keys: list[str]) -> None:
    left = set(keys)

    def delete_left() -> None:
        objects = {"Objects": [{"Key": key} for key in sorted(left)]}
        reply = _call("delete_objects", Bucket=bucket, Delete=objects)
        left.difference_update(item["Key"] for item in reply.get("Deleted", []))
        if left:  # refused each by itself, or the reply was torn
            told = {item.get("Key"): item.get("Code", "unknown") for item in reply.get("Errors", [])}
            key = min(left)
            raise _Retry(
                UserError(
                    f"{S3}{bucket}/{key} could not be deleted ({told.get(key, 'no answer')}); check your rights on it"
                )
            )

    _insisting(delete_left)


def _batches(keys: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for key in keys:
        batch.append(key)
        if len(batch) == DELETE_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def abort_stale_uploads(prefix_uri: str, older_than_h: float = 24) -> int:
    """Remove what killed writers left below ``prefix_uri``: multipart uploads, or local temporary files.

    pyarrow leaves its multipart uploads behind when it fails; a store bills them until they are aborted.
    """
    before = datetime.now(UTC) - timedelta(hours=older_than_h)
    return (_abort_uploads if is_s3(prefix_uri) else _sweep_temps)(prefix_uri, before)


def _abort_uploads(prefix_uri: str, before: datetime) -> int:
    bucket, prefix = _folder(prefix_uri)
    stale = []
    args: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix}
    with _plainly(prefix_uri):
        while True:
            page = _call("list_multipart_uploads", **args)
            stale += [u for u in page.get("Uploads", []) if u["Initiated"] < before]
            if not page.get("IsTruncated"):
                break
            args |= {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
        for upload in stale:
            try:
                _call("abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
            except ClientError as err:
                if _code(err) != "NoSuchUpload":  # an earlier attempt did it, and its reply got lost
                    raise
    return len(stale)


def _sweep_temps(prefix_uri: str, before: datetime) -> int:
    count = 0
    for name in list(_walk(prefix_uri)):
        path = os.path.join(local_path(prefix_uri), name)
        if os.path.basename(name).startswith(TEMP_MARK):
            with _plainly(path), contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_mtime < before.timestamp():
                    os.unlink(path)
                    count += 1
    return count


# ------------------------------------------------------------------------------------ pyarrow, for Ray


def arrow_filesystem(uri: str) -> tuple[Any, str]:
    """A pyarrow file system and the path of ``uri`` in it, for Parquet and Ray, on write-once keys only.

    pyarrow sends no If-Match: of an object replaced while it is read it returns a mix of both, or stale
    memory, and it believes a body that was cut short or altered on its way. Its constructor ignores the endpoint
    variables, and its default retry strategy gives up on the third 503, so both are set here.

    Raises:
        UserError: unreachable endpoint.
    """
    import pyarrow.fs

    if not is_s3(uri):
        return pyarrow.fs.LocalFileSystem(), os.path.abspath(local_path(uri))
    bucket, key = _bucket_key(uri)
    endpoint = urlsplit(_client().meta.endpoint_url)
    options: dict[str, str] = {}
    if not (endpoint.hostname or "").endswith((".amazonaws.com", ".amazonaws.com.cn")):
        options = {"endpoint_override": endpoint.netloc, "scheme": endpoint.scheme}
    filesystem = pyarrow.fs.S3FileSystem(
        region=_client().meta.region_name,
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=READ_TIMEOUT_S,
        retry_strategy=pyarrow.fs.AwsDefaultS3RetryStrategy(max_attempts=10),
        **options,
    )
    return filesystem, f"{bucket}/{key}".rstrip("/")
