"""The plan: sizes, memory, hours and money of a run, and what of it will not fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from logonet import training
from logonet.core import config, seeding
from logonet.core.errors import UserError
from logonet.data import prepared_scans
from logonet.distributed import executor, feed
from logonet.distributed.cluster import Resources
from logonet.pipelines import Finetuning, preparation
from logonet.planning import labelled, memory, sizes, speed
from logonet.planning.hardware import GIB, Cluster
from logonet.planning.memory import MicroBatch, Work, WorkerMemory
from logonet.planning.sizes import Planned, Scans, Sizes, Stage
from logonet.planning.speed import Checkpoints, Constants, Placement, Step, Traffic, Validation
from logonet.storage import node_cache, object_store

WORKERS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
RAY_KILLS_AT = 0.95  # share of a node's memory at which Ray begins to kill processes
# Of a labelling actor, at most: for each code, when no two slices are alike, or for each voxel of a slice.
LABELLER_BYTES_PER_CODE, LABELLER_BYTES_PER_VOXEL = 46_000, 29_000
CACHE_OF_DISK = 0.8  # share of a node's disk that its own copy of the data may take
HINTS = {
    "clusterers": "lower clusterers.max_slices",
    "labels": "lower clusterers.n or clusterers.k_max",
    "pretrain": "put fewer workers on a node",
    "finetune": "put fewer workers on a node",
}


@dataclass(frozen=True)
class Plan:
    """Everything that is foreseen; the fields are the keys of the JSON.

    Attributes:
        bytes: the size of each file, and the number of crops.
        labeller_bytes: peak memory of one labelling actor, without what it shares with others.
        data_task_bytes: peak memory of one data task in training, without what it shares and the samples it makes.
        cache_gb: LOGONET_CACHE_GB to set on every node; 0 where there is no bucket and so no copy on nodes.
        step: None where the workers cannot be placed.
        scaling: steps of more and more workers with the same work for each.
        checkpoints, traffic: None where ``step`` is.
        validation: None where there is none.
        hours, money: of machines and traffic; None where a stage's time is not known.
        refusals: a sentence for each thing that will not fit.
        notes: what the plan rests on.
    """

    config: Planned
    cluster: Cluster
    constants: Constants
    scans: dict[str, Any]
    bytes: dict[str, int]
    worker_bytes: WorkerMemory
    labeller_bytes: float
    data_task_bytes: float
    micro_batch: MicroBatch
    steps: int
    stages: tuple[Stage, ...]
    cache_gb: int = 0
    step: Step | None = None
    scaling: tuple[Step, ...] = ()
    checkpoints: Checkpoints | None = None
    traffic: Traffic | None = None
    validation: Validation | None = None
    hours: float | None = None
    money: float | None = None
    refusals: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        fits = {"fits": not self.refusals, "currency": self.cluster.currency}
        return fits | config.to_dict(self)


def work(cfg: Planned, gpu: bool, channels: int = 1) -> Work:
    """Count what the recipe's network and method need. Takes seconds to a minute."""
    facts = sizes.facts_of(cfg, channels)
    with torch.device("meta"):
        net = sizes.network(training.build_method(cfg.backbone, cfg.method, facts), cfg.train)
    sample = memory.prepared(facts, cfg.method, seeding.rng(0, "plan"))
    precision = cfg.train.precision if cfg.train.precision != "auto" else "bf16" if gpu else "fp32"
    bf16 = precision == "bf16"
    micro = memory.micro_batch(cfg.backbone, cfg.method, facts, bf16=bf16, sample=sample)
    own = Work(facts, net, micro, sum(a.nbytes for a in sample.values()), precision)
    if not isinstance(cfg, Finetuning):
        return own
    rows, windows = cfg.crops.per_case, None
    if cfg.train.validate_every_epochs:
        at_once = cfg.validation.batch(torch.device("cuda" if gpu else "cpu"))
        windows = memory.windows(cfg.backbone, facts, at_once, bf16=bf16)
    return replace(own, sample_bytes=rows * own.sample_bytes, rows=rows, windows=windows)


