"""The page of a run needs nothing but itself, escapes what it is given and leaves nothing out."""

from __future__ import annotations

import html.parser

import numpy as np
import pandas as pd
from test_report import NAN, PICTURES

from logonet import reporting
from logonet.training import weight_transfer as transfer


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
    png = PICTURES["curves of one epoch"]()
    table = pd.DataFrame(
        {
            "case <b>": ["a & b", "<script>" + "x" * 100],
            "dice": [0.91234567, NAN],
            "n": [12345, 2],
            "ok": [True, False],
        }
    )
    sections = [("Curves & co", png), ("Table", table), ("Words", "<p>by <i>hand</i></p>")]
    written = reporting.run_page("Run <1>", sections)
    page = Page(written)
    text = " ".join(page.text)
    expected = [
        "Run <1>",
        "Curves & co",
        "case <b>",
        "a & b",
        "<script>" + "x" * 100,
        "hand",
        "True",
        "0.9123",
    ]
    for word in [*expected, "12,345"]:
        assert word in text
    assert "nan" not in text.lower().split()
    assert "script" not in page.tags and "i" in page.tags
    assert page.tags.count("img") == 1 and page.tags.count("section") == page.tags.count("h2") == 3
    fetched = [link for link in page.links if not link.startswith("#")]
    assert [link[:22] for link in fetched] == ["data:image/png;base64,"]
    assert "url(" not in written and "@import" not in written
    assert "prefers-color-scheme: dark" in written


def test_tables_of_any_size():
    def cells(frame):
        return Page(reporting.run_page("", [("", frame)])).tags.count("td")

    assert cells(pd.DataFrame({"a": [], "b": []})) == 0
    assert cells(pd.DataFrame(np.zeros((300, 40)))) == 300 * 40  # nothing is left out


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
