"""How long steps and stages take: docs/planning.md explains this model.

Every stage needs some of four resources: CPU, GPU, network and store. Each resource needs its work divided by its
throughput, all of them work at once, and the slowest one sets the pace.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from logonet import training
from logonet.core.errors import UserError
from logonet.distributed.cluster import Resources, cpus_of_worker
from logonet.pipelines import Pretraining
from logonet.planning.constants import Constants
from logonet.planning.hardware import Cluster, Machine
from logonet.planning.sizes import Sizes, Stage

# Assumed where a plan for GPUs has constants of a CPU only: a share of the data sheet's peak, half of an A10G's memory
# rate (AdamW moves seven numbers for each parameter), and a ring over PCIe.
GPU_UTILISATION = 0.25
GPU_GUESSES = {
    "optimizer_bytes_s": 3e11 / 7,
    "copy_bytes_s": 1.5e11,
    "allreduce_bytes_s": 1e10,
    "allreduce_latency_s": 1e-5,
}


def slowest(seconds: dict[str, float]) -> tuple[float, str]:
    """The largest time, and the resource that needs it."""
    name = max(seconds, key=seconds.__getitem__)
    return seconds[name], name


@dataclass(frozen=True)
class Placement:
    """Where training workers run.

    Attributes:
        machine: of the workers, the smallest one.
        nodes: that have workers, ``per_node`` on the fullest, with ``threads`` each.
        cpus: of the cluster that work for training: all, or without a core for each GPU worker.
    """

    machine: Machine
    workers: int
    nodes: int
    per_node: int
    threads: int
    gpu: bool
    cpus: float


def place(cluster: Cluster, resources: Resources) -> Placement:
    """Put the workers on the cluster as a job would.

    Raises:
        UserError: they do not fit; the sentence says what would.
    """
    workers, gpus, cpus = resources.most, cluster.gpus, cluster.cpus
    use_gpu = gpus > 0 if resources.gpu is None else resources.gpu
    if use_gpu and gpus < workers:
        ways = [f"plan --workers {gpus or 1}", "add GPU nodes"]
        ways += ["train on CPUs with --gpu False"] if resources.gpu is None else []
        raise UserError(f"the cluster has {gpus} GPUs for {workers} workers; {', or '.join(ways)}")
    homes = [p for p in cluster.pools if p.machine.gpus or not use_gpu]
    machine = min((p.machine for p in homes), key=lambda m: (m.gpus, m.cpus))
    slots = sum(p.nodes for p in homes)
    # A Ray that the job starts itself has a logical CPU for every worker and two more, however few the cores.
    local = cluster.nodes == 1 and cluster.head is None
    logical = max(cpus, workers + 2) if local else cpus
    node_cpus = [logical] if local else [p.machine.cpus for p in homes for _ in range(p.nodes)]
    per_worker = cpus_of_worker(logical, node_cpus, workers, resources.cpus_per_worker)
    if use_gpu:
        # Several nodes with one GPU each, or nodes that are filled one after the other.
        per_node = min(
            max(p.machine.gpus for p in homes), -(-workers // slots) if machine.gpus == 1 else machine.gpus
        )
        threads, cpus = 1, max(cpus - workers, 0.25 * cpus)
    else:
        per_node = -(-workers // min(slots, workers))
        threads = max(1, int(cpus) // workers if logical > cpus else int(per_worker))
    return Placement(machine, workers, -(-workers // per_node), per_node, threads, use_gpu, cpus)


@dataclass(frozen=True)
class Load:
    """The work of one optimizer step.

    Attributes:
        train: with the global batch, the micro-batch and how gradients are averaged.
        flop: of one micro-batch.
        gradient_bytes: averaged over the workers.
        crop_bytes: read for one sample.
    """

    train: training.Config
    flop: float
    gradient_bytes: float
    crop_bytes: float


def flat_sync(train: training.Config, gpu: bool) -> bool:
    """Whether gradients are averaged after the backward pass, or by DDP during it."""
    return train.gradient_sync == "flat" or (train.gradient_sync == "auto" and not gpu)


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step.

    Attributes:
        accumulate: micro-batches that the busiest worker has.
        compute_s: on the workers.
        allreduce_s: averaging gradients.
        data_s: reading and preparing the samples of a step.
        total_s: the time that a step takes, set by ``waits_for``.
        efficiency: samples per second over those of as many workers without each other.
    """

    workers: int
    global_batch: int
    accumulate: int
    compute_s: float
    allreduce_s: float
    data_s: float
    total_s: float
    waits_for: str
    samples_per_s: float
    efficiency: float = 1.0


