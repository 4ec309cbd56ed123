"""DICOM series as volumes: geometry, intensities, and damage that is named."""

from __future__ import annotations

import io
import random
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from logonet.core.errors import BadScan
from logonet.data import volume
from logonet.data.volume import decode_dicom

AFFINE = np.array([[-1.5, 0.2, 0, 30], [0.1, 2.0, 0.3, -20], [0, -0.2, 3.0, 7], [0, 0, 0, 1]])


LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def dicom_series(
    shape_xyz: tuple[int, int, int] = (6, 5, 4), affine: np.ndarray = AFFINE, **tags: object
) -> tuple[list[tuple[str, bytes]], np.ndarray]:
    """A shuffled series whose voxel [column, row, slice] lies at ``affine``, and its HU voxels."""
    stored_XYZ = np.random.default_rng(1).integers(0, 4000, shape_xyz).astype(np.uint16)
    lps = LPS @ affine
    lengths_mm = np.linalg.norm(lps[:3, :3], axis=0)
    files = []
    for k in range(shape_xyz[2]):
        meta = pydicom.dataset.FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = f"1.2.3.{k + 1}"
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds = pydicom.Dataset()
        ds.file_meta = meta
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, f"1.2.3.{k + 1}"
        ds.PatientName, ds.PatientID = "Secret^Name", "secret-id"
        ds.Modality, ds.SeriesInstanceUID = "CT", "1.2.3"
        ds.Rows, ds.Columns = shape_xyz[1], shape_xyz[0]
        ds.PixelSpacing = [float(lengths_mm[1]), float(lengths_mm[0])]
        directions = lps[:3, :2] / lengths_mm[:2]
        ds.ImageOrientationPatient = [f"{v:.12f}"[:16] for v in directions.T.ravel()]
        ds.ImagePositionPatient = [f"{v:.12f}"[:16] for v in lps[:3, 3] + k * lps[:3, 2]]
        ds.SliceThickness = 99  # a liar, as in real series
        ds.RescaleSlope, ds.RescaleIntercept = 2, -1024 - k
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
        ds.PixelData = np.ascontiguousarray(stored_XYZ[:, :, k].T).tobytes()
        for name, value in tags.items():
            if callable(value):
                value(k, ds)
            else:
                setattr(ds, name, value)
        out = io.BytesIO()
        ds.save_as(out, enforce_file_format=True)
        files.append((f"series/{k}.dcm", out.getvalue()))
    random.Random(0).shuffle(files)
    hu_XYZ = stored_XYZ * 2.0 - 1024 - np.arange(shape_xyz[2])
    return files, hu_XYZ


AXIAL = np.array([[-0.7, 0, 0, 90], [0, -0.8, 0, 70], [0, 0, 2.5, -400], [0, 0, 0, 1]])
SAGITTAL = np.array([[0, 0, 2.5, 90], [-0.7, 0, 0, 70], [0, -0.8, 0, -400], [0, 0, 0, 1]])
TILT = np.deg2rad(20)
OBLIQUE = AXIAL @ np.array(
    [[1, 0, 0, 0], [0, np.cos(TILT), -np.sin(TILT), 0], [0, np.sin(TILT), np.cos(TILT), 0], [0, 0, 0, 1]]
)
OBLIQUE[:3, :3] = np.linalg.qr(OBLIQUE[:3, :3])[0] @ np.diag([0.7, 0.8, 2.5])
DOWNWARD = AXIAL @ np.diag([1.0, 1.0, -1.0, 1.0])
GANTRY = AXIAL + np.array([[0] * 4, [0, 0, 0.9, 0], [0] * 4, [0] * 4])  # sheared: slices shift as they rise


@pytest.mark.parametrize(
    "affine",
    [AXIAL, SAGITTAL, OBLIQUE, GANTRY, DOWNWARD],
    ids=["axial", "sagittal", "oblique", "gantry", "downward"],
)
def test_dicom_geometry(affine: np.ndarray) -> None:
    files, hu_XYZ = dicom_series(affine=affine)
    got = decode_dicom(files)
    # the stack is sorted along the slice normal, which may turn it around
    want = affine.copy()
    if np.linalg.det(affine[:3, :3]) < 0:
        hu_XYZ = hu_XYZ[:, :, ::-1]
        want[:3, 3] += (hu_XYZ.shape[2] - 1) * affine[:3, 2]
        want[:3, 2] *= -1
    np.testing.assert_array_equal(got.array_CXYZ[0], hu_XYZ.astype(np.float32))
    np.testing.assert_allclose(got.affine, want, atol=1e-5)
    assert got.modality == "CT"
    assert "ecret" not in repr(got)


