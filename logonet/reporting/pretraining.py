"""Pictures of pretraining: what is hidden and asked for, and what the clusterers call alike.

Shapes: C channels, X Y Z the crop's axes (Z slices), N clusterers, K clusters, S slices of a sheet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from logonet.reporting import drawing
from logonet.reporting.drawing import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, RULE, SKY, YELLOW, shown

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

MAX_CHAIN_SLICES = 7
MAX_CLUSTERERS = 6
MAX_CODES = 12
MAX_EXEMPLARS = 10


def chain_picture(
    image_CXYZ: np.ndarray,
    hidden_XYZ: np.ndarray,
    chain_Z: np.ndarray,
    patch_sizes_Z: np.ndarray,
    labels_NZ: np.ndarray | None = None,
) -> bytes:
    """The longest masked chain of a crop: slices above, what is hidden of them below.

    Args:
        image_CXYZ: intensities in [0, 1]; the first channel is shown.
        hidden_XYZ: bool, the voxels the network cannot see.
        chain_Z: bool, the slices that belong to a chain; at least one.
        patch_sizes_Z: side of each slice's patches, voxels.
        labels_NZ: pseudo-labels; those of the first clusterers are shown as a strip, where neighbours
            with one colour have one label.

    Returns:
        PNG. A chain longer than MAX_CHAIN_SLICES is cut to its first slices.
    """
    slices = _longest_run(chain_Z)
    total, slices = len(slices), slices[:MAX_CHAIN_SLICES]
    num_x, num_y = hidden_XYZ.shape[:2]
    num_labels = 0 if labels_NZ is None else min(len(labels_NZ), MAX_CLUSTERERS)

    side, strip = 1.3, 0.18  # inches
    height, width = side * num_y / num_x, side * len(slices)
    left, bottom, top = 1.1, 0.12 + (num_labels * strip + 0.1 if num_labels else 0.0), 1.15
    fig = drawing.figure(max(left + width + 0.15, 5.2), bottom + 2 * height + 0.06 + top)
    tint = np.array([0.0, 0.447, 0.698])  # BLUE

    for i, z in enumerate(slices):
        image, hidden = shown(image_CXYZ[0, :, :, z]), shown(hidden_XYZ[:, :, z])
        rgb = np.repeat(np.clip(image, 0, 1)[..., None], 3, axis=-1)
        # A trace of the image stays below the tint, for the reader only.
        masked = np.where(hidden[..., None], 0.22 * rgb + 0.78 * tint, rgb)
        for row, picture in enumerate((masked, rgb)):
            at = (left + i * side, bottom + row * (height + 0.06), side - 0.06, height)
            axes = drawing.axes_at(fig, at)
            axes.imshow(picture, interpolation="nearest", aspect="auto")
            axes.set_axis_off()
        axes.set_title(f"slice {z}", fontsize=9, color=INK, pad=26)
        axes.annotate(
            f"patches of {int(patch_sizes_Z[z])}\n{hidden.mean():.0%} hidden",
            (0.5, 1),
            xycoords="axes fraction",
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=GREY,
        )
    for row, name in ((0, "masked"), (1, "original")):
        y = bottom + row * (height + 0.06) + height / 2
        drawing.text(fig, left - 0.1, y, name, ha="right", va="center", fontsize=9, color=INK)
    if labels_NZ is not None:
        at = (left, 0.12, width - 0.06, num_labels * strip)
        _label_strip(drawing.axes_at(fig, at), labels_NZ[:num_labels, slices])
        drawing.text(
            fig,
            left - 0.1,
            0.12 + num_labels * strip / 2,
            f"pseudo-labels\nof {num_labels} of {len(labels_NZ)}\nclusterers",
            ha="right",
            va="center",
            fontsize=8,
            color=GREY,
        )
    cut = f"the first {len(slices)} of {total} slices; " if total > len(slices) else ""
    drawing.heading(fig, "A masked chain of slices", f"{cut}anterior is up, the patient's right on the left")
    return drawing.png(fig)


def _label_strip(axes: Axes, labels_NZ: np.ndarray) -> None:
    """One row a clusterer; the colour changes where the label does, and the label is written in it."""
    colours = [SKY, ORANGE, GREEN, PURPLE, YELLOW, BLUE]
    for n, row in enumerate(labels_NZ):
        runs = np.split(np.arange(len(row)), np.flatnonzero(np.diff(row)) + 1)
        names: dict[int, int] = {}
        for run in runs:
            index = names.setdefault(int(row[run[0]]), len(names))
            colour = colours[index % len(colours)]
            axes.barh(-n, len(run), left=run[0], height=0.86, color=colour, edgecolor="white", linewidth=1.2)
            middle = run[0] + len(run) / 2
            axes.text(
                middle,
                -n,
                str(row[run[0]]),
                ha="center",
                va="center_baseline",
                fontsize=7.5,
                color="white" if colour == BLUE else INK,
            )
    axes.set_xlim(0, labels_NZ.shape[1])
    axes.set_ylim(-len(labels_NZ) + 0.5, 0.5)
    axes.set_axis_off()


def contact_sheet(
    slices_SXY: np.ndarray,
    labels_S: np.ndarray,
    k_n: int,
    exemplars: Mapping[int, Sequence[int]],
    title: str,
) -> bytes:
    """What one clusterer groups together: a row of exemplar slices for each of its largest codes.

    Args:
        slices_SXY: intensities in [0, 1].
        labels_S: each slice's code in 0..k_n - 1.
        k_n: the clusterer's number of clusters.
        exemplars: code -> positions in ``slices_SXY``, nearest to the centre first.
        title: heading.
    """
    counts_K = np.bincount(labels_S, minlength=k_n)
    order = [int(c) for c in np.argsort(-counts_K, kind="stable") if exemplars.get(int(c))]
    codes = order[:MAX_CODES]
    columns = min(MAX_EXEMPLARS, max((len(exemplars[c]) for c in codes), default=1))
    num_x, num_y = slices_SXY.shape[1:]
    side = 0.66
    height, left, top = side * num_y / num_x, 1.35, 0.72
    fig = drawing.figure(max(left + columns * side + 0.15, 5.2), top + len(codes) * (height + 0.04) + 0.12)
    for row, code in enumerate(codes):
        y = 0.12 + (len(codes) - 1 - row) * (height + 0.04)
        share = counts_K[code] / len(labels_S)
        drawing.text(fig, 0.15, y + height * 0.62, f"code {code}", va="center", fontsize=8.5, color=INK)
        drawing.text(
            fig,
            0.15,
            y + height * 0.36,
            f"{counts_K[code]:,} slices, {share:.1%}",
            va="center",
            fontsize=7.5,
            color=GREY,
        )
        for column, s in enumerate(exemplars[code][:columns]):
            axes = drawing.axes_at(fig, (left + column * side, y, side - 0.04, height))
            axes.imshow(
                shown(slices_SXY[s]), cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto"
            )
            axes.set_axis_off()
    used = int((counts_K > 0).sum())
    covered = counts_K[codes].sum() / len(labels_S)
    drawing.heading(
        fig,
        title,
        f"the {len(codes)} largest of {used} used codes (K = {k_n}), {covered:.0%} of {len(labels_S):,} "
        "slices; anterior is up",
    )
    return drawing.png(fig)


def clusters_picture(quality: pd.DataFrame, agreement_NN: np.ndarray) -> bytes:
    """Are the clusterers worth predicting? Used codes, majority floor, dead codes, mutual agreement.

    Args:
        quality: one row a clusterer with ``k``, ``perplexity`` (effective number of codes in use),
            ``majority_share`` (the floor a prediction must beat) and ``dead_codes``.
        agreement_NN: normalised mutual information between the clusterers' labels, in [0, 1].
    """
    k, perplexity = quality["k"].to_numpy(), quality["perplexity"].to_numpy()
    floor, dead = quality["majority_share"].to_numpy(), quality["dead_codes"].to_numpy()
    num = len(quality)
    fig = drawing.figure(9.7, 5.5)
    bins = min(20, max(5, num // 4))

    axes = drawing.axes_at(fig, (0.65, 3.15, 2.2, 1.35))
    drawing.quiet(axes)
    limit = float(k.max()) * 1.06
    axes.plot([0, limit], [0, limit], color=RULE, linewidth=1.2, zorder=0)
    slope_deg = math.degrees(math.atan2(1.35, 2.2))  # the axes' height and width: both span 0..limit
    style: Any = {"rotation": slope_deg, "rotation_mode": "anchor", "fontsize": 7.5, "color": GREY}
    axes.text(limit * 0.42, limit * 0.46, "all codes equally used", ha="center", **style)
    axes.scatter(k, perplexity, s=14, color=BLUE, alpha=0.75, linewidths=0)
    axes.set(xlim=(0, limit), ylim=(0, limit))
    drawing.title(axes, "perplexity (effective codes)", f"median {np.median(perplexity / k):.0%} of K")
    drawing.name_axes(axes, "clusters K")

    axes = drawing.axes_at(fig, (3.55, 3.15, 2.2, 1.35))
    drawing.quiet(axes, whole=True)
    axes.hist(floor * 100, bins=bins, color=RED, edgecolor="white", linewidth=0.6)
    drawing.title(axes, "majority floor", f"mean {floor.mean():.1%}: accuracy must beat this")
    drawing.name_axes(axes, "slices in the largest code, %", "clusterers")

    axes = drawing.axes_at(fig, (0.65, 0.6, 2.2, 1.35))
    drawing.quiet(axes, whole=True)
    axes.hist(k, bins=bins, color=GREY, edgecolor="white", linewidth=0.6)
    drawing.title(axes, "number of clusters", f"{num} clusterers, {k.sum():,} codes")
    drawing.name_axes(axes, "clusters K", "clusterers")

    axes = drawing.axes_at(fig, (3.55, 0.6, 2.2, 1.35))
    drawing.quiet(axes)
    axes.bar(np.arange(1, num + 1), np.sort(dead / k)[::-1] * 100, width=1.0, color=ORANGE, linewidth=0)
    axes.set_ylim(0, max(1.0, float((dead / k).max()) * 110))
    drawing.title(axes, "dead codes", f"{int(dead.sum()):,} of {k.sum():,} label no slice")
    drawing.name_axes(axes, "clusterers, worst first", "% of K")

    axes = drawing.axes_at(fig, (6.35, 1.4, 2.7, 2.7))
    order = np.argsort(k, kind="stable")
    heat = axes.imshow(agreement_NN[np.ix_(order, order)], cmap="cividis", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    others = agreement_NN[~np.eye(num, dtype=bool)]
    drawing.title(axes, "agreement of the clusterers", f"mean {others.mean():.2f}" if num > 1 else "only one")
    drawing.name_axes(axes, "few clusters to many")
    bar = fig.colorbar(heat, cax=drawing.axes_at(fig, (9.13, 1.4, 0.1, 2.7)), ticks=[0, 0.5, 1])
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(labelsize=8, colors=GREY, length=2)
    bar.ax.set_title("NMI", fontsize=8, color=GREY, pad=5)
    drawing.heading(
        fig, "Quality of the clusterers", "how hard, and how worthwhile, their labels are to predict"
    )
    return drawing.png(fig)


def _longest_run(chain_Z: np.ndarray) -> np.ndarray:
    """Positions of the longest run of True, the first of equals."""
    positions = np.flatnonzero(chain_Z)
    assert len(positions), "no masked slice"
    return max(np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1), key=len)
