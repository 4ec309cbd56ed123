"""Scans as arrays in space: NIfTI and DICOM bytes in, orientation, resampling, windowing, NIfTI bytes out.

Shape suffixes: C channels (always 1 here), X Y Z voxel axes. Affines are (4, 4), voxel index -> RAS+ mm.
Bytes come from anywhere, so every decoder treats them as hostile: it refuses with ``BadScan``, in one
sentence that names the file, and before it allocates compares what the file claims to hold with ``max_bytes`` and with
the file's own size (``check_claim``). The peak is four times that claim.
"""

from __future__ import annotations

import functools
import gzip
import io
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import nibabel as nib
import numpy as np

from logonet.errors import BadScan

UINT16_MAX = 65535  # stored crops: 0..65535 for intensities 0..1
MAX_BYTES = 8 * 2**30  # of one decoded scan; 1024 x 1024 x 2048 float32 voxels
# A file may claim SMALL_BYTES whatever its own size, an empty label map of a long CT for one; beyond that MAX_EXPANSION
# times its own bytes. Scans shrink 2 to 30 times.
SMALL_BYTES = 2**30
MAX_EXPANSION = 200
GZIP_MAX_RATIO = 1032  # deflate cannot expand further, so a shorter file cannot hold what its header claims
TRAILING_BYTES = 2**20  # some writers pad after the last voxel; more than this is not padding
CHUNK_BYTES = 4 * 2**20
AIR_HU = -200.0  # below fat (-100 HU) and above air (-1000 HU)
AIR_SHARE = 0.005
DEFLATED = "1.2.840.10008.1.2.1.99"  # pydicom inflates the whole of it, whatever it grows to
DICOM_TAGS = (
    "SeriesInstanceUID",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "PixelSpacing",
    "Rows",
    "Columns",
    "PhotometricInterpretation",
)
DICOM_MORE_TAGS = (  # read where they are there: for the intensities and by pydicom's decoders
    "Modality",
    "RescaleSlope",
    "RescaleIntercept",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PlanarConfiguration",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelData",
    "FloatPixelData",
    "DoubleFloatPixelData",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
)


@dataclass(frozen=True)
class Volume:
    """One scan: ``array_CXYZ`` float32 (1, X, Y, Z) in any memory order, and where its voxels lie.

    ``modality`` is what the file itself says ("CT", "MR", ...; None for NIfTI), ``stored_dtype`` the type of
    the voxels in the file.
    """

    array_CXYZ: np.ndarray
    affine: np.ndarray
    modality: str | None = None
    stored_dtype: str = "float32"

    @property
    def shape_xyz(self) -> tuple[int, int, int]:
        return self.array_CXYZ.shape[1:]  # type: ignore[return-value]

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxel centres along each voxel axis, in mm."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(x), float(y), float(z)

    @property
    def orientation(self) -> str:
        """Nearest anatomical direction of each voxel axis, e.g. "RAS" or "LPS"."""
        return "".join(nib.orientations.aff2axcodes(self.affine))


def decode_nifti(
    data: bytes, name: str, *, max_bytes: int = MAX_BYTES, allow_constant: bool = False
) -> Volume:
    """A 3D scan from the bytes of a ``.nii`` or ``.nii.gz`` file (its magic tells which).

    ``scl_slope`` and ``scl_inter`` are applied; units other than mm are converted; a trailing 4th axis of
    length 1 is dropped. ``allow_constant`` is for label maps, which may be empty.

    Raises:
        BadScan: naming ``name``, for anything that is not one finite, non-constant 3D scalar image.
    """
    # nibabel reads the header; the voxels are mapped here, because nibabel on a stream inflates before any
    # check and holds the raw bytes twice beside a float64 copy.
    stream, limit = _open(data, name)
    head = _read(stream, 352, name)
    header = _header(head, name)
    shape_xyz = _shape_xyz(header, name)
    dtype = _dtype(header, name)
    offset = _offset(header, name)
    end = offset + math.prod(shape_xyz) * dtype.itemsize
    claimed = max(end, math.prod(shape_xyz) * 4)
    if end > limit and claimed <= max_bytes:
        raise BadScan(f"{name}: truncated; its header claims {end} bytes of voxels; copy the file again")
    check_claim(
        f"{name}: its header claims {'x'.join(map(str, shape_xyz))} voxels", claimed, len(data), max_bytes
    )
    raw = np.empty(end, np.uint8)
    raw[: len(head)] = np.frombuffer(head, np.uint8)
    _fill(stream, raw, len(head), name)
    stored_XYZ = raw[offset:end].view(dtype).reshape(shape_xyz, order="F")
    array_XYZ = _scaled(stored_XYZ, header, name)
    del raw, stored_XYZ
    _check_values(array_XYZ, name, allow_constant)
    return Volume(array_XYZ[None], _nifti_affine(header, name), None, dtype.newbyteorder("=").name)


