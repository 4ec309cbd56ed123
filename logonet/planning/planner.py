"""The plan itself: sizes, memory, hours and money of a pretraining, and what of it will not fit."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from logonet import training
from logonet.clustering import pseudo_labels
from logonet.core import config, seeding
from logonet.core.errors import UserError
from logonet.distributed import feed
from logonet.distributed.cluster import Resources
from logonet.methods import DataSpec
from logonet.pipelines import Pretraining
from logonet.planning import memory, sizes, speed
from logonet.planning.constants import Constants, step_fingerprint
from logonet.planning.hardware import GIB, Cluster
from logonet.planning.memory import MicroBatch, WorkerMemory
from logonet.planning.sizes import Network, Scans, Sizes
from logonet.planning.speed import Duration, Load, Place, Scaling, Step

WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
RAY_KILLS_AT = 0.95  # of a node's memory: Ray's own threshold
LABELLER_SCRATCH = (
    1e9 / 23_000
)  # bytes for each code, when no slice is like another: what labeller.SLICES was set by


@dataclass(frozen=True)
class Work:
    """What the recipe alone says, whatever it runs on.

    ``sample_bytes`` are of one prepared sample.
    """

    facts: DataSpec
    network: Network
    micro: MicroBatch
    sample_bytes: int
    precision: str


@dataclass(frozen=True)
class Plan:
    """Everything that is foreseen.

    ``refusals`` are sentences about what will not fit; ``notes`` about what the plan rests on. ``place`` and ``step``
    are None where the workers cannot be placed.
    """

    cfg: Pretraining
    cluster: Cluster
    constants: Constants
    sizes: Sizes
    work: Work
    worker: WorkerMemory
    labeller_bytes: float
    place: Place | None
    step: Step | None
    durations: tuple[Duration, ...]
    scaling: tuple[Scaling, ...]
    hours: float | None
    money: float | None
    refusals: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        of, net = self.sizes, self.sizes.network
        return {
            "fits": not self.refusals,
            "refusals": list(self.refusals),
            "notes": list(self.notes),
            "config": config.to_dict(self.cfg),
            "cluster": config.to_dict(self.cluster),
            "constants": {k: v for k, v in asdict(self.constants).items() if k != "step"},
            "scans": {
                "count": len(of.scans.scans),
                "stored_bytes": of.scans.stored_bytes,
                "too_small": of.too_small,
                "known_from": of.scans.known_from,
            },
            "bytes": {
                "crops": of.num_crops,
                "crop": of.crop_bytes,
                "crops_cache": of.cache_bytes,
                "clusterers": of.clusterers_bytes,
                "labels": of.labels_bytes,
                "checkpoint": net.checkpoint_bytes,
                "checkpoint_model": net.model_file,
                "checkpoint_optimizer": net.optimizer_file,
                "final_backbone": net.backbone_file,
                "final_method": net.model_file,
                "gradients": net.gradient_bytes,
                "prepared_sample": self.work.sample_bytes,
            },
            "stages": [
                {**asdict(stage), "seconds": took.seconds, "waits_for": took.bound}
                for stage, took in zip(of.stages, self.durations or [Duration("", None, "")] * len(of.stages))
            ],
            "worker_bytes": asdict(self.worker),
            "labeller_bytes": self.labeller_bytes,
            "micro_batch": asdict(self.work.micro),
            "steps": of.steps,
            "step": None if self.step is None else {**asdict(self.step), "total_s": self.step.total_s,
                                                    "samples_per_s": self.step.samples_per_s},
            "scaling": [
                {**asdict(row.step), "total_s": row.step.total_s, "samples_per_s": row.step.samples_per_s,
                 "efficiency": row.efficiency}
                for row in self.scaling
            ],
            "hours": self.hours,
            "money": self.money,
            "currency": self.cluster.currency,
        }  # fmt: skip


def work(cfg: Pretraining, gpu: bool) -> Work:
    """Count what the recipe's network and method take. Seconds to a minute: the module runs once on shapes alone."""
    facts = sizes.facts_of(cfg)
    with torch.device("meta"):
        net = sizes.network(training.build_method(cfg.backbone, cfg.method, facts))
    sample = memory.prepared(facts, cfg.method, seeding.rng(0, "plan"))
    precision = cfg.train.precision if cfg.train.precision != "auto" else "bf16" if gpu else "fp32"
    micro = memory.micro_batch(cfg.backbone, cfg.method, facts, bf16=precision == "bf16", sample=sample)
    return Work(facts, net, micro, sum(a.nbytes for a in sample.values()), precision)


