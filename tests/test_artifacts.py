"""Artifacts: found only when whole, never under another config, and never lost silently."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import pytest

import logonet
from logonet.core.errors import UserError
from logonet.storage import artifacts, object_store


@dataclass(frozen=True)
class CropConfig:
    size: tuple[int, int, int] = (8, 8, 8)
    spacing_mm: float = 1.5


@pytest.fixture(params=["path", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return request.getfixturevalue("bucket") if request.param == "s3" else str(tmp_path)


def make(root: str, cfg: object = CropConfig(), parents: dict[str, str] | None = None) -> artifacts.Artifact:
    parents = parents or {"scans": "ab12"}
    uri, fingerprint = artifacts.address(root, "crop", cfg, parents)
    files = {
        name: object_store.write(object_store.join(uri, name), name.encode() * 50)
        for name in ("a/0.bin", "b.bin")
    }
    return artifacts.commit(
        uri, "crop", fingerprint, config=cfg, parents=parents, files=files, facts={"crops": 2}
    )


def test_what_is_committed_is_found(root: str) -> None:
    made = make(root)
    assert artifacts.find(made.uri) == made
    assert made.uri == object_store.join(root, "crop", made.fingerprint)
    assert made.config == {"size": [8, 8, 8], "spacing_mm": 1.5}
    assert (made.parents, made.facts) == ({"scans": "ab12"}, {"crops": 2})
    assert made.logonet_version == logonet.__version__
    assert made.created_at.endswith("+00:00")
    assert made.read("a/0.bin") == b"a/0.bin" * 50
    assert artifacts.verify(made) == artifacts.verify(made, full=True) == []


def test_unfinished_means_absent(root: str) -> None:
    made = make(root)
    object_store.delete(object_store.join(made.uri, artifacts.MANIFEST))
    assert object_store.exists(made.uri_of("b.bin"))
    assert artifacts.find(made.uri) is None


@pytest.mark.parametrize(
    ("stage", "cfg", "parents"),
    [
        ("label", CropConfig(), {"scans": "ab12"}),
        ("crop", CropConfig(spacing_mm=2.0), {"scans": "ab12"}),
        ("crop", CropConfig(), {"scans": "ab13"}),
        ("crop", CropConfig(), {"crops": "ab12"}),
        ("crop", CropConfig(), {"scans": "ab12", "labels": ""}),
    ],
)
def test_another_input_has_another_address(stage: str, cfg: CropConfig, parents: dict[str, str]) -> None:
    usual = artifacts.address("s3://b/r", "crop", CropConfig(), {"scans": "ab12"})
    assert artifacts.address("s3://b/r", stage, cfg, parents)[1] != usual[1]


def test_an_address_depends_on_content_alone() -> None:
    parents = {"a": "1", "b": "2"}
    by_class = artifacts.address("/one", "crop", CropConfig(), parents)
    by_mapping = artifacts.address(
        "/two", "crop", {"spacing_mm": 1.5, "size": [8, 8, 8]}, dict(reversed(parents.items()))
    )
    assert by_class[1] == by_mapping[1]


def test_a_change_of_format_starts_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    old = {stage: artifacts.address("/r", stage, CropConfig(), {}) for stage in ("crop", "cut")}
    monkeypatch.setitem(artifacts.FORMATS, "crop", 2)
    assert artifacts.address("/r", "crop", CropConfig(), {}) != old["crop"]
    assert artifacts.address("/r", "cut", CropConfig(), {}) == old["cut"]
    monkeypatch.setattr(artifacts, "SCHEMA", artifacts.SCHEMA + 1)
    assert artifacts.address("/r", "cut", CropConfig(), {}) != old["cut"]


def _edit(raw: bytes, key: str, value: object) -> bytes:
    return json.dumps(json.loads(raw) | {key: value}).encode()


DAMAGES = {
    "cut short": lambda raw: raw[: len(raw) // 2],
    "empty": lambda raw: b"",
    "not text": lambda raw: b"\xff" + raw,
    "not a manifest": lambda raw: b'["a"]',
    "no checksum": lambda raw: b'{"schema": 1}',
    "edited fact": lambda raw: _edit(raw, "facts", {"crops": 3}),
    "edited checksum": lambda raw: _edit(raw, "checksum", "0" * 64),
    "key added": lambda raw: _edit(raw, "note", "harmless"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_counts_as_absent_and_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    made = make(str(tmp_path))
    uri = object_store.join(made.uri, artifacts.MANIFEST)
    bad = DAMAGES[damage](object_store.read(uri))
    object_store.write(uri, bad)
    with caplog.at_level(logging.WARNING, logger="logonet"):
        assert artifacts.find(made.uri) is None
    assert uri in caplog.text
    assert object_store.read(uri) == bad, "find must not touch the store"
    again = make(str(tmp_path))
    assert artifacts.find(made.uri) == again
    torn = [e.uri for e in object_store.listing(made.uri) if ".torn-" in e.uri]
    assert [object_store.read(u) for u in torn] == [bad]


def test_a_good_manifest_is_replaced_without_a_trace(tmp_path: Path) -> None:
    made, again = make(str(tmp_path)), make(str(tmp_path))
    assert artifacts.find(made.uri) == again
    assert len(list(object_store.listing(made.uri))) == 3


def test_a_manifest_promises_only_what_is_there(root: str) -> None:
    uri, fingerprint = artifacts.address(root, "crop", {}, {})
    there = object_store.write(object_store.join(uri, "there"), b"12345")
    cut = object_store.Stored(there.size_bytes + 1, there.sha256)
    for files in ({"there": there, "missing": there}, {"there": cut}):
        with pytest.raises(object_store.IntegrityError, match="cannot be finished"):
            artifacts.commit(uri, "crop", fingerprint, config={}, parents={}, files=files, facts={})
        assert artifacts.find(uri) is None


def test_verify_names_what_is_damaged(root: str) -> None:
    made = make(root)
    object_store.write(made.uri_of("b.bin"), b"B.BIN" * 50)
    assert artifacts.verify(made) == []
    assert artifacts.verify(made, full=True) == ["b.bin"]
    with pytest.raises(object_store.IntegrityError, match=r"b\.bin"):
        made.read("b.bin")
    object_store.write(made.uri_of("b.bin"), b"short")
    object_store.delete(made.uri_of("a/0.bin"))
    assert artifacts.verify(made) == artifacts.verify(made, full=True) == ["a/0.bin", "b.bin"]


def test_a_file_that_it_never_had_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'c\.bin'; did you mean 'b\.bin'"):
        make(str(tmp_path)).read("c.bin")


def test_a_store_that_cannot_be_read_is_not_absence(bucket: str) -> None:
    with pytest.raises(UserError, match="bucket does not exist"):
        artifacts.find(f"{bucket}-not/crop/0123")
