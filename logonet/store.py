"""Object storage and local folders behind one URI: verified reads, atomic writes, listings.

A URI is ``s3://bucket/key``, ``file:///folder/name`` (taken literally, no percent-decoding) or a plain
local path. Credentials, region and endpoint come from the usual AWS chain; a self-hosted store is named
by ``AWS_ENDPOINT_URL_S3`` alone.

Why not s3fs, pyarrow or boto3's own download for the bytes we trust: under injected faults each of them
returned wrong bytes without an error (a short reply with a matching Content-Length, an object replaced
while it was read, an error page with status 200). ``read`` pins the ETag of the first good reply, asks
for the rest with If-Match, and checks length and SHA-256 against what the caller knows.

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
import urllib.request
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from stat import S_ISREG
from typing import Any, BinaryIO, NoReturn
from urllib.parse import urlsplit

import boto3
import botocore.config
import tenacity
from boto3.s3.transfer import TransferConfig
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    ConnectionError,
    CredentialRetrievalError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
)
from urllib3.exceptions import HTTPError as Urllib3Error

from logonet import config
from logonet.errors import UserError

S3 = "s3://"
TEMP_MARK = ".logonet-tmp-"  # unfinished local writes; listings skip them, abort_stale_uploads sweeps them
PIECE_BYTES = 1 << 20
MULTIPART_BYTES = 64 << 20
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 30
REQUEST_ATTEMPTS = (
    7  # botocore, for 5xx and lost connections: about 25 s of backoff, enough for a store's restart
)
BODY_ATTEMPTS = 5  # ours, for what botocore never retries: faults after the reply's headers
BODY_WAIT = tenacity.wait_random_exponential(multiplier=0.2, max=5)
CONTACT_ATTEMPTS = 3  # first contact with an endpoint: a wrong address should not cost 25 s of backoff
POOL_CONNECTIONS = 32
DELETE_BATCH = 1000  # the most keys one DeleteObjects takes


class IntegrityError(UserError):
    """Bytes that are not the ones the caller was promised: wrong size, wrong SHA-256, replaced, torn."""


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
    """``root/part/...`` with single slashes between."""
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


def _client() -> Any:
    """The process's S3 client for the current AWS_* variables: made on first use, never pickled or forked."""
    settings = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_")))
    with _client_lock:
        return _make_client(os.getpid(), settings)


@functools.lru_cache(maxsize=8)
def _make_client(pid: int, settings: tuple[tuple[str, str], ...]) -> Any:
    config = botocore.config.Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": REQUEST_ATTEMPTS},
        max_pool_connections=POOL_CONNECTIONS,
        user_agent_extra="logonet",
    )
    try:
        client = boto3.session.Session().client("s3", config=config)
    except ProfileNotFound:
        raise UserError("AWS_PROFILE names a profile that does not exist; correct or unset it") from None
    except ValueError:
        raise UserError("AWS_ENDPOINT_URL_S3 is not an address; write it as http://host:port") from None
    _contact(client.meta.endpoint_url)
    return client


def _contact(endpoint: str) -> None:
    """Fail in seconds, with a sentence, where nothing listens at ``endpoint``."""
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
    except (BotoCoreError, Urllib3Error) as err:
        raise UserError(f"{uri}: {_transport(err)}") from err
    except OSError as err:
        mend = _ERRNOS.get(
            err.errno or 0, f"{err.strerror or type(err).__name__}; check the disk and the path"
        )
        raise UserError(f"{uri}: {mend}") from err


def _client_error(uri: str, err: ClientError) -> UserError:
    # Only the code is shown: a store's message may repeat the access key or the string that was signed.
    code = str(err.response.get("Error", {}).get("Code", "unknown"))
    status = err.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code in _MENDS:
        return UserError(f"{uri}: {_MENDS[code]}")
    if status == 403:
        return UserError(
            f"{uri}: access is refused ({code}); correct {_KEYS} or ask for rights on the bucket"
        )
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
        _client().head_bucket(Bucket=_bucket_key(uri)[0])
    except ClientError as err:
        if _status(err) == 404:
            raise UserError(f"{uri}: {_MENDS['NoSuchBucket']}") from err
        raise