def make(
    cfg: Pretraining,
    scans: Scans,
    cluster: Cluster,
    resources: Resources,
    constants: Constants,
    *,
    local_root: bool = False,
) -> Plan:
    """Plan pretraining with ``cfg`` (resolved) on scans like ``scans``.

    Args:
        local_root: the artifacts go to the planned node's own disk.
    """
    refusals: list[str] = []
    place: Place | None = None
    try:
        place = speed.place(cluster, resources.most, resources.gpu, resources.cpus_per_worker)
    except UserError as err:
        refusals.append(str(err))
    gpu = place.gpu if place else bool(cluster.gpus) and resources.gpu is not False
    own = work(cfg, gpu)
    of = sizes.sizes(cfg, scans, own.network)
    if not of.num_crops:
        refusals.append(
            f"none of the {len(scans.scans)} scans is large enough for a crop of "
            f"{'x'.join(map(str, cfg.crops.size_vox))} voxels; use a smaller crops.size_vox or lower "
            "crops.min_image_share"
        )
    load = load_of(cfg, of, own, gpu, constants)
    notes = _what_it_rests_on(of, cluster, constants, load, gpu)
    step: Step | None = None
    rows: list[Scaling] = []
    took: list[Duration] = []
    if place is not None and of.num_crops:
        try:
            step = speed.step(load, place, constants)
            rows = speed.scaling(load, place, constants, list(WORKERS))
            took = speed.durations(cfg, of, cluster, step, constants)
        except UserError as err:
            refusals.append(str(err))
    worker = worker_memory(cfg, of, own, place, load, constants, gpu)
    labels = labeller_bytes(of, constants)
    if place is not None:
        refusals += _memory(cfg, of, place, worker, resources)
        refusals += _shared_memory(cfg, of, own, place, cluster, resources)
    refusals += _labellers(of, cluster, labels)
    refusals += _driver(of, cluster, constants)
    if local_root and of.kept_bytes + of.network.checkpoint_bytes > cluster.pools[0].machine.disk_gib * GIB:
        refusals.append(
            f"the artifacts take {of.kept_bytes / GIB:.1f} GiB and the disk has "
            f"{cluster.pools[0].machine.disk_gib:g} GiB free; give an s3:// --root, or lower crops.per_scan"
        )
    if step is not None:
        notes += _slow(cfg, of, step, constants)
    hours, money = _cost(took, cluster)
    return Plan(
        cfg=cfg,
        cluster=cluster,
        constants=constants,
        sizes=of,
        work=own,
        worker=worker,
        labeller_bytes=labels,
        place=place,
        step=step,
        durations=tuple(took),
        scaling=tuple(rows),
        hours=hours,
        money=money,
        refusals=tuple(refusals),
        notes=tuple(notes),
    )


def load_of(cfg: Pretraining, of: Sizes, own: Work, gpu: bool, c: Constants) -> Load:
    """The work of a step, with measured times where ``c`` has them for this very work."""
    of_this = step_fingerprint(
        cfg.backbone, cfg.method, cfg.crops.size_vox, cfg.train.batch_size, own.precision
    )
    known = c.step if c.step is not None and c.step.of == of_this and gpu == (c.device != "cpu") else None
    return Load(
        global_batch=cfg.train.global_batch,
        batch_size=cfg.train.batch_size,
        flop=own.micro.flop,
        gradient_bytes=own.network.gradient_bytes,
        flat=cfg.train.gradient_sync == "flat" or (cfg.train.gradient_sync == "auto" and not gpu),
        crop_bytes=of.crop_bytes,
        row_bytes=2 * of.crop_bytes,
        times=known,
    )


