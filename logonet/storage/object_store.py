"""Object storage and local folders behind one URI: verified reads, atomic writes, listings.

A URI is ``s3://bucket/key``, ``file:///folder/name`` (taken literally, without percent-decoding) or a plain
local path. Credentials, region and endpoint come from the usual AWS settings; ``AWS_ENDPOINT_URL_S3`` alone
names a self-hosted store.

Reads do not use s3fs, pyarrow or boto3's own download: under injected faults each of them returned wrong
bytes without an error (a short reply with a matching Content-Length, an object replaced during the read, an
error page with status 200). ``read`` pins the ETag of the first good reply, requests the rest with If-Match,
and checks length and SHA-256 against what the caller knows. Where the caller knows no SHA-256, the ETag or the
store's checksum must match the bytes; otherwise they are read twice. Uploads are boto3's, with its checksums.

This module retries requests itself, because botocore's first pause is as long as a hundred reads, botocore waits
30 s for a reply that does not come, and it accepts an empty or repeated page of a listing. A 403 without a
specific cause is retried a few times too: changed permissions take seconds to reach all of a store.

Every failure that a user can repair is a ``UserError`` of one sentence that names the URI; no message contains
a credential. This is the only module that imports boto3.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import functools
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import threading
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from stat import S_ISDIR, S_ISREG
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

import boto3
import botocore.config
import tenacity
from boto3.s3.transfer import TransferConfig
from botocore import exceptions as aws
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError as Urllib3Error

from logonet.core import config
from logonet.core.errors import UserError
from logonet.core.redaction import holds_credentials

T = TypeVar("T")
X = TypeVar("X")

S3 = "s3://"
TEMP_MARK = ".logonet-tmp-"  # unfinished local writes; listings skip them
PIECE_BYTES = 1 << 20
MULTIPART_BYTES = 64 << 20  # S3's own largest part count and smallest part size are s3transfer's business
PARTS_AT_ONCE = 4
READS_AT_ONCE = 8
CONNECT_TIMEOUT_S = 5
WRITE_TIMEOUT_S = 30
# For the next byte of a read. Reads change nothing, so the first timeouts are short; each retry waits longer. The
# first is at least SLOW times what nine of ten recent replies took, so that a slow store does not get twice the work.
READ_TIMEOUTS_S = (0.25, 0.5, 1.0, 2.0, 4.0, 30.0)
SLOW = 4
KNOWN_REPLIES = 4  # with fewer replies than this, reads start in the middle of READ_TIMEOUTS_S
WAIT = tenacity.wait_random_exponential(multiplier=0.1, max=8)  # between attempts
REQUEST_ATTEMPTS = 13  # about 25 s of pauses, enough for a store's restart
REQUEST_SECONDS = 240  # no further attempt after this long
REFUSED_ATTEMPTS = 5  # for a 403 without a specific cause
CONTACT_ATTEMPTS = 4  # for an endpoint that has not answered yet: a wrong address fails within seconds
BODY_ATTEMPTS = 8  # for faults that show after a reply's headers
POOL_CONNECTIONS = 32
PAGE_KEYS = 1000  # the most that a page of a listing, and a DeleteObjects request, can hold


class NotGiven(UserError):
    """The store does not return this one object; this says nothing about other objects or about its content."""


class IntegrityError(NotGiven):
    """Bytes other than the promised ones: wrong size, wrong SHA-256, replaced, torn."""


class Refused(NotGiven):
    """No permission for this object; the credentials themselves may be right."""


class _Replaced(IntegrityError):
    pass


@dataclass(frozen=True)
class Entry:
    """One stored object. ``version`` changes when it is replaced: the ETag on S3, mtime in ns locally."""

    uri: str
    size_bytes: int
    version: str


@dataclass(frozen=True)
class Stored:
    """What was written. Pass it back to ``read``, which then accepts nothing else."""

    size_bytes: int
    sha256: str


# ---------------------------------------------------------------------------------------------- names


def is_s3(uri: str) -> bool:
    return uri.startswith(S3)


def join(root: str, *parts: str) -> str:
    """``root/part/...`` with single slashes between; always below ``root``.

    Raises:
        UserError: for a part that contains ``..``, since names come from manifests and listings too.
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
        UserError: for a scheme other than s3:// and file://.
    """
    assert not is_s3(uri), f"{uri} is not local"
    if not uri.startswith("file://") and "://" in uri:
        raise UserError(f"{uri} is not a place logonet can use; give s3://bucket/key, file:///path or a path")
    path = uri.removeprefix("file://") if uri.startswith("file://") else os.path.expanduser(uri)
    with contextlib.suppress(UnicodeEncodeError):
        if b"\0" not in os.fsencode(path):
            return path
    raise UserError(f"{uri}: this is not a possible file name; correct it")


def _place(uri: str) -> dict[str, Any]:
    """The bucket and the key of an S3 URI, as boto3 names them."""
    bucket, _, key = uri.removeprefix(S3).partition("/")
    if "@" in uri and holds_credentials(uri):
        hint = f"leave them out and set {_KEYS} or AWS_PROFILE"
        raise UserError(f"{uri}: holds credentials, which would end up in logs; {hint}")
    if not bucket:
        raise UserError(f"{uri} names no bucket; write s3://bucket/key")
    try:
        key.encode()
    except UnicodeEncodeError:
        raise UserError(f"{uri}: this is not a possible object key; correct it") from None
    return {"Bucket": bucket, "Key": key}


# --------------------------------------------------------------------------------------------- client

_client_lock = threading.Lock()  # boto3 sessions are not thread-safe while they make a client


def _client(timeout_s: float = WRITE_TIMEOUT_S, attempts: int = 1) -> Any:
    """The process's S3 client for the current AWS_* variables: made on first use, never pickled or forked."""
    settings = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_")))
    with _client_lock:
        return _make_client(os.getpid(), settings, timeout_s, attempts)


