"""Pictures of a sweep: which settings were tried, how far each trial came, and what decided.

All take the table of trials (a row a trial: ``trial``, ``status``, ``epochs``, ``objective``, ``final_dice`` and
a column per searched key). Darker is better in all of them, and ``measured`` is what the objective is called.

Shapes: N trials.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from logonet.reporting import drawing
from logonet.reporting.drawing import BLUE, GREY, INK, RED, ROW_IN

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_VALUES = 6  # a key of more numbers than this was drawn from a range: its values are put in bins
BINS = 5
LOG_FROM = 30.0  # largest over smallest; draws from two decades span rather less than 100
WRAP = 18  # letters of a value's line
MAX_LISTED = 20  # trials that the legend of the progress names
SIDES_PT = ((-11, 5), (11, -5), (-5, 15), (5, -15))  # where a trial's number stands: beside the diagonal
NOT_SET = "not set"
# how a trial ended: (what the legend says, how the line looks)
ENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "best": ("best", {"color": RED, "linewidth": 2.6, "marker": "o", "zorder": 5}),
    "done": ("run to the end", {"color": BLUE, "linewidth": 1.4, "marker": "."}),
    "stopped": ("stopped early", {"color": GREY, "linewidth": 1.0, "marker": "x"}),
    "failed": ("failed", {"color": INK, "linewidth": 1.0, "linestyle": (0, (4, 2)), "marker": "v"}),
    "running": ("not ended", {"color": GREY, "linewidth": 1.0, "linestyle": (0, (1, 1.5)), "marker": "."}),
}


def heat_axes(table: pd.DataFrame, keys: Sequence[str]) -> list[str]:
    """The keys a heat map is of: the first two with at least two values; fewer where fewer vary."""
    return [k for k in keys if table[k].nunique(dropna=False) > 1][:2]


@drawing.picture
def heat_map(table: pd.DataFrame, x: str, y: str | None, measured: str, best: int | None = None) -> Figure:
    """The objective of each pair of settings, as the paper's Table 14: ``x`` across, ``y`` down.

    A cell has the mean over its trials that ran to the end; where none did, over the stopped ones, lighter
    and hatched, since their objectives are of earlier epochs. Numbers drawn from a range are put in bins of
    about equal counts, named by the smallest and largest value in them.

    Args:
        y: None for a single row.
        best: number of the trial whose cell is outlined.
    """
    column_N, columns = _groups(table[x])
    row_N, rows = _groups(table[y]) if y is not None else (np.zeros(len(table), dtype=int), [""])
    cells = {at: _cell(trials) for at, trials in table.groupby([row_N, column_N])}
    values = [value for value, *_ in cells.values() if math.isfinite(value)]
    shade = _shades(values)
    note = "darker is better; mean of the trials run to the end; hatched: none was, so of earlier epochs"
    note += f"; outlined: the best, trial {best}" if best is not None else ""
    size = max(1.5 * len(columns) + 1.5, 5.6), 0.7 * len(rows) + 1.6
    fig = drawing.figure(*size, f"{measured} of the settings", note)
    axes = fig.subplots()
    for (row, column), (value, stopped, words) in cells.items():
        rgb = np.array(shade.to_rgba(value)[:3]) if math.isfinite(value) else np.array([0.95, 0.95, 0.96])
        rgb = 0.45 * rgb + 0.55 if stopped else rgb
        axes.bar(column, 1, 1, row - 0.5, color=rgb, edgecolor="white", hatch="////" if stopped else None)
        dark = float(rgb @ (0.299, 0.587, 0.114)) < 0.55
        # A rim of the cell's colour, so that no stripe runs through a digit.
        rim = drawing.rim(2.5, rgb)
        text: dict[str, Any] = {"ha": "center", "color": "white" if dark else INK, "path_effects": rim}
        if math.isfinite(value):
            va = "bottom" if words else "center"
            axes.text(column, row, f"{value:.4g}", fontsize=10, fontweight="bold", va=va, **text)
        axes.text(column, row + 0.04, words, fontsize=7.5, va="top", **text)
    if best is not None:
        (place,) = np.flatnonzero(table["trial"].to_numpy() == best)
        at = column_N[place], 1, 1, row_N[place] - 0.5
        axes.bar(*at, fill=False, edgecolor=RED, linewidth=3.2, clip_on=False)
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5), xlabel=x, ylabel=y or "")
    drawing.label(axes, dict(enumerate(columns)), dict(enumerate(rows)))
    return fig


def _cell(trials: pd.DataFrame) -> tuple[float, bool, str]:
    """The mean of the trials of one setting or NaN, whether it is of stopped ones, and what else is to say."""
    found = trials[(trials["status"] != "failed") & numbers(trials["objective"]).notna()]
    ended = found[found["status"] == "done"]
    shown = ended if len(ended) else found
    stopped = len(found) > 0 and not len(ended)
    words = []
    if stopped:
        epochs = " to ".join(f"{n}" for n in dict.fromkeys([shown["epochs"].min(), shown["epochs"].max()]))
        words.append(f"after epoch {epochs}")
        if (shown["status"] == "running").any():
            words.append("still running")
    elif not len(shown):
        words.append(", ".join(s.replace("done", "no value") for s in trials["status"].unique()))
    if len(trials) > 1:
        of = f"{len(shown)} of " if 0 < len(shown) < len(trials) else ""
        words.append(f"{of}{len(trials)} trials")
    return float(numbers(shown["objective"]).mean()), stopped, "\n".join(words)


def _groups(values: pd.Series) -> tuple[np.ndarray, list[str]]:
    """The place of each trial's value among the groups (N,), and the groups' labels, in order."""
    known = values.dropna()
    if _is_drawn(values):
        bins = pd.qcut(known.astype(float), BINS, labels=False, duplicates="drop")
        ends = known.groupby(bins).agg(["min", "max"]).map(_number)
        labels = [" to ".join(dict.fromkeys(pair)) for pair in ends.to_numpy().tolist()]
        order = list(ends.index)
    else:
        # Numbers by size, then texts by letters.
        order = sorted(known.unique().tolist(), key=lambda v: (isinstance(v, str), v))
        labels = [_label(v) for v in order]
        bins = known
    place = bins.map(order.index).reindex(values.index, fill_value=len(order))
    return place.to_numpy(int), labels + [NOT_SET] * (len(known) < len(values))


def _is_drawn(values: pd.Series) -> bool:
    """Whether these numbers were drawn from a range, rather than picked from a few."""
    known = values.dropna().infer_objects()
    return pd.api.types.is_numeric_dtype(known) and known.nunique() > MAX_VALUES


def _label(value: Any) -> str:
    """A value as people write it, in at most three lines."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    if text.startswith("{"):
        text = ", ".join(f"{k}\N{NO-BREAK SPACE}{v}" for k, v in json.loads(text).items())
    return _wrapped(text) or "-"


def _wrapped(text: str) -> str:
    """In at most three lines; a name without spaces is broken at its dots and underscores."""
    parts = re.sub(r"([._])", r"\1 ", text) if " " not in text else text
    lines = textwrap.wrap(parts, WRAP, max_lines=3, placeholder=" ...")
    return "\n".join(lines if " " in text else (re.sub(r"([._]) ", r"\1", line) for line in lines))


@drawing.picture
def parallel(table: pd.DataFrame, keys: Sequence[str], measured: str, best: int | None = None) -> Figure:
    """Every trial as a line through its settings, an axis a key, ending at its objective on the colour bar.

    Keys of few values have them evenly spaced; numbers drawn from a range keep their distances, on a
    logarithmic axis where they span more than LOG_FROM. The best is drawn last, failed trials dashed.
    """
    failed = table["status"] == "failed"
    objective = numbers(table["objective"]).where(~failed)
    shade = _shades(objective.dropna())
    scales = [scale(table[k]) for k in keys]
    note = "a line a trial, darker is better; thin: stopped early; dashed: failed; without an objective: not drawn"
    note += f"; thick: the best, trial {best}" if best is not None else ""
    fig = drawing.figure(max(1.6 * len(keys) + 1.0, 5.6), 4.5, "All keys of the trials", note)
    axes = fig.subplots()
    # Worst first, so that the good ones lie above; the failed at the very bottom.
    for n in np.argsort(objective.fillna(-math.inf), kind="stable"):
        row, value = table.iloc[n], objective.iloc[n]
        heights = [places_N[n] for places_N, _ in scales]
        if row["status"] == "failed":
            axes.plot(heights, color=GREY, linewidth=1.0, linestyle=(0, (4, 2)), marker=".", clip_on=False)
        elif math.isfinite(value):
            width = 3.2 if row["trial"] == best else 0.9 if row["status"] == "stopped" else 1.7
            heights.append(shade.norm(value))
            axes.plot(heights, color=shade.to_rgba(value), linewidth=width, clip_on=False)
    back: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8}
    for x, (_, ticks) in enumerate(scales):
        axes.vlines(x, 0, 1, color=GREY, linewidth=1, zorder=4)
        for place, label in ticks:
            axes.plot(x, place, "o", color=INK, markersize=2.5, clip_on=False, zorder=5)
            axes.text(x + 0.08, place, label, va="center", fontsize=8, bbox=back, zorder=6)
    axes.set(xlim=(0, len(keys)), ylim=(0, 1))
    drawing.label(axes, {x: f"{_wrapped(key)}\n" for x, key in enumerate(keys)}, {})
    fig.colorbar(shade, ax=axes, label=measured, pad=0, aspect=35)
    return fig


