"""Pictures of segmentations: truth and prediction as outlines on three planes through a scan.

Arrays are RAS. All planes are shown as radiologists see them, in one scale of mm: axial with anterior up,
coronal and sagittal with superior up, the patient's right on the left, anterior on the left of a sagittal.

Shapes: X Y Z voxels of the scan, R C rows and columns of a picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
DASHES: Any = (0, (2.2, 1.4))
WIDE_IN, HIGH_IN = 7.4, 3.4  # at most, of three planes
MAX_KEY = 24
MAX_NAMED = 6  # classes whose Dice is written in a line
ZOOM_BELOW = 0.6  # of the whole, in mm along X, Y and Z together
MARGIN_MM, MARGIN_SHARE = 6.0, 0.15
NAME_IN, GAP_IN = 1.1, 0.1  # a plane is given the width of its name, whatever its own

Box = tuple[slice, ...]
Classes = Mapping[int, str]  # label value -> name


class Case:
    """One scan, and what was found in it: what is drawn, where, and how well it was found.

    Attributes:
        areas: (classes, slices) across X, Y and Z: voxels in truth or prediction.
        dice: by label value; NaN where truth and prediction are empty.
    """

    def __init__(
        self,
        image_XYZ: np.ndarray,
        truth_XYZ: np.ndarray,
        pred_XYZ: np.ndarray,
        spacing_mm: Sequence[float],
        classes: Classes,
    ) -> None:
        self.image_XYZ, self.truth_XYZ, self.pred_XYZ = image_XYZ, truth_XYZ, pred_XYZ
        self.spacing_mm = spacing_mm
        self.whole = tuple(slice(0, n) for n in image_XYZ.shape)
        self.dice: dict[int, float] = {}
        self.areas = [np.zeros((len(_drawn(classes)), n)) for n in image_XYZ.shape]
        assert image_XYZ.shape == truth_XYZ.shape == pred_XYZ.shape, "image and labels differ in shape"
        for row, value in enumerate(_drawn(classes)):
            found_XYZ, true_XYZ = pred_XYZ == value, truth_XYZ == value
            size = np.count_nonzero(found_XYZ) + np.count_nonzero(true_XYZ)
            found_XYZ |= true_XYZ
            # |P and G| = |P| + |G| - |P or G|
            union = np.count_nonzero(found_XYZ)
            self.dice[value] = 2 * (size - union) / size if size else math.nan
            # Two passes over the voxels, not three: a large scan has 1e8 of them.
            sums_YZ = found_XYZ.sum(0, dtype=np.int32)
            for areas, found in zip(self.areas, (found_XYZ.sum((1, 2)), sums_YZ.sum(1), sums_YZ.sum(0))):
                areas[row] = found


@drawing.picture
def cases_overlay(
    cases: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray, Sequence[float]]], classes: Classes
) -> Figure:
    """Scans, such as the worst, the median and the best, a row each: truth in solid outlines, prediction in dashed.

    The planes pass where the classes have most area, every class counting alike. Beside them is the key: at most
    MAX_KEY of the classes that occur and, of a single case, their Dice (a class missed altogether has 0).

    Args:
        cases: (label, image_XYZ in [0, 1], truth_XYZ, pred_XYZ, spacing_mm). A case whose segmented part is small is
            shown as the enlarged box around it.
        classes: label value -> name; 0 is background and not drawn.
    """
    # One colour a class, whichever classes a scan has.
    colours = {value: COLOURS[i % len(COLOURS)] for i, value in enumerate(_drawn(classes))}
    scans = [Case(*case[1:], classes) for case in cases]
    boxes = [zoom(seen) or seen.whole for seen in scans]
    keyed = [v for i, v in enumerate(colours) if any(seen.areas[0][i].any() for seen in scans)]
    dice = scans[0].dice if keyed and len(scans) == 1 else {}
    shapes = [max(_lengths_mm(*drawn)[1:]) / _mm_per_inch(*drawn) for drawn in zip(scans, boxes)]
    heads = [f"{label}\n{summary(seen, classes)}" for (label, *_), seen in zip(cases, scans)]
    above = sum(0.35 + 0.17 * head.count("\n") for head in heads)
    high = max(sum(shapes) + above, 0.17 * min(len(keyed) + 4, MAX_KEY + 5)) + 0.7
    note = "the planes pass where the classes have most area"
    fig = drawing.figure(WIDE_IN + 2.2, high, "Cases", note)
    stack = fig.subplots(len(scans), 1, squeeze=False, height_ratios=shapes)[:, 0]
    for axes, seen, box, head in zip(stack, scans, boxes, heads):
        _draw_planes(axes, seen, box, colours)
        axes.set_title(head, pad=14)
    axes.plot([], [], color=INK, label="truth")
    axes.plot([], [], color=INK, linestyle=DASHES, label="prediction")
    for value in keyed[:MAX_KEY]:
        name = f"{dice[value]:.3f}  {classes[value]}" if dice else classes[value]
        axes.plot([], [], color=colours[value], linewidth=5, label=name)
    if len(keyed) > MAX_KEY:
        axes.plot([], [], alpha=0, label=f"and {len(keyed) - MAX_KEY} more")
    fig.legend(loc="outside right upper", title="Dice of each class" if dice else None, alignment="left")
    return fig


def summary(seen: Case, classes: Classes) -> str:
    """Mean Dice, and that of each class when there are few."""
    defined = {v: d for v, d in seen.dice.items() if math.isfinite(d)}
    if not defined:
        return "no class in truth or prediction"
    mean = f"mean Dice {np.mean(list(defined.values())):.3f}"
    if not 1 < len(defined) <= MAX_NAMED:
        return mean
    return f"{mean}: " + ", ".join(f"{classes[v]} {d:.3f}" for v, d in defined.items())


def focus(seen: Case) -> list[int]:
    """The slice of each axis with the most area of truth or prediction; the middle where there is none.

    Areas are shares of their class: a small organ counts as much as a large one.
    """
    at = []
    for areas in seen.areas:
        shares = (areas / np.maximum(areas.sum(1, keepdims=True), 1)).sum(0)
        # argmax alone takes the first of equals, at the rim of a box.
        best = np.flatnonzero(shares >= shares.max() * (1 - 1e-9))
        at.append(int(best[len(best) // 2]))
    return at


def zoom(seen: Case) -> Box | None:
    """The box of truth or prediction with a margin; None where it is empty or fills the scan anyway."""
    box = []
    for areas, spacing, length in zip(seen.areas, seen.spacing_mm, seen.image_XYZ.shape):
        inside = np.flatnonzero(areas.sum(0))
        if not len(inside):
            return None
        margin_mm = max(MARGIN_MM, MARGIN_SHARE * (inside[-1] + 1 - inside[0]) * spacing)
        margin = math.ceil(margin_mm / spacing)
        box.append(slice(max(int(inside[0]) - margin, 0), min(int(inside[-1]) + 1 + margin, length)))
    part, whole = (sum(_lengths_mm(seen, b)) for b in (tuple(box), seen.whole))
    return tuple(box) if part < ZOOM_BELOW * whole else None


def _lengths_mm(seen: Case, box: Box) -> list[float]:
    return [(b.stop - b.start) * s for b, s in zip(box, seen.spacing_mm)]


def _mm_per_inch(seen: Case, box: Box) -> float:
    x, y, z = _lengths_mm(seen, box)
    return max((2 * x + y) / WIDE_IN, max(y, z) / HIGH_IN)


def _drawn(classes: Classes) -> list[int]:
    return [value for value in classes if value != 0]


def _draw_planes(axes: Axes, seen: Case, box: Box, colours: Mapping[int, str]) -> None:
    """The three planes of ``box`` side by side, in mm."""
    at = focus(seen)
    lengths = _lengths_mm(seen, box)
    inch = _mm_per_inch(seen, box)
    letter: dict[str, Any] = {"color": "white", "fontsize": 7.5, "path_effects": drawing.rim(1.8)}
    left = 0.0
    for name, axis, up, side in PLANES:
        cut = tuple(at[axis] if i == axis else part for i, part in enumerate(box))
        wide, high = (n for i, n in enumerate(lengths) if i != axis)
        extent = (left, left + wide, high, 0.0)
        image_RC = shown(seen.image_XYZ[cut])
        axes.imshow(image_RC, cmap="gray", vmin=0, vmax=1, extent=extent)
        for value, colour in colours.items():
            _outline(axes, shown(seen.truth_XYZ[cut] == value), extent, colour, "solid")
            _outline(axes, shown(seen.pred_XYZ[cut] == value), extent, colour, DASHES)
        where = f"{at[axis] + 1}/{seen.image_XYZ.shape[axis]}" if box == seen.whole else "enlarged"
        axes.text(left, -0.05 * inch, f"{name}, {where}", fontsize=8, color=GREY)
        if min(wide, high) > 0.3 * inch:
            axes.text(left + wide / 2, 0.04 * inch, up, ha="center", va="top", **letter)
            axes.text(left + 0.04 * inch, high / 2, side, ha="left", va="center", **letter)
        left += max(wide, NAME_IN * inch) + GAP_IN * inch
    axes.set(xlim=(0, left - GAP_IN * inch), ylim=(max(lengths[1:]), 0), anchor="NW")
    axes.set_axis_off()


def _outline(axes: Axes, mask_RC: np.ndarray, extent: tuple[float, ...], colour: str, style: Any) -> None:
    if not mask_RC.any():
        return
    # A ring of nothing around it closes the outline of what touches the border.
    padded_RC = np.pad(mask_RC, 1).astype(np.float32)
    rows, columns = mask_RC.shape
    x = extent[0] + (np.arange(columns + 2) - 0.5) * (extent[1] - extent[0]) / columns
    y = (np.arange(rows + 2) - 0.5) * extent[2] / rows
    lines = axes.contour(x, y, padded_RC, levels=[0.5], colors=[colour], linewidths=1.3, linestyles=[style])
    # A thin dark rim: light colours would vanish on bone and contrast agent.
    lines.set_path_effects(drawing.rim(2.1))
