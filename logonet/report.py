"""Pictures for people, as PNG bytes, and the one self-contained HTML page every stage writes.

Slices are shown as radiologists see them: anterior up, the patient's right on the left of the picture.
Arrays are RAS, so a slice is transposed and both its axes are reversed.

Colours are Okabe and Ito's, which the colour-blind can tell apart. Every picture has a white card of
its own, so it reads in a dark page too.

Shapes: C channels, X Y Z the crop's axes (Z slices), N clusterers, K clusters, S slices of a sheet.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
INK, GREY, RULE = "#1f2328", "#6e7781", "#d0d7de"
MAX_CHAIN_SLICES = 7
MAX_CLUSTERERS = 6
MAX_CODES = 12
MAX_EXEMPLARS = 10


def shown(slice_XY: np.ndarray) -> np.ndarray:
    """A RAS slice as rows and columns of a picture: anterior up, patient's right on the left."""
    return slice_XY.T[::-1, ::-1]


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
    fig = _figure(max(left + width + 0.15, 5.2), bottom + 2 * height + 0.06 + top)
    tint = np.array([0.0, 0.447, 0.698])  # BLUE

    for i, z in enumerate(slices):
        image, hidden = shown(image_CXYZ[0, :, :, z]), shown(hidden_XYZ[:, :, z])
        rgb = np.repeat(np.clip(image, 0, 1)[..., None], 3, axis=-1)
        # A trace of the image stays below the tint, for the reader only.
        masked = np.where(hidden[..., None], 0.22 * rgb + 0.78 * tint, rgb)
        for row, picture in enumerate((masked, rgb)):
            at = (left + i * side, bottom + row * (height + 0.06), side - 0.06, height)
            axes = _axes(fig, at)
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
        _text(fig, left - 0.1, y, name, ha="right", va="center", fontsize=9, color=INK)
    if labels_NZ is not None:
        at = (left, 0.12, width - 0.06, num_labels * strip)
        _label_strip(_axes(fig, at), labels_NZ[:num_labels, slices])
        _text(
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
    _heading(fig, "A masked chain of slices", f"{cut}anterior is up, the patient's right on the left")
    return _png(fig)


def _label_strip(axes: Axes, labels_NZ: np.ndarray) -> None:
    """One row a clusterer; the colour changes where the label does, and the label is written in it."""
    colours = [SKY, ORANGE, GREEN, PURPLE, "#F0E442", BLUE]
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
    fig = _figure(max(left + columns * side + 0.15, 5.2), top + len(codes) * (height + 0.04) + 0.12)
    for row, code in enumerate(codes):
        y = 0.12 + (len(codes) - 1 - row) * (height + 0.04)
        share = counts_K[code] / len(labels_S)
        _text(fig, 0.15, y + height * 0.62, f"code {code}", va="center", fontsize=8.5, color=INK)
        _text(
            fig,
            0.15,
            y + height * 0.36,
            f"{counts_K[code]:,} slices, {share:.1%}",
            va="center",
            fontsize=7.5,
            color=GREY,
        )
        for column, s in enumerate(exemplars[code][:columns]):
            axes = _axes(fig, (left + column * side, y, side - 0.04, height))
            axes.imshow(
                shown(slices_SXY[s]), cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto"
            )
            axes.set_axis_off()
    used = int((counts_K > 0).sum())
    covered = counts_K[codes].sum() / len(labels_S)
    _heading(
        fig,
        title,
        f"the {len(codes)} largest of {used} used codes (K = {k_n}), {covered:.0%} of {len(labels_S):,} "
        "slices; anterior is up",
    )
    return _png(fig)


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
    fig = _figure(
        left + columns * wide + (columns - 1) * gap_x + 0.75,
        bottom + rows * high + (rows - 1) * gap_y + top,
    )
    for i, (key, name, colour, form) in enumerate(plots):
        column, row = i % columns, rows - 1 - i // columns
        axes = _axes(fig, (left + column * (wide + gap_x), bottom + row * (high + gap_y), wide, high))
        _quiet(axes)
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
            _named(axes, "epoch")
    last = history[-1]
    epochs = f"{len(history)} epoch{'s' if len(history) > 1 else ''}"
    _heading(fig, "Training", f"{epochs}, {int(last['step']):,} steps")
    return _png(fig)


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
    fig = _figure(9.7, 5.5)
    bins = min(20, max(5, num // 4))

    axes = _axes(fig, (0.65, 3.15, 2.2, 1.35))
    _quiet(axes)
    limit = float(k.max()) * 1.06
    axes.plot([0, limit], [0, limit], color=RULE, linewidth=1.2, zorder=0)
    slope_deg = math.degrees(math.atan2(1.35, 2.2))  # the axes' height and width: both span 0..limit
    style: Any = {"rotation": slope_deg, "rotation_mode": "anchor", "fontsize": 7.5, "color": GREY}
    axes.text(limit * 0.42, limit * 0.46, "all codes equally used", ha="center", **style)
    axes.scatter(k, perplexity, s=14, color=BLUE, alpha=0.75, linewidths=0)
    axes.set(xlim=(0, limit), ylim=(0, limit))
    _title(axes, "perplexity (effective codes)", f"median {np.median(perplexity / k):.0%} of K")
    _named(axes, "clusters K")

    axes = _axes(fig, (3.55, 3.15, 2.2, 1.35))
    _quiet(axes, whole=True)
    axes.hist(floor * 100, bins=bins, color=RED, edgecolor="white", linewidth=0.6)
    _title(axes, "majority floor", f"mean {floor.mean():.1%}: accuracy must beat this")
    _named(axes, "slices in the largest code, %", "clusterers")

    axes = _axes(fig, (0.65, 0.6, 2.2, 1.35))
    _quiet(axes, whole=True)
    axes.hist(k, bins=bins, color=GREY, edgecolor="white", linewidth=0.6)
    _title(axes, "number of clusters", f"{num} clusterers, {k.sum():,} codes")
    _named(axes, "clusters K", "clusterers")

    axes = _axes(fig, (3.55, 0.6, 2.2, 1.35))
    _quiet(axes)
    axes.bar(np.arange(1, num + 1), np.sort(dead / k)[::-1] * 100, width=1.0, color=ORANGE, linewidth=0)
    axes.set_ylim(0, max(1.0, float((dead / k).max()) * 110))
    _title(axes, "dead codes", f"{int(dead.sum()):,} of {k.sum():,} label no slice")
    _named(axes, "clusterers, worst first", "% of K")

    axes = _axes(fig, (6.35, 1.4, 2.7, 2.7))
    order = np.argsort(k, kind="stable")
    heat = axes.imshow(agreement_NN[np.ix_(order, order)], cmap="cividis", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    others = agreement_NN[~np.eye(num, dtype=bool)]
    _title(axes, "agreement of the clusterers", f"mean {others.mean():.2f}" if num > 1 else "only one")
    _named(axes, "few clusters to many")
    bar = fig.colorbar(heat, cax=_axes(fig, (9.13, 1.4, 0.1, 2.7)), ticks=[0, 0.5, 1])
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(labelsize=8, colors=GREY, length=2)
    bar.ax.set_title("NMI", fontsize=8, color=GREY, pad=5)
    _heading(fig, "Quality of the clusterers", "how hard, and how worthwhile, their labels are to predict")
    return _png(fig)


def run_page(title: str, sections: Sequence[tuple[str, str | bytes | pd.DataFrame]]) -> str:
    """One self-contained HTML page: pictures inside, no script, nothing fetched, light and dark.

    Args:
        sections: (heading, content): HTML text, which the caller has escaped; a PNG; or a table.
    """
    links = " ".join(
        f'<a href="#s{i}">{html.escape(heading)}</a>' for i, (heading, _) in enumerate(sections) if heading
    )
    body = "\n".join(
        f'<section id="s{i}"><h2>{html.escape(heading)}</h2>\n{_content(heading, content)}</section>'
        for i, (heading, content) in enumerate(sections)
    )
    return PAGE.format(title=html.escape(title), links=links, body=body)


def _content(heading: str, content: str | bytes | pd.DataFrame) -> str:
    if isinstance(content, bytes):
        data = base64.b64encode(content).decode()
        return f'<img alt="{html.escape(heading)}" src="data:image/png;base64,{data}">'
    if isinstance(content, str):
        return content
    numbers = {c: content[c].dtype.kind in "iuf" for c in content.columns}
    head = "".join(
        f"<th{' class=n' if numbers[c] else ''}>{html.escape(str(c))}</th>" for c in content.columns
    )
    rows = "\n".join(
        "<tr>"
        + "".join(
            f"<td{' class=n' if numbers[c] else ''}>{html.escape(_cell(v))}</td>"
            for c, v in zip(content.columns, row)
        )
        + "</tr>"
        for row in content.itertuples(index=False, name=None)
    )
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float | np.floating):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int | np.integer) and not isinstance(value, bool) else str(value)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ --ink: #1f2328; --soft: #59636e; --page: #f6f8fa; --card: #fff; --rule: #d1d9e0; --link: #0969da; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6edf3; --soft: #9198a1; --page: #0d1117; --card: #151b23; --rule: #3d444d;
    --link: #4493f8; }}
}}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }}
main {{ max-width: 1080px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }}
h1 {{ font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; }}
h2 {{ font-size: 1.1rem; margin: 0 0 .75rem; }}
a {{ color: var(--link); text-decoration: none; }} a:hover {{ text-decoration: underline; }}
nav {{ display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; margin-bottom: 1.5rem; }}
section {{ background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: 1.1rem 1.25rem; margin: 0 0 1.1rem; }}
img {{ display: block; max-width: 100%; height: auto; margin: 0 auto; background: #fff; border-radius: 4px; }}
.table {{ overflow-x: auto; max-height: 34rem; overflow-y: auto; }}
table {{ border-collapse: collapse; font-size: .9rem; min-width: 40%; }}
th, td {{ padding: .32rem .8rem .32rem 0; border-bottom: 1px solid var(--rule); text-align: left;
  vertical-align: top; }}
th {{ position: sticky; top: 0; background: var(--card); color: var(--soft); font-weight: 600; }}
.n {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
pre {{ overflow-x: auto; font-size: .85rem; margin: 0; }}
</style></head>
<body><main>
<h1>{title}</h1>
<nav>{links}</nav>
{body}
</main></body></html>
"""


def _longest_run(chain_Z: np.ndarray) -> np.ndarray:
    """Positions of the longest run of True, the first of equals."""
    positions = np.flatnonzero(chain_Z)
    assert len(positions), "no masked slice"
    return max(np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1), key=len)


def _figure(width_in: float, height_in: float) -> Figure:
    """A figure without pyplot, whose list of open figures grows in a long-lived worker."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width_in, height_in), dpi=160, facecolor="white")
    FigureCanvasAgg(fig)
    return fig


def _axes(fig: Figure, box_in: tuple[float, float, float, float]) -> Axes:
    """Axes at (left, bottom, width, height) inches."""
    width, height = fig.get_size_inches()
    x, y, w, h = box_in
    return fig.add_axes((x / width, y / height, w / width, h / height))


def _text(fig: Figure, x_in: float, y_in: float, text: str, **style: Any) -> None:
    width, height = fig.get_size_inches()
    fig.text(x_in / width, y_in / height, text, **style)


def _heading(fig: Figure, title: str, note: str) -> None:
    height = fig.get_size_inches()[1]
    _text(fig, 0.15, height - 0.15, title, va="top", fontsize=11, color=INK, fontweight="bold")
    _text(fig, 0.15, height - 0.37, note, va="top", fontsize=8, color=GREY)


def _title(axes: Axes, title: str, note: str) -> None:
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


def _named(axes: Axes, x: str, y: str = "") -> None:
    axes.set_xlabel(x, fontsize=8.5, color=GREY, labelpad=3)
    axes.set_ylabel(y, fontsize=8.5, color=GREY)


def _quiet(axes: Axes, whole: bool = False) -> None:
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


def _png(fig: Figure) -> bytes:
    out = io.BytesIO()
    # No "Software" and no date: the same data give the same bytes, which artifacts' checksums rely on.
    fig.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