def scale(values: pd.Series) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """Where on an axis from 0 to 1 each trial's value of a key lies (N,), and what is written at which place."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    if not _is_drawn(values):
        group_N, labels = _groups(values)
        spread = np.linspace(0, 1, len(labels)) if len(labels) > 1 else np.array([0.5])
        return spread[group_N], list(zip(spread.tolist(), labels))
    known = values.dropna().astype(float)
    low, high = known.min(), known.max()
    log = low > 0 and high / low >= LOG_FROM
    steps = LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 1e4 else (1.0,)) if log else MaxNLocator(5)
    ticks = np.array([t for t in steps.tick_values(low, high) if low <= t <= high])
    # What is not set has a place of its own below the range.
    floor = 0.12 if len(known) < len(values) else 0.0

    def places(numbers: np.ndarray) -> np.ndarray:
        warp = np.log if log else np.asarray
        return floor + (1 - floor) * (warp(numbers) - warp(low)) / (warp(high) - warp(low))

    written = list(zip(places(ticks).tolist(), map(_number, ticks)))
    return np.nan_to_num(places(values.to_numpy(np.float64))), written + [(0.0, NOT_SET)] * (floor > 0)


@drawing.picture
def progress(history: pd.DataFrame, table: pd.DataFrame, best: int | None, measured: str) -> Figure:
    """The objective of every trial by epoch, with a mark where one was stopped or failed.

    The legend names the trials in the order of their last objectives.

    Args:
        history: ``trial``, ``epoch``, ``objective``; what is not finite is left out.
    """
    points = history.assign(objective=numbers(history["objective"])).dropna(subset="objective")
    lines = {int(t): line.sort_values("epoch") for t, line in points.groupby("trial")}
    last = {t: line["objective"].iloc[-1] for t, line in lines.items()}
    status = dict(zip(table["trial"], table["status"])) | {best: "best"}
    fig = drawing.figure(8.2, 4.4, f"{measured} by epoch", "right: the trials by their last value")
    axes = fig.subplots()
    for place, trial in enumerate(sorted(last, key=lambda t: -last[t])):
        name, look = ENDS.get(status.get(trial, ""), ENDS["running"])
        x, y = lines[trial]["epoch"].to_numpy(), lines[trial]["objective"].to_numpy()
        label = f"{trial}, {name}: {y[-1]:.4g}" if place < MAX_LISTED else None
        axes.plot(x, y, label=label, markevery=[-1], markersize=5.5, **look)
    if len(last) > MAX_LISTED:
        axes.plot([], [], alpha=0, label=f"and {len(last) - MAX_LISTED} more")
    axes.set_xlabel("epoch")
    axes.grid(axis="y")
    axes.locator_params(axis="x", integer=True)
    if points["epoch"].nunique() == 1:
        axes.set(xlim=(x[0] - 1, x[0] + 1), xticks=[x[0]])
    fig.legend(loc="outside right upper", title="trial", alignment="left", handlelength=2.5)
    return fig


@drawing.picture
def importance_bars(importances: pd.DataFrame, note: str = "") -> Figure:
    """How much each key decides, with the spread over repeats; what could not be measured says why.

    Args:
        importances: ``key``, ``importance``, ``std``, ``note``. Bars that come with a note are grey.
        note: of which trials it is.
    """
    known = importances.dropna(subset="importance")
    note = "0: the key does not matter; 1: shuffling its values costs all that the objective varies. " + note
    note += "".join(f" Grey: {doubt}." for doubt in known["note"].unique() if doubt)
    fig = drawing.figure(7.5, ROW_IN * len(importances) + 1.9, "What each key decides", note)
    axes = fig.subplots()
    value_K, std_K = importances["importance"], importances["std"]
    colours = [GREY if why else BLUE for why in importances["note"]]
    axes.barh(range(len(value_K)), value_K, xerr=std_K, height=0.55, color=colours, ecolor=INK)
    for row, why in enumerate(importances["note"].where(value_K.isna(), "")):
        axes.text(0.01, row, why, va="center", fontsize=8, color=GREY)
    # No negative zero.
    numbers = [f"{v:>6.2f} {std:>7.2f}".replace("-0.00", " 0.00") for v, std in zip(value_K, std_K)]
    numbers = [written.replace("nan", "  -") for written in numbers]
    drawing.rows(axes, importances["key"].tolist(), numbers, "  mean  spread")
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set_xlim(right=max(0.1, axes.get_xlim()[1]))
    return fig


@drawing.picture
def proxy_scatter(table: pd.DataFrame, correlation: Mapping[str, Any], measured: str) -> Figure:
    """The finetuned Dice of the trials that have one against their objective, each with its number.

    Args:
        correlation: ``n``, ``rho``, ``ci_low``, ``ci_high``, ``p``, ``note``; NaN is left out.
    """
    parts = {"rho": "Spearman's rho {rho:.2f}", "ci_low": "95 % interval {ci_low:.2f} to {ci_high:.2f}"}
    parts |= {"p": "p {p:.2g}", "n": "n {n}"}
    said = ", ".join(part.format(**correlation) for k, part in parts.items() if math.isfinite(correlation[k]))
    title = f"Does {measured} order the trials as the finetuned Dice does?"
    fig = drawing.figure(6.0, 4.4, title, f"{said}. {correlation['note']}")
    axes = fig.subplots()
    x_N, y_N = (numbers(table[c]).to_numpy() for c in ("objective", "final_dice"))
    axes.scatter(x_N, y_N, s=26, color=BLUE, linewidths=0)
    # Neighbours have their numbers on different sides.
    for place, n in enumerate(np.argsort(x_N)):
        if math.isfinite(x_N[n] + y_N[n]):
            at, shift = (x_N[n], y_N[n]), SIDES_PT[place % len(SIDES_PT)]
            look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7.5}
            axes.annotate(f"{table['trial'].iloc[n]}", at, shift, textcoords="offset points", **look)
    axes.margins(0.1)
    axes.grid(axis="y")
    axes.set(xlabel=measured, ylabel="finetuned Dice")
    return fig


def numbers(values: pd.Series) -> pd.Series:
    """As floats; NaN where there is no finite number."""
    numbers = pd.to_numeric(values, errors="coerce").astype(float)
    return numbers.where(np.isfinite(numbers))


def _number(value: float) -> str:
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e+")


def _shades(values: Sequence[float] | pd.Series) -> Any:
    """Light to dark, which every eye can order."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.transforms import nonsingular

    ends = nonsingular(min(values, default=0), max(values, default=1), expander=0.1)
    return ScalarMappable(Normalize(*ends), "cividis_r")
