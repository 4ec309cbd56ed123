"""Our training job against a bare PyTorch loop on the same work, many workers against one, and the wait for data.

    python benchmarks/training.py                     # 1 worker, then 16 on the same cores
    python benchmarks/training.py --workers 1 --steps 10

Jobs are `train.fit` as `jobs/pretrain.py` calls it: Ray Train, crops in the embedded S3 server, data tasks, metrics,
gradient checks, a checkpoint in the store after every epoch. The bare loop is another process with nothing but
PyTorch in it: the same method, network, batches, optimizer and threads, its batches in memory before it starts.

The bare loop does half of its steps before the first job and half after it, when nothing else runs: in pauses of the
job it would share the cores with tasks that go on preparing samples, and the job would find those ready. So the machine
must be quiet; how far the two halves are apart says whether it was. After all jobs, where one has many workers, bare
loops of one thread run on every core at once: what these cores can do together.

Start-up and a job's first epoch, in which it warms up, are left out. An epoch's time holds everything that we do for
it, its checkpoint and report included; processor seconds are those of all processes, S3 server and Ray included. It
fails when the object store spills.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from typing import Any

import _measure
import numpy as np
import torch
import tyro

from logonet import methods, networks, training
from logonet.core import seeding
from logonet.core.config import Component
from logonet.data import crop_shards, cropping
from logonet.distributed import cluster
from logonet.distributed.executor import RayExecutor
from logonet.methods import DataSpec
from logonet.storage import object_store
from logonet.storage.parquet import Rows
from logonet.training import dataset, schedule
from tools.s3server import S3Server

CORES = os.cpu_count() or 1
BACKBONE = {"name": "logonet", "depths": [1, 1, 1, 1], "mlp_ratios": [2, 2, 2, 2]}
METHOD = {"name": "masked_clusters", "final_relu": False}


@dataclasses.dataclass(frozen=True)
class Args:
    """
    workers: a job for each.
    steps: of an epoch, each of ``global_batch`` crops; ``epochs`` are measured, after one that is not.
    threads: of the bare loop and of each worker; 0 is what the job takes, all cores for one worker. Two threads that
        wait for each other beside much other work measure that work.
    """

    workers: tuple[int, ...] = (1, 16)
    steps: int = 3
    epochs: int = 2
    global_batch: int = 16
    size: int = 64
    dims: tuple[int, ...] = (8, 16, 24, 32)
    clusterers: int = 8
    k: int = 20
    threads: int = 0


# ------------------------------------------------------------------------------------------------ bare


def bare_loop(line: Connection, job: training.Job, feed: dataset.TrainingDataset, threads: int) -> None:
    """Another process: at each message as many steps as it says; answers with their seconds and processor seconds."""
    torch.set_num_threads(threads)
    cfg = job.train
    batches = []
    for step in range(job.train.steps_per_epoch or 1):
        for begin in range(0, cfg.global_batch, cfg.batch_size):
            arrays = feed[[(step, begin + i) for i in range(cfg.batch_size)]]
            batches.append({k: torch.from_numpy(array) for k, array in arrays.items()})
    method = training.build_method(job.backbone, job.method, job.data_spec).train()
    params = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay)
    count = cfg.global_batch // cfg.batch_size
    line.send("ready")
    while (steps := line.recv()) is not None:
        seconds, processor_s = [], time.process_time()
        for step in range(steps):
            started = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            begin = step * count % len(batches)
            for batch in batches[begin : begin + count]:
                loss, _ = method(batch, 0.0)
                (loss / count).backward()
            optimizer.step()
            seconds.append(time.perf_counter() - started)
        line.send((tuple(seconds), time.process_time() - processor_s))


class Bare:
    """The bare loop's process, which is there for the length of the block."""

    def __init__(self, job: training.Job, feed: dataset.TrainingDataset, threads: int) -> None:
        self.seconds: list[float] = []
        self.processor_s: list[float] = []
        self.line, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=bare_loop, args=(theirs, job, feed, threads), daemon=True)

    def __enter__(self) -> Bare:
        self.process.start()
        assert self.line.recv() == "ready"
        self.line.send(1)  # its first step warms up, as the job's first epoch does
        self.line.recv()
        return self

    def __exit__(self, *_: object) -> None:
        self.line.send(None)
        self.process.join()

    def take(self, steps: int) -> None:
        self.line.send(steps)
        self.taken(steps)

    def taken(self, steps: int) -> None:
        seconds, processor_s = self.line.recv()
        self.seconds += seconds
        self.processor_s.append(processor_s / steps)
        print(
            f"bare: {statistics.mean(seconds):.2f} s a step, {processor_s / steps:.2f} processor s",
            flush=True,
        )