def check_claim(claim: str, claimed: int, stored: int, max_bytes: int = MAX_BYTES) -> None:
    """Refuse bytes that a file of ``stored`` bytes claims to become, before they are allocated.

    Raises:
        BadScan: beginning with ``claim``.
    """
    size = f"{claim} ({claimed / 2**30:.1f} GiB)"
    if claimed > max_bytes:
        raise BadScan(
            f"{size}, more than the {max_bytes / 2**30:.1f} GiB allowed; split the scan or leave it out"
        )
    if claimed > max(SMALL_BYTES, MAX_EXPANSION * stored):
        raise BadScan(
            f"{size}, more than {MAX_EXPANSION} times what the file has ({stored / 2**20:.1f} MiB); if that is "
            "right, save it without compression"
        )


def _open(data: bytes, name: str) -> tuple[Any, int]:
    """A stream of the decompressed bytes, and an upper bound on how many it can give."""
    if data[:2] == b"\x1f\x8b":
        gzip_file, _ = _gunzip()
        return gzip_file(fileobj=io.BytesIO(data)), len(data) * GZIP_MAX_RATIO
    if name.lower().endswith(".gz"):
        raise BadScan(f"{name}: is not gzip data, though its name says so; copy the file again")
    return io.BytesIO(data), len(data)


@functools.cache
def _gunzip() -> tuple[type[gzip.GzipFile], type[Exception]]:
    """What reads gzip data, and what it raises beside gzip's own errors.

    Inflating is most of decoding; ISA-L, where it is installed, takes about half of zlib's time.
    """
    try:
        from isal import igzip, isal_zlib
    except ImportError:
        return gzip.GzipFile, zlib.error
    return igzip.IGzipFile, isal_zlib.error  # type: ignore[return-value]  # its stub says an instance


def _read(stream: Any, size: int, name: str) -> bytes:
    """The next ``size`` bytes, fewer at the end of the stream."""
    try:
        return stream.read(size)
    except EOFError:
        raise BadScan(f"{name}: truncated gzip data; copy the file again") from None
    except (OSError, _gunzip()[1]) as err:  # gzip.BadGzipFile is an OSError
        raise BadScan(f"{name}: damaged gzip data ({err}); copy the file again") from None


def _fill(stream: Any, raw: np.ndarray, filled: int, name: str) -> None:
    """Fill ``raw`` from ``filled`` on, then read to the end so that gzip's checksum is verified."""
    while filled < len(raw):
        chunk = _read(stream, min(CHUNK_BYTES, len(raw) - filled), name)
        if not chunk:
            raise BadScan(f"{name}: truncated; it holds {filled} of {len(raw)} bytes; copy the file again")
        raw[filled : filled + len(chunk)] = np.frombuffer(chunk, np.uint8)
        filled += len(chunk)
    if len(_read(stream, TRAILING_BYTES + 1, name)) > TRAILING_BYTES:
        raise BadScan(
            f"{name}: holds far more bytes than its header claims; the header or the file is damaged"
        )


