"""Scans as training reads them: prepared once, stored in chunks, cut anew at every draw.

Pretraining and finetuning draw fresh random crops of every scan (paper sections 4.1 and 4.2), so a scan is stored
whole; in chunks, so that a crop of a large scan reads a few byte ranges and not the scan. A prepared scan is one file,
its labels are another, so that scans are prepared once for both. A scan with labels is a *case*.

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
from typing import Any, NamedTuple

import numpy as np

from logonet.core import config, seeding
from logonet.core.config import Count, Section, Share, SizeVox
from logonet.data import volume
from logonet.data.classes import IGNORE
from logonet.data.cropping import CANDIDATES, FOREGROUND
from logonet.data.preprocessing import Preprocessing
from logonet.data.volume import Volume
from logonet.storage import node_cache, object_store, safetensors_io

CELL_VOX = 8  # side of a cell of `coverage`: the bits of a byte
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


def prepare_labels(indices_XYZ: np.ndarray, affine: np.ndarray, cfg: Preprocessing) -> np.ndarray:
    """Class indices uint8 (X, Y, Z) on the prepared grid, from those of the scan with this ``affine``."""
    label = cfg.to_grid(Volume(indices_XYZ[None].astype(np.float32), affine), order=0)
    return np.ascontiguousarray(label.array_CXYZ[0].astype(np.uint8))


def coverage(image_CXYZ: np.ndarray) -> np.ndarray:
    """uint8 share, in 1/255, of each cell of CELL_VOX voxels a side in which any channel is not air."""
    above_XYZ = (image_CXYZ > int(FOREGROUND * volume.UINT16_MAX)).any(0)
    counts: Any = np.bitwise_count(np.packbits(above_XYZ, axis=2)).astype(
        np.int64
    )  # of CELL_VOX voxels along Z
    for axis in (0, 1):
        counts = np.add.reduceat(counts, np.arange(0, counts.shape[axis], CELL_VOX), axis)
    sides = [np.diff([*range(0, n, CELL_VOX), n]) for n in above_XYZ.shape]
    sizes = sides[0][:, None, None] * sides[1][:, None] * sides[2]
    return np.round(255 * counts / sizes).astype(np.uint8)


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


def image_file(scan_id: str, image_CXYZ: np.ndarray) -> bytes:
    """A prepared scan as a safetensors file with checksums: its chunks, and `coverage`."""
    arrays = {
        f"image/{n}": np.ascontiguousarray(image_CXYZ[(slice(None), *b)])
        for n, b in chunks(image_CXYZ.shape[1:])
    }
    return _file(scan_id, image_CXYZ.shape, {**arrays, "coverage": coverage(image_CXYZ)})


def labels_file(scan_id: str, labels_XYZ: np.ndarray, seed: int = 0) -> bytes:
    """Its labels as another: chunks of them, and positions of each class."""
    arrays = {
        f"labels/{name}": np.ascontiguousarray(labels_XYZ[box]) for name, box in chunks(labels_XYZ.shape)
    }
    for index, voxels_n3 in class_positions(labels_XYZ, seed, scan_id).items():
        arrays[f"places/{index}"] = voxels_n3
    return _file(scan_id, (1, *labels_XYZ.shape), arrays)


def _file(scan_id: str, shape_cxyz: Sequence[int], arrays: Mapping[str, np.ndarray]) -> bytes:
    about = {"scan_id": scan_id, "shape": json.dumps(shape_cxyz)}
    return safetensors_io.to_bytes_with_checksums(arrays, about)


def chunks(shape_xyz: Sequence[int]) -> Iterator[tuple[str, tuple[slice, slice, slice]]]:
    """The name and the box of each chunk of a scan of this shape."""
    for corner in itertools.product(*(range(0, n, CHUNK_VOX) for n in shape_xyz)):
        box = tuple(slice(a, min(a + CHUNK_VOX, n)) for a, n in zip(corner, shape_xyz))
        yield "_".join(str(a // CHUNK_VOX) for a in corner), box  # type: ignore[misc]


# -------------------------------------------------------------------------------------------- reading


class File(NamedTuple):
    """Where an image or its labels lie; the checksum of a header is that of what it says, checksums too."""

    uri: str
    header_bytes: int
    header_sha256: str
    shape_cxyz: tuple[int, int, int, int]


@dataclass(frozen=True)
class Ref:
    """Where a prepared scan and its labels lie, and what is known of it without opening it; "" for no labels."""

    scan_id: str
    uri: str
    header_bytes: int
    shape_cxyz: tuple[int, int, int, int]
    header_sha256: str
    labels_uri: str = ""
    labels_header_bytes: int = 0
    labels_header_sha256: str = ""

    @property
    def image(self) -> File:
        return File(self.uri, self.header_bytes, self.header_sha256, self.shape_cxyz)

    @property
    def labels(self) -> File:
        shape = (1, *self.shape_cxyz[1:])
        return File(self.labels_uri, self.labels_header_bytes, self.labels_header_sha256, shape)


@dataclass(frozen=True)
class _Header:
    scan_id: str
    shape_cxyz: tuple[int, int, int, int]
    entries: Mapping[str, Any]  # dtype, shape and data_offsets of each tensor
    sums: Mapping[str, str]
    offset: int  # of the first tensor in the file


class NotACase(ValueError):
    """A header that `to_bytes` does not write."""


def file_of(uri: str, header: bytes) -> File:
    """The file at ``uri`` with this header.

    Raises:
        NotACase: the header is not one that `image_file` or `labels_file` writes.
    """
    return File(uri, len(header), hashlib.sha256(header).hexdigest(), _parsed(header).shape_cxyz)


def stored(uri: str) -> File | None:
    """A stored file, from its header alone; None when it is not there or not whole."""
    entry = object_store.stat(uri)
    if entry is None:
        return None
    header = safetensors_io.stored_header(uri, entry.size_bytes)
    try:
        parsed = _parsed(header)
    except NotACase:
        return None
    end = max(entry["data_offsets"][1] for entry in parsed.entries.values())
    return file_of(uri, header) if parsed.offset + end == entry.size_bytes else None


def write(uri: str, blob: bytes) -> File:
    """Store what `image_file` or `labels_file` gave."""
    object_store.write(uri, blob)
    return file_of(uri, safetensors_io.header_of(blob))


def ref_of(scan_id: str, image: File, labels: File | None = None) -> Ref:
    """The reference to a scan of these files."""
    return Ref(scan_id, *image[:2], image.shape_cxyz, image.header_sha256, *(labels[:3] if labels else ()))


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
        is_image = "coverage" in entries
        # counted first: a shape of any size would be walked through
        if min(c, x, y, z) < 1 or math.prod(-(-n // CHUNK_VOX) for n in (x, y, z)) > len(entries):
            raise NotACase(f"shape {(c, x, y, z)}")
        wanted: dict[str, tuple[str, list[int]]] = {}
        for name, box in chunks((x, y, z)):
            shape = [b.stop - b.start for b in box]
            wanted[f"{'image' if is_image else 'labels'}/{name}"] = (
                ("U16", [c, *shape]) if is_image else ("U8", shape)
            )
        if is_image:
            wanted["coverage"] = ("U8", [-(-n // CELL_VOX) for n in (x, y, z)])
        for name in entries.keys() - wanted.keys():
            count = operator.index(entries[name]["shape"][0])
            if is_image or not (
                name.startswith("places/") and name.removeprefix("places/").isdecimal() and count > 0
            ):
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


@functools.lru_cache(maxsize=2048)
def _header(file: File) -> _Header:
    try:
        header = _parsed(_read(file, 8, file.header_bytes, file.header_sha256))
    except NotACase as err:
        raise object_store.IntegrityError(f"{file.uri} is {err}; {_hint(file)}") from None
    if header.shape_cxyz != file.shape_cxyz:
        odd = f"{file.uri} holds a case of shape {header.shape_cxyz}, not {file.shape_cxyz}"
        raise object_store.IntegrityError(f"{odd}; {_hint(file)}")
    return header


@functools.lru_cache(maxsize=CHUNKS_CACHED)
def _tensor(file: File, name: str) -> np.ndarray:
    """One tensor of a file, checked against its sha256."""
    header = _header(file)
    entry = header.entries[name]
    begin, end = entry["data_offsets"]
    data = _read(file, header.offset + begin, end - begin, header.sums[name])
    return np.frombuffer(data, TYPES[entry["dtype"]]).reshape(entry["shape"])


def _read(file: File, start: int, length: int, sha256: str | None) -> bytes:
    try:
        return node_cache.read(file.uri, start=start, length=length, sha256=sha256)
    except object_store.IntegrityError as err:
        raise object_store.IntegrityError(f"{err}; {_hint(file)}") from None


def _hint(file: File) -> str:
    root = file.uri.rsplit("/", 4)[0]
    tables = f"{root}/prepared and {root}/cases"
    return f"to have it prepared again delete {file.uri} and the tables in {tables}, and run the same command"


def read_crop(ref: Ref, corner: Sequence[int], size_vox: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The box of ``size_vox`` voxels from its lower ``corner``: image_CXYZ uint16 and labels_XYZ uint8.

    Outside the case both are 0: the darkest value of the window, and background.
    """
    image_CXYZ = np.zeros((ref.shape_cxyz[0], *size_vox), np.uint16)
    labels_XYZ = np.zeros(tuple(size_vox), np.uint8)
    _fill(ref, corner, {"image": image_CXYZ, "labels": labels_XYZ[None]})
    return image_CXYZ, labels_XYZ


