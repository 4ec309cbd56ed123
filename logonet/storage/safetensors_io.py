"""Named arrays and their metadata as one safetensors file; equal content gives equal bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from logonet.storage import object_store

if TYPE_CHECKING:
    import numpy as np


def to_bytes(arrays: Mapping[str, np.ndarray], about: Mapping[str, str]) -> bytes:
    """The file of contiguous ``arrays`` with ``about`` as its metadata, sorted.

    safetensors itself writes metadata in the order of a hash table, which differs between processes.
    """
    from safetensors.numpy import save

    blob = save(dict(arrays), metadata=dict(about))
    fields = json.loads(header_of(blob))
    start = 8 + int.from_bytes(blob[:8], "little")
    fields["__metadata__"] = dict(sorted(fields["__metadata__"].items()))
    header = json.dumps(fields, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the arrays stay aligned
    return b"".join([len(header).to_bytes(8, "little"), header, memoryview(blob)[start:]])


def to_bytes_with_checksums(arrays: Mapping[str, np.ndarray], about: Mapping[str, str]) -> bytes:
    """The same; "sha256" in the metadata is a JSON mapping from each array's name to the SHA-256 of its bytes."""
    sums = {name: hashlib.sha256(array.data).hexdigest() for name, array in arrays.items()}
    return to_bytes(arrays, {**about, "sha256": json.dumps(sums)})


def header_of(blob: bytes) -> bytes:
    """The JSON header of a safetensors file, or of what begins like one."""
    return blob[8 : 8 + int.from_bytes(blob[:8], "little")]


def stored_header(uri: str, size_bytes: int) -> bytes:
    """The header of a stored file of ``size_bytes``, and no more is read; b"" where the file ends within it."""
    if size_bytes < 8:
        return b""
    length = int.from_bytes(object_store.read(uri, start=0, length=8), "little")
    return object_store.read(uri, start=8, length=length) if 0 < length <= size_bytes - 8 else b""
