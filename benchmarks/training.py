"""Our training job against a bare PyTorch loop on the same work, many workers against one, and the wait for data.

    python benchmarks/training.py                     # 1 worker, then 16 on the same cores
    python benchmarks/training.py --workers 1 --steps 10

Jobs are `train.fit` as `jobs/pretrain.py` calls it: Ray Train, crops in the embedded S3 server, data tasks, metrics,
gradient checks, a checkpoint in the store after every epoch. The bare loop is another process with nothing but
PyTorch in it: the same method, network, batches, optimizer and threads, its batches in memory before it starts.

The two take turns within one run: after each of our epochs all our workers stop, and the bare loop does as many steps.
So both see the same machine, and a job of 16 workers is held against one of 1 by what each makes of the bare loop's
speed. Start-up and the first epoch, in which both warm up, are left out. An epoch's time holds everything that we do
for it, its checkpoint and report included; processor seconds are those of all processes, S3 server and Ray included.
It fails when the object store holds more than its ceiling, or spills.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import pickle
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import _measure
import numpy as np
import torch
import tyro

from logonet import cluster, crops, data, draws, methods, store, train
from logonet.methods import Facts
from logonet.s3server import S3Server

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
    steps: int = 2
    epochs: int = 4
    global_batch: int = 16
    size: int = 64
    dims: tuple[int, ...] = (8, 16, 24, 32)
    clusterers: int = 8
    k: int = 20
    threads: int = 0


@dataclasses.dataclass(frozen=True)
class Turn:
    """One epoch of a job and the bare loop's steps after it: seconds a step, and what the job says of itself."""

    ours_s: float
    ours_processor_s: float
    wait_share: float
    bare_s: tuple[float, ...]
    bare_processor_s: float


# ------------------------------------------------------------------------------------------------ bare


def bare_loop(line: Connection, job: train.Job, feed: data.Feed, threads: int) -> None:
    """Another process: at each message as many steps as it says; answers with their seconds and processor seconds."""
    torch.set_num_threads(threads)
    cfg = job.train
    batches = []
    for step in range(job.train.steps_per_epoch or 1):
        for begin in range(0, cfg.global_batch, cfg.batch_size):
            places = [feed.order.at(step, begin + i) for i in range(cfg.batch_size)]
            samples = [feed.sample(*place) for place in places]
            batches.append({k: torch.from_numpy(np.stack([s[k] for s in samples])) for k in samples[0]})
    method = train.build_method(job.backbone, job.method, job.facts).train()
    params = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay)
    count = cfg.global_batch // cfg.batch_size
    line.send("ready")
    while (steps := line.recv()) is not None:
        seconds, processor_s = [], time.process_time()
        for step in range(steps):
            started = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            for batch in batches[step * count : (step + 1) * count]:
                loss, _ = method(batch, 0.0)
                (loss / count).backward()
            optimizer.step()
            seconds.append(time.perf_counter() - started)
        line.send((tuple(seconds), time.process_time() - processor_s))


# ---------------------------------------------------------------------------------------------- turns


def stopping_after_epochs(address: str) -> Callable[[dict[Any, Any]], dict[str, Any]]:
    """`train.train_worker`, but after each epoch a worker waits at ``address`` until it may go on."""

    def worker(config: dict[Any, Any]) -> dict[str, Any]:
        end_epoch = train.Worker._end_epoch

        def stop(self: train.Worker) -> None:
            end_epoch(self)
            with Client(address, "AF_UNIX") as line:
                line.send(self.history[-1])
                line.recv()

        train.Worker._end_epoch = stop  # type: ignore[method-assign]
        return train.train_worker(config)

    return worker


class Turns:
    """Lets the bare loop run whenever all workers of a job wait."""

    def __init__(self, address: str, workers: int, bare: Connection, args: Args) -> None:
        self.workers, self.bare, self.args = workers, bare, args
        self.turns: list[Turn] = []
        self.listener = Listener(address, "AF_UNIX", backlog=64)
        self.thread = threading.Thread(target=self.conduct, daemon=True)
        self.thread.start()

    def conduct(self) -> None:
        processor_s = _measure.tree_seconds()
        for _ in range(self.args.epochs + 1):
            lines = [self.listener.accept() for _ in range(self.workers)]
            entry, *_ = [line.recv() for line in lines]  # of any rank: an epoch ends for all at once
            ours_processor_s = _measure.tree_seconds() - processor_s
            self.bare.send(self.args.steps)
            bare_s, bare_processor_s = self.bare.recv()
            self.turns.append(
                Turn(
                    ours_s=self.args.global_batch / entry["samples_per_s"],
                    ours_processor_s=ours_processor_s / self.args.steps,
                    wait_share=entry["data_wait_share"],
                    bare_s=bare_s,
                    bare_processor_s=bare_processor_s / self.args.steps,
                )
            )
            turn = self.turns[-1]
            print(
                f"{self.workers:2} workers: {turn.ours_s:6.2f} s a step, {turn.ours_processor_s:6.2f} processor s, "
                f"{turn.wait_share:.1%} waiting; bare {statistics.median(bare_s):6.2f} s, "
                f"{turn.bare_processor_s:6.2f} processor s",
                flush=True,
            )
            processor_s = _measure.tree_seconds()
            for line in lines:
                line.send(None)
                line.close()
        self.listener.close()


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
        store.create_bucket("s3://training")
        cut = crops.Config(size_vox=(args.size,) * 3, per_scan=16)
        table = _measure.phantom_crops("s3://training", cut, 4, (96, 96, 80))
        for workers in args.workers:
            results[workers] = run(args, table, workers, f"{folder}/{workers}")
    report(args, about, results)


