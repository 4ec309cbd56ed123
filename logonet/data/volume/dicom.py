"""DICOM series as volumes."""

from __future__ import annotations

import hashlib
import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from logonet.core.errors import BadScan
from logonet.data.volume.nifti import MAX_BYTES, check_claim
from logonet.data.volume.volume import Volume, check_affine, check_values

ROUNDING = (
    0.25  # of the gap between slices: how far a rounded position may be off; a missing slice is a whole gap
)
SAME_PLANE = 1e-2  # between directions and spacings (mm) of the slices of one stack
# Modalities of files beside images: structure sets, plans, doses, reports, presentation states, key objects...
NO_IMAGES = {"RTSTRUCT", "RTPLAN", "RTDOSE", "RTRECORD", "REG", "SR", "PR", "KO", "SEG", "DOC"}
DEFLATED = "1.2.840.10008.1.2.1.99"  # pydicom inflates the whole of it, whatever it grows to
PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
DICOM_TAGS = [
    "SeriesInstanceUID", "ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "Rows", "Columns",
    "PhotometricInterpretation",
]  # fmt: skip
# Read where they are there: for the intensities and by pydicom's decoders.
DICOM_MORE_TAGS = [
    "Modality", "RescaleSlope", "RescaleIntercept", "NumberOfFrames", "SamplesPerPixel", "PlanarConfiguration",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths", *PIXELS,
]  # fmt: skip


@dataclass(frozen=True)
class _Slice:
    """One DICOM slice: the numbers that place it, and the dataset its pixels are decoded from."""

    name: str
    series: str
    modality: str
    rows: int
    columns: int
    orientation: np.ndarray  # (6,)
    position_mm: np.ndarray  # (3,) LPS
    pixel_mm: np.ndarray  # (2,) between rows, between columns
    slope: float
    intercept: float
    content: tuple[Any, ...]  # equal for copies of a slice
    dataset: Any

    def lies_like(self, other: _Slice) -> bool:
        """Whether both are slices of one stack: the same series, size, direction and spacing, up to rounding."""
        same = all(getattr(self, n) == getattr(other, n) for n in ("series", "modality", "rows", "columns"))
        turned = np.abs(self.orientation - other.orientation).max() > SAME_PLANE
        return same and not turned and np.abs(self.pixel_mm - other.pixel_mm).max() <= SAME_PLANE


def decode_dicom(files: Sequence[tuple[str, bytes]], *, max_bytes: int = MAX_BYTES) -> Volume:
    """One DICOM series of single-frame slices, given as (name, bytes) in any order.

    Of several series or planes in a folder (a localizer beside the scan) the one with the most slices is taken; the
    others, exact duplicates of slices and files that hold no image are counted in the volume's ``note``.

    Slices are sorted by their position along the slice normal, and the slice spacing comes from positions
    (``SliceThickness`` is often something else). Each slice's own rescale slope and intercept is applied.
    No patient tag leaves this function.

    Raises:
        BadScan: naming a file, for an incomplete, irregular or unreadable series.
    """
    slices, left_out = _largest_series([_dicom_slice(name, data) for name, data in files])
    if len(slices) < 2:
        why = f"; left out: {left_out}" if left_out else ""
        raise BadScan(f"{files[0][0] if files else 'DICOM series'}: one slice is not a 3D scan{why}")
    first = slices[0]
    shape_xyz = (first.columns, first.rows, len(slices))
    claim = f"{first.name}: its series claims {'x'.join(map(str, shape_xyz))} voxels"
    check_claim(claim, 4 * math.prod(shape_xyz), sum(len(data) for _, data in files), max_bytes)
    ordered, affine = _dicom_geometry(slices, left_out)
    check_affine(affine, first.name)
    array_XYZ = np.empty(shape_xyz, np.float32, order="F")
    for k, slice_ in enumerate(ordered):
        try:
            pixels_YX = slice_.dataset.pixel_array
        except Exception as err:  # the decoders behind pydicom raise whatever they like on damaged data
            reason = " ".join(str(err).split())[:200]
            raise BadScan(f"{slice_.name}: its DICOM pixels cannot be decoded ({reason})") from None
        if pixels_YX.shape != (slice_.rows, slice_.columns):
            raise BadScan(f"{slice_.name}: its DICOM pixels have shape {pixels_YX.shape}, not its header's")
        array_XYZ[:, :, k] = pixels_YX.T * slice_.slope + slice_.intercept
    check_values(array_XYZ, first.name)
    notes = [f"left out: {left_out}"] if left_out else []
    if first.modality == "CT" and "RescaleIntercept" not in first.dataset:
        notes.append("has no RescaleIntercept, so its values are taken for Hounsfield units as they are")
    note = "; ".join(notes)
    return Volume(array_XYZ[None], affine, first.modality or None, pixels_YX.dtype.name, note)


@dataclass(frozen=True)
class _Unusable:
    """A file of a series that cannot be a slice of a scan, and why."""

    series: str
    sentence: str


def _largest_series(found: Sequence[_Slice | _Unusable | str]) -> tuple[list[_Slice], str]:
    """The slices of the largest series of equal planes in a folder, each once, and what else there was.

    Raises:
        BadScan: a file of that series cannot be used, or none of any.
    """
    others = Counter(what for what in found if isinstance(what, str))
    unusable = [what for what in found if isinstance(what, _Unusable)]
    groups: list[list[_Slice]] = []
    for slice_ in (s for s in found if isinstance(s, _Slice)):
        same = next((group for group in groups if slice_.lies_like(group[0])), None)
        if same is None:
            groups.append([slice_])
        else:
            same.append(slice_)
    largest = max(groups, key=len, default=[])
    for what in unusable:
        if not largest or what.series in ("", largest[0].series):
            raise BadScan(what.sentence)
        others["files of another series that are no slices"] += 1
    for group in groups:
        if group is not largest:
            kind = f"{group[0].modality or 'image'} slices of another series or plane ({group[0].name} ...)"
            others[kind] += len(group)
    once = {s.content: s for s in largest}
    others["exact duplicates"] += len(largest) - len(once)
    told = [f"{count} {kind}" for kind, count in others.items() if count]
    return list(once.values()), ", ".join(told)


