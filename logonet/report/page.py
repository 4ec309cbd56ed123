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
