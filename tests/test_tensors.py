"""Arrays and what is said about them in one file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load

from logonet.storage import safetensors_io

ARRAYS = {"b": np.arange(7, dtype=np.int16), "a": np.ones((2, 3), np.float32)}
ABOUT = {letter: letter * 3 for letter in "hgfedcba"}


def test_what_is_written_is_read_by_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_io.to_bytes(ARRAYS, ABOUT))
    found = load(path.read_bytes())
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
    with safe_open(path, "numpy") as opened:
        assert opened.metadata() == ABOUT


def test_equal_content_makes_equal_bytes_whatever_the_order() -> None:
    blob = safetensors_io.to_bytes(ARRAYS, ABOUT)
    backwards = safetensors_io.to_bytes(dict(reversed(ARRAYS.items())), dict(reversed(ABOUT.items())))
    # Of eight entries an order by chance would be this one once in 40,320 times.
    assert blob == backwards
    size = int.from_bytes(blob[:8], "little")
    assert size % 8 == 0
    assert list(json.loads(blob[8 : 8 + size])["__metadata__"]) == sorted(ABOUT)