def _dicom_slice(name: str, data: bytes) -> _Slice | _Unusable | str:
    """The slice, or what else the file is: a structure set, a screenshot, a report, no DICOM at all."""
    import pydicom
    from pydicom import filereader

    def numbers(tag: str, size: int) -> np.ndarray:
        values = np.array(dataset[tag].value, np.float64).reshape(size)
        if not np.isfinite(values).all():
            raise ValueError(f"{tag} is not finite")
        return values

    if data[128:132] != b"DICM" and not name.lower().endswith((".dcm", ".ima")):
        return "files that are not DICOM"
    try:
        stream = io.BytesIO(data)
        filereader.read_preamble(stream, force=False)
        # the UID as pydicom's reader is going to find it; this function's public sister opens a path
        if filereader._read_file_meta_info(stream).get("TransferSyntaxUID") == DEFLATED:
            raise BadScan(f"{name}: is deflated DICOM, which may grow to any size; inflate it (dcmconv)")
        # Nothing that names a patient is even parsed: pydicom's own warnings and errors repeat values.
        dataset = pydicom.dcmread(io.BytesIO(data), specific_tags=DICOM_TAGS + DICOM_MORE_TAGS)
        if dataset.get("Modality") in NO_IMAGES:
            return f"{dataset.Modality} files"
        series = str(dataset.get("SeriesInstanceUID") or "")
        if int(dataset.get("NumberOfFrames") or 1) > 1:
            return _Unusable(series, f"{name}: is a multi-frame DICOM; convert it to NIfTI (dcm2niix)")
        if missing := [tag for tag in DICOM_TAGS if tag not in dataset]:
            return _Unusable(series, f"{name}: DICOM without {', '.join(missing)}; is it an image slice?")
        if (pixels_are := dataset.PhotometricInterpretation) != "MONOCHROME2":
            return _Unusable(series, f"{name}: has {pixels_are} pixels; only MONOCHROME2 is read")
        pixels = [dataset[tag].value for tag in PIXELS if tag in dataset]
        return _Slice(
            name=name,
            series=series,
            modality=str(dataset.get("Modality") or ""),
            rows=int(dataset.Rows),
            columns=int(dataset.Columns),
            orientation=numbers("ImageOrientationPatient", 6),
            position_mm=numbers("ImagePositionPatient", 3),
            pixel_mm=numbers("PixelSpacing", 2),
            slope=float(dataset.get("RescaleSlope") or 1.0),
            intercept=float(dataset.get("RescaleIntercept") or 0.0),
            content=(str(dataset.ImagePositionPatient), *(hashlib.sha256(p).digest() for p in pixels)),
            dataset=dataset,
        )
    except BadScan:
        raise
    except Exception as err:  # pydicom raises a dozen unrelated types on damaged files
        # Of others the type alone: their text may hold a value, and a damaged file a name where a number belongs.
        plain = isinstance(err, pydicom.errors.InvalidDicomError)
        reason = " ".join(str(err).split())[:200] if plain else type(err).__name__
        raise BadScan(f"{name}: unreadable DICOM slice ({reason})") from None


def _dicom_geometry(slices: Sequence[_Slice], left_out: str) -> tuple[list[_Slice], np.ndarray]:
    """The slices in order along their normal, and the affine of array[column, row, slice].

    DICOM PS3.3 C.7.6.2.1.1: ImageOrientationPatient holds the direction of growing column index, then that of
    growing row index; PixelSpacing holds the distance between rows, then between columns; mm, LPS.
    """
    first, name = slices[0], slices[0].name
    column_dir, row_dir = first.orientation[:3], first.orientation[3:]
    normal = np.cross(column_dir, row_dir)
    ordered = sorted(slices, key=lambda s: float(s.position_mm @ normal))
    places_mm = np.array([s.position_mm @ normal for s in ordered])
    gaps = np.diff(places_mm)
    gap = float(np.median(gaps))
    if gap < 1e-4 or gaps.min() < 0.05 * gap:
        raise BadScan(f"{name}: two slices of its series lie at the same place; remove the duplicates")
    # Against an even spacing from the first to the last: scanners round the positions of thin slices.
    even_mm = np.linspace(places_mm[0], places_mm[-1], len(ordered))
    if np.abs(gaps - gap).max() > 0.05 * gap and np.abs(places_mm - even_mm).max() > ROUNDING * gap:
        k, least = int(gaps.argmax()), float(gaps.min())
        apart = f"the next slice of its series is {gaps[k]:.2f} mm away, others {least:.2f} mm"
        why = "a slice is missing" if gaps[k] > 1.5 * least else "the series is unevenly spaced"
        raise BadScan(f"{ordered[k].name}: {apart}; {why}{f' (left out: {left_out})' if left_out else ''}")
    lps = np.eye(4)
    lps[:3, 0] = column_dir * first.pixel_mm[1]
    lps[:3, 1] = row_dir * first.pixel_mm[0]
    # from positions, not along the normal: a tilted gantry shears the stack and the affine should say so
    lps[:3, 2] = (ordered[-1].position_mm - ordered[0].position_mm) / (len(ordered) - 1)
    lps[:3, 3] = ordered[0].position_mm
    return ordered, np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps
