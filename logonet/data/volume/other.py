"""NRRD and MetaImage, read by SimpleITK; FreeSurfer's MGH and pairs of .hdr and .img, read by nibabel."""

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

ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
# A header's suffix -> those of the file that has its voxels.
VOXEL_FILES = {".mhd": (".raw", ".zraw"), ".nhdr": (".raw", ".raw.gz"), ".hdr": (".img", ".img.gz")}
# The header's line that names the file of the voxels, in MetaImage and in NRRD.
_VOXELS_IN = re.compile(rb"^\s*(?:ElementDataFile\s*=|data ?file:)\s*(.*?)\s*$", re.IGNORECASE | re.MULTILINE)
_HEADER_BYTES = 1 << 20


def decode_other(
    files: Sequence[tuple[str, bytes]], *, max_bytes: int = nifti.MAX_BYTES, allow_constant: bool = False
) -> Volume:
    """A 3D scan from (name, bytes) of its file, or of its header and then its voxels.

    Raises:
        BadScan: naming the first file, for anything that is not one finite, non-constant 3D scalar image.
    """
    name = files[0][0]
    try:
        read = _itk if name.lower().endswith(ITK_SUFFIXES) else _nibabel
        array_XYZ, affine = read(files, max_bytes)
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


def _itk(files: Sequence[tuple[str, bytes]], max_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    import SimpleITK as sitk  # half a second

    name, header = files[0]
    named = _VOXELS_IN.search(header[:_HEADER_BYTES])
    beside = [os.path.basename(n) for n, _ in files[1:]]
    if named and named[1].lower() not in (b"local", b""):
        wanted = named[1].decode(errors="replace")
        # Never another path: a header could name any file of this machine.
        if wanted not in beside:
            raise BadScan(
                f"{name}: says that its voxels are in '{wanted}', which is not beside it; copy that file there, or "
                "save the scan as .nii.gz"
            )
    with tempfile.TemporaryDirectory(prefix="logonet-scan-") as folder:  # ITK reads files only
        for file, data in files:
            with open(os.path.join(folder, os.path.basename(file)), "xb") as out:
                out.write(data)
        reader = sitk.ImageFileReader()
        reader.SetFileName(os.path.join(folder, os.path.basename(name)))
        reader.ReadImageInformation()
        shape = [n for axis, n in enumerate(reader.GetSize()) if axis < 3 or n > 1]
        kind = "colour or vector" if reader.GetNumberOfComponents() > 1 else ""
        _check(name, shape, kind, sum(len(data) for _, data in files), max_bytes)
        if reader.GetDimension() > 3:
            reader.SetExtractSize([*reader.GetSize()[:3], *[0] * (reader.GetDimension() - 3)])
        image = reader.Execute()
    array_XYZ = sitk.GetArrayFromImage(image).T
    lps = np.eye(4)
    lps[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    lps[:3, 3] = image.GetOrigin()
    return array_XYZ, np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps


def _nibabel(files: Sequence[tuple[str, bytes]], max_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    name, data = files[0]
    image: Any
    if len(files) > 1:
        # Its magic tells NIfTI's pair from Analyze, whose header has no place for an orientation.
        kind = nib.Nifti1Pair if data[344:348] == b"ni1\0" else nib.Spm2AnalyzeImage
        voxels = nifti.inflated(files[1][1], files[1][0], max_bytes)
        maps = {"header": io.BytesIO(data), "image": io.BytesIO(voxels)}
        image = kind.from_file_map({key: nib.FileHolder(fileobj=of) for key, of in maps.items()})
    else:
        data = nifti.inflated(data, name, max_bytes)
        image = nib.MGHImage.from_bytes(data)
    shape = [n for axis, n in enumerate(image.shape) if axis < 3 or n > 1]
    dtype = image.get_data_dtype()
    _check(
        name,
        shape,
        "" if dtype.kind in "iuf" else "colour or complex",
        sum(len(d) for _, d in files),
        max_bytes,
    )
    return np.asarray(image.dataobj).reshape(shape), np.array(image.affine, np.float64)
