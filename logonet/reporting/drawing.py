"""What all pictures share: the style, the heading, and PNG bytes that depend on the data alone.

Slices are shown as radiologists see them: anterior (or superior) up, the patient's right on the left of the
picture. Arrays are RAS, so a slice is transposed and both its axes are reversed.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart. Every picture has a white background,
so it also reads in a dark page.

Shapes: X Y the two axes of a slice, R C rows and columns of a picture.
"""

from __future__ import annotations

import functools
import io
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
YELLOW = "#F0E442"
INK, GREY, RULE = "#1f2328", "#6e7781", "#d0d7de"
ROW_IN = 0.3  # height of a row of text
STYLE: dict[str, Any] = {
    **{"figure.constrained_layout.use": True, "figure.dpi": 160, "figure.facecolor": "white"},
    **{"figure.constrained_layout.h_pad": 0.08, "savefig.bbox": "tight", "savefig.pad_inches": 0.12},
    **{"font.size": 8.5, "text.color": INK, "axes.labelcolor": GREY, "axes.edgecolor": RULE},
    **{"boxplot.showfliers": False, "boxplot.showcaps": False, "boxplot.medianprops.linewidth": 2.2},
    **{f"boxplot.{part}props.color": INK for part in ("box", "median", "whisker")},
    **{"axes.titlesize": 9, "axes.titlelocation": "left", "axes.axisbelow": True},
    **{"axes.spines.top": False, "axes.spines.right": False, "grid.color": RULE, "grid.linewidth": 0.5},
    **{f"{axis}tick.{part}": GREY for axis in "xy" for part in ("color", "labelcolor")},
    **{"legend.frameon": False, "legend.fontsize": 8, "lines.solid_capstyle": "round"},
}

P = ParamSpec("P")


def picture(draw: Callable[P, Figure]) -> Callable[P, bytes]:
    """Make a function that returns a figure return PNG bytes, drawn in ``STYLE``."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> bytes:
        import matplotlib

        out = io.BytesIO()
        with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
            # No "Software" and no date: the same data give the same bytes, which artifacts' checksums rely on.
            draw(*args, **kwargs).savefig(out, format="png", metadata={"Software": None})
        return out.getvalue()

    return drawn


def figure(width_in: float, height_in: float, title: str, note: str) -> Figure:
    """A figure with a bold title above and a grey note below.

    It is made without pyplot, whose list of open figures grows in a long-lived worker.
    """
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width_in, height_in))
    fig.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    fig.supxlabel(textwrap.fill(note, int(width_in * 16)), x=0.01, ha="left", fontsize=8, color=GREY)
    return fig


def describe(axes: Axes, title: str, note: str, x: str = "", y: str = "") -> None:
    """A title, a grey line below it, and what the axes are."""
    axes.set_title(title, pad=17)
    look: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(note, (0, 1), xytext=(0, 5), fontsize=8, color=GREY, **look)
    axes.set(xlabel=x, ylabel=y)


def rows(axes: Axes, labels: Sequence[str], numbers: Iterable[str] = (), head: str = "") -> None:
    """Axes of one row per label, the first on top, with each row's numbers on the right, below ``head``."""
    axes.set_yticks(range(len(labels)), labels, color=INK)
    axes.set_ylim(len(labels) - 0.5, -1.2 if head else -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    right = axes.secondary_yaxis("right")
    right.set_yticks([-0.85, *range(len(labels))], [head, *numbers], family="monospace", fontsize=8)
    right.tick_params(length=0, labelcolor=INK)
    right.spines[:].set_visible(False)


def label(axes: Axes, columns: Mapping[float, str], lines: Mapping[float, str]) -> None:
    """Only names on bare axes: place -> name, of columns above, of lines (rows) on the left."""
    axes.set_xticks(list(columns), list(columns.values()))
    axes.set_yticks(list(lines), list(lines.values()))
    axes.tick_params(length=0, labeltop=True, labelbottom=False, labelcolor=INK)
    axes.xaxis.set_label_position("top")
    axes.spines[:].set_visible(False)


def intervals(axes: Axes, middle: np.ndarray, low: np.ndarray, high: np.ndarray, colours: list[str]) -> None:
    """A dot and its interval in each row."""
    places = range(len(middle))
    axes.hlines(places, low, high, colors=colours, linewidth=2)
    axes.scatter(middle, places, c=colours, s=36, linewidths=0, zorder=3)


def rim(width: float, colour: Any = "#000000b0") -> list[Any]:
    """Path effects that keep a text or line readable on any background."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=width, foreground=colour)]


def shown(slice_XY: np.ndarray) -> np.ndarray:
    """A RAS slice as rows and columns of a picture: anterior up, patient's right on the left."""
    return slice_XY.T[::-1, ::-1]


def montage(grid: Sequence[Sequence[np.ndarray]]) -> tuple[np.ndarray, tuple[int, int]]:
    """Rows of pictures (R, C, 3) of one size in [0, 1], side by side on white, and their pitch in pixels."""
    height, width = grid[0][0].shape[:2] if grid and grid[0] else (1, 1)
    pitch = height + max(1, width // 24), width + max(1, width // 24)
    out = np.ones((max(len(grid), 1) * pitch[0], max(map(len, grid), default=1) * pitch[1], 3))
    for r, row in enumerate(grid):
        for c, part in enumerate(row):
            out[r * pitch[0] :, c * pitch[1] :][:height, :width] = part
    return out, pitch


def grey(slice_XY: np.ndarray) -> np.ndarray:
    """A slice of intensities in [0, 1] as a grey picture (R, C, 3)."""
    return np.repeat(np.clip(shown(slice_XY), 0, 1)[..., None], 3, axis=-1)
