"""Seeded damage to bytes, JSON documents and text of any kind."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

SHAPE = (12, 10, 14)
Random = np.random.Generator


# --------------------------------------------------------------------------------------------- any bytes


def some(rng: Random, values: Sequence[Any]) -> Any:
    """One of ``values``, whatever their types."""
    return values[int(rng.integers(len(values)))]


def damaged(rng: Random, data: bytes) -> bytes:
    """``data`` after one to three blind changes."""
    for _ in range(int(rng.integers(1, 4))):
        data = some(rng, BLIND)(rng, data)
    return data


def _place(rng: Random, data: bytes) -> int:
    # half of them near the front, where headers are
    return int(rng.integers(0, (min(len(data), 400) if rng.random() < 0.5 else len(data)) + 1))


def flip(rng: Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 9)) if out else 0):
        out[min(_place(rng, data), len(out) - 1)] ^= 1 << int(rng.integers(8))
    return bytes(out)


def _truncate(rng: Random, data: bytes) -> bytes:
    return data[: _place(rng, data)]


def _insert(rng: Random, data: bytes) -> bytes:
    at = _place(rng, data)
    return data[:at] + rng.bytes(int(rng.integers(1, 64))) + data[at:]


def _remove(rng: Random, data: bytes) -> bytes:
    at = _place(rng, data)
    return data[:at] + data[at + int(rng.integers(1, 64)) :]


def _splice(rng: Random, data: bytes) -> bytes:
    return data[: _place(rng, data)] + data[_place(rng, data) :]


def _zeros(rng: Random, data: bytes) -> bytes:
    at, n = _place(rng, data), int(rng.integers(1, 512))
    return data[:at] + bytes(len(data[at : at + n])) + data[at + n :]


def _number(rng: Random, data: bytes) -> bytes:
    at = _place(rng, data)
    word = some(rng, [b"\xff" * 8, b"\xff" * 4, b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\xff\x7f", b"\0" * 8])
    return data[:at] + word + data[at + len(word) :]


def _swap(rng: Random, data: bytes) -> bytes:
    at, n, w = _place(rng, data), 4 * int(rng.integers(1, 88)), int(some(rng, [2, 4, 8]))
    words = data[at : at + n]
    return (
        data[:at]
        + b"".join(words[i : i + w][::-1] for i in range(0, len(words), w))
        + data[at + len(words) :]
    )


def _other(rng: Random, data: bytes) -> bytes:
    """Something else under this name."""
    return some(
        rng, [b"", b"\0", b"not this", b"\x1f\x8b", b"PK\x03\x04" + data, data + data, rng.bytes(200), b"{}"]
    )


BLIND = (flip, flip, _truncate, _insert, _remove, _splice, _zeros, _number, _swap, _other)


# ------------------------------------------------------------------------------------------ JSON and text

DEEP, LONG_NUMBER = "@deep@", "@long number@"  # no JSON value; put in as text
ODD = (
    None,
    True,
    0,
    -1,
    2**31,
    2**63,
    10**30,
    1.5,
    float("nan"),
    float("inf"),
    -1e308,
    "",
    " ",
    "x",
    "\0",
    "a\nb",
    "\ud800",
    "é̂\u202e",
    "x" * 5000,
    "[/red]",
    "%s{0}",
    "../../../../../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "/dev/stdin",
    "~nobody-here/x",
    "s3://",
    "http://127.0.0.1:9/x",
    "file://",
    ".",
    "..",
    "NaN",
    "0x10",
    "１２",
    "2026-11-25",
    [],
    [[]],
    {},
    {"": ""},
    {"name": {}},
    [None],
    ["x", 1],
    [0] * 100,
    DEEP,
    LONG_NUMBER,
)


def damaged_json(rng: Random, data: bytes, times: int | None = None) -> bytes:
    """A JSON document with one to three of its values, keys or items changed into something odd."""
    tree = json.loads(data)
    for _ in range(times or int(rng.integers(1, 4))):
        spots = list(_spots(tree))
        if not spots:
            break
        parent, key = some(rng, spots)
        tree = _change(rng, tree, parent, key)
    text = json.dumps(tree)
    deep = int(some(rng, [200, 3000, 100_000]))
    text = text.replace(json.dumps(DEEP), "[" * deep + "]" * deep, 1)
    return text.replace(json.dumps(LONG_NUMBER), "1" * 5000, 1).encode()


def _spots(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(parent, key) of every value; (None, None) of the whole."""
    yield None, None
    stack = [tree]
    while stack:
        node = stack.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            yield node, key
            stack.append(value)