def _status(err: ClientError) -> int:
    return int(err.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


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


def _copy_out(
    uri: str, sink: BinaryIO, size_bytes: int | None, sha256: str | None, start: int, length: int | None
) -> None:
    assert start >= 0
    assert length is None or length >= 0
    source = _S3Read if is_s3(uri) else _LocalRead
    source(uri, sink, size_bytes, sha256, start, length).run()


class _Retry(Exception):
    """This attempt is worth repeating; ``final`` is what to raise when it was the last."""

    def __init__(self, final: UserError) -> None:
        self.final = final


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
        self.digest = hashlib.sha256()

    def put(self, piece: bytes) -> None:
        self.sink.write(piece)
        if self.sha256:
            self.digest.update(piece)

    def restart(self) -> None:
        self.sink.seek(0)
        self.sink.truncate()
        self.digest = hashlib.sha256()

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
    """Repeats what botocore does not: faults of the body. It goes on from the byte it has reached."""

    etag: str | None = None
    total: int | None = None

    def run(self) -> None:
        if self.length == 0:
            return  # S3 has no empty ranges
        self.total = self.size_bytes
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Retry),
            stop=tenacity.stop_after_attempt(BODY_ATTEMPTS),
            wait=BODY_WAIT,
            reraise=True,
        )
        try:
            retrying(self.attempt)
        except _Retry as last:
            raise last.final from last.__cause__

    def attempt(self) -> None:
        reply, stop = self.request()
        try:
            with contextlib.closing(reply["Body"]) as body:
                for piece in body.iter_chunks(PIECE_BYTES):
                    self.put(piece)
        except (BotoCoreError, Urllib3Error) as err:
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
        if self.sha256 and self.digest.hexdigest() != self.sha256:
            self.restart()
            raise _Retry(self.wrong_digest())

    def request(self) -> tuple[Any, int]:
        """A reply known to be the pinned object from the byte reached on, and the byte to stop before."""
        bucket, key = _bucket_key(self.uri)
        ranged = self.start > 0 or self.length is not None
        with _plainly(self.uri):
            if self.total is None and not ranged:
                # A whole object of unknown size has nothing else to check Content-Length against.
                self.pin_by_head(bucket, key)
            first = self.start + self.sink.tell()
            args: dict[str, str] = {"IfMatch": self.etag} if self.etag else {}
            if first or ranged:
                last = self.start + self.length - 1 if self.length is not None else ""
                args["Range"] = f"bytes={first}-{last}"
            try:
                reply = _client().get_object(Bucket=bucket, Key=key, **args)
            except ClientError as err:
                if _status(err) != 412:
                    raise
                self.replaced()
        try:
            return reply, self.check(reply, first, "Range" in args)
        except _Retry:
            reply["Body"].close()
            raise

    def pin_by_head(self, bucket: str, key: str) -> None:
        try:
            head = _client().head_object(Bucket=bucket, Key=key)
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
            raise _Retry(self.wrong_size(total) if self.size_bytes is not None else not_ours.final)
        stop = self.stop_for(total)
        self.etag, self.total = etag, total  # pinned: from now on only this version will do
        return stop

    def replaced(self) -> NoReturn:
        gone = IntegrityError(f"{self.uri} was replaced while it was read; run the command again")
        if self.size_bytes is not None or self.sha256:
            raise gone
        self.restart()  # nothing was promised about the content: read the new version whole
        self.etag, self.total = None, None
        raise _Retry(gone)


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
        _upload(uri, io.BytesIO(data))
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
            _upload(uri, file)
    return stored


def write_json(uri: str, obj: Any) -> Stored:
    return write(uri, (json.dumps(obj, indent=2) + "\n").encode())


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
            _client().create_bucket(Bucket=bucket, **args)
        except ClientError as err:
            if err.response["Error"].get("Code") != "BucketAlreadyOwnedByYou":
                raise


def _put(uri: str, data: bytes, stored: Stored) -> None:
    bucket, key = _bucket_key(uri)
    checksum = base64.b64encode(bytes.fromhex(stored.sha256)).decode()
    with _plainly(uri):
        _client().put_object(Bucket=bucket, Key=key, Body=data, ChecksumSHA256=checksum)


def _upload(uri: str, file: BinaryIO) -> None:
    bucket, key = _bucket_key(uri)
    transfer = TransferConfig(multipart_threshold=MULTIPART_BYTES, multipart_chunksize=MULTIPART_BYTES // 4)
    with _plainly(uri):
        _client().upload_fileobj(file, bucket, key, Config=transfer)


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
                head = _client().head_object(Bucket=bucket, Key=key)
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
    bucket, prefix = _folder(prefix_uri)
    with _plainly(prefix_uri):
        for page in _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for item in page.get("Contents", []):
                if not item["Key"].endswith("/"):  # pyarrow's empty folder markers
                    yield Entry(f"{S3}{bucket}/{item['Key']}", item["Size"], item["ETag"].strip('"'))


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

    with _plainly(prefix_uri):
        for folder, folders, files in os.walk(root, onerror=refuse, followlinks=True):
            folders[:] = [f for f in folders if not _leads_back(os.path.join(folder, f), root)]
            for name in files:
                yield os.path.relpath(os.path.join(folder, name), root)


def _leads_back(path: str, root: str) -> bool:
    """Whether ``path`` is a link to a folder that it was reached through, so that a walk would never end."""
    if not os.path.islink(path):
        return False
    target, above = os.path.realpath(path), path
    while len(above) > len(root):
        above = os.path.dirname(above)
        if os.path.realpath(above) == target:
            return True
    return False


def delete(uri: str) -> None:
    """Delete one object; one that is not there is no error."""
    with _plainly(uri):
        if is_s3(uri):
            bucket, key = _bucket_key(uri)
            _client().delete_object(Bucket=bucket, Key=key)
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
    bucket, prefix = _folder(uri)
    count = 0
    with _plainly(uri):
        pages = _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        for keys in _batches(item["Key"] for page in pages for item in page.get("Contents", [])):
            objects: Any = {"Objects": [{"Key": k} for k in keys], "Quiet": True}
            errors = _client().delete_objects(Bucket=bucket, Delete=objects).get("Errors", [])
            if errors:
                code = errors[0].get("Code", "unknown")
                key = errors[0].get("Key", prefix)
                raise UserError(f"{S3}{bucket}/{key} could not be deleted ({code}); check your rights on it")
            count += len(keys)
    return count


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
    with _plainly(prefix_uri):
        pages = _client().get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix)
        stale = [u for page in pages for u in page.get("Uploads", []) if u["Initiated"] < before]
        for upload in stale:
            _client().abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
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
    memory. Its constructor ignores the endpoint variables, and its default retry strategy gives up on
    the third 503, so both are set here.

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
