"""Pretraining: everything upstream, then the network, its report and its MLflow run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from logonet import methods, networks, reporting, training
from logonet.clustering import kmeans, quality
from logonet.clustering.pseudo_labels import Labeller
from logonet.core import config
from logonet.core.config import Component
from logonet.data import classes, crop_shards, cropping, manifest, prepared_scans, provenance, splits
from logonet.data.volume import from_uint16
from logonet.inference.load import SEEN_FILE
from logonet.methods import DataSpec
from logonet.pipelines.preparation import (
    CLUSTERERS_FILE,
    import_scans,
    make_cases,
    make_clusterers,
    make_crops,
    make_labels,
    make_scans,
    some_crops,
)
from logonet.pipelines.stage import Made, Run, StageExecutor, Trial, last_loss, page, run_tracked, say
from logonet.storage.artifacts import Artifact
from logonet.storage.object_store import Stored
from logonet.storage.parquet import Rows
from logonet.training import linear_probe, weight_transfer
from logonet.training.dataset import FreshCrops, TrainingDataset
from logonet.training.schedule import SampleSchedule

# Of the report's pictures.
TITLES = {
    "curves.png": "Training",
    "masked_chain.png": "A masked chain of slices and its pseudo-labels",
    "clusters.png": "What one clusterer calls alike",
}


@dataclass(frozen=True)
class Pretraining:
    """Everything that decides what a pretraining run computes. ``logonet/recipes`` names full ones.

    ``split`` leaves out the scans that it puts into test and validation sets: give the finetuning's own split where
    both stand on one dataset. None uses every scan. ``probe`` measures the encoder on a few labelled cases while it
    trains, fitting on the split's training cases and judging on its validation cases; None does not. ``data`` is about
    the labels of these.
    """

    data: classes.Config = field(default_factory=classes.Config)
    split: splits.Config | None = None
    crops: cropping.Config = field(default_factory=cropping.Config)
    clusterers: kmeans.Config = field(default_factory=kmeans.Config)
    backbone: Component = Component("logonet")
    method: Component = Component("masked_clusters")
    train: training.Config = field(default_factory=training.Config)
    probe: linear_probe.Config | None = None

    def __post_init__(self) -> None:
        Component.convert(self, "backbone", "method")


def resolve(cfg: Pretraining) -> Pretraining:
    """``cfg`` with the named backbone's and method's defaults written out, checked as far as config goes.

    Raises:
        UserError: an unknown name or key, a crop the network cannot take, a chain longer than the crop...
    """
    backbone = cfg.backbone.resolve(networks.config, "backbone")
    method = cfg.method.resolve(methods.config, "method")
    counts = tuple(kmeans.cluster_counts(cfg.clusterers)) if _pseudo(method.name) else ()
    data_spec = DataSpec(size_vox=cfg.crops.size_vox, cluster_sizes=counts, batch_size=cfg.train.batch_size)
    methods.check(method.name, method.config, data_spec)
    training.dry_run(backbone, method, data_spec)
    return replace(cfg, backbone=backbone, method=method)


def _pseudo(method_name: str) -> bool:
    return "pseudo_labels" in methods.needs(method_name)


@dataclass(frozen=True)
class Upstream:
    """What a training run stands on.

    Attributes:
        crops: the fixed pool of crops, which clusterers are fitted on; where fresh crops are labelled, those of the
            pool that are labelled too.
        labels: their pseudo-labels, or None for a method that needs none.
        data_spec: what the method may know of them.
        parent: the artifact trained on.
        lineage: fingerprints and ids, from the scans on.
        seen: the scans that gave crops, without names, for leak checks (`seen`).
        probe: labelled cases to measure the encoder on, or None.
        scans: prepared scans to cut fresh crops of; None where the pool is trained on.
        labeller: gives that of fresh crops, which takes a while to build.
    """

    crops: crop_shards.CropTable
    labels: crop_shards.LabelTable | None
    data_spec: DataSpec
    parent: Artifact
    lineage: dict[str, str]
    seen: bytes
    probe: linear_probe.Task | None = None
    scans: Rows[prepared_scans.Ref] | None = None
    labeller: Callable[[], Labeller] | None = None


def upstream(
    cfg: Pretraining, source: str, root: str, executor: StageExecutor, labelled: str = ""
) -> Upstream:
    """Manifest, crops and, where they are needed, clusterers, pseudo-labels and cases to probe on."""
    scans, _ = import_scans(source, root, executor, cfg.data.channels)
    table = training_part(scans, cfg.split)
    crop_table, crops_artifact = make_crops(table, cfg.crops, root, executor)
    data_spec = DataSpec(
        size_vox=cfg.crops.size_vox, in_channels=crop_table.in_channels, batch_size=cfg.train.batch_size
    )
    lineage = {"manifest": table.id, "crops": crops_artifact.fingerprint}
    cut = set(crop_table.refs.column("scan_id"))
    known = provenance.to_bytes([s for s in table.scans if s.scan_id in cut], "pretraining")
    task = None
    if cfg.probe is not None:
        if labelled and labelled != source:
            scans, _ = import_scans(labelled, root, executor, cfg.data.channels)
        task, lineage["probe_cases"] = probe_cases(cfg, cfg.probe, scans, root, executor)
    refs = None
    if cfg.data.fresh_crops:
        kept = replace(table, scans=tuple(s for s in table.scans if s.scan_id in cut))
        refs, lineage["prepared"] = make_scans(kept, cfg.crops, root, executor)
    if not _pseudo(cfg.method.name):
        return Upstream(crop_table, None, data_spec, crops_artifact, lineage, known, task, refs)
    fitted = make_clusterers(crop_table, crops_artifact, cfg.clusterers, root, executor)

    @functools.cache
    def labeller() -> Labeller:
        return Labeller(kmeans.ClustererSet.from_bytes(fitted.read(CLUSTERERS_FILE)))

    if refs is not None:
        crop_table = some_crops(crop_table)
    labels, artifact = make_labels(crop_table, crops_artifact, fitted, labeller, root, executor)
    sizes, majority = (tuple(artifact.facts[key]) for key in ("cluster_sizes", "majority_labels"))
    data_spec = replace(data_spec, cluster_sizes=sizes, majority_labels=majority)
    lineage |= {
        "clusterers": fitted.facts["id"],
        "clusterers_uri": fitted.uri,
        "labels": artifact.fingerprint,
    }
    return Upstream(crop_table, labels, data_spec, artifact, lineage, known, task, refs, labeller)


def probe_cases(
    cfg: Pretraining, own: linear_probe.Config, table: manifest.Manifest, root: str, executor: StageExecutor
) -> tuple[linear_probe.Task, str]:
    """Labelled cases to fit and judge the probe's head on, and the fingerprint of where they lie."""
    split = splits.make(table.scans, cfg.split or splits.Config())
    # As finetuning prepares them, so that both share one artifact.
    same = prepared_scans.Config.of(cfg.crops)
    cases_table, artifact = make_cases(table, split.test + split.excluded, same, cfg.data, root, executor)
    task = linear_probe.task(own, cases_table, split.train, split.val, cfg.crops.size_vox)
    return task, artifact.fingerprint


