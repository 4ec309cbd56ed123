"""Scores of one big scan: ours against MONAI's functions on the same label maps.

    OMP_NUM_THREADS=1 python benchmarks/metrics.py [--shape 512 512 400] [--classes 14] [--spacing 0.8 0.8 1.0]

The truth is ellipsoids of organ-like sizes, the prediction the same with wavy borders and a stray piece far
away from each, so that boxes are large: about what a trained network gives. Ours is one call of ``case_rows``:
Dice, HD95 in both conventions in mm and in voxels, NSD at two tolerances, volumes. MONAI's is what gives its
part of them: ``compute_dice``, ``compute_hausdorff_distance`` (one convention, mm) and ``compute_surface_dice``
twice. MONAI gets one class at a time, since its one-hot float32 copies of all would not fit in memory; cutting
the masks out is not in its cost. Both must agree. Linux alone (peaks of memory come from /proc).
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
from rich.console import Console
from rich.table import Table
from torch import Tensor

from logonet.core import seeding
from logonet.inference import metrics

T = TypeVar("T")


def paint(
    labels_XYZ: np.ndarray, value: int, centre: np.ndarray, radii: np.ndarray, wave: np.ndarray | None
) -> None:
    """An ellipsoid, its radius varied with the direction by a few per cent where ``wave`` is given."""
    reach = radii * 1.3
    low = np.maximum(np.floor(centre - reach), 0).astype(int)
    high = np.minimum(np.ceil(centre + reach) + 1, labels_XYZ.shape).astype(int)
    box = tuple(slice(start, stop) for start, stop in zip(low, high))
    axes = [
        ((np.arange(start, stop) - c) / r).astype(np.float32)
        for start, stop, c, r in zip(low, high, centre, radii)
    ]
    x, y, z = np.ix_(*axes)
    distance = np.sqrt(x**2 + y**2 + z**2)
    if wave is not None:
        distance = distance + 0.03 * (np.sin(wave[0] * x + wave[1]) + np.sin(wave[2] * y + wave[3] * z))
    labels_XYZ[box][distance < 1] = value


def make_case(shape_xyz: Sequence[int], num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(prediction, truth) uint8: organs from a thirtieth to a sixth of the scan in radius."""
    rng = seeding.rng(0, "metrics")
    pred_XYZ, truth_XYZ = (np.zeros(shape_xyz, np.uint8) for _ in range(2))
    size = np.array(shape_xyz)
    for value, share in zip(range(1, num_classes), np.geomspace(1 / 6, 1 / 30, num_classes - 1)):
        centre, radii = size * rng.uniform(0.25, 0.75, 3), size * share * rng.uniform(0.7, 1.0, 3)
        paint(truth_XYZ, value, centre, radii, None)
        paint(pred_XYZ, value, centre + rng.uniform(-1, 1, 3), radii, rng.uniform(4, 9, 4))
        paint(pred_XYZ, value, size * rng.uniform(0.05, 0.95, 3), np.full(3, 2.5), None)
    return pred_XYZ, truth_XYZ


class Cost:
    """Seconds (wall and CPU, summed over calls) and the peak of memory above what was there before."""

    def __init__(self) -> None:
        self.wall_s = self.cpu_s = self.peak_mib = 0.0

    def of(self, call: Callable[[], T]) -> T:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
        before_mib, wall_s, cpu_s = held_mib("VmRSS"), time.perf_counter(), time.process_time()
        out = call()
        self.wall_s += time.perf_counter() - wall_s
        self.cpu_s += time.process_time() - cpu_s
        self.peak_mib = max(self.peak_mib, held_mib("VmHWM") - before_mib)
        return out


def held_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def monai_calls(
    pred_XYZ: np.ndarray, truth_XYZ: np.ndarray, spacing: list[float]
) -> dict[str, Callable[[], Tensor]]:
    y_pred, y = (torch.from_numpy(mask)[None, None] for mask in (pred_XYZ, truth_XYZ))
    return {
        "dice": lambda: compute_dice(y_pred.float(), y.float()),
        "hd95_mm": lambda: compute_hausdorff_distance(y_pred, y, True, percentile=95, spacing=spacing),
        "nsd_1mm": lambda: compute_surface_dice(y_pred, y, [1.0], True, spacing=spacing),
        "nsd_2mm": lambda: compute_surface_dice(y_pred, y, [2.0], True, spacing=spacing),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=3, default=[512, 512, 400])
    parser.add_argument("--classes", type=int, default=14, help="background included")
    parser.add_argument("--spacing", type=float, nargs=3, default=[0.8, 0.8, 1.0])
    args = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # MONAI's own, about an argument that it passes itself
    pred_XYZ, truth_XYZ = make_case(args.shape, args.classes)
    names = {f"organ {value}": (value,) for value in range(1, args.classes)}

    ours = Cost()
    rows = ours.of(lambda: metrics.case_rows(pred_XYZ, truth_XYZ, args.spacing, names, "case"))

    monai = {name: Cost() for name in ("dice", "hd95_mm", "nsd_1mm", "nsd_2mm")}
    table = Table(title=f"{'x'.join(map(str, args.shape))}, spacing {args.spacing} mm")
    for column in ("class", "ml", *monai, "largest difference from MONAI"):
        table.add_column(column, justify="right")
    worst = 0.0
    for row in rows:
        calls = monai_calls(pred_XYZ == row["value"], truth_XYZ == row["value"], args.spacing)
        theirs = {name: float(monai[name].of(call)) for name, call in calls.items()}
        apart = max(abs(row[name] - theirs[name]) for name in theirs)
        worst = max(worst, apart)
        shown = [f"{row[name]:.4f}" for name in theirs]
        table.add_row(row["class"], f"{row['volume_truth_ml']:.0f}", *shown, f"{apart:.1e}")
    console = Console(width=130)
    console.print(table)
    cost_table = Table("what", title="all classes", caption="MiB: peak above the label maps and masks")
    for column in ("wall s", "CPU s", "MiB"):
        cost_table.add_column(column, justify="right")
    costs = {"ours, everything": ours} | {f"MONAI {name}": cost for name, cost in monai.items()}
    for what, cost in costs.items():
        cost_table.add_row(what, f"{cost.wall_s:.2f}", f"{cost.cpu_s:.2f}", f"{cost.peak_mib:.0f}")
    console.print(cost_table)
    assert worst < 1e-3, f"scores differ by {worst}"
    monai_cpu_s = sum(cost.cpu_s for cost in monai.values())
    summary = {
        "shape": args.shape,
        "classes": args.classes,
        "ours": vars(ours),
        "monai": {name: vars(cost) for name, cost in monai.items()},
        "speedup_cpu": monai_cpu_s / ours.cpu_s,
        "speedup_cpu_over_hd95_alone": monai["hd95_mm"].cpu_s / ours.cpu_s,
        "largest_difference": worst,
        "torch_threads": torch.get_num_threads(),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
