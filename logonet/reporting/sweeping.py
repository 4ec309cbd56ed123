"""Pictures of a sweep: which settings were tried, how far each trial came, and what decided.

All take the table of trials (a row a trial: ``trial``, ``status``, ``epochs``, ``objective``, ``final_dice`` and
a column per searched key). Darker is better in all of them, and ``measured`` is what the objective is called.

Shapes: N trials.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from logonet.reporting import drawing
from logonet.reporting.drawing import BLUE, GREY, INK, RED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

MAX_VALUES = 6  # a key of more numbers than this was drawn from a range: its values are put in bins
BINS = 5
LOG_FROM = 30.0  # largest over smallest; draws from two decades span rather less than 100
WRAP = 18  # letters of a value's line
NOTE_CHAR_IN = 0.066  # width of a letter of the note, 8 pt
MARGIN_IN = 0.15
MAX_ENDS, MAX_STOPS = 16, 6  # trials that end at the last epoch, and at an earlier one, with their numbers
NOT_SET = "not set"
SMALL, LINE_IN = 7.5, 0.125


# ---------------------------------------------------------------------------------------- heat map


def heat_axes(table: pd.DataFrame, keys: Sequence[str]) -> list[str]:
    """The keys a heat map is of: the first two with at least two values; fewer where fewer vary."""
    return [k for k in keys if table[k].nunique(dropna=False) > 1][:2]


def heat_map(table: pd.DataFrame, x: str, y: str | None, measured: str, best: int | None = None) -> bytes:
    """The objective of each pair of settings, as the paper's Table 14: ``x`` across, ``y`` down.

    A cell has the mean over its trials that ran to the end; where none did, over the stopped ones, lighter
    and hatched, since their objectives are of earlier epochs. Numbers drawn from a range are put in bins of
    about equal counts, named by the smallest and largest value in them.

    Args:
        y: None for a single row.
        best: number of the trial whose cell is outlined.
    """
    from matplotlib.patches import Rectangle

    column_N, columns = _groups(table[x])
    row_N, rows = _groups(table[y]) if y is not None else (np.zeros(len(table), dtype=int), [""])
    cells = {
        (row, column): _Cell(table[(row_N == row) & (column_N == column)])
        for row in range(len(rows))
        for column in range(len(columns))
    }
    values = [cell.value for cell in cells.values() if math.isfinite(cell.value)]
    form, shades = _form(values), _shades()

    wide = max(1.3, 0.25 + _width_in(columns))
    high = max(0.62, 0.2 + LINE_IN * max(label.count("\n") + 1 for label in rows))
    left = 0.4 + max(_width_in(rows), _width_in([y or ""]))
    heads = 0.12 + 0.15 * max(label.count("\n") + 1 for label in columns)
    note = "darker is better; mean of the trials run to the end"
    if any(cell.stopped for cell in cells.values()):
        note += "; hatched: none was, so of earlier epochs"
    if best is not None:
        note += f"; outlined: best, trial {best}"
    width = max(left + wide * len(columns) + MARGIN_IN, 2 * MARGIN_IN + _width_in([x]) + left, 5.6)
    note, top = _note(note, width)
    fig = drawing.figure(width, top + 0.2 + heads + high * len(rows) + MARGIN_IN)
    axes = drawing.axes_at(fig, (left, MARGIN_IN, wide * len(columns), high * len(rows)))
    # In inches, so that the texts' lines can be placed.
    axes.set(xlim=(0, wide * len(columns)), ylim=(high * len(rows), 0))
    axes.set_axis_off()
    drawing.heading(fig, f"{measured} of the settings", note)

    grid_top = MARGIN_IN + high * len(rows)
    style: dict[str, Any] = {"fontsize": 8.5, "color": INK, "linespacing": 1.15}
    drawing.text(fig, left, grid_top + heads + 0.03, x, fontsize=8.5, color=GREY, va="bottom")
    if y is not None:
        drawing.text(fig, left - 0.12, grid_top + 0.07, y, fontsize=8.5, color=GREY, ha="right", va="bottom")
    for column, label in enumerate(columns):
        drawing.text(
            fig, left + (column + 0.5) * wide, grid_top + 0.07, label, ha="center", va="bottom", **style
        )
    for row, label in enumerate(rows):
        y_in = grid_top - (row + 0.5) * high
        drawing.text(fig, left - 0.12, y_in, label, ha="right", va="center", **style)
    span = (min(values), max(values)) if values else (0.0, 0.0)
    for (row, column), cell in cells.items():
        if cell.trials:
            _draw_cell(axes, (column * wide, row * high, wide, high), cell, form, shades(_level(cell, span)))
    if best is not None:
        (place,) = np.flatnonzero(table["trial"].to_numpy() == best)
        corner = (column_N[place] * wide, row_N[place] * high)
        frame: dict[str, Any] = {"fill": False, "clip_on": False, "joinstyle": "miter"}
        axes.add_patch(Rectangle(corner, wide, high, edgecolor=RED, linewidth=3.2, **frame))
    return drawing.png(fig)


class _Cell:
    """What is written of the trials of one setting."""

    def __init__(self, trials: pd.DataFrame) -> None:
        alive = trials[trials["status"] != "failed"]
        found = alive[np.isfinite(_numbers(alive["objective"]))]
        ended = found[found["status"] == "done"]
        shown = ended if len(ended) else found
        self.trials = len(trials)
        self.stopped = len(found) > 0 and not len(ended)
        self.value = float(_numbers(shown["objective"]).mean()) if len(shown) else math.nan
        self.notes = []
        self.word = ""
        if not len(shown):
            order = ("running", "waiting", "stopped", "done", "failed")
            status = next((s for s in order if (trials["status"] == s).any()), "")
            self.word = "no value" if status in ("stopped", "done") else status
        if self.stopped:
            first, last = int(shown["epochs"].min()), int(shown["epochs"].max())
            epochs = f"{first}" if first == last else f"{first} to {last}"
            self.notes.append(f"after {epochs} epoch{'s' * (last != 1)}")
            if (shown["status"] == "running").any():
                self.notes.append("still running")
        if self.trials > 1:
            of = f"{len(shown)} of " if 0 < len(shown) < self.trials else ""
            self.notes.append(f"{of}{self.trials} trials")


def _draw_cell(
    axes: Axes, box_in: tuple[float, float, float, float], cell: _Cell, form: str, shade: Any
) -> None:
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    x, y, wide, high = box_in
    rgb = np.array(shade[:3])
    if cell.word:
        rgb = np.array([0.95, 0.95, 0.96])
    elif cell.stopped:
        rgb = 0.45 * rgb + 0.55
    look: dict[str, Any] = {"facecolor": rgb, "edgecolor": "white", "linewidth": 1.5}
    axes.add_patch(Rectangle((x, y), wide, high, **look))
    if cell.stopped:
        # The edge's colour is the hatch's: a patch of its own, below the words.
        hatch: dict[str, Any] = {"fill": False, "edgecolor": "white", "linewidth": 0, "hatch": "////"}
        axes.add_patch(Rectangle((x, y), wide, high, **hatch))
    light = float(rgb @ (0.299, 0.587, 0.114)) > 0.55
    colour = (GREY if cell.word != "failed" else RED) if cell.word else INK if light else "white"
    middle = y + high / 2 - 0.5 * LINE_IN * len(cell.notes)
    words = cell.word or form.format(cell.value)
    style: dict[str, Any] = {"ha": "center", "va": "center", "color": colour}
    # A rim of the cell's colour, so that no stripe runs through a digit.
    style["path_effects"] = [withStroke(linewidth=2.5, foreground=rgb)] if cell.stopped else []
    axes.text(x + wide / 2, middle, words, fontsize=10, fontweight="normal" if cell.word else "bold", **style)
    for line, text in enumerate(cell.notes):
        at = middle + 0.16 + LINE_IN * line
        axes.text(x + wide / 2, at, text, fontsize=SMALL, **style)


def _level(cell: _Cell, span: tuple[float, float]) -> float:
    """Where its value lies between the least and the most; the middle where all are equal."""
    low, high = span
    return (cell.value - low) / (high - low) if high > low else 0.5


def _groups(values: pd.Series) -> tuple[np.ndarray, list[str]]:
    """The place of each trial's value among the groups (N,), and the groups' labels, in order."""
    missing = values.isna()
    known = values[~missing]
    group_N = np.zeros(len(values), dtype=int)
    if _is_drawn(values):
        bins = pd.qcut(known.astype(float), BINS, labels=False, duplicates="drop")
        parts = [known[bins == b] for b in sorted(set(bins))]
        labels = [_range(part.min(), part.max()) for part in parts]
        group_N[~missing] = [sorted(set(bins)).index(b) for b in bins]
    else:
        order = _ordered(known)
        labels = [_label(v) for v in order]
        group_N[~missing] = [order.index(v) for v in known]
    if missing.any():
        group_N[missing] = len(labels)
        labels.append(NOT_SET)
    return group_N, labels


def _is_drawn(values: pd.Series) -> bool:
    """Whether these numbers were drawn from a range, rather than picked from a few."""
    known = values.dropna().infer_objects()
    return pd.api.types.is_numeric_dtype(known) and known.nunique() > MAX_VALUES


def _ordered(known: pd.Series) -> list[Any]:
    """The values, numbers by size, then texts by letters."""
    return sorted(known.unique().tolist(), key=lambda v: (isinstance(v, str), v))


def _range(low: float, high: float) -> str:
    return _number(low) if low == high else f"{_number(low)} to {_number(high)}"


def _label(value: Any) -> str:
    """A value as people write it, in at most three lines."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    if text.startswith("{"):
        parts = [f"{k} {v}" for k, v in json.loads(text).items()]
        if len(", ".join(parts)) > WRAP:
            return "\n".join(parts[:3]) + (" ..." if len(parts) > 3 else "")
        text = ", ".join(parts)
    return "\n".join(textwrap.wrap(text, WRAP, max_lines=3, placeholder=" ...")) or "-"


# ------------------------------------------------------------------------------------ other pictures


def parallel(table: pd.DataFrame, keys: Sequence[str], measured: str, best: int | None = None) -> bytes:
    """Every trial as a line through its settings, an axis a key, ending at its objective on the colour bar.

    Keys of few values have them evenly spaced; numbers drawn from a range keep their distances, on a
    logarithmic axis where they span more than LOG_FROM. The best is drawn last, failed trials dashed.
    """
    objective_N = _numbers(table["objective"]).where(table["status"] != "failed").to_numpy()
    found_N = objective_N[np.isfinite(objective_N)]
    shades, form = _shades(), _form(found_N)
    scales = [_Scale(table[k]) for k in keys]
    labels = [[label for _, label in scale.ticks] for scale in scales]
    names = [k.replace(".", ".\n", 1) if len(k) > WRAP else k for k in keys]
    # Each axis has room for its values on its right, and for its name around it.
    steps = [
        max(1.15, 0.45 + _width_in(ticks), 0.2 + _width_in([name])) for ticks, name in zip(labels, names)
    ]
    at = np.concatenate([[0.0], np.cumsum(np.multiply(steps, max(1.0, 4.2 / sum(steps))))])
    failed = int((table["status"] == "failed").sum())
    undrawn = len(table) - len(found_N) - failed
    note = "a line a trial, darker is better"
    note += f"; thick: the best, trial {best}" if best is not None else ""
    note += "; thin: stopped early" if (table["status"] == "stopped").any() else ""
    note += "; dashed: failed" if failed else ""
    note += f"; {undrawn} without an objective not drawn" if undrawn else ""
    left = max(0.4, MARGIN_IN + _width_in(names[:1]) / 2)
    right = 0.35 + max(_width_in([form.format(v) for v in found_N]), _width_in([measured]) / 2)
    width = max(left + at[-1] + right, 5.6)
    note, top = _note(note, width)
    lines = max(sum(label.count("\n") + 1 for label in ticks) for ticks in labels)
    high, bottom = max(2.5, 0.16 * lines), 0.35
    fig = drawing.figure(width, bottom + high + 0.5 + top)
    drawing.heading(fig, "All keys of the trials", note)
    axes = drawing.axes_at(fig, (left, bottom, at[-1] + 0.01, high))
    axes.set(xlim=(0, at[-1] + 0.01), ylim=(0, 1))
    axes.set_axis_off()

    low, most = (found_N.min(), found_N.max()) if len(found_N) else (0.0, 0.0)
    places_NK = np.stack([scale.places for scale in scales], axis=1)
    # Worst first, so that the good ones lie above; the failed at the very bottom.
    for n in np.argsort(np.nan_to_num(objective_N, nan=-math.inf), kind="stable"):
        value, trial, status = objective_N[n], table["trial"].iloc[n], table["status"].iloc[n]
        line: dict[str, Any] = {"clip_on": False, "solid_capstyle": "round"}
        if status == "failed":
            axes.plot(
                at[:-1], places_NK[n], color=GREY, linewidth=1, linestyle=(0, (4, 2)), marker=".", **line
            )
        elif math.isfinite(value):
            level = (value - low) / (most - low) if most > low else 0.5
            line |= {"color": shades(level), "linewidth": 0.9 if status == "stopped" else 1.7}
            if trial == best:
                line |= {"linewidth": 3.2, "zorder": 5}
            axes.plot(at, [*places_NK[n], level], **line)
    for x, scale, name in zip(at, scales, names):
        axes.plot([x, x], [0, 1], color=GREY, linewidth=1, clip_on=False, zorder=6)
        axes.text(x, 1.06, name, ha="center", va="bottom", fontsize=8.5, color=INK)
        for place, label in scale.ticks:
            axes.plot([x], [place], "o", color=INK, markersize=2.5, clip_on=False, zorder=7)
            back: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8}
            axes.text(
                x + 0.07,
                place,
                label,
                va="center",
                fontsize=8,
                color=INK,
                bbox=back,
                zorder=8,
                linespacing=1.05,
            )
    if len(found_N):
        bar = drawing.axes_at(fig, (left + at[-1], bottom, 0.13, high))
        bar.imshow(np.linspace(0, 1, 256)[:, None], cmap=shades, origin="lower", aspect="auto")
        bar.set_axis_off()
        for place, value in (
            [(0.0, low), (0.5, (low + most) / 2), (1.0, most)] if most > low else [(0.5, low)]
        ):
            look: dict[str, Any] = {"va": "center", "fontsize": 8, "color": INK}
            drawing.text(fig, left + at[-1] + 0.18, bottom + place * high, form.format(value), **look)
        drawing.text(
            fig,
            left + at[-1],
            bottom + 1.06 * high,
            measured,
            ha="center",
            va="bottom",
            fontsize=8.5,
            color=INK,
        )
    return drawing.png(fig)


