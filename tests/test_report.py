"""Pictures show what they were given, whatever its size."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image

from logonet import reporting
from logonet.core.seeding import rng
from logonet.data import phantom
from logonet.reporting import drawing, segmentation

NAN = float("nan")


def pixels(png: bytes) -> np.ndarray:
    """RGB rows of a PNG, uint8 (rows, columns, 3)."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def figure(draw, *args, **kwargs):
    """The figure behind a picture, to be asked what it shows."""
    return draw.__wrapped__(*args, **kwargs)


def words(draw, *args, **kwargs):
    """All texts of a picture."""
    texts = figure(draw, *args, **kwargs).findobj(Text)
    return [text.get_text() for text in texts if text.get_visible() and text.get_text()]


def sample(size, num_slices, chain, num_clusterers):
    """A crop with masked slices at ``chain``."""
    g = rng(0, "report", size, num_slices)
    image_CXYZ = g.random((1, size, size + 2, num_slices)).astype(np.float32)
    chain_Z = np.zeros(num_slices, dtype=bool)
    chain_Z[chain] = True
    hidden_XYZ = (g.random(image_CXYZ.shape[1:]) < 0.7) & chain_Z
    labels_NZ = g.integers(0, 500, (num_clusterers, num_slices)).astype(np.int16)
    return image_CXYZ, hidden_XYZ, chain_Z, np.where(chain_Z, 4, 0), labels_NZ


def history(num_epochs, **more):
    return [
        {"epoch": e, "step": 7 * e, "loss": 5.0 / e, "accuracy": 0.1 * e, "lr": 1e-4 / e, **more}
        for e in range(1, num_epochs + 1)
    ]


