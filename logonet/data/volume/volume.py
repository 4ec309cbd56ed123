"""Scans as arrays in space: NIfTI and DICOM bytes in, orientation, resampling, windowing, NIfTI bytes out.

Shape suffixes: C channels, X Y Z voxel axes. Affines are (4, 4), voxel index -> RAS+ mm.
Bytes come from anywhere, so every decoder treats them as hostile: it refuses with ``BadScan``, in one
sentence that names the file, and before it allocates compares what the file claims to hold with ``max_bytes`` and with
the file's own size (``check_claim``). The peak is four times that claim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import nibabel as nib
import numpy as np

from logonet.core.errors import BadScan


@dataclass(frozen=True)
class Volume:
    """One scan: ``array_CXYZ`` float32 (C, X, Y, Z) in any memory order, and where its voxels lie.

    ``modality`` is what the file itself says ("CT", "MR", ...; None for NIfTI), ``stored_dtype`` the type of
    the voxels in the file. ``note`` says what of the scan's files was left out.
    """

    array_CXYZ: np.ndarray
    affine: np.ndarray
    modality: str | None = None
    stored_dtype: str = "float32"
    note: str = ""

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


def is_usable(affine: np.ndarray) -> bool:
    """Whether voxels have a size and three directions."""
    try:
        check_affine(affine, "")
    except BadScan:
        return False
    return True


def check_affine(affine: np.ndarray, name: str) -> None:
    lengths_mm = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or lengths_mm.min() < 1e-4:
        raise BadScan(f"{name}: its affine is singular or not finite, so voxel sizes are unknown")
    if abs(np.linalg.det(affine[:3, :3] / lengths_mm)) < 1e-3:
        raise BadScan(f"{name}: its affine is singular (two voxel axes point the same way)")


def check_values(array: np.ndarray, name: str, allow_constant: bool = False) -> None:
    low, high = float(array.min()), float(array.max())  # both propagate NaN, and need no temporary array
    if not (math.isfinite(low) and math.isfinite(high)):
        raise BadScan(f"{name}: has voxels that are not finite (NaN or infinity); replace them")
    if low == high and not allow_constant:
        raise BadScan(f"{name}: every voxel is {low:g}; there is nothing in the scan")
