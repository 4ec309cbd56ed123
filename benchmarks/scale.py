"""What a run on many scans asks of the machine that drives it: 100,000 scans x 8 crops, 80 clusterers, 96 slices.

    python benchmarks/scale.py

Nothing is decoded, cut or labelled: the functions that data tasks call are stand-ins that answer at once with what the
real ones would, and everything else is the real flow over Ray: rows out, answers in, tables, references in the object
store, one stream to the ranks. So the seconds are those of the flow alone, and the memory is what the driver holds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import _measure
import numpy as np
import tyro

from logonet import methods
from logonet.clustering import fitting
from logonet.data import cropping, manifest, prepared_scans, preparing
from logonet.data.crop_shards import CropRef, CropTable, LabelTable
from logonet.data.manifest import Manifest, Scan, Source
from logonet.distributed import cluster, feed
from logonet.distributed.executor import RayExecutor
from logonet.pipelines import preparation
from logonet.storage.parquet import Rows
from logonet.training.communicator import Communicator
from logonet.training.dataset import FreshCrops, TrainingDataset
from logonet.training.schedule import MicroBatches, SampleSchedule

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Args:
    """
    scans, per_scan: the dataset; clusterers, depth: labels of each crop.
    steps: of the feed, with as many samples as ranks.
    """

    scans: int = 100_000
    per_scan: int = 8
    clusterers: int = 80
    codes: int = 300
    depth: int = 96
    ranks: int = 16
    steps: int = 200


# ------------------------------------------------------------------------------- what the data tasks answer


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def scan_row(source: Source) -> Scan:
    """A row as long as most are."""
    name = source.uri.rsplit("/", 1)[1].removesuffix(".nii.gz")
    known: dict[str, Any] = {f.name: () for f in dataclasses.fields(Scan) if "tuple" in str(f.type)}
    known |= {f.name: "" for f in dataclasses.fields(Scan) if f.type == "str"}
    known |= {f.name: 0 for f in dataclasses.fields(Scan) if f.type == "int"}
    known |= {f.name: 0.0 for f in dataclasses.fields(Scan) if f.type == "float"}
    known |= {"scan_id": f"{name}-{digest(name)[:10]}", "uri": source.uri, "sha256": digest(source.uri)}
    known |= {"voxel_sha256": digest(name), "thumbprint": "0" * 1728, "subject": name, "modality": "CT"}
    known |= {"shape": (512, 512, 300), "spacing_mm": (0.8, 0.8, 1.0), "orientation": "LPS", "dtype": "int16"}
    return Scan(**known)


def refs_of(scan_id: str, count: int, num_bytes: int) -> list[CropRef]:
    shard = f"shards/{scan_id}.safetensors"
    keys = [f"{scan_id}/{i:05d}" for i in range(count)]
    return [
        CropRef(k, scan_id, shard, 1000 + i * num_bytes, num_bytes, digest(k)) for i, k in enumerate(keys)
    ]


class Stages:
    """Stand-ins for what runs in data tasks, made in a function so that they travel by value."""

    def __init__(self, args: Args) -> None:
        per_scan, clusterers, codes, depth = args.per_scan, args.clusterers, args.codes, args.depth
        crop_bytes = 2 * args.depth**3

        class Cut:
            def __init__(self, cfg: Any, uri: str) -> None: ...

            def __call__(self, item: tuple[Scan, int]) -> list[CropRef]:
                return refs_of(item[0].scan_id, per_scan, crop_bytes)

        class Prepare:
            def __init__(self, *_: Any) -> None: ...

            def __call__(self, scan: Scan) -> prepared_scans.Ref:
                uri = f"s3://bucket/runs/prepared/0123456789abcdef/{scan.scan_id}.safetensors"
                return prepared_scans.Ref(scan.scan_id, uri, 9000, (1, 400, 400, 300), digest(scan.scan_id))

        def label(task: Any, labeller: Any) -> tuple[Rows[CropRef], np.ndarray]:
            ids = [task.crops.refs[scan[0]].scan_id for scan in task.crops.by_scan()]
            refs = [ref for i in ids for ref in refs_of(i, per_scan, 2 * clusterers * depth)]
            return Rows.of(refs, CropRef), np.ones((clusterers, codes), np.int64)

        self.cut, self.prepare, self.label = Cut, Prepare, label


# --------------------------------------------------------------------------------------------------- feed


class Ranks(Communicator):
    """Ranks that are threads of this process."""

    def __init__(self, world: int) -> None:
        self.world, self.value = world, None
        self.barrier = threading.Barrier(world, timeout=120)

    def broadcast(self, value: Any) -> Any:
        if value is not None:
            self.value = value
        self.barrier.wait()
        heard = self.value
        self.barrier.wait()
        return heard


def fed(dataset: Any, args: Args, executor: RayExecutor) -> dict[str, float]:
    """Seconds until the ranks have a dataset's first batches and all of them, and the largest data task's memory."""
    import psutil
    import ray

    peak = 0

    def take(rank: int) -> float:
        nonlocal peak
        positions = MicroBatches(dataset.schedule, 1, 0, args.steps, rank, args.ranks)
        first_s = 0.0
        for i, _ in enumerate(feed.batches(reference, positions, executor.allocation, ranks)):
            if i == 0:
                first_s = time.perf_counter() - started
            if rank == 0 and i % 20 == 0:
                tasks = [p for p in psutil.Process().children(recursive=True) if "MapBatches" in p.name()]
                # Shared pages are the object store's.
                peak = max([peak, *((m := p.memory_info()).rss - m.shared for p in tasks)])
        return first_s

    started = time.perf_counter()
    reference, ranks = [ray.put(dataset)], Ranks(args.ranks)
    put_s = time.perf_counter() - started
    with ThreadPoolExecutor(args.ranks) as pool:
        firsts = list(pool.map(take, range(args.ranks)))
    return {
        "put_s": put_s,
        "first_s": max(firsts),
        "all_s": time.perf_counter() - started,
        "data_task_gib": peak / GIB,
    }


def empty_rows(self: Any, samples: Sequence[tuple[int, int]]) -> list[dict[str, np.ndarray]]:
    """What a data task looks up of each sample, without reading it."""
    rows = []
    for repeat, index in samples:
        if isinstance(self, FreshCrops):
            ref: Any = self.scans[index // self.crops.per_scan]
        else:
            ref = self.table.refs[index]
            assert self.labels.refs[index].crop_id == ref.crop_id
        rows.append(
            {"at": np.array([repeat, index]), "bytes": np.frombuffer(ref.scan_id[:8].encode(), np.uint8)}
        )
    return rows


# --------------------------------------------------------------------------------------------------- main


class Watch:
    """Runs stages and keeps what each took."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def run(self, name: str, count: int, work: Callable[..., Any], *args: Any) -> Any:
        started = time.perf_counter()
        with _measure.StoreWatch() as watch, _measure.OwnMemory() as own:
            result = work(*args)
        seconds, driver_gib = time.perf_counter() - started, own.peak_bytes / GIB
        row = {"stage": name, "items": count, "seconds": seconds, "driver_gib": driver_gib}
        self.rows.append({**row, "store_gib": watch.peak_bytes / GIB})
        print(f"{name:40} {count:9,} {seconds:7.1f} s  driver {driver_gib:.2f} GiB", flush=True)
        return result