def quality(k):
    k = np.array(k)
    return pd.DataFrame({"k": k, "perplexity": k * 0.6, "majority_share": 3 / k, "dead_codes": k // 50})


def finetuning(num_epochs, every=5):
    entries = history(num_epochs, dice_loss=0.4, ce=0.41, accuracy=None)
    for e in entries:
        e["train_dice"] = 0.9 - 0.5 / e["epoch"]
        if e["epoch"] % every == 0:
            e["val_dice"] = 0.8 - 0.001 * (e["epoch"] - 15) ** 2
    return entries


def results(num_classes, num_cases, undefined=0):
    """Rows as evaluation writes them, the first ``undefined`` cases of the first class without a value."""
    g = rng(0, "results", num_classes, num_cases)
    rows = [
        {
            "scan_id": f"case_{i:03d}",
            "class": f"organ number {c}",
            "dice": g.beta(9, 1.5),
            "hd95_mm": g.exponential(4.0),
            "nsd_2mm": g.beta(12, 1.2),
        }
        for i in range(num_cases)
        for c in range(num_classes)
    ]
    frame = pd.DataFrame(rows)
    empty = (frame["class"] == "organ number 0") & (frame["scan_id"] < f"case_{undefined:03d}")
    frame.loc[empty, ["dice", "hd95_mm", "nsd_2mm"]] = np.nan
    return frame


def comparison(metrics=("dice", "hd95_mm", "nsd_1mm", "nsd_2mm"), classes=("liver", "left kidney", "mean")):
    g = rng(0, "comparison")
    middle = g.normal(0, 0.02, len(metrics) * len(classes))
    return pd.DataFrame(
        {
            "class": [c for _ in metrics for c in classes],
            "metric": [m for m in metrics for _ in classes],
            "difference": middle,
            "ci_low": middle - 0.01,
            "ci_high": middle + 0.012,
            "p": g.random(len(middle)),
        }
    )


def scan(seed=0, size_vox=(40, 36, 32), spacing_mm=(2.0, 2.0, 3.0), classes=4, shift=(1, 1, 0)):
    """A phantom in [0, 1], its labels, and the same labels moved, as a prediction."""
    volume, truth_XYZ = phantom.phantom(seed, size_vox, spacing_mm, "CT", classes)
    image_XYZ = np.clip((volume.array_CXYZ[0] + 160) / 400, 0, 1)
    return image_XYZ, truth_XYZ, np.roll(truth_XYZ, shift, (0, 1, 2)), spacing_mm


ORGANS = {0: "background", **dict(enumerate(phantom.ORGANS, start=1))}


def block(shape, low, high, value=1):
    labels_XYZ = np.zeros(shape, np.uint8)
    labels_XYZ[tuple(slice(a, b) for a, b in zip(low, high))] = value
    return labels_XYZ


# ------------------------------------------------------------------------------------ every picture


def sheet(num_codes):
    labels_S = np.repeat(np.arange(num_codes), np.arange(1, num_codes + 1))  # code c has c + 1 slices
    exemplars = {c: list(np.flatnonzero(labels_S == c)[:4]) for c in range(num_codes) if c != 18}
    return rng(0, "sheet").random((len(labels_S), 6, 8)), labels_S, 500, exemplars, "Clusterer 3"


def agreement(num):
    return np.full((num, num), 0.25) + 0.75 * np.eye(num)


def nothing(frame, *columns):
    return frame.assign(**dict.fromkeys(columns, NAN))


MEASURED = ("dice", "hd95_mm", "nsd_2mm")
INTERVAL = ("ci_low", "ci_high")
MANY = [f"organ number {i} with a long name" for i in range(30)]
PICTURES = {
    "curves of a pretraining": lambda: reporting.curves(history(30, accuracy_floor=0.05, samples_per_s=41.2)),
    "curves of a finetuning": lambda: reporting.curves(finetuning(12)),
    "curves of one epoch": lambda: reporting.curves(history(1)),
    "curves of NaN": lambda: reporting.curves(history(2, loss=NAN, accuracy=NAN, lr=None)),
    "curves of nothing": lambda: reporting.curves([]),
    "a chain": lambda: reporting.chain_picture(*sample(8, 12, list(range(12)), 9)),
    "a chain of one slice": lambda: reporting.chain_picture(*sample(8, 1, [0], 0)),
    "a chain without labels": lambda: reporting.chain_picture(*sample(8, 3, [1, 2], 1)[:4]),
    "a sheet": lambda: reporting.contact_sheet(*sheet(20)),
    "a sheet of one code": lambda: reporting.contact_sheet(*sheet(1)),
    "a sheet of no exemplars": lambda: reporting.contact_sheet(*sheet(2)[:3], {}, "empty"),
    "clusterers": lambda: reporting.clusters_picture(quality(range(80, 120)), agreement(40)),
    "one clusterer": lambda: reporting.clusters_picture(quality([500]), agreement(1)),
    "boxes": lambda: reporting.organ_boxes(results(3, 70, 2)),
    "boxes of 30 classes": lambda: reporting.organ_boxes(results(30, 2)),
    "boxes of one case": lambda: reporting.organ_boxes(results(1, 1)),
    "boxes of NaN": lambda: reporting.organ_boxes(nothing(results(2, 3), *MEASURED)),
    "a forest": lambda: reporting.compare_picture(comparison()),
    "a forest of 30 classes": lambda: reporting.compare_picture(comparison(("dice",), [*MANY, "mean"])),
    "a forest of NaN": lambda: reporting.compare_picture(
        nothing(comparison(("dice",), ["mean"]), "difference", "p", *INTERVAL)
    ),
    "a case": lambda: reporting.cases_overlay([("case", *scan())], ORGANS),
    "a case without classes": lambda: reporting.cases_overlay([("none", *scan())], {}),
    "a flat case": lambda: reporting.cases_overlay([("flat", *scan(0, (40, 36, 2)))], ORGANS),
    "cases": lambda: reporting.cases_overlay([("worst", *scan()), ("best", *scan(1))], ORGANS),
}


SLOW = ("boxes of 30 classes", "clusterers", "a forest", "boxes", "cases")  # their like is drawn anyway


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in PICTURES]
)
def test_every_picture_can_be_looked_at(name):
    """Also pictures of one row, of nothing but NaN, and of 30 classes."""
    picture = pixels(PICTURES[name]())
    assert picture.std() > 1
    assert 100 < picture.shape[0] < 2600 and 300 < picture.shape[1] < 2600