def make(
    cfg: Planned,
    scans: Scans,
    cluster: Cluster,
    resources: Resources,
    c: Constants,
    *,
    root: str = "",
) -> Plan:
    """Plan a run of ``cfg`` (resolved) on ``scans``; ``root``: where artifacts would go, "" for a bucket.

    Where it does not fit and would with the head's widest map computed again, the plan is of that, and a note says so.
    """
    plan = _make(cfg, scans, cluster, resources, c, root)
    if not plan.refusals or not getattr(cfg.method.config, "head_keep", False):
        return plan
    leaner = replace(cfg, method=replace(cfg.method, config=replace(cfg.method.config, head_keep=False)))
    other = _make(leaner, scans, cluster, resources, c, root)
    if len(other.refusals) == len(plan.refusals):
        return plan
    saved = gib(plan.micro_batch.peak_bytes - other.micro_batch.peak_bytes)
    note = f"with --set method.head_keep=false, which takes {saved} less and more arithmetic; it does not fit without"
    return replace(other, notes=(*other.notes, note))


def _make(
    cfg: Planned, scans: Scans, cluster: Cluster, resources: Resources, c: Constants, root: str
) -> Plan:
    refusals: list[str] = []
    at: Placement | None = None
    try:
        at = speed.place(cluster, resources)
    except UserError as err:
        refusals.append(str(err))
    gpu = at.gpu if at else bool(cluster.gpus) and resources.gpu is not False
    try:
        preparation.one_number_of_channels({s.channels for s in scans.scans})
    except UserError as err:
        refusals.append(str(err))
    own = work(cfg, gpu, scans.channels)
    if isinstance(cfg, Finetuning):
        of = labelled.sizes(cfg, scans, own.network, own.facts.num_classes)
    else:
        of = sizes.sizes(cfg, scans, own.network)
    fresh, in_bucket = of.files["prepared"] > 0, not root or object_store.is_s3(root)
    cache_gb = cache_budget_gb(of, cluster) if in_bucket else 0
    fetched = fetched_share(of, cluster.nodes, kept_share(of, cache_gb))
    own = replace(own, read_bytes=fetched * of.read_bytes, label_flop=of.label_flop if fresh else 0.0)
    if own.windows is not None:
        own = replace(own, validation_bytes=own.windows.peak_bytes + of.segmenting_bytes)
    *before, training_stage = of.stages
    of = replace(of, stages=(*before, replace(training_stage, read=fetched * training_stage.read)))
    counts = {"count": len(scans.scans), "stored_bytes": scans.stored_bytes, "too_small": of.too_small}
    slice_voxels = scans.channels * math.prod(cfg.crops.size_vox[:2])
    labeller = max(LABELLER_BYTES_PER_CODE * sum(of.cluster_sizes), LABELLER_BYTES_PER_VOXEL * slice_voxels)
    labeller = labeller if of.cluster_sizes else 0
    plan = Plan(
        config=cfg,
        cluster=cluster,
        constants=c,
        scans={**counts, "known_from": scans.known_from},
        bytes={"crops": of.num_crops, **of.files, "prepared_sample": own.sample_bytes},
        worker_bytes=worker_memory(cfg, own, at.workers if at else 1, gpu, c),
        labeller_bytes=c.task_bytes + labeller,
        data_task_bytes=c.task_bytes + (_chunks_bytes(scans.channels) + labeller if fresh else 0),
        micro_batch=own.micro,
        steps=of.steps,
        stages=of.stages,
        cache_gb=cache_gb,
    )
    plan = replace(plan, notes=tuple(_notes(plan, of, own, gpu)))
    if not of.num_crops:
        small = f"none of the {len(scans.scans)} scans is large enough for a crop of "
        small += f"{'x'.join(map(str, cfg.crops.size_vox))} voxels"
        refusals.append(f"{small}; use a smaller crops.size_vox or lower crops.min_image_share")
    elif at:
        try:
            plan = _timed(plan, of, own, at, in_bucket)
        except UserError as err:
            refusals.append(str(err))
    local = not in_bucket and cluster.nodes == 1
    for what, need, have, hint in _limits(plan, of, own, at, resources, local):
        if need > have:
            refusals.append(f"{what}: {gib(need)} needed, {gib(have)} available; {hint}")
    return replace(plan, refusals=tuple(refusals))


