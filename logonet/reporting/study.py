"""Pictures and tables of a study: scores against labels, mean ranks, the table of a paper."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from logonet.reporting import drawing
from logonet.reporting.drawing import BLUE, GREEN, INK, ORANGE, PURPLE, RED, ROW_IN, SKY

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, INK)


@drawing.picture
def label_curves(summary: pd.DataFrame, measured: str) -> Figure:
    """Scores against the number of training cases: a plot a network, a line a pretext.

    Args:
        summary: a row a setting: ``network``, ``pretext``, ``train_cases``, ``mean``, ``std_runs``.
        measured: what the scores are.
    """
    names = list(dict.fromkeys(summary["network"]))
    colour_of = dict(zip(dict.fromkeys(summary["pretext"]), COLOURS * len(summary)))
    fig = drawing.figure(3.6 * len(names) + 0.8, 3.4, f"{measured} by labels", "bars: deviation over runs")
    grid = fig.subplots(1, len(names), sharey=True, squeeze=False)[0]
    counts = sorted(summary["train_cases"].unique())
    for axes, network in zip(grid, names):
        part = summary[summary["network"] == network]
        for pretext, line in part.groupby("pretext", sort=False):
            line = line.sort_values("train_cases")
            look = {
                "color": colour_of[pretext],
                "marker": "o",
                "markersize": 4,
                "capsize": 2,
                "linewidth": 1.5,
            }
            error = line["std_runs"].fillna(0)
            axes.errorbar(line["train_cases"], line["mean"], error, label=str(pretext), **look)
        axes.set_xscale("log")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.set(title=network, xlabel="training cases")
        axes.grid(axis="y")
    grid[0].set_ylabel(measured)
    grid[-1].legend(loc="best")
    return fig


@drawing.picture
def mean_ranks(ranked: Mapping[str, tuple[Mapping[str, float], float, str]], measured: str) -> Figure:
    """Mean ranks of settings over cases with Nemenyi's critical difference: a plot for each number of labels.

    Args:
        ranked: title of a plot -> (setting -> mean rank, critical difference, a note). Half of the difference is drawn
            to either side, so two settings differ where their bars do not overlap.
        measured: what cases are ranked by.
    """
    rows = max(len(means) for means, _, _ in ranked.values())
    size = 5.2 * len(ranked), ROW_IN * rows + 1.9
    note = (
        "left is better; where bars do not overlap, settings differ at the 5 % level (Friedman and Nemenyi)"
    )
    fig = drawing.figure(*size, f"Mean rank by {measured}", note)
    for axes, (title, (means, critical, said)) in zip(
        fig.subplots(1, len(ranked), squeeze=False)[0], ranked.items()
    ):
        middle = np.array(list(means.values()))
        best = middle <= middle.min() + critical
        drawing.rows(axes, list(means), [f"{value:.2f}" for value in middle], "rank")
        drawing.describe(axes, title, said)
        colours = [BLUE if near else INK for near in best]
        drawing.intervals(axes, middle, middle - critical / 2, middle + critical / 2, colours)
    return fig


def wide(summary: pd.DataFrame, digits: int) -> pd.DataFrame:
    """A row for each network and pretext and a column for each number of labels: "mean ± deviation over runs".

    Args:
        summary: a row a setting: ``network``, ``pretext``, ``labels``, ``mean``, ``std_runs``.
    """

    def cell(mean: float, std: float) -> str:
        if not np.isfinite(mean):
            return "-"
        return f"{mean:.{digits}f}" + (f" ± {std:.{digits}f}" if np.isfinite(std) else "")

    cells = [cell(mean, std) for mean, std in zip(summary["mean"], summary["std_runs"])]
    columns, keys = list(dict.fromkeys(summary["labels"])), ["network", "pretext"]
    table = (
        summary.assign(cell=cells).groupby([*keys, "labels"], sort=False)["cell"].first().unstack("labels")
    )
    order = list(dict.fromkeys(zip(summary["network"], summary["pretext"])))
    return table.loc[order, columns].fillna("-").rename_axis(columns=None).reset_index()


def latex(table: pd.DataFrame) -> str:
    """``table`` for a paper, with booktabs' rules."""

    def line(cells: list[object]) -> str:
        escaped = [re.sub(r"([&%$#_{}])", r"\\\1", str(cell)).replace("±", r"$\pm$") for cell in cells]
        return " & ".join(escaped) + r" \\"

    head, body = line(list(table.columns)), [line(row) for row in table.to_numpy().tolist()]
    begin = rf"\begin{{tabular}}{{{'l' * 2 + 'c' * (len(table.columns) - 2)}}}"
    return "\n".join([begin, r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]) + "\n"