@functools.lru_cache(maxsize=64)
def _make_client(pid: int, settings: tuple[tuple[str, str], ...], timeout_s: float, attempts: int) -> Any:
    options = botocore.config.Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=timeout_s,
        retries={"mode": "standard", "total_max_attempts": attempts},
        max_pool_connections=POOL_CONNECTIONS,
        user_agent_extra="logonet",
    )
    try:
        client = _session(pid, settings).client("s3", config=options)
    except aws.ProfileNotFound:
        raise UserError("AWS_PROFILE names a profile that does not exist; correct or unset it") from None
    except ValueError:
        raise UserError("AWS_ENDPOINT_URL_S3 is not an address; write it as http://host:port") from None
    for operation in ("PutObject", "UploadPart"):
        client.meta.events.register(f"before-call.s3.{operation}", _add_md5)
    return client


@functools.lru_cache(maxsize=8)
def _session(pid: int, settings: tuple[tuple[str, str], ...]) -> Any:
    return boto3.session.Session()


def _add_md5(params: dict[str, Any], **_: Any) -> None:
    """Beside boto3's own checksum, for stores that compare the MD5 alone."""
    body = params["body"]
    data = body if isinstance(body, bytes) else body.read()
    if data is not body:
        body.seek(0)
    params["headers"]["Content-MD5"] = base64.b64encode(_md5(data).digest()).decode()


def _md5(data: bytes = b"") -> Any:
    return hashlib.md5(data, usedforsecurity=False)


# ------------------------------------------------------------------------------------------- requests

_READING = {"get_object", "head_object", "head_bucket", "list_objects_v2"}
# Codes whose statuses mostly mean a mistake of the caller: the request arrived damaged or incomplete, or (of an
# upload) its last reply got lost and the repeated request finds the upload completed.
_TRANSIENT = {"BadDigest", "IncompleteBody", "InvalidDigest", "NoSuchUpload", "RequestTimeout"}
_TRANSIENT |= {"XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"}
# Of recent replies, by operation.
_latencies_s: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=64))
_reached: set[str] = set()  # endpoints that have answered