def step(load: Load, at: Placement, c: Constants) -> Step:
    """Time one optimizer step. UserError when the global batch does not divide, or no rate is known."""
    if at.gpu and c.device == "cpu":
        if not at.machine.gpu_tflop_s:
            raise UserError(
                f"nothing says how fast GPU '{at.machine.gpu}' is; give gpu_tflop_s, or measure with --probe"
            )
        c = replace(c, flop_s=at.machine.gpu_tflop_s * 1e12 * GPU_UTILISATION, **GPU_GUESSES)
    elif not at.gpu and c.device != "cpu":
        raise UserError(
            f"the constants were measured on GPU '{c.device}'; measure those of CPUs with --gpu False"
        )
    n, samples = at.workers, load.train.global_batch
    accumulate = training.accumulation(load.train, n)
    # Amdahl's law: threads shorten all but a share of the work.
    speedup = 1.0 if at.gpu else 1 / (c.serial_share + (1 - c.serial_share) / at.threads)
    compute_s = accumulate * load.flop / (c.flop_s * speedup) + load.gradient_bytes / c.optimizer_bytes_s
    prepare_s = samples * load.crop_bytes / (c.prepare_bytes_s * at.cpus)
    read_s = samples * load.crop_bytes / (at.nodes * node_read_bytes_s(at.machine, at.nodes, c))
    if not at.gpu:
        # Workers share the cores with each other and with the data tasks.
        compute_s = max(compute_s, n * at.threads * compute_s / at.cpus + prepare_s)
    allreduce_s = _allreduce_s(load.gradient_bytes, at, c)
    # A flat all-reduce follows the computation; DDP's goes on beside it.
    busy_s = compute_s + (allreduce_s if flat_sync(load.train, at.gpu) else 0.0)
    needs = {"CPU": prepare_s, "network": allreduce_s, "store": read_s}
    total_s, waits_for = slowest(needs | {"GPU" if at.gpu else "CPU": busy_s})
    return Step(
        workers=n,
        global_batch=samples,
        accumulate=accumulate,
        compute_s=compute_s,
        allreduce_s=allreduce_s,
        data_s=max(prepare_s, read_s),
        total_s=total_s,
        waits_for=waits_for,
        samples_per_s=samples / total_s,
    )


def _allreduce_s(gradient_bytes: float, at: Placement, c: Constants) -> float:
    """A ring over all workers; on CPUs, workers take turns where they are more than the cores."""
    n, latency_s, rate = at.workers, c.allreduce_latency_s, c.allreduce_bytes_s
    if at.nodes > 1:
        # A node's link carries one hop of the ring in and one out, however many workers the node has.
        latency_s, rate = max(latency_s, at.machine.latency_s), min(rate, at.machine.network_bytes_s)
    turns = 1.0 if at.gpu else max(1.0, n / at.cpus)
    return turns * 2 * (n - 1) * (latency_s + gradient_bytes / (n * rate))


def node_read_bytes_s(machine: Machine, nodes: int, c: Constants) -> float:
    """What one of ``nodes`` nodes reads from the store; a single one may have the store on its own disk."""
    return c.store_node_bytes_s if nodes == 1 else min(c.store_node_bytes_s, machine.network_bytes_s)


