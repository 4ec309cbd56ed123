"""What all pictures share: colours, the card, quiet axes, and PNG bytes that depend on the data alone.

Slices are shown as radiologists see them: anterior (or superior) up, the patient's right on the left of the
picture. Arrays are RAS, so a slice is transposed and both its axes are reversed.

Colours are Okabe and Ito's, which the colour-blind can tell apart. Every picture has a white card of
its own, so it reads in a dark page too.

Shapes: X Y the two axes of a slice.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
YELLOW = "#F0E442"
INK, GREY, RULE = "#1f2328", "#6e7781", "#d0d7de"
CHAR_IN = 0.075  # width of a letter of 8.5 pt, rather more than less


def shown(slice_XY: np.ndarray) -> np.ndarray:
    """A RAS slice as rows and columns of a picture: anterior up, patient's right on the left."""
    return slice_XY.T[::-1, ::-1]


def figure(width_in: float, height_in: float) -> Figure:
    """A figure without pyplot, whose list of open figures grows in a long-lived worker."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width_in, height_in), dpi=160, facecolor="white")
    FigureCanvasAgg(fig)
    return fig


def axes_at(fig: Figure, box_in: tuple[float, float, float, float]) -> Axes:
    """Axes at (left, bottom, width, height) inches."""
    width, height = fig.get_size_inches()
    x, y, w, h = box_in
    return fig.add_axes((x / width, y / height, w / width, h / height))


def text(fig: Figure, x_in: float, y_in: float, text: str, **style: Any) -> None:
    width, height = fig.get_size_inches()
    fig.text(x_in / width, y_in / height, text, **style)


def heading(fig: Figure, title: str, note: str) -> None:
    height = fig.get_size_inches()[1]
    text(fig, 0.15, height - 0.15, title, va="top", fontsize=11, color=INK, fontweight="bold")
    text(fig, 0.15, height - 0.37, note, va="top", fontsize=8, color=GREY)


def title(axes: Axes, title: str, note: str) -> None:
    axes.set_title(title, loc="left", fontsize=9, color=INK, pad=17)
    axes.annotate(
        note,
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 5),
        textcoords="offset points",
        fontsize=8,
        color=GREY,
    )


def name_axes(axes: Axes, x: str, y: str = "") -> None:
    axes.set_xlabel(x, fontsize=8.5, color=GREY, labelpad=3)
    axes.set_ylabel(y, fontsize=8.5, color=GREY)


def quiet(axes: Axes, whole: bool = False) -> None:
    """Thin axes; ``whole`` for a y axis that counts things."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(RULE)
    axes.tick_params(labelsize=8, colors=GREY, length=2.5, color=RULE)
    axes.grid(axis="y", color=RULE, linewidth=0.5, alpha=0.6)
    axes.set_axisbelow(True)
    axes.locator_params(axis="y", nbins=4, integer=whole)
    axes.locator_params(axis="x", nbins=5)


def rows(axes: Axes, labels: list[str]) -> None:
    """Quiet axes of one row a label, the first on top."""
    quiet(axes)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=RULE, linewidth=0.5, alpha=0.6)
    axes.set_yticks(range(len(labels)), labels, fontsize=8.5, color=INK)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(labels) - 0.5, -0.5)


def png(fig: Figure) -> bytes:
    out = io.BytesIO()
    # No "Software" and no date: the same data give the same bytes, which artifacts' checksums rely on.
    fig.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
