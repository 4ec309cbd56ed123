"""How good a segmentation is: overlap and surface distances of each case and class, and their statistics.

Per case and class: Dice, the 95th percentile Hausdorff distance (HD95) and the normalised surface Dice (NSD).
Over cases: means with bootstrap confidence intervals, and paired comparisons of two models.

**Surface**: the foreground voxels of which at least one of the 6 face neighbours is not foreground. What
lies outside the array counts as background, as it does for MONAI and medpy, so an organ that the scan cuts
off has a surface at the cut.

**HD95** comes in the two conventions of the literature. ``hd95``: the larger of the two directed 95th
percentiles (MONAI; MedContext Eq. 8). ``hd95_pooled``: the 95th percentile of both directions' distances
together (medpy, hence the tables of nnFormer and MedContext's code, which give medpy no spacing: they are
in voxels). Each in mm and in voxels.

**NSD** at tolerance t: the share of both surfaces' voxels that lie within t mm of the other surface.

**Empty masks**: see ``EMPTY_DICE`` and ``under_rules``. Rows are kept under the default rule with a note of
what was empty, so that any published rule can be applied afterwards.

Shapes: X Y Z voxel axes, P points, N cases, C classes, R resamples of the cases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

from logonet.core.errors import UserError
from logonet.data.classes import IGNORE

HD95 = ("hd95_mm", "hd95_pooled_mm", "hd95_vox", "hd95_pooled_vox")
NSD_MM = {"nsd_1mm": 1.0, "nsd_2mm": 2.0}
METRICS = ("dice", *HD95, *NSD_MM, "volume_error_ml")
# Spacings come out of float32 headers: two surfaces 1 mm apart may be 1.0000001 mm apart.
SLACK_MM = 1e-5
# A k-d tree costs about 1 us per point, and more for points far from the surface; a distance transform
# about 0.05 us per voxel of the box, and 12 bytes.
POINTS_WORTH_A_TRANSFORM = 1 / 20


# ---------------------------------------------------------------------------------------- one case


# Dice where (truth and prediction, truth alone) are empty; it is 0 where the prediction alone is.
# default: as nnU-Net v2 and the MSD challenge. nnformer: its inference_*.py, also MONAI with ignore_empty=False.
# unetr: its and MedContext's test scripts. monai: DiceMetric's own default.
EMPTY_DICE = {
    "default": (math.nan, 0.0),
    "nnformer": (1.0, 0.0),
    "unetr": (0.0, 0.0),
    "monai": (math.nan, math.nan),
}


def overlap(found: np.ndarray, truth: np.ndarray, num_classes: int) -> np.ndarray:
    """Voxel counts (2, K) of each class index: those that both maps give it, and those of either map, added up.

    Where the truth is IGNORE, voxels do not count.
    """
    if (known := truth != IGNORE).sum() < truth.size:
        found, truth = found[known], truth[known]
    both_K, found_K, truth_K = (
        np.bincount(indices.ravel(), minlength=num_classes)
        for indices in (truth[found == truth], found, truth)
    )
    return np.stack([both_K, found_K + truth_K])


def dice(overlap_2K: np.ndarray) -> np.ndarray:
    """Dice of each class (K,) from the counts of `overlap`; NaN where neither map has it."""
    both_K, sizes_K = overlap_2K
    return np.where(sizes_K > 0, 2 * both_K / np.maximum(sizes_K, 1), np.nan)


def surface(mask_XYZ: np.ndarray) -> np.ndarray:
    """The mask without its 6-connected erosion: bool, same shape."""
    inner_XYZ = mask_XYZ.copy()
    for axis in range(mask_XYZ.ndim):
        inner, mask = (np.moveaxis(array_XYZ, axis, 0) for array_XYZ in (inner_XYZ, mask_XYZ))
        inner[1:] &= mask[:-1]
        inner[:-1] &= mask[1:]
        inner[[0, -1]] = False
    return mask_XYZ & ~inner_XYZ


def distances(from_XYZ: np.ndarray, to_XYZ: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Euclidean distance from each voxel of one surface to the nearest voxel of another, shape (P,).

    Args:
        from_XYZ, to_XYZ: bool; neither is empty.
        spacing: size of a voxel along each axis; the distances have its unit.
    """
    scale = np.asarray(spacing, dtype=np.float64)
    from_P3 = np.argwhere(from_XYZ)
    apart_P = ~to_XYZ[from_XYZ]
    out_P = np.zeros(len(from_P3))
    far_P3 = from_P3[apart_P]
    if not len(far_P3):
        return out_P
    if len(far_P3) > POINTS_WORTH_A_TRANSFORM * to_XYZ.size:
        # Only the indices: the distances themselves would be another 50 bytes per voxel of the box.
        only_indices = {"return_distances": False, "return_indices": True}
        nearest = ndimage.distance_transform_edt(~to_XYZ, sampling=scale, **only_indices)
        steps_P3 = nearest[(slice(None), *far_P3.T)].T - far_P3
        out_P[apart_P] = np.linalg.norm(steps_P3 * scale, axis=1)
    else:
        # Unbalanced: built sooner, and on a lattice of voxels searched up to three times faster.
        tree = KDTree(np.argwhere(to_XYZ) * scale, leafsize=32, compact_nodes=False, balanced_tree=False)
        out_P[apart_P] = tree.query(far_P3 * scale)[0]
    return out_P


