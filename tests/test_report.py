"""Pictures say what they were given, whatever its size, and the page needs nothing but itself."""

from __future__ import annotations

import html.parser
import io
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from logonet import reporting
from logonet.core.seeding import rng
from logonet.data import phantom
from logonet.reporting import drawing


def pixels(png: bytes) -> np.ndarray:
    """RGB rows of a PNG, uint8 (rows, columns, 3)."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


@pytest.fixture
def words(monkeypatch):
    """What is written in the pictures that the test draws."""
    from matplotlib.text import Text

    seen: list[str] = []
    draw = Text.draw

    def spy(self, renderer):
        if self.get_visible() and self.get_text():
            seen.append(self.get_text())
        draw(self, renderer)

    monkeypatch.setattr(Text, "draw", spy)
    return seen


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


def test_slices_are_shown_as_radiologists_see_them():
    """Anterior is the picture's top, the patient's right its left."""
    slice_XY = np.zeros((3, 5))
    slice_XY[2, 4] = 1.0  # RAS: the last x is the patient's right, the last y is anterior
    assert np.argwhere(reporting.shown(slice_XY)).tolist() == [[0, 0]]
    assert reporting.shown(slice_XY).shape == (5, 3)


@pytest.mark.parametrize(
    ("chain", "num_slices", "expected"),
    [([4], 5, [4]), ([0, 1, 4, 5, 6], 8, [4, 5, 6]), (list(range(12)), 12, list(range(7)))],
)
@pytest.mark.parametrize("num_clusterers", [0, 1, 9])
def test_the_longest_chain_is_shown(chain, num_slices, expected, num_clusterers, words):
    image, hidden, chain_Z, sizes, labels = sample(8, num_slices, chain, num_clusterers)
    pixels(reporting.chain_picture(image, hidden, chain_Z, sizes, labels if num_clusterers else None))
    assert [w for w in words if w.startswith("slice ")] == [f"slice {z}" for z in expected]
    assert f"patches of 4\n{hidden[:, :, expected[0]].mean():.0%} hidden" in words
    if num_clusterers:
        shown = min(num_clusterers, reporting.MAX_CLUSTERERS)
        assert f"pseudo-labels\nof {shown} of {num_clusterers}\nclusterers" in words
        assert str(labels[0, expected[0]]) in words
    if len(chain) > len(expected) == reporting.MAX_CHAIN_SLICES:
        assert any("the first 7 of 12 slices" in w for w in words)


def test_what_is_hidden_is_tinted_and_the_rest_is_grey():
    image, hidden, chain_Z, sizes, _ = sample(4, 1, [0], 1)
    image[:] = 0.5
    hidden[:] = False
    plain = pixels(reporting.chain_picture(image, hidden, chain_Z, sizes)).astype(int)
    hidden[:, :, 0] = True
    tinted = pixels(reporting.chain_picture(image, hidden, chain_Z, sizes)).astype(int)

    def blue(picture):
        return ((picture[..., 2] - picture[..., 0]) > 80).sum()

    assert blue(plain) == 0
    side = int(1.24 * 160)
    assert blue(tinted) == pytest.approx(side * side * 6 / 4 * 1.05, rel=0.1)


def test_a_sheet_has_a_row_for_each_of_the_largest_codes(words):
    labels_S = np.repeat(np.arange(20), np.arange(1, 21))  # code c has c + 1 slices
    exemplars = {c: list(np.flatnonzero(labels_S == c)[:4]) for c in range(20) if c != 18}
    slices_SXY = rng(0, "sheet").random((len(labels_S), 6, 6))
    pixels(reporting.contact_sheet(slices_SXY, labels_S, 25, exemplars, "Clusterer 3"))
    assert [w for w in words if w.startswith("code ")] == [f"code {c}" for c in [19, *range(17, 6, -1)]]
    assert "20 slices, 9.5%" in words
    assert any("of 20 used codes (K = 25)" in w for w in words)


def test_a_sheet_of_one_code(words):
    pixels(reporting.contact_sheet(np.zeros((2, 4, 4)), np.array([1, 1]), 2, {0: [], 1: [0]}, "One"))
    assert "2 slices, 100.0%" in words


def test_curves_name_their_last_value_and_their_floor(words):
    entries = history(
        3, accuracy_floor=0.046, data_wait_share=0.031, samples_per_s=41.2, effective_rank=17.25
    )
    pixels(reporting.curves(entries))
    assert {"1.67", "30.0%", "majority floor 4.6%", "3.1%", "41.2", "17.2", "3.3e-5"} <= set(words)
    assert "3 epochs, 21 steps" in words


@pytest.mark.parametrize("num_epochs", [1, 2])
def test_curves_draw_what_was_measured_and_no_more(num_epochs, words):
    entries = history(num_epochs, effective_rank=None)
    entries[0]["loss"] = float("nan")
    pixels(reporting.curves(entries, floors={"accuracy": 0.02}))
    assert "effective rank of features" not in words
    assert "samples per second" not in words
    assert "floor 2.0%" in words
    assert ("2.5" in words) == (num_epochs == 2)  # the loss of epoch 2; epoch 1 has none


@pytest.mark.parametrize("k", [[80], [80, 500], [100] * 3, list(range(80, 160))])
def test_quality_of_any_number_of_clusterers(k, words):
    agreement_NN = np.full((len(k), len(k)), 0.25)
    np.fill_diagonal(agreement_NN, 1.0)
    pixels(reporting.clusters_picture(quality(k), agreement_NN))
    assert f"{len(k)} clusterers, {sum(k):,} codes" in words
    assert f"{sum(v // 50 for v in k):,} of {sum(k):,} label no slice" in words
    assert ("only one" if len(k) == 1 else "mean 0.25") in words
    assert "median 60% of K" in words


def test_the_same_data_give_the_same_bytes():
    assert reporting.curves(history(3)) == reporting.curves(history(3))


class Page(html.parser.HTMLParser):
    """Collects what a browser would fetch or run, checks nesting, and keeps the text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.text, self.tags = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_a_page_is_one_file():
    png = reporting.curves(history(2))
    table = pd.DataFrame(
        {
            "case <b>": ["a & b", "<script>"],
            "dice": [0.91234567, float("nan")],
            "n": [12345, 2],
            "ok": [True, False],
        }
    )
    page = Page(
        reporting.run_page(
            "Run <1>", [("Curves & co", png), ("Table", table), ("Words", "<p>by <i>hand</i></p>")]
        )
    )
    text = " ".join(page.text)
    for word in (
        "Run <1>",
        "Curves & co",
        "case <b>",
        "a & b",
        "<script>",
        "0.9123",
        "12,345",
        "hand",
        "True",
    ):
        assert word in text
    assert "nan" not in text.lower().split()
    assert "script" not in page.tags
    assert "i" in page.tags
    assert page.tags.count("img") == 1
    fetched = [link for link in page.links if not link.startswith("#")]
    assert [link[:22] for link in fetched] == ["data:image/png;base64,"]
    assert "url(" not in reporting.PAGE
    assert "prefers-color-scheme: dark" in reporting.PAGE


