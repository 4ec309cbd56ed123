"""NIfTI files as volumes and back; a file that claims more than it holds is refused before memory is spent."""

from __future__ import annotations

import functools
import gzip
import io
import math
import zlib
from typing import Any

import nibabel as nib
import numpy as np

from logonet.core.errors import BadScan
from logonet.data.volume.volume import Volume, check_affine, check_values, is_usable

MAX_BYTES = 8 * 2**30  # of one decoded scan; 1024 x 1024 x 2048 float32 voxels
# A file may claim SMALL_BYTES whatever its own size, an empty label map of a long CT for one; beyond that MAX_EXPANSION
# times its own bytes. Scans shrink 2 to 30 times.
SMALL_BYTES = 2**30
MAX_EXPANSION = 200
GZIP_MAX_RATIO = 1032  # deflate cannot expand further, so a shorter file cannot hold what its header claims
MAX_CHANNELS = 8
VECTORS = {1004, 1005, 1006, 1007}  # NIfTI's intents of matrices, displacements and vectors
TRAILING_BYTES = 2**20  # some writers pad after the last voxel; more than this is not padding
CHUNK_BYTES = 4 * 2**20


def decode_nifti(
    data: bytes, name: str, *, max_bytes: int = MAX_BYTES, allow_constant: bool = False
) -> Volume:
    """A 3D scan from the bytes of a ``.nii`` or ``.nii.gz`` file (its magic tells which).

    ``scl_slope`` and ``scl_inter`` are applied; units other than mm are converted; a 4th axis holds channels.
    ``allow_constant`` is for label maps, which may be empty.

    Raises:
        BadScan: naming ``name``, for anything that is not one finite, non-constant 3D image of real channels.
    """
    # nibabel reads the header; the voxels are mapped here, because nibabel on a stream inflates before any
    # check and holds the raw bytes twice beside a float64 copy.
    stream, limit = _open(data, name)
    head = _read(stream, 352, name)
    header = _header(head, name)
    shape_xyzc, dtype = _shape_xyzc(header, name), _dtype(header, name)
    offset = float(header["vox_offset"]) or 352.0
    if not (352 <= offset < 2**31):
        raise BadScan(f"{name}: its header puts the voxels at byte {offset}; the file is damaged")
    begin = int(offset)
    end = begin + math.prod(shape_xyzc) * dtype.itemsize
    claimed = max(end, math.prod(shape_xyzc) * 4)
    if end > limit and claimed <= max_bytes:
        raise BadScan(f"{name}: truncated; its header claims {end} bytes of voxels; copy the file again")
    claim = f"{name}: its header claims {'x'.join(map(str, shape_xyzc[: 3 + (shape_xyzc[3] > 1)]))} voxels"
    check_claim(claim, claimed, len(data), max_bytes)
    raw = np.empty(end, np.uint8)
    raw[: len(head)] = np.frombuffer(head, np.uint8)
    _fill(stream, raw, len(head), name)
    stored_XYZC = raw[begin:end].view(dtype).reshape(shape_xyzc, order="F")
    array_CXYZ = np.moveaxis(_scaled(stored_XYZC, header, name), -1, 0)
    del raw, stored_XYZC
    for array_XYZ in array_CXYZ:
        check_values(array_XYZ, name, allow_constant)
    return Volume(array_CXYZ, _nifti_affine(header, name), None, dtype.newbyteorder("=").name)


def check_claim(claim: str, claimed: int, stored: int, max_bytes: int = MAX_BYTES) -> None:
    """Refuse bytes that a file of ``stored`` bytes claims to become, before they are allocated.

    Raises:
        BadScan: beginning with ``claim``.
    """
    size = f"{claim} ({claimed / 2**30:.1f} GiB)"
    if claimed > max_bytes:
        raise BadScan(f"{size}, more than the {max_bytes / 2**30:.1f} GiB allowed; split it or leave it out")
    if claimed > max(SMALL_BYTES, MAX_EXPANSION * stored):
        times = f"more than {MAX_EXPANSION} times what the file has ({stored / 2**20:.1f} MiB)"
        raise BadScan(f"{size}, {times}; if that is right, save it without compression")


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


def inflated(data: bytes, name: str, max_bytes: int) -> bytes:
    """``data``, decompressed where it is gzip data.

    Raises:
        BadScan: it is damaged, or becomes too large for what is stored.
    """
    stream, _ = _open(data, name)
    most = min(max_bytes, max(SMALL_BYTES, MAX_EXPANSION * len(data)))
    out = _read(stream, most + 1, name)
    if len(out) > most:
        raise BadScan(
            f"{name}: becomes more than {most / 2**30:.1f} GiB; save it without compression, or split it"
        )
    return out