def main(args: Args) -> None:
    about = _measure.machine()
    os.environ |= _measure.SETTINGS
    stages, watch = Stages(args), Watch()
    manifest.inspect = scan_row  # type: ignore[assignment]
    preparing.CutScan, preparing.PrepareScan = stages.cut, stages.prepare  # type: ignore[misc,assignment]
    fitting._label = stages.label  # type: ignore[assignment]
    cfg = cropping.Config(size_vox=(args.depth,) * 3, per_scan=args.per_scan)
    details: dict[str, dict[str, float]] = {}
    with cluster.connected(cluster.Resources(workers=1, object_store_mb=1500), logs=False):
        executor = RayExecutor(cluster.Resources(workers=1))
        pool, labels, scans = upstream(args, cfg, executor, watch)
        method = "masked_clusters", methods.config("masked_clusters")
        order = SampleSchedule(len(pool), args.ranks, seed=0)
        for name, dataset in (
            ("feed, pool of crops with labels", TrainingDataset(*method, order, pool, labels)),
            ("feed, fresh crops", FreshCrops(*method, order, scans, cfg)),
        ):
            batches = args.steps * args.ranks
            details[name] = watch.run(name, batches, fed, _by_value(dataset), args, executor)
    print(f"\n{args.scans:,} scans x {args.per_scan} crops; {_measure.sentence(about)}\n")
    heads = ["stage", "items", "s", "driver, peak GiB", "object store, peak GiB"]
    lines = [[r["stage"], f"{r['items']:,}", *(f"{r[k]:.2f}" for k in list(r)[2:])] for r in watch.rows]
    print(_measure.markdown(heads, lines) + "\n")
    for name, of in details.items():
        first = f"first batches on {args.ranks} ranks after {of['first_s']:.1f} s"
        rest = (
            f"{args.steps} steps in {of['all_s']:.1f} s, a data task {of['data_task_gib']:.2f} GiB of its own"
        )
        print(f"{name}: put in {of['put_s']:.2f} s, {first}, {rest}")
    print(f"the driver's peak: {max(r['driver_gib'] for r in watch.rows):.2f} GiB")
    print(json.dumps({"rows": watch.rows, "feed": details, "args": dataclasses.asdict(args), **about}))


