"""Leaks between manifests: copies of phantoms under other names, in other forms."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logonet.core import config, seeding
from logonet.data import leakage, scan_hash, volume
from logonet.data.leakage import Leak, find
from logonet.data.manifest import Scan
from logonet.data.phantom import phantom
from logonet.data.volume import Volume

DATA = Path(__file__).parents[2] / "shared" / "data"
Change = Callable[[Volume], Volume]


def row(scan: Volume, name: str, **values: Any) -> Scan:
    """The manifest's row of a scan: one file per name."""
    sha256 = config.fingerprint(name) * 4
    fields: dict[str, Any] = {
        "scan_id": f"{name}-{sha256[:10]}",
        "uri": f"s3://scans/{name}.nii.gz",
        "files": (),
        "sha256": sha256,
        "voxel_sha256": scan_hash.voxel_sha256(scan),
        "thumbprint": scan_hash.perceptual_hash(scan),
        "size_bytes": 1,
        "subject": name,
        "dataset": "set",
        "licence": "",
        "modality": "CT",
        "shape": scan.shape_xyz,
        "spacing_mm": scan.spacing_mm,
        "orientation": scan.orientation,
        "dtype": "int16",
        "intensity_min": 0.0,
        "intensity_max": 1.0,
        "split": "train",
        "fold": -1,
        "label_uri": "",
        "label_sha256": "",
        "label_values": (),
        "classes": (),
    }
    return Scan(**{**fields, **values})


@pytest.fixture(scope="module")
def scans() -> list[Volume]:
    return [phantom(i, (64, 64, 64), (1.5, 1.5, 1.5), "MR")[0] for i in range(16)]


@pytest.fixture(scope="module")
def rows(scans: list[Volume]) -> list[Scan]:
    return [row(scan, f"case_{i:03d}") for i, scan in enumerate(scans)]


def reoriented(scan: Volume) -> Volume:
    """As written by a tool that stores LPS and another place and spacing."""
    affine = scan.affine @ np.diag([-3.0, -3.0, 1.0, 1.0])
    return replace(scan, array_CXYZ=scan.array_CXYZ[:, ::-1, ::-1], affine=affine)


def noisy(scan: Volume) -> Volume:
    noise = seeding.rng(0, "noise").standard_normal(scan.array_CXYZ.shape, dtype=np.float32)
    return replace(scan, array_CXYZ=scan.array_CXYZ + 0.05 * scan.array_CXYZ.std() * noise)


def rescaled(scan: Volume) -> Volume:
    return replace(scan, array_CXYZ=0.25 * scan.array_CXYZ - 7)


def coarser(scan: Volume) -> Volume:
    return volume.resample(scan, [1.5 * s for s in scan.spacing_mm])


CHANGES: list[tuple[Change, str]] = [
    (reoriented, "voxels"),
    (noisy, "fingerprint"),
    (rescaled, "fingerprint"),
    (coarser, "fingerprint"),
    (lambda scan: rescaled(reoriented(scan)), "fingerprint"),
]


@pytest.mark.parametrize(("change", "kind"), CHANGES)
@pytest.mark.parametrize("crowd", [16, 0])
def test_a_copy_is_found_alone_and_among_scans_like_it(
    scans: list[Volume], rows: list[Scan], change: Change, kind: str, crowd: int
) -> None:
    """Phantoms are as alike as scans can be, and still only the copy is reported."""
    test = [row(change(scans[5]), "external_test", dataset="other")]
    others = rows[:crowd] if crowd else [rows[5]]
    found = find(test, others)
    assert [(k.scan_id, k.other_id, k.kind) for k in found] == [(test[0].scan_id, rows[5].scan_id, kind)]


def test_phantoms_would_be_taken_for_each_other_by_likeness_alone(rows: list[Scan]) -> None:
    prints_NP = scan_hash.unit_rows([s.thumbprint for s in rows])
    similar = (prints_NP @ prints_NP.T)[np.triu_indices(len(rows), 1)]
    assert (similar > scan_hash.SAME).mean() > 0.5
    assert find(rows[:4], rows[4:]) == []


def test_copies_do_not_hide_each_other(scans: list[Volume], rows: list[Scan]) -> None:
    """A test scan with several copies in a collection of other scans is not taken for one of a crowd."""
    copies = [row(noisy(scans[0]), f"copy_{i}") for i in range(4)]
    found = find([rows[0]], [*copies, *rows[1:]])
    assert {k.other_id for k in found} == {c.scan_id for c in copies}


def test_the_strongest_kind_is_reported_once(rows: list[Scan]) -> None:
    scan, other = rows[0], rows[1]
    same_file = replace(scan, uri="s3://elsewhere/x.nii.gz")
    resaved = replace(scan, scan_id="resaved-1", sha256="1" * 64)
    relabelled = replace(scan, scan_id="print-1", sha256="2" * 64, voxel_sha256="2" * 64)
    follow_up = replace(other, subject=scan.subject, thumbprint="")
    found = find([scan], [follow_up, relabelled, resaved, same_file])
    assert [(k.other_id, k.kind) for k in found] == [
        (scan.scan_id, "file"),
        ("resaved-1", "voxels"),
        ("print-1", "fingerprint"),
        (other.scan_id, "subject"),
    ]