def run(args: Args, table: data.CropTable, workers: int, address: str) -> dict[str, Any]:
    resources = cluster.Resources(workers=workers, object_store_mb=300)
    with cluster.connected(resources, logs=False):
        share = cluster.share(resources)
        rng = draws.rng(0, "labels")
        labels_PNZ = rng.integers(0, args.k, (len(table), args.clusterers, args.size)).astype(np.int16)
        sizes = (args.k,) * args.clusterers
        job = train.Job(
            uri=f"s3://training/runs/{workers}",
            fingerprint="0" * 16,
            backbone={**BACKBONE, "dims": list(args.dims), "full_width": args.dims[0]},
            method=METHOD,
            train=train.Config(
                epochs=args.epochs + 1,
                steps_per_epoch=args.steps,
                global_batch=args.global_batch,
                warmup_epochs=0,
            ),
            facts=Facts(
                size_vox=table.size_vox, cluster_sizes=sizes, majority_labels=(0,) * len(sizes), batch_size=1
            ),
        )
        method_cfg = methods.config(METHOD["name"], {"final_relu": False})
        order = data.Order(len(table), args.global_batch, 0, args.steps)
        feed = data.Feed(table, labels_PNZ, str(METHOD["name"]), method_cfg, order)
        line, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        threads = cluster.share(dataclasses.replace(resources, workers=1)).threads_per_worker
        if args.threads:
            threads, share = args.threads, dataclasses.replace(share, threads_per_worker=args.threads)
        bare = context.Process(target=bare_loop, args=(theirs, job, feed, threads), daemon=True)
        bare.start()
        assert line.recv() == "ready"
        turns = Turns(address, workers, line, args)
        own, train.train_worker = train.train_worker, stopping_after_epochs(address)  # type: ignore[assignment]
        started = time.perf_counter()
        try:
            with _measure.StoreWatch() as watch:
                history = train.fit(job, feed, resources, share)["history"]
        finally:
            train.train_worker = own
        fit_s = time.perf_counter() - started
        task_bytes = max(data.TASK_BYTES, job.train.batch_size * feed.row_bytes)
        # A rank's tasks ahead, the one it has just asked for and the one it is at; and the feed, once.
        ceiling = workers * (data.TASKS_AHEAD + 2) * task_bytes + len(pickle.dumps(feed))
        assert watch.peak_bytes <= ceiling, (
            f"{watch.peak_bytes:,} bytes in the object store, above {ceiling:,}"
        )
        assert not watch.spilled_bytes, f"{watch.spilled_bytes:,} bytes spilled"
        turns.thread.join()
        line.send(None)
        bare.join()
    measured = turns.turns[1:]
    ours_s, bare_s = (
        statistics.median(v) for v in zip(*((t.ours_s, statistics.median(t.bare_s)) for t in measured))
    )
    return {
        "threads_per_worker": share.threads_per_worker,
        "ours_s": ours_s,
        "bare_s": bare_s,
        # Of each turn, so that a slow minute is in both.
        "of_bare": statistics.median(t.ours_s / statistics.mean(t.bare_s) for t in measured),
        "processor_of_bare": statistics.median(t.ours_processor_s / t.bare_processor_s for t in measured),
        "wait_share": statistics.median(t.wait_share for t in measured),
        "wait_share_worst": max(t.wait_share for t in measured),
        "fit_s": fit_s,
        "object_store_peak_bytes": watch.peak_bytes,
        "object_store_ceiling_bytes": ceiling,
        "losses": [entry["loss"] for entry in history],
        "turns": [dataclasses.asdict(t) for t in turns.turns],
    }


def report(args: Args, about: dict[str, Any], results: dict[int, dict[str, Any]]) -> None:
    rows = [
        [
            str(workers),
            str(r["threads_per_worker"]),
            f"{r['ours_s']:.2f}",
            f"{r['bare_s']:.2f}",
            f"{r['of_bare']:.3f}",
            f"{r['processor_of_bare']:.3f}",
            f"{r['wait_share']:.1%} ({r['wait_share_worst']:.1%})",
            f"{r['object_store_peak_bytes'] / 1e6:.0f} of {r['object_store_ceiling_bytes'] / 1e6:.0f}",
        ]
        for workers, r in results.items()
    ]
    heads = ["workers", "threads each", "s a step", "bare s", "of bare", "processor s of bare"]
    heads += ["waiting for data (worst)", "object store peak MB"]
    print(
        f"\n{args.global_batch} crops of {args.size}^3 a step, {args.steps} steps an epoch, medians of {args.epochs}"
    )
    print(f"epochs; {_measure.sentence(about)}\n")
    print(_measure.markdown(heads, rows))
    first, *others = results
    speeds = {w: results[first]["of_bare"] / results[w]["of_bare"] for w in others}
    for workers, speed in speeds.items():
        print(
            f"{workers} workers do {speed:.2f} of the samples per second of {first} on the same {CORES} cores"
        )
    print(json.dumps({"jobs": results, "speed_of_first": speeds, "args": dataclasses.asdict(args), **about}))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
