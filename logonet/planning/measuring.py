"""Measure the constants of a plan on the connected cluster: real steps, reads and all-reduces, in about a minute.

Everything runs where training would: steps and all-reduces on training workers, all else in a task. Medians count.
"""

from __future__ import annotations

import datetime
import math
import os
import platform
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from threadpoolctl import threadpool_limits

from logonet import methods, training
from logonet.clustering import kmeans
from logonet.clustering.pseudo_labels import Labeller
from logonet.core import seeding
from logonet.core.errors import UserError
from logonet.data import crop_shards, cropping, importers, manifest, phantom
from logonet.distributed import cluster, remote
from logonet.distributed.cluster import Resources
from logonet.pipelines import Pretraining
from logonet.planning import memory
from logonet.planning.constants import Constants, step_fingerprint
from logonet.planning.planner import Work
from logonet.storage import object_store
from logonet.training import dataset, schedule

MIB = 1 << 20
OBJECT_BYTES = 4 * MIB
CODES = 4096  # most codes that the labeller is tried with
ITERATIONS = 100  # most updates of the K-means that is tried


def measure(
    cfg: Pretraining,
    own: Work,
    root: str,
    resources: Resources,
    seconds: float,
    scans: Sequence[manifest.Source] = (),
) -> Constants:
    """Measure the constants of the connected cluster for plans with ``cfg``.

    Args:
        own: the recipe's work (`planner.work`).
        root: where the run would keep its artifacts; what is written there is deleted again.
        seconds: to spend, about; starting workers and a first step take the time they take.
        scans: decoded to time it; without them a phantom is.
    """
    share = cluster.share(resources)
    folder = object_store.join(root, f".logonet-plan-{uuid.uuid4().hex}")
    task = _Probe(cfg, own, folder, seconds / 2, tuple(scans))
    try:
        found = remote.in_task(_measure_task, task, share.use_gpu, cpus=min(1.0, share.cpus_per_task))
    finally:
        object_store.delete_prefix(folder)
    cores = os.cpu_count() or 1
    workers = min(share.workers if share.use_gpu else max(2, share.workers), cores)
    asked_unix_s = time.time()
    there = remote.on_workers(_measure_worker, task, workers, share)
    start_s = max(0.1, there.pop("begun_unix_s") - asked_unix_s)
    step_s = there.pop("step_s")
    serial_share = 1.0
    if not share.use_gpu and cores > 1:
        # Amdahl's law, from one thread on every core and from one worker with all cores.
        ratio = found.pop("all_threads_step_s") / step_s
        serial_share = min(1.0, max(0.0, (ratio - 1 / cores) / (1 - 1 / cores)))
    return Constants(
        machine=f"{there['device'] if share.use_gpu else platform.node()}, {cores} cores",
        date=datetime.date.today().isoformat(),
        flop_s=own.micro.flop / step_s,
        serial_share=serial_share,
        start_s=start_s,
        step_fingerprint=step_fingerprint(cfg, own.precision),
        **found,
        **there,
    )


@dataclass(frozen=True)
class _Probe:
    """What to measure, where to write, and how long each of the two measurements may take."""

    cfg: Pretraining
    work: Work
    folder: str
    seconds: float
    scans: tuple[manifest.Source, ...]


def timed(fn: Callable[[int], Any], budget_s: float, least: int = 3) -> list[float]:
    """Seconds of ``fn(1)``, ``fn(2)``... after ``fn(0)`` as a warm-up, until the budget is spent."""
    out: list[float] = []
    begun = time.perf_counter()
    while len(out) < least or time.perf_counter() - begun < budget_s:
        before = time.perf_counter()
        fn(len(out))
        out.append(time.perf_counter() - before)
        if len(out) == 2 and out[-1] > max(budget_s, 1.0):  # so slow that two must do
            break
    return out[1:]


def median(values: Sequence[float]) -> float:
    return float(np.median(values))


# ------------------------------------------------------------------------------------------- in a task


def _measure_task(probe: _Probe, use_gpu: bool) -> dict[str, float]:
    """What data tasks, fits and labelling actors do, on one core; and a step on all cores."""
    out = {"task_bytes": float(psutil.Process().memory_info().rss)}
    part_s = probe.seconds / 6
    with threadpool_limits(1):
        out |= _store(probe.folder, part_s)
        out |= _decoding(probe, part_s)
        out |= _preparing(probe, part_s)
        out |= _clustering(probe.cfg, part_s)
        source, target = np.zeros(8 * MIB), np.empty(8 * MIB)
        out["copy_bytes_s"] = source.nbytes / median(timed(lambda _: np.copyto(target, source), part_s / 4))
    if not use_gpu and (cores := os.cpu_count() or 1) > 1:
        out["all_threads_step_s"] = _Steps(probe, torch.device("cpu")).run(cores, part_s)[0]
    return out


