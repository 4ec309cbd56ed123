"""Small runs that tests of the training loop share; nothing here knows Ray."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import prepared_case, quick_backbone, stored_case, timeless

from logonet import methods, networks, training
from logonet.core.config import Component
from logonet.data import crop_shards, phantom, prepared_scans
from logonet.methods import DataSpec
from logonet.storage import object_store
from logonet.storage.parquet import Rows
from logonet.training import checkpoints, linear_probe
from logonet.training.batches import to_tensors
from logonet.training.dataset import LabelledDataset, TrainingDataset
from logonet.training.local import local_batches
from logonet.training.loop import Interruptions, Loop
from logonet.training.schedule import MicroBatches, SampleSchedule

SIZE = (16, 16, 16)
LARGER = (32, 32, 32)  # what LoGoNet and others need
SIZES = (5, 7)
FACTS = DataSpec(size_vox=SIZE, cluster_sizes=SIZES, majority_labels=(0, 0))
LABELLED_SIZE = (16, 16, 16)
CLASSES = ("background", "liver", "spleen")
LABELLED_FACTS = DataSpec(size_vox=LABELLED_SIZE, num_classes=len(CLASSES))
SUPERVISED = {"augment": {"flip_prob": 0.5}}


class Killed(Exception):
    pass


class LocalLoop(Loop):
    """A loop and what feeds it, in this process."""

    def __init__(self, dataset: TrainingDataset | LabelledDataset, job: training.Job):
        super().__init__(job, dataset.schedule, validation=dataset.validation)
        self.dataset = dataset

    def train(
        self,
        report: Callable[[dict[str, Any]], None] = lambda metrics: None,
        interruptions: Interruptions | None = None,
    ) -> list[dict[str, Any]]:
        self.restore()
        positions = MicroBatches(self.schedule, self.cfg.batch_size, self.step, self.total_steps)
        return self.run(
            to_tensors(local_batches(self.dataset, positions), self.device),
            report,
            interruptions=interruptions,
        )


def crops_dataset(folder: Path, size_vox: tuple[int, int, int] = SIZE) -> TrainingDataset:
    """Six crops with made-up labels."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 1, size_vox[2])
    refs: list[crop_shards.CropRef] = []
    label_refs: list[crop_shards.CropRef] = []
    labels = []
    for n in range(3):
        crops_RCXYZ = []
        for _ in range(2):
            noise = rng.random((1, *size_vox)) * 0.2
            crops_RCXYZ.append(((ramp * rng.uniform(0.4, 0.8) + noise) * 65535).astype(np.uint16))
            labels.append(np.array([np.floor(ramp * (k - 1)) for k in SIZES], np.uint16))
        refs += crop_shards.write_shard(str(folder), f"scan{n}", crops_RCXYZ)
        label_refs += crop_shards.write_shard(f"{folder}/labels", f"scan{n}", labels[-2:])
    table = crop_shards.CropTable(str(folder), Rows.of(refs, crop_shards.CropRef), size_vox, 1)
    rows = Rows.of(label_refs, crop_shards.CropRef)
    label_table = crop_shards.LabelTable(f"{folder}/labels", rows, len(SIZES), size_vox[2])
    cfg = methods.config("masked_clusters", {"phi1": 0.2})
    schedule = SampleSchedule(len(table), 4, seed=0)
    return TrainingDataset("masked_clusters", cfg, schedule, table, label_table)


def labelled_dataset(folder: Path) -> LabelledDataset:
    """Seven phantoms, four to train on and three to validate on."""
    refs = []
    for i in range(7):
        scan, labels_XYZ = phantom.phantom(i, (20, 18, 16), (4.0, 4.0, 6.0), classes=len(CLASSES))
        arrays = prepared_case(scan, labels_XYZ, "CT", prepared_scans.Config(), f"case{i}")
        refs.append(stored_case(folder, f"case{i}", *arrays))
    return LabelledDataset(
        "supervised",
        methods.config("supervised", SUPERVISED),
        SampleSchedule(4, 2, seed=0),
        prepared_scans.Table(tuple(refs), CLASSES, (0, 1, 2)),
        train=(0, 1, 3, 4),
        val=(2, 5, 6),
        crops=prepared_scans.CropSampling(LABELLED_SIZE),
    )


def a_job(uri: str, **settings: Any) -> training.Job:
    values = {
        "epochs": 4,
        "global_batch": 4,
        "batch_size": 2,
        "lr": 3e-3,
        "warmup_epochs": 1,
        "checkpoint_every_s": 0,
    }
    cfg = training.Config(**{**values, **settings})
    return training.Job(uri, "a" * 16, quick_backbone(), {"name": "masked_clusters", "phi1": 0.2}, cfg, FACTS)


def a_job_of(name: str, uri: str, **settings: Any) -> training.Job:
    """On crops of LARGER."""
    facts = dataclasses.replace(FACTS, size_vox=LARGER)
    backbone = {"name": name, **networks.tiny(name)}
    return dataclasses.replace(a_job(uri, **settings), backbone=backbone, data_spec=facts)


def labelled_job(uri: str, init: training.Init | None = None, **settings: Any) -> training.Job:
    values = {"epochs": 4, "global_batch": 2, "lr": 3e-3, "warmup_epochs": 1, "validate_every_epochs": 1}
    values["checkpoint_every_s"] = 0
    cfg = training.Config(**{**values, **settings})
    method = {"name": "supervised", **SUPERVISED}
    return training.Job(uri, "a" * 16, quick_backbone(), method, cfg, LABELLED_FACTS, init=init)


def assert_same_run(loop: Loop, expected: Loop) -> None:
    assert timeless(loop.history) == timeless(expected.history)
    for (name, a), b in zip(expected.method.state_dict().items(), loop.method.state_dict().values()):
        assert torch.equal(a, b), name


def killed_at(monkeypatch: pytest.MonkeyPatch, loop: LocalLoop, at_step: int) -> None:
    """Run ``loop`` until it dies before the step after ``at_step``; its last checkpoint is written."""
    real_step = training.step

    def dying_step(*args: Any, **kwargs: Any) -> Any:
        if loop.step == at_step:
            raise Killed
        return real_step(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr("logonet.training.loop.step", dying_step)
        with pytest.raises(Killed):
            loop.train()
    loop.writer.wait()


def steps_saved(job: training.Job) -> list[int]:
    """Of the checkpoints that are there."""
    return [int(uri.rpartition("-")[2]) for uri in checkpoints.all_of(job.uri)]


def other_weights(folder: str) -> training.Init:
    """Weights that no fresh network has, as a file."""
    torch.manual_seed(99)
    spec = dataclasses.replace(LABELLED_FACTS, num_classes=5)
    net: Any = training.build_method(
        Component.of(quick_backbone(), "backbone"), Component("supervised"), spec
    )
    uri = f"{folder}/backbone.safetensors"
    blob = checkpoints._tensor_bytes(net.backbone.state_dict())
    return training.Init(uri, object_store.write(uri, blob).sha256)


def a_probe(labelled: LabelledDataset) -> linear_probe.Task:
    cfg = linear_probe.Config(
        every_epochs=2, train_cases=2, val_cases=1, crops_per_case=1, voxels_per_crop=300
    )
    ids = [ref.scan_id for ref in labelled.table.refs]
    return linear_probe.task(cfg, labelled.table, ids[:4], ids[4:], SIZE)
