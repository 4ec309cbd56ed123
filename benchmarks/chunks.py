"""Random crops from chunked scans: our prepared scans against zarr 3, from a folder and from the S3 server.

    pip install "zarr>=3" obstore                       # needed; zarrs and tensorstore are measured where installed
    python benchmarks/chunks.py                         # phantom CTs of 256 x 256 x 128, crops of 96^3
    python benchmarks/chunks.py --shape 256 256 256

Every way reads the same voxels, uint16 as `prepared_scans.prepare_image` makes them, at the same random corners, and
gives the crop as an array; all of them are compared with the source before anything is timed. The ways take turns, in
an order that shifts from turn to turn.

ours: one safetensors file a scan, chunks of 64^3, not compressed, a SHA-256 each (`prepared_scans.read_image`). The
parsed headers are kept, as in training; the chunks that the process keeps are dropped before each crop. The node cache
is off but in the way that says otherwise, which has read every scan once before.
bare: `os.pread` of the same chunks of the same files, one after another, nothing checked: the floor.
zarr: one shard a scan, inner chunks of 64^3, a CRC-32C each, several compressors; arrays are opened once. zarr-python
reads the shard's index at every crop, and the chunks of a shard one after another. "One object a chunk" is without
shards. S3 is read through zarr's own ObjectStore (obstore), and through two stores of this file: `object_store.read`,
which reads twice what it has no SHA-256 of, and a plain GET of boto3. obstore writes in parts, and of such objects the
server's reads take twice its time, so after the writing was measured every object is put again in one request.
TensorStore and zarrs: other readers of the same zarr files, where they are installed. zarrs (0.2.3) does not notice a
flipped byte when it reads a part of a shard, so hold it against "bare".

Processor time is this process's, all threads; the S3 server's is given beside it. Local files are in the page cache.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable
from importlib import metadata
from typing import Any

import _measure
import google_crc32c
import numpy as np
import psutil
import torch
import tyro
import zarr
from obstore.store import S3Store
from zarr.abc.store import ByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore, ObjectStore

from logonet.core import seeding
from logonet.data import phantom, prepared_scans
from logonet.storage import node_cache, object_store
from tools.s3server import S3Server

BUCKET = "s3://chunks"
PACKAGES = ("zarr", "numcodecs", "google-crc32c", "obstore", "zarrs", "tensorstore", "numpy", "boto3")
COMPRESSORS: dict[str, list[Any]] = {
    "none": [],
    "zstd 1": [ZstdCodec(level=1)],
    "zstd 3": [ZstdCodec(level=3)],
    "blosc lz4": [BloscCodec(cname="lz4", clevel=5, shuffle="shuffle", typesize=2)],
    "blosc zstd 1": [BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", typesize=2)],
}
ON_S3 = ("none", "zstd 1", "blosc lz4")

Crop = Callable[[int, np.ndarray], np.ndarray]  # scan number and lower corner -> image_CXYZ


@dataclasses.dataclass(frozen=True)
class Args:
    """
    crops: of a turn, of each way.
    zarr_chunk_vox: side of zarr's inner chunks; ours are 64.
    local, s3: False leaves that place out.
    """

    shape: tuple[int, int, int] = (256, 256, 128)
    scans: int = 5
    crop_vox: int = 96
    crops: int = 40
    turns: int = 5
    zarr_chunk_vox: int = 64
    local: bool = True
    s3: bool = True


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds of one way's turn: this process's, the S3 server's, by the clock."""

    processor_s: float
    server_s: float
    wall_s: float


@dataclasses.dataclass(frozen=True)
class Form:
    """How zarr stores a scan."""

    compressor: str
    sharded: bool = True

    @property
    def name(self) -> str:
        return f"zarr, {self.compressor}" + ("" if self.sharded else ", one object a chunk")

    @property
    def folder(self) -> str:
        return self.name.replace(", ", "-").replace(" ", "_")


FORMS = [*(Form(compressor) for compressor in COMPRESSORS), Form("zstd 1", sharded=False)]


