"""Scans as arrays in space: bytes of NIfTI, DICOM, NRRD, MetaImage and MGH in, NIfTI bytes out; orientation,
resampling, windowing.

Shape suffixes: C channels, X Y Z voxel axes. Affines are (4, 4), voxel index -> RAS+ mm.
Bytes come from anywhere, so every decoder treats them as hostile: it refuses with ``BadScan``, in one
sentence that names the file, and before it allocates compares what the file claims to hold with ``max_bytes`` and with
the file's own size (``check_claim``). The peak is four times that claim.
"""

from collections.abc import Sequence

from logonet.data.volume.dicom import decode_dicom
from logonet.data.volume.intensity import (
    JOIN,
    NORMALISATIONS,
    UINT16_MAX,
    LowHigh,
    contrast,
    from_uint16,
    modality,
    percentile_range,
    to_uint16,
    window,
)
from logonet.data.volume.nifti import (
    MAX_BYTES,
    MAX_CHANNELS,
    decode_nifti,
    encode_labels,
    encode_nifti,
    header_grid,
)
from logonet.data.volume.other import ITK_SUFFIXES, decode_other, voxel_files, with_voxels
from logonet.data.volume.resampling import (
    GRID_TOLERANCE_VOX,
    resample,
    resampled_shape,
    stacked,
    to_ras,
    turned,
    worst_shift_mm,
)
from logonet.data.volume.volume import Volume

__all__ = [
    "GRID_TOLERANCE_VOX",
    "JOIN",
    "MAX_BYTES",
    "MAX_CHANNELS",
    "NORMALISATIONS",
    "SUFFIXES",
    "UINT16_MAX",
    "LowHigh",
    "Volume",
    "contrast",
    "decode",
    "decode_dicom",
    "decode_nifti",
    "encode_labels",
    "encode_nifti",
    "from_uint16",
    "header_grid",
    "modality",
    "percentile_range",
    "resample",
    "resampled_shape",
    "stacked",
    "suffix_of",
    "to_ras",
    "to_uint16",
    "turned",
    "voxel_files",
    "window",
    "with_voxels",
    "worst_shift_mm",
]  # fmt: skip

NIFTI_SUFFIXES = (".nii.gz", ".nii")
SUFFIXES = (*NIFTI_SUFFIXES, *ITK_SUFFIXES, ".mgz", ".mgh", ".hdr")  # of files that are scans; DICOM has none


def suffix_of(uri: str) -> str:
    """The ending of ``uri``, as it is written there, if it is one of SUFFIXES; else ""."""
    known = next((s for s in SUFFIXES if uri.lower().endswith(s)), "")
    return uri[len(uri) - len(known) :]


def decode(uri: str, files: Sequence[tuple[str, bytes]], *, allow_constant: bool = False) -> Volume:
    """The scan at ``uri`` from (name, bytes) of its file or of its DICOM slices.

    Args:
        allow_constant: for label maps, which may be empty.

    Raises:
        BadScan: in one sentence that names the file, for anything that is not one 3D scalar image.
    """
    suffix = suffix_of(uri).lower()
    if suffix in NIFTI_SUFFIXES:
        return decode_nifti(files[0][1], files[0][0], allow_constant=allow_constant)
    if suffix:
        return decode_other(files[0][1], files[0][0], allow_constant=allow_constant)
    return decode_dicom(files)
