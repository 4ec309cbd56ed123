"""Other grids of a volume: RAS axes, another voxel size."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import nibabel as nib
import numpy as np

from logonet.core.errors import BadScan
from logonet.data.volume.volume import Volume

MIN_OVERLAP = 0.5  # of a channel that is to be resampled onto the first
GRID_TOLERANCE_VOX = (
    0.1  # between the corners of two grids that are meant to be one: rounding, not misplacement
)


def to_ras(volume: Volume) -> Volume:
    """The same scan with its axes permuted and flipped so that they point nearest to R, A, S.

    No voxel is interpolated: an oblique scan stays oblique, its affine keeps the rotation. The array is
    a view.
    """
    return turned(volume, np.eye(4))


def turned(volume: Volume, affine: np.ndarray) -> Volume:
    """The same scan with its axes permuted and flipped so that they point nearest to those of ``affine``."""
    own, wanted = (nib.orientations.io_orientation(a) for a in (volume.affine, affine))
    turn = nib.orientations.ornt_transform(own, wanted)
    array_XYZC = nib.orientations.apply_orientation(np.moveaxis(volume.array_CXYZ, 0, -1), turn)
    moved = volume.affine @ nib.orientations.inv_ornt_aff(turn, volume.shape_xyz)
    return replace(volume, array_CXYZ=np.moveaxis(array_XYZC, -1, 0), affine=moved)


def same_grid(volume: Volume, other: Volume) -> bool:
    """Whether the voxels of both lie in the same places, up to rounding."""
    shift_mm = worst_shift_mm(volume.shape_xyz, volume.affine, other.affine)
    return other.shape_xyz == volume.shape_xyz and shift_mm <= GRID_TOLERANCE_VOX * min(volume.spacing_mm)


def worst_shift_mm(shape_xyz: Sequence[int], affine: np.ndarray, other: np.ndarray) -> float:
    """The largest distance between where the two affines put a corner of a grid."""
    return float(np.linalg.norm(_corners_mm(shape_xyz, other - affine), axis=0).max())


def _corners_mm(shape_xyz: Sequence[int], affine: np.ndarray) -> np.ndarray:
    """Where ``affine`` puts the centres of a grid's eight outermost voxels, (3, 8)."""
    corners_3N = np.indices((2, 2, 2)).reshape(3, 8) * (np.array(shape_xyz) - 1)[:, None]
    return affine[:3, :3] @ corners_3N + affine[:3, 3:]


def overlap(first: Volume, other: Volume) -> float:
    """The share of the box around the grid of ``first`` that lies in that of ``other``."""
    ends = []
    for scan in (first, other):
        corners_mm = _corners_mm(scan.shape_xyz, scan.affine)
        ends.append((corners_mm.min(1), corners_mm.max(1)))
    (low, high), (other_low, other_high) = ends
    shared = np.clip(np.minimum(high, other_high) - np.maximum(low, other_low), 0, None)
    return float(np.prod(shared / np.maximum(high - low, 1e-6)))


def stacked(channels: Sequence[Volume]) -> Volume:
    """One scan of several channels, on the grid of the first; its ``note`` says which ones were resampled to it.

    Raises:
        BadScan: a channel shows another place.
    """
    from scipy import ndimage

    first, arrays, notes = channels[0], [channels[0].array_CXYZ], [c.note for c in channels if c.note]
    for number, other in enumerate(channels[1:], 1):
        other = turned(other, first.affine)
        if same_grid(first, other):
            arrays.append(other.array_CXYZ)
            continue
        place = np.linalg.inv(other.affine) @ first.affine
        if overlap(first, other) < MIN_OVERLAP:
            raise BadScan(
                f"channel {number} shows another place than channel 0; are they of one examination? List the channels "
                "that belong together"
            )
        options: dict[str, Any] = {"output_shape": first.shape_xyz, "order": 1, "mode": "nearest"}
        arrays += [
            ndimage.affine_transform(a, place[:3, :3], place[:3, 3], **options)[None]
            for a in other.array_CXYZ
        ]
        notes.append(f"channel {number} was resampled to the grid of channel 0")
    return replace(first, array_CXYZ=np.concatenate(arrays), note="; ".join(notes))


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
        channels = [_trilinear(array_XYZ, step, shape_xyz) for array_XYZ in volume.array_CXYZ]
    else:
        from scipy import ndimage

        options: dict[str, Any] = {"order": order, "mode": "nearest", "prefilter": order > 1}
        channels = [
            ndimage.affine_transform(array_XYZ, step, output_shape=shape_xyz, **options)
            for array_XYZ in volume.array_CXYZ
        ]
    affine = volume.affine.copy()
    affine[:3, :3] *= step
    # One channel as a view: a copy of a large scan is seconds.
    array_CXYZ = channels[0][None] if len(channels) == 1 else np.stack(channels)
    return replace(volume, array_CXYZ=array_CXYZ, affine=affine)


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
        taps_Y = list(zip(at_2Y, weight_2Y))
        return [row_XY.take(at_Y, 1) * weight_Y for row_XY in rows for at_Y, weight_Y in taps_Y]

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
