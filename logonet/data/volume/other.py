"""NRRD and MetaImage, read by SimpleITK; FreeSurfer's MGH and pairs of .hdr and .img, read by nibabel.

A header whose voxels lie in another file is joined with them before it is decoded, so that all else knows one file.
No header that is handed on names another file: it could name any file of this machine.
"""

from __future__ import annotations

import io
import math
import os
import re
import tempfile
from collections.abc import Sequence
from typing import Any

import nibabel as nib
import numpy as np

from logonet.core.errors import BadScan
from logonet.data.volume import nifti
from logonet.data.volume.volume import Volume, check_affine, check_values

# What ITK is told to read a file as; it would else try whatever the content looks like.
ITK_READERS = {".nrrd": "NrrdImageIO", ".nhdr": "NrrdImageIO", ".mha": "MetaImageIO", ".mhd": "MetaImageIO"}
ITK_SUFFIXES = tuple(ITK_READERS)
# A header's suffix -> those of the file that has its voxels.
VOXEL_SUFFIXES = {".mhd": (".raw", ".zraw"), ".nhdr": (".raw", ".raw.gz"), ".hdr": (".img", ".img.gz")}
HEADER_BYTES = 1 << 16  # a longer text header is no header
NIFTI_BYTES, NIFTI_PAIR = 348, b"ni1\0"


def voxel_files(uri: str) -> list[str]:
    """Where the voxels of the header ``uri`` may lie; none where the file holds its own."""
    base, suffix = os.path.splitext(uri)
    known = VOXEL_SUFFIXES.get(suffix.lower(), ())
    return [base + (s.upper() if suffix.isupper() else s) for s in known]


def with_voxels(uri: str, header: bytes, name: str, voxels: bytes) -> bytes:
    """One file's bytes of a header and of its voxels, which were read from the file ``name`` beside it.

    Raises:
        BadScan: the header is none, or names another file.
    """
    if uri.lower().endswith(".hdr"):
        voxels = nifti.inflated(voxels, uri, nifti.MAX_BYTES)
        return header[:NIFTI_BYTES].ljust(NIFTI_BYTES + 4, b"\0") + voxels
    lines, _ = _header(uri, header)
    kept = []
    for line in lines:
        if _names_voxels(line):
            named = re.split(rb"[:=]", line, maxsplit=1)[1].strip().decode(errors="replace")
            if named != name:
                raise BadScan(
                    f"{uri}: says that its voxels are in '{named}', not in {name} beside it; rename one"
                )
        else:
            kept.append(line)
    return _with_data(uri, kept, voxels)


def decode_other(
    data: bytes, name: str, *, max_bytes: int = nifti.MAX_BYTES, allow_constant: bool = False
) -> Volume:
    """A 3D scan from the bytes of its file, or of what `with_voxels` gives.

    Raises:
        BadScan: naming the file, for anything that is not one finite, non-constant 3D scalar image.
    """
    try:
        read = _itk if name.lower().endswith(ITK_SUFFIXES) else _nibabel
        array_XYZ, affine = read(data, name, max_bytes)
    except BadScan:
        raise
    except Exception as err:  # both libraries raise whatever they like on damaged files
        reason = " ".join(str(err).split())[-200:]
        raise BadScan(f"{name}: cannot be read ({reason}); convert it to .nii.gz") from None
    dtype = array_XYZ.dtype
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows float32 is refused as non-finite
        array_XYZ = array_XYZ.astype(np.float32)
    check_affine(affine, name)
    check_values(array_XYZ, name, allow_constant)
    return Volume(array_XYZ[None], affine, None, dtype.newbyteorder("=").name)


def _check(name: str, shape: Sequence[int], kind: str, stored: int, max_bytes: int) -> None:
    """Refuse, before the voxels are read, what is no 3D scalar image or claims more than the file can hold."""
    said = "x".join(map(str, shape))
    if len(shape) != 3 or min(shape) < 2:
        raise BadScan(f"{name}: has the shape {said}; only 3D scans can be used")
    if kind:
        raise BadScan(f"{name}: has {kind} voxels; only real scalar images can be used")
    nifti.check_claim(f"{name}: its header claims {said} voxels", 4 * math.prod(shape), stored, max_bytes)


# ------------------------------------------------------------------------------------------- text headers


def _is_nrrd(name: str) -> bool:
    return name.lower().endswith((".nrrd", ".nhdr"))


