"""Curves of a training run, pretraining or finetuning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from logonet.reporting import drawing
from logonet.reporting.drawing import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, SKY

if TYPE_CHECKING:
    from matplotlib.axes import Axes


# (key, name, colour, how a value is written) of each small plot, and what is drawn thinner beside its curve.
PLOTS = (
    ("loss", "loss", RED, "{:.3g}"),
    ("val_dice", "Dice", BLUE, "{:.3f}"),
    ("accuracy", "masked accuracy", BLUE, "{:.1%}"),
    ("effective_rank", "effective rank of features", PURPLE, "{:.1f}"),
    ("samples_per_s", "samples per second", GREEN, "{:,.3g}"),
    ("data_wait_share", "share of time waiting for data", ORANGE, "{:.1%}"),
    ("lr", "learning rate", GREY, "{:.2g}"),
)
BESIDE = {"loss": {"dice_loss": "Dice", "ce": "CE"}, "val_dice": {"train_dice": "train"}}
THIN = (SKY, ORANGE)
LABEL_GAP_PT = 10.5


def curves(history: Sequence[Mapping[str, Any]], floors: Mapping[str, float] | None = None) -> bytes:
    """Training at a glance: one small plot per measured quantity, its last value written beside it.

    Args:
        history: one entry per epoch, as the training loop writes it: ``epoch`` and any of ``loss`` (with
            its parts ``dice_loss`` and ``ce``), ``val_dice`` (in the epochs that were validated; the first
            best one is ringed) with ``train_dice``, ``accuracy`` (with ``accuracy_floor``, what always
            answering each clusterer's most frequent label would score), ``effective_rank``,
            ``samples_per_s``, ``data_wait_share``, ``lr``.
        floors: metric -> a constant to draw below its curve, such as ``{"accuracy": 0.03}``.
    """
    plots = [
        plot for plot in PLOTS if any(_points(history, k)[0] for k in (plot[0], *BESIDE.get(plot[0], ())))
    ]
    beside = any(_points(history, k)[0] for names in BESIDE.values() for k in names)
    columns = min(3, max(1, len(plots)))
    rows = max(1, math.ceil(len(plots) / columns))
    wide, high, gap_x, gap_y, left, bottom, top = 2.35, 1.25, 1.2 if beside else 0.85, 0.78, 0.62, 0.52, 0.92
    fig = drawing.figure(
        left + columns * wide + (columns - 1) * gap_x + 0.75,
        bottom + rows * high + (rows - 1) * gap_y + top,
    )
    for i, plot in enumerate(plots):
        column, row = i % columns, rows - 1 - i // columns
        at = (left + column * (wide + gap_x), bottom + row * (high + gap_y), wide, high)
        axes = drawing.axes_at(fig, at)
        _plot(axes, history, plot, (floors or {}).get(plot[0]))
        if row == 0 or i + columns >= len(plots):
            drawing.name_axes(axes, "epoch")
    last = history[-1]
    epochs = f"{len(history)} epoch{'s' if len(history) > 1 else ''}"
    drawing.heading(fig, "Training", f"{epochs}, {int(last['step']):,} steps")
    return drawing.png(fig)


def _plot(
    axes: Axes, history: Sequence[Mapping[str, Any]], plot: tuple[str, str, str, str], floor: float | None
) -> None:
    key, name, colour, form = plot
    drawing.quiet(axes)
    axes.locator_params(axis="x", nbins=5, integer=True)
    if history[0]["epoch"] == history[-1]["epoch"]:
        axes.set_xlim(history[0]["epoch"] - 1, history[0]["epoch"] + 1)
    x, y = _points(history, key)
    if key == "val_dice" and x:
        best = y.index(max(y))
        axes.plot(
            x[best], y[best], "o", markersize=9, fillstyle="none", color=INK, markeredgewidth=1, zorder=3
        )
        drawing.title(axes, name, f"best {form.format(y[best])}, epoch {x[best]}")
    else:
        axes.set_title(name, loc="left", fontsize=9, color=INK, pad=6)
    # The floor first, so that the curve lies on it.
    if any(e.get(f"{key}_floor") is not None for e in history):
        _floor(axes, *_points(history, f"{key}_floor"), f"majority floor {form}")
    elif floor is not None:
        _floor(axes, [history[0]["epoch"], history[-1]["epoch"]], [floor, floor], f"floor {form}")
    ends = []
    others = {k: label for k, label in BESIDE.get(key, {}).items() if _points(history, k)[0]}
    for (other, label), thin in zip(others.items(), THIN):
        ends.append(_line(axes, *_points(history, other), thin, f"{label} {form}", width=1.1))
    if x:
        main = "val " if key == "val_dice" else ""
        # Validation is not at every epoch: its points show where it was.
        marker = "." if key == "val_dice" and len(x) <= 60 else ""
        ends.append(_line(axes, x, y, colour, main + form, marker=marker))
    if key in ("accuracy", "data_wait_share", "samples_per_s", "effective_rank", "lr"):
        axes.set_ylim(bottom=0)
    if "%" in form:
        axes.yaxis.set_major_formatter(lambda v, _: f"{100 * v:.3g}%")
    elif key == "lr":
        axes.yaxis.set_major_formatter(lambda v, _: f"{v:.2g}".replace("e-0", "e-"))
    _write_ends(axes, ends)


def _points(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Epochs and values of ``key``, where it was measured and finite."""
    points = [(e["epoch"], float(e[key])) for e in history if e.get(key) is not None]
    points = [p for p in points if math.isfinite(p[1])]
    return [x for x, _ in points], [y for _, y in points]


def _line(
    axes: Axes, x: list[float], y: list[float], colour: str, form: str, width: float = 1.8, marker: str = ""
) -> tuple[float, float, str]:
    """Draw a curve; returns where it ends, and what is to be written there."""
    axes.plot(
        x, y, color=colour, linewidth=width, solid_capstyle="round", marker=marker or None, markersize=5
    )
    axes.plot(x[-1:], y[-1:], "o", color=colour, markersize=2.2 * width)
    return x[-1], y[-1], form.format(y[-1]).replace("e-0", "e-")


def _write_ends(axes: Axes, ends: Sequence[tuple[float, float, str]]) -> None:
    """Last values beside their curves, moved apart where they would lie on one another."""
    low, high = axes.get_ylim()
    height_pt = 72 * axes.figure.get_size_inches()[1] * axes.get_position().height  # type: ignore[union-attr]
    place_pt = -math.inf
    for x, y, text in sorted(ends, key=lambda end: end[1]):
        at_pt = (y - low) / (high - low) * height_pt
        place_pt = max(at_pt, place_pt + LABEL_GAP_PT)
        axes.annotate(
            text,
            (x, y),
            xytext=(6, place_pt - at_pt),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=INK,  # orange and pink text is hard to read on white
            annotation_clip=False,
        )


def _floor(axes: Axes, x: list[float], y: list[float], form: str) -> None:
    """A dashed line with its name on it: below, since a curve that learns ends above it."""
    if x:
        axes.plot(x, y, color=GREY, linewidth=1.2, linestyle=(0, (4, 2)))
        axes.annotate(
            form.format(y[-1]),
            (x[-1], y[-1]),
            xytext=(0, -4),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=8.5,
            color=GREY,
        )