def training_part(table: manifest.Manifest, cfg: splits.Config | None) -> manifest.Manifest:
    """``table`` without the test and validation scans of ``cfg`` (all of it when that is None)."""
    if cfg is None:
        return table
    split = splits.make(table.scans, cfg)
    by_id = {s.scan_id: s for s in table.scans}
    held_out = {*split.test, *split.val, *split.excluded}
    # Whole subjects: an unlabelled scan of a test subject is no scan to pretrain on.
    subjects = {(by_id[i].dataset, by_id[i].subject) for i in (*split.test, *split.val) if by_id[i].subject}
    kept = tuple(
        s for s in table.scans if s.scan_id not in held_out and (s.dataset, s.subject) not in subjects
    )
    say("split", f"{split.describe()}; pretraining on {len(kept)} scans, without test and validation")
    return replace(table, scans=kept)


def pretrain(
    cfg: Pretraining,
    source: str,
    root: str,
    executor: StageExecutor,
    experiment: str | None,
    *,
    labelled: str = "",
    trial: Trial | None = None,
) -> Artifact:
    """All stages from scans at ``source`` to a pretrained network under ``root``. Run again, it resumes.

    Args:
        labelled: labelled scans for ``cfg.probe``; empty for those of ``source``.
        trial: of the sweep that the run is a trial of.
    """
    cfg = resolve(cfg)
    executor.check(cfg.train, cfg.method)
    up = upstream(cfg, source, root, executor, labelled)
    lineage = up.lineage
    own = {"backbone": cfg.backbone, "method": cfg.method, "train": cfg.train.identity()}
    if up.probe is not None:
        own["probe"] = {**config.to_dict(up.probe.cfg), "cases": lineage["probe_cases"]}
    parents = {up.parent.stage: up.parent.fingerprint}
    if up.scans is not None:
        parents["prepared"] = lineage["prepared"]

    def make(run: Run) -> Made:
        # Before any hour is spent: what this run will save is what finetuning will be able to load.
        net = networks.from_component(cfg.backbone, up.data_spec.in_channels, num_classes=2)
        handover = weight_transfer.prove(cfg.backbone, up.data_spec.in_channels, 3, net.state_dict())
        share = f"{handover.encoder_share:.0%}"
        say("handover", f"{share} of the encoder's parameters arrive in a segmentation network")
        dataset = dataset_of(cfg, up)
        pictures = _pictures(dataset, up, cfg)
        files: dict[str, bytes] = {**pictures, "config.yaml": config.to_yaml(cfg).encode()}
        what = (cfg.backbone, cfg.method, cfg.train, up.data_spec)
        job = training.Job(run.uri, run.fingerprint, *what, run.tracking, dict(files), probe=up.probe)
        steps = f"{dataset.schedule.steps_per_epoch} steps an epoch"
        on = f"fresh crops of {len(up.scans)} scans" if up.scans is not None else f"{len(up.crops)} crops"
        say("pretrain", f"{run.name} on {on}, {steps}  {run.uri}")
        result = executor.train(job, dataset)
        history = result["history"]
        pictures["curves.png"] = reporting.curves(history)
        files |= {**pictures, SEEN_FILE: up.seen}
        sections = [(title, pictures[name]) for name, title in TITLES.items() if name in pictures]
        files["report.html"] = page(run, sections, lineage, "pretraining", config.to_yaml(cfg))
        metadata = {"final": history[-1], "steps": history[-1]["step"], "tracked": result["tracked"]}
        return Made({**{k: Stored(**v) for k, v in result["files"].items()}, **files}, metadata)

    label = f"pretrain-{cfg.method.name}-{cfg.backbone.name}"
    return run_tracked(
        root, "pretrain", label, cfg, own, parents, lineage, make, last_loss, experiment, trial
    )