def score(pred_XYZ: np.ndarray, truth_XYZ: np.ndarray, spacing_mm: Sequence[float]) -> dict[str, Any]:
    """All scores of one mask against another, under the default rule for empty masks.

    Args:
        pred_XYZ, truth_XYZ: bool, on one grid.
        spacing_mm: distance between voxel centres along each axis.

    Returns:
        ``dice``; ``hd95_mm``, ``hd95_pooled_mm``, ``hd95_vox``, ``hd95_pooled_vox`` (NaN unless both masks have
        voxels); ``nsd_1mm``, ``nsd_2mm`` (NaN if neither has, 0 if one has); ``volume_pred_ml``,
        ``volume_truth_ml``, ``volume_error_ml`` (prediction minus truth); ``empty``: "neither", "truth",
        "prediction" or "both".

    Raises:
        UserError: the shapes differ or the spacing is no spacing.
    """
    _check_grid(pred_XYZ, truth_XYZ, spacing_mm, "the masks")
    voxel_ml = math.prod(spacing_mm) / 1000
    num_pred, num_truth = int(np.count_nonzero(pred_XYZ)), int(np.count_nonzero(truth_XYZ))
    volumes = {
        "volume_pred_ml": num_pred * voxel_ml,
        "volume_truth_ml": num_truth * voxel_ml,
        "volume_error_ml": (num_pred - num_truth) * voxel_ml,
    }
    if not (num_pred and num_truth):
        empty = "both" if not (num_pred or num_truth) else "prediction" if num_truth else "truth"
        both, truth_alone = EMPTY_DICE["default"]
        score = {"both": both, "truth": truth_alone, "prediction": 0.0}[empty]
        missing = dict.fromkeys(HD95, math.nan) | dict.fromkeys(NSD_MM, math.nan if empty == "both" else 0.0)
        return {"dice": score, **missing, **volumes, "empty": empty}

    num_shared = int(np.count_nonzero(pred_XYZ & truth_XYZ))
    pred_surface_XYZ, truth_surface_XYZ = surface(pred_XYZ), surface(truth_XYZ)

    def both_ways(spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        there_P = distances(pred_surface_XYZ, truth_surface_XYZ, spacing)
        return there_P, distances(truth_surface_XYZ, pred_surface_XYZ, spacing)

    def hd95(there_P: np.ndarray, back_P: np.ndarray) -> tuple[float, float]:
        pooled = np.percentile(np.concatenate([there_P, back_P]), 95)
        return float(max(np.percentile(there_P, 95), np.percentile(back_P, 95))), float(pooled)

    there_P, back_P = both_ways(spacing_mm)
    in_mm = hd95(there_P, back_P)
    if len(set(spacing_mm)) == 1:
        in_vox = (in_mm[0] / spacing_mm[0], in_mm[1] / spacing_mm[0])
    else:
        in_vox = hd95(*both_ways((1.0, 1.0, 1.0)))
    both_P = np.concatenate([there_P, back_P])
    return {
        "dice": 2 * num_shared / (num_pred + num_truth),
        **dict(zip(HD95, (*in_mm, *in_vox))),
        **{name: float(np.mean(both_P <= within_mm + SLACK_MM)) for name, within_mm in NSD_MM.items()},
        **volumes,
        "empty": "neither",
    }


def case_rows(
    pred_XYZ: np.ndarray,
    truth_XYZ: np.ndarray,
    spacing_mm: Sequence[float],
    scored: Mapping[str, Sequence[int]],
    scan_id: str,
) -> list[dict[str, Any]]:
    """The rows of one scan: ``scan_id``, ``value``, ``class`` and what ``score`` gives.

    Args:
        pred_XYZ, truth_XYZ: label values, whole numbers of any dtype, on one grid.
        spacing_mm: of that grid.
        scored: name -> its label values: one of a class, several of a region (BraTS's WT, TC, ET). ``value`` is the
            one value, or -1. 0 is background and has no row; values without a name are background too.
        scan_id: as the manifest has it.

    Raises:
        UserError: naming the scan, when shapes differ, or labels are not whole numbers.
    """
    _check_grid(pred_XYZ, truth_XYZ, spacing_mm, f"scan {scan_id}")
    pred_XYZ, truth_XYZ = (_whole(labels, scan_id) for labels in (pred_XYZ, truth_XYZ))
    largest = max((value for values in scored.values() for value in values), default=0)
    pred_boxes, truth_boxes = (ndimage.find_objects(labels, largest) for labels in (pred_XYZ, truth_XYZ))
    rows = []
    for name, values in scored.items():
        # Most organs fill a few per cent of a scan: nothing below looks outside the box of both masks.
        box_XYZ = _union([boxes[value - 1] for value in values for boxes in (pred_boxes, truth_boxes)])
        pred, truth = (np.isin(labels[box_XYZ], values) for labels in (pred_XYZ, truth_XYZ))
        value = values[0] if len(values) == 1 else -1
        rows.append({"scan_id": scan_id, "value": value, "class": name, **score(pred, truth, spacing_mm)})
    return rows


def _check_grid(pred_XYZ: np.ndarray, truth_XYZ: np.ndarray, spacing_mm: Sequence[float], what: str) -> None:
    if pred_XYZ.shape != truth_XYZ.shape or truth_XYZ.ndim != 3:
        raise UserError(
            f"{what}: the prediction has shape {pred_XYZ.shape} and the truth {truth_XYZ.shape}; "
            "both must be 3D labels on one grid"
        )
    if len(spacing_mm) != 3 or not all(math.isfinite(s) and s > 0 for s in spacing_mm):
        raise UserError(f"{what}: the spacing is {tuple(spacing_mm)}; set three positive lengths in mm")


def _whole(labels_XYZ: np.ndarray, scan_id: str) -> np.ndarray:
    """Labels of an integer dtype: decoders give float32."""
    if labels_XYZ.dtype.kind in "iu":
        return labels_XYZ
    whole_XYZ = labels_XYZ.astype(np.int32)
    if not np.array_equal(whole_XYZ, labels_XYZ):
        raise UserError(f"scan {scan_id}: some labels are not whole numbers; evaluate label maps, not scores")
    return whole_XYZ


def _union(boxes: Sequence[tuple[slice, ...] | None]) -> tuple[slice, ...]:
    found = [box for box in boxes if box is not None]
    if not found:
        return (slice(0, 0),) * 3
    return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*found))


def volumes_ml(
    labels_XYZ: np.ndarray, affine: np.ndarray, classes: Mapping[int, str], digits: int
) -> dict[str, float]:
    """Class -> ml in a label map of uint8."""
    voxel_ml = abs(float(np.linalg.det(affine[:3, :3]))) / 1000
    counts = np.bincount(labels_XYZ.ravel(order="K"), minlength=256)
    return {name: round(float(counts[value]) * voxel_ml, digits) for value, name in classes.items()}