def test_pictures_leave_no_figures_behind():
    code = "import sys; from logonet import report; assert 'matplotlib' not in sys.modules; "
    code += (
        "report.curves([{'epoch': 1, 'step': 1, 'loss': 1.0}]); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def placed(monkeypatch):
    """Draws a picture and checks that its texts lie within it and none on another; returns the texts."""
    from matplotlib.text import Text

    def check(draw, *args, **kwargs):
        seen: list[tuple[str, tuple[float, float, float, float]]] = []
        draw_text = Text.draw

        def spy(self, renderer):
            if self.get_visible() and self.get_text().strip():
                # Of the letters alone: an annotation's own extent holds the point it is about, too.
                seen.append((self.get_text(), Text.get_window_extent(self, renderer).extents))
            draw_text(self, renderer)

        with monkeypatch.context() as patch:
            patch.setattr(Text, "draw", spy)
            rows, columns, _ = pixels(draw(*args, **kwargs)).shape
        for i, (text, (x0, y0, x1, y1)) in enumerate(seen):
            assert x0 >= 0 and y0 >= 0 and x1 <= columns and y1 <= rows, f"{text!r} is cut off"
            for other, (u0, v0, u1, v1) in seen[:i]:
                apart = x0 >= u1 or u0 >= x1 or y0 >= v1 - 1 or v0 >= y1 - 1
                assert apart, f"{text!r} lies on {other!r}"
        return [text for text, _ in seen]

    return check


@pytest.fixture
def planes(monkeypatch):
    """The slices that a picture shows: (rows and columns, width and height on paper, extent in mm)."""
    from matplotlib.axes import Axes

    seen: list[tuple[np.ndarray, tuple[float, float], tuple[float, ...]]] = []
    imshow = Axes.imshow

    def spy(self, array, **style):
        width, height = self.figure.get_size_inches()
        box = self.get_position()
        seen.append((np.asarray(array), (box.width * width, box.height * height), style["extent"]))
        return imshow(self, array, **style)

    monkeypatch.setattr(Axes, "imshow", spy)
    return seen


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


def fractions():
    names, groups = ["LoGoNet", "DynUNet", "SwinUNETR"], ["10 % of the labels", "100 % of the labels"]
    mean = np.linspace(0.7, 0.9, 6)
    return pd.DataFrame(
        {
            "name": names * 2,
            "group": np.repeat(groups, 3),
            "mean": mean,
            "ci_low": mean - 0.02,
            "ci_high": mean + 0.01,
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


def near(picture, colour, within=12):
    """Pixels of that colour."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(picture.astype(int) - wanted).max(-1) <= within).sum())


def test_curves_of_finetuning_name_the_best_validation(placed):
    texts = placed(reporting.curves, finetuning(30))
    assert {"Dice", "best 0.800, epoch 15", "val 0.575", "train 0.883", "Dice 0.4", "CE 0.41"} <= set(texts)
    assert "masked accuracy" not in texts


@pytest.mark.parametrize("entries", [finetuning(1), finetuning(2), finetuning(80, every=1)[:79]])
def test_curves_of_any_length_are_legible(entries, placed):
    texts = placed(reporting.curves, entries)
    assert "Dice" in texts
    assert any(t.startswith("best") for t in texts) == any("val_dice" in e for e in entries)


def test_the_first_of_equal_validations_is_the_best(words):
    entries = [{"epoch": e, "step": e, "loss": 1.0, "val_dice": d} for e, d in ((2, 0.5), (4, 0.7), (6, 0.7))]
    entries.append({"epoch": 8, "step": 8, "loss": 1.0, "val_dice": float("nan")})
    pixels(reporting.curves(entries))
    assert "best 0.700, epoch 4" in words


@pytest.mark.parametrize(
    ("num_classes", "num_cases", "undefined"),
    [(1, 1, 0), (1, 3, 3), (2, 40, 2), (8, 100, 0), (20, 1000, 150)],
)
def test_boxes_of_any_number_of_classes_and_cases(num_classes, num_cases, undefined, placed):
    frame = results(num_classes, num_cases, undefined)
    texts = placed(reporting.organ_boxes, frame)
    assert texts.count("median") == 3
    for name, of_class in frame.groupby("class"):
        assert name in texts
        found = of_class["dice"].dropna()
        assert (f"{found.median():.3f}" if len(found) else "-") in texts
    count = f"{num_cases - undefined}/{num_cases}" if undefined else f"{num_cases}"
    assert texts.count(count) >= (3 if undefined else 3 * num_classes)
    assert any("n: where defined/all" in t for t in texts) == bool(undefined)


def test_a_far_distance_does_not_flatten_the_others(placed):
    frame = results(2, 40)
    assert "30" not in placed(reporting.organ_boxes, frame)
    frame.loc[0, "hd95_mm"] = 200.0
    assert {"1", "3", "10", "30", "100"} <= set(placed(reporting.organ_boxes, frame))


@pytest.mark.parametrize(
    "table",
    [
        comparison(),
        comparison(("dice",), ("mean",)),
        comparison(("dice", "hd95_mm", "nsd_2mm"), [*"abcdefgh", "mean"]),
    ],
    ids=["four metrics", "one number", "nine rows"],
)
def test_a_forest_plot_says_its_numbers(table, placed):
    table.loc[0, ["difference", "ci_low", "ci_high", "p"]] = np.nan
    table.loc[len(table) - 1, "p"] = 1e-5
    texts = placed(reporting.compare_picture, table, "scratch", "pretrained")
    assert "pretrained against scratch, on the same cases" in texts
    for entry in table.dropna().to_dict("records"):
        digits = 3 if entry["metric"] == "hd95_mm" else 4
        assert f"{entry['difference']:+.{digits}f}" in texts
    assert "-" in texts
    assert "<0.001" in texts


def test_better_is_blue_worse_is_red_and_undecided_grey():
    def colours(metric, difference, spread=0.01):
        table = comparison((metric,), ("liver",)).assign(
            difference=difference, ci_low=difference - spread, ci_high=difference + spread
        )
        picture = pixels(reporting.compare_picture(table))
        return near(picture, drawing.BLUE) > 100, near(picture, drawing.RED) > 100

    assert colours("dice", 0.1) == (True, False)
    assert colours("dice", -0.1) == (False, True)
    assert colours("hd95_mm", -0.1) == (True, False)
    assert colours("hd95_mm", 0.1) == (False, True)
    assert colours("dice", 0.1, spread=0.2) == (False, False)


def test_means_with_intervals(placed):
    table = fractions()
    table.loc[1, ["mean", "ci_low", "ci_high"]] = np.nan
    texts = placed(reporting.bars_with_ci, table, "Hippocampus", "mean Dice")
    assert {"10 % of the labels", "100 % of the labels", "0.700", "[0.680, 0.710]", "-", "mean Dice"} <= set(
        texts
    )
    assert texts.count("DynUNet") == 2
    placed(reporting.bars_with_ci, table[:1], "One")


def test_three_planes_face_the_reader_as_radiologists_expect(planes):
    """Each plane's first pixel: right anterior, right superior, anterior superior."""
    x, y, z = np.meshgrid(np.arange(6), np.arange(7), np.arange(8), indexing="ij")
    image_XYZ = (100 * x + 10 * y + z).astype(float)
    pred_XYZ = block((6, 7, 8), (1, 2, 3), (4, 5, 6))
    pixels(reporting.overlay(image_XYZ, None, pred_XYZ, (1, 1, 1), {1: "a"}, "", window=(0, 600)))
    axial, coronal, sagittal = (array for array, _, _ in planes)
    np.testing.assert_array_equal(axial, reporting.shown(image_XYZ[:, :, 4]))
    np.testing.assert_array_equal(coronal, reporting.shown(image_XYZ[:, 3]))
    np.testing.assert_array_equal(sagittal, reporting.shown(image_XYZ[2]))
    assert (axial[0, 0], coronal[0, 0], sagittal[0, 0]) == (564, 537, 267)


@pytest.mark.parametrize("spacing_mm", [(0.8, 0.8, 5.0), (1, 1, 1), (3.0, 1.0, 1.0)])
@pytest.mark.parametrize("size_vox", [(40, 36, 32), (40, 36, 4), (16, 16, 60)])
def test_planes_have_the_proportions_of_the_body(spacing_mm, size_vox, planes, placed):
    image, truth, pred, _ = scan(size_vox=size_vox)
    placed(reporting.overlay, image, truth, pred, spacing_mm, ORGANS, "case")
    x, y, z = (n * s for n, s in zip(size_vox, spacing_mm))
    for (wide_mm, high_mm), (_, (wide_in, high_in), extent) in zip([(x, y), (x, z), (y, z)], planes):
        assert wide_in / high_in == pytest.approx(wide_mm / high_mm)
        assert extent == pytest.approx((0, wide_mm, high_mm, 0))
        assert wide_in / wide_mm == pytest.approx(planes[0][1][0] / x)  # one scale for all three


def test_planes_pass_where_small_classes_are_too(planes):
    truth_XYZ = block((30, 30, 30), (0, 0, 0), (30, 30, 10), value=1)
    truth_XYZ[14:17, 20:23, 25:28] = 2
    z = np.broadcast_to(np.arange(30.0), (30, 30, 30))
    pixels(
        reporting.overlay(z, truth_XYZ, truth_XYZ, (1, 1, 1), {1: "large", 2: "small"}, "", window=(0, 30))
    )
    assert planes[0][0][0, 0] == 26


def test_the_picture_says_the_dice_it_was_given(placed):
    image, truth, pred, spacing = scan()
    texts = placed(reporting.overlay, image, truth, pred, spacing, ORGANS, "case_1")
    dice = [
        2 * ((truth == v) & (pred == v)).sum() / ((truth == v).sum() + (pred == v).sum()) for v in (1, 2, 3)
    ]
    for value, expected in enumerate(dice, start=1):
        assert ORGANS[value] in texts
        assert f"{expected:.3f}" in texts
    assert f"mean Dice {np.mean(dice):.3f}" in texts
    assert ORGANS[5] not in texts  # declared, and neither in truth nor in prediction
    assert {"truth", "prediction", "case_1"} <= set(texts)


def test_a_prediction_alone_and_an_empty_one(placed):
    image, truth, pred, spacing = scan()
    texts = placed(reporting.overlay, image, None, pred, spacing, ORGANS, "new scan")
    assert "prediction alone: no truth was given" in texts
    assert not {"truth", "Dice"} & set(texts)
    nothing = np.zeros_like(pred)
    texts = placed(reporting.overlay, image, truth, nothing, spacing, ORGANS, "missed")
    assert texts.count("0.000") == 3 and "mean Dice 0.000" in texts
    texts = placed(reporting.overlay, image, nothing, nothing, spacing, ORGANS, "empty")
    assert "no class in truth or prediction" in texts
    assert "axial, 17/32" in texts


def test_truth_is_solid_and_prediction_dashed():
    image, truth, _, spacing = scan(classes=2)
    nothing = np.zeros_like(truth)

    def coloured(*labels):
        return near(
            pixels(reporting.overlay(image, *labels, spacing, {1: "liver"}, "")), drawing.SKY, within=40
        )

    # The key is the same in all three.
    solid, dashed = coloured(truth, nothing), coloured(nothing, truth)
    assert coloured(None, truth) == pytest.approx(solid, rel=0.02)
    key = near(
        pixels(
            reporting.overlay(
                image, nothing, block(truth.shape, (0, 0, 0), (1, 1, 1)), spacing, {1: "liver"}, ""
            )
        ),
        drawing.SKY,
        within=40,
    )
    assert key < dashed < solid


def test_what_is_small_is_enlarged(planes, placed):
    truth_XYZ = block((60, 60, 40), (20, 20, 10), (26, 26, 14))
    image_XYZ = rng(0, "image").random(truth_XYZ.shape)
    texts = placed(reporting.overlay, image_XYZ, truth_XYZ, truth_XYZ, (1, 1, 2.5), {1: "gland"}, "small")
    assert [t for t in texts if "enlarged" in t] == [
        f"{p}, enlarged" for p in ("axial", "coronal", "sagittal")
    ]
    # 6 mm of margin: 6 voxels in the plane, 3 slices of 2.5 mm.
    np.testing.assert_array_equal(planes[3][0], reporting.shown(image_XYZ[14:32, 14:32, 12]))
    np.testing.assert_array_equal(planes[4][0], reporting.shown(image_XYZ[14:32, 23, 7:17]))
    planes.clear()
    texts = placed(
        reporting.overlay, image_XYZ, None, np.ones_like(truth_XYZ), (1, 1, 2.5), {1: "all"}, "large"
    )
    assert len(planes) == 3 and not any("enlarged" in t for t in texts)


def test_many_classes_end_in_a_count(placed):
    labels_XYZ = np.repeat(np.arange(1, 41, dtype=np.uint8), 8).reshape(40, 8, 1) * np.ones(
        (1, 1, 8), np.uint8
    )
    classes = {v: f"class {v}" for v in range(60)}
    texts = placed(reporting.overlay, labels_XYZ / 40, labels_XYZ, labels_XYZ, (1, 1, 1), classes, "many")
    assert f"and {40 - reporting.MAX_KEY} more" in texts
    assert "class 24" in texts and "class 25" not in texts


@pytest.mark.parametrize("num_cases", [1, 3])
def test_cases_stand_below_one_another_with_their_dice(num_cases, placed, planes):
    sizes = [(40, 36, 32), (30, 30, 6), (24, 40, 40)]
    labels = ["worst: case_17", "median: case_04", "best: case_31"][:num_cases]
    cases = [(label, *scan(i, sizes[i], shift=(3 - i, 0, 0))) for i, label in enumerate(labels)]
    texts = placed(reporting.cases_overlay, cases, ORGANS, "Three cases")
    assert set(labels) <= set(texts) and len(planes) == 3 * num_cases
    for _, _, truth, pred, _ in cases:
        both = [
            ((truth == v) & (pred == v)).sum() / ((truth == v).sum() + (pred == v).sum()) for v in (1, 2, 3)
        ]
        assert any(
            t.startswith(f"mean Dice {2 * np.mean(both):.3f}: liver {2 * both[0]:.3f}, ") for t in texts
        )


def test_labels_of_another_shape_are_refused():
    image, truth, pred, spacing = scan()
    with pytest.raises(AssertionError, match="shape"):
        reporting.overlay(image, truth[1:], pred, spacing, ORGANS, "")


DRAWN_TWICE = {
    "finetuning": lambda: reporting.curves(finetuning(12)),
    "boxes": lambda: reporting.organ_boxes(results(3, 70)),
    "forest": lambda: reporting.compare_picture(comparison()),
    "intervals": lambda: reporting.bars_with_ci(fractions(), "Results"),
    "overlay": lambda: reporting.overlay(*scan(), ORGANS, "case"),
    "cases": lambda: reporting.cases_overlay([("worst", *scan()), ("best", *scan(1))], ORGANS),
}


@pytest.mark.parametrize("name", DRAWN_TWICE)
def test_every_picture_is_the_same_twice(name):
    first = DRAWN_TWICE[name]()
    rows, columns, _ = pixels(first).shape
    assert 200 < rows < 2000 and 800 < columns < 2000
    assert DRAWN_TWICE[name]() == first


def test_a_page_shows_transferred_weights_and_lineage():
    by_module = pd.DataFrame(
        {"tensors": [12, 2], "matched": [1500, 0], "adapted": [500, 0], "skipped": [0, 0], "new": [0, 77]},
        index=pd.Index(["encoder.<stem>", "head"], name="module"),
    )
    chain = [
        ("scans", "9f" * 20, "160 & more"),
        ("pretraining", "<id>", ""),
        ("evaluation", "77d0", "40 cases"),
    ]
    page = Page(
        reporting.run_page(
            "Finetuned",
            [
                (
                    "Weights",
                    reporting.transfer_section(by_module, "a <b>: 96 %\nmatched 12\nmodule  tensors"),
                ),
                ("Lineage", reporting.lineage(chain)),
            ],
        )
    )
    text = " ".join(page.text)
    for word in ("encoder.<stem>", "1,500", "a <b>: 96 %", "matched 12", "160 & more", "<id>", "evaluation"):
        assert word in text
    assert "module  tensors" not in text  # the table in words
    assert page.tags.count("li") == 3 and page.tags.count("tr") == 3
    assert page.tags.count("i") == 4 + 3  # four in the key; a module's bar has a part for each action it saw
    assert all(link.startswith("#") for link in page.links)


def test_a_transfers_own_report_can_be_shown():
    transfer = pytest.importorskip(
        "logonet.training.weight_transfer", reason="needs the rules of weight transfer"
    )
    assert tuple(reporting.page.ACTIONS) == transfer.ACTIONS
    rows = (
        transfer.Row("stem.weight", "stem", "adapted", 4096, "2 input channels"),
        transfer.Row("head.bias", "head", "new", 3, "the classifier stays fresh"),
        transfer.Row("projector.weight", "projector", "skipped", 128, "no place"),
    )
    made = transfer.Report("models:/encoder@champion", rows, 4096, 1.0)
    page = Page(reporting.run_page("", [("", reporting.transfer_section(made.by_module(), made.summary()))]))
    text = " ".join(page.text)
    assert all(word in text for word in ("projector", "4,096", "128", "models:/encoder@champion"))
