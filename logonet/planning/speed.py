"""How long steps and stages take: docs/planning.md explains this model.

Every stage needs some of four resources: CPU, GPU, network and store. Each resource needs its work divided by its
throughput, all of them work at once, and the slowest one sets the pace.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources

from logonet import training
from logonet.core import config
from logonet.core.config import NonNegative, Positive, Share
from logonet.core.errors import UserError
from logonet.distributed.cluster import Resources, divide
from logonet.pipelines import Finetuning
from logonet.planning.hardware import Cluster, Machine
from logonet.planning.memory import Work
from logonet.planning.sizes import Planned, Sizes, Stage, checkpoint_steps
from logonet.storage import object_store

# Assumed of GPUs where the constants are a CPU's: a share of the data sheet's peak, and a ring over PCIe.
GPU_UTILISATION = 0.25
GPU_ALLREDUCE_BYTES_S = 1e10


@dataclass(frozen=True)
class Constants:
    """Rates are bytes, voxels or floating point operations per second.

    Attributes:
        machine, date: where and when they were measured.
        device: "cpu" or the GPU's name.
        flop_s: of training steps on one core, or on one GPU.
        serial_share: share of a step's time on one core that more threads do not shorten.
        allreduce_bytes_s: a worker's link to the next one in a ring.
        store_node_bytes_s: reading with all cores of a node.
        store_write_bytes_s: writing in one stream.
        import_voxels_s: one core decompresses, checks and hashes a scan.
        cut_voxels_s: one core decompresses a scan and cuts its crops, or prepares it.
        prepare_bytes_s: one core reads crops, checks them and prepares samples.
        kmeans_flop_s: one core fits K-means.
        label_flop_s: one core labels; counted in operations of a brute-force search.
        worker_bytes: memory of a training worker's process before it has a network.
        task_bytes: memory of an idle data task's process.
        start_s: seconds from starting the training workers to their first step.
        step_fingerprint: the network, method and batch that ``flop_s`` was measured with.
        worker_peak_bytes: the largest memory of a worker in those steps; on a GPU, of the GPU.
    """

    machine: str
    date: str
    device: str
    flop_s: Positive
    serial_share: Share
    allreduce_bytes_s: Positive
    store_node_bytes_s: Positive
    store_write_bytes_s: Positive
    import_voxels_s: Positive
    cut_voxels_s: Positive
    prepare_bytes_s: Positive
    kmeans_flop_s: Positive
    label_flop_s: Positive
    worker_bytes: Positive
    task_bytes: Positive
    start_s: NonNegative
    step_fingerprint: str = ""
    worker_peak_bytes: NonNegative = 0.0

    def measured(self, cfg: Planned, work: Work, gpu: bool) -> bool:
        """Whether these were measured with steps of this very work, on the same kind of device."""
        same_device = gpu == (self.device != "cpu")
        return same_device and self.step_fingerprint == step_fingerprint(cfg, work)

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()


def step_fingerprint(cfg: Planned, work: Work) -> str:
    """Identifies everything that a step's time depends on, except the machine."""
    shape = [work.facts.in_channels, *cfg.crops.size_vox]
    rows = work.rows * cfg.train.batch_size
    return config.fingerprint(cfg.backbone, cfg.method, shape, rows, work.precision)


def constants(uri: str = "") -> Constants:
    """The constants that ``--probe`` stored at ``uri``, or those of the machine that the project is developed on."""
    if not uri:
        text = resources.files("logonet.planning").joinpath("constants.json").read_text()
        return config.from_dict(Constants, json.loads(text), "constants.json")
    try:
        return config.from_dict(Constants, object_store.read_json(uri), uri)
    except UserError as err:
        raise UserError(f"{err}; 'logonet plan --probe 60 --constants {uri}' measures them again") from None


