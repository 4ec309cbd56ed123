"""Count lines of code: blanks, comments and docstrings are not counted.

    python -m tools.lines [FOLDER ...]

Prints a line for each folder or top-level file below the given ones (logonet, jobs and tools), largest first, and the
total last.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

NOT_CODE = {getattr(tokenize, name) for name in ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER")}


def code_lines(source: str) -> int:
    """Lines of ``source`` that hold code."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        owner = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if owner and ast.get_docstring(node, clean=False) is not None:  # type: ignore[arg-type]
            docstring = node.body[0]  # type: ignore[attr-defined]
            docstrings.update(range(docstring.lineno, docstring.end_lineno + 1))
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NOT_CODE:
            code.update(range(token.start[0], token.end[0] + 1))
    return len(code - docstrings)


def main(folders: list[str]) -> None:
    counts: Counter[str] = Counter()
    for folder in folders:
        for path in Path(folder).rglob("*.py"):
            counts["/".join(path.parts[:2])] += code_lines(path.read_text())
    for name, count in counts.most_common():
        print(f"{count:6,}  {name}")
    print(f"{counts.total():6,}  total")


if __name__ == "__main__":
    main(sys.argv[1:] or ["logonet", "jobs", "tools"])
