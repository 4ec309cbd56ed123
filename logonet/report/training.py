"""Curves of a training run, pretraining or finetuning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from logonet.report import drawing
from logonet.report.drawing import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, SKY

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def curves(history: Sequence[Mapping[str, Any]], floors: Mapping[str, float] | None = None) -> bytes:
    """Training at a glance: one small plot per measured quantity, its last value written beside it.

    Args:
        history: one entry per epoch, as the training loop writes it: ``epoch`` and any of ``loss``,
            ``accuracy`` (with ``accuracy_floor``, what always answering each clusterer's most frequent
            label would score), ``effective_rank``, ``samples_per_s``, ``data_wait_share``, ``lr``.
        floors: metric -> a constant to draw below its curve, such as ``{"accuracy": 0.03}``.
    """
    plots = [
        ("loss", "loss", RED, "{:.3g}"),
        ("accuracy", "masked accuracy", BLUE, "{:.1%}"),
        ("effective_rank", "effective rank of features", PURPLE, "{:.1f}"),
        ("samples_per_s", "samples per second", GREEN, "{:,.3g}"),
        ("data_wait_share", "share of time waiting for data", ORANGE, "{:.1%}"),
        ("lr", "learning rate", GREY, "{:.2g}"),
    ]
    plots = [plot for plot in plots if any(e.get(plot[0]) is not None for e in history)]
    columns = min(3, max(1, len(plots)))
    rows = max(1, math.ceil(len(plots) / columns))
    wide, high, gap_x, gap_y, left, bottom, top = 2.35, 1.25, 0.85, 0.78, 0.62, 0.52, 0.92
    fig = drawing.figure(
        left + columns * wide + (columns - 1) * gap_x + 0.75,
        bottom + rows * high + (rows - 1) * gap_y + top,
    )
    for i, (key, name, colour, form) in enumerate(plots):
        column, row = i % columns, rows - 1 - i // columns
        axes = drawing.axes_at(
            fig, (left + column * (wide + gap_x), bottom + row * (high + gap_y), wide, high)
        )
        drawing.quiet(axes)
        axes.locator_params(axis="x", nbins=5, integer=True)
        axes.set_title(name, loc="left", fontsize=9, color=INK, pad=6)
        # The floor first, so that the curve lies on it.
        floor = (floors or {}).get(key)
        if any(e.get(f"{key}_floor") is not None for e in history):
            _line(axes, *_points(history, f"{key}_floor"), GREY, f"majority floor {form}", floor=True)
        elif floor is not None:
            ends = [history[0]["epoch"], history[-1]["epoch"]]
            _line(axes, ends, [floor, floor], GREY, f"floor {form}", floor=True)
        _line(axes, *_points(history, key), colour, form)
        if key in ("accuracy", "data_wait_share", "samples_per_s", "effective_rank", "lr"):
            axes.set_ylim(bottom=0)
        if "%" in form:
            axes.yaxis.set_major_formatter(lambda v, _: f"{100 * v:.3g}%")
        elif key == "lr":
            axes.yaxis.set_major_formatter(lambda v, _: f"{v:.2g}".replace("e-0", "e-"))
        if row == 0 or i + columns >= len(plots):
            drawing.name_axes(axes, "epoch")
    last = history[-1]
    epochs = f"{len(history)} epoch{'s' if len(history) > 1 else ''}"
    drawing.heading(fig, "Training", f"{epochs}, {int(last['step']):,} steps")
    return drawing.png(fig)


def _points(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Epochs and values of ``key``, where it was measured and finite."""
    points = [(e["epoch"], float(e[key])) for e in history if e.get(key) is not None]
    points = [p for p in points if math.isfinite(p[1])]
    return [x for x, _ in points], [y for _, y in points]


def _line(axes: Axes, x: list[float], y: list[float], colour: str, form: str, floor: bool = False) -> None:
    """A curve whose last value is written beside it, or a floor's dashed line with its name on it."""
    if not x:
        return
    text = form.format(y[-1]).replace("e-0", "e-")
    style: dict[str, Any] = {"fontsize": 8.5, "textcoords": "offset points"}
    if floor:
        axes.plot(x, y, color=colour, linewidth=1.2, linestyle=(0, (4, 2)))
        # Below its line: a curve that learns ends above it.
        axes.annotate(text, (x[-1], y[-1]), xytext=(0, -4), ha="right", va="top", color=GREY, **style)
        return
    axes.plot(x, y, color=colour, linewidth=1.8, solid_capstyle="round")
    axes.plot(x[-1:], y[-1:], "o", color=colour, markersize=4)
    # In ink, since orange and pink text is hard to read on white.
    axes.annotate(text, (x[-1], y[-1]), xytext=(6, 0), va="center", color=INK, annotation_clip=False, **style)