def _store(folder: str, seconds: float) -> dict[str, float]:
    """Write one object at a time, and read as many at once as the node has cores."""
    blob = seeding.rng(0, "plan").bytes(OBJECT_BYTES)
    cores = os.cpu_count() or 1
    uris = [object_store.join(folder, f"object-{i}") for i in range(max(4, 2 * cores))]
    count = len(uris)
    writes = timed(lambda i: object_store.write(uris[i % count], blob), seconds / 2, least=count + 1)
    with ThreadPoolExecutor(2 * cores) as pool:
        reads = timed(lambda _: list(pool.map(object_store.read, uris)), seconds / 2)
    return {
        "store_write_bytes_s": OBJECT_BYTES / median(writes),
        "store_node_bytes_s": count * OBJECT_BYTES / median(reads),
    }


def _decoding(probe: _Probe, seconds: float) -> dict[str, float]:
    """Import scans and cut them, or a phantom where there are none."""
    cfg, sources = replace(probe.cfg.crops, min_image_share=0.0), list(probe.scans)
    if not sources:
        side = max(96, 32 * -(-max(cfg.size_vox) // 32))
        scans = object_store.join(probe.folder, "scans")
        phantom.write_dataset(scans, 1, size_vox=(side, side, side))
        sources = importers.sources(f"{scans}/imagesTr/")
    import_s = cut_s = voxels = 0.0
    for source in sources:
        if voxels and import_s + cut_s > seconds:
            break
        begun = time.perf_counter()
        row = manifest.inspect(source)
        inspected = time.perf_counter()
        if isinstance(row, manifest.Quarantined):
            continue
        cropping.crops_of(manifest.load(row), row.modality, cfg, row.scan_id)
        cut_s += time.perf_counter() - inspected
        import_s += inspected - begun
        voxels += math.prod(row.shape)
    if not voxels:
        raise UserError(f"none of the first {len(sources)} scans can be read, the first being {sources[0].uri}; "
                        "'logonet data check' says why")  # fmt: skip
    return {"import_voxels_s": voxels / import_s, "cut_voxels_s": voxels / cut_s}


def _preparing(probe: _Probe, seconds: float) -> dict[str, float]:
    """Read crops from a shard, check them and prepare samples, as a data task does."""
    facts, rng = probe.work.facts, seeding.rng(0, "plan", "prepare")
    crops_RCXYZ = rng.integers(0, 65536, (4, facts.in_channels, *facts.size_vox), dtype=np.uint16)
    blob, name = crop_shards._shard_bytes("plan", crops_RCXYZ), "shards/plan.safetensors"
    object_store.write(object_store.join(probe.folder, name), blob)
    refs = crop_shards._parse_shard_header(name, blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    labels = [rng.integers(0, k, (4, facts.size_vox[2]), dtype=np.int16) for k in facts.cluster_sizes]
    name, options = probe.cfg.method["name"], {k: v for k, v in probe.cfg.method.items() if k != "name"}
    samples = dataset.TrainingDataset(
        crop_shards.CropTable(probe.folder, facts.size_vox, facts.in_channels, tuple(refs)),
        np.stack(labels, 1) if labels else None,
        name,
        methods.config(name, options),
        schedule.SampleSchedule(4, 4, 0),
    )
    one_s = median(timed(lambda i: samples.sample(i, i % 4), seconds))
    return {"prepare_bytes_s": crops_RCXYZ[0].nbytes / one_s}


def _clustering(cfg: Pretraining, seconds: float) -> dict[str, float]:
    """Fit one K-means and label a crop, on smooth random slices."""
    x, y, z = cfg.crops.size_vox
    rows, k = 512, 64
    coarse_Sxy = seeding.rng(0, "plan", "slices").random((rows, 8, 8), dtype=np.float32)
    slices_SXY = np.repeat(np.repeat(coarse_Sxy, -(-x // 8), 1), -(-y // 8), 2)[:, :x, :y]
    slices_ST = (slices_SXY.reshape(rows, -1) * 65535).astype(np.uint16)
    own = kmeans.Config(
        n=1, k_min=k, k_max=k, fraction=1.0, iterations=min(ITERATIONS, cfg.clusterers.iterations)
    )
    fit_s = median(timed(lambda i: kmeans.fit_one(slices_ST, k, i, own), seconds / 2))
    # Enough codes to make the labeller's fixed part small, with noise, because real codes span no small subspace.
    codes = min(CODES, sum(kmeans.cluster_counts(cfg.clusterers)))
    rng = seeding.rng(0, "plan", "labels")
    codes_VT = slices_ST[rng.integers(0, rows, codes)] / np.float32(65535)
    codes_VT += 0.02 * rng.standard_normal(codes_VT.shape, dtype=np.float32)
    label = Labeller(kmeans.ClustererSet.view(codes_VT, np.array([codes])))
    crop_ZT = slices_ST[rng.integers(0, rows, z)]
    label_s = median(timed(lambda _: label(crop_ZT), seconds / 2))
    # Counted as in `speed`: a brute-force search for labels, and a pass for each update and 2 + ln k for k-means++.
    pass_flop = 2.0 * slices_ST.size * k
    return {
        "kmeans_flop_s": (own.iterations + 2 + math.log(k)) * pass_flop / fit_s,
        "label_flop_s": 2.0 * crop_ZT.size * codes / label_s,
    }


# ----------------------------------------------------------------------------------------- on workers


class _Steps:
    """Training steps of the configured network and method on one synthetic batch."""

    def __init__(self, probe: _Probe, device: Any) -> None:
        train, rng = probe.cfg.train, seeding.rng(0, "plan", "steps")
        self.device, self.autocast = device, training.autocast_of(train, device)
        module = training.build_method(probe.cfg.backbone, probe.cfg.method, probe.work.facts)
        self.method = module.to(device).train()
        self.optimizer = torch.optim.AdamW((p for p in module.parameters() if p.requires_grad), lr=1e-6)
        rows = [memory.prepared(probe.work.facts, probe.cfg.method, rng) for _ in range(train.batch_size)]
        self.batch = {k: torch.from_numpy(np.stack([r[k] for r in rows])).to(device) for k in rows[0]}

    def _clock(self) -> float:
        """Seconds; on CPUs those of this process's own threads, because other programs may share the cores."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time() / torch.get_num_threads()

    def run(self, threads: int, budget_s: float) -> tuple[float, float]:
        """Seconds of a micro-batch and of the optimizer."""
        torch.set_num_threads(threads)
        compute_s: list[float] = []
        optimizer_s: list[float] = []

        def one(_: int) -> None:
            begun = self._clock()
            with self.autocast():
                loss, _ = self.method(self.batch, 0.0)
            loss.backward()
            computed = self._clock()
            self.optimizer.step()
            self.optimizer.zero_grad()
            compute_s.append(computed - begun)
            optimizer_s.append(self._clock() - computed)

        timed(one, budget_s)
        return median(compute_s[1:]), median(optimizer_s[1:])


def _measure_worker(probe: _Probe, rank: int, world: int, device: Any) -> dict[str, Any]:
    """Steps on every worker at once, with one thread each, and all-reduces between them."""
    begun_unix_s = time.time()
    steps, gpu = _Steps(probe, device), device.type == "cuda"
    # The process without its network, but with everything that is imported for it.
    network_bytes = 0 if gpu else probe.work.network.weight_bytes
    worker_bytes = float(psutil.Process().memory_info().rss - network_bytes)
    step_s, optimizer_s = steps.run(1, probe.seconds / 2)
    out = {"allreduce_latency_s": 1e-5, "allreduce_bytes_s": 1e9}  # one worker has nobody to wait for
    if world > 1:
        out = _allreduces(probe.work.network.gradient_bytes, device, world)
    return {
        **out,
        "device": torch.cuda.get_device_name(device) if gpu else "cpu",
        "begun_unix_s": begun_unix_s,
        "step_s": step_s,
        "optimizer_bytes_s": probe.work.network.gradient_bytes / optimizer_s,
        "worker_bytes": worker_bytes,
        "worker_peak_bytes": training.peak_memory_mb(device) * MIB,
    }


def _allreduces(gradient_bytes: int, device: Any, world: int) -> dict[str, float]:
    """A hop's latency and a link's rate in a ring: 2 (n - 1) hops, each with an n-th of the bytes."""

    def fastest(count: int, repeats: int) -> float:
        flat = torch.zeros(count, device=device)

        def one(_: int) -> None:
            dist.all_reduce(flat)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        seconds = []
        for _ in range(repeats):
            dist.barrier()
            seconds += timed(one, 0.0, least=2)
        return min(seconds)  # longer ones waited for a core

    count = min(gradient_bytes // 4, 16 * MIB)
    short_s, long_s = fastest(1, 32), fastest(count, 6)
    hops = 2 * (world - 1)
    return {
        "allreduce_latency_s": short_s / hops,
        "allreduce_bytes_s": hops / world * 4 * count / max(long_s - short_s, 1e-6),
    }
