"""Where a scan is cut into training crops, and how: pure, and the same for the same seed and scan id.

Shape suffixes: R crops of one scan, K candidate boxes per crop, C channels, X Y Z voxel axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from logonet.core import seeding
from logonet.core.config import Count, Share, SizeVox
from logonet.core.errors import BadScan
from logonet.data import volume
from logonet.data.preprocessing import Preprocessing
from logonet.data.volume import LowHigh, Volume

FOREGROUND = 0.05  # of the intensity range: -900 HU in the default window, so lung counts and air does not
CANDIDATES = 4


@dataclass(frozen=True)
class Config(Preprocessing, key="crops"):
    """How crops are cut, and how scans are prepared before (see `Preprocessing`).

    Attributes:
        size_vox: crop side along X, Y, Z (paper section 4.1: 96 x 96 x 96).
        per_scan: crops of a scan.
        min_image_share: a scan that fills less of a crop than this is refused.
        min_foreground: the first of a few candidate boxes with this share of non-air voxels is taken, else the
            best of them.
        seed: of the crops' positions.
    """

    size_vox: SizeVox = (96, 96, 96)
    per_scan: Count = 4
    min_image_share: Share = 0.25
    min_foreground: Share = 0.1
    seed: int = 0


def crops_of(scan: Volume, modality: str, cfg: Config, scan_id: str) -> np.ndarray:
    """crops_RCXYZ uint16 (65535 x intensity), R = cfg.per_scan, RAS axes.

    Raises:
        BadScan: for a scan too small for a crop or without contrast.
    """
    scan = cfg.to_grid(scan)
    low_high = cfg.intensity_range(scan.array_CXYZ, modality, scan_id)
    corners_R3 = choose_corners(scan.array_CXYZ, low_high, cfg, scan_id)
    crops_RCXYZ = np.empty((cfg.per_scan, scan.array_CXYZ.shape[0], *cfg.size_vox), np.uint16)
    for crop_CXYZ, corner in zip(crops_RCXYZ, corners_R3):
        # cut, then window: the same numbers as windowing the whole scan first, without a copy of it
        cut_CXYZ = cut(scan.array_CXYZ, corner, cfg.size_vox, pad=low_high[0])
        crop_CXYZ[:] = volume.to_uint16(volume.window(cut_CXYZ, low_high))
    return crops_RCXYZ


def image_share(shape_xyz: Sequence[int], cfg: Config) -> float:
    """The share of a crop that a scan of this shape fills."""
    return float(np.prod(np.minimum(shape_xyz, cfg.size_vox) / np.array(cfg.size_vox)))


def candidates(shape_xyz: Sequence[int], cfg: Config, scan_id: str) -> np.ndarray:
    """Lower corners of candidate boxes, int64 (R, K, 3), uniform over the positions where the box fits.

    Along an axis where the scan is shorter than the crop there is one position: the scan in the middle, so the
    corner is negative.

    Raises:
        BadScan: when the scan would fill less than ``cfg.min_image_share`` of the crop.
    """
    share = image_share(shape_xyz, cfg)
    if share < cfg.min_image_share:
        small = f"{tuple(map(int, shape_xyz))} voxels fill {100 * share:.0f} % of a crop of {cfg.size_vox}"
        raise BadScan(f"{scan_id}: is too small, {small}; lower crops.size_vox or crops.spacing_mm")
    room = np.array(shape_xyz) - cfg.size_vox
    size, rng = (cfg.per_scan, CANDIDATES, 3), seeding.rng(cfg.seed, "crop", scan_id)
    corners_RK3 = rng.integers(0, np.maximum(room, 0) + 1, size)
    return np.where(room < 0, room // 2, corners_RK3)


def choose_corners(array_CXYZ: np.ndarray, low_high: LowHigh, cfg: Config, scan_id: str) -> np.ndarray:
    """The lower corners of the crops to cut, int64 (R, 3).

    Of each crop's candidates the first whose foreground share reaches ``cfg.min_foreground`` is taken, else
    the one with the largest: most of a scanner's field is air, which teaches nothing.
    """
    threshold = low_high[0] + FOREGROUND * (low_high[1] - low_high[0])
    chosen = []
    for corners_K3 in candidates(array_CXYZ.shape[1:], cfg, scan_id):
        shares: list[float] = []
        for corner in corners_K3:
            inside = array_CXYZ[(slice(None), *_inside(array_CXYZ.shape[1:], corner, cfg.size_vox))]
            shares.append(np.count_nonzero(inside > threshold) / (len(array_CXYZ) * np.prod(cfg.size_vox)))
            if shares[-1] >= cfg.min_foreground:
                break
        chosen.append(corners_K3[int(np.argmax(shares))])
    return np.stack(chosen)


def cut(array_CXYZ: np.ndarray, corner: Sequence[int], size_vox: Sequence[int], pad: Any = 0.0) -> np.ndarray:
    """The box of ``size_vox`` voxels from its lower ``corner``, (C, *size_vox).

    ``pad`` outside: one value, or (C, 1, 1, 1).
    """
    shape_xyz = array_CXYZ.shape[1:]
    crop_CXYZ = np.full((array_CXYZ.shape[0], *size_vox), pad, array_CXYZ.dtype)
    source = _inside(shape_xyz, corner, size_vox)
    target = tuple(slice(s.start - int(a), s.stop - int(a)) for s, a in zip(source, corner))
    crop_CXYZ[(slice(None), *target)] = array_CXYZ[(slice(None), *source)]
    return crop_CXYZ


def _inside(shape_xyz: Sequence[int], corner: Sequence[int], size_vox: Sequence[int]) -> tuple[slice, ...]:
    """The part of a box that lies within the scan."""
    return tuple(slice(max(int(a), 0), min(int(a) + m, n)) for a, m, n in zip(corner, size_vox, shape_xyz))
