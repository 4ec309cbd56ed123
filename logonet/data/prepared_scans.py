"""Scans as training reads them: prepared once, stored in chunks, cut anew at every draw.

Pretraining and finetuning draw fresh random crops of every scan (paper sections 4.1 and 4.2), so a scan is stored
whole; in chunks, so that a crop of a large scan reads a few byte ranges and not the scan. A prepared scan with its
labels is a *case*; an unlabelled one has, instead of labels, a coarse map of where there is anything but air.

Shapes: C channels, X Y Z voxels of the prepared grid (RAS), R crops, n positions of a class.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from logonet.core import config, seeding
from logonet.core.config import Count, Section, Share, SizeVox
from logonet.data import volume
from logonet.data.classes import IGNORE
from logonet.data.cropping import CANDIDATES, FOREGROUND
from logonet.data.preprocessing import Preprocessing
from logonet.data.volume import Volume
from logonet.storage import node_cache, object_store, safetensors_io

CELL_VOX = 8  # side of a cell of `coverage`
CHUNK_VOX = 64  # side of a chunk: 512 KiB of image, so a request's latency is worth its bytes
POSITIONS = 1000  # voxels kept of each class to centre crops on
CHUNKS_CACHED = 128  # by a process, at most 96 MiB
TYPES: dict[str, np.dtype[Any]] = {"U16": np.dtype("u2"), "U8": np.dtype("u1"), "I16": np.dtype("i2")}


@dataclass(frozen=True)
class Config(Preprocessing, key="cases"):
    """How a labelled scan is prepared: see `Preprocessing`.

    Attributes:
        seed: of the positions kept of each class.
    """

    seed: int = 0


@dataclass(frozen=True)
class CropSampling(Section, key="crops"):
    """The crops that one iteration takes of a case.

    Attributes:
        size_vox: crop side along X, Y, Z (paper Table 3: 96 x 96 x 96).
        per_case: crops of one case and iteration (paper section 4.2: two).
        foreground_share: share of the crops that are centred on a voxel of a class, each class of the case with the
            same probability; the others lie anywhere. 0.5 is MONAI's pos:neg 1:1.
    """

    size_vox: SizeVox = (96, 96, 96)
    per_case: Count = 2
    foreground_share: Share = 0.5


# ------------------------------------------------------------------------------------------ preparing


def prepare_image(scan: Volume, modality: str, cfg: Preprocessing, scan_id: str) -> np.ndarray:
    """image_CXYZ uint16 (65535 x intensity) on the prepared grid.

    Raises:
        BadScan: for a scan without contrast.
    """
    prepared = cfg.to_grid(scan)
    low_high = cfg.intensity_range(prepared.array_CXYZ, modality, scan_id)
    return np.ascontiguousarray(volume.to_uint16(volume.window(prepared.array_CXYZ, low_high)))


def prepare(
    scan: Volume, indices_XYZ: np.ndarray, modality: str, cfg: Config, scan_id: str
) -> tuple[np.ndarray, np.ndarray]:
    """image_CXYZ uint16 (65535 x intensity) and indices_XYZ uint8 (class indices) on the prepared grid.

    Raises:
        BadScan: for a scan without contrast.
    """
    image_CXYZ = prepare_image(scan, modality, cfg, scan_id)
    label = cfg.to_grid(Volume(indices_XYZ[None].astype(np.float32), scan.affine), order=0)
    return image_CXYZ, np.ascontiguousarray(label.array_CXYZ[0].astype(np.uint8))


def coverage(image_CXYZ: np.ndarray) -> np.ndarray:
    """uint8 share, in 1/255, of each cell of CELL_VOX voxels a side in which any channel is not air."""
    shares: Any = np.asarray((image_CXYZ > FOREGROUND * volume.UINT16_MAX).any(0), np.float32)
    for axis, length in enumerate(shares.shape):
        starts = np.arange(0, length, CELL_VOX)
        sizes = np.diff([*starts, length]).reshape([-1 if a == axis else 1 for a in range(3)])
        shares = np.add.reduceat(shares, starts, axis) / sizes
    return np.round(255 * shares).astype(np.uint8)


def class_positions(labels_XYZ: np.ndarray, seed: int, scan_id: str) -> dict[int, np.ndarray]:
    """At most POSITIONS voxels of each class of the case but background: class index -> int16 (n, 3)."""
    found = {}
    for index in np.flatnonzero(np.bincount(labels_XYZ.ravel())[1:IGNORE]) + 1:
        voxels_V = np.flatnonzero(labels_XYZ.ravel() == index)
        if len(voxels_V) > POSITIONS:
            rng = seeding.rng(seed, "places", scan_id, int(index))
            voxels_V = np.sort(rng.choice(voxels_V, POSITIONS, replace=False))
        found[int(index)] = np.stack(np.unravel_index(voxels_V, labels_XYZ.shape), 1).astype(np.int16)
    return found


def to_bytes(scan_id: str, image_CXYZ: np.ndarray, labels_XYZ: np.ndarray | None, seed: int = 0) -> bytes:
    """One scan as a safetensors file, all with checksums: chunks of the image; chunks of labels and positions of each
    class, or, without labels, `coverage`."""
    arrays: dict[str, np.ndarray] = {}
    for name, box in _chunks(image_CXYZ.shape[1:]):
        arrays[f"image/{name}"] = np.ascontiguousarray(image_CXYZ[(slice(None), *box)])
        if labels_XYZ is not None:
            arrays[f"labels/{name}"] = np.ascontiguousarray(labels_XYZ[box])
    if labels_XYZ is None:
        arrays["coverage"] = coverage(image_CXYZ)
    else:
        for index, voxels_n3 in class_positions(labels_XYZ, seed, scan_id).items():
            arrays[f"places/{index}"] = voxels_n3
    about = {"scan_id": scan_id, "shape": json.dumps(image_CXYZ.shape)}
    return safetensors_io.to_bytes_with_checksums(arrays, about)


def _chunks(shape_xyz: Sequence[int]) -> Iterator[tuple[str, tuple[slice, slice, slice]]]:
    for corner in itertools.product(*(range(0, n, CHUNK_VOX) for n in shape_xyz)):
        box = tuple(slice(a, min(a + CHUNK_VOX, n)) for a, n in zip(corner, shape_xyz))
        yield "_".join(str(a // CHUNK_VOX) for a in corner), box  # type: ignore[misc]


# -------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Ref:
    """Where one case lies and what is known of it without opening it."""

    scan_id: str
    uri: str
    header_bytes: int
    shape_cxyz: tuple[int, int, int, int]
    header_sha256: str


@dataclass(frozen=True)
class _Header:
    scan_id: str
    shape_cxyz: tuple[int, int, int, int]
    entries: Mapping[str, Any]  # dtype, shape and data_offsets of each tensor
    sums: Mapping[str, str]
    offset: int  # of the first tensor in the file


class NotACase(ValueError):
    """A header that `to_bytes` does not write."""


def ref_of(uri: str, header: bytes) -> Ref:
    """The reference to the case at ``uri`` with this header.

    Raises:
        NotACase: the header is not one that `to_bytes` writes.
    """
    parsed = _parsed(header)
    return Ref(parsed.scan_id, uri, len(header), parsed.shape_cxyz, hashlib.sha256(header).hexdigest())


def stored(uri: str, size_bytes: int) -> Ref | None:
    """The reference to a stored case, from its header alone; None when it is not whole."""
    header = safetensors_io.stored_header(uri, size_bytes)
    try:
        parsed = _parsed(header)
    except NotACase:
        return None
    end = max(entry["data_offsets"][1] for entry in parsed.entries.values())
    return ref_of(uri, header) if parsed.offset + end == size_bytes else None


def _parsed(header: bytes) -> _Header:
    """A case's header, all of it checked.

    Raises:
        NotACase: anything in it is missing or other than `to_bytes` writes it.
    """
    try:
        entries = config.parse_json(header)
        meta = entries.pop("__metadata__")
        c, x, y, z = map(operator.index, config.parse_json(meta["shape"]))
        sums, scan_id = config.parse_json(meta["sha256"]), meta["scan_id"]
        labelled = "coverage" not in entries
        # counted first: a shape of any size would be walked through
        if min(c, x, y, z) < 1 or math.prod(-(-n // CHUNK_VOX) for n in (x, y, z)) * (1 + labelled) > len(
            entries
        ):
            raise NotACase(f"shape {(c, x, y, z)}")
        wanted: dict[str, tuple[str, list[int]]] = {}
        for name, box in _chunks((x, y, z)):
            shape = [b.stop - b.start for b in box]
            wanted[f"image/{name}"] = ("U16", [c, *shape])
            if labelled:
                wanted[f"labels/{name}"] = ("U8", shape)
        if not labelled:
            wanted["coverage"] = ("U8", [-(-n // CELL_VOX) for n in (x, y, z)])
        for name in entries.keys() - wanted.keys():
            count = operator.index(entries[name]["shape"][0])
            if not (name.startswith("places/") and name.removeprefix("places/").isdecimal() and count > 0):
                raise NotACase(name)
            wanted[name] = ("I16", [count, 3])
        for name, (dtype, shape) in wanted.items():
            begin, end = map(operator.index, entries[name]["data_offsets"])
            whole = begin >= 0 and end - begin == math.prod(shape) * TYPES[dtype].itemsize
            as_written = (entries[name]["dtype"], entries[name]["shape"]) == (dtype, shape)
            if not (whole and as_written and isinstance(sums[name], str)):
                raise NotACase(name)
        if not isinstance(scan_id, str):
            raise NotACase("scan_id")
    except (ValueError, LookupError, TypeError, AttributeError) as err:
        raise NotACase(f"not the header of a case ({err})") from None
    return _Header(scan_id, (c, x, y, z), entries, sums, 8 + len(header))


@functools.lru_cache(maxsize=1024)
def _header(ref: Ref) -> _Header:
    try:
        header = _parsed(_read(ref, 8, ref.header_bytes, ref.header_sha256))
    except NotACase as err:
        raise object_store.IntegrityError(f"{ref.uri} is {err}; delete it and run the same command") from None
    if header.shape_cxyz != ref.shape_cxyz:
        odd = f"{ref.uri} holds a case of shape {header.shape_cxyz}, not {ref.shape_cxyz}"
        raise object_store.IntegrityError(f"{odd}; delete it and run the same command")
    return header


@functools.lru_cache(maxsize=CHUNKS_CACHED)
def _tensor(ref: Ref, name: str) -> np.ndarray:
    """One tensor of a case, checked against its sha256."""
    header = _header(ref)
    entry = header.entries[name]
    begin, end = entry["data_offsets"]
    data = _read(ref, header.offset + begin, end - begin, header.sums[name])
    return np.frombuffer(data, TYPES[entry["dtype"]]).reshape(entry["shape"])


def _read(ref: Ref, start: int, length: int, sha256: str | None) -> bytes:
    try:
        return node_cache.read(ref.uri, start=start, length=length, sha256=sha256)
    except object_store.IntegrityError as err:
        both = f"{ref.uri} and {ref.uri.rsplit('/', 2)[0]}/manifest.json"
        hint = f"to have it prepared again delete {both} and run the same command"
        raise object_store.IntegrityError(f"{err}; {hint}") from None


def read_crop(ref: Ref, corner: Sequence[int], size_vox: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The box of ``size_vox`` voxels from its lower ``corner``: image_CXYZ uint16 and labels_XYZ uint8.

    Outside the case both are 0: the darkest value of the window, and background.
    """
    labels_XYZ = np.zeros(tuple(size_vox), np.uint8)
    return _read_box(ref, corner, size_vox, labels_XYZ), labels_XYZ


