"""The picture that benchmarks of several trainings draw: means with their confidence intervals."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from logonet.reporting import drawing
from logonet.reporting.drawing import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, ROW_IN

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PALETTE = (BLUE, RED, GREEN, PURPLE, ORANGE, GREY)


@drawing.picture
def bars_with_ci(table: pd.DataFrame, title: str, measured: str = "Dice") -> Figure:
    """Means with confidence intervals in groups, such as networks in groups of label fractions.

    Bars need a zero that such results are far from: a dot and its interval can be read at any scale.

    Args:
        table: ``name``, ``group``, ``mean``, ``ci_low``, ``ci_high``; groups and names in the order of rows.
            One colour a name, in all groups.
        title: heading.
        measured: what the means are of, with its unit.
    """
    colours = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(dict.fromkeys(table["name"]))}
    groups = [(str(name), group) for name, group in table.groupby("group", sort=False)]
    sizes = [len(group) for _, group in groups]
    high = ROW_IN * sum(sizes) + 0.4 * len(groups) + 0.9
    fig = drawing.figure(7.5, high, title, "dot: mean, bar: its confidence interval")
    stack = fig.subplots(len(groups), 1, sharex=True, squeeze=False, height_ratios=sizes)[:, 0]
    for axes, (name, group) in zip(stack, groups):
        middle, low, high = (group[c].to_numpy(np.float64) for c in ("mean", "ci_low", "ci_high"))
        numbers = [
            f"{f'{m:.3f}' if math.isfinite(m) else '-':>6}"
            + (f" [{lo:.3f}, {hi:.3f}]" if math.isfinite(lo + hi) else "")
            for m, lo, hi in zip(middle, low, high)
        ]
        drawing.rows(axes, group["name"].astype(str).tolist(), numbers)
        axes.set_title(name, fontweight="bold")
        drawing.intervals(axes, middle, low, high, [colours[n] for n in group["name"]])
    stack[-1].set_xlabel(measured)
    return fig
