"""From the bucket to the step: scans and bytes a second, ours against a bare loop and against MONAI.

    python benchmarks/ingest.py                          # 32 CTs of 256 x 256 x 128, each scan's own spacing
    python benchmarks/ingest.py --spacing-mm 1.5 1.5 2   # the same, resampled
    python benchmarks/ingest.py --real                   # the real scans of ../shared/data

Every way starts from gzipped NIfTI in the embedded S3 server and ends with crops as torch tensors in the process
that would train. They take turns in one run, on scans that none has seen: every turn has a fresh folder for what it
keeps, and every process has done one scan before.

ours: `preparing.prepare_scans` (read, verify, decode, check, window, store the scan in the bucket, in chunks with their
checksums) and then `feed.batches` (draw fresh crops, read and verify their chunks, stack, through Ray's object store).
Later epochs are the second part alone, from the node's own cache.
bare: one process a core; GET, gunzip, nibabel, NumPy and SciPy, the same crops bit for bit (checked), sent through a
pipe. Nothing is verified and nothing is kept, so every epoch costs the same.
MONAI: DataLoader with one process a core on a PersistentDataset of an equivalent chain; its first epoch gets
the files, the later ones read its cache on the local disk.

Bytes are those of the decoded voxels in the files' own type, so that a rate can be held against the floors: what the
same machine decompresses, resamples, copies and gets from the store, measured in the same run.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import gzip
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import _measure
import numpy as np
import torch
import tyro

from logonet import methods, training
from logonet.core import seeding
from logonet.data import cropping, manifest, phantom, prepared_scans, preparing, volume
from logonet.distributed import cluster, feed
from logonet.distributed.executor import RayExecutor
from logonet.pipelines import preparation
from logonet.storage import node_cache, object_store
from logonet.storage.parquet import Rows
from logonet.training import dataset, schedule
from logonet.training.communicator import Communicator
from tools.s3server import S3Server

SCANS = Path(__file__).parents[2] / "shared" / "data" / "scans"
REAL = ("ct_trunk_3mm", "ct_abdomen_3mm", "ct_head_oblique", "ct_head_float64", "mr_abdomen_3mm")
CORES = os.cpu_count() or 1
LATER = 3  # epochs after the first
LATER_EPOCHS = f"ours, {LATER} more epochs"
METHOD = "mae3d"  # whose samples are the crops as they are and a few numbers


@dataclasses.dataclass(frozen=True)
class Args:
    """
    scans: how many a turn reads; ``distinct`` of them have different voxels, the others another gzip header.
    rounds: turns of each way; the medians are reported. 0 measures the floors alone.
    batch: crops of a batch.
    monai: False leaves MONAI out.
    """

    scans: int = 32
    distinct: int = 6
    shape: tuple[int, int, int] = (256, 256, 128)
    scan_spacing_mm: tuple[float, float, float] = (0.9, 0.9, 2.0)
    crop_vox: int = 96
    per_scan: int = 4
    spacing_mm: tuple[float, float, float] | None = None
    real: bool = False
    rounds: int = 3
    batch: int = 4
    monai: bool = True


@dataclasses.dataclass(frozen=True)
class Turn:
    """One way, once over all scans: wall seconds, and processor seconds of all processes and of the S3 server."""

    wall_s: float
    processor_s: float
    server_s: float
    crops: int


def main(args: Args) -> None:
    torch.set_num_threads(1)
    about = _measure.machine()
    os.environ |= _measure.SETTINGS
    cfg = cropping.Config(size_vox=(args.crop_vox,) * 3, per_scan=args.per_scan, spacing_mm=args.spacing_mm)
    with tempfile.TemporaryDirectory(prefix="logonet-ingest-") as folder, S3Server(f"{folder}/s3") as server:
        os.environ |= {**server.env(), node_cache.DIR: f"{folder}/cache"}
        object_store.create_bucket("s3://ingest")
        # Before Ray and torch start threads: forked processes must not inherit a lock that someone holds.
        with concurrent.futures.ProcessPoolExecutor(CORES, multiprocessing.get_context("fork")) as pool:
            uris = upload(args, pool)
        rates = floors(cfg, uris[0])
        print("Floors of one core, MB per processor s of decoded voxels unless said:")
        print(_measure.markdown(["work", "MB/s"], [[name, f"{rate:,.0f}"] for name, rate in rates.items()]))
        result: dict[str, Any] = {}
        if args.rounds:
            with cluster.connected(cluster.Resources(workers=1, object_store_mb=300), logs=False):
                result = measure(args, cfg, uris, folder, server)
            report(args, about, result)
    print(json.dumps({**result, "floors": rates, "args": dataclasses.asdict(args), **about}))


# ----------------------------------------------------------------------------------------------- scans


def upload(args: Args, pool: concurrent.futures.Executor) -> list[str]:
    """Scans with different SHA-256 in the bucket, one more than a turn reads: the first is to warm up."""
    if args.real:
        blobs = [(SCANS / f"{name}.nii.gz").read_bytes() for name in REAL]
    else:
        blobs = list(pool.map(functools.partial(make_scan, args), range(args.distinct)))
    uris = []
    for i in range(args.scans + 1):
        blob = bytearray(blobs[i % len(blobs)])
        blob[4:8] = struct.pack("<I", i + 1)  # gzip's time stamp
        uris.append(f"s3://ingest/scans/scan_{i:03d}.nii.gz")
        object_store.write(uris[-1], bytes(blob))
    return uris


def make_scan(args: Args, number: int) -> bytes:
    scan, _ = phantom.phantom(seeding.integer(0, "ingest", number), args.shape, args.scan_spacing_mm)
    return volume.encode_nifti(scan.array_CXYZ[0].astype(np.int16), scan.affine)


# ------------------------------------------------------------------------------------------------ ours


def feed_of(refs: Sequence[prepared_scans.Ref], cfg: cropping.Config, batch: int) -> dataset.FreshCrops:
    order = schedule.SampleSchedule(len(refs) * cfg.per_scan, batch, seed=0)
    rows = Rows.of(refs, prepared_scans.Ref)
    return dataset.FreshCrops(METHOD, methods.config(METHOD), order, rows, cfg)


class Ours:
    def __init__(self, args: Args, cfg: cropping.Config) -> None:
        self.args, self.cfg = args, cfg
        resources = cluster.Resources(workers=1)
        allocation = cluster.allocate(resources)
        # No step runs here, so all processors may feed.
        allocation = dataclasses.replace(allocation, cpus_per_data_task=allocation.cpus_per_task)
        self.executor = RayExecutor(resources, allocation)
        self.refs: list[prepared_scans.Ref] = []
        self.steps, self.batches = 0, iter(())

    def prepare(self, scans: list[manifest.Scan], root: str) -> int:
        as_cases = prepared_scans.Config.of(self.cfg)
        self.refs, bad = preparing.prepare_scans(scans, None, as_cases, root, self.executor)
        assert not bad, bad
        return len(self.refs)

    def start(self) -> None:
        """Open the stream of a run, of one epoch more than is taken: it goes on while the last is measured."""
        import ray

        run = feed_of(self.refs, self.cfg, self.args.batch)
        self.steps = run.schedule.steps_per_pass
        positions = schedule.MicroBatches(run.schedule, self.args.batch, 0, (LATER + 2) * self.steps)
        arrays = feed.batches([ray.put(run)], positions, self.executor.allocation, Communicator())
        self.batches = training.to_tensors(arrays, torch.device("cpu"))

    def feed(self, epochs: int = 1) -> int:
        """Epochs, as a rank's loop takes them."""
        return sum(len(batch["image"]) for batch in itertools.islice(self.batches, epochs * self.steps))

    def first_epoch(self) -> int:
        self.start()
        return self.feed()


def corners_of(ref: prepared_scans.Ref, cfg: cropping.Config) -> list[list[int]]:
    """Where a scan's crops lie in the first epoch."""
    of_scan = feed_of([ref], cfg, cfg.per_scan)
    return [of_scan.corner(0, slot).tolist() for slot in range(cfg.per_scan)]


# ------------------------------------------------------------------------------------------------ bare


Task = tuple[str, str, cropping.Config, list[list[int]]]  # a scan's URI and modality, and where to cut it


def bare_scan(task: Task) -> np.ndarray:
    """Crops uint16 (R, X, Y, Z) of one CT, as one would write it without this project."""
    import nibabel as nib
    from scipy import ndimage

    uri, modality, cfg, corners = task
    bucket, key = uri.removeprefix("s3://").split("/", 1)
    body = bare_client().get_object(Bucket=bucket, Key=key)["Body"].read()
    image = nib.as_closest_canonical(nib.Nifti1Image.from_bytes(gzip.decompress(body)))
    scan_XYZ = np.asarray(image.dataobj, np.float32)
    if cfg.spacing_mm is not None:
        step = np.array(cfg.spacing_mm) / image.header.get_zooms()
        shape = tuple(int(n) for n in np.round((np.array(scan_XYZ.shape) - 1) / step + 1))
        scan_XYZ = ndimage.affine_transform(scan_XYZ, step, output_shape=shape, order=1, mode="nearest")
    low, high = cfg.window_hu
    if modality == "MR":
        low, high = np.percentile(scan_XYZ[scan_XYZ != 0], cfg.mr_percentiles)
    out_RXYZ = np.empty((len(corners), *cfg.size_vox), np.uint16)
    for r, corner in enumerate(corners):
        crop_XYZ = cropping.cut(scan_XYZ[None], corner, cfg.size_vox, pad=low)[0]
        unit_XYZ = np.clip((crop_XYZ - np.float32(low)) / np.float32(high - low), 0, 1)
        out_RXYZ[r] = np.rint(unit_XYZ * np.float32(65535))
    return out_RXYZ


@functools.cache
def bare_client() -> Any:
    import boto3

    return boto3.client("s3")


# ----------------------------------------------------------------------------------------------- MONAI


def monai_loader(args: Args, cfg: cropping.Config, uris: list[str], folder: str) -> Any:
    from monai import transforms as mt
    from monai.data import DataLoader, PersistentDataset, list_data_collate

    class Get(mt.Transform):
        """A file of the bucket on the local disk, as MONAI's readers want it."""

        def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
            bucket, key = item["image"].removeprefix("s3://").split("/", 1)
            path = f"{folder}/files/{Path(key).name}"
            bare_client().download_file(bucket, key, path)
            return {"image": path}

    os.makedirs(f"{folder}/files")
    chain = [Get(), mt.LoadImaged("image", image_only=True, ensure_channel_first=True)]
    chain += [mt.Orientationd("image", axcodes="RAS", labels=None)]
    if cfg.spacing_mm is not None:
        chain += [mt.Spacingd("image", pixdim=cfg.spacing_mm, mode="bilinear", padding_mode="border")]
    low, high = cfg.window_hu
    chain += [mt.ScaleIntensityRanged("image", low, high, 0.0, 1.0, clip=True)]
    chain += [mt.SpatialPadd("image", cfg.size_vox)]
    # What is random is not kept, so a pass reads a whole scan for its crops.
    chain += [mt.RandSpatialCropSamplesd("image", cfg.size_vox, cfg.per_scan, random_size=False)]
    dataset = PersistentDataset([{"image": u} for u in uris], mt.Compose(chain), cache_dir=f"{folder}/cache")
    return DataLoader(
        dataset,
        batch_size=1,
        num_workers=CORES,
        persistent_workers=True,
        collate_fn=list_data_collate,
        worker_init_fn=lambda _: bare_client.cache_clear(),  # forked processes would share its connections
    )


def monai_epoch(loader: Any) -> int:
    return sum(len(batch["image"]) for batch in loader)


# ---------------------------------------------------------------------------------------------- turns


def measure(
    args: Args, cfg: cropping.Config, uris: list[str], folder: str, server: S3Server
) -> dict[str, Any]:
    ours = Ours(args, cfg)
    started = time.perf_counter()
    sources = [manifest.Source(u) for u in uris]
    with _measure.StoreWatch() as import_watch:
        scans = preparation.inspect_scans(sources, ours.executor)
    import_s = time.perf_counter() - started
    table = [s for s in scans if isinstance(s, manifest.Scan)]
    assert len(table) == len(uris), [s for s in scans if isinstance(s, manifest.Quarantined)]
    warm, *rest = table
    turns: dict[str, list[Turn]] = {}
    watch = _measure.StoreWatch()
    context = multiprocessing.get_context("spawn")
    with context.Pool(CORES) as pool, watch, _measure.Cores() as cores:
        ours.prepare([warm] * (4 * CORES), "s3://ingest/warm")  # each of Ray's workers imports what it needs
        ours.first_epoch()
        first = (warm.uri, warm.modality, cfg, corners_of(ours.refs[0], cfg))
        pool.map(bare_scan, [first] * (2 * CORES), chunksize=1)
        for number in range(args.rounds):
            root = f"s3://ingest/runs-{number}"
            node_cache.clear()
            take(turns, cores, server, "ours, preparing", functools.partial(ours.prepare, rest, root))
            take(turns, cores, server, "ours, feeding", ours.first_epoch)
            take(turns, cores, server, LATER_EPOCHS, functools.partial(ours.feed, LATER))
            tasks = [(s.uri, s.modality, cfg, corners_of(r, cfg)) for s, r in zip(rest, ours.refs)]
            if number == 0:
                same_crops(ours, pool, tasks)
            take(turns, cores, server, "bare", lambda t=tasks: sum(len(c) for c in bare_epoch(pool, t)))
            if args.monai:
                place = f"{folder}/monai-{number}"
                loader = monai_loader(args, cfg, [s.uri for s in rest], place)
                take(turns, cores, server, "MONAI, first epoch", functools.partial(monai_epoch, loader))
                take(turns, cores, server, "MONAI, second epoch", functools.partial(monai_epoch, loader))
                del loader
                shutil.rmtree(place)
            object_store.delete_prefix(root)
    voxel_bytes = sum(int(np.prod(s.shape)) * np.dtype(s.dtype).itemsize for s in rest)
    return {
        "turns": {name: [dataclasses.asdict(t) for t in taken] for name, taken in turns.items()},
        "voxel_bytes": voxel_bytes,
        "file_bytes": sum(s.size_bytes for s in rest),
        "import_s_per_scan": import_s / len(table),
        "object_store_peak_bytes": watch.peak_bytes,
        "import_store_peak_bytes": import_watch.peak_bytes,
        "spilled_bytes": watch.spilled_bytes + import_watch.spilled_bytes,
        "samples": watch.samples,
    }


def take(
    turns: dict[str, list[Turn]], cores: _measure.Cores, server: S3Server, name: str, work: Callable[[], int]
) -> None:
    pids = server.pids.values()
    wall_s, processor_s, server_s = time.perf_counter(), cores.seconds(), cores.seconds(pids)
    count = work()
    turn = Turn(
        time.perf_counter() - wall_s,
        cores.seconds() - processor_s,
        cores.seconds(pids) - server_s,
        count,
    )
    turns.setdefault(name, []).append(turn)
    print(
        f"{name:22} {turn.wall_s:6.2f} s  {turn.processor_s:6.2f} processor s, {turn.server_s:5.2f} of them the "
        f"server's  {count} crops",
        flush=True,
    )


def bare_epoch(pool: Any, tasks: list[Task]) -> Iterator[torch.Tensor]:
    for crops_RXYZ in pool.imap(bare_scan, tasks):
        yield torch.from_numpy(crops_RXYZ[:, None])


def same_crops(ours: Ours, pool: Any, tasks: list[Task]) -> None:
    """Both ways must have cut the same voxels, or nothing is compared."""
    ours.start()
    first = itertools.islice(ours.batches, ours.steps)
    fed = {digest(image_CXYZ[0].numpy()) for batch in first for image_CXYZ in batch["image"]}
    bare = {digest(crop_XYZ) for crops_RXYZ in pool.imap(bare_scan, tasks) for crop_XYZ in crops_RXYZ}
    assert fed == bare


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


# ----------------------------------------------------------------------------------------------- floors


def floors(cfg: cropping.Config, uri: str) -> dict[str, float]:
    """What one core does with one scan's bytes, in MB a processor second: the best of five, in turns."""
    from isal import igzip
    from scipy import ndimage

    blob = object_store.read(uri)
    raw = gzip.decompress(blob)
    decoded = volume.decode_nifti(blob, uri)
    modality = volume.modality(decoded, None, uri)
    array = np.frombuffer(raw, np.uint8)
    target = np.empty_like(array)
    work: dict[str, tuple[int, Callable[[], Any]]] = {
        "S3 GET, the client's part, of file": (len(blob), lambda: object_store.read(uri)),
        "SHA-256, of file": (len(blob), lambda: hashlib.sha256(blob).digest()),
        "gunzip, zlib": (len(raw), lambda: gzip.decompress(blob)),
        "gunzip, ISA-L": (len(raw), lambda: igzip.decompress(blob)),
        "decode and check, ours": (len(raw), lambda: volume.decode_nifti(blob, uri)),
        "memory copy": (len(raw), lambda: np.copyto(target, array)),
        "cut and window": (
            len(raw),
            lambda: cropping.crops_of(decoded, modality, dataclasses.replace(cfg, spacing_mm=None), uri),
        ),
    }
    row = manifest.inspect(manifest.Source(uri))
    assert isinstance(row, manifest.Scan), row
    stores = (f"s3://ingest/floors/scans/{i}" for i in itertools.count())
    prepare = preparing.PrepareScan(None, prepared_scans.Config.of(cfg), next(stores))
    ref = prepare(row)
    assert isinstance(ref, prepared_scans.Ref), ref
    floor, corners = feed_of([ref], cfg, cfg.per_scan), corners_of(ref, cfg)

    def fed() -> None:
        prepared_scans._tensor.cache_clear()  # another scan's chunks would be there
        floor.rows([(0, i) for i in range(cfg.per_scan)])

    work |= {
        "a scan, bare loop, without Ray or pipe": (
            len(raw),
            lambda: bare_scan((uri, modality, cfg, corners)),
        ),
        "a scan, ours, prepared and kept, without Ray": (
            len(raw),
            lambda: dataclasses.replace(prepare, store=next(stores))(row),
        ),
        "a scan, ours, fed from the node's cache, without Ray": (len(raw), fed),
    }
    if (spacing_mm := cfg.spacing_mm) is not None:
        new = volume.resample(decoded, spacing_mm)
        ras_XYZ, step = (
            volume.to_ras(decoded).array_CXYZ[0],
            np.array(spacing_mm) / volume.to_ras(decoded).spacing_mm,
        )
        work["resample, SciPy"] = (
            len(raw),
            lambda: ndimage.affine_transform(
                ras_XYZ, step, output_shape=new.shape_xyz, order=1, mode="nearest"
            ),
        )
        work["resample, ours"] = (len(raw), lambda: volume.resample(decoded, spacing_mm))
    best_s = dict.fromkeys(work, float("inf"))
    for _ in range(5):
        for name, (_, call) in work.items():
            started = time.process_time()
            call()
            best_s[name] = min(best_s[name], time.process_time() - started)
    return {name: size / max(best_s[name], 1e-9) / 1e6 for name, (size, _) in work.items()}


# ----------------------------------------------------------------------------------------------- report


def report(args: Args, about: dict[str, Any], result: dict[str, Any]) -> None:
    turns = {name: [Turn(**t) for t in taken] for name, taken in result["turns"].items()}
    n = args.scans
    ways = {
        "ours, first epoch (prepare, keep, feed)": ("ours, preparing", "ours, feeding"),
        "ours, later epochs (feed)": (LATER_EPOCHS,),
        "bare nibabel + NumPy, every epoch": ("bare",),
        "MONAI PersistentDataset, first epoch": ("MONAI, first epoch",),
        "MONAI PersistentDataset, later epochs": ("MONAI, second epoch",),
    }
    present = {name: parts for name, parts in ways.items() if all(part in turns for part in parts)}

    def median(name: str, of: Callable[[Turn], float]) -> float:
        """Of one epoch."""
        sums = [sum(map(of, together)) for together in zip(*(turns[p] for p in present[name]))]
        return statistics.median(sums) / (LATER if LATER_EPOCHS in present[name] else 1)

    bare = "bare nibabel + NumPy, every epoch"
    measured = {
        name: {
            "scans_per_s": n / median(name, lambda t: t.wall_s),
            "mb_per_s": result["voxel_bytes"] / median(name, lambda t: t.wall_s) / 1e6,
            "processor_s": median(name, lambda t: t.processor_s) / n,
            "server_s": median(name, lambda t: t.server_s) / n,
            "of_bare": median(bare, lambda t: t.wall_s) / median(name, lambda t: t.wall_s),
            "of_bare_by_processor": median(bare, lambda t: t.processor_s)
            / median(name, lambda t: t.processor_s),
            "of_bare_without_server": median(bare, lambda t: t.processor_s - t.server_s)
            / median(name, lambda t: t.processor_s - t.server_s),
        }
        for name in present
    }
    rows = [
        [
            name,
            f"{m['scans_per_s']:.2f}",
            f"{m['mb_per_s']:.0f}",
            f"{m['processor_s']:.3f}",
            f"{m['server_s']:.3f}",
            f"{m['of_bare']:.2f}",
            f"{m['of_bare_by_processor']:.2f}",
            f"{m['of_bare_without_server']:.2f}",
        ]
        for name, m in measured.items()
    ]
    heads = ["way", "scans/s", "MB/s", "processor s a scan", "of them the S3 server's"]
    heads += ["of the bare loop, by the clock", "by processor s", "by processor s without the server's"]
    what = "real scans" if args.real else f"phantoms of {'x'.join(map(str, args.shape))} int16"
    grid = "own spacing" if args.spacing_mm is None else f"{args.spacing_mm} mm"
    print(
        f"\n{n} {what}, {args.per_scan} crops of {args.crop_vox}^3 each, {grid}; {_measure.sentence(about)}\n"
    )
    print(_measure.markdown(heads, rows) + "\n")
    result["ways"] = measured
    print(f"Importing (once a dataset): {1 / result['import_s_per_scan']:.2f} scans/s")
    peak, spilled = result["object_store_peak_bytes"], result["spilled_bytes"]
    print(
        f"Object store: peak {peak / 1e6:.0f} MB in {result['samples']} samples, {spilled / 1e6:.0f} MB spilled"
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
