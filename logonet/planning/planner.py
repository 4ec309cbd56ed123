"""The plan: sizes, memory, hours and money of a pretraining run, and what of it will not fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from logonet import training
from logonet.clustering import pseudo_labels
from logonet.core import config, seeding
from logonet.core.errors import UserError
from logonet.distributed import data_tasks
from logonet.distributed.cluster import Resources
from logonet.methods import DataSpec
from logonet.pipelines import Pretraining
from logonet.planning import memory, sizes, speed
from logonet.planning.constants import Constants, step_fingerprint
from logonet.planning.hardware import GIB, Cluster
from logonet.planning.memory import MicroBatch, WorkerMemory
from logonet.planning.sizes import Network, Scans, Sizes
from logonet.planning.speed import Load, Placement, Step

WORKERS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
RAY_KILLS_AT = 0.95  # share of a node's memory at which Ray begins to kill processes
LABELLER_SCRATCH = 1e9 / 23_000  # bytes per code when no two slices are alike


@dataclass(frozen=True)
class Work:
    """What the recipe says, whatever it runs on; ``sample_bytes`` is one prepared sample."""

    facts: DataSpec
    network: Network
    micro: MicroBatch
    sample_bytes: int
    precision: str


@dataclass(frozen=True)
class Plan:
    """Everything that is foreseen.

    Attributes:
        placement, step: None where the workers cannot be placed.
        hours, money: None where a stage's time is not known.
        refusals: a sentence for each thing that will not fit.
        notes: what the plan rests on.
    """

    cfg: Pretraining
    cluster: Cluster
    constants: Constants
    sizes: Sizes
    work: Work
    worker: WorkerMemory
    labeller_bytes: float
    placement: Placement | None = None
    step: Step | None = None
    scaling: tuple[Step, ...] = ()
    hours: float | None = None
    money: float | None = None
    refusals: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        of, net = self.sizes, self.sizes.network
        return {
            "fits": not self.refusals,
            "refusals": list(self.refusals),
            "notes": list(self.notes),
            "config": config.to_dict(self.cfg),
            "cluster": config.to_dict(self.cluster),
            "constants": asdict(self.constants),
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
            "stages": [asdict(stage) for stage in of.stages],
            "worker_bytes": asdict(self.worker),
            "labeller_bytes": self.labeller_bytes,
            "micro_batch": asdict(self.work.micro),
            "steps": of.steps,
            "step": asdict(self.step) if self.step else None,
            "scaling": [asdict(row) for row in self.scaling],
            "hours": self.hours,
            "money": self.money,
            "currency": self.cluster.currency,
        }


def work(cfg: Pretraining, gpu: bool) -> Work:
    """Count what the recipe's network and method need. Takes seconds to a minute."""
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
    """Plan pretraining with ``cfg`` (resolved) on ``scans``; ``local_root``: artifacts go to the node's own disk."""
    refusals: list[str] = []
    at: Placement | None = None
    try:
        at = speed.place(cluster, resources)
    except UserError as err:
        refusals.append(str(err))
    gpu = at.gpu if at else bool(cluster.gpus) and resources.gpu is not False
    own = work(cfg, gpu)
    of = sizes.sizes(cfg, scans, own.network)
    if not of.num_crops:
        refusals.append(
            f"none of the {len(scans.scans)} scans is large enough for a crop of "
            f"{'x'.join(map(str, cfg.crops.size_vox))} voxels; use a smaller crops.size_vox or lower "
            "crops.min_image_share"
        )
    plan = Plan(
        cfg,
        cluster,
        constants,
        of,
        own,
        worker_memory(cfg, own, at.workers if at else 1, gpu, constants),
        labeller_bytes(of, constants),
        placement=at,
        notes=tuple(_rests_on(cfg, own, of, cluster, constants, gpu)),
    )
    if at and of.num_crops:
        try:
            plan = _timed(plan, at)
        except UserError as err:
            refusals.append(str(err))
    for what, need, have, hint in _limits(plan, resources, local_root):
        if need > have:
            refusals.append(f"{what}: {gib(need)} needed, {gib(have)} available; {hint}")
    return replace(plan, refusals=tuple(refusals))