@pytest.mark.parametrize("name", ["curves of one epoch", "a case"])
def test_the_same_data_give_the_same_bytes(name):
    assert PICTURES[name]() == PICTURES[name]()


LEGIBLE = {
    "curves": (reporting.curves, finetuning(30)),
    "a chain": (reporting.chain_picture, *sample(8, 7, list(range(7)), 6)),
    "boxes": (reporting.organ_boxes, results(14, 8).replace({"organ number 3": MANY[0]})),
    "a forest": (reporting.compare_picture, comparison(("dice", "hd95_mm", "nsd_2mm"), [*MANY[:14], "mean"])),
    "a case": (reporting.cases_overlay, [("case", *scan())], ORGANS),
    "a tall case": (reporting.cases_overlay, [("case", *scan(0, (16, 16, 60)))], ORGANS),
}


def check_legible(draw, *args):
    """No text lies on another one."""
    import matplotlib

    with matplotlib.rc_context(drawing.STYLE):
        fig = figure(draw, *args)
        fig.draw_without_rendering()
    axes = [axis for one in fig.axes for axis in (one.xaxis, one.yaxis)]
    ticks = [(tick, sorted(axis.get_view_interval())) for axis in axes for tick in axis.get_major_ticks()]
    outside = [tick.label1 for tick, (low, high) in ticks if not low <= tick.get_loc() <= high]
    shown = [t for t in fig.findobj(Text) if t.get_visible() and t.get_text().strip() and t not in outside]
    # Of the letters alone: an annotation's own extent holds the point it is about, too.
    boxes = [(t.get_text(), Text.get_window_extent(t).padded(-1)) for t in shown]
    on_another = [(a, b) for i, (a, at) in enumerate(boxes) for b, other in boxes[:i] if at.overlaps(other)]
    assert on_another == []


@pytest.mark.parametrize("name", LEGIBLE)
def test_texts_do_not_lie_on_one_another(name):
    check_legible(*LEGIBLE[name])


def test_pictures_leave_no_figures_behind():
    """matplotlib is imported when the first picture is drawn, and pyplot with its list of figures never."""
    code = "import sys; from logonet import reporting; assert 'matplotlib' not in sys.modules; "
    code += "reporting.curves([{'epoch': 1, 'step': 1, 'loss': 1.0}]); assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------------------------------- pretraining


def test_slices_are_shown_as_radiologists_see_them():
    """Anterior is the picture's top, the patient's right its left."""
    slice_XY = np.zeros((3, 5))
    slice_XY[2, 4] = 1.0  # RAS: the last x is the patient's right, the last y is anterior
    assert np.argwhere(drawing.shown(slice_XY)).tolist() == [[0, 0]]
    assert drawing.shown(slice_XY).shape == (5, 3)


@pytest.mark.parametrize(
    ("chain", "num_slices", "expected"),
    [([4], 5, [4]), ([0, 1, 4, 5, 6], 8, [4, 5, 6]), (list(range(12)), 12, list(range(7)))],
)
def test_the_longest_chain_is_shown(chain, num_slices, expected):
    image, hidden, chain_Z, sizes, labels = sample(8, num_slices, chain, 9)
    said = words(reporting.chain_picture, image, hidden, chain_Z, sizes, labels)
    shares = [f"{hidden[:, :, z].mean():.0%} hidden" for z in expected]
    assert [w for w in said if w.startswith("slice ")] == [
        f"slice {z}\npatches of 4\n{share}" for z, share in zip(expected, shares)
    ]
    assert {"pseudo-labels\nof 6 of 9\nclusterers", str(labels[0, expected[0]])} <= set(said)
    assert any("the first 7 of 12 slices" in w for w in said) == (len(chain) == 12)


def test_hidden_voxels_are_tinted_and_the_others_are_grey():
    image, hidden, chain_Z, sizes, _ = sample(4, 1, [0], 1)
    hidden[:] = False
    hidden[3, 5] = True  # right and anterior: the first pixel of the picture
    (axes,) = figure(reporting.chain_picture, image, hidden, chain_Z, sizes).axes
    red, _, blue = axes.images[0].get_array()[0, 0]
    assert blue - red > 0.3
    rest = np.asarray(axes.images[0].get_array())[1:]
    assert np.ptp(rest, axis=-1).max() == 0