def _header(head: bytes, name: str) -> Any:
    """The NIfTI-1 or NIfTI-2 header at the start of ``head``."""
    sizes = {int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big")}
    if 540 in sizes:
        raise BadScan(f"{name}: is NIfTI-2; convert it to NIfTI-1 (nib.Nifti1Image.from_image)")
    if 348 not in sizes or head[344:348] != b"n+1\0":
        raise BadScan(f"{name}: is not a single-file NIfTI-1 image (wrong magic); convert it to .nii.gz")
    try:
        return nib.Nifti1Header(head[:348], check=False)
    except (nib.spatialimages.HeaderDataError, ValueError) as err:
        raise BadScan(f"{name}: unreadable NIfTI header ({err})") from None


def _shape_xyz(header: Any, name: str) -> tuple[int, int, int]:
    ndim = int(header["dim"][0])
    dims = tuple(int(n) for n in header["dim"][1 : max(ndim, 0) + 1])
    if not 1 <= ndim <= 7 or min(dims) < 1:
        raise BadScan(f"{name}: its header gives the impossible dimensions {(ndim, *dims)}")
    if math.prod(dims[3:]) > 1:
        raise BadScan(
            f"{name}: has {len(dims)} axes {dims}; a scan is one 3D image, so save each channel or "
            "time point as a file of its own"
        )
    if ndim < 3 or min(dims[:3]) < 2:
        raise BadScan(f"{name}: is a 2D image {dims[:3]}; only 3D scans can be used")
    return dims[0], dims[1], dims[2]


def _dtype(header: Any, name: str) -> np.dtype:
    try:
        dtype = header.get_data_dtype()
    except (nib.spatialimages.HeaderDataError, KeyError):
        raise BadScan(f"{name}: unknown NIfTI datatype code {int(header['datatype'])}") from None
    if dtype.kind not in "iuf" or not dtype.itemsize:
        kind = "complex" if dtype.kind == "c" else "colour (RGB)" if dtype.fields else "typeless"
        raise BadScan(f"{name}: has {kind} voxels; only real scalar images can be used")
    return dtype


def _offset(header: Any, name: str) -> int:
    offset = float(header["vox_offset"]) or 352.0
    if not (352 <= offset < 2**31):
        raise BadScan(f"{name}: its header puts the voxels at byte {offset}; the file is damaged")
    return int(offset)


def _scaled(stored_XYZ: np.ndarray, header: Any, name: str) -> np.ndarray:
    """float32 voxels with the header's slope and intercept applied."""
    try:
        slope, inter = header.get_slope_inter()
    except nib.spatialimages.HeaderDataError as err:
        raise BadScan(f"{name}: bad intensity scaling in its header ({err})") from None
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows float32 is refused as non-finite
        if slope is None or (slope, inter) == (1.0, 0.0):
            return stored_XYZ.astype(np.float32)
        # wide integers minus a large intercept would cancel in float32
        work = np.float32 if stored_XYZ.dtype.itemsize <= 2 else np.float64
        array_XYZ = stored_XYZ.astype(work)
        np.multiply(array_XYZ, slope, out=array_XYZ)
        np.add(array_XYZ, inter, out=array_XYZ)
        return array_XYZ.astype(np.float32, copy=False)


def _nifti_affine(header: Any, name: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        try:
            affine = np.array(header.get_best_affine(), np.float64)
        except (nib.spatialimages.HeaderDataError, ValueError, np.linalg.LinAlgError) as err:
            raise BadScan(f"{name}: no usable orientation in its header ({err})") from None
    affine[:3] *= {1: 1e3, 3: 1e-3}.get(int(header["xyzt_units"]) & 7, 1.0)  # metres, micrometres
    _check_affine(affine, name)
    return affine


def _check_affine(affine: np.ndarray, name: str) -> None:
    lengths_mm = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or lengths_mm.min() < 1e-4:
        raise BadScan(f"{name}: its affine is singular or not finite, so voxel sizes are unknown")
    if abs(np.linalg.det(affine[:3, :3] / lengths_mm)) < 1e-3:
        raise BadScan(f"{name}: its affine is singular (two voxel axes point the same way)")


def _check_values(array: np.ndarray, name: str, allow_constant: bool = False) -> None:
    low, high = float(array.min()), float(array.max())  # both propagate NaN, and need no temporary array
    if not (math.isfinite(low) and math.isfinite(high)):
        raise BadScan(
            f"{name}: has voxels that are not finite (NaN or infinity); replace them and save it again"
        )
    if low == high and not allow_constant:
        raise BadScan(f"{name}: every voxel is {low:g}; there is nothing in the scan")


def encode_nifti(array_XYZ: np.ndarray, affine: np.ndarray) -> bytes:
    """``.nii.gz`` bytes of a 3D array, stored in its own dtype; equal input gives equal bytes."""
    image = nib.Nifti1Image(np.asarray(array_XYZ), np.asarray(affine, np.float64))
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), compresslevel=4, mtime=0)


