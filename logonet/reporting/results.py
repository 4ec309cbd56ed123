"""Pictures of measured results: per-organ boxes and paired differences."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from logonet.reporting import drawing
from logonet.reporting.drawing import BLUE, GREEN, GREY, ORANGE, RED, ROW_IN, RULE

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# column: (name, colour, digits that are written, whether more is better)
METRICS = {
    "dice": ("Dice", BLUE, 3, True),
    "hd95_mm": ("HD95, mm", ORANGE, 2, False),
    "nsd_2mm": ("NSD at 2 mm", GREEN, 3, True),
    "nsd_1mm": ("NSD at 1 mm", GREEN, 3, True),
}
BOXED = ("dice", "hd95_mm", "nsd_2mm")
MIN_BOXED = 5  # quartiles of fewer cases say nothing
SKEWED = 5.0


@drawing.picture
def organ_boxes(rows: pd.DataFrame) -> Figure:
    """Per class, every case's Dice, HD95 and NSD: a box (quartiles, whiskers to 1.5 IQR) with the cases on it.

    Args:
        rows: one row a case and class with ``scan_id``, ``class``, ``dice``, ``hd95_mm``, ``nsd_2mm``.
            Values that are not finite (undefined for an empty mask) are left out of the box, and counted.

    Returns:
        PNG: a row a class, in the order of ``rows``; the median and n are written beside each box. Distances
        are on a scale that is logarithmic above 1 mm where a few far ones would flatten the rest.
    """
    classes = list(dict.fromkeys(rows["class"]))
    cases = rows["scan_id"].nunique()
    note = f"{cases:,} case{'s' * (cases != 1)}; dot: a case, box: quartiles, bar in it: median"
    note += "; n: cases in which the value is defined / all cases"
    fig = drawing.figure(11, ROW_IN * len(classes) + 1.6, "Results per class", note)
    for axes, key in zip(fig.subplots(1, len(BOXED), sharey=True), BOXED):
        name, colour, digits, _ = METRICS[key]
        of_class = [rows.loc[rows["class"] == c, key].to_numpy(np.float64) for c in classes]
        found = [values[np.isfinite(values)] for values in of_class]
        axes.set_title(name)
        numbers = []
        for row, values in enumerate(found):
            median = _number(np.median(values), digits) if len(values) else "-"
            numbers.append(f"{median:>6} {f'{len(values)}/{len(of_class[row])}':>9}")
            # The same places for the same data: the golden ratio spreads neighbours apart without a random draw.
            jitter = (np.arange(len(values)) * 0.6180339887 % 1 - 0.5) * 0.5 * (len(values) >= MIN_BOXED)
            size, alpha = (20, 1.0) if len(values) < MIN_BOXED else (8, min(0.65, max(0.2, 40 / len(values))))
            axes.scatter(values, row + jitter, s=size, color=colour, alpha=alpha, linewidths=0)
        boxed = [values if len(values) >= MIN_BOXED else [] for values in found]
        axes.boxplot(boxed, orientation="horizontal", positions=range(len(classes)), widths=0.62)
        drawing.rows(axes, classes, numbers, f"{'median':>6} {'n':>9}")
        _scale(axes, np.concatenate(found), key)
    return fig


def _scale(axes: Axes, values: np.ndarray, key: str) -> None:
    """Limits that hold every value, and never a scale that hides that Dice and NSD end at 1."""
    high = float(values.max(initial=0)) or 1.0
    if not key.endswith("_mm"):
        low = math.floor(10 * min(float(values.min(initial=1)), 0.9)) / 10
        axes.set_xlim(low - 0.03 * (1 - low), 1 + 0.02 * (1 - low))
        return
    if len(values) and high > SKEWED * max(float(np.percentile(values, 75)), 1.0):
        axes.set_xscale("symlog", linthresh=1.0, linscale=0.6)
        ticks = [0, 1, 3, 10, 30, 100, 300]
        axes.set_xticks(ticks, map(str, ticks))
    axes.set_xlim(-0.08, 1.1 * high)


@drawing.picture
def compare_picture(table: pd.DataFrame, a: str = "A", b: str = "B") -> Figure:
    """Forest plot of paired differences, b minus a, with their confidence intervals.

    Args:
        table: as ``evaluate.compare`` returns it: ``class`` ("mean" is drawn last, apart), ``metric``
            (of METRICS), ``difference``, ``ci_low``, ``ci_high``, ``p``.
        a, b: names of the two.

    Returns:
        PNG: a plot a metric, a row a class. Blue: b is better and the interval excludes zero; red: worse;
        grey: not decided. NaN is written as "-".
    """
    metrics = list(dict.fromkeys(table["metric"]))
    classes = sorted(dict.fromkeys(table["class"]), key=lambda name: name == "mean")
    columns = 2 if len(metrics) == 4 else min(3, len(metrics))
    plots = math.ceil(len(metrics) / columns)
    size = 1.5 + 3.3 * columns, plots * (ROW_IN * len(classes) + 1.0) + 0.6
    note = f"a: {a}, b: {b}; bars: confidence interval of the mean paired difference"
    fig = drawing.figure(*size, f"{b} against {a}, on the same cases", note)
    grid = fig.subplots(plots, columns, sharey=True, squeeze=False)
    for axes, key in zip(grid.flat, metrics):
        name, _, digits, more = METRICS[key]
        some = table[table["metric"] == key].set_index("class").reindex(classes)
        middle, low, high = (some[c].to_numpy(np.float64) for c in ("difference", "ci_low", "ci_high"))
        numbers = [
            f"{_number(m, digits + 1, '+'):>8} {'<0.001' if p < 0.001 else _number(p, 3):>7}"
            for m, p in zip(middle, some["p"])
        ]
        drawing.rows(axes, classes, numbers, f"{'b - a':>8} {'p':>7}")
        drawing.describe(axes, name, f"{'right' if more else 'left'} is better")
        axes.axvline(0, color=GREY, linewidth=1.0)
        better = np.where((middle > 0) == more, BLUE, RED)
        drawing.intervals(axes, middle, low, high, np.where((low > 0) | (high < 0), better, GREY).tolist())
        limit = float(np.nanmax(np.abs([low, high, middle]), initial=0)) or 1.0
        axes.set_xlim(-1.1 * limit, 1.1 * limit)
        axes.locator_params(axis="x", nbins=4)
        if classes[-1] == "mean" and len(classes) > 1:
            axes.axhline(len(classes) - 1.5, color=RULE)
    for axes in grid.flat[len(metrics) :]:
        axes.set_axis_off()
    return fig


def _number(value: float, digits: int, sign: str = "") -> str:
    return f"{value:{sign}.{digits}f}" if math.isfinite(value) else "-"
