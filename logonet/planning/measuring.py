"""Measures the constants of a plan on the cluster at hand: real steps, real reads, real all-reduces, in about a minute.

Everything runs where the run would: reads, decoding and fitting in Ray tasks, steps and all-reduces in Ray Train's
workers. Medians are reported; the spread of a step is that of its logarithm.
"""

from __future__ import annotations

import concurrent.futures
import datetime
import math
import os
import platform
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from logonet import methods, training
from logonet.clustering import kmeans
from logonet.core import seeding
from logonet.core.errors import UserError
from logonet.data import crop_shards, cropping, manifest, phantom
from logonet.distributed import cluster, feed
from logonet.distributed.cluster import ResourceAllocation, Resources
from logonet.methods import DataSpec
from logonet.pipelines import Pretraining
from logonet.planning import memory
from logonet.planning.constants import Constants, StepTimes, step_fingerprint
from logonet.planning.planner import Work
from logonet.storage import object_store, safetensors_io
from logonet.training import dataset, schedule

MIB = 1 << 20
OBJECT_BYTES = 4 * MIB
SCANS = 3
CODES = 4096  # that the labeller is tried with
LEAST = 3  # steps or repeats of anything, the first of which only warms up


def measure(
    cfg: Pretraining,
    own: Work,
    root: str,
    resources: Resources,
    seconds: float,
    scans: Sequence[manifest.Source] = (),
) -> Constants:
    """The constants of the connected cluster, for plans with ``cfg``.

    Args:
        own: what the recipe takes (`whole.work`).
        root: where the run would keep its artifacts; what is written there is deleted again.
        seconds: to spend, about; starting workers takes some of it, and a step that takes longer is taken anyway.
        scans: up to three of them are decoded; without, a phantom is.
    """
    import ray

    share = cluster.allocate(resources)
    place = object_store.join(root, f".logonet-plan-{uuid.uuid4().hex}")
    task = ray.remote(num_cpus=min(1.0, share.cpus_per_task), max_retries=0)
    started = time.monotonic()
    try:
        here = ray.get(task(_tasks).remote(cfg, own.facts, place, seconds / 3, list(scans)[:SCANS]))
        round_trip_s = _round_trip(task)
    finally:
        object_store.delete_prefix(place)
    left_s = max(5.0, seconds - (time.monotonic() - started))
    at = _steps(cfg, own, resources, share, left_s)
    one = at["alone_s"]["1"]
    most = max(map(int, at["alone_s"]))
    ratio = at["alone_s"][str(most)] / one
    serial = (ratio - 1 / most) / (1 - 1 / most) if most > 1 else 1.0
    gradients = own.network.gradient_bytes
    precision = (
        "bf16"
        if cfg.train.precision == "bf16" or (cfg.train.precision == "auto" and share.use_gpu)
        else "fp32"
    )
    times = StepTimes(
        of=step_fingerprint(cfg.backbone, cfg.method, cfg.crops.size_vox, cfg.train.batch_size, precision),
        flop=own.micro.flop,
        alone_s=at["alone_s"],
        busy_s=at["busy_s"],
        optimizer_s=at["optimizer_s"],
        spread=at["spread"],
        steps=at["steps"],
        peak_bytes=at["peak_bytes"],
        prepare_s=here["prepare_s"]
        + round_trip_s / max(1, feed.TASK_BYTES // (4 * math.prod(cfg.crops.size_vox))),
    )
    return Constants(
        machine=f"{platform.node() if not share.use_gpu else at['device']}, {os.cpu_count()} cores",
        date=datetime.date.today().isoformat(),
        device=at["device"],
        cores=os.cpu_count() or 1,
        flop_s=own.micro.flop / one,
        serial_share=min(1.0, max(0.0, serial)),
        busy_slowdown=max(1.0, at["busy_s"] / one),
        spread=at["spread"],
        optimizer_bytes_s=gradients / at["optimizer_s"],
        task_s=round_trip_s,
        prepare_bytes_s=2 * math.prod(cfg.crops.size_vox) / here["prepare_s"],
        start_s=max(0.0, at["start_s"] - at["workers"] * at["start_core_s"] / (os.cpu_count() or 1)),
        step=times,
        **{k: here[k] for k in _FROM_TASKS},
        **{k: at[k] for k in _FROM_WORKERS},
    )


_FROM_TASKS = (
    "store_read_bytes_s", "store_write_bytes_s", "store_node_bytes_s", "request_s", "import_voxels_s", "cut_voxels_s",
    "copy_bytes_s", "disk_bytes_s", "kmeans_flop_s", "kmeans_init_flop_s", "label_flop_s", "task_bytes",
)  # fmt: skip
_FROM_WORKERS = ("allreduce_latency_s", "allreduce_bytes_s", "worker_bytes", "start_core_s", "epoch_s")


def timed(fn: Callable[[int], Any], budget_s: float, least: int = LEAST) -> list[float]:
    """Seconds of ``fn(0)``, ``fn(1)``... without the first: until the budget is spent, and ``least`` at least."""
    out: list[float] = []
    begun = time.perf_counter()
    while len(out) < least or time.perf_counter() - begun < budget_s:
        before = time.perf_counter()
        fn(len(out))
        out.append(time.perf_counter() - before)
        if len(out) == 2 and out[-1] > max(budget_s, 1.0):  # a step of a minute: two must do
            break
    return out[1:]


def median(values: Sequence[float] | np.ndarray) -> float:
    return float(np.median(values))


# ------------------------------------------------------------------------------------------- in a task


def _tasks(
    cfg: Pretraining, facts: DataSpec, place: str, seconds: float, scans: list[manifest.Source]
) -> dict[str, float]:
    """What data tasks, fits and labellers do, on one core."""
    import psutil
    from threadpoolctl import threadpool_limits

    out = {"task_bytes": float(psutil.Process().memory_info().rss)}
    with threadpool_limits(1):
        out |= _store(place, seconds / 5)
        out |= _decoding(cfg.crops, place, seconds / 5, scans)
        out |= _preparing(cfg, facts, place, seconds / 10)
        out |= _clusterers(cfg, seconds / 5)
        out |= _local(seconds / 10)
    return out


def _store(place: str, seconds: float) -> dict[str, float]:
    """Whole objects and small ranges, in one stream and in as many as the node has cores."""
    blob = seeding.rng(0, "plan").bytes(OBJECT_BYTES)
    streams = os.cpu_count() or 1
    uris = [object_store.join(place, f"object-{i}") for i in range(max(4, 2 * streams))]
    writes = timed(lambda i: object_store.write(uris[i % len(uris)], blob), seconds / 4, least=len(uris) + 1)
    reads = timed(lambda i: object_store.read(uris[i % len(uris)]), seconds / 4)
    small = timed(lambda i: object_store.read(uris[i % len(uris)], start=0, length=4096), seconds / 8)
    with concurrent.futures.ThreadPoolExecutor(2 * streams) as pool:
        together = timed(lambda _: list(pool.map(object_store.read, uris)), seconds / 4)
    one = OBJECT_BYTES / median(reads)
    return {
        "store_write_bytes_s": OBJECT_BYTES / median(writes),
        "store_read_bytes_s": one,
        "store_node_bytes_s": max(one, len(uris) * OBJECT_BYTES / median(together)),
        "request_s": median(small),
    }


def _decoding(
    cfg: cropping.Config, place: str, seconds: float, sources: list[manifest.Source]
) -> dict[str, float]:
    """Voxels a second of importing and of cutting."""
    from logonet.data import importers

    if not sources:
        side = max(96, 32 * -(-max(cfg.size_vox) // 32))
        phantom.write_dataset(object_store.join(place, "scans"), 1, size_vox=(side, side, side))
        sources = importers.sources(object_store.join(place, "scans/imagesTr/"))
    rows: list[manifest.Scan] = []
    import_s, cut_s, voxels = 0.0, 0.0, 0
    begun = time.perf_counter()
    for number, source in enumerate(sources):
        before = time.perf_counter()
        row = manifest.inspect(source)
        took_s = time.perf_counter() - before
        if isinstance(row, manifest.Quarantined):
            continue
        rows.append(row)
        before = time.perf_counter()
        small = replace(cfg, min_image_share=0.0)
        cropping.crops_of(manifest.load(row), row.modality, small, row.scan_id)
        cut_s += time.perf_counter() - before
        import_s, voxels = import_s + took_s, voxels + math.prod(row.shape)
        if number and time.perf_counter() - begun > seconds:
            break
    if not rows:
        raise UserError(f"none of the first {len(sources)} scans can be read, the first being {sources[0].uri}; "
                        "'logonet data check' says why")  # fmt: skip
    return {"import_voxels_s": voxels / import_s, "cut_voxels_s": voxels / cut_s}


def _preparing(cfg: Pretraining, facts: DataSpec, place: str, seconds: float) -> dict[str, float]:
    """One sample of a data task: a range of a shard read and checked, prepared, stacked and put into shared memory."""
    import ray

    x, y, z = facts.size_vox
    rng = seeding.rng(0, "plan", "prepare")
    crops_RCXYZ = rng.integers(0, 65536, (4, facts.in_channels, x, y, z), dtype=np.uint16)
    name = "shards/plan.safetensors"
    blob = crop_shards.shard_bytes("plan", crops_RCXYZ)
    object_store.write(object_store.join(place, name), blob)
    refs = crop_shards.parse_shard_header(name, safetensors_io.header_of(blob))
    labels_PNZ = None
    if facts.cluster_sizes:
        labels_PNZ = np.stack([rng.integers(0, k, (4, z)) for k in facts.cluster_sizes], 1).astype(np.int16)
    table = crop_shards.CropTable(place, facts.size_vox, facts.in_channels, tuple(refs))
    name, options = cfg.method["name"], {k: v for k, v in cfg.method.items() if k != "name"}
    feed = dataset.TrainingDataset(
        name, methods.config(name, options), schedule.SampleSchedule(4, 4, 0), table, labels_PNZ
    )

    def one(i: int) -> None:
        sample = feed.rows([(i, i % 4)])[0]
        ray.put({k: np.stack([v]) for k, v in sample.items()})

    return {"prepare_s": median(timed(one, seconds))}


def _clusterers(cfg: Pretraining, seconds: float) -> dict[str, float]:
    """Operations a second of K-means' first update, of the later ones, and of the fused labeller."""
    from threadpoolctl import threadpool_limits

    from logonet.clustering.pseudo_labels import Labeller

    x, y, z = cfg.crops.size_vox
    rows, k = 512, 64
    coarse_Sxy = seeding.rng(0, "plan", "slices").random((rows, 8, 8), dtype=np.float32)
    big_SXY = np.repeat(np.repeat(coarse_Sxy, -(-x // 8), 1), -(-y // 8), 2)[:, :x, :y]
    slices_ST = (big_SXY.reshape(rows, -1) * 65535).astype(np.uint16)
    own = kmeans.Config(n=1, k_min=k, k_max=k, fraction=1.0, iterations=1)
    distances = 2.0 * rows * slices_ST.shape[1] * k
    # k-means++ with scoring beside it; later updates are what a long fit has more, each at least its product.
    later = 30
    first = median(timed(lambda i: kmeans.fit_one(slices_ST, k, i, own), seconds / 4))
    long = replace(own, iterations=1 + later)
    whole = median(timed(lambda i: kmeans.fit_one(slices_ST, k, i, long), seconds / 4))
    x_ST = slices_ST.astype(np.float32)
    with threadpool_limits(1):
        product_s = min(timed(lambda _: x_ST @ x_ST[:k].T, 0.0, least=5))
    update_s = max((whole - first) / later, product_s)
    # Enough codes for the screen's fixed part to be small; noise, or every slice would lie in its subspace.
    codes = min(CODES, sum(kmeans.cluster_counts(cfg.clusterers)))
    rng = seeding.rng(0, "plan", "labels")
    rows_VT = slices_ST[rng.integers(0, rows, codes)] / np.float32(65535)
    rows_VT += 0.02 * rng.standard_normal(rows_VT.shape, dtype=np.float32)
    label = Labeller(kmeans.ClustererSet.view(rows_VT, np.array([codes])))
    crop_ZT = slices_ST[rng.integers(0, rows, z)]
    label_s = median(timed(lambda _: label(crop_ZT), seconds / 4))
    return {
        "kmeans_flop_s": distances / update_s,
        "kmeans_init_flop_s": distances * (2 + math.log(k)) / max(first - update_s, update_s),
        "label_flop_s": 2.0 * len(crop_ZT) * slices_ST.shape[1] * codes / label_s,
    }


def _local(seconds: float) -> dict[str, float]:
    """Memory to memory, and to the disk that Ray spills to."""
    source = np.zeros(8 * MIB, np.float64)
    target = np.empty_like(source)
    copies = timed(lambda _: np.copyto(target, source), seconds / 2)
    blob = bytes(16 * MIB)
    with tempfile.NamedTemporaryFile(prefix="logonet-plan-") as file:

        def write(_: int) -> None:
            file.seek(0)
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())

        writes = timed(write, seconds / 2)
    return {"copy_bytes_s": source.nbytes / median(copies), "disk_bytes_s": len(blob) / median(writes)}


def _nothing() -> None:
    """A task's own cost."""


def _round_trip(task: Any) -> float:
    """Seconds of a task that does nothing, when many are asked for at once."""
    import ray

    nothing = task(_nothing)
    many = 64
    # The median, for in some of these Ray starts another worker process, which costs seconds.
    return median(timed(lambda _: ray.get([nothing.remote() for _ in range(many)]), 0.0, least=6)) / many


# ----------------------------------------------------------------------------------------- in workers


@dataclass(frozen=True)
class _Steps:
    """What the workers are to measure."""

    cfg: Pretraining
    facts: DataSpec
    seconds: float
    gradient_bytes: int
    cores: int
    asked_unix_s: float


def _steps(
    cfg: Pretraining, own: Work, resources: Resources, share: ResourceAllocation, seconds: float
) -> dict[str, Any]:
    """Real steps on one worker alone and on all at once, and all-reduces between them."""
    from ray.train import LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    cores = os.cpu_count() or 1
    workers = min(share.workers, cores) if share.use_gpu else min(max(2, share.workers), cores)
    wanted = _Steps(cfg, own.facts, seconds, own.network.gradient_bytes, cores, time.time())
    trainer = TorchTrainer(
        _measure_steps,  # type: ignore[arg-type]  # it may return a value; Ray's annotation forgets that
        train_loop_config={"wanted": wanted},
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=share.use_gpu,
            resources_per_worker={
                "CPU": min(1.0, share.cpus_per_worker),
                **({"GPU": 1} if share.use_gpu else {}),
            },
        ),
        run_config=RunConfig(  # type: ignore[call-arg]  # Ray's stub is of its older RunConfig
            name=f"plan-{time.time_ns():x}",
            storage_path=f"{tempfile.gettempdir()}/logonet-ray-train",
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    result: Any = trainer.fit()
    assert result.return_value is not None
    return result.return_value


def _measure_steps(config: dict[Any, Any]) -> dict[str, Any]:
    """On every worker; what rank 0 answers counts."""
    import psutil
    import ray.train
    import torch
    import torch.distributed as dist
    from ray.train.torch import get_device

    begun_unix_s, begun_core_s = time.time(), time.process_time()
    cluster.quiet()
    wanted: _Steps = config["wanted"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = get_device()
    steps = _Stepper(wanted, device)
    # What the process is without a network, but with all that is imported for one.
    own_bytes = 0 if device.type == "cuda" else sum(p.nbytes for p in steps.method.parameters())
    resident = float(psutil.Process().memory_info().rss - own_bytes)
    on_gpu = device.type == "cuda"
    budget_s = max(1.0, (wanted.seconds - (begun_unix_s - wanted.asked_unix_s)) / (2 if on_gpu else 3))
    alone: dict[str, list[float]] = {}
    for threads in (1,) if on_gpu else sorted({1, wanted.cores}):
        if rank == 0:
            alone[str(threads)] = steps.run(threads, budget_s)
        if world > 1:
            dist.barrier()
    busy = steps.run(1, budget_s)
    everyone: list[Any] = [busy]
    if world > 1:
        everyone = [None] * world
        dist.all_gather_object(everyone, busy)
    out = _allreduces(wanted, device, rank, world)
    before = time.perf_counter()
    ray.train.report({"rank": rank})
    out["epoch_s"] = time.perf_counter() - before
    peak = float(torch.cuda.max_memory_allocated(device)) if on_gpu else training.peak_memory_mb(device) * MIB
    logs = np.concatenate([np.log(b) - np.mean(np.log(b)) for b in everyone])
    return {
        **out,
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "workers": world,
        "alone_s": {threads: median(v) for threads, v in alone.items()},
        "busy_s": median(np.concatenate(everyone)),
        "spread": float(np.sqrt(np.sum(logs**2) / max(1, len(logs) - len(everyone)))),
        "optimizer_s": median(steps.optimizer_s),
        "steps": sum(map(len, (*alone.values(), *everyone))),
        "peak_bytes": peak,
        "worker_bytes": resident,
        "start_s": begun_unix_s - wanted.asked_unix_s,
        "start_core_s": begun_core_s,
    }


class _Stepper:
    """The configured pair, its optimizer and one synthetic batch."""

    def __init__(self, wanted: _Steps, device: Any) -> None:
        import torch

        self.cfg, self.device = wanted.cfg.train, device
        torch.manual_seed(seeding.integer(0, "plan"))
        self.method = (
            training.build_method(wanted.cfg.backbone, wanted.cfg.method, wanted.facts).to(device).train()
        )
        params = [p for p in self.method.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(params, lr=1e-6)
        rng = seeding.rng(0, "plan", "steps")
        rows = [memory.prepared(wanted.facts, wanted.cfg.method, rng) for _ in range(self.cfg.batch_size)]
        self.batch = {k: torch.from_numpy(np.stack([r[k] for r in rows])).to(device) for k in rows[0]}
        self.optimizer_s: list[float] = []
        self.optimizer.register_step_pre_hook(lambda *_: self._before())
        self.optimizer.register_step_post_hook(lambda *_: self._after())

    def _wait(self) -> float:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time() / torch.get_num_threads()

    def _before(self) -> None:
        self._begun = self._wait()

    def _after(self) -> None:
        self.optimizer_s.append(self._wait() - self._begun)

    def run(self, threads: int, budget_s: float) -> list[float]:
        """Seconds of micro-batches: forward, backward, and whatever a step does beside its optimizer.

        On the CPU core seconds of this process for each thread: what else runs on the machine does not count.
        """
        import torch

        torch.set_num_threads(threads)
        first = len(self.optimizer_s)

        cores_s: list[float] = []

        def one(i: int) -> None:
            before_s = time.process_time()
            training.step(
                self.method,
                self.optimizer,
                iter([self.batch]),
                count=1,
                progress=0.0,
                lr=1e-6,
                cfg=self.cfg,
                seeds=[i],
                autocast=training.autocast_of(self.cfg, self.device),
                sync=lambda params: None,
            )
            self._wait()
            cores_s.append((time.process_time() - before_s) / threads)

        whole = timed(one, budget_s)
        if self.device.type == "cpu":
            whole = cores_s[1:]
        return [s - o for s, o in zip(whole, self.optimizer_s[first + 1 :])]


def _allreduces(wanted: _Steps, device: Any, rank: int, world: int) -> dict[str, float]:
    """One hop's latency and a link's rate in a ring of ``world`` ranks; alone, what cannot matter."""
    import torch
    import torch.distributed as dist

    if world == 1:
        return {"allreduce_latency_s": 1e-5, "allreduce_bytes_s": 1e9}
    took: dict[int, list[float]] = {}
    for count in (1, min(wanted.gradient_bytes // 4, 16 * MIB)):
        flat = torch.zeros(count, device=device)

        def one(_: int, flat: Any = flat) -> None:
            dist.all_reduce(flat)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        repeats = 64 if count == 1 else 12
        for i in range(repeats):
            dist.barrier()
            before = time.perf_counter()
            one(i)
            took.setdefault(count, []).append(time.perf_counter() - before)
    small, big = min(took), max(took)
    # The fastest: what is longer has waited for a core.
    short, long = (min(took[c][2:]) for c in (small, big))
    # Half the ring's 2 (n - 1) hops each way; what a big one takes longer is its bytes.
    return {
        "allreduce_latency_s": short / (2 * (world - 1)),
        "allreduce_bytes_s": 2 * (world - 1) / world * 4 * big / max(long - short, 1e-6),
    }
