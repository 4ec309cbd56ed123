"""Files of data sets and what the importers find in them, for the tests of importers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from logonet.core.errors import UserError
from logonet.data import importers
from logonet.data.manifest import Source
from logonet.storage import object_store

SMALL = (16, 16, 16)


def put(root: str | Path, *names: str) -> None:
    """Files that exist; ``sources`` looks at names only."""
    for name in names:
        object_store.write(object_store.join(str(root), name), name.encode())


def put_json(root: str | Path, name: str, content: Any) -> str:
    uri = object_store.join(str(root), name)
    object_store.write(uri, json.dumps(content).encode())
    return uri


def put_text(root: str | Path, name: str, text: str) -> str:
    uri = object_store.join(str(root), name)
    object_store.write(uri, text.encode())
    return uri


def found(root: str | Path, uri: str = "") -> dict[str, Source]:
    """Sources at ``uri`` (by default ``root``) by their path below ``root``."""
    return {s.uri.removeprefix(f"{root}/"): s for s in importers.sources(uri or str(root))}


def labels(root: str | Path, got: dict[str, Source]) -> dict[str, str]:
    return {name: s.label_uri.removeprefix(f"{root}/") for name, s in got.items()}


def refusal(uri: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        importers.sources(str(uri))
    return str(caught.value)