def worker_memory(
    cfg: Pretraining, of: Sizes, own: Work, place: Place | None, load: Load, c: Constants, gpu: bool
) -> WorkerMemory:
    """The peak of one training worker."""
    workers = place.workers if place else 1
    micro = own.micro
    if load.times is not None:
        beside = own.network.weight_bytes + own.network.moment_bytes + micro.batch_bytes
        measured = load.times.peak_bytes - beside - (0.0 if gpu else c.worker_bytes)
        micro = replace(
            micro,
            peak_bytes=int(max(measured, own.network.gradient_bytes)),
            known_from=f"activations measured in {load.times.steps} real steps",
        )
    per_pass = workers * cfg.train.batch_size
    rows = speed.rows_per_task(load)
    return memory.worker(
        weights=own.network.weight_bytes,
        gradients=own.network.gradient_bytes,
        state_bytes=of.network.checkpoint_bytes,
        largest_file=max(of.network.optimizer_file, of.network.model_file),
        pass_=micro,
        accumulate=max(1, cfg.train.global_batch // per_pass),
        workers=workers,
        flat_sync=load.flat,
        process=c.worker_bytes,
        prefetched=0.0 if gpu else rows * own.sample_bytes,
    )


def labeller_bytes(of: Sizes, c: Constants) -> float:
    """The peak of one labelling actor, beside the centroids, which all share; 0 without clusterers."""
    codes, length = sum(of.cluster_sizes), of.slice_voxels
    if not codes:
        return 0.0
    rank = min(pseudo_labels.RANK, length, codes)
    screen = 4 * (pseudo_labels.RANK + 4) * codes + 4 * length * rank
    building = 8 * (2 * min(pseudo_labels.BASIS_SAMPLE, codes) * length + 3 * length * rank)
    return c.task_bytes + screen + max(building, LABELLER_SCRATCH * codes)


# ------------------------------------------------------------------------------------- what will not fit


def gib(n: float) -> str:
    """Bytes for people."""
    for unit, size in (("GiB", GIB), ("MiB", 1 << 20)):
        if n >= 0.1 * size:
            return f"{n / size:.1f} {unit}"
    return f"{n / 1024:.1f} KiB" if n else "0"


def _memory(cfg: Pretraining, of: Sizes, at: Place, worker: WorkerMemory, resources: Resources) -> list[str]:
    """A worker on its GPU, and all workers of a node in its memory."""
    out = []
    machine = at.machine
    ways = (
        "lower train.batch_size"
        if cfg.train.batch_size > 1
        else "set backbone.checkpointing=true where the network has it"
    )
    have = machine.gpu_memory_gib * GIB
    if at.gpu and worker.device_bytes > have:
        out.append(
            f"a worker needs {gib(worker.device_bytes)} of its GPU ({gib(worker.activations)} of it activations) and "
            f"{machine.gpu or 'the GPU'} has {gib(have)}; {ways}, use smaller crops.size_vox, or larger GPUs"
        )
    each = worker.process if at.gpu else worker.cpu_bytes - worker.checkpoint
    total = at.per_node * each + worker.checkpoint + machine.store_bytes(resources.object_store_mb)
    if total > RAY_KILLS_AT * machine.memory_bytes:
        most = (
            RAY_KILLS_AT * machine.memory_bytes
            - worker.checkpoint
            - machine.store_bytes(resources.object_store_mb)
        ) / each
        mend = (
            f"put {int(most)} on a node"
            if most >= 1
            else f"{ways} or take nodes with {gib(total / RAY_KILLS_AT)}"
        )
        out.append(
            f"{at.per_node} workers of {gib(each)}, a checkpoint's copies of {gib(worker.checkpoint)} and Ray's object "
            f"store want {gib(total)} of a node, which has {machine.memory_gib:g} GiB and is cleared by Ray at "
            f"{RAY_KILLS_AT:.0%} of it; {mend}"
        )
    return out


def _shared_memory(
    cfg: Pretraining, of: Sizes, own: Work, at: Place, cluster: Cluster, resources: Resources
) -> list[str]:
    """What stages put into Ray's object store, against its size and that of /dev/shm, on the smallest node."""
    out = []
    smallest = min((p.machine for p in cluster.pools), key=lambda m: m.store_bytes(resources.object_store_mb))
    have = smallest.store_bytes(resources.object_store_mb)
    if resources.object_store_mb and have > smallest.shm_bytes:
        out.append(
            f"--object-store-mb {resources.object_store_mb} is more than /dev/shm has, {gib(smallest.shm_bytes)}; "
            f"start the container with --shm-size={math.ceil(have / GIB)}g, or ask for less"
        )
    load = Load(
        cfg.train.global_batch, cfg.train.batch_size, 0.0, 0.0, True, of.crop_bytes, 2 * of.crop_bytes
    )
    ahead = at.per_node * (feed.TASKS_AHEAD + 1) * speed.rows_per_task(load) * own.sample_bytes
    mends = {
        "clusterers": "lower clusterers.max_slices",
        "labels": "lower clusterers.n or clusterers.k_max",
        "pretrain": "put fewer workers on a node",
    }
    for stage in of.stages:
        need = stage.node_shared + (ahead if stage.name == "pretrain" else 0.0)
        if need > have:
            out.append(
                f"'{stage.name}' puts {gib(need)} into Ray's object store on each node and the smallest has "
                f"{gib(have)}; {mends[stage.name]}, or give nodes a larger object store: --object-store-mb "
                f"{math.ceil(need / (1 << 20))}, within their /dev/shm"
            )
    return out


def _labellers(of: Sizes, cluster: Cluster, each: float) -> list[str]:
    """As many labelling actors on a node as it has cores, beside the centroids."""
    if not each:
        return []
    worst = min((p.machine for p in cluster.pools), key=lambda m: m.memory_gib / max(1.0, m.cpus))
    actors = max(1, min(int(worst.cpus), -(-of.num_crops // 64)))
    total = actors * each + of.centroid_bytes
    if total <= RAY_KILLS_AT * worst.memory_bytes:
        return []
    return [
        f"{actors} labelling actors of up to {gib(each)} and {gib(of.centroid_bytes)} of centroids want "
        f"{gib(total)} of a node with {worst.memory_gib:g} GiB; use nodes with more memory for each core, or "
        "lower clusterers.n"
    ]


def _driver(of: Sizes, cluster: Cluster, c: Constants) -> list[str]:
    """What the driver holds at the worst stage."""
    worst = max(of.stages, key=lambda s: s.driver)
    total, machine = worst.driver + c.worker_bytes, cluster.head_machine
    if total <= RAY_KILLS_AT * machine.memory_bytes:
        return []
    return [
        f"the driver holds {gib(total)} while it makes '{worst.name}' and its node has {machine.memory_gib:g} GiB; "
        "take a larger head, or lower clusterers.max_slices and clusterers.n"
    ]


def _what_it_rests_on(of: Sizes, cluster: Cluster, c: Constants, load: Load, gpu: bool) -> list[str]:
    out = [
        f"scans: {of.scans.known_from}; cluster: {cluster.known_from or 'flags'}; constants: {c.machine}, {c.date}"
    ]
    if load.times is not None:
        out.append(f"step time: {load.times.steps} real steps of this backbone and method")
    elif gpu and c.device == "cpu":
        out.append(
            f"step time: counted operations at {speed.GPU_UTILISATION:.0%} of the GPU's data sheet, an assumption; "
            "--probe on the cluster measures it"
        )
    else:
        out.append(
            "step time: counted operations at the rate of other steps; --probe on the cluster measures it"
        )
    if of.too_small:
        out.append(f"{of.too_small} scans are too small for a crop and are left out")
    return out


def _slow(cfg: Pretraining, of: Sizes, step: Step, c: Constants) -> list[str]:
    out = []
    if step.data_s > step.busy_s:
        out.append(
            f"training waits for data: a step takes {step.busy_s:.3g} s and its samples {step.data_s:.3g} s; add CPU "
            f"nodes (about {step.data_s / step.busy_s:.1f} times the cores)"
        )
    every = cfg.train.checkpoint_every_steps or of.steps_per_epoch
    saving = of.network.checkpoint_bytes / c.store_write_bytes_s
    if saving > every * step.total_s:
        out.append(
            f"a checkpoint takes {saving:.0f} s to write and comes every {every * step.total_s:.0f} s; set "
            f"train.checkpoint_every_steps={math.ceil(saving / step.total_s)} or more"
        )
    return out


def _cost(took: list[Duration], cluster: Cluster) -> tuple[float | None, float | None]:
    """Hours of all stages, and money: GPU pools are paid for while they train, all others all the time."""
    if not took or any(d.seconds is None for d in took):
        return None, None
    hours = {d.name: (d.seconds or 0.0) / 3600 for d in took}
    total = sum(hours.values())
    money = sum(
        p.price_per_h * (hours["pretrain"] if p.machine.gpus else total)
        for p in (*cluster.pools, *([cluster.head] if cluster.head else []))
    )
    return total, money