def _timed(plan: Plan, of: Sizes, own: Work, at: Placement, in_bucket: bool) -> Plan:
    """The plan with its step, hours, traffic and money."""
    train, cluster, c = plan.config.train, plan.cluster, plan.constants
    step = speed.step(train, own, at, c)
    scaling = speed.scaling(train, own, at, c, WORKERS)
    validation = speed.validation(plan.config, of, own, at, c)
    saves = speed.checkpoints(train, of, step, c)
    stages = speed.timed(plan.config, of, cluster, step, saves, validation, c)
    traffic = speed.traffic(train, stages if in_bucket else (), of.steps, own, at, cluster)
    plan = replace(plan, step=step, scaling=scaling, checkpoints=saves, traffic=traffic)
    plan = replace(plan, validation=validation, stages=stages)
    seconds = [s.seconds for s in stages if s.seconds is not None]
    if len(seconds) < len(stages):
        return plan
    hours = sum(seconds) / 3600
    machines = cluster.money(hours, training_hours=seconds[-1] / 3600)
    return replace(plan, hours=hours, money=machines + traffic.money)


def worker_memory(cfg: Planned, own: Work, workers: int, gpu: bool, c: Constants) -> WorkerMemory:
    """Peak memory of one of ``workers`` training workers."""
    net, micro = own.network, own.micro
    # A pass's peak includes its gradients. From the second pass on, the gradients of those before are held too.
    moments = len(net.moments) * net.gradient_bytes + (net.weight_bytes if cfg.train.ema else 0)
    once = cfg.train.global_batch <= workers * cfg.train.batch_size
    activations, known_from = micro.peak_bytes - once * net.gradient_bytes, micro.known_from
    if c.measured(cfg, own, gpu):
        rest = net.weight_bytes + net.gradient_bytes + moments + micro.batch_bytes
        activations = max(0, int(c.worker_peak_bytes - rest - (0 if gpu else c.worker_bytes)))
        known_from = "activations measured in real steps"
    if workers > 1 and speed.flat_sync(cfg.train, gpu):
        # A flat all-reduce copies all gradients when the activations are gone.
        activations = max(activations, net.gradient_bytes)
    activations = max(activations, own.validation_bytes)
    return WorkerMemory(
        process=c.worker_bytes,
        weights=net.weight_bytes,
        gradients=net.gradient_bytes,
        moments=moments,
        activations=activations,
        batches=micro.batch_bytes + (0 if gpu else _task_bytes(cfg, own)),
        # A copy, so that training goes on; safetensors makes a file's tensors and then the file of them.
        checkpoint=net.checkpoint_bytes + 2 * max(net.optimizer_file, net.checkpoint_model_file),
        known_from=known_from,
    )