def read_image(ref: Ref, corner: Sequence[int], size_vox: Sequence[int]) -> np.ndarray:
    """The same without labels: image_CXYZ uint16."""
    image_CXYZ = np.zeros((ref.shape_cxyz[0], *size_vox), np.uint16)
    _fill(ref, corner, {"image": image_CXYZ})
    return image_CXYZ


def _fill(ref: Ref, corner: Sequence[int], boxes: Mapping[str, np.ndarray]) -> None:
    """Write what lies at ``corner`` into the image's and the labels' ``boxes``, all (C, X, Y, Z) of one size."""
    size_vox = next(iter(boxes.values())).shape[1:]
    touched = []
    for name, box in chunks(ref.shape_cxyz[1:]):
        shared = [(max(b.start, int(a)), min(b.stop, int(a) + n)) for b, a, n in zip(box, corner, size_vox)]
        if all(low < high for low, high in shared):
            source = tuple(slice(low - b.start, high - b.start) for (low, high), b in zip(shared, box))
            target = tuple(slice(low - int(a), high - int(a)) for (low, high), a in zip(shared, corner))
            touched.append((name, source, target))
    files = {"image": ref.image, "labels": ref.labels}
    object_store.at_once(_header, [files[kind] for kind in boxes])  # before their chunks ask for them
    wanted = [(kind, *of) for of in touched for kind in boxes]
    found = object_store.at_once(lambda of: _tensor(files[of[0]], f"{of[0]}/{of[1]}"), wanted)
    for (kind, _, source, target), chunk in zip(wanted, found):
        chunk_CXYZ = chunk.reshape(-1, *chunk.shape[-3:])
        boxes[kind][(slice(None), *target)] = chunk_CXYZ[(slice(None), *source)]


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
    classes = sorted(int(n.split("/")[1]) for n in _header(ref.labels).entries if n.startswith("places/"))
    corners = []
    for _ in range(cfg.per_case):
        anywhere = rng.integers(0, np.maximum(room, 0) + 1)
        pick, which, voxel = rng.random(3)  # always drawn, so that one crop's choice never shifts the next's
        if classes and pick < cfg.foreground_share:
            voxels_n3 = _tensor(ref.labels, f"places/{classes[math.floor(which * len(classes))]}")
            centre = voxels_n3[math.floor(voxel * len(voxels_n3))].astype(np.int64)
            anywhere = np.clip(centre - size // 2, 0, np.maximum(room, 0))
        corners.append(np.where(room < 0, room // 2, anywhere))
    return np.stack(corners)


def draw_corner(
    ref: Ref, size_vox: Sequence[int], min_foreground: float, rng: np.random.Generator
) -> np.ndarray:
    """The lower corner of a crop of a scan, int64 (3,), uniform over the positions where it fits.

    Of CANDIDATES the first whose share of anything but air reaches ``min_foreground`` is taken, else the one with the
    largest: most of a scanner's field is air, which teaches nothing. Shares are those of the cells of `coverage`.
    """
    cells_IJK = _tensor(ref.image, "coverage")
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
