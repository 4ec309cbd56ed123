"""Curves of a training run, pretraining or finetuning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from logonet.reporting import drawing
from logonet.reporting.drawing import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, SKY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Plot(NamedTuple):
    """A small plot: the history's key, its name, its colour, how a value is written, and the thinner curves."""

    key: str
    name: str
    colour: str
    form: str
    label: str = ""  # of the main curve, beside the thinner ones
    thin: Mapping[str, str] = {}
    from_zero: bool = True


PLOTS = (
    Plot("loss", "loss", RED, "{:.3g}", "all", {"dice_loss": "Dice", "ce": "CE"}, from_zero=False),
    Plot("val_dice", "Dice", BLUE, "{:.3f}", "val", {"train_dice": "train"}, from_zero=False),
    Plot("accuracy", "masked accuracy", BLUE, "{:.1%}"),
    Plot("effective_rank", "effective rank of features", PURPLE, "{:.1f}"),
    Plot("samples_per_s", "samples per second", GREEN, "{:,.1f}"),
    Plot("data_wait_share", "share of time waiting for data", ORANGE, "{:.1%}"),
    Plot("lr", "learning rate", GREY, "{:.2g}"),
)
THIN = (SKY, ORANGE)


@drawing.picture
def curves(history: Sequence[Mapping[str, Any]], floors: Mapping[str, float] | None = None) -> Figure:
    """Training at a glance: one small plot per measured quantity, its last value written above it.

    Args:
        history: one entry per epoch, as the training loop writes it: ``epoch`` and any of ``loss`` (with
            its parts ``dice_loss`` and ``ce``), ``val_dice`` (in the epochs that were validated; the first
            best one is ringed) with ``train_dice``, ``accuracy`` (with ``accuracy_floor``, what always
            answering each clusterer's most frequent label would score), ``effective_rank``,
            ``samples_per_s``, ``data_wait_share``, ``lr``.
        floors: metric -> a constant to draw below its curve, such as ``{"accuracy": 0.03}``.
    """
    plots = [plot for plot in PLOTS if any(_points(history, key)[0] for key in (plot.key, *plot.thin))]
    columns = min(3, max(1, len(plots)))
    rows = math.ceil(len(plots) / columns) or 1
    epochs = f"{len(history)} epoch{'s' * (len(history) != 1)}"
    note = f"{epochs}, {int(history[-1]['step']):,} steps" if history else "no epoch has ended"
    fig = drawing.figure(3.4 * columns + 0.3, 2.1 * rows + 0.7, "Training", note)
    grid = fig.subplots(rows, columns, squeeze=False)
    for axes, plot in zip(grid.flat, plots):
        _plot(axes, history, plot, (floors or {}).get(plot.key))
    for axes in grid.flat[len(plots) :]:
        axes.set_axis_off()
    return fig


def _plot(axes: Axes, history: Sequence[Mapping[str, Any]], plot: Plot, floor: float | None) -> None:
    """One quantity by epoch; the legend below the title has the last values."""
    epochs = [entry["epoch"] for entry in history]
    dashed: dict[str, Any] = {"color": GREY, "linewidth": 1.2, "linestyle": (0, (4, 2))}
    thin = [(k, name, c) for (k, name), c in zip(plot.thin.items(), THIN) if _points(history, k)[0]]
    drawn = [(f"{plot.key}_floor", "majority floor", dashed)]
    drawn += [(k, name, {"color": colour, "linewidth": 1.1}) for k, name, colour in thin]
    drawn.append((plot.key, plot.label if thin else "", {"color": plot.colour, "linewidth": 1.8}))
    for key, name, look in drawn:
        x, y = _points(history, key)
        if x:
            # Validation is not at every epoch: its points show where it was.
            points = [len(x) - 1] if key != "val_dice" or len(x) > 60 else None
            label = f"{name} {_written(plot, y[-1])}".strip()
            axes.plot(x, y, label=label, marker=".", markevery=points, **look)
    if floor is not None:
        axes.axhline(floor, label=f"floor {_written(plot, floor)}", **dashed)
    title = plot.name
    x, y = _points(history, plot.key)
    if plot.key == "val_dice" and x:
        best = y.index(max(y))
        axes.plot(x[best], y[best], "o", markersize=9, fillstyle="none", color=INK, markeredgewidth=1)
        title += f", best {_written(plot, y[best])} at epoch {x[best]}"
    axes.set_title(title, pad=18)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0, handlelength=1.2)
    axes.set_xlabel("epoch")
    axes.grid(axis="y")
    axes.locator_params(axis="x", nbins=5, integer=True)
    axes.locator_params(axis="y", nbins=4)
    if min(epochs) == max(epochs):
        axes.set_xlim(epochs[0] - 1, epochs[0] + 1)
    if plot.from_zero:
        axes.set_ylim(bottom=0)
    if "%" in plot.form or plot.key == "lr":
        axes.yaxis.set_major_formatter(lambda value, _: _written(plot, value).replace(".0%", "%"))


def _written(plot: Plot, value: float) -> str:
    return plot.form.format(value).replace("e-0", "e-")


def _points(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Epochs and values of ``key``, where it was measured and finite."""
    points = [(e["epoch"], float(e[key])) for e in history if e.get(key) is not None]
    points = [p for p in points if math.isfinite(p[1])]
    return [x for x, _ in points], [y for _, y in points]
