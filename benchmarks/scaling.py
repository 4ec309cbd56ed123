"""Is the model of steps true? Measures constants, trains on 1, 2, 4, 8 and 16 workers of this machine, and prints
predicted beside measured samples a second and memory.

    python benchmarks/scaling.py

All workers share the machine's cores. What else runs there takes some of them away, so the cores that a run's own
processes got are measured while it trains, and stand in the model for ``cores``; the steps' own times are in core
seconds of their process, which others do not lengthen.
"""

from __future__ import annotations

import datetime
import json
import os
import tempfile
from dataclasses import dataclass, replace
from typing import Any

import tyro
from _measure import Cores, machine, markdown, sentence

from logonet import methods, networks, pipelines, recipes, training
from logonet.data import phantom
from logonet.distributed import cluster
from logonet.distributed.cluster import Resources
from logonet.distributed.executor import RayExecutor
from logonet.methods import DataSpec
from logonet.pipelines.stage import options
from logonet.planning import hardware, measuring, planner, sizes, speed
from logonet.training import dataset, schedule

GIB = 1 << 30


@dataclass(frozen=True)
class Args:
    """Which runs.

    Attributes:
        workers: one run each.
        backbone: its smallest form, with 16 clusterers on 32^3 crops.
        steps: of an epoch; there are two, and the second is measured.
        probe_s: to spend on constants.
        constants: where they are written; empty keeps them here alone.
    """

    workers: tuple[int, ...] = (1, 2, 4, 8, 16)
    backbone: str = "dynunet"
    steps: int = 4
    probe_s: float = 60.0
    constants: str = ""


def main(args: Args) -> None:
    about = machine()
    print(sentence(about), flush=True)
    cfg = pipelines.resolve(
        replace(
            recipes.real_ct(),
            backbone={"name": args.backbone, **networks.tiny(args.backbone)},
            train=training.Config(
                epochs=2, steps_per_epoch=args.steps, global_batch=32, batch_size=2, lr=1e-4, warmup_epochs=0
            ),
        )
    )
    most = max(args.workers)
    with tempfile.TemporaryDirectory(prefix="logonet-scaling-") as root:
        phantom.write_dataset(os.path.join(root, "scans"), 4, size_vox=(48, 48, 48))
        with cluster.connected(Resources(workers=most, object_store_mb=300), logs=False):
            work = planner.work(cfg, gpu=False)
            known = measuring.measure(cfg, work, root, Resources(workers=2), args.probe_s)
            print(f"constants   {known}", flush=True)
            if args.constants:
                with open(args.constants, "wb") as file:
                    file.write(known.to_json())
            up = pipelines.upstream(cfg, os.path.join(root, "scans"), root, RayExecutor(Resources(workers=2)))
            rows = [run(cfg, work, known, up, root, n) for n in args.workers]
    report(rows)
    print(json.dumps({"about": about, "date": datetime.date.today().isoformat(), "rows": rows}))


def run(
    cfg: pipelines.Pretraining,
    work: planner.Work,
    known: Any,
    up: pipelines.pretraining.Upstream,
    root: str,
    n: int,
) -> dict[str, Any]:
    """One run, and what was predicted of it."""
    order = schedule.SampleSchedule(len(up.crops), cfg.train.global_batch, 0, cfg.train.steps_per_epoch)
    method_cfg = methods.config(cfg.method["name"], options(cfg.method))
    feed = dataset.TrainingDataset(cfg.method["name"], method_cfg, order, up.crops, up.labels_PNZ)
    facts: DataSpec = up.facts
    job = training.Job(os.path.join(root, f"run-{n}"), "0" * 16, cfg.backbone, cfg.method, cfg.train, facts)
    with Cores() as cores:
        history = RayExecutor(Resources(workers=n)).train(job, feed)["history"]
    first, last = history
    got = min(cores.between(first["unix_s"], last["unix_s"]), os.cpu_count() or 1)
    here = hardware.this_machine()
    of = sizes.sizes(cfg, sizes.equal_scans(4, (48, 48, 48)), work.network)
    load = planner.load_of(cfg, of, work, False, known)
    place = speed.place(here, n)
    seen = replace(place, machine=replace(place.machine, cpus=got))
    predicted, quiet = (epoch_rate(cfg, load, at, known) for at in (seen, place))
    # As counted on shapes: a plan with measured steps would know the answer.
    memory = planner.worker_memory(cfg, of, work, place, replace(load, times=None), known, False)
    row = {
        "workers": n,
        "threads": place.threads,
        "cores": got,
        "measured": last["samples_per_s"],
        "predicted": predicted,
        "predicted_quiet": quiet,
        "error": predicted / last["samples_per_s"] - 1,
        "peak_gib": last["peak_memory_mb"] / 1024,
        "predicted_gib": memory.cpu_bytes / GIB,
        "data_wait_share": last["data_wait_share"],
    }
    print(json.dumps(row), flush=True)
    return row


def epoch_rate(cfg: pipelines.Pretraining, load: speed.Load, at: speed.Place, known: Any) -> float:
    """Samples a second over an epoch, in which the report and the copy of the one before fall."""
    assert cfg.train.steps_per_epoch is not None
    steps = cfg.train.steps_per_epoch
    return steps * cfg.train.global_batch / (steps * speed.step(load, at, known).total_s + known.epoch_s)


def report(rows: list[dict[str, Any]]) -> None:
    """The table of docs/planning.md."""
    heads = [
        "workers",
        "threads each",
        "cores had",
        "samples/s",
        "predicted",
        "error",
        "peak GiB",
        "predicted GiB",
    ]
    lines = [
        [
            str(r["workers"]), str(r["threads"]), f"{r['cores']:.2f}", f"{r['measured']:.2f}", f"{r['predicted']:.2f}",
            f"{r['error']:+.0%}", f"{r['peak_gib']:.2f}", f"{r['predicted_gib']:.2f}",
        ]
        for r in rows
    ]  # fmt: skip
    print(markdown(heads, lines), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