def encode_labels(labels_XYZ: np.ndarray, like: bytes | None, affine: np.ndarray) -> bytes:
    """``.nii.gz`` bytes of a uint8 label map on a scan's own voxels; equal input gives equal bytes.

    Args:
        labels_XYZ: in the axes of the scan's file.
        like: the scan's file. When it is NIfTI, the map gets its header, so that every program puts one
            exactly on the other: qform and sform with their codes, units, description.
        affine: used when ``like`` is None or something else (DICOM).
    """
    assert labels_XYZ.dtype == np.uint8, labels_XYZ.dtype
    header = _header_of(like) if like else None
    if header is None:
        return encode_nifti(labels_XYZ, affine)
    stored = tuple(int(n) for n in header["dim"][1:4])
    assert stored == labels_XYZ.shape, f"labels of shape {labels_XYZ.shape} for a scan of shape {stored}"
    header.set_data_shape(labels_XYZ.shape)  # drops a trailing axis of length 1
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    header.set_intent("label")
    header["cal_min"] = header["cal_max"] = 0  # the scan's display window
    header["vox_offset"] = 352  # its extensions stay behind
    return gzip.compress(
        header.binaryblock + bytes(4) + labels_XYZ.tobytes(order="F"), compresslevel=4, mtime=0
    )


def _header_of(data: bytes) -> Any | None:
    """The header of NIfTI-1 bytes that `decode_nifti` has accepted; None for anything else."""
    stream, _ = _open(data, "scan")
    head = _read(stream, 352, "scan")
    return nib.Nifti1Header(head[:348], check=False) if head[344:348] == b"n+1\0" else None


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
    dataset: Any


def decode_dicom(files: Sequence[tuple[str, bytes]], *, max_bytes: int = MAX_BYTES) -> Volume:
    """One DICOM series of single-frame slices, given as (name, bytes) in any order.

    Slices are sorted by their position along the slice normal, and the slice spacing comes from positions
    (``SliceThickness`` is often something else). Each slice's own rescale slope and intercept is applied.
    No patient tag leaves this function.

    Raises:
        BadScan: naming a file, for a mixed, incomplete, irregular or unreadable series.
    """
    if len(files) < 2:
        raise BadScan(f"{files[0][0] if files else 'DICOM series'}: one slice is not a 3D scan")
    slices = [_dicom_slice(name, data) for name, data in files]
    first = slices[0]
    for what in ("series", "modality", "rows", "columns"):
        if len(values := {getattr(s, what) for s in slices}) > 1:
            raise BadScan(
                f"{first.name}: its folder holds slices of {len(values)} different {what} values; keep one series "
                "per folder"
            )
    claimed = first.rows * first.columns * len(slices) * 4
    check_claim(
        f"{first.name}: its series claims {first.columns}x{first.rows}x{len(slices)} voxels",
        claimed,
        sum(len(data) for _, data in files),
        max_bytes,
    )
    ordered, affine = _dicom_geometry(slices)
    _check_affine(affine, first.name)
    array_XYZ = np.empty((first.columns, first.rows, len(slices)), np.float32, order="F")
    for k, slice_ in enumerate(ordered):
        pixels_YX = _dicom_pixels(slice_)
        array_XYZ[:, :, k] = pixels_YX.T * slice_.slope + slice_.intercept
    _check_values(array_XYZ, first.name)
    return Volume(array_XYZ[None], affine, first.modality or None, pixels_YX.dtype.name)