def upstream(
    args: Args, cfg: cropping.Config, executor: RayExecutor, watch: Watch
) -> tuple[CropTable, LabelTable, Rows[prepared_scans.Ref]]:
    """What pretraining makes before it trains, in its order."""
    sources = [Source(f"s3://bucket/scans/case_{i:06d}.nii.gz") for i in range(args.scans)]
    answers = watch.run("import: read every scan", args.scans, preparation.inspect_scans, sources, executor)
    table = watch.run("import: the table and its Parquet", args.scans, _table, answers)
    answers.clear()
    cut = cfg, "/nowhere", executor
    refs, _ = watch.run("crops: cut every scan", args.scans, preparing.cut_scans, table.scans, *cut)
    pool = watch.run("crops: the table and its Parquet", len(refs), _crop_table, refs, cfg)
    refs.clear()
    labeller: Any = SimpleNamespace(sizes=[args.codes] * args.clusterers)
    labelling = pool, labeller, "/nowhere", executor
    labels, _ = watch.run("labels of every crop", len(pool), fitting.label_crops, *labelling)
    some = preparation.some_crops(pool)
    watch.run("labels of some, for fresh crops", len(some), fitting.label_crops, some, *labelling[1:])
    prepared = None, prepared_scans.Config.of(cfg), "/nowhere", executor
    found, _ = watch.run("prepared: every scan", args.scans, preparing.prepare_scans, table.scans, *prepared)
    return pool, labels, Rows.of(found, prepared_scans.Ref)


def _table(answers: list[Any]) -> Manifest:
    table = Manifest.of(answers)
    table.scans_parquet()
    table.remarks()
    return table


def _crop_table(refs: list[CropRef], cfg: cropping.Config) -> CropTable:
    rows = Rows.of(refs, CropRef)
    rows.to_parquet()
    return CropTable("/nowhere", rows, cfg.size_vox, 1)


def _by_value(dataset: Any) -> Any:
    """The dataset, of a class that travels with its own ``rows``: Ray's processes would import the real one."""
    kind = type(dataset)

    class Empty(kind):  # type: ignore[misc,valid-type]
        rows = empty_rows

    return Empty(**{f.name: getattr(dataset, f.name) for f in dataclasses.fields(dataset)})


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