def read_image(ref: Ref, corner: Sequence[int], size_vox: Sequence[int]) -> np.ndarray:
    """The same of an unlabelled scan: image_CXYZ uint16."""
    return _read_box(ref, corner, size_vox, None)


def _read_box(
    ref: Ref, corner: Sequence[int], size_vox: Sequence[int], labels_XYZ: np.ndarray | None
) -> np.ndarray:
    """image_CXYZ uint16 of a box; its labels are written into ``labels_XYZ`` where that is given."""
    image_CXYZ = np.zeros((ref.shape_cxyz[0], *size_vox), np.uint16)
    kinds = ("image",) if labels_XYZ is None else ("image", "labels")
    touched = []
    for name, box in _chunks(ref.shape_cxyz[1:]):
        shared = [(max(b.start, int(a)), min(b.stop, int(a) + n)) for b, a, n in zip(box, corner, size_vox)]
        if all(low < high for low, high in shared):
            source = tuple(slice(low - b.start, high - b.start) for (low, high), b in zip(shared, box))
            target = tuple(slice(low - int(a), high - int(a)) for (low, high), a in zip(shared, corner))
            touched.append((name, source, target))
    _header(ref)  # once, before the chunks ask for it all at once
    names = [f"{kind}/{name}" for name, *_ in touched for kind in kinds]
    chunks = dict(zip(names, object_store.at_once(functools.partial(_tensor, ref), names)))
    for name, source, target in touched:
        image_CXYZ[(slice(None), *target)] = chunks[f"image/{name}"][(slice(None), *source)]
        if labels_XYZ is not None:
            labels_XYZ[target] = chunks[f"labels/{name}"][source]
    return image_CXYZ