# ------------------------------------------------------------------------------------------------ jobs


def main(args: Args) -> None:
    about = _measure.machine()
    os.environ |= _measure.SETTINGS
    results = {}
    with (
        tempfile.TemporaryDirectory(prefix="logonet-training-") as folder,
        S3Server(f"{folder}/s3") as server,
    ):
        os.environ |= server.env()
        object_store.create_bucket("s3://training")
        cut = cropping.Config(size_vox=(args.size,) * 3, per_scan=16)
        table = _measure.phantom_crops("s3://training", cut, 4, (96, 96, 80))
        job, feed = work(args, table)
        threads = args.threads or CORES  # what a job of one worker gives it
        half = -(-args.steps * args.epochs // 2)
        first, *others = args.workers
        with Bare(job, feed, threads) as bare:
            bare.take(half)
            results[first] = run(args, job, feed, first)
            bare.take(half)
        for workers in others:
            results[workers] = run(args, job, feed, workers)
        apart_s = one_a_core(job, feed, half) if max(args.workers) > 1 else None
    report(args, about, results, bare, apart_s)


def one_a_core(job: training.Job, feed: dataset.TrainingDataset, steps: int) -> float:
    """Seconds a step, all of them together, of bare loops of one thread on every core that know nothing of each other.

    What many workers can reach here: cores that share a pipeline or a cache do less together than one by one.
    """
    with contextlib.ExitStack() as stack:
        loops = [stack.enter_context(Bare(job, feed, 1)) for _ in range(CORES)]
        started = time.perf_counter()
        for loop in loops:
            loop.line.send(steps)
        for loop in loops:
            loop.taken(steps)
        return (time.perf_counter() - started) / (steps * CORES)


def work(args: Args, table: crop_shards.CropTable) -> tuple[training.Job, dataset.TrainingDataset]:
    rng = seeding.rng(0, "labels")
    labels_PNZ = rng.integers(0, args.k, (len(table), args.clusterers, args.size)).astype(np.uint16)
    refs = Rows.of(crop_shards.write_shard("s3://training/labels", "all", labels_PNZ), crop_shards.CropRef)
    labels = crop_shards.LabelTable("s3://training/labels", refs, args.clusterers, args.size)
    sizes = (args.k,) * args.clusterers
    backbone = {**BACKBONE, "dims": list(args.dims), "full_width": args.dims[0]}
    job = training.Job(
        uri="s3://training/runs",
        fingerprint="0" * 16,
        backbone=Component.of(backbone, "backbone").resolve(networks.config, "backbone"),
        method=Component.of(METHOD, "method").resolve(methods.config, "method"),
        train=training.Config(
            epochs=args.epochs + 1,
            steps_per_epoch=args.steps,
            global_batch=args.global_batch,
            warmup_epochs=0,
        ),
        data_spec=DataSpec(
            size_vox=table.size_vox, cluster_sizes=sizes, majority_labels=(0,) * len(sizes), batch_size=1
        ),
    )
    training.dry_run(job.backbone, job.method, job.data_spec)
    method_cfg = methods.config(str(METHOD["name"]), {"final_relu": False})
    order = schedule.SampleSchedule(len(table), args.global_batch, 0, args.steps)
    return job, dataset.TrainingDataset(str(METHOD["name"]), method_cfg, order, table, labels)


def run(args: Args, job: training.Job, feed: dataset.TrainingDataset, workers: int) -> dict[str, Any]:
    job = dataclasses.replace(job, uri=f"{job.uri}/{workers}")
    resources = cluster.Resources(workers=workers, object_store_mb=300)
    with cluster.connected(resources, logs=False):
        allocation = cluster.allocate(resources)
        if args.threads:
            allocation = dataclasses.replace(allocation, threads_per_worker=args.threads)
        started = time.perf_counter()
        with _measure.StoreWatch() as watch, _measure.Cores() as cores:
            history = RayExecutor(resources, allocation).train(job, feed)["history"]
        fit_s = time.perf_counter() - started
        assert not watch.spilled_bytes, f"{watch.spilled_bytes:,} bytes spilled"
    _, *measured = history
    seconds = [args.global_batch / entry["samples_per_s"] for entry in measured]
    busy = cores.between(history[0]["unix_s"], history[-1]["unix_s"])
    result = {
        "threads_per_worker": allocation.threads_per_worker,
        "step_s": statistics.mean(seconds),
        "processor_s": busy * (history[-1]["unix_s"] - history[0]["unix_s"]) / (args.steps * args.epochs),
        "wait_share": statistics.mean(entry["data_wait_share"] for entry in measured),
        "wait_share_worst": max(entry["data_wait_share"] for entry in measured),
        "fit_s": fit_s,
        "object_store_peak_bytes": watch.peak_bytes,
        "losses": [entry["loss"] for entry in history],
        "epochs": seconds,
    }
    print(f"{workers} workers: {', '.join(f'{s:.2f}' for s in seconds)} s a step", flush=True)
    return result


def report(
    args: Args, about: dict[str, Any], results: dict[int, dict[str, Any]], bare: Bare, apart_s: float | None
) -> None:
    bare_s, bare_processor_s = statistics.mean(bare.seconds), statistics.mean(bare.processor_s)
    rows = [
        ["bare loop", str(args.threads or CORES), f"{bare_s:.2f}", "1.000", f"{bare_processor_s:.2f}", "", ""]
    ]
    if apart_s is not None:
        rows.append(["bare loops, one a core", "1", f"{apart_s:.2f}", f"{apart_s / bare_s:.3f}", "", "", ""])
    rows += [
        [
            f"{workers} workers",
            str(r["threads_per_worker"]),
            f"{r['step_s']:.2f}",
            f"{r['step_s'] / bare_s:.3f}",
            f"{r['processor_s']:.2f}",
            f"{r['wait_share']:.1%} ({r['wait_share_worst']:.1%})",
            f"{r['object_store_peak_bytes'] / 1e6:.0f}",
        ]
        for workers, r in results.items()
    ]
    heads = ["way", "threads each", "s a step", "of bare", "processor s a step"]
    heads += ["waiting for data (worst)", "object store peak MB"]
    print(
        f"\n{args.global_batch} crops of {args.size}^3 a step, {args.epochs} epochs of {args.steps} steps; "
        f"{_measure.sentence(about)}\n"
    )
    print(_measure.markdown(heads, rows))
    half = len(bare.seconds) // 2
    before, after = statistics.mean(bare.seconds[:half]), statistics.mean(bare.seconds[half:])
    print(f"\nThe bare loop took {after / before:.2f} times as long after the first job as before it.")
    first, *others = results
    speeds = {w: results[first]["step_s"] / results[w]["step_s"] for w in others}
    for workers, speed in speeds.items():
        print(
            f"{workers} workers do {speed:.2f} of the samples per second of {first} on the same {CORES} cores"
        )
    of_bare = {w: r["step_s"] / bare_s for w, r in results.items()}
    summary = {"bare_s": bare.seconds, "bare_processor_s": bare_processor_s, "of_bare": of_bare}
    summary |= {"jobs": results, "speed_of_first": speeds, "one_a_core_s": apart_s}
    print(json.dumps({**summary, "args": dataclasses.asdict(args), **about}))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
