"""Stored crops and their pseudo-labels: a safetensors shard of each for every scan, and tables of where they lie.

Shapes: R crops of a scan, C channels, X Y Z voxels (RAS), N clusterers, Z slices of a crop.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from logonet.core import config
from logonet.core.errors import UserError
from logonet.storage import node_cache, object_store, parquet, safetensors_io
from logonet.storage.artifacts import Artifact
from logonet.storage.parquet import Rows

SHARD_DTYPE = "U16"
CROPS_FILE = "crops.parquet"
LABELS_FILE = "labels.parquet"


@dataclass(frozen=True, slots=True)  # there may be a million
class CropRef:
    """Where one crop, or its labels, lie: a byte range of a scan's shard, and the checksum of exactly that range."""

    crop_id: str
    scan_id: str
    shard: str
    offset: int
    num_bytes: int
    sha256: str


def shard_name(scan_id: str) -> str:
    """Where a scan's shard lies in its artifact."""
    return f"shards/{scan_id}.safetensors"


def stored_shards(uri: str) -> dict[str, int]:
    """The bytes of each shard of the artifact at ``uri``, by name."""
    shards = object_store.listing(object_store.join(uri, "shards"))
    return {f"shards/{entry.uri.rsplit('/', 1)[1]}": entry.size_bytes for entry in shards}


def shard_bytes(scan_id: str, arrays_R: Iterable[np.ndarray]) -> bytes:
    """A safetensors file of a scan's crops, or of their labels, uint16 all; its header also has each one's checksum."""
    arrays = {f"{i:05d}": np.ascontiguousarray(array) for i, array in enumerate(arrays_R)}
    return safetensors_io.to_bytes_with_checksums(arrays, {"scan_id": scan_id})


def write_shard(uri: str, scan_id: str, arrays_R: Iterable[np.ndarray]) -> list[CropRef]:
    """Store one scan's shard in the artifact at ``uri``."""
    name, blob = shard_name(scan_id), shard_bytes(scan_id, arrays_R)
    object_store.write(object_store.join(uri, name), blob)
    return parse_shard_header(name, safetensors_io.header_of(blob))


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
class _ShardTable:
    """Arrays of one shape in the shards of an artifact, in a fixed order, and how to read one."""

    uri: str
    refs: Rows[CropRef]

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.refs)

    def take(self, indices: Sequence[int]) -> Self:
        """The table of some of them."""
        return replace(self, refs=self.refs.take(indices))

    def by_scan(self) -> list[range]:
        """The positions of each scan's crops, which lie side by side."""
        groups = itertools.groupby(enumerate(self.refs.column("scan_id")), key=operator.itemgetter(1))
        firsts = [next(group)[0] for _, group in groups]
        return [range(a, b) for a, b in zip(firsts, [*firsts[1:], len(self)])]

    def read(self, index: int) -> np.ndarray:
        """Array ``index`` as uint16, checked against its sha256."""
        ref = self.refs[index]
        shard = object_store.join(self.uri, ref.shard)
        try:
            data = node_cache.read(shard, start=ref.offset, length=ref.num_bytes, sha256=ref.sha256)
        except object_store.IntegrityError as err:
            hint = f"to have it made again delete {shard} and {self.uri}/manifest.json"
            raise object_store.IntegrityError(f"{err}; {hint} and run the same command") from None
        return np.frombuffer(data, np.uint16).reshape(self.shape)

    def read_all(self, indices: Iterable[int]) -> list[np.ndarray]:
        """Several arrays, read at once."""
        return object_store.at_once(self.read, indices)

    @classmethod
    def _stored_refs(cls, artifact: Artifact, file: str, shape: tuple[int, ...]) -> Rows[CropRef]:
        refs = parquet.from_parquet(artifact.read(file), CropRef, artifact.uri_of(file))
        num_bytes = 2 * math.prod(shape)
        sizes, offsets = (np.array(refs.column(name), np.int64) for name in ("num_bytes", "offset"))
        if len(wrong := np.flatnonzero((sizes != num_bytes) | (offsets < 0))):
            odd = f"crop {refs[wrong[0]].crop_id} is listed with {sizes[wrong[0]]} bytes, not {num_bytes}"
            hint = f"to have it made again delete {artifact.uri}/manifest.json and run the same command"
            raise UserError(f"{artifact.uri}: {odd}; {hint}")
        return refs


@dataclass(frozen=True)
class CropTable(_ShardTable):
    """Every crop of a crops artifact."""

    size_vox: tuple[int, int, int]
    in_channels: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.in_channels, *self.size_vox

    @classmethod
    def open(cls, artifact: Artifact) -> CropTable:
        """The table of a finished crops artifact."""
        told = {"size_vox": artifact.config.get("size_vox"), "in_channels": artifact.facts.get("in_channels")}
        size = config.from_dict(_CropSize, told, artifact.uri)
        refs = cls._stored_refs(artifact, CROPS_FILE, (size.in_channels, *size.size_vox))
        return cls(artifact.uri, refs, size.size_vox, size.in_channels)


@dataclass(frozen=True)
class LabelTable(_ShardTable):
    """The pseudo-labels of crops, each (N, Z), in the order of the crops."""

    clusterers: int
    depth: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.clusterers, self.depth

    def read(self, index: int) -> np.ndarray:
        """The labels of crop ``index``, int16 (N, Z)."""
        return super().read(index).view(np.int16)

    @classmethod
    def open(cls, artifact: Artifact, clusterers: int, depth: int) -> LabelTable:
        """The table of a finished labels artifact."""
        refs = cls._stored_refs(artifact, LABELS_FILE, (clusterers, depth))
        return cls(artifact.uri, refs, clusterers, depth)


def slices_of(crop_CXYZ: np.ndarray) -> np.ndarray:
    """The slices of a crop along Z as rows, (Z, C*X*Y) (paper section 4.1)."""
    return np.moveaxis(crop_CXYZ, -1, 0).reshape(crop_CXYZ.shape[-1], -1)
