"""What a model tells of the scans it has seen: enough to find leaks, and nobody's name."""

from __future__ import annotations

import dataclasses
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from logonet.core import seeding
from logonet.core.errors import UserError
from logonet.data import leakage, manifest, phantom, provenance, scan_hash, volume
from logonet.data.manifest import Scan, Source
from logonet.data.volume import Volume

UID = "2.25.1234567890.12.345.6"


def row(folder: Path, scan: Volume, name: str, dataset: str = "Clinic", subject: str = "") -> Scan:
    """The manifest's row of ``scan``, written under a name that a hospital might give it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.nii.gz"
    path.write_bytes(volume.encode_nifti(scan.array_CXYZ[0], scan.affine))
    found = manifest.inspect(Source(uri=str(path), subject=subject or name, dataset=dataset))
    assert isinstance(found, Scan)
    return found


@pytest.fixture(scope="module")
def scans() -> list[Volume]:
    return [phantom.phantom(i, (40, 40, 40), (1.5, 1.5, 1.5), "MR")[0] for i in range(6)]


@pytest.fixture(scope="module")
def rows(scans: list[Volume], tmp_path_factory: pytest.TempPathFactory) -> list[Scan]:
    folder = tmp_path_factory.mktemp("Mueller_Anna")
    made = [row(folder, scan, f"Mueller_Anna_{i}") for i, scan in enumerate(scans)]
    return [*made[:-1], replace(made[-1], subject=UID)]


@pytest.fixture(scope="module")
def test_rows(
    scans: list[Volume], rows: list[Scan], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Scan]:
    """One test scan for each kind of leak with the scans that were seen, by that kind, and one that is new."""
    folder = tmp_path_factory.mktemp("test")
    turned = replace(
        scans[1],
        array_CXYZ=scans[1].array_CXYZ[:, ::-1],
        affine=scans[1].affine @ np.diag([-1.0, 1.0, 1.0, 1.0]),
    )
    noise = seeding.rng(0, "noise").standard_normal(scans[2].array_CXYZ.shape, dtype=np.float32)
    noisy = replace(scans[2], array_CXYZ=scans[2].array_CXYZ + 0.05 * scans[2].array_CXYZ.std() * noise)
    strangers = [phantom.phantom(100 + i, (40, 40, 40), (1.5, 1.5, 1.5), "MR")[0] for i in range(3)]
    return {
        "file": replace(row(folder, scans[0], "a", subject="another"), dataset="Elsewhere"),
        "voxels": row(folder, turned, "b", dataset="Elsewhere"),
        "fingerprint": row(folder, noisy, "c", dataset="Elsewhere"),
        "subject": row(folder, strangers[0], "d", subject="Mueller_Anna_3"),
        "subject by uid": row(folder, strangers[1], "e", subject=UID, dataset="Elsewhere"),
        "none": row(folder, strangers[2], "f", subject="Mueller_Anna_4", dataset="Elsewhere"),
    }


def test_no_name_can_be_found_in_the_table(rows: list[Scan]) -> None:
    """In its bytes, and in what they say when they are unpacked."""
    full = [
        replace(
            r,
            licence="CC-BY Mueller",
            files=(f"{r.uri}/1.dcm",),
            label_uri=f"{r.uri}.label",
            classes=("background", "Anna"),
        )
        for r in rows
    ]
    table = provenance.join(
        provenance.to_bytes(full[:3], "training"), provenance.to_bytes(full[3:], "pretraining")
    )
    frame = pd.read_parquet(io.BytesIO(table))
    unpacked = frame.to_csv(index=False) + repr(provenance.from_bytes(table))
    assert len(frame) == len(rows)
    names = [r.scan_id for r in rows] + [r.scan_id.rsplit("-", 1)[0] for r in rows] + [r.uri for r in rows]
    for name in [*names, "Mueller", "Anna", "Clinic", "nii", ".dcm", UID, UID[:12]]:
        assert name.encode() not in table, name
        assert name not in unpacked, name
    assert set(frame.columns) == {"scan_id", "sha256", "voxel_sha256", "thumbprint", "subject"}
    assert all(len(digest) == 64 for digest in frame["subject"])


def test_anonymous_scans_keep_their_own_ids_alone(rows: list[Scan]) -> None:
    for scan, hidden in zip(rows, provenance.anonymous(rows)):
        assert hidden.subject not in ("", scan.subject)
        for name in ("scan_id", "sha256", "voxel_sha256", "thumbprint"):
            assert getattr(hidden, name) == getattr(scan, name)
        assert {f.name for f in dataclasses.fields(hidden)} == {
            *("scan_id", "sha256", "voxel_sha256", "thumbprint", "subject")
        }


def test_leaks_are_found_as_between_plain_manifests(
    rows: list[Scan], test_rows: dict[str, Scan], scans: list[Volume]
) -> None:
    tests = list(test_rows.values())
    plain = {(k.scan_id, k.other_id): k.kind for k in leakage.find(tests, rows)}
    assert sorted(plain.values()) == ["file", "fingerprint", "subject", "subject", "voxels"]
    known = provenance.from_bytes(provenance.to_bytes(rows, "training"))
    name = {f"training-{r.sha256[:10]}": r.scan_id for r in rows}
    found = {(k.scan_id, name[k.other_id]): k.kind for k in leakage.find(provenance.anonymous(tests), known)}
    assert found == plain
    assert {test_rows[kind].scan_id for kind in test_rows if kind != "none"} == {pair[0] for pair in found}


def test_equal_subjects_have_equal_digests_within_a_dataset_or_if_unique_by_form(rows: list[Scan]) -> None:
    def digest(dataset: str, subject: str) -> str:
        return provenance.anonymous([replace(rows[0], dataset=dataset, subject=subject)])[0].subject

    assert digest("a", "case_001") == digest("a", "case_001")
    assert digest("a", "case_001") != digest("b", "case_001")
    assert digest("a", UID) == digest("b", UID)
    upper, lower = "123E4567-E89B-12D3-A456-426614174000", "123e4567-e89b-12d3-a456-426614174000"
    assert digest("a", upper) == digest("b", lower)
    assert digest("a", "") == ""
    # No two ways of writing one text: the pair is kept apart.
    assert digest("ab", "c") != digest("a", "bc")


def test_scans_without_a_subject_or_print_are_no_leak_of_each_other(rows: list[Scan]) -> None:
    blank = [
        replace(r, subject="", thumbprint="", voxel_sha256="", sha256=f"{i:064d}", scan_id=f"blank-{i}")
        for i, r in enumerate(rows)
    ]
    known = provenance.from_bytes(provenance.to_bytes(blank[:3], "training"))
    assert [(k.subject, k.thumbprint, k.voxel_sha256) for k in known] == [("", "", "")] * 3
    assert leakage.find(provenance.anonymous(blank[3:]), known) == []


def test_a_table_of_nothing_is_a_table() -> None:
    empty = provenance.to_bytes([], "training")
    assert provenance.from_bytes(empty) == []
    assert provenance.from_bytes(provenance.join(empty, empty)) == []


def test_joined_tables_hold_every_scan_once_in_its_first_role(rows: list[Scan]) -> None:
    training, validation = (
        provenance.to_bytes(rows[:2], "training"),
        provenance.to_bytes(rows[2:3], "validation"),
    )
    table = provenance.join(training, validation, provenance.to_bytes(rows, "pretraining"), training)
    roles = [scan.scan_id.split("-")[0] for scan in provenance.from_bytes(table)]
    # A validation case that pretraining has seen is no longer one that validated alone.
    assert roles == ["training", "training", *["pretraining"] * 4]
    assert [provenance.role(t) for t in provenance.from_bytes(provenance.join(training, validation))][2:] == [
        "validation"
    ]
    assert [s.sha256 for s in provenance.from_bytes(table)] == [r.sha256 for r in rows]
    assert provenance.join(table) == table
    assert provenance.from_bytes(
        provenance.join(provenance.to_bytes([], "x"), training)
    ) == provenance.from_bytes(training)


def test_a_scan_seen_in_every_role_does_not_hide_its_copy(
    scans: list[Volume], rows: list[Scan], tmp_path: Path
) -> None:
    """Three equal rows would be taken for a crowd, in which likeness says nothing."""
    copy = row(tmp_path, volume.resample(scans[0], (3.0, 3.0, 3.0)), "copy", dataset="Elsewhere")
    alike = np.dot(*scan_hash.unit_rows([copy.thumbprint, rows[0].thumbprint]))
    assert scan_hash.SAME <= alike < leakage.COPY
    roles = ("training", "validation", "pretraining")
    known = provenance.from_bytes(provenance.join(*(provenance.to_bytes(rows[:1], role) for role in roles)))
    assert [k.kind for k in leakage.find(provenance.anonymous([copy]), known)] == ["fingerprint"]


def test_another_table_is_refused_with_a_sentence(rows: list[Scan]) -> None:
    for frame in (
        pd.DataFrame({"scan_id": ["a"], "sha256": ["b"]}),
        pd.read_parquet(io.BytesIO(provenance.to_bytes(rows, "training"))).rename(
            columns={"subject": "patient"}
        ),
    ):
        sink = io.BytesIO()
        frame.to_parquet(sink, index=False)
        for read in (provenance.from_bytes, provenance.join):
            with pytest.raises(
                UserError, match=r"it must have scan_id, sha256.*another version of logonet"
            ) as err:
                read(sink.getvalue())
            assert str(list(frame.columns)[-1]) in str(err.value)
