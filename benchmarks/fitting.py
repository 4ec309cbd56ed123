"""Fitting clusterers on Ray tasks against one after the other, and labelling crops with them.

    python benchmarks/fitting.py
    python benchmarks/fitting.py --clusterers 24 --slices 6144 --side 64 --k-min 20 --k-max 100

Fitting is the same function on the same slices, `clusterers.fit_one`, which keeps to one thread so that its bits do
not depend on threads: in this process, one clusterer after the other, against `data.fit_clusterers`, a Ray task each,
with the crops in the embedded S3 server and every clusterer stored there. The centroids are compared, bit for bit. Then
scikit-learn's own updates with all threads, which is what a plain loop would do. Labelling is `data.label_crops`
against the labeller in this process.

All take turns in one run. The floor is the product of an update's slices with the centroids, at the rate that this
machine multiplies at, measured in the same run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import _measure
import numpy as np
import torch
import tyro
from sklearn.cluster import MiniBatchKMeans
from threadpoolctl import threadpool_limits

from logonet.clustering import fitting, kmeans
from logonet.clustering.pseudo_labels import Labeller
from logonet.core import seeding
from logonet.data import crop_shards, cropping, volume
from logonet.distributed import cluster
from logonet.distributed.executor import RayExecutor
from logonet.storage import object_store
from tools.s3server import S3Server

CORES = os.cpu_count() or 1


@dataclasses.dataclass(frozen=True)
class Args:
    """``slices`` of ``side`` x ``side`` voxels are fitted on; each update sees a tenth of them."""

    clusterers: int = 8
    k_min: int = 80
    k_max: int = 240
    iterations: int = 20
    slices: int = 6144
    side: int = 64
    rounds: int = 3


def main(args: Args) -> None:
    about = _measure.machine()
    os.environ |= _measure.SETTINGS
    with tempfile.TemporaryDirectory(prefix="logonet-fitting-") as folder, S3Server(f"{folder}/s3") as server:
        os.environ |= server.env()
        object_store.create_bucket("s3://fitting")
        cut = cropping.Config(size_vox=(args.side,) * 3, per_scan=-(-args.slices // (4 * args.side)))
        table = _measure.phantom_crops("s3://fitting", cut, 4, (128, 128, 96))
        with cluster.connected(cluster.Resources(workers=1, object_store_mb=300), logs=False):
            result = measure(args, table)
    report(args, about, result)


def label(table: crop_shards.CropTable, labeller: Labeller, executor: RayExecutor, number: int) -> np.ndarray:
    labels, _ = fitting.label_crops(table, labeller, f"s3://fitting/labels-{number}", executor)
    return np.stack(labels.read_all(range(len(labels))))


def measure(args: Args, table: crop_shards.CropTable) -> dict[str, Any]:
    executor = RayExecutor(cluster.Resources(workers=1))
    cfg = kmeans.Config(
        n=args.clusterers,
        k_min=args.k_min,
        k_max=args.k_max,
        iterations=args.iterations,
        max_slices=args.slices,
    )
    counts = kmeans.cluster_counts(cfg)
    slices_ST = fitting.sample_slices(table, cfg.max_slices, cfg.seed, executor)
    turns: dict[str, list[tuple[float, float]]] = {}
    labels: dict[str, np.ndarray] = {}
    # Ray's workers import what they need before anything is timed.
    warm = dataclasses.replace(cfg, n=2 * CORES, iterations=1)
    fitting.fit_clusterers(slices_ST, warm, "s3://fitting/warm", executor, note=lambda *_: None)
    watch = _measure.StoreWatch()
    with watch, _measure.Cores() as cores:
        for number in range(args.rounds):
            alone = take(
                turns,
                cores,
                "fitting, one after the other",
                lambda: [kmeans.fit_one(slices_ST, k, i, cfg) for i, k in enumerate(counts)],
            )
            tasks = take(
                turns,
                cores,
                "fitting, Ray tasks",
                lambda uri: fitting.fit_clusterers(slices_ST, cfg, uri, executor, note=lambda *_: None),
                f"s3://fitting/fits-{number}",
            )
            for a, b in zip(alone, tasks):
                np.testing.assert_array_equal(a.centroids_KT, b.centroids_KT)
            take(turns, cores, "fitting, scikit-learn with all threads", plain_loop, slices_ST, counts, cfg)
            fitted = kmeans.ClustererSet.from_fitted(alone, {})
            labeller = Labeller(fitted)
            labels["tasks"] = take(turns, cores, "labelling, Ray actors", label, table, labeller, executor)
            labels["alone"] = take(
                turns,
                cores,
                "labelling, one process",
                lambda labeller: np.stack(
                    [labeller(crop_shards.slices_of(table.read(i))).T for i in range(len(table))]
                ),
                labeller,
            )
            np.testing.assert_array_equal(labels["tasks"], labels["alone"])
    rows = max(1, round(cfg.fraction * len(slices_ST)))
    products = 2 * rows * slices_ST.shape[1] * sum(counts) * cfg.iterations
    return {
        "turns": turns,
        "slices": len(slices_ST),
        "crops": len(table),
        "tasks_at_once": int(executor.allocation.cpus / executor.allocation.cpus_per_task),
        "product_flop": products,
        "flop_per_s": product_rate(rows, slices_ST.shape[1], max(counts)),
        "sample_bytes": slices_ST.nbytes,
        "object_store_peak_bytes": watch.peak_bytes,
        "spilled_bytes": watch.spilled_bytes,
    }


def plain_loop(slices_ST: np.ndarray, counts: list[int], cfg: kmeans.Config) -> None:
    """Section 4.1 as one would write it: no limit on threads, otherwise the same updates."""
    with threadpool_limits(CORES):
        for i, k in enumerate(counts):
            size = max(1, round(cfg.fraction * len(slices_ST)))
            kmeans = MiniBatchKMeans(
                k, init="k-means++", random_state=i, batch_size=size, compute_labels=False
            )
            for iteration in range(cfg.iterations):
                rows = max(size, k) if iteration == 0 else size
                chosen = seeding.rng(cfg.seed, "plain", i, iteration).choice(
                    len(slices_ST), rows, replace=False
                )
                kmeans.partial_fit(volume.from_uint16(slices_ST[chosen]))


def take(
    turns: dict[str, list[tuple[float, float]]],
    cores: _measure.Cores,
    name: str,
    work: Callable[..., Any],
    *given: Any,
) -> Any:
    wall_s, processor_s = time.perf_counter(), cores.seconds()
    answer = work(*given)
    turn = time.perf_counter() - wall_s, cores.seconds() - processor_s
    turns.setdefault(name, []).append(turn)
    print(f"{name:40} {turn[0]:6.2f} s  {turn[1]:6.2f} processor s", flush=True)
    return answer


def product_rate(rows: int, columns: int, k: int) -> float:
    """Float operations a second of one thread's float32 product of the sizes of an update; the best of nine."""
    rng = seeding.rng(0, "product")
    x_BT, c_TK = (rng.random(shape, dtype=np.float32) for shape in ((rows, columns), (columns, k)))
    seconds = []
    with threadpool_limits(1):
        for _ in range(9):
            started = time.perf_counter()
            x_BT @ c_TK
            seconds.append(time.perf_counter() - started)
    return 2 * rows * columns * k / min(seconds)