def test_a_row_of_another_manifest_leaks_but_a_manifest_is_no_leak_of_itself(rows: list[Scan]) -> None:
    leak = Leak(rows[2].scan_id, rows[2].scan_id, "file", f"same bytes, SHA-256 {rows[2].sha256[:10]}")
    assert find([rows[2]], rows) == [leak]
    assert find(rows, rows) == []
    twin = replace(rows[3], scan_id="twin-1", sha256="3" * 64)
    within = [*rows, twin]
    assert [(k.scan_id, k.other_id) for k in find(within, within[::-1])] == [(rows[3].scan_id, "twin-1")]


@pytest.mark.parametrize(
    ("a", "b", "leaks_"),
    [
        (("set", "case_001"), ("set", "case_001"), True),
        (("set", "case_001"), ("other", "case_001"), False),
        (("set", "sub-01"), ("other", "sub-01"), False),
        (("set", ""), ("set", ""), False),
        (("set", "2.25.1234567890.12.345.6"), ("other", "2.25.1234567890.12.345.6"), True),
        (("set", "1.2.3.4.5"), ("other", "1.2.3.4.5"), False),
        (
            ("set", "123E4567-e89b-12d3-a456-426614174000"),
            ("other", "123e4567-E89B-12d3-a456-426614174000"),
            True,
        ),
    ],
)
def test_subjects_count_within_a_dataset_or_if_unique_by_form(
    rows: list[Scan], a: tuple[str, str], b: tuple[str, str], leaks_: bool
) -> None:
    blank = replace(rows[0], thumbprint="", voxel_sha256="")
    first = replace(blank, dataset=a[0], subject=a[1])
    second = replace(blank, scan_id="x-1", sha256="1" * 64, dataset=b[0], subject=b[1])
    assert [k.kind for k in find([first], [second])] == ["subject"] * leaks_


def test_crowds_are_judged_as_by_the_definition(scans: list[Volume], rows: list[Scan]) -> None:
    """A slow loop over pairs, with the differences written out."""
    rows = [*rows, row(noisy(scans[3]), "copy")]
    rows_MP = scan_hash.unit_rows([s.thumbprint for s in rows]).astype(np.float64)
    block = [3, 0, 11]
    alike_NM = rows_MP[block] @ rows_MP.T
    alike_NM[np.arange(3), block] = 0
    got_NM = leakage._apart(rows_MP, block, alike_NM)
    verdicts = set()
    for n, i in enumerate(block):
        crowd = [m for m in range(len(rows)) if scan_hash.SAME <= alike_NM[n, m] < leakage.COPY]
        assert len(crowd) >= leakage.CROWD
        mean_P = rows_MP[crowd].mean(0)
        for m in range(len(rows)):
            if m != i:
                a_P, b_P = rows_MP[i] - mean_P, rows_MP[m] - mean_P
                want = a_P @ b_P / np.linalg.norm(a_P) / np.linalg.norm(b_P)
                assert got_NM[n, m] == (want >= scan_hash.SAME)
                verdicts.add(bool(got_NM[n, m]))
    assert verdicts == {True, False}


def test_blocks_give_what_pairs_give(rows: list[Scan], monkeypatch: pytest.MonkeyPatch) -> None:
    test = [replace(s, scan_id=f"again-{i}", sha256=f"{i:064d}") for i, s in enumerate(rows)]
    whole = find(test, rows)
    monkeypatch.setattr(leakage, "BLOCK", 3)
    assert find(test, rows) == whole
    assert [k.kind for k in whole] == ["voxels"] * len(rows)


def test_nothing_leaks_from_nothing(rows: list[Scan]) -> None:
    assert find([], rows) == find(rows, []) == []
    assert leakage.table([]) == "no leaks found\n"
    assert leakage.to_csv([]) == b"scan_id,other_id,kind,detail\n"


def test_table_and_csv_hold_every_leak(rows: list[Scan]) -> None:
    found = find(rows[:2], rows)
    text = leakage.table(found)
    assert all(k.scan_id in text and k.detail in text for k in found)
    table = list(csv.DictReader(io.StringIO(leakage.to_csv(found).decode())))
    assert [Leak(**line) for line in table] == found


def test_real_scans_are_told_apart_and_their_copies_found() -> None:
    files = sorted((DATA / "Task04_Hippocampus" / "imagesTr").glob("*.nii.gz"))
    if len(files) < 100:
        pytest.skip(f"no real scans below {DATA}")
    scans = [volume.decode_nifti(p.read_bytes(), p.name) for p in files]
    rows = [row(scan, p.name) for scan, p in zip(scans, files)]
    copies = [row(rescaled(coarser(scans[i])), f"copy_{i}", dataset="other") for i in range(0, len(rows), 9)]
    found = find(copies, rows)
    assert [k.other_id for k in sorted(found, key=lambda k: int(k.scan_id.split("-")[0][5:]))] == [
        rows[i].scan_id for i in range(0, len(rows), 9)
    ]
    assert {k.kind for k in found} == {"fingerprint"}
    assert find(rows, rows) == []
