"""Tables for people and for spreadsheets."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

WIDTH = 160  # characters: a pipe has no width of its own, and a narrow table would cut its cells


def to_text(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> str:
    """A table in the terminal's box characters. Columns whose name begins with ">" are right-aligned."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Text: brackets in file names are not markup
    table = Table(title=Text(title) if title else None, title_justify="left")
    for name in columns:
        table.add_column(
            name.removeprefix(">"), justify="right" if name.startswith(">") else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    out = io.StringIO()
    Console(file=out, width=WIDTH, highlight=False).print(table)
    return out.getvalue()


def to_csv(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    import pandas as pd

    return pd.DataFrame(rows, columns=columns, dtype=object).to_csv(index=False).encode()