def _dicom_slice(name: str, data: bytes) -> _Slice:
    import pydicom

    def numbers(tag: str, size: int) -> np.ndarray:
        values = np.array(dataset[tag].value, np.float64).reshape(size)
        if not np.isfinite(values).all():
            raise ValueError(f"{tag} is not finite")
        return values

    try:
        if _transfer_syntax(data) == DEFLATED:
            raise BadScan(
                f"{name}: is deflated DICOM, which may hold any number of bytes; inflate it (dcmconv)"
            )
        # Nothing that names a patient is even parsed: pydicom's own warnings and errors repeat values.
        dataset = pydicom.dcmread(io.BytesIO(data), specific_tags=list(DICOM_TAGS + DICOM_MORE_TAGS))
        if int(dataset.get("NumberOfFrames") or 1) > 1:
            raise BadScan(f"{name}: is a multi-frame DICOM; convert it to NIfTI (dcm2niix)")
        if missing := [tag for tag in DICOM_TAGS if tag not in dataset]:
            raise BadScan(f"{name}: DICOM without {', '.join(missing)}; is it an image slice?")
        if dataset.PhotometricInterpretation != "MONOCHROME2":
            raise BadScan(
                f"{name}: has {dataset.PhotometricInterpretation} pixels; only MONOCHROME2 is usable"
            )
        return _Slice(
            name=name,
            series=str(dataset.SeriesInstanceUID),
            modality=str(dataset.get("Modality") or ""),
            rows=int(dataset.Rows),
            columns=int(dataset.Columns),
            orientation=numbers("ImageOrientationPatient", 6),
            position_mm=numbers("ImagePositionPatient", 3),
            pixel_mm=numbers("PixelSpacing", 2),
            slope=float(dataset.get("RescaleSlope") or 1.0),
            intercept=float(dataset.get("RescaleIntercept") or 0.0),
            dataset=dataset,
        )
    except BadScan:
        raise
    except Exception as err:  # pydicom raises a dozen unrelated types on damaged files
        # Of others the type alone: their text may hold a value, and a damaged file a name where a number belongs.
        plain = isinstance(err, pydicom.errors.InvalidDicomError)
        reason = " ".join(str(err).split())[:200] if plain else type(err).__name__
        raise BadScan(f"{name}: unreadable DICOM slice ({reason})") from None


def _transfer_syntax(data: bytes) -> str:
    """The UID in the head of a DICOM file, as pydicom's reader is going to find it."""
    from pydicom import filereader

    stream = io.BytesIO(data)
    filereader.read_preamble(stream, force=False)
    # its public sister opens a path
    return str(filereader._read_file_meta_info(stream).get("TransferSyntaxUID", ""))


def _dicom_geometry(slices: Sequence[_Slice]) -> tuple[list[_Slice], np.ndarray]:
    """The slices in order along their normal, and the affine of array[column, row, slice].

    DICOM PS3.3 C.7.6.2.1.1: ImageOrientationPatient holds the direction of growing column index, then that of
    growing row index; PixelSpacing holds the distance between rows, then between columns; mm, LPS.
    """
    first, name = slices[0], slices[0].name
    for other in slices:
        turned = np.abs(other.orientation - first.orientation).max() > 1e-3
        if turned or np.abs(other.pixel_mm - first.pixel_mm).max() > 1e-3:
            raise BadScan(
                f"{other.name}: differs from the other slices of its folder in orientation or spacing"
            )
    column_dir, row_dir = first.orientation[:3], first.orientation[3:]
    normal = np.cross(column_dir, row_dir)
    ordered = sorted(slices, key=lambda s: float(s.position_mm @ normal))
    gaps = np.diff([s.position_mm @ normal for s in ordered])
    gap = float(np.median(gaps))
    if gap < 1e-4 or gaps.min() < 0.05 * gap:
        raise BadScan(f"{name}: two slices of its series lie at the same place; remove the duplicates")
    if np.abs(gaps - gap).max() > 0.05 * gap:
        k = int(np.abs(gaps - gap).argmax())
        raise BadScan(
            f"{ordered[k].name}: the next slice of its series is {gaps[k]:.2f} mm away, the others {gap:.2f} mm; "
            "a slice is missing"
        )
    lps = np.eye(4)
    lps[:3, 0] = column_dir * first.pixel_mm[1]
    lps[:3, 1] = row_dir * first.pixel_mm[0]
    # from positions, not along the normal: a tilted gantry shears the stack and the affine should say so
    lps[:3, 2] = (ordered[-1].position_mm - ordered[0].position_mm) / (len(ordered) - 1)
    lps[:3, 3] = ordered[0].position_mm
    return ordered, np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps


def _dicom_pixels(slice_: _Slice) -> np.ndarray:
    try:
        pixels_YX = slice_.dataset.pixel_array
    except Exception as err:  # the decoders behind pydicom raise whatever they like on damaged data
        reason = " ".join(str(err).split())[:200]
        raise BadScan(f"{slice_.name}: its DICOM pixels cannot be decoded ({reason})") from None
    if pixels_YX.shape != (slice_.rows, slice_.columns):
        raise BadScan(f"{slice_.name}: its DICOM pixels have shape {pixels_YX.shape}, not its header's")
    return pixels_YX


def modality(volume: Volume, hint: str | None, name: str) -> str:
    """How the intensities are to be read: "CT" (Hounsfield units) or "MR" (no absolute scale).

    ``hint`` is what a dataset.json says, else what the file says. A CT whose values never fall below zero has
    been rescaled (to uint8, or without its intercept): air and fat are negative in Hounsfield units, so it is
    read as "MR". Without a hint it is "CT" when more than 0.5 % of the voxels are air.

    Raises:
        BadScan: for a hint that is neither CT nor some MR contrast.
    """
    hint = (hint or volume.modality or "").strip().lower()
    if hint == "ct":
        return "CT" if float(volume.array_CXYZ.min()) < 0 else "MR"
    if hint.startswith(("mr", "t1", "t2", "flair", "adc", "dwi", "pd")):
        return "MR"
    if hint:
        raise BadScan(f"{name}: its modality '{hint}' is neither CT nor MR")
    air = np.count_nonzero(volume.array_CXYZ < AIR_HU)
    return "CT" if air > AIR_SHARE * volume.array_CXYZ.size else "MR"


def to_ras(volume: Volume) -> Volume:
    """The same scan with its axes permuted and flipped so that they point nearest to R, A, S.

    No voxel is interpolated: an oblique scan stays oblique, its affine keeps the rotation. The array is
    a view.
    """
    orientation = nib.orientations.io_orientation(volume.affine)
    array_XYZ = nib.orientations.apply_orientation(volume.array_CXYZ[0], orientation)
    affine = volume.affine @ nib.orientations.inv_ornt_aff(orientation, volume.shape_xyz)
    return replace(volume, array_CXYZ=array_XYZ[None], affine=affine)


def resample(volume: Volume, spacing_mm: Sequence[float], order: int = 1) -> Volume:
    """``volume`` in RAS axes with ``spacing_mm`` between voxels; ``order`` 1 is trilinear, 0 nearest.

    The first voxel keeps its place and edges are repeated, as in ``monai.transforms.Spacing`` with
    ``scale_extent=False`` and ``padding_mode="border"``; a test holds the two equal. Not MONAI: importing it
    takes seconds on every worker, and its Spacing runs a general grid sampler where a diagonal scaling is all
    that is needed.
    """
    volume = to_ras(volume)
    old_mm, new_mm = np.array(volume.spacing_mm), np.array(spacing_mm, np.float64)
    if np.allclose(old_mm, new_mm, rtol=1e-4):
        return volume
    step = new_mm / old_mm
    shape_xyz = resampled_shape(volume.shape_xyz, old_mm, new_mm)
    if order == 1:
        array_XYZ = _trilinear(volume.array_CXYZ[0], step, shape_xyz)
    else:
        from scipy import ndimage

        array_XYZ = ndimage.affine_transform(
            volume.array_CXYZ[0],
            step,
            output_shape=shape_xyz,
            order=order,
            mode="nearest",
            prefilter=order > 1,
        )
    affine = volume.affine.copy()
    affine[:3, :3] *= step
    return replace(volume, array_CXYZ=array_XYZ[None], affine=affine)


def resampled_shape(
    shape_xyz: Sequence[int], old_mm: Sequence[float] | np.ndarray, new_mm: Sequence[float] | np.ndarray
) -> tuple[int, int, int]:
    """The voxels along each axis after `resample` from ``old_mm`` to ``new_mm`` between voxels."""
    step = np.asarray(new_mm, np.float64) / np.asarray(old_mm, np.float64)
    x, y, z = (int(n) for n in np.round((np.array(shape_xyz) - 1) / step + 1))
    return x, y, z


