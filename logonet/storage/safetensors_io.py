"""Named arrays and their metadata as one safetensors file; equal content gives equal bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def to_bytes(arrays: Mapping[str, np.ndarray], about: Mapping[str, str]) -> bytes:
    """The file of contiguous ``arrays`` with ``about`` as its metadata, sorted.

    safetensors itself writes metadata in the order of a hash table, which differs between processes.
    """
    from safetensors.numpy import save

    blob = save(dict(arrays), metadata=dict(about))
    size = int.from_bytes(blob[:8], "little")
    fields = json.loads(blob[8 : 8 + size])
    fields["__metadata__"] = dict(sorted(fields["__metadata__"].items()))
    header = json.dumps(fields, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the arrays stay aligned
    return b"".join([len(header).to_bytes(8, "little"), header, memoryview(blob)[8 + size :]])
