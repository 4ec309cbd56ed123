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

from logonet import report
from logonet.draws import rng


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
    assert np.argwhere(report.shown(slice_XY)).tolist() == [[0, 0]]
    assert report.shown(slice_XY).shape == (5, 3)


@pytest.mark.parametrize(
    ("chain", "num_slices", "expected"),
    [([4], 5, [4]), ([0, 1, 4, 5, 6], 8, [4, 5, 6]), (list(range(12)), 12, list(range(7)))],
)
@pytest.mark.parametrize("num_clusterers", [0, 1, 9])
def test_the_longest_chain_is_shown(chain, num_slices, expected, num_clusterers, words):
    image, hidden, chain_Z, sizes, labels = sample(8, num_slices, chain, num_clusterers)
    pixels(report.chain_picture(image, hidden, chain_Z, sizes, labels if num_clusterers else None))
    assert [w for w in words if w.startswith("slice ")] == [f"slice {z}" for z in expected]
    assert f"patches of 4\n{hidden[:, :, expected[0]].mean():.0%} hidden" in words
    if num_clusterers:
        shown = min(num_clusterers, report.MAX_CLUSTERERS)
        assert f"pseudo-labels\nof {shown} of {num_clusterers}\nclusterers" in words
        assert str(labels[0, expected[0]]) in words
    if len(chain) > len(expected) == report.MAX_CHAIN_SLICES:
        assert any("the first 7 of 12 slices" in w for w in words)


def test_what_is_hidden_is_tinted_and_the_rest_is_grey():
    image, hidden, chain_Z, sizes, _ = sample(4, 1, [0], 1)
    image[:] = 0.5
    hidden[:] = False
    plain = pixels(report.chain_picture(image, hidden, chain_Z, sizes)).astype(int)
    hidden[:, :, 0] = True
    tinted = pixels(report.chain_picture(image, hidden, chain_Z, sizes)).astype(int)

    def blue(picture):
        return ((picture[..., 2] - picture[..., 0]) > 80).sum()

    assert blue(plain) == 0
    side = int(1.24 * 160)
    assert blue(tinted) == pytest.approx(side * side * 6 / 4 * 1.05, rel=0.1)


def test_a_sheet_has_a_row_for_each_of_the_largest_codes(words):
    labels_S = np.repeat(np.arange(20), np.arange(1, 21))  # code c has c + 1 slices
    exemplars = {c: list(np.flatnonzero(labels_S == c)[:4]) for c in range(20) if c != 18}
    slices_SXY = rng(0, "sheet").random((len(labels_S), 6, 6))
    pixels(report.contact_sheet(slices_SXY, labels_S, 25, exemplars, "Clusterer 3"))
    assert [w for w in words if w.startswith("code ")] == [f"code {c}" for c in [19, *range(17, 6, -1)]]
    assert "20 slices, 9.5%" in words
    assert any("of 20 used codes (K = 25)" in w for w in words)


def test_a_sheet_of_one_code(words):
    pixels(report.contact_sheet(np.zeros((2, 4, 4)), np.array([1, 1]), 2, {0: [], 1: [0]}, "One"))
    assert "2 slices, 100.0%" in words


def test_curves_name_their_last_value_and_their_floor(words):
    entries = history(
        3, accuracy_floor=0.046, data_wait_share=0.031, samples_per_s=41.2, effective_rank=17.25
    )
    pixels(report.curves(entries))
    assert {"1.67", "30.0%", "majority floor 4.6%", "3.1%", "41.2", "17.2", "3.3e-5"} <= set(words)
    assert "3 epochs, 21 steps" in words


@pytest.mark.parametrize("num_epochs", [1, 2])
def test_curves_draw_what_was_measured_and_no_more(num_epochs, words):
    entries = history(num_epochs, effective_rank=None)
    entries[0]["loss"] = float("nan")
    pixels(report.curves(entries, floors={"accuracy": 0.02}))
    assert "effective rank of features" not in words
    assert "samples per second" not in words
    assert "floor 2.0%" in words
    assert ("2.5" in words) == (num_epochs == 2)  # the loss of epoch 2; epoch 1 has none


@pytest.mark.parametrize("k", [[80], [80, 500], [100] * 3, list(range(80, 160))])
def test_quality_of_any_number_of_clusterers(k, words):
    agreement_NN = np.full((len(k), len(k)), 0.25)
    np.fill_diagonal(agreement_NN, 1.0)
    pixels(report.clusters_picture(quality(k), agreement_NN))
    assert f"{len(k)} clusterers, {sum(k):,} codes" in words
    assert f"{sum(v // 50 for v in k):,} of {sum(k):,} label no slice" in words
    assert ("only one" if len(k) == 1 else "mean 0.25") in words
    assert "median 60% of K" in words


def test_the_same_data_give_the_same_bytes():
    assert report.curves(history(3)) == report.curves(history(3))


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
    png = report.curves(history(2))
    table = pd.DataFrame(
        {
            "case <b>": ["a & b", "<script>"],
            "dice": [0.91234567, float("nan")],
            "n": [12345, 2],
            "ok": [True, False],
        }
    )
    page = Page(
        report.run_page(
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
    assert "url(" not in report.PAGE
    assert "prefers-color-scheme: dark" in report.PAGE


def test_pictures_leave_no_figures_behind():
    code = "import sys; from logonet import report; assert 'matplotlib' not in sys.modules; "
    code += (
        "report.curves([{'epoch': 1, 'step': 1, 'loss': 1.0}]); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
