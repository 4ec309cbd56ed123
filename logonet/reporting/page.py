"""The one self-contained HTML page that every stage writes, and the parts of it that are not pictures."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


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


def transfer_section(rows_by_module: pd.DataFrame, summary: str) -> str:
    """What became of the weights, for ``run_page``: a bar a module, by parameters, and the numbers.

    Args:
        rows_by_module: as ``transfer.Report.by_module`` returns it: modules as index, ``tensors``, and the
            parameters ``matched``, ``adapted``, ``skipped`` and ``new``.
        summary: of that report; its first two lines are shown, since the others are this table.
    """
    said = "".join(f"<p>{html.escape(line)}</p>" for line in summary.splitlines()[:2])
    key = " ".join(
        f'<span><i class="{action}"></i>{action}: {means}</span>' for action, means in ACTIONS.items()
    )
    head = "".join(f"<th class=n>{action}</th>" for action in ACTIONS)
    rows = []
    for module, row in rows_by_module.iterrows():
        params = {action: int(row[action]) for action in ACTIONS}
        whole = sum(params.values()) or 1
        bar = "".join(
            f'<i class="{action}" style="width:{100 * n / whole:.2f}%"></i>'
            for action, n in params.items()
            if n
        )
        cells = "".join(f"<td class=n>{n:,}</td>" if n else "<td class=n>-</td>" for n in params.values())
        rows.append(
            f'<tr><td><code>{html.escape(str(module))}</code></td><td><div class="bar">{bar}</div></td>'
            f"<td class=n>{int(row['tensors']):,}</td>{cells}</tr>"
        )
    return (
        f'{said}<p class="key">{key}</p>\n<div class="table"><table><thead><tr><th>module</th><th>parameters</th>'
        f"<th class=n>tensors</th>{head}</tr></thead><tbody>\n" + "\n".join(rows) + "\n</tbody></table></div>"
    )


def lineage(chain: Sequence[tuple[str, str, str]]) -> str:
    """What came from what, for ``run_page``: boxes from the scans to this run, in order.

    Args:
        chain: (what it is, its id, a note or ""), such as ``("crops", "a3f09c", "1,200 crops")``.
    """
    boxes = "".join(
        f"<li><b>{html.escape(what)}</b><code>{html.escape(id_)}</code>"
        + (f"<small>{html.escape(note)}</small>" if note else "")
        + "</li>"
        for what, id_, note in chain
    )
    return f'<ol class="lineage">{boxes}</ol>'


ACTIONS = {
    "matched": "loaded as they were",
    "adapted": "loaded, input channels changed",
    "skipped": "given, but not used",
    "new": "not given: fresh",
}

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
code {{ font-size: .85em; overflow-wrap: anywhere; }}
.bar {{ display: flex; width: 12rem; height: .7rem; margin-top: .4rem; gap: 1px; }} .bar i {{ min-width: 2px; }}
.key {{ display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; color: var(--soft); font-size: .9rem; }}
.key i {{ display: inline-block; width: .7rem; height: .7rem; margin-right: .4rem; }}
.matched {{ background: #0072B2; }} .adapted {{ background: #56B4E9; }}
.skipped {{ background: #6e7781; }} .new {{ background: #E69F00; }}
.lineage {{ display: flex; flex-wrap: wrap; gap: .7rem 1.6rem; list-style: none; margin: 0; padding: 0; }}
.lineage li {{ position: relative; border: 1px solid var(--rule); border-radius: 6px; padding: .45rem .7rem;
  max-width: 15rem; }}
.lineage li > * {{ display: block; }} .lineage small {{ color: var(--soft); }}
.lineage li:not(:last-child)::after {{ content: "\\2192"; position: absolute; right: -1.35rem; top: 50%;
  transform: translateY(-50%); color: var(--soft); }}
pre {{ overflow-x: auto; font-size: .85rem; margin: 0; }}
</style></head>
<body><main>
<h1>{title}</h1>
<nav>{links}</nav>
{body}
</main></body></html>
"""
