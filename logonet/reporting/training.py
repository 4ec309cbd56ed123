"""Curves of a training run, pretraining or finetuning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from logonet.reporting import drawing
from logonet.reporting.drawing import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, SKY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

History = Sequence[Mapping[str, Any]]

# title of a small plot: (how its values are written, {key of the history: (name in the legend, colour)}), the main
# curve last
PLOTS = {
    "loss": ("{:.3g}", {"dice_loss": ("Dice", SKY), "ce": ("CE", ORANGE), "loss": ("total", RED)}),
    "Dice": ("{:.3f}", {"train_dice": ("train", SKY), "val_dice": ("val", BLUE)}),
    "masked accuracy": ("{:.1%}", {"accuracy_floor": ("majority floor", GREY), "accuracy": ("", BLUE)}),
    "accuracy without the encoder": (
        "{:.1%}",
        {
            "batch_accuracy_without_encoder": ("none", RED),
            "batch_accuracy_without_deepest": ("no deepest", ORANGE),
            "batch_accuracy": ("all", BLUE),
        },
    ),
    "effective rank of features": ("{:.1f}", {"effective_rank": ("", PURPLE)}),
    "samples per second": ("{:,.1f}", {"samples_per_s": ("", GREEN)}),
    "share of time waiting for data": ("{:.1%}", {"data_wait_share": ("", ORANGE)}),
    "learning rate": ("{:.2g}", {"lr": ("", GREY)}),
}


@drawing.picture
def curves(history: History) -> Figure:
    """Training at a glance: one small plot per measured quantity, its last value written above it.

    Args:
        history: one entry per epoch, as the training loop writes it: ``epoch`` and any of ``loss`` (with
            its parts ``dice_loss`` and ``ce``), ``val_dice`` (in the epochs that were validated; the first
            best one is ringed) with ``train_dice``, ``accuracy`` (with ``accuracy_floor``, what always
            answering each clusterer's most frequent label would score), ``batch_accuracy`` (with what is left of it
            without the encoder's features), ``effective_rank``, ``samples_per_s``, ``data_wait_share``, ``lr``.
    """
    plots = [title for title, (_, keys) in PLOTS.items() if any(_points(history, key)[0] for key in keys)]
    columns = min(3, max(1, len(plots)))
    rows = math.ceil(len(plots) / columns) or 1
    epochs = f"{len(history)} epoch{'s' * (len(history) != 1)}"
    note = f"{epochs}, {int(history[-1]['step']):,} steps" if history else "no epoch has ended"
    fig = drawing.figure(3.4 * columns + 0.3, 2.1 * rows + 0.7, "Training", note)
    grid = fig.subplots(rows, columns, squeeze=False).flat
    for axes, title in zip(grid, plots):
        _plot(axes, history, title)
    for axes in grid[len(plots) :]:
        axes.set_axis_off()
    return fig


def _plot(axes: Axes, history: History, title: str) -> None:
    """One quantity by epoch; the legend below the title has the last values."""
    form, keys = PLOTS[title]
    for key, (name, colour) in keys.items():
        x, y = _points(history, key)
        if x:
            # Validation is not at every epoch: its points show where it was.
            points = [len(x) - 1] if key != "val_dice" or len(x) > 60 else None
            look: dict[str, Any] = {"color": colour, "linewidth": 1.8 if key == list(keys)[-1] else 1.1}
            look["linestyle"] = (0, (4, 2)) if key == "accuracy_floor" else "solid"
            label = f"{name} {form.format(y[-1])}".strip()
            axes.plot(x, y, label=label.replace("e-0", "e-"), marker=".", markevery=points, **look)
    if title == "Dice" and x:
        best = y.index(max(y))
        axes.plot(x[best], y[best], "o", markersize=9, fillstyle="none", color=INK, markeredgewidth=1)
        title += f", best {y[best]:.3f} at epoch {x[best]}"
    elif title not in ("loss", "Dice"):
        axes.set_ylim(bottom=0)
    axes.set_xlabel("epoch")
    axes.set_title(title, pad=18)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0, handlelength=1.2)
    axes.grid(axis="y")
    axes.locator_params(axis="x", nbins=5, integer=True)
    axes.locator_params(axis="y", nbins=4)
    if len(history) == 1:
        axes.set_xlim(history[0]["epoch"] - 1, history[0]["epoch"] + 1)
    if "%" in form or title == "learning rate":
        axes.yaxis.set_major_formatter(lambda v, _: form.format(v).replace(".0%", "%").replace("e-0", "e-"))


def _points(history: History, key: str) -> tuple[list[float], list[float]]:
    """Epochs and values of ``key``, where it was measured and finite."""
    measured = [entry for entry in history if entry.get(key) is not None and math.isfinite(entry[key])]
    return [entry["epoch"] for entry in measured], [float(entry[key]) for entry in measured]
