"""Scans as arrays in space: NIfTI and DICOM bytes in, orientation, resampling, windowing, NIfTI bytes out.

Shape suffixes: C channels (always 1 here), X Y Z voxel axes. Affines are (4, 4), voxel index -> RAS+ mm.
Bytes come from anywhere, so every decoder treats them as hostile: it refuses with ``BadScan``, in one
sentence that names the file, and before it allocates compares what the file claims to hold with ``max_bytes`` and with
the file's own size (``check_claim``). The peak is four times that claim.
"""

from logonet.data.volume.dicom import decode_dicom
from logonet.data.volume.intensity import (
    UINT16_MAX,
    from_uint16,
    modality,
    percentile_range,
    to_uint16,
    window,
)
from logonet.data.volume.nifti import MAX_BYTES, decode_nifti, encode_labels, encode_nifti, header_grid
from logonet.data.volume.resampling import resample, resampled_shape, to_ras
from logonet.data.volume.volume import Volume

__all__ = [
    "MAX_BYTES", "UINT16_MAX", "Volume", "decode_dicom", "decode_nifti", "encode_labels", "encode_nifti",
    "from_uint16", "header_grid", "modality", "percentile_range", "resample", "resampled_shape", "to_ras", "to_uint16",
    "window",
]  # fmt: skip