def test_a_sheet_has_a_row_for_each_of_the_largest_codes():
    said = words(reporting.contact_sheet, *sheet(20))
    codes = [w.split("\n") for w in said if w.startswith("code ")]
    assert [code for code, _ in codes] == [f"code {c}" for c in [19, *range(17, 6, -1)]]
    assert codes[0][1] == "20 slices, 9.5%"
    assert any("of 20 used codes (K = 500)" in w for w in said)


@pytest.mark.parametrize("k", [[80], [80, 500], [100] * 3])
def test_the_quality_of_clusterers_in_numbers(k):
    said = words(reporting.clusters_picture, quality(k), agreement(len(k)))
    assert f"{len(k)} clusterers, {sum(k):,} codes" in said
    assert f"{sum(v // 50 for v in k):,} of {sum(k):,} label no slice" in said
    assert ("only one" if len(k) == 1 else "NMI, mean 0.25") in said
    assert "median 60% of K" in said


# --------------------------------------------------------------------------------------------- curves


def test_curves_name_their_last_value_and_their_floor():
    entries = history(
        3, accuracy_floor=0.046, data_wait_share=0.031, samples_per_s=41.2, effective_rank=17.25
    )
    said = words(reporting.curves, entries)
    assert {"total 1.67", "30.0%", "majority floor 4.6%", "3.1%", "41.2", "17.2", "3.3e-5"} <= set(said)
    assert "3 epochs, 21 steps" in said


def test_curves_draw_what_was_measured_and_no_more():
    entries = history(2, effective_rank=None)
    entries[0]["loss"] = NAN
    said = words(reporting.curves, entries)
    assert "effective rank of features" not in said and "samples per second" not in said
    assert "total 2.5" in said  # the loss of epoch 2; epoch 1 has none


def test_curves_of_finetuning_name_the_first_of_the_best_validations():
    said = words(reporting.curves, finetuning(30))
    assert {"val 0.575", "train 0.883", "Dice 0.4", "CE 0.41"} <= set(said)
    assert "Dice, best 0.800 at epoch 15" in said and "masked accuracy" not in said
    entries = [{"epoch": e, "step": e, "loss": 1.0, "val_dice": d} for e, d in ((2, 0.5), (4, 0.7), (6, 0.7))]
    entries.append({"epoch": 8, "step": 8, "loss": 1.0, "val_dice": NAN})
    assert "Dice, best 0.700 at epoch 4" in words(reporting.curves, entries)


# -------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize(("num_classes", "num_cases", "undefined"), [(1, 3, 3), (2, 40, 2)])
def test_boxes_say_the_medians_and_how_many_cases_are_defined(num_classes, num_cases, undefined):
    frame = results(num_classes, num_cases, undefined)
    said = words(reporting.organ_boxes, frame)
    for name, of_class in frame.groupby("class"):
        found = of_class["dice"].dropna()
        median = f"{found.median():.3f}" if len(found) else "-"
        assert name in said
        assert any(w.split() == [median, f"{len(found)}/{num_cases}"] for w in said)


def test_a_far_distance_does_not_flatten_the_others():
    frame = results(2, 40)
    assert figure(reporting.organ_boxes, frame).axes[1].get_xscale() == "linear"
    frame.loc[0, "hd95_mm"] = 200.0
    axes = figure(reporting.organ_boxes, frame).axes[1]
    assert axes.get_xscale() == "symlog" and axes.get_xlim()[1] > 200


@pytest.mark.parametrize(
    "table", [comparison(), comparison(("dice",), ("mean",))], ids=["four metrics", "one number"]
)
def test_a_forest_plot_says_its_numbers(table):
    table.loc[len(table) - 1, "p"] = 1e-5
    table.loc[0, ["difference", *INTERVAL]] = NAN
    said = words(reporting.compare_picture, table, "scratch", "pretrained")
    assert "pretrained against scratch, on the same cases" in said
    said = [w.split() for w in said]
    for entry in table.to_dict("records"):
        digits = 3 if entry["metric"] == "hd95_mm" else 4
        difference = (
            f"{entry['difference']:+.{digits}f}" if entry["difference"] == entry["difference"] else "-"
        )
        assert [difference, "<0.001" if entry["p"] < 0.001 else f"{entry['p']:.3f}"] in said


