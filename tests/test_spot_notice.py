"""The clouds' notices of spot machines, from metadata services made up after their documentation."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from logonet.core.errors import UserError
from logonet.distributed import spot_notice

AWS = "/latest/meta-data/spot/instance-action"
GCP = "/computeMetadata/v1/instance/preempted"


@contextlib.contextmanager
def metadata(pages: dict[str, str], cloud: str) -> Iterator[str]:
    """A service with ``pages``, which may change; what is asked without the cloud's own header is refused."""

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            asked = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
            self.answer("token" if cloud == "aws" and asked else None)

        def do_GET(self) -> None:
            own = {
                "aws": ("X-aws-ec2-metadata-token", "token"),
                "gcp": ("Metadata-Flavor", "Google"),
                "": ("Host", ""),
            }
            header, value = own[cloud]
            self.answer(pages.get(self.path) if self.headers[header] == value else None)

        def answer(self, text: str | None) -> None:
            self.send_response(404 if text is None else 200)
            self.end_headers()
            self.wfile.write((text or "").encode())

        def log_message(self, *args: Any) -> None:
            """Tests are quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def aws_page(unix_s: float) -> str:
    at = datetime.fromtimestamp(unix_s, UTC)
    return json.dumps({"action": "terminate", "time": f"{at:%Y-%m-%dT%H:%M:%SZ}"})


def test_aws_says_when_the_machine_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # of no use to a machine's own address
    pages: dict[str, str] = {}
    with metadata(pages, "aws") as base:
        deadline = spot_notice.cloud(base)
        assert deadline() is None
        pages[AWS] = aws_page(2_000_000_000)
        assert deadline() == 2_000_000_000


def test_gcp_gives_thirty_seconds() -> None:
    pages = {GCP: "FALSE"}
    with metadata(pages, "gcp") as base:
        deadline = spot_notice.cloud(base)
        assert deadline() is None
        pages[GCP] = "TRUE"
        assert deadline() == pytest.approx(time.time() + 30, abs=5)


def test_where_there_is_no_cloud_the_watch_ends_with_a_sentence() -> None:
    with metadata({}, "") as base, pytest.raises(UserError, match="neither AWS nor GCP answers"):
        spot_notice.cloud(base)
    with pytest.raises(UserError, match="neither AWS nor GCP answers"):
        spot_notice.cloud("http://127.0.0.1:9")


def test_a_notice_is_passed_on_until_the_cluster_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spot_notice, "ASK_EVERY_S", 0.0)
    answers: Iterator[Any] = iter([None, OSError("away"), None, 7.0, 8.0])
    told: list[float] = []

    def deadline() -> float | None:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    def drain(until_s: float) -> None:
        told.append(until_s)
        if len(told) == 1:
            raise ConnectionError("the head is busy")

    spot_notice.watch(deadline, drain)
    assert told == [7.0, 8.0]