class _Scale:
    """Where on an axis from 0 to 1 each trial's value of a key lies (``places``, (N,)), and what is written there."""

    def __init__(self, values: pd.Series) -> None:
        known = values.dropna()
        self.ticks: list[tuple[float, str]] = []
        self.places = np.full(len(values), math.nan)
        if _is_drawn(values):
            numbers = known.to_numpy(np.float64)
            low, high = numbers.min(), numbers.max()
            log = low > 0 and high / low >= LOG_FROM
            warp = np.log if log else np.asarray
            # What is not set has a place of its own below the range.
            floor = 0.12 if len(known) < len(values) else 0.0
            self.places[values.notna()] = floor + (1 - floor) * (warp(numbers) - warp(low)) / (
                warp(high) - warp(low)
            )
            for tick in _nice(low, high, log, whole=bool((numbers % 1 == 0).all())):
                share = (warp(tick) - warp(low)) / (warp(high) - warp(low))
                self.ticks.append((float(floor + (1 - floor) * share), _number(tick)))
        else:
            order = _ordered(known)
            num = len(order) + (len(known) < len(values))
            first = num - len(order)
            spread = np.linspace(0, 1, num) if num > 1 else np.array([0.5])
            self.places[values.notna()] = [spread[first + order.index(v)] for v in known]
            self.ticks = [(float(spread[first + i]), _label(v)) for i, v in enumerate(order)]
        if len(known) < len(values):
            place = 0.0 if len(known) else 0.5
            self.places[values.isna()] = place
            self.ticks.insert(0, (place, NOT_SET))


def _nice(low: float, high: float, log: bool, whole: bool) -> list[float]:
    """Round numbers from low to high."""
    from matplotlib.ticker import MaxNLocator

    if not log:
        ticks = MaxNLocator(nbins=5, integer=whole).tick_values(low, high)
        return [float(t) for t in ticks if low <= t <= high]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps: tuple[int, ...] = (1, 2, 5) if len(decades) <= 4 else (1,)
    return [m * 10.0**e for e in decades for m in steps if low <= m * 10.0**e <= high]


def progress(history: pd.DataFrame, table: pd.DataFrame, best: int | None, measured: str) -> bytes:
    """The objective of every trial by epoch, with a mark where one was stopped or failed.

    Args:
        history: ``trial``, ``epoch``, ``objective``; what is not finite is left out.
    """
    from matplotlib.lines import Line2D

    points = history[np.isfinite(_numbers(history["objective"]))].sort_values("epoch", kind="stable")
    status = dict(zip(table["trial"], table["status"]))
    fig = drawing.figure(7.2, 4.15)
    left, bottom, wide, high = 0.65, 0.5, 5.9, 2.75
    axes = drawing.axes_at(fig, (left, bottom, wide, high))
    drawing.quiet(axes)
    drawing.name_axes(axes, "epoch")
    ends: list[tuple[int, float, int]] = []
    looks: dict[str, dict[str, Any]] = {
        "best": {"color": RED, "linewidth": 2.6, "zorder": 5},
        "run to the end": {"color": BLUE, "linewidth": 1.4, "zorder": 4},
        "stopped early": {"color": GREY, "linewidth": 1.0, "marker": "x", "zorder": 3},
        "failed": {"color": INK, "linewidth": 1.0, "linestyle": (0, (4, 2)), "marker": "v", "zorder": 3},
        "not ended": {"color": GREY, "linewidth": 1.0, "linestyle": (0, (1, 1.5)), "zorder": 3},
    }
    names = {"done": "run to the end", "stopped": "stopped early", "failed": "failed"}
    seen = set()
    for trial, line in points.groupby("trial"):
        name = "best" if trial == best else names.get(status.get(trial, ""), "not ended")
        seen.add(name)
        x, y = line["epoch"].tolist(), _numbers(line["objective"]).tolist()
        # One point has no length to see: a dot wherever a line begins.
        axes.plot(x, y, markevery=[len(x) - 1], markersize=5.5, **looks[name])
        axes.plot(x[:1], y[:1], ".", color=looks[name]["color"], markersize=4, zorder=3)
        ends.append((x[-1], y[-1], int(trial)))
    first, last = points["epoch"].min(), points["epoch"].max()
    axes.set_xlim(first - 0.03 * (last - first) - 0.02, last + 0.03 * (last - first) + 0.02)
    axes.margins(y=0.08)
    axes.locator_params(axis="x", nbins=min(10, int(last - first) + 1), integer=True)
    if first == last:
        axes.set(xlim=(first - 1, first + 1), xticks=[first])
    _write_ends(axes, ends, best)
    kept = [name for name in looks if name in seen]
    label = {name: f"best: trial {best}" if name == "best" else name for name in kept}
    handles = [Line2D([], [], markersize=5.5, label=label[name], **looks[name]) for name in kept]
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.01),
        ncols=len(kept),
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        columnspacing=1.4,
        handlelength=1.8,
        borderaxespad=0.2,
    )
    drawing.heading(fig, f"{measured} by epoch", "numbers: trials")
    return drawing.png(fig)


def importance_bars(importances: pd.DataFrame, note: str = "") -> bytes:
    """How much each key decides, with the spread over repeats; what could not be measured says why.

    Args:
        importances: ``key``, ``importance``, ``std``, ``note``. Bars that come with a note are grey.
        note: of which trials it is.
    """
    keys = importances["key"].tolist()
    left, wide, right, bottom, row_in = 0.35 + _width_in(keys), 3.6, 1.3, 0.5, 0.34
    note = "0: the key does not matter; 1: shuffling its values costs all that the objective varies. " + note
    doubts = [n for n, v in zip(importances["note"], importances["importance"]) if n and math.isfinite(v)]
    note, top = _note(
        note + "".join(f" Grey: {doubt}." for doubt in dict.fromkeys(doubts)), left + wide + right
    )
    fig = drawing.figure(left + wide + right, bottom + row_in * len(keys) + top + 0.2)
    axes = drawing.axes_at(fig, (left, bottom, wide, row_in * len(keys)))
    drawing.rows(axes, keys)
    value_K, std_K = (importances[c].to_numpy(np.float64) for c in ("importance", "std"))
    ends = np.concatenate([value_K - std_K, value_K + std_K])
    ends = np.append(ends[np.isfinite(ends)], 0.0)
    axes.set_xlim(1.05 * ends.min(), max(1.05 * ends.max(), 0.1))
    axes.axvline(0, color=GREY, linewidth=1)

    def beside(text: str, row: int | None, column: int) -> None:
        at: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        where, shift = ((1, row), 0.0) if row is not None else ((1, -0.5), 8.0)
        look: dict[str, Any] = {"va": "center_baseline", "fontsize": 8.5, "color": GREY if column else INK}
        axes.annotate(text, where, xytext=(8 + 42 * column, shift), **at, **look)

    beside("mean", None, 0)
    beside("spread", None, 1)
    for row, (value, std, why) in enumerate(zip(value_K, std_K, importances["note"])):
        if not math.isfinite(value):
            axes.annotate(
                why, (0, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8, color=GREY
            )
            continue
        axes.barh(row, value, height=0.55, color=GREY if why else BLUE, alpha=0.55 if why else 1.0)
        axes.plot([value - std, value + std], [row, row], color=INK, linewidth=1.2)
        beside(f"{value:.2f}".replace("-0.00", "0.00"), row, 0)
        beside(f"{std:.2f}", row, 1)
    drawing.heading(fig, "What each key decides", note)
    return drawing.png(fig)


def proxy_scatter(table: pd.DataFrame, correlation: Mapping[str, Any], measured: str) -> bytes:
    """The finetuned Dice of the trials that have one against their objective, each with its number.

    Args:
        correlation: ``n``, ``rho``, ``ci_low``, ``ci_high``, ``p``, ``note``; NaN is left out.
    """
    x_N, y_N = (_numbers(table[c]) for c in ("objective", "final_dice"))
    both_N = (np.isfinite(x_N) & np.isfinite(y_N)).to_numpy()
    said = "n {n}".format(**correlation)
    if math.isfinite(correlation["rho"]):
        said = "Spearman's rho {rho:.2f}".format(**correlation)
        if math.isfinite(correlation["ci_low"]):
            said += " (95 % interval {ci_low:.2f} to {ci_high:.2f})".format(**correlation)
        said += ", p {p:.2g}".format(**correlation) if math.isfinite(correlation["p"]) else ""
        said += ", n {n}".format(**correlation)
    note, top = _note(f"{said}. {correlation['note']}".strip(), 5.6)
    fig = drawing.figure(5.6, 0.55 + 3.0 + 0.15 + top)
    axes = drawing.axes_at(fig, (0.75, 0.55, 4.5, 3.0))
    drawing.quiet(axes)
    axes.scatter(x_N[both_N], y_N[both_N], s=26, color=BLUE, linewidths=0, zorder=3)
    axes.margins(0.1)
    drawing.name_axes(axes, measured, "finetuned Dice")
    trials = table["trial"][both_N]
    _write_beside(axes, [(x, y, str(t)) for x, y, t in zip(x_N[both_N], y_N[both_N], trials)])
    drawing.heading(fig, f"Does {measured} order the trials as the finetuned Dice does?", note)
    return drawing.png(fig)


# ------------------------------------------------------------------------------------------ helpers


def _write_ends(axes: Axes, ends: Sequence[tuple[int, float, int]], best: int | None) -> None:
    """The numbers of trials right of where their lines end, apart; where many end together, how many.

    Args:
        ends: (epoch, objective, trial).
    """
    low, high = axes.get_ylim()
    height_pt = 72 * axes.get_position().height * axes.figure.get_size_inches()[1]  # type: ignore[union-attr]
    last = max(epoch for epoch, _, _ in ends)
    for epoch in sorted({epoch for epoch, _, _ in ends}):
        group = sorted((y, trial) for e, y, trial in ends if e == epoch)
        texts = [(y, str(trial)) for y, trial in group]
        if len(group) > (MAX_ENDS if epoch == last else MAX_STOPS):
            rest = [y for y, trial in group if trial != best]
            texts = [(float(np.median(rest)), f"{len(rest)} trials")]
            texts = sorted(texts + [(y, str(trial)) for y, trial in group if trial == best])
        wanted_pt = np.array([(y - low) / (high - low) * height_pt for y, _ in texts])
        for (y, text), place, at in zip(texts, _apart(wanted_pt, 10.0), wanted_pt):
            _write_at(axes, (epoch, y), (6.0, place - at), text, ha="left")


def _apart(wanted: np.ndarray, gap: float) -> np.ndarray:
    """Places at least ``gap`` apart, each crowd centred where it wants to be; ``wanted`` ascends."""
    crowds: list[list[float]] = []  # what the members of each want to be
    for place in wanted:
        crowds.append([float(place)])
        while len(crowds) > 1:
            (lower, upper) = (np.mean(c) + np.array([-0.5, 0.5]) * gap * len(c) for c in crowds[-2:])
            if lower[1] <= upper[0]:
                break
            crowds[-2:] = [crowds[-2] + crowds[-1]]
    steps = [np.mean(c) + gap * (np.arange(len(c)) - (len(c) - 1) / 2) for c in crowds]
    return np.concatenate(steps)


def _write_beside(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Each point's text next to it where there is room, the first first; a text without room is left out.

    Distances are in points (1/72 in); no text lies on another or on a point.
    """
    fig = axes.get_figure(root=True)
    assert fig is not None
    axes.get_xlim(), axes.get_ylim()  # the limits are not computed before they are asked for
    dots = axes.transData.transform([(x, y) for x, y, _ in points]) * 72 / fig.dpi
    taken: list[tuple[float, float, float, float]] = [(x - 3, y - 3, x + 3, y + 3) for x, y in dots]
    around = np.asarray(axes.get_window_extent().extents) * 72 / fig.dpi + np.array([-8, 0, 22, 8])
    for (x, y, text), dot in zip(points, dots):
        wide, high = 5.5 * len(text), 9.0
        for radius, degrees in ((r, d) for r in (8, 14, 21) for d in (0, 45, -45, 90, -90, 135, -135, 180)):
            way = np.array([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))])
            middle = dot + way * np.array([radius + wide / 2 - 2, radius])
            box = (middle[0] - wide / 2, middle[1] - high / 2, middle[0] + wide / 2, middle[1] + high / 2)
            inside = (
                around[0] <= box[0] and around[1] <= box[1] and box[2] <= around[2] and box[3] <= around[3]
            )
            free = all(box[2] <= a or c <= box[0] or box[3] <= b or d <= box[1] for a, b, c, d in taken)
            if inside and free:
                shift = (float(middle[0] - dot[0]), float(middle[1] - dot[1]))
                _write_at(axes, (x, y), shift, text, ha="center")
                taken.append(box)
                break


def _write_at(
    axes: Axes, point: tuple[float, float], shift_pt: tuple[float, float], text: str, ha: str
) -> None:
    """A text that far from its point, with a line to it where it is not next to it."""
    from matplotlib.patheffects import withStroke

    line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 2}
    axes.annotate(
        text,
        point,
        xytext=shift_pt,
        textcoords="offset points",
        ha=ha,
        va="center",
        fontsize=8,
        color=INK,
        annotation_clip=False,
        zorder=9,
        path_effects=[withStroke(linewidth=2, foreground="white")],
        arrowprops=line if math.hypot(*shift_pt) > 14 else None,
    )


def _numbers(values: pd.Series) -> pd.Series:
    """As floats; NaN where there is no finite number."""
    numbers = pd.to_numeric(values, errors="coerce").astype(float)
    return numbers.where(np.isfinite(numbers))


def _number(value: float) -> str:
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e+")


def _form(values: Sequence[float] | np.ndarray) -> str:
    """How to write values so that their differences show: to a hundredth of their range, or nearly."""
    span = float(np.ptp(values)) if len(values) else 0.0
    digits = 3 if span == 0 else min(max(2 - math.floor(math.log10(span)), 0), 5)
    return f"{{:.{digits}f}}"


def _shades() -> Colormap:
    """Light to dark, which every eye can order, without the lightest: they would vanish on the card."""
    import matplotlib
    from matplotlib.colors import LinearSegmentedColormap

    some = matplotlib.colormaps["cividis"](np.linspace(0.93, 0.0, 64))
    return LinearSegmentedColormap.from_list("shades", some)


def _width_in(texts: Sequence[str]) -> float:
    """Of the longest line of any of the texts."""
    return drawing.CHAR_IN * max((len(line) for text in texts for line in text.split("\n")), default=0)


def _note(note: str, width_in: float) -> tuple[str, float]:
    """The note in lines that fit a picture of that width, and the height of heading and note."""
    lines = textwrap.wrap(note, max(int((width_in - 2 * MARGIN_IN) / NOTE_CHAR_IN), 20))
    return "\n".join(lines), 0.45 + 0.14 * max(len(lines), 1)
