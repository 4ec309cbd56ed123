"""Largest components against a flood fill, and which classes they are kept of."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from logonet.core.errors import UserError
from logonet.inference import metrics, model, postprocessing

NEIGHBOURS = [step for step in itertools.product((-1, 0, 1), repeat=3) if any(step)]


def slow_components(mask_XYZ: np.ndarray) -> list[set[tuple[int, ...]]]:
    """Connected sets of voxels, by flood fill, in the order of their first voxels."""
    left = {tuple(map(int, voxel)) for voxel in np.argwhere(mask_XYZ)}
    found = []
    while left:
        part, front = set(), [min(left)]
        left -= set(front)
        while front:
            voxel = front.pop()
            part.add(voxel)
            near = {tuple(v + s for v, s in zip(voxel, step)) for step in NEIGHBOURS} & left
            left -= near
            front += near
        found.append(part)
    return found


@pytest.mark.parametrize("share", [0.02, 0.08, 0.3])
def test_the_largest_component_equals_a_flood_fill(share: float) -> None:
    mask_XYZ = np.random.default_rng(int(100 * share)).random((9, 11, 8)) < share
    parts = slow_components(mask_XYZ)
    largest = max(parts, key=len)  # the first of equal ones
    got = {tuple(map(int, voxel)) for voxel in np.argwhere(postprocessing.largest_component(mask_XYZ))}
    assert got == largest
    assert len(parts) > 1


@pytest.mark.parametrize("order", ["C", "F"])
def test_one_class_loses_its_pieces_and_others_stay(order: Any) -> None:
    labels_XYZ = np.asarray(np.random.default_rng(0).integers(0, 4, (7, 8, 6)), np.uint8, order=order)
    before = labels_XYZ.copy()
    kept = postprocessing.largest_component(np.isin(before, (1, 3)))
    postprocessing.keep_largest(labels_XYZ, (1, 3), 0)
    np.testing.assert_array_equal(labels_XYZ, np.where(np.isin(before, (1, 3)) & ~kept, 0, before))
    apart = np.zeros((9, 3, 3), np.uint8)
    apart[[0, 5, 6]], apart[2, 1, 1] = 7, 3
    postprocessing.keep_largest(apart, (7,), 9)
    assert (apart[0] == 9).all() and (apart[5:7] == 7).all() and apart[2, 1, 1] == 3
    postprocessing.keep_largest(apart, (5,), 9)  # which is not there
    assert set(np.unique(apart)) == {0, 3, 7, 9}


def test_dice_of_the_largest_is_that_of_the_changed_map() -> None:
    rng = np.random.default_rng(1)
    found, truth = (rng.choice([0, 2, 5], (8, 7, 9), p=[0.8, 0.1, 0.1]).astype(np.uint8) for _ in range(2))
    changed = found.copy()
    postprocessing.keep_largest(changed, (2,), 0)
    (row,) = metrics.case_rows(changed, truth, (1.0, 1.0, 1.0), {"liver": (2,)}, "a")
    assert postprocessing.dice_of_largest(found, truth, (2,)) == row["dice"]
    assert math.isnan(postprocessing.dice_of_largest(found, truth, (3,)))


def test_it_is_kept_only_where_the_mean_rises() -> None:
    gains = {"liver": [0.1, 0.1, -0.05], "spleen": [0.0, 0.0, 0.0], "tumour": [0.02, -0.3, math.nan]}
    rows = [
        {"class": name, "dice": 0.6 + 0 * gain, postprocessing.LARGEST: 0.6 + gain}
        for name, of_cases in gains.items()
        for gain in of_cases
    ]
    decided = postprocessing.decide(pd.DataFrame(rows)).set_index("class")
    assert decided["largest_component"].to_dict() == {"liver": True, "spleen": False, "tumour": False}
    assert decided["cases"].to_dict() == {"liver": 3, "spleen": 3, "tumour": 2}
    assert decided.loc["liver", postprocessing.LARGEST] == pytest.approx(0.65)


def test_a_model_keeps_components_of_its_own_classes_only() -> None:
    values: dict[str, Any] = {
        "in_channels": 1,
        "size_vox": (32, 32, 32),
        "modality": "CT",
        "spacing_mm": None,
    }
    values |= {"window_hu": (-100.0, 200.0), "mr_percentiles": (1.0, 99.0), "backbone": {"name": "unet"}}
    values |= {"classes": ("background", "liver"), "label_values": (0, 1)}
    assert model.Spec(**values, largest_component=("liver",)).largest_component == ("liver",)
    with pytest.raises(UserError, match=r"unknown class of largest_component 'livr'; did you mean 'liver'"):
        model.Spec(**values, largest_component=("livr",))