def _call(operation: str, *, timeouts: int = 0, **args: Any) -> Any:
    """One request of the S3 API (or an upload of many), retried while that may help; raises botocore's errors.

    ``timeouts`` counts how often the caller's earlier requests for the same bytes timed out.
    """
    refusals = 0
    uploads = operation == "upload_fileobj"

    def once() -> Any:
        nonlocal timeouts, refusals
        client = _client(_timeout_s(operation, timeouts), REQUEST_ATTEMPTS if uploads else 1)
        if uploads:
            args["Fileobj"].seek(0)
        began = time.monotonic()
        try:
            reply = getattr(client, operation)(**args)
        except aws.ReadTimeoutError:
            timeouts += 1
            raise
        except ClientError as err:
            refusals += _unexplained(err)
            raise
        _latencies_s[operation].append(time.monotonic() - began)
        _reached.add(client.meta.endpoint_url)
        return reply

    def enough(state: tenacity.RetryCallState) -> bool:
        err = state.outcome.exception() if state.outcome else None
        away = isinstance(err, aws.EndpointConnectionError | aws.ConnectTimeoutError)
        first_contact = away and _client().meta.endpoint_url not in _reached
        most = CONTACT_ATTEMPTS if first_contact else REQUEST_ATTEMPTS
        late = (state.seconds_since_start or 0) > REQUEST_SECONDS
        return state.attempt_number >= most or refusals >= REFUSED_ATTEMPTS or late

    retry = tenacity.retry_if_exception(_is_transient)
    return tenacity.Retrying(retry=retry, stop=enough, wait=WAIT, reraise=True)(once)