def _drop(tag: str):
    return lambda k, ds: delattr(ds, tag) if k == 2 else None


def _set(tag: str, value: object):
    return lambda k, ds: setattr(ds, tag, value) if k == 2 else None


BAD_SERIES = {
    "multi-frame": ({"x": _set("NumberOfFrames", 3)}, "multi-frame"),
    "inverted": ({"x": _set("PhotometricInterpretation", "MONOCHROME1")}, "MONOCHROME1"),
    "no position": ({"x": _drop("ImagePositionPatient")}, "without ImagePositionPatient"),
    "no orientation": ({"x": _drop("ImageOrientationPatient")}, "without ImageOrientationPatient"),
    "no rows": ({"x": _drop("Rows")}, "without Rows"),
    "no series": ({"x": _drop("SeriesInstanceUID")}, "without SeriesInstanceUID"),
    "short position": ({"x": _set("ImagePositionPatient", [1, 2])}, "unreadable"),
    "no pixels": ({"x": _drop("PixelData")}, "cannot be decoded"),
    "torn pixels": ({"x": _set("PixelData", b"\0" * 10)}, "cannot be decoded"),
    "zero spacing": ({"PixelSpacing": [0, 0]}, "singular"),
    "same place": ({"ImagePositionPatient": [0, 0, 0]}, "same place"),
}


@pytest.mark.parametrize("case", BAD_SERIES)
def test_bad_series_says_why(case: str) -> None:
    tags, reason = BAD_SERIES[case]
    files, _ = dicom_series(affine=AXIAL, **tags)
    with pytest.raises(BadScan, match=r"^series/\d\.dcm: ") as refusal:
        decode_dicom(files)
    assert reason in str(refusal.value)
    assert "ecret" not in str(refusal.value)


def test_missing_and_repeated_slices() -> None:
    files, _ = dicom_series((4, 4, 6), AXIAL)
    files.sort()
    with pytest.raises(
        BadScan, match=r"series/2\.dcm: .* 5\.00 mm away, others 2\.50 mm; a slice is missing"
    ):
        decode_dicom(files[:3] + files[4:])
    whole, twice = decode_dicom(files), decode_dicom([*files, ("copy.dcm", files[2][1])])
    np.testing.assert_array_equal(twice.array_CXYZ, whole.array_CXYZ)
    assert (whole.note, twice.note) == ("", "left out: 1 exact duplicates")
    with pytest.raises(BadScan, match="one slice"):
        decode_dicom(files[:1])
    with pytest.raises(BadScan, match=r"series/0\.dcm: its series claims"):
        decode_dicom(files, max_bytes=100)


@pytest.mark.parametrize(
    "tags",
    [
        {"SeriesInstanceUID": "9.9", "PhotometricInterpretation": "RGB"},
        {"SeriesInstanceUID": "9.9", "NumberOfFrames": 3},
        {"SeriesInstanceUID": "9.9", "x": lambda k, ds: delattr(ds, "ImagePositionPatient")},
    ],
    ids=["a screenshot", "a multi-frame file", "a dose report"],
)
def test_other_files_of_a_study_do_not_spoil_its_scan(tags: dict[str, object]) -> None:
    files, hu_XYZ = dicom_series(affine=AXIAL)
    others, _ = dicom_series(affine=AXIAL, **tags)
    got = decode_dicom([*files, ("other/1.dcm", others[0][1])])
    np.testing.assert_array_equal(got.array_CXYZ[0], hu_XYZ.astype(np.float32))
    assert got.note == "left out: 1 files of another series that are no slices"
    with pytest.raises(BadScan):
        decode_dicom([("other/1.dcm", others[0][1])])