def report(args: Args, about: dict[str, Any], result: dict[str, Any]) -> None:
    turns = result["turns"]
    medians = {name: [statistics.median(v) for v in zip(*taken)] for name, taken in turns.items()}
    first = {"fitting": "fitting, one after the other", "labelling": "labelling, one process"}
    rows = [
        [
            name,
            f"{wall_s:.2f}",
            f"{processor_s:.2f}",
            # Turn by turn, so that a slow minute is in both.
            f"{statistics.median(a / b for (a, _), (b, _) in zip(turns[first[name.split(',')[0]]], turns[name])):.2f}",
        ]
        for name, (wall_s, processor_s) in medians.items()
    ]
    print(
        f"\n{args.clusterers} clusterers of {args.k_min} to {args.k_max} clusters, {args.iterations} updates"
    )
    print(f"on tenths of {result['slices']:,} slices of {args.side}^2; {result['crops']} crops labelled;")
    print(f"{result['tasks_at_once']} tasks at once; {_measure.sentence(about)}\n")
    print(_measure.markdown(["way", "s", "processor s", "times the speed of one"], rows))
    floor_s = result["product_flop"] / result["flop_per_s"]
    print(
        f"\nFloor: the updates' products alone are {result['product_flop'] / 1e9:,.0f} Gflop, {floor_s:.2f} s of one "
        f"thread at {result['flop_per_s'] / 1e9:.0f} Gflop/s and {floor_s / CORES:.2f} s of all {CORES}"
    )
    per_s = result["crops"] / medians["labelling, Ray actors"][0]
    print(f"Labelling: {per_s:.1f} crops/s, {per_s * args.side * args.clusterers:,.0f} labels/s")
    print(
        f"Object store: peak {result['object_store_peak_bytes'] / 1e6:.0f} MB, of which the sample's one copy is "
        f"{result['sample_bytes'] / 1e6:.0f} MB; {result['spilled_bytes'] / 1e6:.0f} MB spilled"
    )
    print(json.dumps({**result, "floor_s": floor_s, "args": dataclasses.asdict(args), **about}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(tyro.cli(Args, description=__doc__))
