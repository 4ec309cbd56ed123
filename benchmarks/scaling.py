"""Compare the plan's model with real runs: measure the constants, train on 1, 2, 4, 8 and 16 workers of this machine,
and print predicted beside measured samples per second and memory.

    python benchmarks/scaling.py

All workers share the machine's cores with whatever else runs there. So the cores that a run's own processes got are
measured while it trains, and replace the number of cores in the model.
"""

from __future__ import annotations

import datetime
import json
import tempfile
from dataclasses import dataclass, replace
from typing import Any

import tyro
from _measure import Cores, machine, markdown, sentence

from logonet import networks, pipelines, recipes, training
from logonet.distributed import cluster
from logonet.distributed.cluster import Resources
from logonet.distributed.executor import RayExecutor
from logonet.planning import hardware, measuring, planner, speed
from logonet.planning.memory import Work
from logonet.training.schedule import SampleSchedule

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
            recipes.PRETRAINING["real_ct"](),
            backbone={"name": args.backbone, **networks.tiny(args.backbone)},
            train=training.Config(
                epochs=2, steps_per_epoch=args.steps, global_batch=32, batch_size=2, lr=1e-4, warmup_epochs=0
            ),
        )
    )
    here = hardware.this_machine()
    enough = Resources(workers=max(args.workers), object_store_mb=300)
    with (
        tempfile.TemporaryDirectory(prefix="logonet-scaling-") as root,
        cluster.connected(enough, logs=False),
    ):
        work, two = planner.work(cfg, gpu=False), Resources(workers=2)
        place = speed.place(here, two)
        known = measuring.measure(cfg, work, root, RayExecutor(two), place, args.probe_s)
        print(f"constants   {known}", flush=True)
        if args.constants:
            with open(args.constants, "wb") as file:
                file.write(known.to_json())
        rows = [run(cfg, work, known, here, root, n) for n in args.workers]
    report(rows)
    print(json.dumps({"about": about, "date": datetime.date.today().isoformat(), "rows": rows}))


def run(
    cfg: pipelines.Pretraining,
    work: Work,
    known: speed.Constants,
    here: hardware.Cluster,
    root: str,
    n: int,
) -> dict[str, Any]:
    """One run, and what was predicted of it."""
    train, resources = cfg.train, Resources(workers=n)
    schedule = SampleSchedule(measuring.CROPS, train.global_batch, 0, train.steps_per_epoch)
    dataset = replace(measuring.synthetic_crops(cfg, work, f"{root}/{n}"), schedule=schedule)
    job = training.Job(f"{root}/{n}/run", "0" * 16, cfg.backbone, cfg.method, train, work.facts)
    with Cores() as cores:
        first, last = RayExecutor(resources).train(job, dataset)["history"]
    place = speed.place(here, resources)
    got = min(cores.between(first["unix_s"], last["unix_s"]), place.cpus)
    predicted, quiet = (
        speed.step(train, work, at, known).samples_per_s for at in (replace(place, cpus=got), place)
    )
    # As counted on shapes: a plan with measured steps would know the answer.
    memory = planner.worker_memory(cfg, work, n, False, replace(known, step_fingerprint=""))
    row = {
        "workers": n,
        "threads": place.threads,
        "cores": got,
        "measured": last["samples_per_s"],
        "predicted": predicted,
        "predicted_quiet": quiet,
        "error": predicted / last["samples_per_s"] - 1,
        "peak_gib": last["peak_memory_mb"] / 1024,
        "predicted_gib": (memory.process + memory.device_bytes + memory.checkpoint) / GIB,
        "data_wait_share": last["data_wait_share"],
    }
    print(json.dumps(row), flush=True)
    return row


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