def _timeout_s(operation: str, timeouts: int) -> float:
    if operation not in _READING:
        return WRITE_TIMEOUT_S
    recent_s = sorted(_latencies_s[operation])
    level = len(READ_TIMEOUTS_S) // 2 - 1
    if len(recent_s) >= KNOWN_REPLIES:
        level = sum(timeout_s < SLOW * recent_s[len(recent_s) * 9 // 10] for timeout_s in READ_TIMEOUTS_S)
    return READ_TIMEOUTS_S[min(level + timeouts, len(READ_TIMEOUTS_S) - 1)]


def _is_transient(err: BaseException) -> bool:
    """Whether the same request may succeed when it is made again."""
    if isinstance(err, ClientError):
        status = _status(err)
        unwell = status in (408, 429) or (status >= 500 and status not in (501, 507))
        return unwell or _code(err) in _TRANSIENT or _unexplained(err)
    # A reply that is not XML was cut short or damaged in transit.
    return isinstance(err, aws.HTTPClientError | aws.ConnectionError | ResponseParserError)


def _unexplained(err: ClientError) -> bool:
    """A 403 with an unspecific cause: a policy or a role that is being changed, or a proxy."""
    return _status(err) == 403 and _code(err) not in _HINTS


def _status(err: ClientError) -> int:
    return int(err.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code(err: ClientError) -> str:
    return str(err.response.get("Error", {}).get("Code", "unknown"))


class _Retry(Exception):
    """This attempt is worth repeating; ``final`` is what to raise when it was the last."""

    def __init__(self, final: UserError) -> None:
        self.final = final


def _fault(uri: str, what: str) -> _Retry:
    return _Retry(IntegrityError(f"{uri}: {what}"))


def _until_good(attempt: Callable[[], T]) -> T:
    """The result of ``attempt``, repeated while it raises _Retry: for replies whose fault shows after their headers."""
    stop = tenacity.stop_after_attempt(BODY_ATTEMPTS)
    retry = tenacity.retry_if_exception_type(_Retry)
    try:
        return tenacity.Retrying(retry=retry, stop=stop, wait=WAIT, reraise=True)(attempt)
    except _Retry as last:
        raise last.final from last.__cause__


# --------------------------------------------------------------------------------------------- errors

_KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_HINTS = {  # S3 error code -> what a user reads after the URI
    "SignatureDoesNotMatch": f"the object store rejects the secret key; correct {_KEYS}",
    "InvalidAccessKeyId": f"the object store does not know the access key; correct {_KEYS}",
    "ExpiredToken": "the session token has run out; log in again",
    "InvalidToken": "the session token is not accepted; log in again or unset AWS_SESSION_TOKEN",
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it",
    "NoSuchBucket": "the bucket does not exist; create it or correct its name",
    "NoSuchKey": "no such object; correct the key or run the stage that writes it",
    "NoSuchUpload": "the upload was aborted by someone else; run the command again",
    "InvalidBucketName": "the bucket's name is not valid; use 3 to 63 lowercase letters, digits and hyphens",
    "PermanentRedirect": "the bucket is in another region; set AWS_DEFAULT_REGION",
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
def _user_errors(uri: str) -> Iterator[None]:
    """Turn the errors of libraries into one sentence about ``uri``."""
    try:
        yield
    # Several of botocore's errors are OSErrors too, so its own come first.
    except ClientError as err:
        raise _client_error(uri, err) from err
    except (BotoCoreError, ResponseParserError, Urllib3Error) as err:
        raise UserError(f"{uri}: {_transport(err)}") from err
    except OSError as err:
        unknown = f"{err.strerror or type(err).__name__}; check the disk and the path"
        kind = Refused if err.errno in (errno.EACCES, errno.EPERM) else UserError
        raise kind(f"{uri}: {_ERRNOS.get(err.errno or 0, unknown)}") from err


def _client_error(uri: str, err: ClientError) -> UserError:
    # Shows only the code: a store's message may repeat the access key or the string that was signed.
    code, status = _code(err), _status(err)
    if err.operation_name == "HeadBucket" and status == 404:  # HEAD has no body to name the code
        code = "NoSuchBucket"
    if hint := _HINTS.get("InsufficientStorage" if status == 507 else code):
        return UserError(f"{uri}: {hint}")
    if status == 403:
        return Refused(f"{uri}: access is refused ({code}); correct {_KEYS} or ask for rights on the bucket")
    if status == 412:
        return _Replaced(f"{uri} was replaced while it was read; run the command again")
    if status == 416:
        return IntegrityError(f"{uri}: the object is shorter than the requested range; write it again")
    if status >= 500 or status == 429 or code == "SlowDown":
        return UserError(f"{uri}: the object store kept failing ({code}); check its health, then run again")
    return UserError(f"{uri}: the object store refused the request ({code}, status {status}); check the URI")


def _transport(err: Exception) -> str:
    match err:
        case aws.NoCredentialsError() | aws.PartialCredentialsError():
            return f"no credentials for the object store; set {_KEYS}, AWS_PROFILE or an instance role"
        case aws.CredentialRetrievalError():
            return "the credentials could not be fetched; log in again"
        case aws.ParamValidationError():
            return "this is not a valid bucket and key; write s3://bucket/key"
        case aws.ConnectionError() | aws.ConnectionClosedError() | aws.ReadTimeoutError():
            parts = urlsplit(_client().meta.endpoint_url)
            named = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"  # without user:password@
            what = f"cannot reach the object store at {named} ({type(err).__name__})"
            return f"{what}; start it or correct AWS_ENDPOINT_URL_S3"
    return f"the transfer broke off ({type(err).__name__}); check the network, then run again"


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
        sha256: hex digest of exactly the requested bytes.
        start, length: the range in bytes; ``length=None`` means to the end.

    Raises:
        IntegrityError: wrong size or digest, an object replaced meanwhile, or a range that it lacks.
        UserError: missing, unreachable, refused.
    """
    assert start >= 0
    assert length is None or length >= 0
    sink = io.BytesIO()
    _Read(uri, sink, size_bytes, sha256, start, length).run()
    return sink.getvalue()


def read_to_file(uri: str, path: str, *, size_bytes: int | None = None, sha256: str | None = None) -> None:
    """Copy an object to a local file, which appears only once it is verified."""
    with _atomic(path) as out:
        _Read(uri, out, size_bytes, sha256).run()


def read_text(uri: str) -> str:
    """The object as UTF-8 text, without a byte order mark.

    Raises:
        UserError: when it is not UTF-8 text.
    """
    try:
        return read(uri).decode("utf-8-sig")  # spreadsheets write a byte order mark
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
    """``fn`` of each item, in order, in several threads: while one waits for the store, others work."""
    items = list(items)
    if len(items) < 2:
        return [fn(item) for item in items]
    with ThreadPoolExecutor(min(READS_AT_ONCE, len(items))) as pool:
        return list(pool.map(fn, items))


# Part sizes of the usual uploaders.
_PART_SIZES = [n << 20 for n in (5, 8, 10, 15, 16, 25, 32, 50, 64, 100, 128, 256, 512)]


_NOT_OURS = "the object store's reply is not this object; check it"
_TORN_PAGE = "a page of the object store's listing is torn or comes twice; check the store"
_WRONG_SHA256 = "its SHA-256 is not the recorded one; write it again"


@dataclass
class _Read:
    """One verified copy of the bytes ``[start, start + length)`` of ``uri`` into ``sink``.

    Of S3 it repeats what `_call` cannot, faults of the body, and continues from the byte it has reached.
    """

    uri: str
    sink: BinaryIO
    size_bytes: int | None
    sha256: str | None
    start: int = 0
    length: int | None = None
    # The object that the first good reply has pinned.
    etag: str | None = None
    total: int | None = None
    timeouts: int = 0
    replaced: IntegrityError | None = None
    digest: Any = None

    @property
    def partial(self) -> bool:
        return self.start > 0 or self.length is not None

    def run(self) -> None:
        self.restart()
        if not is_s3(self.uri):
            self.copy_local()
        elif self.length != 0:  # S3 has no empty ranges
            _until_good(self.attempt)

    def restart(self) -> None:
        self.sink.seek(0)
        self.sink.truncate()
        self.digest = hashlib.sha256() if self.sha256 else _md5()  # most ETags are an MD5

    def unpin(self) -> None:
        self.restart()
        self.etag, self.total = None, None

    def stop(self, total: int) -> int:
        """The byte to stop before, in an object of ``total`` bytes."""
        stop = total if self.length is None else self.start + self.length
        if self.size_bytes not in (None, total):
            wrong = f"instead of {self.size_bytes}"
        elif max(self.start, stop) > total:
            wrong = f"not the requested {self.start} to {stop}"
        else:
            return stop
        raise IntegrityError(f"{self.uri} holds {total} bytes, {wrong}; write it again")

    def copy_local(self) -> None:
        path = local_path(self.uri)
        with _user_errors(self.uri):
            mode = os.stat(path).st_mode
            if not S_ISREG(mode) and not S_ISDIR(mode):  # opening a named pipe may wait for ever
                raise UserError(f"{self.uri} is a pipe or a device; name a file")
            with open(path, "rb") as file:
                stop = self.stop(os.fstat(file.fileno()).st_size)
                file.seek(self.start)
                while piece := file.read(min(stop - file.tell(), PIECE_BYTES)):
                    self.sink.write(piece)
                    if self.sha256:
                        self.digest.update(piece)
                if file.tell() != stop:
                    raise IntegrityError(f"{self.uri} shrank while it was read; write it again")
        if self.sha256 and self.digest.hexdigest() != self.sha256:
            raise IntegrityError(f"{self.uri}: {_WRONG_SHA256}")

    def attempt(self) -> None:
        verified = self.fetch()
        found = self.digest.hexdigest()
        if self.sha256:
            if found != self.sha256:
                self.restart()
                raise self.replaced or _fault(self.uri, _WRONG_SHA256)
        elif not verified:
            if not self.partial and self.size_bytes is None:
                # Only HEAD can confirm the Content-Length of a whole object of unknown size.
                entry = stat(self.uri)
                if entry is None or entry.size_bytes != self.sink.tell():
                    self.unpin()
                    raise _fault(self.uri, _NOT_OURS)
            self.restart()
            if not self.fetch() and self.digest.hexdigest() != found:
                self.restart()
                raise _fault(self.uri, "the object store gives it differently each time; check it")

    def fetch(self) -> bool:
        """Read all missing bytes; whether the store's checksum or ETag confirms the whole object."""
        first = self.start + self.sink.tell()
        reply = self.request(first)
        try:
            with contextlib.closing(reply["Body"]) as body:
                stop = self.pin(reply, first)
                for piece in body.iter_chunks(PIECE_BYTES):
                    self.sink.write(piece)
                    self.digest.update(piece)
        except (BotoCoreError, Urllib3Error) as err:
            self.timeouts += isinstance(err, aws.ReadTimeoutError)
            if isinstance(err, aws.FlexibleChecksumError):  # damaged in transit, at an unknown place
                self.restart()
            raise _Retry(UserError(f"{self.uri}: {_transport(err)}")) from err
        reached = self.start + self.sink.tell()
        if reached != stop:
            if reached > stop:
                self.restart()
            raise _fault(self.uri, f"the object store sent {reached} of {stop} bytes; check it")
        if self.sha256 or self.partial:
            return False
        return (not first and "ChecksumAlgorithm" in reply["ResponseMetadata"]) or self.matches_etag()

    def request(self, first: int) -> Any:
        args: dict[str, Any] = _place(self.uri)
        if self.etag:
            args["IfMatch"] = self.etag
        if first or self.partial:
            last = self.start + self.length - 1 if self.length is not None else ""
            args["Range"] = f"bytes={first}-{last}"
        try:
            with _user_errors(self.uri):
                return _call("get_object", timeouts=self.timeouts, **args)
        except _Replaced as err:
            # Unless only the ETag of the first reply was wrong: the caller's size or digest shows that.
            if self.replaced is None and (self.size_bytes is not None or self.sha256):
                self.replaced = err
            self.unpin()
            raise _Retry(err) from None

    def pin(self, reply: dict[str, Any], first: int) -> int:
        """The byte to stop before, once the reply is known to be the pinned object from ``first`` on."""
        etag, total = reply.get("ETag"), reply["ContentLength"]
        ours = etag and self.etag in (None, etag)
        if first or self.partial:
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", reply.get("ContentRange", ""))
            ours = ours and span and int(span[1]) == first
            total = int(span[2]) if span else None
        if not ours or self.total not in (None, total):
            raise _fault(self.uri, _NOT_OURS)
        try:
            stop = self.stop(total)
        except IntegrityError as err:
            if self.size_bytes in (None, total):
                raise
            raise self.replaced or _Retry(err) from None
        self.etag, self.total = etag, total
        return stop

    def matches_etag(self) -> bool:
        """Whether the ETag is an MD5 of these bytes: of the whole, or of the digests of its parts."""
        etag = (self.etag or "").strip('"')
        if etag == self.digest.hexdigest():
            return True
        num_parts, total = etag.partition("-")[2], self.sink.tell()
        for part_bytes in _PART_SIZES:
            if num_parts == str(-(-total // part_bytes)):
                self.sink.seek(0)
                digests = (_md5(self.sink.read(part_bytes)).digest() for _ in range(int(num_parts)))
                if f"{_md5(b''.join(digests)).hexdigest()}-{num_parts}" == etag:
                    return True
        return False


# --------------------------------------------------------------------------------------------- writes


def write(uri: str, data: bytes | memoryview) -> Stored:
    """Store ``data`` so that readers see the old object or the new one, never a part.

    Raises:
        UserError: full or read-only disk, missing bucket, refused, unreachable.
    """
    return _write(io.BytesIO(data), uri)


def write_file(path: str, uri: str) -> Stored:
    """Store a local file under ``uri``, as ``write`` does, in bounded memory."""
    with _user_errors(path), open(path, "rb") as file:
        return _write(file, uri)


def write_json(uri: str, obj: Any) -> Stored:
    return write(uri, json_bytes(obj))


def json_bytes(obj: Any) -> bytes:
    """``obj`` as the text of a JSON file."""
    return (json.dumps(obj, indent=2) + "\n").encode()


def _write(file: BinaryIO, uri: str) -> Stored:
    digest = hashlib.file_digest(file, "sha256")  # type: ignore[arg-type]
    stored = Stored(file.seek(0, os.SEEK_END), digest.hexdigest())
    file.seek(0)
    if not is_s3(uri):
        with _atomic(local_path(uri)) as out:
            shutil.copyfileobj(file, out, PIECE_BYTES)
        return stored
    place = _place(uri)
    with _user_errors(uri):
        if stored.size_bytes < MULTIPART_BYTES:
            checksum = base64.b64encode(digest.digest()).decode()
            _call("put_object", **place, Body=file.read(), ChecksumSHA256=checksum)
        else:
            parts = TransferConfig(MULTIPART_BYTES, PARTS_AT_ONCE, MULTIPART_BYTES // 4)
            _call("upload_fileobj", **place, Fileobj=file, Config=parts)
    return stored


def create_bucket(uri: str) -> None:
    """Make the bucket (or local folder) that ``uri`` names, unless it exists and is ours."""
    with _user_errors(uri):
        if not is_s3(uri):
            os.makedirs(local_path(uri), exist_ok=True)
            return
        bucket = _place(uri)["Bucket"]
        region = _client().meta.region_name
        elsewhere = region not in ("us-east-1", "aws-global")  # the one region that may not be named
        args: Any = {"CreateBucketConfiguration": {"LocationConstraint": region}} if elsewhere else {}
        try:
            _call("create_bucket", Bucket=bucket, **args)
        except ClientError as err:
            if _code(err) != "BucketAlreadyOwnedByYou":
                raise


@contextlib.contextmanager
def _atomic(path: str) -> Iterator[BinaryIO]:
    """A file that takes the name ``path``, durably, when the block ends well, and vanishes otherwise."""
    folder = os.path.dirname(os.path.abspath(path))
    temp = os.path.join(folder, f"{TEMP_MARK}{uuid.uuid4().hex}")
    with _user_errors(path):
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
        UserError: when the bucket itself does not exist, or may not be read.
    """
    with _user_errors(uri):
        if is_s3(uri):
            place = _place(uri)
            try:
                head = _call("head_object", **place)
            except ClientError as err:
                if _status(err) != 404:
                    raise
                # A 404 of HEAD leaves open which of the two is missing.
                _call("head_bucket", Bucket=place["Bucket"])
                return None
            return Entry(uri, head["ContentLength"], head["ETag"].strip('"'))
        try:
            info = os.stat(local_path(uri))
        except OSError as err:
            if err.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            return None
    # Folders, pipes and devices do not count as objects.
    return Entry(uri, info.st_size, str(info.st_mtime_ns)) if S_ISREG(info.st_mode) else None


def exists(uri: str) -> bool:
    return stat(uri) is not None


def listing(prefix_uri: str) -> Iterator[Entry]:
    """Every object below the folder ``prefix_uri``, at any depth, in the byte order of the keys."""
    if not is_s3(prefix_uri):
        root = local_path(prefix_uri)
        with _user_errors(prefix_uri):
            names = [os.path.relpath(path, root) for path in _walk(root)]
        for name in sorted(names, key=os.fsencode):
            entry = stat(join(prefix_uri, name))
            if entry is not None:  # another process may have deleted it meanwhile
                yield entry
        return
    bucket = _place(prefix_uri)["Bucket"]
    for item in itertools.chain.from_iterable(_pages(prefix_uri)):
        if not item["Key"].endswith("/"):  # empty folder markers of other programs
            yield Entry(f"{S3}{bucket}/{item['Key']}", item["Size"], item["ETag"].strip('"'))


def _pages(prefix_uri: str) -> Iterator[list[dict[str, Any]]]:
    """The items below a prefix, page by page; a page that is torn or repeats the one before is requested again."""
    place = _place(prefix_uri)
    prefix = place["Key"].rstrip("/") + "/" if place["Key"].strip("/") else ""
    args: dict[str, Any] = {"Bucket": place["Bucket"], "Prefix": prefix, "MaxKeys": PAGE_KEYS}
    before: set[str] = set()

    def whole_page() -> dict[str, Any]:
        page: dict[str, Any] = _call("list_objects_v2", **args)
        items = page.get("Contents", [])
        keys = {item["Key"] for item in items}
        counted = page.get("KeyCount", len(items)) == len(items) == len(keys)
        ends = page.get("IsTruncated") is False or "NextContinuationToken" in page
        if not (counted and ends) or keys & before:
            raise _fault(prefix_uri, _TORN_PAGE)
        return page

    while True:
        with _user_errors(prefix_uri):
            page = _until_good(whole_page)
        items = page.get("Contents", [])
        yield items
        if not page["IsTruncated"]:
            return
        before = {item["Key"] for item in items}
        args["ContinuationToken"] = page["NextContinuationToken"]


def _walk(folder: str, above: frozenset[str] = frozenset()) -> Iterator[str]:
    """Paths of all finished files below a local folder."""
    real = os.path.realpath(folder)
    if real in above:  # a link back to a folder on the way here: following it would never end
        return
    # As on S3, a folder that does not exist is empty.
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if os.path.isdir(entry.path):  # entry.is_dir() raises for a link to itself
                yield from _walk(entry.path, above | {real})
            elif not entry.name.startswith(TEMP_MARK):
                yield entry.path


def delete(uri: str) -> None:
    """Delete one object; a missing one is no error."""
    with _user_errors(uri):
        if is_s3(uri):
            _call("delete_object", **_place(uri))
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(local_path(uri))


def delete_prefix(uri: str) -> None:
    """Delete everything below the folder ``uri``."""
    with _user_errors(uri):
        if not is_s3(uri):
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(local_path(uri))
            return
        for page in _pages(uri):
            if left := {item["Key"] for item in page}:
                _until_good(functools.partial(_delete_keys, _place(uri)["Bucket"], left))


def _delete_keys(bucket: str, left: set[str]) -> None:
    objects = {"Objects": [{"Key": key} for key in sorted(left)]}
    reply = _call("delete_objects", Bucket=bucket, Delete=objects)
    left.difference_update(item["Key"] for item in reply.get("Deleted", []))
    if left:  # the store refused each by itself, or the reply was torn
        key = min(left)
        why = {item.get("Key"): item.get("Code") for item in reply.get("Errors", [])}.get(key, "no answer")
        raise _Retry(UserError(f"{S3}{bucket}/{key} could not be deleted ({why}); check your rights on it"))