@pytest.mark.parametrize(
    ("metric", "difference", "spread", "expected"),
    [
        ("dice", 0.1, 0.01, drawing.BLUE),
        ("dice", -0.1, 0.01, drawing.RED),
        ("hd95_mm", -0.1, 0.01, drawing.BLUE),
        ("hd95_mm", 0.1, 0.01, drawing.RED),
        ("dice", 0.1, 0.2, drawing.GREY),
        ("dice", NAN, NAN, drawing.GREY),
    ],
)
def test_better_is_blue_worse_is_red_and_undecided_grey(metric, difference, spread, expected):
    table = comparison((metric,), ("liver",)).assign(
        difference=difference, ci_low=difference - spread, ci_high=difference + spread
    )
    (axes,) = figure(reporting.compare_picture, table).axes
    assert {to_hex(c) for shape in axes.collections for c in shape.get_edgecolor()} == {expected.lower()}


# --------------------------------------------------------------------------------------- segmentations


def test_three_planes_face_the_reader_as_radiologists_expect():
    """The first pixel of each plane: right anterior, right superior, anterior superior."""
    x, y, z = np.meshgrid(np.arange(6), np.arange(7), np.arange(8), indexing="ij")
    image_XYZ = (100 * x + 10 * y + z).astype(float)
    pred_XYZ = block((6, 7, 8), (1, 2, 3), (4, 5, 6))
    case = "case", image_XYZ, pred_XYZ, pred_XYZ, (1, 1, 1)
    (axes,) = figure(reporting.cases_overlay, [case], {1: "a"}).axes
    axial, coronal, sagittal = (np.asarray(plane.get_array()) for plane in axes.images)
    np.testing.assert_array_equal(axial, drawing.shown(image_XYZ[:, :, 4]))
    np.testing.assert_array_equal(coronal, drawing.shown(image_XYZ[:, 3]))
    np.testing.assert_array_equal(sagittal, drawing.shown(image_XYZ[2]))
    assert (axial[0, 0], coronal[0, 0], sagittal[0, 0]) == (564, 537, 267)


@pytest.mark.parametrize("spacing_mm", [(0.8, 0.8, 5.0), (3.0, 1.0, 1.0)])
@pytest.mark.parametrize("size_vox", [(40, 36, 4), (16, 16, 60)])
def test_planes_have_the_proportions_of_the_body(spacing_mm, size_vox):
    image, truth, pred, _ = scan(size_vox=size_vox)
    truth[0, 0, 0] = truth[-1, -1, -1] = 1  # so that the whole scan is shown
    (axes,) = figure(reporting.cases_overlay, [("case", image, truth, pred, spacing_mm)], ORGANS).axes
    x, y, z = (n * s for n, s in zip(size_vox, spacing_mm))
    extents = [plane.get_extent() for plane in axes.images]
    assert [(right - left, bottom - top) for left, right, bottom, top in extents] == [
        pytest.approx(size) for size in ((x, y), (x, z), (y, z))
    ]
    assert axes.get_aspect() == 1 and extents[0][1] < extents[1][0] and extents[1][1] < extents[2][0]


def test_planes_pass_where_small_classes_are_too():
    truth_XYZ = block((30, 30, 30), (0, 0, 0), (30, 30, 10), value=1)
    truth_XYZ[14:17, 20:23, 25:28] = 2
    case = segmentation.Case(truth_XYZ, truth_XYZ, truth_XYZ, (1, 1, 1), {1: "large", 2: "small"})
    assert segmentation.focus(case) == [15, 21, 26]