def main(args: Args) -> None:
    torch.set_num_threads(1)
    about = _measure.machine() | {"versions": _versions(), "args": dataclasses.asdict(args)}
    os.environ |= _measure.SETTINGS | {node_cache.GB: "0"}
    with tempfile.TemporaryDirectory(prefix="logonet-chunks-") as folder, S3Server(f"{folder}/s3") as server:
        os.environ |= server.env() | {node_cache.DIR: f"{folder}/cache"}
        object_store.create_bucket(BUCKET)
        clock = Clock(server)
        images = [make_scan(args, number) for number in range(args.scans)]
        places = [f"{folder}/files"] * args.local + [BUCKET] * args.s3
        tables: dict[str, Any] = {}
        checking(images[0])
        for place in places:
            where = "S3" if object_store.is_s3(place) else "local"
            tables[f"writing, {where}"] = written = write_all(args, images, place, clock)
            refs = [_ref(place, number) for number in range(args.scans)]
            crops = ways_of(args, place, refs, server)
            check(args, crops, images)
            tables[f"reading, {where}"] = turns = read_all(args, crops, clock)
            report(args, about, where, images, written, turns)
    plain = {
        table: {way: [dataclasses.astuple(cost) for cost in of["costs"]] for way, of in ways.items()}
        for table, ways in tables.items()
    }
    print(json.dumps({**plain, **about}))


def make_scan(args: Args, number: int) -> np.ndarray:
    scan, _ = phantom.phantom(seeding.integer(0, "chunks", number), args.shape, (0.9, 0.9, 2.0))
    return prepared_scans.prepare_image(scan, "CT", prepared_scans.Config(), str(number))


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


class Clock:
    def __init__(self, server: S3Server) -> None:
        self.server = [psutil.Process(pid) for pid in server.pids.values()]

    def _server_s(self) -> float:
        times = [process.cpu_times() for process in self.server]
        return sum(t.user + t.system for t in times)

    def cost(self, work: Callable[[], Any]) -> Cost:
        wall_s, server_s, processor_s = time.perf_counter(), self._server_s(), time.process_time()
        work()
        spent_s = time.process_time() - processor_s
        return Cost(spent_s, self._server_s() - server_s, time.perf_counter() - wall_s)


def checking(image_CXYZ: np.ndarray) -> None:
    """What the two checksums cost: the median of 25 chunks of 64^3."""
    side = prepared_scans.CHUNK_VOX
    data = np.ascontiguousarray(image_CXYZ[:, :side, :side, :side]).tobytes()
    for name, digest in (("SHA-256", hashlib.sha256), ("CRC-32C", google_crc32c.value)):
        each_s = []
        for _ in range(25):
            started = time.process_time()
            digest(data)
            each_s.append(time.process_time() - started)
        print(f"{name} of a chunk of {len(data) / 1024:.0f} KiB: {statistics.median(each_s) * 1e3:.3f} ms")


# --------------------------------------------------------------------------------------------- writing


def write_all(args: Args, images: list[np.ndarray], place: str, clock: Clock) -> dict[str, Any]:
    """Way -> its costs, one a scan, and the bytes stored of all scans."""
    forms = [f for f in FORMS if not object_store.is_s3(place) or f.compressor in ON_S3]
    work: dict[str, Callable[[int], Any]] = {
        "ours": lambda number: _write_ours(place, number, images[number])
    }
    for form in forms:
        work[form.name] = functools.partial(_write_zarr, args, form, place, images)
    folders = {"ours": "ours", **{form.name: form.folder for form in forms}}
    costs: dict[str, list[Cost]] = {name: [] for name in work}
    for name, write in work.items():  # unmeasured: whatever starts at the first use
        write(0)
        object_store.delete_prefix(f"{place}/{folders[name]}")
    for number in range(args.scans):
        for name in _shifted(list(work), number):
            costs[name].append(clock.cost(functools.partial(work[name], number)))
    sizes = dict.fromkeys(work, 0)
    for name, folder in folders.items():
        for entry in object_store.listing(f"{place}/{folder}"):
            sizes[name] += entry.size_bytes
            if object_store.is_s3(place):  # in one request, as ours
                object_store.write(entry.uri, object_store.read(entry.uri))
    return {name: {"costs": costs[name], "bytes": sizes[name]} for name in work}


def _write_ours(place: str, number: int, image_CXYZ: np.ndarray) -> None:
    prepared_scans.write(_ours(place, number), prepared_scans.image_file(f"scan_{number}", image_CXYZ))


