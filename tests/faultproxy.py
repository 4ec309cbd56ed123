"""An HTTP/1.1 proxy that injects faults between an S3 client and a real store.

    with FaultProxy(server.endpoint) as proxy:
        proxy.add("close_body", method="GET", key="scan", at=1_000_000)
        ... a client whose endpoint is proxy.endpoint ...
        assert proxy.faults() == ["close_body"]

    with FaultProxy(server.endpoint, rate=0.05, seed=0) as proxy:
        ... one request in twenty meets a fault, whatever it is for ...

The Host header passes unchanged, so request signatures stay valid. Each rule acts on the first ``times``
requests whose method and target match. A rate draws, for every request that no rule met, whether it meets a fault
and which of those in KINDS that its sort of request can meet. The draw depends on the seed, the request, and how
often it came before, never on what other requests come meanwhile. Kinds:

    status        answer with ``status`` and an S3 error ``code``; the store is never asked
    refused       the same; a rate makes it 403 AccessDenied
    ok_error      the same body under status 200, as some stores and gateways do
    reset_before  TCP reset once the request is in
    lost_reply    the store does the work, the client gets a TCP reset
    close_body    orderly close after ``at`` bytes of the body, Content-Length unchanged
    reset_body    TCP reset after ``at`` bytes of the body
    short         only ``at`` bytes, and a Content-Length that agrees with them
    flip          the byte at ``at`` inverted
    header        the reply's header ``name`` says ``value``
    stall         nothing for ``seconds`` once the request is in, then all is well
    stall_body    the same after ``at`` bytes of the body
    cut_upload    TCP reset in the middle of the request's body
    flip_upload   a byte of the request's body inverted on its way to the store
    repeat_page   of a listing, the page before once more
    run           ``action()`` is called before byte ``at``, then close_body: what changes while we read
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from types import TracebackType
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import unescape

from logonet.core import seeding

Headers = dict[str, str]

PIECE_BYTES = 65536
ERROR_BODY = (
    '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>injected</Message></Error>'
)


@dataclass
class Rule:
    kind: str
    method: str | None = None
    key: str = ""
    times: int = 1
    at: int = 0
    share: float | None = None  # of the body, instead of ``at``
    seconds: float = 5.0
    status: int = 503
    code: str = "SlowDown"
    name: str = ""
    value: str = ""
    action: Callable[[], None] = lambda: None


@dataclass
class Request:
    """One request as it came in; ``fault`` names the rule that met it."""

    method: str
    target: str
    headers: Headers
    fault: str | None = None
    sort: str = ""


# What a rate may do to each sort of request, all alike likely.
_ANY = [
    Rule("status"),
    Rule("refused", status=403, code="AccessDenied"),
    Rule("reset_before"),
    Rule("lost_reply"),
    Rule("stall"),
]
_REPLY = [Rule(kind, share=0.0) for kind in ("close_body", "reset_body", "short", "flip", "stall_body")]
_SENT = [Rule("cut_upload"), Rule("flip_upload")]
KINDS: dict[str, list[Rule]] = {
    "get": [*_ANY, *_REPLY, Rule("ok_error"), Rule("header", name="ETag", value='"damaged"')],
    "head": _ANY,
    "list": [*_ANY, *_REPLY, Rule("ok_error"), Rule("repeat_page")],
    "put": [*_ANY, *_SENT, Rule("ok_error")],
    "part": [*_ANY, *_SENT, Rule("ok_error")],
    "create": [*_ANY, Rule("ok_error")],
    "complete": [*_ANY, Rule("ok_error")],
    "abort": _ANY,
    "delete": _ANY,
    "delete many": [*_ANY, *_SENT, Rule("ok_error")],
}


def sort_of(method: str, target: str) -> str:
    """Which of KINDS a request is; "" for the rest, such as making a bucket."""
    parts = urlsplit(target)
    query = parse_qs(parts.query, keep_blank_values=True)
    if "/" not in parts.path.strip("/") and not query:
        return "head" if method == "HEAD" else ""
    if "uploadId" in query:
        return {"PUT": "part", "POST": "complete", "DELETE": "abort"}.get(method, "")
    if method == "GET":
        return "list" if "list-type" in query or "uploads" in query else "get"
    if method == "POST":
        return "create" if "uploads" in query else "delete many" if "delete" in query else ""
    return {"HEAD": "head", "PUT": "put", "DELETE": "delete"}.get(method, "")


@dataclass
class _Head:
    raw: bytes
    first: list[str]
    headers: Headers

    def set(self, name: str, value: str) -> None:
        """Change a header that is there, in what goes on to the client."""
        assert name.lower() in self.headers, name
        start, line = f"{name.lower()}:".encode(), f"{name}: {value}".encode()
        lines = self.raw.split(b"\r\n")
        self.raw = b"\r\n".join(line if ln.lower().startswith(start) else ln for ln in lines)


class FaultProxy:
    def __init__(
        self,
        upstream: str,
        *,
        rate: float = 0.0,
        seed: int = 0,
        stall_s: float = 5.0,
    ) -> None:
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname, parts.port)
        self._rules: list[Rule] = []
        self._ready = threading.Event()
        self.requests: list[Request] = []
        self.rate, self.seed, self.stall_s = rate, seed, stall_s
        self._seen: Counter[tuple[str, str, str]] = Counter()
        self._pages: dict[str, bytes] = {}  # of listings, by the token that each ends with

    def reset(self) -> None:
        """As new, for another test."""
        for state in (self._rules, self.requests, self._seen, self._pages):
            state.clear()
        self.rate = self.seed = 0

    def add(self, kind: str, **options: object) -> None:
        assert kind in _REQUEST_FAULTS + _BODY_FAULTS, kind
        self._rules.append(Rule(kind, **options))  # type: ignore[arg-type]

    def faults(self) -> list[str]:
        return [r.fault for r in self.requests if r.fault]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    # ------------------------------------------------------------------ lifecycle, in a thread of its own

    def __enter__(self) -> FaultProxy:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._ready.wait(10), "the proxy did not start"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _serve(self) -> None:
        self._stop, self._loop = asyncio.Event(), asyncio.get_running_loop()
        server = await asyncio.start_server(self._client, "127.0.0.1", 0, limit=1 << 20)
        self._port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()

    # ------------------------------------------------------------------------------------ one connection

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._exchange(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # either side went away, which is what this proxy is for, or the test is over
        finally:
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Serve one request; False ends the connection."""
        head = await _read_head(reader)
        method, target, _ = head.first
        rule = self._pick(method, target) or self._draw(method, target, head.headers.get("range", ""))
        fault = rule.kind if rule else None
        self.requests.append(Request(method, target, head.headers, fault, sort_of(method, target)))
        if head.headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            lines = head.raw.split(b"\r\n")
            head.raw = b"\r\n".join(ln for ln in lines if not ln.lower().startswith(b"expect:"))
        if rule and rule.kind == "reset_before":
            return _reset(writer)
        if rule and rule.kind in ("status", "refused", "ok_error"):
            async for _ in _body(reader, head.headers):
                pass
            await _refuse(writer, rule, method)
            return True
        if rule and rule.kind == "repeat_page":
            writer.write(self._pages[_token(target)])
            await writer.drain()
            return True
        up_reader, up_writer = await asyncio.open_connection(*self._upstream)
        try:
            up_writer.write(head.raw)
            async for piece in _body(reader, head.headers):
                if rule and rule.kind == "cut_upload":
                    return _reset(writer)
                if rule and rule.kind == "flip_upload" and len(piece) > 2:
                    middle = len(piece) // 2
                    piece = piece[:middle] + bytes([piece[middle] ^ 0xFF]) + piece[middle + 1 :]
                    rule = None
                up_writer.write(piece)
                await up_writer.drain()
            if rule and rule.kind == "stall":
                await asyncio.sleep(rule.seconds)
            return await self._reply(rule, method, target, up_reader, writer)
        finally:
            up_writer.close()

    async def _reply(
        self,
        rule: Rule | None,
        method: str,
        target: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        head = await _read_head(reader)
        while head.first[1] == "100":
            head = await _read_head(reader)
        empty = method == "HEAD" or head.first[1] in ("204", "304")
        if rule and rule.kind == "lost_reply":
            async for _ in _body(reader, head.headers, empty):
                pass
            return _reset(writer)
        if rule and rule.share is not None:
            rule = replace(rule, at=int(rule.share * int(head.headers.get("content-length", 0))))
        if rule and rule.kind == "short" and "content-length" in head.headers:
            head.set("Content-Length", str(rule.at))
        if rule and rule.kind == "header" and rule.name.lower() in head.headers:
            head.set(rule.name, rule.value)
        writer.write(head.raw)
        page = head.raw
        position = 0
        async for piece in _body(reader, head.headers, empty):
            if rule and position <= rule.at < position + len(piece):
                cut = rule.at - position
                if rule.kind == "flip":
                    piece = piece[:cut] + bytes([piece[cut] ^ 0xFF]) + piece[cut + 1 :]
                elif rule.kind == "stall_body":
                    writer.write(piece[:cut])
                    await writer.drain()
                    await asyncio.sleep(rule.seconds)
                    writer.write(piece[cut:])
                    position += len(piece)
                    continue
                elif rule.kind in _BODY_FAULTS:
                    writer.write(piece[:cut])
                    await writer.drain()
                    return await self._break_off(rule, writer)
            writer.write(piece)
            await writer.drain()
            position += len(piece)
            if rule is None and sort_of(method, target) == "list":
                page += piece
        if token := re.search(rb"<NextContinuationToken>(.+?)</", page):
            self._pages[unescape(token[1].decode())] = page
        return True

    async def _break_off(self, rule: Rule, writer: asyncio.StreamWriter) -> bool:
        if rule.kind == "run":
            await asyncio.to_thread(rule.action)
        if rule.kind == "reset_body":
            await asyncio.sleep(0.1)  # a reset discards what is still queued; let the first bytes arrive
            return _reset(writer)
        return rule.kind == "short"

    def _pick(self, method: str, target: str) -> Rule | None:
        for rule in self._rules:
            if rule.times and rule.method in (None, method) and rule.key in target:
                rule.times -= 1
                return rule
        return None

    def _draw(self, method: str, target: str, span: str) -> Rule | None:
        kinds = KINDS.get(sort_of(method, target))
        if not self.rate or not kinds:
            return None
        # Buckets and uploads have another name in each run.
        name = re.sub(r"uploadId=[^&]*", "uploadId", re.sub(r"^/[^/?]*", "", target))
        self._seen[method, name, span] += 1
        rng = seeding.rng(self.seed, "fault", method, name, span, self._seen[method, name, span])
        if rng.random() >= self.rate:
            return None
        rule = kinds[int(rng.integers(len(kinds)))]
        if rule.kind == "repeat_page" and _token(target) not in self._pages:
            rule = kinds[0]  # a first page has none before it
        share = None if rule.share is None else float(rng.random())
        return replace(rule, share=share, seconds=self.stall_s)


def _token(target: str) -> str:
    """Where in a listing a request goes on; "" where it starts."""
    return parse_qs(urlsplit(target).query).get("continuation-token", [""])[0]


_REQUEST_FAULTS = ("status", "refused", "ok_error", "reset_before", "lost_reply", "header", "stall")
_REQUEST_FAULTS += ("cut_upload", "flip_upload", "repeat_page")
_BODY_FAULTS = ("close_body", "reset_body", "short", "flip", "stall_body", "run")


def _reset(writer: asyncio.StreamWriter) -> bool:
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):  # the client may have gone first
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    return False


