"""Pictures of segmentations: truth and prediction as outlines on three planes through a scan.

Arrays are RAS. All planes are shown as radiologists see them, in one scale of mm: axial with anterior up,
coronal and sagittal with superior up, the patient's right on the left, anterior on the left of a sagittal.

Shapes: X Y Z voxels of the scan, R C rows and columns of a picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from logonet.reporting import drawing
from logonet.reporting.drawing import GREEN, GREY, INK, ORANGE, PURPLE, RED, SKY, YELLOW, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Bright on grey first; what follows Okabe and Ito's is for the many-organ data sets, where place helps.
COLOURS = (
    *(SKY, ORANGE, GREEN, YELLOW, PURPLE, RED),
    *("#3D8BFF", "#B8E186", "#A6761D", "#00E5D0", "#FF8FA3", "#9B6DFF", "#C7C7C7", "#FFCC99"),
    *("#5CFF7A", "#FF4FD8", "#C49C94", "#7FB3A6", "#D9D17C", "#8A9BFF"),
)
# (name, axis it is cut across, what is up, what is left)
PLANES = (("axial", 2, "A", "R"), ("coronal", 1, "S", "R"), ("sagittal", 0, "S", "A"))
DASHES = (0, (2.2, 1.4))
ROW_WIDE_IN, ROW_HIGH_IN, GAP_IN = 7.4, 3.1, 0.1
NAME_IN, NAME_WIDE_IN, LETTERS_FROM_IN = 0.24, 1.0, 0.3
LEFT_IN, TOP_IN, BOTTOM_IN = 0.28, 0.86, 0.15
KEY_LINE_IN, KEY_NAME_IN, KEY_DICE_IN = 0.19, 0.36, 0.6
MAX_KEY = 24
MAX_NAMED = 6  # classes whose Dice is written in a line
ZOOM_BELOW = 0.6  # of the whole, in mm along X, Y and Z together
MARGIN_MM, MARGIN_SHARE = 6.0, 0.15

Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class _Case:
    """One scan, and what was found in it."""

    image_XYZ: np.ndarray
    truth_XYZ: np.ndarray | None
    pred_XYZ: np.ndarray
    spacing_mm: tuple[float, float, float]
    areas: tuple[
        np.ndarray, np.ndarray, np.ndarray
    ]  # (classes, slices) across X, Y, Z: voxels in truth or prediction
    dice: dict[int, float] | None  # by label value; NaN where truth and prediction are empty

    @property
    def whole(self) -> Box:
        x, y, z = (slice(0, n) for n in self.image_XYZ.shape)
        return x, y, z


@dataclass(frozen=True)
class _Layout:
    """Where three planes of one scale lie: (left, top, width, height) of each from the upper left, inches."""

    scale: float  # inches a mm
    planes: list[tuple[float, float, float, float]]

    @property
    def size(self) -> tuple[float, float]:
        return max(x + w for x, _, w, _ in self.planes), max(y + h for _, y, _, h in self.planes)


def overlay(
    image_XYZ: np.ndarray,
    truth_XYZ: np.ndarray | None,
    pred_XYZ: np.ndarray,
    spacing_mm: Sequence[float],
    classes: Mapping[int, str],
    title: str,
    window: tuple[float, float] = (0.0, 1.0),
) -> bytes:
    """One scan on three planes, truth as solid outlines and prediction as dashed ones.

    The planes pass where the classes have most area, every class counting alike. Where what is segmented
    is small, a second row shows its box, enlarged.

    Args:
        image_XYZ: intensities.
        truth_XYZ: label values; None: only the prediction is drawn, in solid lines.
        pred_XYZ: label values.
        spacing_mm: voxel size along X, Y, Z.
        classes: label value -> name; 0 is background and not drawn. The key names those that occur, at most
            MAX_KEY, with their Dice (a class missed altogether has 0).
        title: heading.
        window: the intensities shown black and white.
    """
    case = _case(image_XYZ, truth_XYZ, pred_XYZ, spacing_mm, classes)
    colours = _colours(classes)
    boxes = [case.whole]
    zoom = _zoom(case)
    if zoom is not None:
        boxes.append(zoom)
    layouts = [_layout(case, box) for box in boxes]
    row_gap = 0.45
    wide = max(layout.size[0] for layout in layouts)
    high = sum(layout.size[1] for layout in layouts) + row_gap * (len(boxes) - 1)
    key_wide, key_high = _key_size(classes, [case])
    fig = drawing.figure(LEFT_IN + wide + key_wide + 0.4, TOP_IN + max(high, key_high) + BOTTOM_IN)
    y = fig.get_size_inches()[1] - TOP_IN
    _key(fig, (LEFT_IN + wide + 0.25, y), classes, colours, [case])
    for box, layout in zip(boxes, layouts):
        _draw_planes(fig, (LEFT_IN, y), case, box, layout, colours, window)
        y -= layout.size[1] + row_gap
    drawing.heading(fig, title, _summary(case, {}))
    return drawing.png(fig)


def cases_overlay(
    cases: Sequence[tuple[str, np.ndarray, np.ndarray | None, np.ndarray, Sequence[float]]],
    classes: Mapping[int, str],
    title: str = "Cases",
    window: tuple[float, float] = (0.0, 1.0),
) -> bytes:
    """Several scans, such as the worst, the median and the best, a row each, with the Dice of each.

    Args:
        cases: (label, image_XYZ, truth_XYZ or None, pred_XYZ, spacing_mm) as for ``overlay``. A case whose
            segmented part is small is shown as the enlarged box around it.
        classes: label value -> name; 0 is background and not drawn.
        title: heading.
        window: the intensities shown black and white, in all cases.
    """
    colours = _colours(classes)
    drawn = [_case(image, truth, pred, spacing, classes) for _, image, truth, pred, spacing in cases]
    boxes = [_zoom(case) or case.whole for case in drawn]
    layouts = [_layout(case, box) for case, box in zip(drawn, boxes)]
    head, top = 0.9, 0.5
    wide = max(layout.size[0] for layout in layouts)
    high = sum(layout.size[1] + head for layout in layouts)
    key_wide, key_high = _key_size(classes, drawn)
    fig = drawing.figure(LEFT_IN + wide + key_wide + 0.4, top + max(high, key_high + head) + BOTTOM_IN)
    y = fig.get_size_inches()[1] - top
    _key(fig, (LEFT_IN + wide + 0.25, y - head), classes, colours, drawn)
    for (label, *_), case, box, layout in zip(cases, drawn, boxes, layouts):
        drawing.text(fig, LEFT_IN, y - 0.37, label, fontsize=9.5, color=INK, fontweight="bold")
        drawing.text(fig, LEFT_IN, y - 0.56, _summary(case, classes), fontsize=8, color=GREY)
        _draw_planes(fig, (LEFT_IN, y - head), case, box, layout, colours, window)
        y -= layout.size[1] + head
    drawing.heading(fig, title, "the planes pass where the classes have most area")
    return drawing.png(fig)


def _case(
    image_XYZ: np.ndarray,
    truth_XYZ: np.ndarray | None,
    pred_XYZ: np.ndarray,
    spacing_mm: Sequence[float],
    classes: Mapping[int, str],
) -> _Case:
    """Look at every class once: what is drawn, where, and how well it was found."""
    x, y, z = image_XYZ.shape
    areas: tuple[list[np.ndarray], ...] = ([], [], [])
    dice: dict[int, float] = {}
    for labels_XYZ in (truth_XYZ, pred_XYZ):
        assert labels_XYZ is None or labels_XYZ.shape == image_XYZ.shape, "image and labels differ in shape"
    for value in _listed(classes):
        found_XYZ = pred_XYZ == value
        if truth_XYZ is not None:
            true_XYZ = truth_XYZ == value
            size = np.count_nonzero(found_XYZ) + np.count_nonzero(true_XYZ)
            found_XYZ |= true_XYZ
            # |P and G| = |P| + |G| - |P or G|
            union = np.count_nonzero(found_XYZ)
            dice[value] = 2 * (size - union) / size if size else math.nan
        # Two passes over the voxels, not three: a large scan has 1e8 of them.
        sums_YZ = found_XYZ.sum(0, dtype=np.int32)
        for across, sums in zip(areas, (found_XYZ.sum((1, 2)), sums_YZ.sum(1), sums_YZ.sum(0))):
            across.append(sums)
    stacked = [np.array(a, dtype=np.float64).reshape(len(a), n) for a, n in zip(areas, (x, y, z))]
    return _Case(
        image_XYZ,
        truth_XYZ,
        pred_XYZ,
        (float(spacing_mm[0]), float(spacing_mm[1]), float(spacing_mm[2])),
        (stacked[0], stacked[1], stacked[2]),
        dice if truth_XYZ is not None else None,
    )


def _listed(classes: Mapping[int, str]) -> list[int]:
    return [value for value in classes if value != 0]


def _colours(classes: Mapping[int, str]) -> dict[int, str]:
    """One colour a class, whichever classes a scan has."""
    return {value: COLOURS[i % len(COLOURS)] for i, value in enumerate(_listed(classes))}


def _summary(case: _Case, names: Mapping[int, str]) -> str:
    """Mean Dice, and that of each class in ``names`` when there are few."""
    if case.dice is None:
        return "prediction alone: no truth was given"
    defined = {v: d for v, d in case.dice.items() if math.isfinite(d)}
    if not defined:
        return "no class in truth or prediction"
    mean = f"mean Dice {np.mean(list(defined.values())):.3f}"
    if not names or not 1 < len(defined) <= MAX_NAMED:
        return mean
    return f"{mean}: " + ", ".join(f"{names[v]} {d:.3f}" for v, d in defined.items())


def _focus(case: _Case) -> tuple[int, int, int]:
    """The slice of each axis with the most area of truth or prediction; the middle where there is none.

    Areas are shares of their class: a small organ counts as much as a large one.
    """
    at = []
    for areas in case.areas:
        shares = (areas / np.maximum(areas.sum(1, keepdims=True), 1)).sum(0)
        # argmax alone takes the first of equals, at the rim of a box.
        best = np.flatnonzero(shares >= shares.max() * (1 - 1e-9))
        at.append(int(best[len(best) // 2]))
    return at[0], at[1], at[2]


def _zoom(case: _Case) -> Box | None:
    """The box of truth or prediction with a margin; None where it is empty or fills the scan anyway."""
    box = []
    for areas, spacing, length in zip(case.areas, case.spacing_mm, case.image_XYZ.shape):
        inside = np.flatnonzero(areas.sum(0))
        if not len(inside):
            return None
        margin_mm = max(MARGIN_MM, MARGIN_SHARE * (inside[-1] + 1 - inside[0]) * spacing)
        margin = math.ceil(margin_mm / spacing)
        box.append(slice(max(int(inside[0]) - margin, 0), min(int(inside[-1]) + 1 + margin, length)))
    x, y, z = box
    part, whole = (sum(_lengths_mm(case, b)) for b in ((x, y, z), case.whole))
    return (x, y, z) if part < ZOOM_BELOW * whole else None


def _lengths_mm(case: _Case, box: Box) -> tuple[float, float, float]:
    x, y, z = ((b.stop - b.start) * s for b, s in zip(box, case.spacing_mm))
    return x, y, z


def _layout(case: _Case, box: Box) -> _Layout:
    """Axial, coronal, sagittal in a row, or, for a scan of few slices, the latter two below one another."""
    x, y, z = _lengths_mm(case, box)
    row = min((ROW_WIDE_IN - 2 * GAP_IN) / (2 * x + y), ROW_HIGH_IN / max(y, z))
    stack = min(
        (ROW_WIDE_IN - GAP_IN) / (x + max(x, y)), ROW_HIGH_IN / y, (ROW_HIGH_IN - NAME_IN - GAP_IN) / (2 * z)
    )
    scale = stack if stack > 1.1 * row else row
    # A plane is given the width of its name, whatever its own.
    pitch = max(x * scale, NAME_WIDE_IN) + GAP_IN
    if scale == row:
        places = ((0.0, 0.0), (pitch, 0.0), (2 * pitch, 0.0))
    else:
        places = ((0.0, 0.0), (pitch, 0.0), (pitch, z * scale + NAME_IN + GAP_IN))
    sizes = ((x, y), (x, z), (y, z))
    return _Layout(scale, [(*place, w * scale, h * scale) for place, (w, h) in zip(places, sizes)])


def _draw_planes(
    fig: Figure,
    corner_in: tuple[float, float],
    case: _Case,
    box: Box,
    layout: _Layout,
    colours: Mapping[int, str],
    window: tuple[float, float],
) -> None:
    """The three planes of ``box``, whose upper left corner is ``corner_in``."""
    at = _focus(case)
    for (name, axis, up, side), (x, y, wide, high) in zip(PLANES, layout.planes):
        axes = drawing.axes_at(fig, (corner_in[0] + x, corner_in[1] - y - high, wide, high))
        cut: list[Any] = list(box)
        cut[axis] = at[axis]
        across, down = (s for i, s in enumerate(case.spacing_mm) if i != axis)
        truth = None if case.truth_XYZ is None else shown(case.truth_XYZ[tuple(cut)])
        pred = shown(case.pred_XYZ[tuple(cut)])
        _draw_plane(axes, shown(case.image_XYZ[tuple(cut)]), truth, pred, (across, down), colours, window)
        where = f"{at[axis] + 1}/{case.image_XYZ.shape[axis]}" if box == case.whole else "enlarged"
        note = f"{name}, {where}"
        axes.set_title(note, loc="left", fontsize=8, color=GREY, pad=4)
        if min(wide, high) >= LETTERS_FROM_IN:
            _letters(axes, up, side)


def _draw_plane(
    axes: Axes,
    image_RC: np.ndarray,
    truth_RC: np.ndarray | None,
    pred_RC: np.ndarray,
    pixel_mm: tuple[float, float],
    colours: Mapping[int, str],
    window: tuple[float, float],
) -> None:
    rows, columns = image_RC.shape
    extent = (0.0, columns * pixel_mm[0], rows * pixel_mm[1], 0.0)
    axes.imshow(image_RC, cmap="gray", vmin=window[0], vmax=window[1], extent=extent, aspect="auto")
    for value, colour in colours.items():
        if truth_RC is None:
            _outline(axes, pred_RC == value, pixel_mm, colour, "solid")
        else:
            _outline(axes, truth_RC == value, pixel_mm, colour, "solid")
            _outline(axes, pred_RC == value, pixel_mm, colour, DASHES)
    axes.set(xlim=extent[:2], ylim=extent[2:])
    axes.set_axis_off()


def _outline(axes: Axes, mask_RC: np.ndarray, pixel_mm: tuple[float, float], colour: str, style: Any) -> None:
    if not mask_RC.any():
        return
    from matplotlib.patheffects import withStroke

    # A ring of nothing around it closes the outline of what touches the border.
    padded_RC = np.pad(mask_RC, 1).astype(np.float32)
    x = (np.arange(padded_RC.shape[1]) - 0.5) * pixel_mm[0]
    y = (np.arange(padded_RC.shape[0]) - 0.5) * pixel_mm[1]
    lines = axes.contour(x, y, padded_RC, levels=[0.5], colors=[colour], linewidths=1.3, linestyles=[style])
    # A thin dark rim: light colours would vanish on bone and contrast agent.
    lines.set_path_effects([withStroke(linewidth=2.1, foreground="#000000a0")])


def _letters(axes: Axes, up: str, side: str) -> None:
    """Which way the patient lies: the letters at the top and the left edge."""
    from matplotlib.patheffects import withStroke

    style: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "fontsize": 7.5}
    style |= {"color": "white", "path_effects": [withStroke(linewidth=1.8, foreground="#000000c0")]}
    axes.annotate(up, (0.5, 1), xytext=(0, -3), ha="center", va="top", **style)
    axes.annotate(side, (0, 0.5), xytext=(3, 0), ha="left", va="center", **style)


def _key_classes(classes: Mapping[int, str], cases: Sequence[_Case]) -> list[int]:
    """The classes that any of the cases has."""
    has = sum((case.areas[0].sum(1) for case in cases), np.zeros(len(_listed(classes))))
    return [value for value, voxels in zip(_listed(classes), has) if voxels]


def _key_size(classes: Mapping[int, str], cases: Sequence[_Case]) -> tuple[float, float]:
    keyed = _key_classes(classes, cases)[: MAX_KEY + 1]
    longest = max((len(classes[v]) for v in keyed), default=0)
    wide = KEY_NAME_IN + drawing.CHAR_IN * max(longest, len("prediction"))
    return wide + (KEY_DICE_IN if len(cases) == 1 else 0.0), KEY_LINE_IN * (len(keyed) + 3.5)


def _key(
    fig: Figure,
    corner_in: tuple[float, float],
    classes: Mapping[int, str],
    colours: Mapping[int, str],
    cases: Sequence[_Case],
) -> None:
    """Names of lines and colours from the upper left ``corner_in`` down, and, of one case, each class's Dice."""
    from matplotlib.lines import Line2D

    width, height = fig.get_size_inches()
    x, y = corner_in
    right = x + _key_size(classes, cases)[0]

    def line(y_in: float, colour: str, style: Any, thick: float) -> None:
        ends, at = [x / width, (x + 0.26) / width], [y_in / height] * 2
        fig.add_artist(
            Line2D(ends, at, color=colour, linewidth=thick, linestyle=style, solid_capstyle="butt")
        )

    def write(x_in: float, text: str, **style: Any) -> None:
        look: dict[str, Any] = {"fontsize": 8.5, "color": INK, "va": "center_baseline"} | style
        drawing.text(fig, x_in, y, text, **look)

    with_truth = any(case.truth_XYZ is not None for case in cases)
    dice = cases[0].dice if len(cases) == 1 else None
    for name, style in (
        (("truth", "solid"), ("prediction", DASHES)) if with_truth else (("prediction", "solid"),)
    ):
        y -= KEY_LINE_IN
        line(y, INK, style, 1.3)
        write(x + KEY_NAME_IN, name)
    y -= KEY_LINE_IN
    keyed = _key_classes(classes, cases)
    if dice is not None and keyed:
        write(right, "Dice", ha="right", fontsize=8, color=GREY)
    for value in keyed[:MAX_KEY]:
        y -= KEY_LINE_IN
        line(y, colours[value], "solid", 5)
        write(x + KEY_NAME_IN, classes[value])
        if dice is not None:
            write(right, f"{dice[value]:.3f}", ha="right")
    if len(keyed) > MAX_KEY:
        y -= KEY_LINE_IN
        write(x + KEY_NAME_IN, f"and {len(keyed) - MAX_KEY} more", color=GREY)