def test_the_picture_says_the_dice_of_its_label_maps():
    image, truth, pred, spacing = scan()
    said = words(reporting.cases_overlay, [("case_1", image, truth, pred, spacing)], ORGANS)
    dice = [
        2 * ((truth == v) & (pred == v)).sum() / ((truth == v).sum() + (pred == v).sum()) for v in (1, 2, 3)
    ]
    for value, expected in enumerate(dice, start=1):
        assert f"{expected:.3f}  {ORGANS[value]}" in said
    assert any(w.startswith(f"case_1\nmean Dice {np.mean(dice):.3f}: ") for w in said)
    assert not any(ORGANS[5] in w for w in said)  # declared, and neither in truth nor in prediction
    assert {"truth", "prediction", "Dice of each class"} <= set(said)


def test_an_empty_prediction_and_an_empty_case():
    image, truth, pred, spacing = scan()
    empty = np.zeros_like(pred)
    said = words(reporting.cases_overlay, [("missed", image, truth, empty, spacing)], ORGANS)
    assert sum(w.startswith("0.000  ") for w in said) == 3
    assert any(w.startswith("missed\nmean Dice 0.000: ") for w in said)
    said = words(reporting.cases_overlay, [("empty", image, empty, empty, spacing)], ORGANS)
    assert "empty\nno class in truth or prediction" in said and "axial, 17/32" in said


def test_truth_is_solid_and_prediction_dashed():
    image, truth, pred, spacing = scan(classes=2)

    def styles(*labels):
        (axes,) = figure(reporting.cases_overlay, [("case", image, *labels, spacing)], {1: "liver"}).axes
        return {dashes is None for lines in axes.collections for _, dashes in lines.get_linestyle()}

    assert styles(truth, np.zeros_like(truth)) == {True}
    assert styles(np.zeros_like(truth), pred) == {False}
    assert styles(truth, pred) == {True, False}


def test_a_small_part_is_enlarged():
    truth_XYZ = block((60, 60, 40), (20, 20, 10), (26, 26, 14))
    image_XYZ = rng(0, "image").random(truth_XYZ.shape)
    full_XYZ = np.ones_like(truth_XYZ)
    cases = [
        (label, image_XYZ, part, part, (1, 1, 2.5)) for label, part in (("a", truth_XYZ), ("b", full_XYZ))
    ]
    enlarged, whole = figure(reporting.cases_overlay, cases, {1: "a"}).axes
    # 6 mm of margin: 6 voxels in the plane, 3 slices of 2.5 mm.
    axial, coronal, _ = (plane.get_array() for plane in enlarged.images)
    np.testing.assert_array_equal(axial, drawing.shown(image_XYZ[14:32, 14:32, 12]))
    np.testing.assert_array_equal(coronal, drawing.shown(image_XYZ[14:32, 23, 7:17]))
    assert whole.images[0].get_array().shape == (60, 60)


def test_many_classes_end_in_a_count():
    labels_XYZ = np.arange(1, 41, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 4), np.uint8)
    classes = {v: f"class {v}" for v in range(60)}
    case = "many", labels_XYZ / 40, labels_XYZ, labels_XYZ, (1, 1, 1)
    said = words(reporting.cases_overlay, [case], classes)
    assert f"and {40 - segmentation.MAX_KEY} more" in said
    assert "1.000  class 24" in said and "1.000  class 25" not in said


def test_cases_stand_below_one_another_with_their_dice():
    labels = ["worst: case_17", "best: case_31"]
    cases = [(label, *scan(i, (40, 36, 32), shift=(3 - i, 0, 0))) for i, label in enumerate(labels)]
    fig = figure(reporting.cases_overlay, cases, ORGANS)
    assert len(fig.axes) == 2
    for axes, (label, _, truth, pred, _) in zip(fig.axes, cases):
        both = [
            ((truth == v) & (pred == v)).sum() / ((truth == v).sum() + (pred == v).sum()) for v in (1, 2, 3)
        ]
        expected = f"{label}\nmean Dice {2 * np.mean(both):.3f}: liver {2 * both[0]:.3f}, "
        assert axes.get_title().startswith(expected) and len(axes.images) == 3


def test_labels_of_another_shape_are_refused():
    image, truth, pred, spacing = scan()
    with pytest.raises(AssertionError, match="shape"):
        reporting.cases_overlay([("case", image, truth[1:], pred, spacing)], ORGANS)
