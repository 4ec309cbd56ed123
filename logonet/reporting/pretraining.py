"""Pictures of pretraining: what is hidden and asked for, and what the clusterers call alike.

Shapes: C channels, X Y Z the crop's axes (Z slices), N clusterers, K clusters, S slices of a sheet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from logonet.reporting import drawing
from logonet.reporting.drawing import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, RULE, SKY, YELLOW, shown

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_CHAIN_SLICES = 7
MAX_CLUSTERERS = 6
MAX_CODES = 12
MAX_EXEMPLARS = 10
TINT = np.array([0.0, 0.447, 0.698])  # BLUE
STRIP = 0.16  # height of a clusterer's labels; a slice is 1 wide
STRIP_COLOURS = (SKY, ORANGE, GREEN, PURPLE, YELLOW, RED)


@drawing.picture
def chain_picture(
    image_CXYZ: np.ndarray,
    hidden_XYZ: np.ndarray,
    chain_Z: np.ndarray,
    patch_sizes_Z: np.ndarray,
    labels_NZ: np.ndarray | None = None,
) -> Figure:
    """The longest masked chain of a crop: the slices, and above them what is hidden of them.

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
    every = _longest_run(chain_Z)
    slices = every[:MAX_CHAIN_SLICES]
    original = [drawing.grey(image_CXYZ[0, :, :, z]) for z in slices]
    # A trace of the image stays below the tint, for the reader only.
    hidden = [shown(hidden_XYZ[:, :, z])[..., None] for z in slices]
    masked = [np.where(h, 0.22 * rgb + 0.78 * TINT, rgb) for h, rgb in zip(hidden, original)]
    picture, pitch = drawing.montage([masked, original])
    # A slice is one unit wide.
    right, bottom = picture.shape[1] / pitch[1], picture.shape[0] / pitch[1]
    labels_NS = np.empty((0, 0), int) if labels_NZ is None else labels_NZ[:MAX_CLUSTERERS, slices]
    strips = bottom + STRIP * (np.arange(len(labels_NS)) + 1.0)
    cut = f"the first {len(slices)} of {len(every)} slices; " if len(every) > len(slices) else ""
    note = f"{cut}anterior is up, the patient's right on the left"
    size = max(1.1 + 1.4 * right, 4.5), 1.2 + 1.4 * (bottom + STRIP * len(labels_NS))
    fig = drawing.figure(*size, "A masked chain of slices", note)
    axes = fig.subplots()
    axes.imshow(picture, extent=(0, right, bottom, 0))
    for place, labels_S in zip(strips, labels_NS):
        _label_strip(axes, place, labels_S)
    lines = {0.25 * bottom: "masked", 0.75 * bottom: "original"}
    if labels_NZ is not None and len(labels_NZ):
        lines[strips.mean()] = f"pseudo-labels\nof {len(labels_NS)} of {len(labels_NZ)}\nclusterers"
    heads = [f"patches of {patch_sizes_Z[z]:.0f}\n{hidden_XYZ[:, :, z].mean():.0%} hidden" for z in slices]
    columns = {i + 0.5: f"slice {z}\n{head}" for i, (z, head) in enumerate(zip(slices, heads))}
    drawing.label(axes, columns, lines)
    axes.set(xlim=(0, right), ylim=(bottom + STRIP * (len(labels_NS) + 0.5), 0))
    return fig


def _label_strip(axes: Axes, place: float, labels_S: np.ndarray) -> None:
    """A clusterer's labels; the colour changes where the label does, and the label is written in it."""
    names = list(dict.fromkeys(labels_S.tolist()))
    starts = np.flatnonzero(np.diff(labels_S, prepend=labels_S[0] - 1))
    for start, end in zip(starts, [*starts[1:], len(labels_S)]):
        colour = STRIP_COLOURS[names.index(labels_S[start]) % len(STRIP_COLOURS)]
        bar = axes.barh(place, end - start, 0.86 * STRIP, left=start, color=colour, edgecolor="white")
        axes.bar_label(bar, [str(labels_S[start])], label_type="center", fontsize=7.5)


