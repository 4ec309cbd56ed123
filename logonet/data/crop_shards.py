"""Stored crops: one safetensors shard per scan, and the table of where each crop lies.

Shapes: R crops of a scan, C channels, X Y Z voxels (RAS).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from logonet.core import config
from logonet.core.errors import UserError
from logonet.storage import node_cache, object_store, parquet, safetensors_io
from logonet.storage.artifacts import Artifact

SHARD_DTYPE = "U16"


@dataclass(frozen=True)
class CropRef:
    """Where one crop lies: a byte range of a scan's shard, and the checksum of exactly that range."""

    crop_id: str
    scan_id: str
    shard: str
    offset: int
    num_bytes: int
    sha256: str


def shard_bytes(scan_id: str, crops_RCXYZ: np.ndarray) -> bytes:
    """A safetensors file of a scan's crops whose header also has each crop's checksum."""
    arrays = {f"{i:05d}": np.ascontiguousarray(crop_CXYZ) for i, crop_CXYZ in enumerate(crops_RCXYZ)}
    return safetensors_io.to_bytes_with_checksums(arrays, {"scan_id": scan_id})


def shard_index(uri: str, name: str, size_bytes: int) -> list[CropRef]:
    """The crops of a stored shard, from its header alone; empty when it is not a whole shard."""
    try:
        refs = parse_shard_header(name, safetensors_io.stored_header(uri, size_bytes))
    except (ValueError, LookupError, TypeError, AttributeError):  # the header's own bytes are damaged
        return []
    return refs if refs and refs[-1].offset + refs[-1].num_bytes == size_bytes else []


def parse_shard_header(name: str, header: bytes) -> list[CropRef]:
    """The crops of the shard ``name``.

    Raises:
        ValueError, TypeError, LookupError, AttributeError: where this is not a shard's header.
    """
    fields: dict[str, Any] = config.parse_json(header)
    meta = fields.pop("__metadata__")
    sums, scan_id = config.parse_json(meta["sha256"]), meta["scan_id"]
    refs = []
    for key in sorted(fields):
        begin, end = map(operator.index, fields[key]["data_offsets"])
        if fields[key]["dtype"] != SHARD_DTYPE or not 0 <= begin <= end:
            raise ValueError(key)
        offset = 8 + len(header) + begin
        refs.append(CropRef(f"{scan_id}/{key}", scan_id, name, offset, end - begin, sums[key]))
    return refs


@dataclass(frozen=True)
class _CropSize:
    size_vox: tuple[int, int, int]
    in_channels: int


@dataclass(frozen=True)
class CropTable:
    """Every crop of a crops artifact, in a fixed order, and how to read one."""

    uri: str
    size_vox: tuple[int, int, int]
    in_channels: int
    refs: tuple[CropRef, ...]

    def __len__(self) -> int:
        return len(self.refs)

    def read(self, index: int) -> np.ndarray:
        """Crop ``index`` as uint16 (C, X, Y, Z), checked against its sha256."""
        ref = self.refs[index]
        shard = object_store.join(self.uri, ref.shard)
        try:
            data = node_cache.read(shard, start=ref.offset, length=ref.num_bytes, sha256=ref.sha256)
        except object_store.IntegrityError as err:
            hint = f"to have it cut again delete {shard} and {self.uri}/manifest.json"
            raise object_store.IntegrityError(f"{err}; {hint} and run the same command") from None
        return np.frombuffer(data, np.uint16).reshape(self.in_channels, *self.size_vox)

    def read_all(self, indices: Iterable[int]) -> list[np.ndarray]:
        """Several crops, read at once."""
        return object_store.at_once(self.read, indices)

    def to_parquet(self) -> bytes:
        return parquet.to_parquet([asdict(r) for r in self.refs], CropRef)

    @classmethod
    def open(cls, artifact: Artifact) -> CropTable:
        """The table of a finished crops artifact."""
        uri = artifact.uri_of("crops.parquet")
        refs = tuple(parquet.from_parquet(artifact.read("crops.parquet"), CropRef, uri))
        told = {"size_vox": artifact.config.get("size_vox"), "in_channels": artifact.facts.get("in_channels")}
        size = config.from_dict(_CropSize, told, artifact.uri)
        num_bytes = 2 * size.in_channels * math.prod(size.size_vox)
        if wrong := [r for r in refs if r.num_bytes != num_bytes or r.offset < 0]:
            odd = f"crop {wrong[0].crop_id} is listed with {wrong[0].num_bytes} bytes, not {num_bytes}"
            hint = f"to have it made again delete {artifact.uri}/manifest.json and run the same command"
            raise UserError(f"{artifact.uri}: {odd}; {hint}")
        return cls(artifact.uri, size.size_vox, size.in_channels, refs)


def slices_of(crop_CXYZ: np.ndarray) -> np.ndarray:
    """The slices of a crop along Z as rows, (Z, C*X*Y) (paper section 4.1)."""
    return np.moveaxis(crop_CXYZ, -1, 0).reshape(crop_CXYZ.shape[-1], -1)
