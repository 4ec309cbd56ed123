"""How long a step and a stage take: the model of docs/planning.md, which says what every symbol is.

    T(n) = max( max(w, (m h w + d) / c) + s + r,  D )

with n workers, m of them and c cores on a node, h threads each: w is a worker's own work, d the core seconds that data
tasks take of the node, s what the slowest of all adds, r the ring all-reduce and D what data tasks need at least.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

from logonet import training
from logonet.clustering import kmeans
from logonet.core.errors import UserError
from logonet.distributed import cluster as sharing
from logonet.distributed import feed
from logonet.pipelines import Pretraining
from logonet.planning.constants import Constants, StepTimes
from logonet.planning.hardware import Cluster, Machine
from logonet.planning.sizes import Sizes

GPU_UTILISATION = (
    0.25  # of a data sheet's peak, where no step was measured: an assumption, and said to be one
)
# Where constants are a CPU's: half of an A10G's memory rate, of which AdamW moves seven numbers for each parameter, and
# a ring within a node at PCIe's rate. Assumptions too.
GPU_GUESSES: dict[str, Any] = {
    "optimizer_bytes_s": 3e11 / 7,
    "copy_bytes_s": 1.5e11,
    "allreduce_bytes_s": 1e10,
    "allreduce_latency_s": 1e-5,
}
DDP_OVERLAP = 0.5  # of the backward pass, during which DDP can send what is ready; an assumption


@dataclass(frozen=True)
class Place:
    """Where training workers stand.

    Attributes:
        nodes: that have workers; ``per_node`` on the fullest of them, ``threads`` each.
        data_cores: of the whole cluster, for data tasks.
        shared: data tasks run on the workers' own nodes and nowhere else.
    """

    machine: Machine
    workers: int
    nodes: int
    per_node: int
    threads: int
    gpu: bool
    data_cores: float
    shared: bool

    @property
    def oversold(self) -> float:
        """How many threads want each core of a node, at least 1."""
        return 1.0 if self.gpu else max(1.0, self.per_node * self.threads / self.machine.cpus)


def place(cluster: Cluster, workers: int, gpu: bool | None = None, cpus_per_worker: float = 0.0) -> Place:
    """Put ``workers`` on the cluster as `cluster.share` would.

    Raises:
        UserError: they do not fit; the sentence says what would.
    """
    if workers < 1:
        raise UserError(f"workers is {workers}; it must be at least 1")
    gpus, cpus = cluster.gpus, cluster.cpus
    if gpu is None and 0 < gpus < workers:
        raise UserError(
            f"the cluster has {gpus} GPUs for {workers} workers; plan --workers {gpus}, add GPU nodes, or train "
            "on CPUs with --gpu False"
        )
    if gpu and gpus < workers:
        raise UserError(
            f"the cluster has {gpus} GPUs for {workers} workers; add GPU nodes or plan --workers {gpus or 1}"
        )
    use_gpu = gpus >= workers > 0 if gpu is None else gpu
    homes = [p for p in cluster.pools if p.machine.gpus or not use_gpu]
    machine = min((p.machine for p in homes), key=lambda m: (m.gpus, m.cpus))
    slots = sum(p.nodes for p in homes)
    # A Ray that the job starts itself has a logical CPU for every worker and two more, whatever the cores.
    alone = cluster.nodes == 1 and cluster.head is None
    logical = max(cpus, workers + 2) if alone else cpus
    node_cpus = [logical] if alone else [float(p.machine.cpus) for p in homes for _ in range(p.nodes)]
    per_worker = sharing.cpus_of_worker(logical, node_cpus, workers, cpus_per_worker)
    if use_gpu:
        per_node = min(
            max(p.machine.gpus for p in homes), -(-workers // slots) if machine.gpus == 1 else machine.gpus
        )
        nodes = -(-workers // per_node)
    else:
        nodes = min(slots, workers)
        per_node = -(-workers // nodes)
    threads = max(1, int(cpus) // workers) if logical > cpus else max(1, int(per_worker))
    return Place(
        machine=machine,
        workers=workers,
        nodes=nodes,
        per_node=per_node,
        threads=1 if use_gpu else threads,
        gpu=use_gpu,
        # A worker's own Python takes about a core beside its GPU.
        data_cores=max(cpus - workers, 0.25 * cpus) if use_gpu else cpus,
        shared=all(p.machine.gpus or not use_gpu for p in cluster.pools),
    )


@dataclass(frozen=True)
class Load:
    """One optimizer step's work, whoever does it.

    Attributes:
        flop: of a micro-batch of ``batch_size`` samples.
        gradient_bytes: that are averaged over the workers.
        flat: by one all-reduce after the backward pass; else by DDP, beside it.
        crop_bytes: read for one sample; ``row_bytes`` what Ray counts it as.
        times: real steps of this very work, or None.
    """

    global_batch: int
    batch_size: int
    flop: float
    gradient_bytes: float
    flat: bool
    crop_bytes: float
    row_bytes: float
    times: StepTimes | None = None


@dataclass(frozen=True)
class Step:
    """One optimizer step, in seconds, by what takes them."""

    workers: int
    global_batch: int
    accumulate: int
    compute_s: float
    stragglers_s: float
    allreduce_s: float
    data_s: float

    @property
    def busy_s(self) -> float:
        """Without waiting for data."""
        return self.compute_s + self.stragglers_s + self.allreduce_s

    @property
    def total_s(self) -> float:
        return max(self.busy_s, self.data_s)

    @property
    def samples_per_s(self) -> float:
        return self.global_batch / self.total_s


def micro_batch_s(load: Load, where: Place, c: Constants) -> float:
    """Seconds of a micro-batch of a worker that has its node to itself."""
    times = load.times
    if where.gpu:
        if times is not None and c.device != "cpu":
            return times.alone_s["1"]
        rate = c.flop_s if c.device != "cpu" else where.machine.gpu_tflop_s * 1e12 * GPU_UTILISATION
        if not rate > 0:
            raise UserError(
                f"nothing says how fast GPU '{where.machine.gpu}' is; give gpu_tflop_s, or measure with --probe"
            )
        return load.flop / rate
    if times is not None:
        if str(where.threads) in times.alone_s:
            return times.alone_s[str(where.threads)]
        one = times.alone_s["1"]
        serial = _serial_share(times) if len(times.alone_s) > 1 else c.serial_share
    else:
        one, serial = load.flop / c.flop_s, c.serial_share
    return one * (serial + (1 - serial) / where.threads)


def _serial_share(times: StepTimes) -> float:
    """The part of a step that threads do not shorten (Amdahl), from one thread and the most that were timed."""
    most = max(map(int, times.alone_s))
    ratio = times.alone_s[str(most)] / times.alone_s["1"]
    return min(1.0, max(0.0, (ratio - 1 / most) / (1 - 1 / most)))


def step(load: Load, where: Place, c: Constants) -> Step:
    """One optimizer step of ``load`` on ``where``.

    Raises:
        UserError: the global batch does not divide.
    """
    if where.gpu and c.device == "cpu":
        c = replace(c, **GPU_GUESSES)
    n, m, h = where.workers, where.per_node, where.threads
    cores = where.machine.cpus
    cfg = training.Config(global_batch=load.global_batch, batch_size=load.batch_size, warmup_epochs=0)
    a = training.accumulation(cfg, n)
    micro = micro_batch_s(load, where, c)
    optimizer = load.times.optimizer_s if load.times else load.gradient_bytes / c.optimizer_bytes_s
    flatten = 2 * load.gradient_bytes / c.copy_bytes_s if load.flat and n > 1 else 0.0
    slow = 1.0 if where.gpu else _slowdown(load, where, c)
    own = a * micro * slow + optimizer + flatten
    prepare = load.global_batch * prepare_s(load, c)
    node_data = prepare / where.nodes if where.shared else 0.0
    compute = own if where.gpu else max(own, (m * h * own + node_data) / cores)
    reading = (
        load.global_batch * load.crop_bytes / (where.nodes * node_read_bytes_s(where.machine, where.nodes, c))
    )
    spread = load.times.spread if load.times else c.spread
    return Step(
        workers=n,
        global_batch=load.global_batch,
        accumulate=a,
        compute_s=compute,
        stragglers_s=_stragglers(where, a, spread) * a * micro * slow * where.oversold,
        allreduce_s=_allreduce(load, where, c, backward_s=2 / 3 * micro * slow),
        data_s=max(prepare / max(1e-9, where.data_cores), reading),
    )


def prepare_s(load: Load, c: Constants) -> float:
    """Core seconds of a data task for one sample."""
    if load.times is not None:
        return load.times.prepare_s
    return c.task_s / rows_per_task(load) + load.crop_bytes / c.prepare_bytes_s


def node_read_bytes_s(machine: Machine, nodes: int, c: Constants) -> float:
    """What one of ``nodes`` nodes reads from the store; one alone as fast as was measured."""
    return c.store_node_bytes_s if nodes == 1 else min(c.store_node_bytes_s, machine.network_bytes_s)


def rows_per_task(load: Load) -> int:
    """Samples of one data task (`data.batches`)."""
    return load.batch_size * max(1, int(feed.TASK_BYTES // (load.row_bytes * load.batch_size)))


def _slowdown(load: Load, where: Place, c: Constants) -> float:
    """What the other workers of the node cost this one: caches, memory's rate, a core's other half (kappa)."""
    cores, h = where.machine.cpus, where.threads
    full = load.times.busy_s / load.times.alone_s["1"] if load.times else c.busy_slowdown
    if cores <= h:
        return 1.0
    others = min(where.per_node * h, cores) - h
    return 1 + max(0.0, full - 1) * others / (cores - h)


def _stragglers(where: Place, a: int, spread: float) -> float:
    """By what share of its mean the slowest takes longer.

    Workers that share a core wait for each other anyway: it is the cores' sums that are compared.
    """
    if where.workers == 1 or spread == 0:
        return 0.0
    k = where.per_node * where.threads / where.machine.cpus if where.oversold > 1 else 1.0
    units = (
        where.workers
        if where.oversold == 1
        else max(1, round(where.nodes * where.machine.cpus / where.threads))
    )
    return expected_max(units, summed_spread(spread, a * k)) - 1


def summed_spread(spread: float, count: float) -> float:
    """The spread of a sum of ``count`` independent times, as that of a lognormal with the same mean and variance."""
    return math.sqrt(math.log1p(math.expm1(spread**2) / count))


@functools.lru_cache(maxsize=1024)
def expected_max(n: int, spread: float) -> float:
    """The expected largest of ``n`` lognormal times, over their mean."""
    import numpy as np
    from scipy.special import log_ndtr

    z = np.linspace(-10.0, 12.0, 8001)
    log_density = -0.5 * z**2 - 0.5 * math.log(2 * math.pi)
    weight = n * np.exp(log_density + (n - 1) * log_ndtr(z))
    return float(np.trapezoid(np.exp(spread * z - 0.5 * spread**2) * weight, z))


def _allreduce(load: Load, where: Place, c: Constants, backward_s: float) -> float:
    """Of a ring over all workers, what nothing hides."""
    n = where.workers
    if n == 1:
        return 0.0
    latency, rate = c.allreduce_latency_s, c.allreduce_bytes_s
    if where.nodes > 1:
        # A node's link carries one hop of the ring in and one out, however many workers stand on it.
        latency, rate = max(latency, where.machine.latency_s), min(rate, where.machine.network_bytes_s)
    waits = 1.0 if where.gpu else max(1.0, where.per_node / where.machine.cpus)
    ring = waits * (2 * (n - 1) * latency + 2 * (n - 1) / n * load.gradient_bytes / rate)
    return ring if load.flat else max(0.1 * ring, ring - DDP_OVERLAP * backward_s)


# ---------------------------------------------------------------------------------------------- scaling


@dataclass(frozen=True)
class Scaling:
    """A row of the table of workers: efficiency is samples/s against ``workers`` times those of one."""

    step: Step
    efficiency: float


def scaling(load: Load, where: Place, c: Constants, workers: list[int]) -> list[Scaling]:
    """The same work per worker on more and more workers: nodes and data cores grow with them.

    One worker has its micro-batches to itself, and the global batch is ``workers`` times its samples.
    """
    each = load.batch_size * training.accumulation(
        training.Config(global_batch=load.global_batch, batch_size=load.batch_size, warmup_epochs=0),
        where.workers,
    )
    most = where.per_node
    rows, single = [], 0.0
    for n in workers:
        nodes = -(-n // most)
        spot = replace(
            where,
            workers=n,
            nodes=nodes,
            per_node=min(n, most),
            data_cores=where.data_cores / where.workers * n,
        )
        found = step(replace(load, global_batch=each * n), spot, c)
        single = (
            single
            or step(
                replace(load, global_batch=each), replace(spot, workers=1, nodes=1, per_node=1), c
            ).samples_per_s
        )
        rows.append(Scaling(found, found.samples_per_s / (n * single)))
    return rows


# ----------------------------------------------------------------------------------------------- stages


@dataclass(frozen=True)
class Duration:
    """How long a stage takes; ``seconds`` None where nobody knows, ``bound`` what it waits for."""

    name: str
    seconds: float | None
    bound: str


def durations(cfg: Pretraining, of: Sizes, cluster: Cluster, step_: Step, c: Constants) -> list[Duration]:
    """Every stage's seconds."""
    cores = max(1.0, cluster.cpus)
    slowest = min((p.machine for p in cluster.pools), key=lambda m: m.network_bytes_s)
    node_rate = node_read_bytes_s(slowest, cluster.nodes, c)
    fleet = cluster.nodes * node_rate
    out = []
    for stage in of.stages:
        transfer = stage.read / fleet + stage.written / (
            cluster.nodes * min(node_rate, c.store_write_bytes_s * cores)
        )
        if stage.name in ("import", "crops"):
            rate = c.import_voxels_s if stage.name == "import" else c.cut_voxels_s
            requests = len(of.scans.scans) * 3 * c.request_s / cores
            work = of.scans.voxels / (rate * cores) + requests
            out.append(_longest(stage.name, {"the store": transfer, "decoding": work}))
        elif stage.name == "clusterers":
            work_s = kmeans_seconds(cfg.clusterers, of, c)
            if work_s is None:
                out.append(Duration("clusterers", None, f"{cfg.clusterers.algorithm} is not modelled"))
                continue
            each = {"the longest fit": max(work_s), "fitting": sum(work_s) / cores}
            found = _longest("clusterers", each)
            out.append(replace(found, seconds=(found.seconds or 0.0) + transfer))
        elif stage.name == "labels":
            flop = 2.0 * of.num_crops * cfg.crops.size_vox[2] * sum(of.cluster_sizes) * of.slice_voxels
            work = flop / (c.label_flop_s * max(1.0, cores - 1))
            out.append(_longest("labels", {"the store": transfer, "labelling": work}))
        else:
            out.append(_pretraining(cfg, of, cluster, step_, c))
    return out


