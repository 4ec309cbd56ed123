"""The table of scans: what is found where, what is quarantined and why, what its id depends on."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import hashlib
import io
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from logonet.core.errors import UserError
from logonet.data import importers, manifest, phantom, scan_hash, volume
from logonet.data.manifest import Manifest, Quarantined, Scan, Source
from logonet.data.volume import encode_nifti
from logonet.storage import object_store

SMALL = (16, 16, 16)
AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])


def scan_bytes(seed: int = 0) -> bytes:
    scan, _ = phantom.phantom(seed, SMALL)
    return encode_nifti(scan.array_CXYZ[0].astype(np.int16), scan.affine)


def put(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def read_all(uri: str) -> Manifest:
    return Manifest.of(map(manifest.inspect, importers.sources(uri)))


# -------------------------------------------------------------------------------------------- inspect


def test_a_row_says_what_is_in_the_scan(tmp_path: Path) -> None:
    uri = phantom.write_dataset(
        str(tmp_path), 2, size_vox=(16, 18, 20), spacing_mm=(2.0, 2.5, 3.0), classes=3
    )
    scan = read_all(uri).scans[1]
    data = (tmp_path / "imagesTr/phantom_001.nii.gz").read_bytes()
    voxels = nib.load(tmp_path / "imagesTr/phantom_001.nii.gz").get_fdata()
    assert len(scan.grid) == 16
    assert dataclasses.replace(scan, grid="") == Scan(
        scan_id=f"phantom_001-{hashlib.sha256(data).hexdigest()[:10]}",
        uri=f"{tmp_path}/imagesTr/phantom_001.nii.gz",
        files=(),
        sha256=hashlib.sha256(data).hexdigest(),
        voxel_sha256=scan_hash.voxel_sha256(manifest.load(scan)),
        thumbprint=scan_hash.perceptual_hash(manifest.load(scan)),
        size_bytes=len(data),
        subject="phantom_001",
        dataset="PhantomCT",
        licence="CC0-1.0",
        modality="CT",
        shape=(16, 18, 20),
        spacing_mm=(2.0, 2.5, 3.0),
        orientation="LPS",
        dtype="int16",
        intensity_min=voxels.min(),
        intensity_max=voxels.max(),
        split="train",
        fold=-1,
        label_uri=f"{tmp_path}/labelsTr/phantom_001.nii.gz",
        label_sha256=hashlib.sha256((tmp_path / "labelsTr/phantom_001.nii.gz").read_bytes()).hexdigest(),
        label_values=(0, 1, 2),
        classes=("background", "liver", "spleen"),
    )


def test_load_gives_back_the_voxels_or_stops(tmp_path: Path) -> None:
    scan = read_all(phantom.write_dataset(str(tmp_path), 1, size_vox=SMALL)).scans[0]
    image = manifest.load(scan)
    np.testing.assert_array_equal(image.array_CXYZ[0], nib.load(scan.uri).get_fdata())
    labels_XYZ = manifest.load_label(scan, image)
    np.testing.assert_array_equal(labels_XYZ, nib.load(scan.label_uri).get_fdata())
    assert labels_XYZ.dtype == np.uint8
    Path(scan.uri).write_bytes(scan_bytes(9))
    Path(scan.label_uri).write_bytes(scan_bytes(9))
    with pytest.raises(object_store.IntegrityError, match=r"imagesTr/phantom_000\.nii\.gz"):
        manifest.load(scan)
    with pytest.raises(object_store.IntegrityError, match=r"labelsTr/phantom_000\.nii\.gz"):
        manifest.load_label(scan, image)


def _bad_files() -> dict[str, tuple[bytes, str]]:
    good = scan_bytes()
    nan = np.ones((4, 4, 4), np.float32)
    nan[0, 0, 0] = np.nan
    raw = bytearray(gzip.decompress(good))
    header = nib.Nifti1Header(bytes(raw[:348]), check=False)
    header["dim"] = [3, 10000, 10000, 10000, 1, 1, 1, 1]
    raw[:348] = header.binaryblock
    return {
        "truncated": (good[: len(good) // 2], "truncated"),
        "torn header": (good[:40], "truncated"),
        "empty": (b"", "not gzip"),
        "html": (b"<html>403</html>", "not gzip"),
        "wrong_magic": (gzip.compress(bytes(1000)), "wrong magic"),
        "nan": (encode_nifti(nan, AFFINE), "not finite"),
        "flat": (encode_nifti(np.zeros((4, 4, 4), np.int16), AFFINE), "every voxel is 0"),
        "slice": (encode_nifti(np.arange(16, dtype=np.int16).reshape(4, 4, 1), AFFINE), "2D"),
        "series": (
            encode_nifti(np.arange(128, dtype=np.int16).reshape(4, 4, 4, 2), AFFINE),
            "has 2 channels, most",
        ),
        "huge": (gzip.compress(bytes(raw)), "10000x10000x10000"),
        "bomb": (gzip.compress(gzip.decompress(good)) + gzip.compress(bytes(2**24)) * 8, "far more bytes"),
    }


BAD_FILES = _bad_files()


def test_bad_scans_are_set_aside_with_their_names_and_never_stop_the_rest(tmp_path: Path) -> None:
    for name, (data, _) in BAD_FILES.items():
        (tmp_path / f"{name}.nii.gz").write_bytes(data)
    (tmp_path / "good.nii.gz").write_bytes(scan_bytes())
    put(tmp_path, "dicom/1.dcm", "dicom/2.dcm")
    table = read_all(str(tmp_path))
    assert [s.uri for s in table.scans] == [f"{tmp_path}/good.nii.gz"]
    reasons = {q.uri.removeprefix(f"{tmp_path}/"): q.reason for q in table.quarantined}
    assert sorted(reasons) == sorted([*(f"{n}.nii.gz" for n in BAD_FILES), "dicom"])
    for name, (_, reason) in BAD_FILES.items():
        assert reasons[f"{name}.nii.gz"].startswith(f"{tmp_path}/{name}.nii.gz: ")
        assert reason in reasons[f"{name}.nii.gz"]
    assert reasons["dicom"].startswith(f"{tmp_path}/dicom/1.dcm: ")


def _move(scan: volume.Volume, labels: np.ndarray) -> bytes:
    affine = scan.affine.copy()
    affine[0, 3] += 4
    return encode_nifti(labels, affine)


BAD_LABELS = {
    "another shape": (lambda scan, labels: encode_nifti(labels[:-1], scan.affine), "has shape (15, 16, 16)"),
    "another place": (_move, "4.0 mm off"),
    "mirrored": (lambda scan, labels: encode_nifti(labels, scan.affine @ np.diag([-1, 1, 1, 1])), "mm off"),
    "fractions": (lambda scan, labels: encode_nifti(labels.astype(np.float32) / 2, scan.affine), "also 0.5"),
    "too large": (
        lambda scan, labels: encode_nifti(labels.astype(np.int16) + 30000, scan.affine),
        "integers",
    ),
    "negative": (lambda scan, labels: encode_nifti(labels.astype(np.int16) - 1, scan.affine), "integers"),
    "torn": (lambda scan, labels: encode_nifti(labels, scan.affine)[:-9], "truncated"),
    "missing": (lambda scan, labels: None, "no such file"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_a_label_that_does_not_fit_its_image(tmp_path: Path, case: str) -> None:
    make, reason = BAD_LABELS[case]
    uri = phantom.write_dataset(str(tmp_path), 1, size_vox=SMALL)
    scan, labels_XYZ = phantom.phantom(4, SMALL)
    (tmp_path / "imagesTr/phantom_000.nii.gz").write_bytes(
        encode_nifti(scan.array_CXYZ[0].astype(np.int16), scan.affine)
    )
    label = tmp_path / "labelsTr/phantom_000.nii.gz"
    data = make(scan, labels_XYZ)
    label.unlink() if data is None else label.write_bytes(data)
    (bad,) = read_all(uri).quarantined
    assert bad.uri == f"{tmp_path}/imagesTr/phantom_000.nii.gz"
    assert bad.reason.startswith(f"{label}: ")
    assert reason in bad.reason


def test_an_empty_label_and_a_rounded_affine_are_fine(tmp_path: Path) -> None:
    scan, labels_XYZ = phantom.phantom(4, SMALL)
    uri = phantom.write_dataset(str(tmp_path), 1, size_vox=SMALL, orientations=["RAS"])
    affine = scan.affine + np.array([[0, 0, 0, 0.01]] * 3 + [[0] * 4])
    (tmp_path / "labelsTr/phantom_000.nii.gz").write_bytes(encode_nifti(labels_XYZ * 0, affine))
    assert read_all(uri).scans[0].label_values == (0,)


def test_a_missing_scan_is_set_aside(tmp_path: Path) -> None:
    uri = phantom.write_dataset(str(tmp_path), 2, size_vox=SMALL)
    gone = tmp_path / "imagesTr/phantom_000.nii.gz"
    gone.unlink()
    table = read_all(uri)
    assert len(table.scans) == 1
    assert table.quarantined == (
        Quarantined(str(gone), f"{gone}: no such file; copy it there or drop it from the list"),
    )


def test_an_unreachable_store_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setattr(object_store, "CONTACT_ATTEMPTS", 1)
    with pytest.raises(UserError, match="cannot reach the object store"):
        manifest.inspect(Source("s3://bucket/a.nii.gz"))


def test_a_scan_larger_than_can_be_decoded_is_not_even_read() -> None:
    bad = manifest.inspect(Source("s3://no-such-place/a.nii.gz", size_bytes=volume.MAX_BYTES + 1))
    assert isinstance(bad, Quarantined)
    assert bad.reason.startswith("s3://no-such-place/a.nii.gz: has 8.0 GiB")


# ------------------------------------------------------------------------------------------- manifest


def test_duplicates_are_kept_once_and_rather_with_their_label(tmp_path: Path) -> None:
    uri = phantom.write_dataset(str(tmp_path / "task"), 2, size_vox=SMALL)
    shutil.copy(tmp_path / "task/imagesTr/phantom_001.nii.gz", tmp_path / "a_copy.nii.gz")
    table = read_all(str(tmp_path))
    assert [s.subject for s in table.scans] == ["phantom_000", "phantom_001"]
    kept = f"{tmp_path}/task/imagesTr/phantom_001.nii.gz"
    assert table.quarantined == (
        Quarantined(
            f"{tmp_path}/a_copy.nii.gz", f"{tmp_path}/a_copy.nii.gz: duplicate of {kept} (same bytes)"
        ),
    )
    assert table.id == read_all(uri).id


def test_the_id_follows_content_not_place_or_order(tmp_path: Path) -> None:
    table = read_all(phantom.write_dataset(str(tmp_path / "a"), 3, size_vox=SMALL))
    assert read_all(phantom.write_dataset(str(tmp_path / "b" / "c"), 3, size_vox=SMALL)).id == table.id
    assert Manifest.of(reversed(table.scans)) == table
    assert read_all(phantom.write_dataset(str(tmp_path / "d"), 3, seed=1, size_vox=SMALL)).id != table.id
    for change in (
        {"sha256": "0"},
        {"subject": "x"},
        {"split": "test"},
        {"fold": 3},
        {"classes": ("background", "kidney")},
        {"label_sha256": "0"},
        {"modality": "MR"},
    ):
        scans = (dataclasses.replace(table.scans[0], **change), *table.scans[1:])
        assert Manifest(scans, ()).id != table.id
    moved = tuple(dataclasses.replace(s, uri="s3://x/" + s.uri, label_uri="s3://x") for s in table.scans)
    assert Manifest(moved, table.quarantined).id == table.id


def test_parquet_csv_and_tables(tmp_path: Path) -> None:
    phantom.write_dataset(str(tmp_path), 3, size_vox=SMALL)
    (tmp_path / "imagesTr/phantom_002.nii.gz").write_bytes(b"x")
    table = read_all(str(tmp_path))
    assert Manifest.from_parquet(table.scans_parquet(), table.quarantine_parquet()) == table
    frame = pd.read_parquet(io.BytesIO(table.scans_parquet()))
    assert list(frame.columns) == [f.name for f in dataclasses.fields(Scan)]
    rows = list(csv.reader(io.StringIO(table.quarantine_csv().decode())))
    assert rows == [["uri", "reason"], [table.quarantined[0].uri, table.quarantined[0].reason]]
    assert table.summary().startswith("2 scans, 2 CT, 2 labelled, 2 subjects, ")
    assert table.summary().endswith(", 1 quarantined")
    text = table.describe()
    assert "PhantomCT" in text
    assert "16x16x16" in text
    empty = Manifest((), ())
    assert Manifest.from_parquet(empty.scans_parquet(), empty.quarantine_parquet()) == empty


def test_scan_ids_may_stand_in_object_keys(tmp_path: Path) -> None:
    (tmp_path / "Müller scan #1 (a).nii.gz").write_bytes(scan_bytes())
    (scan,) = read_all(str(tmp_path)).scans
    assert scan.scan_id == f"M_ller_scan_1_a_-{scan.sha256[:10]}"


def test_a_bucket_and_a_folder_give_the_same_manifest(bucket: str, tmp_path: Path) -> None:
    here = read_all(phantom.write_dataset(str(tmp_path), 2, size_vox=SMALL))
    phantom.write_dataset(object_store.join(bucket, "deep/prefix"), 2, size_vox=SMALL)
    for uri in (bucket, f"{bucket}/deep", f"{bucket}/deep/prefix/", f"{bucket}/deep/prefix/dataset.json"):
        there = read_all(uri)
        assert there.id == here.id
        assert there.scans[0].uri == f"{bucket}/deep/prefix/imagesTr/phantom_000.nii.gz"
        np.testing.assert_array_equal(
            manifest.load(there.scans[0]).array_CXYZ, manifest.load(here.scans[0]).array_CXYZ
        )
    object_store.delete(there.scans[0].uri)
    (bad,) = read_all(f"{bucket}/deep/prefix/dataset.json").quarantined
    assert bad.reason == f"{there.scans[0].uri}: no such file; copy it there or drop it from the list"


# ----------------------------------------------------------------------------------------- real scans


def test_real_scans(shared_data: Path) -> None:
    table = read_all(str(shared_data / "scans"))
    assert not table.quarantined
    rows = {s.subject: (s.modality, s.orientation, s.shape, s.dtype) for s in table.scans}
    assert rows == {
        "ct_abdomen_3mm": ("CT", "RAS", (122, 101, 30), "int16"),
        "ct_dicom": ("CT", "LPS", (512, 512, 20), "uint16"),
        "ct_head_float64": ("MR", "RAS", (256, 242, 154), "uint8"),
        "ct_head_oblique": ("MR", "RAS", (175, 248, 58), "uint8"),
        "ct_trunk_3mm": ("CT", "RAS", (122, 101, 112), "int32"),
        "mr_abdomen_3mm": ("MR", "LPS", (117, 91, 20), "int16"),
    }
    labelled = {s.subject: s.label_uri for s in table.scans if s.label_uri}
    assert labelled == {"ct_abdomen_3mm": f"{shared_data}/scans/ct_abdomen_3mm_labels.nii.gz"}
    series = next(s for s in table.scans if s.files)
    assert manifest.load(series).shape_xyz == (512, 512, 20)


def test_real_decathlon_task(shared_data: Path) -> None:
    sources = importers.sources(str(shared_data / "Task04_Hippocampus" / "dataset.json"))
    assert len(sources) == 200
    table = Manifest.of(map(manifest.inspect, sources[:20]))
    assert not table.quarantined
    assert {(s.dataset, s.licence, s.modality, s.split) for s in table.scans} == {
        ("Hippocampus", "CC-BY-SA 4.0", "MR", "train")
    }
    assert {s.label_values for s in table.scans} == {(0, 1, 2)}