def test_directions_that_differ_by_rounding_are_one_series() -> None:
    def jitter(k: int, ds: pydicom.Dataset) -> None:
        turn = 0.00499 if k % 3 else 0.00501
        ds.ImageOrientationPatient = [np.cos(turn), np.sin(turn), 0, -np.sin(turn), np.cos(turn), 0]

    got = decode_dicom(dicom_series((6, 5, 9), AXIAL, x=jitter)[0])
    assert got.shape_xyz == (6, 5, 9)
    assert got.note == ""


OTHER_SLICES = {
    "another series": {"SeriesInstanceUID": "9.9"},
    "another modality": {"Modality": "MR"},
    "another size": {"Rows": 4, "PixelData": bytes(2 * 4 * 6)},
    "another spacing": {"PixelSpacing": [0.5, 0.5]},
    "a localizer": {"ImageOrientationPatient": [1, 0, 0, 0, 0, 1]},
    "a structure set": {"Modality": "RTSTRUCT"},
}


@pytest.mark.parametrize("tags", OTHER_SLICES.values(), ids=OTHER_SLICES)
def test_the_largest_series_of_a_folder_is_taken_and_the_rest_is_told(tags: dict[str, object]) -> None:
    files, hu_XYZ = dicom_series(affine=AXIAL)
    others, _ = dicom_series(affine=AXIAL, **tags)
    got = decode_dicom([*files, (f"other/{others[0][0]}", others[0][1]), ("notes", b"not DICOM")])
    np.testing.assert_array_equal(got.array_CXYZ[0], hu_XYZ.astype(np.float32))
    assert got.note.startswith("left out: 1 ")
    assert "1 files that are not DICOM" in got.note
    # A slice that is of another series is missing here.
    with pytest.raises(BadScan, match="a slice is missing"):
        decode_dicom([f for f in files if "2.dcm" not in f[0]] + others[:1])


def test_rounded_positions_are_no_missing_slice() -> None:
    files, hu_XYZ = dicom_series(
        (6, 5, 24),
        np.diag([-0.7, -0.8, 0.625, 1.0]),
        x=lambda k, ds: setattr(ds, "ImagePositionPatient", [0, 0, round(0.625 * k, 1)]),
    )
    got = decode_dicom(files)
    np.testing.assert_array_equal(got.array_CXYZ[0], hu_XYZ.astype(np.float32))
    np.testing.assert_allclose(got.spacing_mm[2], 14.4 / 23)
    with pytest.raises(BadScan, match="a slice is missing"):
        decode_dicom(sorted(files)[:10] + sorted(files)[11:])


def test_a_ct_without_rescale_tags_is_a_ct() -> None:
    def without(k: int, ds: pydicom.Dataset) -> None:
        del ds.RescaleSlope, ds.RescaleIntercept

    got = decode_dicom(dicom_series(affine=AXIAL, x=without)[0])
    assert got.array_CXYZ.min() >= 0
    assert volume.modality(got, None, "x") == "CT"
    assert "RescaleIntercept" in got.note


def test_truncated_or_foreign_dicom_files() -> None:
    files, _ = dicom_series(affine=AXIAL)
    (name, data), rest = files[0], files[1:]
    nifti = nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)).to_bytes()
    for broken in (
        b"",
        b"text" * 100,
        nifti,
        *(data[:n] for n in range(0, len(data), 61)),
    ):
        with pytest.raises(BadScan):
            decode_dicom([(name, broken), *rest])


def test_real_dicom_series(shared_data: Path) -> None:
    paths = sorted((shared_data / "scans" / "ct_dicom").glob("*.dcm"))
    got = decode_dicom([(p.name, p.read_bytes()) for p in paths])
    assert got.shape_xyz == (512, 512, 20)
    assert got.orientation == "LPS"
    np.testing.assert_allclose(got.spacing_mm, (0.9765625, 0.9765625, 2.0))
    np.testing.assert_allclose(got.affine[:3, 3], (249.51171875, 437.51171875, -804.5))
    assert volume.modality(got, None, "x") == "CT"
    assert got.array_CXYZ.min() == -1024  # 0 with the rescale intercept
    lowest = min((pydicom.dcmread(p) for p in paths), key=lambda ds: ds.ImagePositionPatient[2])
    np.testing.assert_array_equal(got.array_CXYZ[0, :, :, 0], lowest.pixel_array.T - 1024.0)
    with pytest.raises(BadScan, match="a slice is missing"):
        decode_dicom([(p.name, p.read_bytes()) for p in paths if p != paths[7]])
