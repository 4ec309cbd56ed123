"""Measure the constants of a plan on the connected cluster, in about a minute.

A task reads, writes, decodes and prepares; then the job's own trainer takes a few steps on synthetic crops.
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
from dataclasses import replace
from typing import Any

import numpy as np
import psutil

from logonet import methods
from logonet.core import seeding
from logonet.core.errors import UserError
from logonet.core.execution import run_all
from logonet.data import crop_shards, cropping, importers, manifest, phantom, prepared_scans
from logonet.data.preprocessing import Preprocessing
from logonet.pipelines import Finetuning, Pretraining
from logonet.pipelines.stage import StageExecutor
from logonet.planning import memory, speed
from logonet.planning.memory import Work
from logonet.planning.sizes import Planned, class_names
from logonet.planning.speed import Constants, Placement
from logonet.storage import object_store
from logonet.storage.parquet import Rows
from logonet.training import Job
from logonet.training.dataset import LabelledDataset, TrainingDataset
from logonet.training.schedule import SampleSchedule

MIB = 1 << 20
OBJECT_BYTES = 4 * MIB
CROPS = 4
MAX_STEPS = 50


def measure(
    cfg: Planned,
    work: Work,
    root: str,
    executor: StageExecutor,
    at: Placement,
    seconds: float,
    scans: Sequence[manifest.Source] = (),
) -> Constants:
    """Measure the constants of the cluster behind ``executor`` for plans with ``cfg``.

    Args:
        work: the recipe's work (`planner.work`).
        root: where artifacts would go; what is written there is deleted again.
        at: where the executor trains.
        seconds: to spend, about; starting workers and the first steps take the time they take.
        scans: decoded to time it; without them a phantom is.
    """
    folder = object_store.join(root, f".logonet-plan-{uuid.uuid4().hex}")
    known = speed.constants()
    if at.gpu:
        known = replace(known, device=at.machine.gpu or "GPU", allreduce_bytes_s=speed.GPU_ALLREDUCE_BYTES_S)
    batch = at.workers * cfg.train.batch_size
    short: dict[str, Any] = {"epochs": 2, "warmup_epochs": 0.0, "lr": 1e-6, "min_lr": 0.0, "patience": None}
    train = replace(cfg.train, global_batch=batch, validate_every_epochs=0, **short)
    try:
        dataset: TrainingDataset | LabelledDataset
        if isinstance(cfg, Finetuning):
            dataset = synthetic_cases(cfg, work, folder)
            crops = cropping.Config(size_vox=cfg.crops.size_vox, **vars(Preprocessing.of(cfg.cases)))
        else:
            dataset, crops = synthetic_crops(cfg, work, folder), cfg.crops
        task = _Task(crops, work.crop_bytes, folder, seconds / 6, scans)
        rates = run_all(executor, task, [dataset])[0]
        # Fits and labels are not measured: as much faster than the defaults as cutting is.
        faster = rates["cut_voxels_s"] / known.cut_voxels_s
        rates |= {name: faster * getattr(known, name) for name in ("kmeans_flop_s", "label_flop_s")}
        known = replace(known, **rates)
        expected = speed.step(train, work, at, known)
        steps = min(MAX_STEPS, max(1, int(seconds / 4 / expected.total_s)))
        dataset = replace(dataset, schedule=SampleSchedule(CROPS, batch, 0, steps))
        train, begun_unix_s = replace(train, steps_per_epoch=steps), time.time()
        job = Job(f"{folder}/run", "0" * 16, cfg.backbone, cfg.method, train, work.facts)
        first, last = executor.train(job, dataset)["history"]
    finally:
        object_store.delete_prefix(folder)
    step_s = (1 - last["data_wait_share"]) * batch / last["samples_per_s"]
    if speed.flat_sync(train, at.gpu):
        step_s = max(step_s - expected.allreduce_s, step_s / 2)
    return replace(
        known,
        machine=f"{known.device if at.gpu else platform.node()}, {os.cpu_count()} cores",
        date=datetime.date.today().isoformat(),
        # The rate with which the model predicts the second epoch's time.
        flop_s=known.flop_s * expected.compute_s / step_s,
        start_s=max(0.0, first["unix_s"] - begun_unix_s - steps * batch / first["samples_per_s"]),
        step_fingerprint=speed.step_fingerprint(cfg, work),
        worker_peak_bytes=last["peak_memory_mb"] * MIB,
    )


def synthetic_crops(cfg: Pretraining, work: Work, folder: str) -> TrainingDataset:
    """Stored crops of noise with random labels."""
    spec, rng = work.facts, seeding.rng(0, "plan", "crops")
    raw = [memory.raw_sample(spec, rng) for _ in range(CROPS)]
    refs = crop_shards.write_shard(f"{folder}/crops", "plan", [r["image_CXYZ"] for r in raw])
    rows = Rows.of(refs, crop_shards.CropRef)
    table = crop_shards.CropTable(f"{folder}/crops", rows, spec.size_vox, spec.in_channels)
    labels = None
    if spec.cluster_sizes:
        of_crops = [r["labels_NZ"].astype(np.int16).view(np.uint16) for r in raw]
        rows = Rows.of(crop_shards.write_shard(f"{folder}/labels", "plan", of_crops), crop_shards.CropRef)
        shape = len(spec.cluster_sizes), spec.size_vox[2]
        labels = crop_shards.LabelTable(f"{folder}/labels", rows, *shape)
    method = cfg.method.resolve(methods.config, "method")
    return TrainingDataset(method.name, method.config, SampleSchedule(CROPS, 1, 0), table, labels)


def synthetic_cases(cfg: Finetuning, work: Work, folder: str) -> LabelledDataset:
    """Prepared scans of noise, as large as a crop, with random labels."""
    spec, rng, refs = work.facts, seeding.rng(0, "plan", "crops"), []
    for i in range(CROPS):
        raw = memory.raw_sample(spec, rng)
        image = prepared_scans.image_file(f"plan-{i}", raw["image_CXYZ"])
        labels = prepared_scans.labels_file(f"plan-{i}", raw["labels_XYZ"])
        files = (
            prepared_scans.write(f"{folder}/{kind}/{i}", blob)
            for kind, blob in (("images", image), ("labels", labels))
        )
        refs.append(prepared_scans.ref_of(f"plan-{i}", *files))
    names = tuple(class_names(cfg.data))
    regions = dict(zip(cfg.data.regions, spec.regions))
    table = prepared_scans.Table(tuple(refs), names, tuple(range(len(names))), regions=regions)
    method = cfg.method.resolve(methods.config, "method")
    everyone = tuple(range(CROPS))
    return LabelledDataset(
        method.name, method.config, SampleSchedule(CROPS, 1, 0), table, everyone, (), cfg.crops
    )


def timed(fn: Callable[[int], Any], budget_s: float, least: int = 3) -> float:
    """Median seconds of ``fn(1)``, ``fn(2)``... after ``fn(0)`` as a warm-up, until the budget is spent."""
    out: list[float] = []
    begun = time.perf_counter()
    while len(out) < least or time.perf_counter() - begun < budget_s:
        before = time.perf_counter()
        fn(len(out))
        out.append(time.perf_counter() - before)
    return float(np.median(out[1:]))


class _Task:
    """Measures what data tasks do; ``seconds`` for each of four measurements.

    Args:
        crop_bytes: stored bytes of a sample's crops.
    """

    def __init__(
        self,
        crops: cropping.Config,
        crop_bytes: int,
        folder: str,
        seconds: float,
        scans: Sequence[manifest.Source],
    ):
        self.crops, self.crop_bytes, self.folder = crops, crop_bytes, folder
        self.seconds, self.scans = seconds, list(scans)

    def __call__(self, dataset: TrainingDataset | LabelledDataset) -> dict[str, float]:
        task_bytes = float(psutil.Process().memory_info().rss)
        crop_s = timed(lambda i: dataset.rows([(i, i % CROPS)]), self.seconds)
        prepare = {"task_bytes": task_bytes, "prepare_bytes_s": self.crop_bytes / crop_s}
        return prepare | self._store() | self._decode()

    def _store(self) -> dict[str, float]:
        """Write one object at a time, and read as many at once as the node has cores."""
        blob, cores = seeding.rng(0, "plan").bytes(OBJECT_BYTES), os.cpu_count() or 1
        uris = [object_store.join(self.folder, f"object-{i}") for i in range(2 * cores)]
        count = len(uris)
        write_s = timed(lambda i: object_store.write(uris[i % count], blob), self.seconds, least=count + 1)
        with ThreadPoolExecutor(count) as pool:
            read_s = timed(lambda _: list(pool.map(object_store.read, uris)), self.seconds)
        rates = {"store_write_bytes_s": OBJECT_BYTES / write_s}
        return rates | {"store_node_bytes_s": count * OBJECT_BYTES / read_s}

    def _decode(self) -> dict[str, float]:
        """Import scans and cut them, or a phantom where there are none."""
        cfg, sources = replace(self.crops, min_image_share=0.0), self.scans
        if not sources:
            side = max(96, 32 * -(-max(cfg.size_vox) // 32))
            phantom.write_dataset(f"{self.folder}/scans", 1, size_vox=(side, side, side))
            sources = importers.sources(f"{self.folder}/scans/imagesTr/")
        import_s = cut_s = voxels = 0.0
        for source in sources:
            begun = time.perf_counter()
            row = manifest.inspect(source)
            inspected = time.perf_counter()
            if isinstance(row, manifest.Scan) and import_s + cut_s < self.seconds:
                cropping.crops_of(manifest.load(row), row.modality, cfg, row.scan_id)
                cut_s += time.perf_counter() - inspected
                import_s += inspected - begun
                voxels += row.num_channels * math.prod(row.shape)
        if not voxels:
            what = f"none of the first {len(sources)} scans can be read, the first being {sources[0].uri}"
            raise UserError(f"{what}; 'logonet data check' says why")
        return {"import_voxels_s": voxels / import_s, "cut_voxels_s": voxels / cut_s}