@drawing.picture
def contact_sheet(
    slices_SXY: np.ndarray,
    labels_S: np.ndarray,
    k_n: int,
    exemplars: Mapping[int, Sequence[int]],
    title: str,
) -> Figure:
    """What one clusterer groups together: a row of exemplar slices for each of its largest codes.

    Args:
        slices_SXY: intensities in [0, 1].
        labels_S: each slice's code in 0..k_n - 1.
        k_n: the clusterer's number of clusters.
        exemplars: code -> positions in ``slices_SXY``, nearest to the centre first.
        title: heading.
    """
    counts_K = np.bincount(labels_S, minlength=k_n)
    codes = [c for c in np.argsort(-counts_K, kind="stable") if exemplars.get(int(c))][:MAX_CODES]
    note = f"the {len(codes)} largest of {(counts_K > 0).sum()} used codes (K = {k_n}), "
    note += f"{counts_K[codes].sum() / len(labels_S):.0%} of {len(labels_S):,} slices; anterior is up"
    sheet = [[drawing.grey(slices_SXY[s]) for s in exemplars[int(c)][:MAX_EXEMPLARS]] for c in codes]
    picture, (high, wide) = drawing.montage(sheet)
    inch = wide / 0.66
    size = max(picture.shape[1] / inch + 1.6, 5.2), picture.shape[0] / inch + 1.0
    fig = drawing.figure(*size, title, note)
    axes = fig.subplots()
    axes.imshow(picture)
    names = [f"code {c}\n{counts_K[c]:,} slices, {counts_K[c] / len(labels_S):.1%}" for c in codes]
    drawing.label(axes, {}, {(row + 0.5) * high: name for row, name in enumerate(names)})
    return fig


@drawing.picture
def clusters_picture(quality: pd.DataFrame, agreement_NN: np.ndarray) -> Figure:
    """Are the clusterers worth predicting? Used codes, majority floor, dead codes, mutual agreement.

    Args:
        quality: one row a clusterer with ``k``, ``perplexity`` (effective number of codes in use),
            ``majority_share`` (the floor a prediction must beat) and ``dead_codes``.
        agreement_NN: normalised mutual information between the clusterers' labels, in [0, 1].
    """
    columns = ["k", "perplexity", "majority_share", "dead_codes"]
    k, perplexity, floor, dead = (quality[column].to_numpy() for column in columns)
    heading = "Quality of the clusterers"
    fig = drawing.figure(10, 5.2, heading, "how hard, and how worthwhile, their labels are to predict")
    mosaic: Any = [["used", "floor", "agreement"], ["k", "dead", "agreement"]]
    plots = fig.subplot_mosaic(mosaic, width_ratios=(1, 1, 1.4))

    axes = plots["used"]
    axes.axline((0, 0), slope=1, color=RULE, label="all codes equally used")
    axes.scatter(k, perplexity, s=14, color=BLUE, alpha=0.75, linewidths=0)
    axes.set(xlim=(0, 1.06 * k.max()), ylim=(0, 1.06 * k.max()))
    axes.legend(loc="upper left")

    look: dict[str, Any] = {"bins": min(20, max(5, len(k) // 4)), "edgecolor": "white"}
    plots["floor"].hist(floor * 100, color=RED, **look)
    plots["k"].hist(k, color=GREY, **look)
    worst_first = np.sort(dead / k)[::-1] * 100
    plots["dead"].bar(np.arange(1, len(k) + 1), worst_first, width=1.0, color=ORANGE)
    plots["dead"].set_ylim(0, max(1.0, 1.1 * worst_first[0]))
    for name in ("used", "floor", "k", "dead"):
        plots[name].grid(axis="y")
        plots[name].locator_params(axis="y", nbins=4, integer=name in ("floor", "k"))

    axes = plots["agreement"]
    order = np.argsort(k, kind="stable")
    heat = axes.imshow(agreement_NN[np.ix_(order, order)], cmap="cividis", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    fig.colorbar(heat, ax=axes, ticks=[0, 0.5, 1], shrink=0.6)

    others = agreement_NN[~np.eye(len(k), dtype=bool)]
    agreed = f"NMI, mean {others.mean():.2f}" if len(others) else "only one"
    used, total, unused = np.median(perplexity / k), f"{k.sum():,}", f"{dead.sum():,}"
    floored = f"mean {floor.mean():.1%}: accuracy must beat this"
    for name, *said in (
        ("used", "perplexity (effective codes)", f"median {used:.0%} of K", "clusters K"),
        ("floor", "majority floor", floored, "slices in the largest code, %", "clusterers"),
        ("k", "number of clusters", f"{len(k)} clusterers, {total} codes", "clusters K", "clusterers"),
        ("dead", "dead codes", f"{unused} of {total} label no slice", "clusterers, worst first", "% of K"),
        ("agreement", "agreement of the clusterers", agreed, "few clusters to many"),
    ):
        drawing.describe(plots[name], *said)
    return fig


def _longest_run(chain_Z: np.ndarray) -> np.ndarray:
    """Positions of the longest run of True, the first of equals."""
    positions = np.flatnonzero(chain_Z)
    assert len(positions), "no masked slice"
    return max(np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1), key=len)