def read_case(ref: Ref) -> tuple[np.ndarray, np.ndarray]:
    """The whole case: image_CXYZ uint16 and labels_XYZ uint8."""
    return read_crop(ref, (0, 0, 0), ref.shape_cxyz[1:])


def draw_corners(ref: Ref, cfg: CropSampling, rng: np.random.Generator) -> np.ndarray:
    """Lower corners of the crops of one iteration, int64 (R, 3).

    As MONAI's RandCropByPosNegLabel: a chosen voxel is the centre, moved inwards where the crop would leave
    the case; along an axis where the case is shorter than the crop it lies in the middle.
    """
    shape, size = np.array(ref.shape_cxyz[1:]), np.array(cfg.size_vox)
    room = shape - size
    classes = sorted(int(n.split("/")[1]) for n in _header(ref).entries if n.startswith("places/"))
    corners = []
    for _ in range(cfg.per_case):
        anywhere = rng.integers(0, np.maximum(room, 0) + 1)
        pick, which, voxel = rng.random(3)  # always drawn, so that one crop's choice never shifts the next's
        if classes and pick < cfg.foreground_share:
            voxels_n3 = _tensor(ref, f"places/{classes[math.floor(which * len(classes))]}")
            centre = voxels_n3[math.floor(voxel * len(voxels_n3))].astype(np.int64)
            anywhere = np.clip(centre - size // 2, 0, np.maximum(room, 0))
        corners.append(np.where(room < 0, room // 2, anywhere))
    return np.stack(corners)


def draw_corner(
    ref: Ref, size_vox: Sequence[int], min_foreground: float, rng: np.random.Generator
) -> np.ndarray:
    """The lower corner of a crop of an unlabelled scan, int64 (3,), uniform over the positions where it fits.

    Of CANDIDATES the first whose share of anything but air reaches ``min_foreground`` is taken, else the one with the
    largest: most of a scanner's field is air, which teaches nothing. Shares are those of the cells of `coverage`.
    """
    cells_IJK = _tensor(ref, "coverage")
    room = np.array(ref.shape_cxyz[1:]) - size_vox
    corners_K3 = rng.integers(0, np.maximum(room, 0) + 1, (CANDIDATES, 3))
    shares = []
    for corner in corners_K3:
        box = tuple(slice(int(a) // CELL_VOX, -(-(int(a) + n) // CELL_VOX)) for a, n in zip(corner, size_vox))
        shares.append(float(cells_IJK[box].mean()) / 255)
    good = [k for k, share in enumerate(shares) if share >= min_foreground]
    corner = corners_K3[good[0] if good else int(np.argmax(shares))]
    return np.where(room < 0, room // 2, corner)


# ---------------------------------------------------------------------------------------------- table


@dataclass(frozen=True)
class Table:
    """Every case of a cases artifact, in the order of scan ids, and the names and values of their classes.

    ``ignores``: some voxels have the index IGNORE. ``regions``: the class indices of each region, which is written as
    one of ``region_values``; empty where classes do not overlap.
    """

    refs: tuple[Ref, ...]
    classes: tuple[str, ...]
    label_values: tuple[int, ...]
    ignores: bool = False
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    region_values: tuple[int, ...] = ()

    @property
    def num_outputs(self) -> int:
        """Of a network: one for each class, or for each region."""
        return len(self.regions) or len(self.classes)

    def __len__(self) -> int:
        return len(self.refs)

    @property
    def in_channels(self) -> int:
        return self.refs[0].shape_cxyz[0]

    def index_of(self) -> dict[str, int]:
        """Scan id -> position."""
        return {ref.scan_id: i for i, ref in enumerate(self.refs)}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Table:
        """What `to_json` gave.

        Raises:
            UserError: it is something else.
        """
        return config.from_dict(cls, values, "cases.json")