def _write_zarr(args: Args, form: Form, place: str, images: list[np.ndarray], number: int) -> None:
    image_CXYZ, side = images[number], args.zarr_chunk_vox
    whole = (image_CXYZ.shape[0], *(-(-n // side) * side for n in image_CXYZ.shape[1:]))
    array = zarr.create_array(
        _store(f"{place}/{form.folder}/{number}"),
        shape=image_CXYZ.shape,
        dtype=image_CXYZ.dtype,
        chunks=(image_CXYZ.shape[0], *[side] * 3),
        shards=whole if form.sharded else None,
        compressors=[*COMPRESSORS[form.compressor], Crc32cCodec()],
        fill_value=0,
    )
    array[...] = image_CXYZ


def _ours(place: str, number: int) -> str:
    return f"{place}/ours/{number}.safetensors"


def _ref(place: str, number: int) -> prepared_scans.Ref:
    image = prepared_scans.stored(_ours(place, number))
    assert image is not None
    return prepared_scans.ref_of(f"scan_{number}", image)


# ---------------------------------------------------------------------------------------------- stores


def _store(uri: str) -> Store:
    """What zarr itself reads a folder or a bucket with."""
    if not object_store.is_s3(uri):
        return LocalStore(uri)
    bucket, prefix = uri.removeprefix("s3://").split("/", 1)
    remote = S3Store(
        bucket,
        prefix=prefix,
        endpoint=os.environ["AWS_ENDPOINT_URL_S3"],
        access_key_id=os.environ["AWS_ACCESS_KEY_ID"],
        secret_access_key=os.environ["AWS_SECRET_ACCESS_KEY"],
        region=os.environ["AWS_DEFAULT_REGION"],
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )
    return ObjectStore(remote, read_only=False)


def _get(uri: str, start: int, length: int) -> bytes:
    """A range as one would get it without this project."""
    bucket, key = uri.removeprefix("s3://").split("/", 1)
    span = f"bytes={start}-{start + length - 1}"
    return bytes(_client().get_object(Bucket=bucket, Key=key, Range=span)["Body"].read())


@functools.cache
def _client() -> Any:
    import boto3

    return boto3.client("s3")


def _read(uri: str, start: int, length: int) -> bytes:
    return object_store.read(uri, start=start, length=length)


class Reading(Store):
    """A zarr store that reads below ``uri`` with a function of ours. Sizes are asked once an object and kept."""

    def __init__(self, uri: str, read: Callable[[str, int, int], bytes]) -> None:
        super().__init__(read_only=True)
        self.uri, self.read, self.sizes = uri, read, dict[str, int | None]()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reading) and (other.uri, other.read) == (self.uri, self.read)

    def _size(self, key: str) -> int | None:
        if key not in self.sizes:
            entry = object_store.stat(f"{self.uri}/{key}")
            self.sizes[key] = None if entry is None else entry.size_bytes
        return self.sizes[key]

    def _bytes(self, key: str, byte_range: ByteRequest | None) -> bytes | None:
        if isinstance(byte_range, RangeByteRequest):
            return self.read(f"{self.uri}/{key}", byte_range.start, byte_range.end - byte_range.start)
        size = self._size(key)
        if size is None:
            return None
        start = 0 if byte_range is None else size - byte_range.suffix  # type: ignore[union-attr]
        return self.read(f"{self.uri}/{key}", start, size - start)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        assert byte_range is None or isinstance(byte_range, RangeByteRequest | SuffixByteRequest)
        data = await asyncio.to_thread(self._bytes, key, byte_range)
        return None if data is None else prototype.buffer.from_bytes(data)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return list(await asyncio.gather(*(self.get(key, prototype, span) for key, span in key_ranges)))

    async def exists(self, key: str) -> bool:
        return await asyncio.to_thread(self._size, key) is not None

    supports_writes = supports_deletes = supports_listing = False  # type: ignore[assignment]

    async def set(self, key: str, value: Buffer) -> None:
        raise NotImplementedError

    async def delete(self, key: str) -> None:
        raise NotImplementedError

    def list(self) -> AsyncIterator[str]:
        raise NotImplementedError

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        raise NotImplementedError

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        raise NotImplementedError


# ------------------------------------------------------------------------------------------------ ways


def ways_of(args: Args, place: str, refs: list[prepared_scans.Ref], server: S3Server) -> dict[str, Crop]:
    s3 = object_store.is_s3(place)
    ways: dict[str, Crop] = {"ours": functools.partial(ours, args, refs, "0")}
    if s3:
        ways["ours, node cache, later reads"] = functools.partial(ours, args, refs, "10")
    else:
        ways["bare"] = functools.partial(bare, args, refs, [os.open(ref.uri, os.O_RDONLY) for ref in refs])

    def arrays(form: Form, store: Callable[[str], Store]) -> Crop:
        opened = [zarr.open_array(store(f"{place}/{form.folder}/{n}"), mode="r") for n in range(args.scans)]
        return functools.partial(from_zarr, args, opened)

    through = ", obstore" if s3 else ""
    for form in FORMS:
        if not s3 or form.compressor in ON_S3:
            ways[form.name + through] = arrays(form, _store)
    if s3:
        form = Form("none")
        ways[f"{form.name}, our read"] = arrays(form, functools.partial(Reading, read=_read))
        ways[f"{form.name}, boto3"] = arrays(form, functools.partial(Reading, read=_get))
    for compressor in ("none", "blosc lz4") if s3 else ("none", "zstd 1", "blosc lz4"):
        form = Form(compressor)
        if importlib.util.find_spec("zarrs") and not s3:
            pipeline = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True}
            with zarr.config.set(pipeline):
                ways[f"{form.name}, zarrs, nothing checked"] = arrays(form, _store)
        if importlib.util.find_spec("tensorstore"):
            opened = [_tensorstore(f"{place}/{form.folder}/{n}", server) for n in range(args.scans)]
            ways[f"{form.name}, TensorStore"] = functools.partial(from_tensorstore, args, opened)
    return ways


def ours(
    args: Args, refs: list[prepared_scans.Ref], cache_gb: str, number: int, corner: np.ndarray
) -> np.ndarray:
    os.environ[node_cache.GB] = cache_gb
    prepared_scans._tensor.cache_clear()
    return prepared_scans.read_image(refs[number], corner, (args.crop_vox,) * 3)


def bare(
    args: Args, refs: list[prepared_scans.Ref], files: list[int], number: int, corner: np.ndarray
) -> np.ndarray:
    header, size = prepared_scans._header(refs[number].image), args.crop_vox
    crop_CXYZ = np.empty((header.shape_cxyz[0], size, size, size), np.uint16)
    for name, box in prepared_scans.chunks(header.shape_cxyz[1:]):
        shared = [(max(b.start, int(a)), min(b.stop, int(a) + size)) for b, a in zip(box, corner)]
        if all(low < high for low, high in shared):
            entry = header.entries[f"image/{name}"]
            begin, end = entry["data_offsets"]
            data = os.pread(files[number], end - begin, header.offset + begin)
            chunk_CXYZ = np.frombuffer(data, np.uint16).reshape(entry["shape"])
            source = tuple(slice(low - b.start, high - b.start) for (low, high), b in zip(shared, box))
            target = tuple(slice(low - int(a), high - int(a)) for (low, high), a in zip(shared, corner))
            crop_CXYZ[(slice(None), *target)] = chunk_CXYZ[(slice(None), *source)]
    return crop_CXYZ


def _box(args: Args, corner: np.ndarray) -> tuple[slice, ...]:
    return (slice(None), *(slice(int(a), int(a) + args.crop_vox) for a in corner))


def from_zarr(args: Args, opened: list[Any], number: int, corner: np.ndarray) -> np.ndarray:
    return np.asarray(opened[number][_box(args, corner)])


def _tensorstore(uri: str, server: S3Server) -> Any:
    import tensorstore

    store: dict[str, Any] = {"driver": "file", "path": f"{uri}/"}
    if object_store.is_s3(uri):
        bucket, path = uri.removeprefix("s3://").split("/", 1)
        store = {"driver": "s3", "bucket": bucket, "path": f"{path}/", "endpoint": server.endpoint}
        store |= {"aws_region": os.environ["AWS_DEFAULT_REGION"], "aws_credentials": {"type": "environment"}}
    return tensorstore.open({"driver": "zarr3", "kvstore": store}, open=True, read=True).result()


def from_tensorstore(args: Args, opened: list[Any], number: int, corner: np.ndarray) -> np.ndarray:
    return np.asarray(opened[number][_box(args, corner)].read().result())


# --------------------------------------------------------------------------------------------- reading


def _shifted(names: list[str], by: int) -> list[str]:
    """The names in another order each time, so that none always follows the same one."""
    first = (by * 5) % len(names)
    return names[first:] + names[:first]


def draw(args: Args, turn: int, crops: int) -> list[tuple[int, np.ndarray]]:
    rng = seeding.rng(0, "chunks", turn)
    room = np.array(args.shape) - args.crop_vox
    return [(int(rng.integers(args.scans)), rng.integers(0, room + 1)) for _ in range(crops)]


def check(args: Args, ways: dict[str, Crop], images: list[np.ndarray]) -> None:
    """Every way gives the source's voxels, or nothing is compared. It also opens all that is opened once."""
    drawn = [*enumerate(np.zeros((args.scans, 3), int)), *draw(args, -1, 5)]
    for name, crop in ways.items():
        for number, corner in drawn:
            expected_CXYZ = images[number][_box(args, corner)]
            np.testing.assert_array_equal(crop(number, corner), expected_CXYZ, err_msg=name)
    if later := ways.get("ours, node cache, later reads"):
        side = args.crop_vox
        for number in range(args.scans):
            for corner in np.ndindex(*(-(-n // side) for n in args.shape)):
                later(number, np.minimum(np.array(corner) * side, np.array(args.shape) - side))


def _read_each(crop: Crop, drawn: list[tuple[int, np.ndarray]]) -> None:
    for number, corner in drawn:
        crop(number, corner)


def read_all(args: Args, ways: dict[str, Crop], clock: Clock) -> dict[str, Any]:
    costs: dict[str, list[Cost]] = {name: [] for name in ways}
    for turn in range(args.turns):
        drawn = draw(args, turn, args.crops)
        for name in _shifted(list(ways), turn):
            costs[name].append(clock.cost(functools.partial(_read_each, ways[name], drawn)))
    return {name: {"costs": taken} for name, taken in costs.items()}


# ---------------------------------------------------------------------------------------------- report


def _median(costs: list[Cost], of: str) -> float:
    return statistics.median(getattr(cost, of) for cost in costs)


def report(
    args: Args,
    about: dict[str, Any],
    where: str,
    images: list[np.ndarray],
    written: dict[str, Any],
    turns: dict[str, Any],
) -> None:
    shape = "x".join(map(str, args.shape))
    raw = sum(image.nbytes for image in images)
    print(f"\n{args.scans} phantoms of {shape} uint16, {where}; {_measure.sentence(about)}")
    print(", ".join(f"{name} {version}" for name, version in about["versions"].items()) + "\n")
    rows = []
    for name, of in written.items():
        seconds = [f"{_median(of['costs'], kind):.3f}" for kind in ("processor_s", "server_s", "wall_s")]
        rows.append([name, *seconds, f"{of['bytes'] / args.scans / 1e6:.2f}", f"{of['bytes'] / raw:.3f}"])
    heads = ["writing", "processor s a scan", "S3 server's s", "wall s", "MB a scan", "of the voxels' bytes"]
    print(_measure.markdown(heads, rows) + "\n")
    ours_of = turns["ours"]["costs"]
    rows = []
    for name, of in turns.items():
        row = [name]
        for kind in ("processor_s", "server_s", "wall_s"):
            each = [getattr(cost, kind) / args.crops * 1e3 for cost in of["costs"]]
            spread = f" ({min(each):.1f}-{max(each):.1f})" if kind != "server_s" else ""
            row.append(f"{statistics.median(each):.1f}{spread}")
        for kind in ("processor_s", "wall_s"):
            row.append(f"{_median(of['costs'], kind) / _median(ours_of, kind):.2f}")
        rows.append(row)
    heads = [f"reading {args.crop_vox}^3", "processor ms a crop", "S3 server's ms", "wall ms a crop"]
    heads += ["ours is so many times as fast, by processor", "by the clock"]
    print(f"Medians of {args.turns} turns of {args.crops} crops (smallest-largest):\n")
    print(_measure.markdown(heads, rows) + "\n", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
