"""Post-processing of label maps: of a class only its largest connected component, where validation cases gain by it.

As in nnU-Net (Isensee et al. 2021): organs are in one piece, so what lies apart is most often a mistake. Whether that
holds for a class is decided on validation cases, class by class.

Shapes: X Y Z voxel axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import ndimage

CONNECTED = np.ones((3, 3, 3), bool)  # voxels that share a corner are connected, as in nnU-Net and MONAI
LARGEST = "dice_largest_component"  # column of scores: Dice if only the class's largest component were kept


def largest_component(mask_XYZ: np.ndarray) -> np.ndarray:
    """The largest connected component of a bool mask; of equal ones the first in C order."""
    labelled_XYZ, count = ndimage.label(mask_XYZ, CONNECTED)
    if count < 2:
        return mask_XYZ
    return labelled_XYZ == 1 + np.bincount(labelled_XYZ.ravel())[1:].argmax()


def keep_largest(labels_XYZ: np.ndarray, values: Sequence[int], background: int) -> None:
    """Set what is not in the largest component to ``background``, in place.

    Args:
        labels_XYZ: a label map.
        values: of the class, or of all classes of a region.
    """
    mask_XYZ = np.isin(labels_XYZ, values)
    (box,) = ndimage.find_objects(mask_XYZ.view(np.uint8), 1)
    if box is not None:
        inside_XYZ = mask_XYZ[box]
        labels_XYZ[box][inside_XYZ & ~largest_component(inside_XYZ)] = background


def dice_of_largest(found_XYZ: np.ndarray, truth_XYZ: np.ndarray, values: Sequence[int]) -> float:
    """Dice of a class, or region, if only its largest component were kept; NaN where neither map has it."""
    found_XYZ, truth_XYZ = largest_component(np.isin(found_XYZ, values)), np.isin(truth_XYZ, values)
    size = int(found_XYZ.sum()) + int(truth_XYZ.sum())
    return 2 * int((found_XYZ & truth_XYZ).sum()) / size if size else math.nan


def decide(scores: pd.DataFrame) -> pd.DataFrame:
    """Of which classes the largest component is kept: those whose mean Dice over the cases rises.

    Args:
        scores: a row a validation case and class, with ``class``, ``dice`` and LARGEST.

    Returns:
        A row a class, in their order: ``class``, ``cases``, both means, ``largest_component`` (bool).
    """
    columns = scores.groupby("class", sort=False)[["dice", LARGEST]]
    decided = columns.mean().assign(cases=columns.count()["dice"])
    decided["largest_component"] = decided[LARGEST] > decided["dice"]
    return decided.reset_index()[["class", "cases", "dice", LARGEST, "largest_component"]]
