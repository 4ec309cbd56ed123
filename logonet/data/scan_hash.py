"""Two hashes of a scan's voxels: an exact digest, and a perceptual hash that survives a change of format.

``SAME`` is chosen from 205 real scans (200 hippocampus MRs of the Medical Segmentation Decathlon, which look
alike, three CTs and two MRs of other parts; all 20,910 pairs). The largest similarity of two different scans is
0.73. The smallest of a scan and its copy is 0.96 after resampling to 1.5 times the spacing, with or without
permuted and flipped axes, 0.90 at twice the spacing, 0.97 after clipping to percentiles 1..99 in 8 bits or a
square root of the intensities, 0.99 with noise of 0.2 standard deviations. A CT cut to a narrow window falls to
0.75: such a copy is not recognised, nor is a cropped one. ``tests/test_scan_hash.py`` repeats the measurement.

Shape suffixes: X Y Z voxel axes in RAS order; I J K cells of the hash's grid; N scans, P cells of one hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from logonet.core.errors import UserError
from logonet.data import volume
from logonet.data.volume import Volume

GRID = 12  # cells along each axis
SMOOTH_CELLS = 1.0  # sigma of the smooth part that is taken away: the body plan that scans share
LEVELS = 16  # one hex digit per cell
CLIP_SD = 2.0  # first and last level, in standard deviations
SAME = 0.85  # see above


def voxel_sha256(scan: Volume) -> str:
    """SHA-256 of the shape and the float32 voxels in RAS axes: 64 hex digits.

    Equal whatever the container, compression, stored type, axis order or header text, as long as decoding
    gives the same values; the affine counts only for the axes it names, not for spacing or origin.
    """
    array_CXYZ = volume.to_ras(scan).array_CXYZ
    digest = hashlib.sha256(repr(tuple(map(int, array_CXYZ.shape[1:]))).encode())
    # slice by slice along S: NIfTI voxels lie that way, so no second copy of the scan is made
    for slice_YX in (slice_YX for array_XYZ in array_CXYZ for slice_YX in array_XYZ.T):
        plain_YX = np.ascontiguousarray(slice_YX, dtype="<f4") + np.float32(0)  # -0.0 and 0.0 are one value
        digest.update(plain_YX.data)
    return digest.hexdigest()


def perceptual_hash(scan: Volume) -> str:
    """A coarse 3D picture of the scan's first channel: GRID^3 hex digits, x slowest, in RAS axes.

    The box between the outermost voxel centres is averaged into GRID^3 cells, a smooth version is taken
    away, and what is left is divided by its standard deviation and rounded to 16 levels. So it survives
    resampling, permuted and flipped axes, a linear change of intensities, and noise; not cropping.
    """
    from scipy import ndimage

    # the array as stored, not its RAS view: permuting 12^3 cells is free, permuting the voxels is not
    cells = scan.array_CXYZ[0]
    for axis in reversed(range(3)):
        cells = np.moveaxis(np.tensordot(_weights(cells.shape[axis]), cells, (1, axis)), 0, axis)
    cells_IJK = volume.to_ras(Volume(cells[None], scan.affine)).array_CXYZ[0].astype(np.float64)
    detail_IJK = cells_IJK - ndimage.gaussian_filter(cells_IJK, SMOOTH_CELLS, mode="nearest")
    detail_IJK -= detail_IJK.mean()
    detail_IJK /= max(float(detail_IJK.std()), np.finfo(np.float32).tiny)
    levels = np.floor((detail_IJK / CLIP_SD + 1) * (LEVELS / 2)).clip(0, LEVELS - 1).astype(int)
    return "".join(f"{v:x}" for v in levels.ravel())


def _weights(n: int) -> np.ndarray:
    """(GRID, n) float32: row i averages the linear interpolant of n samples over its share of [0, n - 1]."""
    if n == 1:
        return np.ones((GRID, 1), np.float32)
    edges = np.linspace(0, n - 1, GRID + 1)
    # integral of every sample's hat function up to each edge
    u = np.clip(edges[:, None] - np.arange(n)[None], -1, 1)
    integral = np.where(u < 0, 0.5 * (1 + u) ** 2, 1 - 0.5 * (1 - u) ** 2)
    weights = np.diff(integral, axis=0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def unit_rows(hashes: Sequence[str]) -> np.ndarray:
    """rows_NP float32, centred and of unit length, so that a product of two rows is their similarity.

    Raises:
        UserError: for hashes of another grid than ours.
    """
    if any(len(h) != GRID**3 or not h.isascii() for h in hashes):
        raise UserError("the manifest's hashes are of another version of logonet; import its scans again")
    digits = np.frombuffer("".join(hashes).encode(), np.uint8).reshape(len(hashes), -1)
    levels = np.where(digits >= ord("a"), digits - np.uint8(ord("a") - 10), digits - np.uint8(ord("0")))
    rows_NP = levels.astype(np.float32)
    rows_NP -= rows_NP.mean(1, keepdims=True)
    return rows_NP / np.maximum(np.linalg.norm(rows_NP, axis=1, keepdims=True), 1e-6)