# ------------------------------------------------------------------------------------------------ step


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
        cpus: cores that work for training; with GPUs, those that the workers leave to the data tasks.
        data_tasks: at once on a node with workers.
    """

    machine: Machine
    workers: int
    nodes: int
    per_node: int
    threads: int
    gpu: bool
    cpus: float
    data_tasks: int = 1


def place(cluster: Cluster, resources: Resources) -> Placement:
    """Put the workers on the cluster as a job would. UserError: they do not fit, and what would."""
    workers = resources.most
    nodes = [{"CPU": p.machine.cpus, "GPU": p.machine.gpus} for p in cluster.pools for _ in range(p.nodes)]
    cores = None
    if len(nodes) == 1 and cluster.head is None:  # the job starts Ray itself, with CPUs for all workers
        cores, nodes[0]["CPU"] = int(cluster.cpus), max(cluster.cpus, workers + 2)
    share = divide(nodes, replace(resources, workers=workers), cores)
    homes = [p for p in cluster.pools if p.machine.gpus or not share.use_gpu]
    machine = min((p.machine for p in homes), key=lambda m: (m.gpus, m.cpus))
    per_node = machine.gpus if share.use_gpu else -(-workers // sum(p.nodes for p in homes))
    node_count, threads, cpus = -(-workers // per_node), share.threads_per_worker, cluster.cpus
    if share.use_gpu:
        threads, cpus = 1, max(cpus - workers, 0.25 * cpus)
    per_node = min(workers, per_node)
    free = (nodes[0]["CPU"] if cores else machine.cpus) - per_node * share.cpus_per_worker
    data_tasks = max(1, int(free / share.cpus_per_data_task))
    return Placement(machine, workers, node_count, per_node, threads, share.use_gpu, cpus, data_tasks)


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
        data_s: reading and preparing the samples of a step, and labelling them where they are fresh crops.
        total_s: what a step takes, set by ``waits_for``.
        efficiency: samples per second over those of as many workers that each have their nodes to themselves.
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


def rates(at: Placement, c: Constants) -> tuple[float, float]:
    """What a worker computes in a second, and the bytes that it sends in one. UserError: no rate is known."""
    if at.gpu and c.device == "cpu":
        if not at.machine.gpu_tflop_s:
            unknown = f"nothing says how fast GPU '{at.machine.gpu}' is"
            raise UserError(f"{unknown}; give gpu_tflop_s, or measure with --probe")
        return at.machine.gpu_tflop_s * 1e12 * GPU_UTILISATION, GPU_ALLREDUCE_BYTES_S
    if not at.gpu and c.device != "cpu":
        raise UserError(f"the constants were measured on GPU '{c.device}'; measure with --gpu False for CPUs")
    # Amdahl's law: threads shorten all but a share of the work.
    speedup = 1.0 if at.gpu else 1 / (c.serial_share + (1 - c.serial_share) / at.threads)
    return c.flop_s * speedup, c.allreduce_bytes_s


def step(train: training.Config, work: Work, at: Placement, c: Constants) -> Step:
    """Time one optimizer step. UserError when the global batch does not divide, or no rate is known."""
    flop_s, rate = rates(at, c)
    samples, accumulate = train.global_batch, training.accumulation(train, at.workers)
    compute_s = accumulate * work.micro.flop / flop_s
    sample_s = work.crop_bytes / c.prepare_bytes_s + work.label_flop / c.label_flop_s
    prepare_s = samples * sample_s / at.cpus
    read_bytes = work.crop_bytes if work.read_bytes is None else work.read_bytes
    read_s = samples * read_bytes / (at.nodes * node_read_bytes_s(at.machine, at.nodes, c))
    if not at.gpu:
        # Workers share the cores with each other and with the data tasks.
        compute_s = max(compute_s, at.workers * at.threads * compute_s / at.cpus + prepare_s)
    # A ring: 2 (n - 1) hops, each with an n-th of the bytes. A node's link carries one hop of it in and one out,
    # however many workers the node has; workers take turns where they outnumber the cores.
    n = at.workers
    rate = min(rate, at.machine.network_bytes_s) if at.nodes > 1 else rate
    turns = 1.0 if at.gpu else max(1.0, n / at.cpus)
    hop_s = at.machine.latency_s + work.network.sent_bytes / (n * rate)
    allreduce_s = turns * 2 * (n - 1) * hop_s
    # A flat all-reduce follows the computation; DDP's goes on during the backward pass, two thirds of it.
    hidden_s = 0.0 if flat_sync(train, at.gpu) else 2 / 3 * compute_s
    total_s = max(compute_s + max(0.0, allreduce_s - hidden_s), prepare_s, read_s)
    needs = {"CPU": prepare_s, "network": allreduce_s, "store": read_s}
    _, waits_for = slowest(needs | {"GPU" if at.gpu else "CPU": compute_s})
    data_s, rate = max(prepare_s, read_s), samples / total_s
    return Step(at.workers, samples, accumulate, compute_s, allreduce_s, data_s, total_s, waits_for, rate)


@dataclass(frozen=True)
class Validation:
    """All validation scans segmented, ``times`` in a run.

    Attributes:
        windows: of all ``scans``.
        seconds: of one time.
    """

    times: int
    scans: int
    windows: int
    seconds: float


def validation(cfg: Planned, of: Sizes, work: Work, at: Placement, c: Constants) -> Validation | None:
    """Time one validation: a worker reads its scans and segments them, one after the other."""
    if not isinstance(cfg, Finetuning) or work.windows is None:
        return None
    # As the loop deals them out.
    busiest = max(sum(of.windows[rank :: at.workers]) for rank in range(at.workers))
    passes = 8 if cfg.validation.mirror else 1
    compute_s = busiest * passes * work.windows.flop / rates(at, c)[0]
    if not at.gpu:  # workers share the cores
        compute_s *= max(1.0, min(at.workers, len(of.windows)) * at.threads / at.cpus)
    read_s = of.validation_bytes / (at.nodes * node_read_bytes_s(at.machine, at.nodes, c))
    return Validation(of.validations, len(of.windows), sum(of.windows), compute_s + read_s)


@dataclass(frozen=True)
class Checkpoints:
    """Checkpoints are written while training goes on; the next one waits until the one before is written.

    Attributes:
        times: in a run.
        interval_s: from one to the next, on average.
        writing_s: of one.
        waited_s: how long training waits for them, altogether.
    """

    times: int
    interval_s: float
    writing_s: float
    waited_s: float


def checkpoints(train: training.Config, of: Sizes, one: Step, c: Constants) -> Checkpoints:
    """Time the checkpoints of a run whose steps take ``one``."""
    times = len(checkpoint_steps(train, of.steps_per_epoch, train.checkpoint_every_s / one.total_s))
    training_s, writing_s = of.steps * one.total_s, of.network.checkpoint_bytes / c.store_write_bytes_s
    waited_s = max(0.0, times * writing_s - training_s)
    return Checkpoints(times, (training_s + waited_s) / times, writing_s, waited_s)


@dataclass(frozen=True)
class Traffic:
    """Bytes of a run on the network, and what is paid for them.

    Attributes:
        nodes_bytes: between nodes: gradients of all steps, and samples on their way from data tasks to workers.
        zones_bytes: of these, between zones.
        store_bytes: from and to the store, over all stages.
        money: of what goes between zones or through a NAT gateway.
        zones_money, nat_money: what three zones, and a NAT gateway, would cost.
    """

    nodes_bytes: float
    zones_bytes: float
    store_bytes: float
    money: float
    zones_money: float
    nat_money: float


ZONES = 3  # of a region, at least


def traffic(
    train: training.Config, stages: Sequence[Stage], steps: int, work: Work, at: Placement, cluster: Cluster
) -> Traffic:
    """Count what moves. Nodes are spread over the zones evenly, and know nothing of them when they meet."""
    n, prices = at.workers, cluster.traffic_prices
    # Gradients take a ring: each node passes on twice all but an n-th of them. A data task may be on any node.
    ring = at.nodes * 2 * (n - 1) / n * work.network.sent_bytes if at.nodes > 1 else 0.0
    samples = train.global_batch * work.sample_bytes * (1 - 1 / cluster.nodes)
    nodes_bytes, store_bytes = steps * (ring + samples), sum(s.read + s.written for s in stages)

    def across(zones: int) -> float:
        return nodes_bytes * (1 - 1 / min(zones, cluster.nodes))

    zones_bytes = across(cluster.zones)
    zones_money, nat_money = across(ZONES) * prices.zones_per_gb / 1e9, store_bytes * prices.nat_per_gb / 1e9
    money = zones_bytes * prices.zones_per_gb / 1e9 + cluster.nat * nat_money
    return Traffic(nodes_bytes, zones_bytes, store_bytes, money, zones_money, nat_money)


def node_read_bytes_s(machine: Machine, nodes: int, c: Constants) -> float:
    """What one of ``nodes`` nodes reads from the store; a single one may have the store on its own disk."""
    return c.store_node_bytes_s if nodes == 1 else min(c.store_node_bytes_s, machine.network_bytes_s)


def scaling(
    train: training.Config, work: Work, at: Placement, c: Constants, workers: Iterable[int]
) -> tuple[Step, ...]:
    """Steps of more and more workers with the same work for each; nodes and cores grow with the workers."""
    each = train.batch_size * training.accumulation(train, at.workers)

    def of(n: int) -> Step:
        nodes = -(-n // at.per_node)
        cpus = at.cpus / at.workers * n if at.gpu else at.machine.cpus * nodes
        there = replace(at, workers=n, nodes=nodes, per_node=min(n, at.per_node), cpus=cpus)
        return step(replace(train, global_batch=each * n), work, there, c)

    single = of(1).samples_per_s
    return tuple(replace(s, efficiency=s.samples_per_s / (s.workers * single)) for s in map(of, workers))


def timed(
    cfg: Planned,
    of: Sizes,
    cluster: Cluster,
    one: Step,
    saves: Checkpoints,
    validation: Validation | None,
    c: Constants,
) -> tuple[Stage, ...]:
    """All stages with their seconds."""
    cores = max(1.0, cluster.cpus)
    slowest_node = min((p.machine for p in cluster.pools), key=lambda m: m.network_bytes_s)
    node_rate = node_read_bytes_s(slowest_node, cluster.nodes, c)
    write_rate = min(node_rate, c.store_write_bytes_s * cores)
    cases = sum(s.voxels for s in of.scans.scans if s.is_case)
    cpu_s = {
        "import": of.scans.voxels / c.import_voxels_s / cores,
        "crops": of.scans.voxels / c.cut_voxels_s / cores,
        "prepared": of.scans.voxels / c.cut_voxels_s / cores,
        "cases": cases / c.cut_voxels_s / cores,
        "labels": of.labelled_crops * of.label_flop / c.label_flop_s / cores,
    }
    unknown = ""
    if not isinstance(cfg, Finetuning):
        fits, length = cfg.clusterers, of.scans.channels * math.prod(cfg.crops.size_vox[:2])
        unknown = "" if fits.algorithm == "kmeans" else f"{fits.algorithm} is not modelled"
        # A fit's distances, for each update and 2 + ln k times for k-means++. It runs on one core.
        distances = 2.0 * max(1, round(fits.fraction * of.sample_bytes / (2 * length))) * length
        updates = [k * (fits.iterations + 2 + math.log(k)) for k in of.cluster_sizes]
        fits_s = [distances * n / c.kmeans_flop_s for n in updates]
        cpu_s["clusterers"] = max(sum(fits_s) / cores, *fits_s, 0.0)
    training_s = saves.times * saves.interval_s
    training_waits_for = "checkpoints" if saves.waited_s else one.waits_for
    if validation is not None:  # while it goes on no step is made
        validating_s = validation.times * validation.seconds
        _, training_waits_for = slowest({training_waits_for: training_s, "validation": validating_s})
        training_s += validating_s
    # A lost spot node costs a start and, on average, half of what lies between two checkpoints.
    spot_nodes = sum(p.nodes for p in cluster.pools if p.spot)
    losses = spot_nodes * cluster.preemptions_per_node_h * training_s / 3600
    training_s = c.start_s + training_s + losses * (c.start_s + saves.interval_s / 2)
    out = []
    for stage in of.stages:
        seconds: float | None
        if stage is of.stages[-1]:
            seconds, waits_for = training_s, training_waits_for
            by_the_clock = saves.times - len(checkpoint_steps(cfg.train, of.steps_per_epoch))
            stage = replace(stage, written=stage.written + by_the_clock * of.network.checkpoint_bytes)
        elif stage.name == "clusterers" and unknown:
            seconds, waits_for = None, unknown
        else:
            store_s = (stage.read / node_rate + stage.written / write_rate) / cluster.nodes
            seconds, waits_for = slowest({"CPU": cpu_s[stage.name], "store": store_s})
        out.append(replace(stage, seconds=seconds, waits_for=waits_for))
    return tuple(out)