def load_of(cfg: Pretraining, own: Work) -> Load:
    """The work of one step."""
    crop_bytes = 2 * math.prod(cfg.crops.size_vox)
    return Load(cfg.train, own.micro.flop, own.network.gradient_bytes, crop_bytes)


def worker_memory(cfg: Pretraining, own: Work, workers: int, gpu: bool, c: Constants) -> WorkerMemory:
    """Peak memory of one of ``workers`` training workers; measured, where ``c`` was measured on the same work."""
    micro, net = own.micro, own.network
    if _measured(cfg, own, c, gpu):
        rest = net.weight_bytes + net.moment_bytes + micro.batch_bytes + (0 if gpu else c.worker_bytes)
        peak = max(int(c.worker_peak_bytes - rest), net.gradient_bytes)
        micro = replace(micro, peak_bytes=peak, known_from="activations measured in real steps")
    return memory.worker(
        net,
        micro,
        accumulate=max(1, cfg.train.global_batch // (workers * cfg.train.batch_size)),
        flat_sync=workers > 1 and speed.flat_sync(cfg.train, gpu),
        process=c.worker_bytes,
        prefetched=0 if gpu else _task_bytes(cfg, own),
    )


def labeller_bytes(of: Sizes, c: Constants) -> float:
    """Peak memory of one labelling actor, without the shared centroids; 0 without clusterers."""
    codes, length = sum(of.cluster_sizes), of.slice_voxels
    if not codes:
        return 0.0
    rank = min(pseudo_labels.RANK, length, codes)
    screen = 4 * (pseudo_labels.RANK + 4) * codes + 4 * length * rank
    building = 8 * (2 * min(pseudo_labels.BASIS_SAMPLE, codes) * length + 3 * length * rank)
    return c.task_bytes + screen + max(building, LABELLER_SCRATCH * codes)


def _measured(cfg: Pretraining, own: Work, c: Constants, gpu: bool) -> bool:
    """Whether the constants were measured with steps of this very work, on the same kind of device."""
    return c.step_fingerprint == step_fingerprint(cfg, own.precision) and gpu == (c.device != "cpu")


def _task_bytes(cfg: Pretraining, own: Work) -> int:
    """Prepared samples of one data task, which Ray counts as float32 crops."""
    batch_bytes = 4 * math.prod(cfg.crops.size_vox) * cfg.train.batch_size
    return cfg.train.batch_size * max(1, data_tasks.TASK_BYTES // batch_bytes) * own.sample_bytes


def _timed(plan: Plan, at: Placement) -> Plan:
    """The plan with its step, stages, hours and money."""
    cfg, cluster, c, of = plan.cfg, plan.cluster, plan.constants, plan.sizes
    load = load_of(cfg, plan.work)
    step, scaling = speed.step(load, at, c), speed.scaling(load, at, c, WORKERS)
    stages = speed.timed(cfg, of, cluster, step, c)
    hours = money = None
    if all(s.seconds is not None for s in stages):
        hours = sum(s.seconds or 0.0 for s in stages) / 3600
        money = cluster.money(hours, training_hours=(stages[-1].seconds or 0.0) / 3600)
    notes = list(plan.notes)
    if step.waits_for != ("GPU" if at.gpu else "CPU"):
        notes.append(f"training waits for the {step.waits_for}: computing takes {step.compute_s:.3g} s of a step of "
                     f"{step.total_s:.3g} s")  # fmt: skip
    every, saving_s = cfg.train.checkpoint_every_steps or of.steps_per_epoch, speed.checkpoint_seconds(of, c)
    if saving_s > every * step.total_s:
        notes.append(
            f"a checkpoint takes {saving_s:.0f} s to write and comes every {every * step.total_s:.0f} s; set "
            f"train.checkpoint_every_steps={math.ceil(saving_s / step.total_s)} or more"
        )
    return replace(
        plan,
        sizes=replace(of, stages=stages),
        step=step,
        scaling=scaling,
        hours=hours,
        money=money,
        notes=tuple(notes),
    )


def _rests_on(
    cfg: Pretraining, own: Work, of: Sizes, cluster: Cluster, c: Constants, gpu: bool
) -> Iterator[str]:
    known_from = cluster.known_from or "flags"
    yield f"scans: {of.scans.known_from}; cluster: {known_from}; constants: {c.machine}, {c.date}"
    if _measured(cfg, own, c, gpu):
        yield "step time: real steps of this backbone and method"
    elif gpu and c.device == "cpu":
        yield (
            f"step time: counted operations at {speed.GPU_UTILISATION:.0%} of the GPU's data sheet, an assumption; "
            "--probe on the cluster measures it"
        )
    else:
        yield "step time: counted operations at the rate of other steps; --probe on the cluster measures it"
    if of.too_small:
        yield f"{of.too_small} scans are too small for a crop and are left out"


# ------------------------------------------------------------------------------------- what will not fit


def gib(n: float) -> str:
    """Bytes for people."""
    for unit, size in (("GiB", GIB), ("MiB", 1 << 20)):
        if n >= 0.1 * size:
            return f"{n / size:.1f} {unit}"
    return f"{n / 1024:.1f} KiB" if n else "0"


def _limits(plan: Plan, resources: Resources, local_root: bool) -> Iterator[tuple[str, float, float, str]]:
    """Everything that may not fit: what it is, bytes needed, bytes available, and what helps."""
    cfg, of, own, worker, at = plan.cfg, plan.sizes, plan.work, plan.worker, plan.placement
    machines = [p.machine for p in plan.cluster.pools]
    asked_mb = resources.object_store_mb
    smaller = "set backbone.checkpointing=true where the network has it"
    if cfg.train.batch_size > 1:
        smaller = "lower train.batch_size"
    if at and at.gpu:
        yield (
            f"GPU memory of a training worker ({gib(worker.activations)} of it activations)",
            worker.device_bytes,
            at.machine.gpu_memory_gib * GIB,
            f"{smaller}, use smaller crops.size_vox, or larger GPUs",
        )
    if at:
        each = worker.process + (0 if at.gpu else worker.device_bytes)
        rest = worker.checkpoint + at.machine.store_bytes(asked_mb)
        have = RAY_KILLS_AT * at.machine.memory_bytes
        most = int((have - rest) / each)
        yield (
            f"memory of a node with {at.per_node} training workers, copies for a checkpoint and Ray's object store",
            at.per_node * each + rest,
            have,
            f"put {most} on a node" if most > 0 else f"{smaller}, or take nodes with more memory",
        )
    smallest = min(machines, key=lambda m: m.store_bytes(asked_mb))
    if asked_mb:
        size = math.ceil(asked_mb / 1024)
        hint = f"start the container with --shm-size={size}g, or ask for less"
        yield f"/dev/shm for --object-store-mb {asked_mb}", asked_mb << 20, smallest.shm_bytes, hint
    hints = {
        "clusterers": "lower clusterers.max_slices",
        "labels": "lower clusterers.n or clusterers.k_max",
        "pretrain": "put fewer workers on a node",
    }
    for stage in of.stages:
        need = stage.node_shared
        if at and stage.name == "pretrain":
            need += at.per_node * (data_tasks.TASKS_AHEAD + 1) * _task_bytes(cfg, own)
        yield (
            f"Ray's object store of a node for '{stage.name}'",
            need,
            smallest.store_bytes(asked_mb),
            f"{hints.get(stage.name)}, or give --object-store-mb {math.ceil(need / (1 << 20))} within /dev/shm",
        )
    if plan.labeller_bytes:
        machine = min(machines, key=lambda m: m.memory_gib / max(1.0, m.cpus))
        actors = max(1, min(int(machine.cpus), -(-of.num_crops // data_tasks.CROPS_PER_ACTOR)))
        yield (
            f"memory of a node with {actors} labelling actors",
            actors * plan.labeller_bytes + of.centroid_bytes,
            RAY_KILLS_AT * machine.memory_bytes,
            "use nodes with more memory for each core, or lower clusterers.n",
        )
    worst = max(of.stages, key=lambda s: s.driver)
    yield (
        f"memory of the driver's node for '{worst.name}'",
        worst.driver + plan.constants.worker_bytes,
        RAY_KILLS_AT * (plan.cluster.head or plan.cluster.pools[0]).machine.memory_bytes,
        "take a larger head, or lower clusterers.max_slices and clusterers.n",
    )
    if local_root:
        yield (
            "local disk for the artifacts",
            of.kept_bytes + of.network.checkpoint_bytes,
            machines[0].disk_gib * GIB,
            "give an s3:// --root, or lower crops.per_scan",
        )