def _pretraining(cfg: Pretraining, of: Sizes, cluster: Cluster, step_: Step, c: Constants) -> Duration:
    start = c.start_s + step_.workers * c.start_core_s / max(1.0, cluster.cpus)
    saving = of.network.checkpoint_bytes / c.store_write_bytes_s
    every = cfg.train.checkpoint_every_steps or of.steps_per_epoch
    # A checkpoint is written beside the training; the next one waits for it.
    interval = max(every * step_.total_s, saving)
    copying = of.network.checkpoint_bytes / c.copy_bytes_s
    training = of.steps / every * (interval + copying) + cfg.train.epochs * c.epoch_s
    bound = (
        "checkpoints"
        if saving > every * step_.total_s
        else "data"
        if step_.data_s > step_.busy_s
        else "steps"
    )
    spot = sum(p.nodes for p in cluster.pools if p.spot)
    rate_s = spot * cluster.preemptions_per_node_h / 3600
    # Each loss costs a start and half of what lies between two checkpoints.
    lost = rate_s * training * (start + interval / 2)
    return Duration("pretrain", start + training + lost, bound)


def kmeans_seconds(cfg: kmeans.Config, of: Sizes, c: Constants) -> list[float] | None:
    """Core seconds of every clusterer's fit; None for other algorithms."""
    if cfg.algorithm != "kmeans":
        return None
    num_slices = of.sample_bytes // (2 * of.slice_voxels)
    rows = max(1, round(cfg.fraction * num_slices))
    out = []
    for k in of.cluster_sizes:
        distances = 2.0 * rows * of.slice_voxels * k
        # k-means++ tries 2 + log k candidates for every centre.
        first = distances * (2 + math.log(k)) / c.kmeans_init_flop_s
        out.append(first + cfg.iterations * distances / c.kmeans_flop_s)
    return out


def _longest(name: str, parts: dict[str, float]) -> Duration:
    bound = max(parts, key=lambda k: parts[k])
    return Duration(name, parts[bound], bound)