def _fill(stream: Any, raw: np.ndarray, filled: int, name: str) -> None:
    """Fill ``raw`` from ``filled`` on, then read to the end so that gzip's checksum is verified."""
    while filled < len(raw):
        chunk = _read(stream, min(CHUNK_BYTES, len(raw) - filled), name)
        if not chunk:
            raise BadScan(f"{name}: truncated; it holds {filled} of {len(raw)} bytes; copy the file again")
        raw[filled : filled + len(chunk)] = np.frombuffer(chunk, np.uint8)
        filled += len(chunk)
    if len(_read(stream, TRAILING_BYTES + 1, name)) > TRAILING_BYTES:
        raise BadScan(f"{name}: holds far more bytes than its header claims; one of them is damaged")


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


def _shape_xyzc(header: Any, name: str) -> tuple[int, int, int, int]:
    ndim = int(header["dim"][0])
    dims = tuple(int(n) for n in header["dim"][1 : max(ndim, 0) + 1])
    if not 1 <= ndim <= 7 or min(dims) < 1:
        raise BadScan(f"{name}: its header gives the impossible dimensions {(ndim, *dims)}")
    if math.prod(dims[3:]) > MAX_CHANNELS:
        hint = "that is a time series or a vector field; save what is to be used as 3D files"
        raise BadScan(f"{name}: has {len(dims)} axes {dims}, and more than {MAX_CHANNELS} channels; {hint}")
    if math.prod(dims[3:]) > 1 and (math.prod(dims[4:]) > 1 or int(header["intent_code"]) in VECTORS):
        raise BadScan(f"{name}: is a field of vectors or matrices, not a scan; leave it out")
    if ndim < 3 or min(dims[:3]) < 2:
        raise BadScan(f"{name}: is a 2D image {dims[:3]}; only 3D scans can be used")
    return dims[0], dims[1], dims[2], math.prod(dims[3:])


def _dtype(header: Any, name: str) -> np.dtype:
    try:
        dtype = header.get_data_dtype()
    except (nib.spatialimages.HeaderDataError, KeyError):
        raise BadScan(f"{name}: unknown NIfTI datatype code {int(header['datatype'])}") from None
    if dtype.kind not in "iuf" or not dtype.itemsize:
        kind = "complex" if dtype.kind == "c" else "colour (RGB)" if dtype.fields else "typeless"
        raise BadScan(f"{name}: has {kind} voxels; only real scalar images can be used")
    return dtype


def _scaled(stored_XYZC: np.ndarray, header: Any, name: str) -> np.ndarray:
    """float32 voxels with the header's slope and intercept applied."""
    try:
        slope, inter = header.get_slope_inter()
    except nib.spatialimages.HeaderDataError as err:
        raise BadScan(f"{name}: bad intensity scaling in its header ({err})") from None
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows float32 is refused as non-finite
        if slope is None or (slope, inter) == (1.0, 0.0):
            return stored_XYZC.astype(np.float32)
        # wide integers minus a large intercept would cancel in float32
        work = np.float32 if stored_XYZC.dtype.itemsize <= 2 else np.float64
        array_XYZC = stored_XYZC.astype(work)
        np.multiply(array_XYZC, slope, out=array_XYZC)
        np.add(array_XYZC, inter, out=array_XYZC)
        return array_XYZC.astype(np.float32, copy=False)


def _nifti_affine(header: Any, name: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        try:
            affine = np.array(header.get_best_affine(), np.float64)
            if header["sform_code"] > 0 and header["qform_code"] > 0 and not is_usable(affine):
                affine = np.array(header.get_qform(), np.float64)
        except (nib.spatialimages.HeaderDataError, ValueError, np.linalg.LinAlgError) as err:
            raise BadScan(f"{name}: no usable orientation in its header ({err})") from None
    affine[:3] *= {1: 1e3, 3: 1e-3}.get(int(header["xyzt_units"]) & 7, 1.0)  # metres, micrometres
    check_affine(affine, name)
    return affine


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
    header = _header_of(like, "scan") if like else None
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
    content = header.binaryblock + bytes(4) + labels_XYZ.tobytes(order="F")
    return gzip.compress(content, compresslevel=4, mtime=0)


def _header_of(data: bytes, name: str) -> Any | None:
    """The header at the start of NIfTI-1 bytes, gzipped or not; None for anything else."""
    try:
        stream, _ = _open(data, name)
        return _header(_read(stream, 352, name), name)
    except BadScan:
        return None


def header_grid(data: bytes, name: str) -> tuple[tuple[int, int, int], np.ndarray] | None:
    """Shape and affine that a header gives to voxels that cannot be decoded; None without a usable header."""
    header = _header_of(data, name)
    if header is None or min(header["dim"][1:4]) < 1:
        return None
    x, y, z = map(int, header["dim"][1:4])
    try:
        return (x, y, z), _nifti_affine(header, name)
    except BadScan:
        return None