def scaling(load: Load, at: Placement, c: Constants, workers: list[int]) -> tuple[Step, ...]:
    """Steps of more and more workers with the same work for each; nodes and cores grow with the workers."""
    each = load.train.batch_size * training.accumulation(load.train, at.workers)

    def of(n: int) -> Step:
        nodes = -(-n // at.per_node)
        cpus = at.cpus / at.workers * n if at.gpu else at.machine.cpus * nodes
        there = replace(at, workers=n, nodes=nodes, per_node=min(n, at.per_node), cpus=cpus)
        return step(replace(load, train=replace(load.train, global_batch=each * n)), there, c)

    single = of(1).samples_per_s
    return tuple(replace(s, efficiency=s.samples_per_s / (s.workers * single)) for s in map(of, workers))


def timed(
    cfg: Pretraining, of: Sizes, cluster: Cluster, training_step: Step, c: Constants
) -> tuple[Stage, ...]:
    """All stages with their seconds."""
    cores = max(1.0, cluster.cpus)
    slowest_node = min((p.machine for p in cluster.pools), key=lambda m: m.network_bytes_s)
    node_rate = node_read_bytes_s(slowest_node, cluster.nodes, c)
    read_rate = cluster.nodes * node_rate
    write_rate = cluster.nodes * min(node_rate, c.store_write_bytes_s * cores)
    label_flop = 2.0 * of.num_crops * cfg.crops.size_vox[2] * sum(of.cluster_sizes) * of.slice_voxels
    fits_s = _fit_seconds(cfg, of, c)
    cpu_s = {
        "import": of.scans.voxels / c.import_voxels_s / cores,
        "crops": of.scans.voxels / c.cut_voxels_s / cores,
        # A single fit runs on one core.
        "clusterers": max(sum(fits_s) / cores, *fits_s, 0.0),
        "labels": label_flop / c.label_flop_s / cores,
    }
    out = []
    for stage in of.stages:
        if stage.name == "pretrain":
            seconds, waits_for = _training(cfg, of, cluster, training_step, c)
        elif stage.name == "clusterers" and cfg.clusterers.algorithm != "kmeans":
            out.append(replace(stage, waits_for=f"{cfg.clusterers.algorithm} is not modelled"))
            continue
        else:
            store_s = stage.read / read_rate + stage.written / write_rate
            seconds, waits_for = slowest({"CPU": cpu_s[stage.name], "store": store_s})
        out.append(replace(stage, seconds=seconds, waits_for=waits_for))
    return tuple(out)


def _fit_seconds(cfg: Pretraining, of: Sizes, c: Constants) -> list[float]:
    """Core seconds of every K-means: each update is one pass over its rows, k-means++ is 2 + ln k passes."""
    own = cfg.clusterers
    rows = max(1, round(own.fraction * of.sample_bytes / (2 * of.slice_voxels)))
    pass_flop = 2.0 * rows * of.slice_voxels
    return [(own.iterations + 2 + math.log(k)) * pass_flop * k / c.kmeans_flop_s for k in of.cluster_sizes]


def checkpoint_seconds(of: Sizes, c: Constants) -> float:
    """Writing one checkpoint to the store, which goes on beside the training."""
    return of.network.checkpoint_bytes / c.store_write_bytes_s


def _training(
    cfg: Pretraining, of: Sizes, cluster: Cluster, training_step: Step, c: Constants
) -> tuple[float, str]:
    """A start, the steps, the checkpoints, and what lost spot nodes cost."""
    steps = cfg.train.checkpoint_every_steps or of.steps_per_epoch
    # Training waits while a checkpoint is copied, and where the one before is not yet written.
    interval_s, waits_for = slowest(
        {training_step.waits_for: steps * training_step.total_s, "checkpoints": checkpoint_seconds(of, c)}
    )
    interval_s += of.network.checkpoint_bytes / c.copy_bytes_s
    training_s = of.steps / steps * interval_s
    # A lost node costs a start and, on average, half of what lies between two checkpoints.
    losses = cluster.spot_nodes * cluster.preemptions_per_node_h * training_s / 3600
    return c.start_s + training_s + losses * (c.start_s + interval_s / 2), waits_for
