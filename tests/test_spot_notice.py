"""The clouds' notices of spot machines, from metadata services made up after their documentation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from logonet.core.errors import UserError
from logonet.distributed import spot_notice
from tools.drill import AWS, aws_page, metadata

GCP = "/computeMetadata/v1/instance/preempted"


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
