"""The one self-contained HTML page that every stage writes, and the parts of it that are not pictures."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from importlib import resources
from string import Template
from typing import Any

import numpy as np
import pandas as pd

ACTIONS = {
    "matched": "loaded as they were",
    "adapted": "loaded, input channels changed",
    "skipped": "given, but not used",
    "new": "not given: fresh",
}


class Markup(str):
    """Text that is HTML already; tables do not escape it."""


def run_page(title: str, sections: Sequence[tuple[str, str | bytes | pd.DataFrame]]) -> str:
    """One self-contained HTML page: pictures inside, no script, nothing fetched, light and dark.

    Args:
        sections: (heading, content): HTML text, which the caller has escaped; a PNG; or a table.
    """
    headings = [html.escape(heading) for heading, _ in sections]
    links = " ".join(f'<a href="#s{i}">{heading}</a>' for i, heading in enumerate(headings) if heading)
    body = "\n".join(
        f'<section id="s{i}"><h2>{heading}</h2>\n{_content(heading, content)}</section>'
        for i, (heading, (_, content)) in enumerate(zip(headings, sections))
    )
    page = resources.files("logonet.reporting").joinpath("page.html").read_text()
    return Template(page).substitute(title=html.escape(title), links=links, body=body)


def _content(heading: str, content: str | bytes | pd.DataFrame) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, bytes):
        return f'<img alt="{heading}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'
    cells = pd.concat([_column(str(name), values) for name, values in content.items()], axis=1)
    return f'<div class="table">{cells.to_html(index=False, escape=False, border=0)}</div>'


def _column(name: str, values: pd.Series) -> pd.Series:
    """A column as HTML; numbers stand on the right."""
    form = '<div class="n">{}</div>' if values.dtype.kind in "iuf" else "{}"
    cells = [v if isinstance(v, Markup) else form.format(html.escape(_cell(v))) for v in values]
    return pd.Series(cells, index=values.index, name=form.format(html.escape(name)), dtype=object)


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float | np.floating):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int | np.integer) and not isinstance(value, bool) else str(value)


def transfer_section(rows_by_module: pd.DataFrame, summary: str) -> str:
    """What became of the weights, for ``run_page``: a bar a module, by parameters, and the numbers.

    Args:
        rows_by_module: as ``transfer.Report.by_module`` returns it: modules as index, ``tensors``, and the
            parameters ``matched``, ``adapted``, ``skipped`` and ``new``.
        summary: of that report; its first two lines are shown, since the others are this table.
    """
    said = "".join(f"<p>{html.escape(line)}</p>" for line in summary.splitlines()[:2])
    key = " ".join(f'<span><i class="{a}"></i>{a}: {means}</span>' for a, means in ACTIONS.items())
    params = rows_by_module[list(ACTIONS)]
    share = params.div(params.sum(axis=1).clip(lower=1), axis=0) * 100
    bars = []
    for _, row in share.iterrows():
        parts = "".join(f'<i class="{a}" style="width:{row[a]:.2f}%"></i>' for a in ACTIONS if row[a])
        bars.append(Markup(f'<div class="bar">{parts}</div>'))
    table = rows_by_module[["tensors", *ACTIONS]].reset_index(drop=True)
    modules = [Markup(f"<code>{html.escape(str(module))}</code>") for module in rows_by_module.index]
    table.insert(0, "module", pd.Series(modules, dtype=object))
    table.insert(1, "parameters", pd.Series(bars, dtype=object))
    return f'{said}<p class="key">{key}</p>\n{_content("", table)}'


def lineage(chain: Sequence[tuple[str, str, str]]) -> str:
    """What came from what, for ``run_page``: boxes from the scans to this run, in order.

    Args:
        chain: (what it is, its id, a note or ""), such as ``("crops", "a3f09c", "1,200 crops")``.
    """
    boxes = [
        f"<b>{html.escape(what)}</b><code>{html.escape(id_)}</code><small>{html.escape(note)}</small>"
        for what, id_, note in chain
    ]
    return f'<ol class="lineage">{"".join(f"<li>{box}</li>" for box in boxes)}</ol>'