def _trilinear(array_XYZ: np.ndarray, step: np.ndarray, shape_xyz: Sequence[int]) -> np.ndarray:
    """``ndimage.affine_transform(array_XYZ, step, output_shape=shape_xyz, order=1, mode="nearest")``, every bit of it.

    SciPy weighs and adds eight neighbours for each voxel alone, in whatever order they lie in memory. Here whole
    planes are weighed along X and Y once for all the planes made of them: a sixth of the time. The products
    and sums are SciPy's and in its order, ((voxel x w_x) x w_y) x w_z in float64, so no crop changes.
    """
    taps_xyz = [_taps(n, float(s), m) for n, s, m in zip(array_XYZ.shape, step, shape_xyz)]
    (at_2X, weight_2X), (at_2Y, weight_2Y), (at_2Z, weight_2Z) = taps_xyz

    @functools.lru_cache(maxsize=2)
    def weighed(z: int) -> list[np.ndarray]:
        """Plane ``z`` at its four neighbours (x0 y0, x0 y1, x1 y0, x1 y1) along X and Y."""
        plane_XY = array_XYZ[:, :, z].astype(np.float64, order="C")
        rows = [plane_XY[at_X] * weight_X[:, None] for at_X, weight_X in zip(at_2X, weight_2X)]
        return [
            row_XY.take(at_Y, 1) * weight_Y for row_XY in rows for at_Y, weight_Y in zip(at_2Y, weight_2Y)
        ]

    out_XYZ = np.empty(shape_xyz, array_XYZ.dtype)
    for z in range(shape_xyz[2]):
        sum_XY = np.zeros(shape_xyz[:2])
        for lower_XY, upper_XY in zip(weighed(int(at_2Z[0, z])), weighed(int(at_2Z[1, z]))):
            sum_XY += lower_XY * weight_2Z[0, z]
            sum_XY += upper_XY * weight_2Z[1, z]
        out_XYZ[:, :, z] = sum_XY
    return out_XYZ


def _taps(old: int, step: float, new: int) -> tuple[np.ndarray, np.ndarray]:
    """The two neighbours of each of ``new`` places among ``old`` voxels, int (2, new), and their weights."""
    place = np.arange(new) * step
    lower = np.floor(place).astype(int)
    weight = 1 - (place - lower)
    return np.minimum([lower, lower + 1], old - 1), np.stack([weight, 1 - weight])


def window(array: np.ndarray, window_hu: tuple[float, float]) -> np.ndarray:
    """Intensities mapped linearly from ``window_hu`` to [0, 1] and clipped, float32.

    Paper, Table 2: MONAI's ScaleIntensityRange with a_min=-1000, a_max=1000, b_min=0, b_max=1, clip.
    """
    low, high = window_hu
    out = (array - np.float32(low)).astype(np.float32, copy=False)
    out /= np.float32(high - low)
    return np.clip(out, 0.0, 1.0, out=out)


def percentile_range(array: np.ndarray, low: float, high: float, name: str) -> tuple[float, float]:
    """The ``low`` and ``high`` percentiles (0..100) of the nonzero voxels: MR background is stored as zero.

    Raises:
        BadScan: when they coincide, so that the scan has no contrast to scale.
    """
    a, b = np.percentile(array[array != 0], [low, high])
    if not a < b:
        raise BadScan(
            f"{name}: {high - low:g} % of its nonzero voxels are {a:g}; there is no contrast to scale"
        )
    return float(a), float(b)


def to_uint16(unit: np.ndarray) -> np.ndarray:
    """[0, 1] -> 0..65535, rounded; how crops are stored."""
    return np.rint(np.asarray(unit, np.float32) * np.float32(UINT16_MAX)).astype(np.uint16)


def from_uint16(stored: np.ndarray) -> np.ndarray:
    """0..65535 -> float32 in [0, 1]; ``to_uint16`` of it gives ``stored`` back."""
    return stored.astype(np.float32) / np.float32(UINT16_MAX)
