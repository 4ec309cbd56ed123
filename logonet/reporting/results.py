"""Pictures of measured results: per-organ boxes, paired differences, means with confidence intervals."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from logonet.reporting import drawing
from logonet.reporting.drawing import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, RULE

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

# column: (name, colour, how a value is written, whether more is better)
METRICS = {
    "dice": ("Dice", BLUE, "{:.3f}", True),
    "hd95_mm": ("HD95, mm", ORANGE, "{:.2f}", False),
    "nsd_2mm": ("NSD at 2 mm", GREEN, "{:.3f}", True),
    "nsd_1mm": ("NSD at 1 mm", GREEN, "{:.3f}", True),
}
BOXED = ("dice", "hd95_mm", "nsd_2mm")
ROW_IN = 0.3
MIN_BOXED = 5  # quartiles of fewer cases say nothing
SKEWED = 5.0


def organ_boxes(rows: pd.DataFrame) -> bytes:
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
    counts = {key: _counts(rows, key, classes) for key in BOXED}
    right = 0.78 + drawing.CHAR_IN * max(len(text) for texts in counts.values() for text in texts)
    left, wide, gap, bottom, top = _label_width(classes), 2.05, 0.2, 0.42, 0.9
    height = max(ROW_IN * len(classes), 0.5)
    fig = drawing.figure(max(left + 3 * (wide + right) + 2 * gap, 6.5), bottom + height + top)
    for i, key in enumerate(BOXED):
        name, colour, form, _ = METRICS[key]
        axes = drawing.axes_at(fig, (left + i * (wide + right + gap), bottom, wide, height))
        drawing.rows(axes, classes if i == 0 else [""] * len(classes))
        axes.set_title(name, loc="left", fontsize=9, color=INK, pad=8)
        values = rows[key].to_numpy(np.float64)
        _scale(axes, values[np.isfinite(values)], key)
        _beside(axes, ["median", "n"], None)
        for row, of_class in enumerate(classes):
            of_row = values[(rows["class"] == of_class).to_numpy()]
            found = of_row[np.isfinite(of_row)]
            if len(found):
                _box(axes, row, found, colour)
            median = form.format(np.median(found)) if len(found) else "-"
            _beside(axes, [median, counts[key][row]], row)
    note = f"{cases:,} case{'s' if cases != 1 else ''}; dot: a case, box: quartiles, bar in it: median"
    note += (
        "; n: where defined/all" if any("/" in text for texts in counts.values() for text in texts) else ""
    )
    drawing.heading(fig, "Results per class", note)
    return drawing.png(fig)


def _counts(rows: pd.DataFrame, key: str, classes: list[str]) -> list[str]:
    """How many values of each class are defined: "40", or "38/40"."""
    defined = np.isfinite(rows[key].to_numpy(np.float64))
    of = [defined[(rows["class"] == c).to_numpy()] for c in classes]
    return [f"{d.sum()}" if d.all() else f"{d.sum()}/{len(d)}" for d in of]


def _box(axes: Axes, row: int, values: np.ndarray, colour: str) -> None:
    if len(values) < MIN_BOXED:
        axes.scatter(values, np.full(len(values), row), s=20, color=colour, linewidths=0, zorder=2)
        return
    # The same places for the same data: the golden ratio spreads neighbours apart without a draw.
    jitter = (np.arange(len(values)) * 0.6180339887 % 1 - 0.5) * 0.5
    size, alpha = (9.0, 0.65) if len(values) <= 60 else (4.0, max(0.12, 20 / len(values)))
    axes.scatter(values, row + jitter, s=size, color=colour, alpha=alpha, linewidths=0, zorder=2)
    line: dict[str, Any] = {"color": INK, "linewidth": 1.0}
    axes.boxplot(
        values,
        orientation="horizontal",
        positions=[row],
        widths=0.62,
        showfliers=False,
        manage_ticks=False,
        patch_artist=True,
        boxprops={"facecolor": "none", "edgecolor": INK, "linewidth": 1.0},
        medianprops={"color": INK, "linewidth": 2.2},
        whiskerprops=line,
        capprops={"linewidth": 0},
        zorder=3,
    )


def _scale(axes: Axes, values: np.ndarray, key: str) -> None:
    """Limits that hold every value, and never a scale that hides that Dice and NSD end at 1."""
    high = float(values.max(initial=0))
    if key.endswith("_mm"):
        if len(values) and high > SKEWED * max(float(np.percentile(values, 75)), 1.0):
            axes.set_xscale("symlog", linthresh=1.0, linscale=0.6)
            ticks = [0, *(v for e in range(4) for v in (10**e, 3 * 10**e) if v <= high * 1.05)]
            axes.set_xticks(ticks, [f"{v:g}" for v in ticks])
            axes.minorticks_off()
            axes.set_xlim(-0.08, high * 1.15)
        else:
            axes.set_xlim(-0.03 * (high or 1), 1.05 * (high or 1))
        return
    low = math.floor(10 * min(float(values.min(initial=1)), 0.9)) / 10
    axes.set_xlim(low - 0.03 * (1 - low), 1 + 0.02 * (1 - low))


def compare_picture(table: pd.DataFrame, a: str = "A", b: str = "B") -> bytes:
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
    classes = _mean_last(list(dict.fromkeys(table["class"])))
    columns = 2 if len(metrics) == 4 else min(3, len(metrics))
    plots = math.ceil(len(metrics) / columns)
    left, wide, gap, right, bottom, top = _label_width(classes), 2.0, 0.2, 1.3, 0.4, 0.55
    height = max(ROW_IN * len(classes), 0.5)
    fig = drawing.figure(
        max(left + columns * (wide + right) + (columns - 1) * gap, 6.5),
        plots * (height + 0.55 + bottom) + top,
    )
    for i, metric in enumerate(metrics):
        column, row = i % columns, plots - 1 - i // columns
        at = (left + column * (wide + right + gap), bottom + row * (height + 0.55 + bottom), wide, height)
        axes = drawing.axes_at(fig, at)
        name, _, form, more = METRICS[metric]
        drawing.rows(axes, classes if column == 0 else [""] * len(classes))
        _set_mean_apart(axes, classes)
        better = f"{'right' if more else 'left'} is better"
        drawing.title(axes, name, better)
        axes.axvline(0, color=GREY, linewidth=1.0, zorder=1)
        _beside(axes, ["b - a", "p"], None, step=46)
        some = table[table["metric"] == metric]
        ends = some[["ci_low", "ci_high", "difference"]].to_numpy(np.float64)
        limit = float(np.nanmax(np.abs(ends))) if np.isfinite(ends).any() else 0.0
        axes.set_xlim(-1.1 * (limit or 1), 1.1 * (limit or 1))
        axes.locator_params(axis="x", nbins=4)
        for entry in some.to_dict("records"):
            place = classes.index(entry["class"])
            decided = entry["ci_low"] > 0 or entry["ci_high"] < 0
            colour = GREY if not decided else BLUE if (entry["difference"] > 0) == more else RED
            _interval(axes, place, entry["difference"], entry["ci_low"], entry["ci_high"], colour)
            _beside(axes, [_signed(entry["difference"], form), _p(entry["p"])], place, step=46)
    note = f"a: {a}, b: {b}; bars: confidence interval of the mean paired difference"
    drawing.heading(fig, f"{b} against {a}, on the same cases", note)
    return drawing.png(fig)


def bars_with_ci(table: pd.DataFrame, title: str, measured: str = "Dice") -> bytes:
    """Means with confidence intervals in groups, such as networks in groups of label fractions.

    Bars need a zero that such results are far from: a dot and its interval can be read at any scale.

    Args:
        table: ``name``, ``group``, ``mean``, ``ci_low``, ``ci_high``; groups and names in the order of rows.
            One colour a name, in all groups.
        title: heading.
        measured: what the means are of, with its unit.
    """
    groups, names = list(dict.fromkeys(table["group"])), list(dict.fromkeys(table["name"]))
    palette = (BLUE, RED, GREEN, PURPLE, ORANGE, GREY)
    labels: list[str] = []
    heads: list[tuple[int, str]] = []
    entries: list[tuple[int, dict[str, Any]]] = []
    for group in groups:
        heads.append((len(labels), str(group)))
        labels.append("")
        for entry in table[table["group"] == group].to_dict("records"):
            entries.append((len(labels), entry))
            labels.append(str(entry["name"]))
    left, wide, right, bottom, top = _label_width([*labels, *groups]), 4.6, 2.0, 0.5, 0.72
    height = ROW_IN * len(labels)
    fig = drawing.figure(left + wide + right, bottom + height + top)
    axes = drawing.axes_at(fig, (left, bottom, wide, height))
    drawing.rows(axes, labels)
    for place, head in heads:
        if place:
            axes.axhline(place - 0.5, color=RULE, linewidth=0.8)
        axes.annotate(
            head,
            (0.15 / fig.get_size_inches()[0], place),
            xycoords=("figure fraction", "data"),
            va="center",
            fontsize=8.5,
            fontweight="bold",
            color=INK,
        )
    for place, entry in entries:
        colour = palette[names.index(entry["name"]) % len(palette)]
        mean, low, high = (float(entry[k]) for k in ("mean", "ci_low", "ci_high"))
        _interval(axes, place, mean, low, high, colour)
        text = f"{mean:.3f}" if math.isfinite(mean) else "-"
        interval = f"[{low:.3f}, {high:.3f}]" if math.isfinite(low + high) else ""
        _beside(axes, [text, interval], place, step=48)
    drawing.name_axes(axes, measured)
    drawing.heading(fig, title, "dot: mean, bar: its confidence interval")
    return drawing.png(fig)


def _interval(axes: Axes, row: int, middle: float, low: float, high: float, colour: str) -> None:
    axes.plot([low, high], [row, row], color=colour, linewidth=2.0, solid_capstyle="butt", zorder=2)
    axes.plot([middle], [row], "o", color=colour, markersize=6, zorder=3)


def _beside(axes: Axes, texts: list[str], row: int | None, step: float = 42) -> None:
    """Write a row's numbers right of the plot, in columns; ``row`` None: the columns' heads."""
    for i, text in enumerate(texts):
        axes.annotate(
            text,
            (1, 1) if row is None else (1, row),
            xycoords="axes fraction" if row is None else ("axes fraction", "data"),
            xytext=(8 + i * step, 8 if row is None else 0),
            textcoords="offset points",
            va="baseline" if row is None else "center_baseline",
            fontsize=8 if row is None else 8.5,
            color=GREY if row is None or i else INK,
        )


def _mean_last(classes: list[str]) -> list[str]:
    return [c for c in classes if c != "mean"] + [c for c in classes if c == "mean"]


def _set_mean_apart(axes: Axes, classes: list[str]) -> None:
    if classes[-1] == "mean" and len(classes) > 1:
        axes.axhline(len(classes) - 1.5, color=RULE, linewidth=0.8)
        axes.get_yticklabels()[-1].set_fontweight("bold")


def _label_width(labels: list[str]) -> float:
    return 0.35 + drawing.CHAR_IN * max(len(str(label)) for label in labels)


def _signed(value: float, form: str) -> str:
    """A difference to one digit more than the values it is of."""
    more = form.replace(".2f", ".3f") if ".2f" in form else form.replace(".3f", ".4f")
    return more.replace("{:", "{:+").format(value) if math.isfinite(value) else "-"


def _p(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return "<0.001" if value < 0.001 else f"{value:.3f}"
