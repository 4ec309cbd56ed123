"""Validation Dice of cases, and what follows from it: the best step, when to stop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from logonet.data import classes
from logonet.inference import metrics
from logonet.training.config import Config


def case_dice(
    found_XYZ: np.ndarray, truth_XYZ: np.ndarray, num_classes: int, regions: Sequence[Sequence[int]] = ()
) -> list[float]:
    """Dice of each class but background; NaN where neither has it, so that it is left out of means.

    Args:
        regions: the class indices of each region; ``found_XYZ`` are then bits, and Dice is that of each region.
    """
    if not regions:
        return metrics.dice(metrics.overlap(found_XYZ, truth_XYZ, num_classes))[1:].tolist()
    inside = classes.membership(regions)[truth_XYZ]
    known = truth_XYZ != classes.IGNORE
    pairs = [(found_XYZ[known] >> r & 1, inside[known] >> r & 1) for r in range(len(regions))]
    return [float(metrics.dice(metrics.overlap(found, truth, 2))[1]) for found, truth in pairs]


def best_step(history: Sequence[dict[str, Any]]) -> int | None:
    """The step of the first entry with the highest validation Dice; None when nothing was validated."""
    measured = [e for e in history if math.isfinite(e.get("val_dice", math.nan))]
    return max(measured, key=lambda e: (e["val_dice"], -e["step"]))["step"] if measured else None


def out_of_patience(history: Sequence[dict[str, Any]], cfg: Config) -> bool:
    """Whether the last ``cfg.patience`` validations brought nothing better."""
    best = best_step(history)
    if cfg.patience is None or best is None:
        return False
    return sum("val_dice" in e and e["step"] > best for e in history) >= cfg.patience