async def _refuse(writer: asyncio.StreamWriter, rule: Rule, method: str) -> None:
    body = ERROR_BODY.format(code=rule.code).encode()
    status = 200 if rule.kind == "ok_error" else rule.status
    head = (
        f"HTTP/1.1 {status} Injected\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + (b"" if method == "HEAD" else body))
    await writer.drain()


async def _read_head(reader: asyncio.StreamReader) -> _Head:
    raw = await reader.readuntil(b"\r\n\r\n")
    first, *lines = raw.decode("latin1").split("\r\n")
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return _Head(raw, first.split(" ", 2), {k.lower(): v.strip() for k, v in pairs})


async def _body(reader: asyncio.StreamReader, headers: Headers, empty: bool = False) -> AsyncIterator[bytes]:
    """The raw pieces of a body, chunk framing kept."""
    if empty:
        return
    if "chunked" in headers.get("transfer-encoding", ""):
        size = -1
        while size:
            line = await reader.readline()
            size = int(line.split(b";")[0], 16)
            yield line + await reader.readexactly(size)
            if size:
                yield await reader.readexactly(2)
        while (line := await reader.readline()) not in (b"\r\n", b""):
            yield line  # trailers, such as a checksum
        yield b"\r\n"
        return
    left = int(headers.get("content-length", 0))
    while left:
        piece = await reader.read(min(PIECE_BYTES, left))
        if not piece:
            raise ConnectionError("the upstream body is short")
        left -= len(piece)
        yield piece