def _header(name: str, data: bytes) -> tuple[list[bytes], int]:
    """The lines of a text header, without the one that ends it, and where its data begin.

    Raises:
        BadScan: it does not end within HEADER_BYTES, or has line ends that programs read differently.
    """
    lines, at = [], 0
    while at < min(len(data), HEADER_BYTES):
        end = data.find(b"\n", at, HEADER_BYTES)
        end = len(data) if end < 0 else end
        line, at = data[at:end].removesuffix(b"\r"), end + 1
        if b"\r" in line or b"\0" in line:
            break
        lines.append(line)
        if (_is_nrrd(name) and not line) or (not _is_nrrd(name) and _names_voxels(line)):
            return lines if not _is_nrrd(name) else lines[:-1], at
    if _is_nrrd(name) and name.lower().endswith(".nhdr") and at >= len(data) and lines:
        return lines, at  # a detached header need not end with an empty line
    raise BadScan(f"{name}: its header is damaged or none; convert the scan to .nii.gz")


def _names_voxels(line: bytes) -> bool:
    key = re.split(rb"[:=]", line, maxsplit=1)[0].replace(b" ", b"").strip().lower()
    return not line.startswith(b"#") and key in (b"elementdatafile", b"datafile")


def _with_data(name: str, lines: Sequence[bytes], voxels: bytes) -> bytes:
    """A file of one piece."""
    end = b"" if _is_nrrd(name) else b"ElementDataFile = LOCAL"
    return b"\n".join([*lines, end, voxels])


def _of_one_piece(name: str, data: bytes) -> bytes:
    """``data`` with a header that names no other file, whatever program reads it.

    Raises:
        BadScan: it names one.
    """
    lines, begin = _header(name, data)
    named = [line for line in lines if _names_voxels(line)]
    if any(re.split(rb"[:=]", line, maxsplit=1)[1].strip().lower() != b"local" for line in named):
        raise BadScan(f"{name}: says that its voxels are in another file; save the scan as .nii.gz")
    return _with_data(name, [line for line in lines if not _names_voxels(line)], data[begin:])


# ---------------------------------------------------------------------------------------------- libraries


def _itk(data: bytes, name: str, max_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    import SimpleITK as sitk  # half a second

    suffix = os.path.splitext(name)[1].lower()
    with tempfile.TemporaryDirectory(prefix="logonet-scan-") as folder:  # ITK reads files only
        path = os.path.join(folder, "scan.nrrd" if _is_nrrd(name) else "scan.mha")
        with open(path, "xb") as out:
            out.write(_of_one_piece(name, data))
        reader = sitk.ImageFileReader()
        reader.SetImageIO(ITK_READERS[suffix])
        reader.SetFileName(path)
        reader.ReadImageInformation()
        shape = [n for axis, n in enumerate(reader.GetSize()) if axis < 3 or n > 1]
        kind = "colour or vector" if reader.GetNumberOfComponents() > 1 else ""
        _check(name, shape, kind, len(data), max_bytes)
        if reader.GetDimension() > 3:
            reader.SetExtractSize([*reader.GetSize()[:3], *[0] * (reader.GetDimension() - 3)])
        image = reader.Execute()
    array_XYZ = sitk.GetArrayFromImage(image).T
    lps = np.eye(4)
    lps[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    lps[:3, 3] = image.GetOrigin()
    return array_XYZ, np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps


def _nibabel(data: bytes, name: str, max_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    image: Any
    if name.lower().endswith(".hdr"):
        # Its magic tells NIfTI's pair from Analyze, whose header has no place for an orientation.
        kind = nib.Nifti1Pair if data[344:348] == NIFTI_PAIR else nib.Spm2AnalyzeImage
        maps = {"header": io.BytesIO(data[:NIFTI_BYTES]), "image": io.BytesIO(data[NIFTI_BYTES + 4 :])}
        image = kind.from_file_map({key: nib.FileHolder(fileobj=of) for key, of in maps.items()})
    else:
        image = nib.MGHImage.from_bytes(nifti.inflated(data, name, max_bytes))
    shape = [n for axis, n in enumerate(image.shape) if axis < 3 or n > 1]
    dtype = image.get_data_dtype()
    _check(name, shape, "" if dtype.kind in "iuf" else "colour or complex", len(data), max_bytes)
    return np.asarray(image.dataobj).reshape(shape), np.array(image.affine, np.float64)