def _task_bytes(cfg: Planned, own: Work) -> int:
    """Prepared samples of one data task, which counts them as float32 crops."""
    batch_bytes = own.row_bytes * cfg.train.batch_size
    return cfg.train.batch_size * max(1, feed.BLOCK_BYTES // batch_bytes) * own.sample_bytes


def _chunks_bytes(channels: int) -> int:
    """Chunks of prepared scans that a data task keeps."""
    return prepared_scans.CHUNKS_CACHED * 2 * channels * prepared_scans.CHUNK_VOX**3


def cache_budget_gb(of: Sizes, cluster: Cluster) -> int:
    """LOGONET_CACHE_GB with which a node keeps all that training reads, or what its disk has room for."""
    need = of.training_bytes / node_cache.KEPT
    disk = CACHE_OF_DISK * GIB * min(p.machine.disk_gib for p in cluster.pools)
    return min(math.ceil(need / 1e9), int(disk / 1e9))


def kept_share(of: Sizes, cache_gb: int) -> float:
    """The share of all that training reads that a node keeps."""
    return min(1.0, node_cache.KEPT * cache_gb * 1e9 / max(1, of.training_bytes))


def fetched_share(of: Sizes, nodes: int, kept: float) -> float:
    """The share of training's reads that comes from the store where each node keeps the share ``kept`` of everything.

    A node reads at random: when it has read ``t`` times as much as there is, it has seen 1 - exp(-t) of it.
    """
    times = of.stages[-1].read / max(1, nodes * of.training_bytes)
    full = -math.log1p(-kept) if kept < 1 else math.inf  # when its disk has no more room
    fetched = -math.expm1(-min(times, full)) + (1 - kept) * max(0.0, times - full)
    return fetched / times if times else 1.0


def _notes(plan: Plan, of: Sizes, own: Work, gpu: bool) -> Iterator[str]:
    cfg, cluster, c = plan.config, plan.cluster, plan.constants
    known = cluster.known_from or "flags"
    yield f"scans: {of.scans.known_from}; cluster: {known}; constants: {c.machine}, {c.date}"
    if c.measured(cfg, own, gpu):
        yield "step time: real steps of this backbone and method"
    else:
        share = f"{speed.GPU_UTILISATION:.0%} of the GPU's data sheet, an assumption"
        rate = share if gpu and c.device == "cpu" else "the rate of other steps"
        yield f"step time: counted operations at {rate}; --probe on the cluster measures it"
    if plan.cache_gb:
        kept = f"{kept_share(of, plan.cache_gb):.0%} of the {gib(of.training_bytes)} that training reads"
        yield f"set {node_cache.GB}={plan.cache_gb} on every node: its disk then keeps {kept}"
    if of.too_small:
        yield f"{of.too_small} scans are too small for a crop and are left out"


def gib(n: float) -> str:
    """Bytes for people."""
    for unit, size in (("GiB", GIB), ("MiB", 1 << 20)):
        if n >= 0.1 * size:
            return f"{n / size:.1f} {unit}"
    return f"{n / 1024:.1f} KiB" if n else "0"


def _limits(
    plan: Plan, of: Sizes, own: Work, at: Placement | None, resources: Resources, local: bool
) -> Iterator[tuple[str, float, float, str]]:
    """What may not fit: what it is, bytes needed, bytes available, and what helps."""
    cfg, worker, asked_mb = plan.config, plan.worker_bytes, resources.object_store_mb
    machines = [p.machine for p in plan.cluster.pools]
    checkpointing = "set backbone.checkpointing=true where the network has it"
    smaller = "lower train.batch_size" if cfg.train.batch_size > 1 else checkpointing
    if at and at.gpu:
        what = f"GPU memory of a training worker ({gib(worker.activations)} of it activations)"
        hint = f"{smaller}, use smaller crops.size_vox, or larger GPUs"
        yield what, worker.device_bytes, at.machine.gpu_memory_gib * GIB, hint
    if at:
        each = worker.process + (0 if at.gpu else worker.device_bytes)
        rest = worker.checkpoint + at.data_tasks * plan.data_task_bytes + at.machine.store_bytes(asked_mb)
        have = RAY_KILLS_AT * at.machine.memory_bytes
        most = int((have - rest) / each)
        what = f"memory of a node with {at.per_node} training workers, {at.data_tasks} data tasks, a checkpoint's "
        what += "copies and Ray's object store"
        hint = f"put {most} on a node" if most > 0 else f"{smaller}, or take nodes with more memory"
        yield what, at.per_node * each + rest, have, hint
    smallest = min(machines, key=lambda m: m.store_bytes(asked_mb))
    if asked_mb:
        hint = f"start the container with --shm-size={math.ceil(asked_mb / 1024)}g, or ask for less"
        yield f"/dev/shm for --object-store-mb {asked_mb}", asked_mb << 20, smallest.shm_bytes, hint
    for stage in of.stages:
        need = stage.node_shared
        if at and stage is of.stages[-1]:
            need += at.per_node * (feed.BLOCKS_AHEAD + 1) * _task_bytes(cfg, own)
        mib = math.ceil(need / (1 << 20))
        hint = f"{HINTS.get(stage.name)}, or set --object-store-mb {mib} within /dev/shm"
        yield f"Ray's object store of a node for '{stage.name}'", need, smallest.store_bytes(asked_mb), hint
    if of.cluster_sizes:
        machine = min(machines, key=lambda m: m.memory_gib / max(1.0, m.cpus))
        actors = max(1, min(int(machine.cpus), -(-of.labelled_scans // executor.ITEMS_PER_ACTOR)))
        need = actors * plan.labeller_bytes + of.centroid_bytes + of.screen_bytes
        hint = "use nodes with more memory for each core, or lower clusterers.n"
        what = f"memory of a node with {actors} labelling actors"
        yield what, need, RAY_KILLS_AT * machine.memory_bytes, hint
    head = (plan.cluster.head or plan.cluster.pools[0]).machine
    worst = max(of.stages, key=lambda s: s.driver)
    hint = "take a larger head, or lower clusterers.max_slices and clusterers.n"
    need = worst.driver + plan.constants.worker_bytes
    yield f"memory of the driver's node for '{worst.name}'", need, RAY_KILLS_AT * head.memory_bytes, hint
    if local:
        need = sum(s.kept for s in of.stages) + own.network.checkpoint_bytes
        lower = "train.keep_checkpoints" if isinstance(cfg, Finetuning) else "crops.per_scan"
        hint = f"give an s3:// --root, or lower {lower}"
        yield "local disk for the artifacts", need, machines[0].disk_gib * GIB, hint