def dataset_of(cfg: Pretraining, up: Upstream) -> TrainingDataset | FreshCrops:
    """What the run trains on: fresh crops of the prepared scans, or the fixed pool."""
    method = cfg.method.name, cfg.method.config
    if up.scans is None:
        return TrainingDataset(*method, SampleSchedule.of(len(up.crops), cfg.train), up.crops, up.labels)
    schedule = SampleSchedule.of(len(up.scans) * cfg.crops.per_scan, cfg.train)
    labeller = None if up.labeller is None else up.labeller()
    return FreshCrops(*method, schedule, up.scans, cfg.crops, labeller)


def _pictures(dataset: TrainingDataset | FreshCrops, up: Upstream, cfg: Pretraining) -> dict[str, bytes]:
    """What the run is asked to learn, before it starts: a masked chain and a sheet of clusters."""
    if up.labels is None:
        return {}
    shown = dataset.rows([(0, 0)])[0]
    pictures = {}
    if "chain" in shown:
        rest = (shown[key] for key in ("hidden", "chain", "patch_size", "labels"))
        pictures["masked_chain.png"] = reporting.chain_picture(from_uint16(shown["image"]), *rest)
    pictures["clusters.png"] = cluster_sheet(up, which=0, seed=cfg.train.seed)
    return pictures


def cluster_sheet(up: Upstream, which: int, seed: int) -> bytes:
    """A contact sheet of clusterer ``which``: slices of at most 64 crops, a row for each big cluster."""
    assert up.labels is not None
    chosen = np.linspace(0, len(up.crops) - 1, min(64, len(up.crops))).astype(int).tolist()
    slices_SXY = np.concatenate([np.moveaxis(up.crops.read(i)[0], -1, 0) for i in chosen])
    labels_S = np.concatenate([up.labels.read(i)[which] for i in chosen])
    exemplars = quality.exemplars(labels_S, per_code=8, seed=seed)
    title = f"Clusterer {which}: slices that share a pseudo-label"
    k = up.data_spec.cluster_sizes[which]
    return reporting.contact_sheet(from_uint16(slices_SXY), labels_S, k, exemplars, title)