def _change(rng: Random, tree: Any, parent: Any, key: Any) -> Any:
    odd = json.loads(json.dumps(some(rng, ODD)))
    if parent is None:
        return odd if rng.random() < 0.3 else tree
    how = int(rng.integers(6))
    if how == 0:
        del parent[key]
    elif how == 1 and isinstance(parent, dict):
        parent[str(odd) if not isinstance(odd, str) else odd] = parent.pop(key)
    elif how == 2:
        parent[key] = [parent[key]]
    elif how == 3 and isinstance(parent, list):
        parent.append(parent[key])
    else:
        parent[key] = odd
    return tree


def damaged_text(rng: Random, data: bytes) -> bytes:
    """Lines and words of a table or YAML file changed."""
    text = data.decode()
    for _ in range(int(rng.integers(1, 4))):
        lines = text.split("\n")
        at = int(rng.integers(len(lines)))
        how = int(rng.integers(7))
        if how == 0:
            del lines[at]
        elif how == 1:
            lines.insert(at, lines[at])
        elif how == 2:
            lines.insert(at, some(rng, ODD_LINES))
        elif words := list(re.finditer(r"[^\s,:\[\]{}]+", lines[at])):
            word = some(rng, words)
            odd = some(rng, ODD_WORDS)
            lines[at] = lines[at][: word.start()] + odd + lines[at][word.end() :]
        text = "\n".join(lines)
    return text.encode("utf-8", "surrogatepass")


ODD_WORDS = (
    *("", "-1", "0", "1e400", "-.inf", ".nan", "1" * 5000, "0x", "0b", "1_0", "_", "1:60:61", "2001-99-99"),
    *(
        "2026-11-25",
        "null",
        "true",
        "~",
        "&a [*a]",
        "*b",
        "&a {<<: *a}",
        "!!python/object/apply:os.system [x]",
    ),
    *(
        "!!python/name:os.system",
        "!!int x",
        "!!float x",
        "!!timestamp x",
        "!!binary x",
        "!!bool x",
        "!!set {x}",
    ),
    *(
        "!!omap [x]",
        "!!null x",
        "!x y",
        "? [a]",
        "{? [a]: b}",
        "{[a]: b}",
        "'",
        '"',
        '"\\ud800"',
        "\ud800",
        "\0",
        "\x07",
    ),
    *(
        "a\tb",
        "%YAML 9.9",
        "---",
        "...",
        "[" * 1000,
        "{" * 1000,
        "[" * 50 + "]" * 50,
        "x" * 5000,
        "../../etc/passwd",
    ),
    *(
        "/dev/zero",
        "=",
        "<<",
        "<<: 1",
        "- - -",
        "|",
        ">",
        "@x",
        "`x`",
        "\u2028",
        "\ufeff",
        "１",
        "[1, [2, [3]]]",
    ),
    *("1e9", "100000000", "2147483648", "[1e9, 1e9]", "4", "[0]", "[-1, 2, 3]", "1.5", "[.nan, 1]"),
)
ODD_LINES = (
    "bomb: [&a [x,x,x,x,x,x,x,x,x], "
    + ", ".join(f"&{b} [{','.join(['*' + a] * 9)}]" for a, b in zip("abcdefghi", "bcdefghij"))
    + "]",
    "self: &self [*self]",
    "merged: &m {<<: *m}",
    "{" * 5000,
    "- " * 3000 + "x",
    "\t",
    "? ",
    "a: b: c",
    "%TAG ! tag:yaml.org,2002:python/",
    "--- !!python/object/new:type {}",
    ",,,,,,,,,,,,,,,,",
    '"open',
    "\0",
    "x" * 200_000,
)
