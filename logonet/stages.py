"""The stages of pretraining, each an artifact: scans -> manifest -> crops -> clusterers -> labels -> pretrain.

A stage is addressed by what it is made of: its config and its parents' fingerprints. Where its
``manifest.json`` lies it is finished and returns at once; where it does not, it goes on with what an
interrupted run left. So the same command twice computes nothing twice, and a sweep's trials share
everything upstream of what they vary.

Shapes: P crops, N clusterers, Z slices of a crop.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from logonet import (
    artifacts,
    backbones,
    cluster,
    clusterers,
    config,
    crops,
    data,
    importers,
    leaks,
    manifest,
    methods,
    registry,
    report,
    splits,
    store,
    train,
    transfer,
)
from logonet.artifacts import Artifact
from logonet.cluster import Resources, Share
from logonet.errors import UserError
from logonet.methods import Facts
from logonet.store import Stored
from logonet.volume import from_uint16

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pretraining:
    """Everything that decides what a pretraining run computes. ``jobs/recipes.py`` names full ones.

    ``split`` leaves out the scans that it puts into test and validation sets: give the finetuning's own split where
    both stand on one dataset. None uses every scan.
    """

    split: splits.Config | None = None
    crops: crops.Config = field(default_factory=crops.Config)
    clusterers: clusterers.Config = field(default_factory=clusterers.Config)
    backbone: dict[str, Any] = field(default_factory=lambda: {"name": "logonet"})
    method: dict[str, Any] = field(default_factory=lambda: {"name": "masked_clusters"})
    train: train.Config = field(default_factory=train.Config)


def resolve(cfg: Pretraining) -> Pretraining:
    """``cfg`` with the named backbone's and method's defaults written out, checked as far as config goes.

    Raises:
        UserError: an unknown name or key, a crop the network cannot take, a chain longer than the crop...
    """
    b, m = dict(cfg.backbone), dict(cfg.method)
    for part, section in ((b, "backbone"), (m, "method")):
        if "name" not in part:
            raise UserError(f"config section '{section}' has no name; set {section}.name")
    b_name, m_name = b.pop("name"), m.pop("name")
    b_cfg, m_cfg = backbones.config(b_name, b), methods.config(m_name, m)
    backbones.check_size(b_name, b_cfg, cfg.crops.size_vox)
    counts = tuple(clusterers.cluster_counts(cfg.clusterers)) if _pseudo(m_name) else ()
    methods.check(m_name, m_cfg, Facts(size_vox=cfg.crops.size_vox, cluster_sizes=counts))
    backbone = {"name": b_name, **config.to_dict(b_cfg)}
    train.dry_run(backbone, cfg.train, Facts(size_vox=cfg.crops.size_vox))
    return Pretraining(
        split=cfg.split,
        crops=cfg.crops,
        clusterers=cfg.clusterers,
        backbone=backbone,
        method={"name": m_name, **config.to_dict(m_cfg)},
        train=cfg.train,
    )


def _pseudo(method_name: str) -> bool:
    return "pseudo_labels" in methods.needs(method_name)


def say(stage: str, text: str) -> None:
    """One line of a job's log."""
    print(f"{stage:<11} {text}", flush=True)


# --------------------------------------------------------------------------------------------- upstream


def import_scans(source: str, root: str, share: Share) -> tuple[manifest.Manifest, Artifact]:
    """The manifest of everything at ``source``: a prefix, an MSD dataset.json or a DICOM series folder."""
    sources = importers.sources(source)
    # Versions (ETags, modification times) stand in for content until it is read: an unchanged listing is not
    # read again, and a replaced scan gives a new manifest.
    listed = [asdict(s) for s in sources]
    cfg = {"source": source, "listing": config.fingerprint(listed), "scans": len(sources)}
    uri, fingerprint = artifacts.address(root, "manifest", cfg, {})
    if (found := artifacts.find(uri)) is not None:
        table = manifest.Manifest.from_parquet(found.read("scans.parquet"), found.read("quarantine.parquet"))
        say("manifest", f"{table.summary()}  (already there: {uri})")
        return _usable(table, source, uri), found
    started = time.monotonic()
    table = manifest.Manifest.of(data.inspect_scans(sources, share))
    files = {
        "scans.parquet": store.write(store.join(uri, "scans.parquet"), table.scans_parquet()),
        "quarantine.parquet": store.write(store.join(uri, "quarantine.parquet"), table.quarantine_parquet()),
        "quarantine.csv": store.write(store.join(uri, "quarantine.csv"), table.quarantine_csv()),
    }
    facts = {"id": table.id, "scans": len(table.scans), "quarantined": len(table.quarantined)}
    artifact = artifacts.commit(
        uri, "manifest", fingerprint, config=cfg, parents={}, files=files, facts=facts
    )
    say("manifest", f"{table.summary()}  {took(started)}  {uri}")
    for bad in table.quarantined:
        say("", f"quarantined: {bad.reason}")
    return _usable(table, source, uri), artifact


def _usable(table: manifest.Manifest, source: str, uri: str) -> manifest.Manifest:
    if not table.scans:
        raise UserError(
            f"none of the {len(table.quarantined)} scans at {source} can be used; the reasons are in "
            f"{uri}/quarantine.csv"
        )
    return table


def make_crops(
    table: manifest.Manifest, cfg: crops.Config, root: str, share: Share
) -> tuple[data.CropTable, Artifact]:
    """Random crops of every scan, stored as uint16; the parent is the manifest's content, not its place."""
    own, parents = config.to_dict(cfg), {"manifest": table.id}
    uri, fingerprint = artifacts.address(root, "crops", own, parents)
    found = artifacts.find(uri)
    if found is None:
        started = time.monotonic()
        refs, bad = data.cut_scans(list(table.scans), cfg, uri, share)
        for q in bad:
            say("", f"quarantined: {q.reason}")
        if not refs:
            raise UserError(
                f"no scan gave a crop of {'x'.join(map(str, cfg.size_vox))} voxels (the first says: "
                f"{bad[0].reason}); use a smaller crops.size_vox or lower crops.min_image_share"
            )
        crop_table = data.CropTable(uri, cfg.size_vox, 1, tuple(refs))
        files = {
            "crops.parquet": store.write(store.join(uri, "crops.parquet"), crop_table.to_parquet()),
            "quarantine.json": store.write_json(
                store.join(uri, "quarantine.json"), [{"uri": q.uri, "reason": q.reason} for q in bad]
            ),
        }
        facts = {"crops": len(refs), "in_channels": 1, "quarantined": len(bad)}
        found = artifacts.commit(
            uri, "crops", fingerprint, config=own, parents=parents, files=files, facts=facts
        )
        say("crops", f"{len(refs)} crops of {len(table.scans) - len(bad)} scans  {took(started)}  {uri}")
        return crop_table, found
    crop_table = data.CropTable.open(found)
    say("crops", f"{len(crop_table)} crops  (already there: {uri})")
    return crop_table, found


def make_clusterers(
    table: data.CropTable, parent: Artifact, cfg: clusterers.Config, root: str, share: Share
) -> Artifact:
    """N K-means clusterers fitted on slices of the crops; they are read back only where labels are missing."""
    own, parents = config.to_dict(cfg), {"crops": parent.fingerprint}
    uri, fingerprint = artifacts.address(root, "clusterers", own, parents)
    if (found := artifacts.find(uri)) is not None:
        say("clusterers", f"{found.facts['n']} clusterers {found.facts['id']}  (already there: {uri})")
        return found
    started = time.monotonic()
    slices_ST = data.sample_slices(table, cfg.max_slices, cfg.seed, share)
    say("clusterers", f"fitting {cfg.n} on {len(slices_ST):,} slices of {slices_ST.shape[1]:,} voxels")
    fits = data.fit_clusterers(slices_ST, cfg, uri, share, note=_note_quarters)
    fitted = clusterers.ClustererSet.from_fitted(fits, meta={"config": own, "crops": parent.fingerprint})
    files = {CLUSTERERS_FILE: store.write(store.join(uri, CLUSTERERS_FILE), fitted.to_bytes())}
    facts = {"id": fitted.id, "n": len(fitted.sizes_N), "slices": len(slices_ST), **fitted.summary()}
    files["clusterers.json"] = store.write_json(store.join(uri, "clusterers.json"), {**facts, "config": own})
    artifact = artifacts.commit(
        uri, "clusterers", fingerprint, config=own, parents=parents, files=files, facts=facts
    )
    store.delete_prefix(store.join(uri, "fits"))  # the parts of what is now committed whole
    say("clusterers", f"{cfg.n} clusterers {fitted.id}  {took(started)}  {uri}")
    return artifact


CLUSTERERS_FILE = "clusterers.safetensors"


def _note_quarters(done: int, total: int) -> None:
    if done % -(-total // 4) == 0 and done < total:
        say("clusterers", f"fitted {done}/{total}")


def make_labels(
    table: data.CropTable, crops_artifact: Artifact, clusterers_artifact: Artifact, root: str, share: Share
) -> tuple[np.ndarray, Artifact]:
    """Every clusterer's pseudo-label of every slice of every crop: int16 (P, N, Z)."""
    from safetensors.numpy import load, save

    parents = {a.stage: a.fingerprint for a in (crops_artifact, clusterers_artifact)}
    uri, fingerprint = artifacts.address(root, "labels", {}, parents)
    if (found := artifacts.find(uri)) is not None:
        labels_PNZ = load(found.read(LABELS_FILE))["labels_PNZ"]
        say("labels", f"{labels_PNZ.size:,} pseudo-labels  (already there: {uri})")
        return labels_PNZ, found
    started = time.monotonic()
    fitted = clusterers.ClustererSet.from_bytes(clusterers_artifact.read(CLUSTERERS_FILE))
    labels_PNZ = data.label_crops(table, fitted, share)
    majority, floor = clusterers.majority(labels_PNZ, fitted.sizes_N)
    files = {LABELS_FILE: store.write(store.join(uri, LABELS_FILE), save({"labels_PNZ": labels_PNZ}))}
    facts = {
        "majority_labels": majority.tolist(),
        "majority_share": floor.tolist(),
        "cluster_sizes": fitted.sizes_N.tolist(),
        "clusterers": fitted.id,
    }
    artifact = artifacts.commit(
        uri, "labels", fingerprint, config={}, parents=parents, files=files, facts=facts
    )
    say("labels", f"{labels_PNZ.size:,} pseudo-labels  {took(started)}  {uri}")
    return labels_PNZ, artifact


LABELS_FILE = "labels.safetensors"


# --------------------------------------------------------------------------------------------- pretrain


@dataclass(frozen=True)
class Upstream:
    """What a training run stands on.

    Attributes:
        crops: the samples.
        labels_PNZ: their pseudo-labels, or None for a method that needs none.
        facts: what the method may know of them.
        parent: the artifact trained on.
        lineage: fingerprints and ids, from the scans on.
        seen: the scans that gave crops, without names, for leak checks (`leaks.seen`).
    """

    crops: data.CropTable
    labels_PNZ: np.ndarray | None
    facts: Facts
    parent: Artifact
    lineage: dict[str, str]
    seen: bytes


def upstream(cfg: Pretraining, source: str, root: str, share: Share) -> Upstream:
    """Manifest, crops and, where the method needs them, clusterers and pseudo-labels."""
    table, _ = import_scans(source, root, share)
    table = training_part(table, cfg.split)
    crop_table, crops_artifact = make_crops(table, cfg.crops, root, share)
    facts = Facts(size_vox=cfg.crops.size_vox, in_channels=crop_table.in_channels)
    lineage = {"manifest": table.id, "crops": crops_artifact.fingerprint}
    cut = {ref.scan_id for ref in crop_table.refs}
    seen = leaks.seen([s for s in table.scans if s.scan_id in cut], "pretraining")
    if not _pseudo(cfg.method["name"]):
        return Upstream(crop_table, None, facts, crops_artifact, lineage, seen)
    fitted = make_clusterers(crop_table, crops_artifact, cfg.clusterers, root, share)
    labels_PNZ, labels = make_labels(crop_table, crops_artifact, fitted, root, share)
    facts = replace(
        facts,
        cluster_sizes=tuple(labels.facts["cluster_sizes"]),
        majority_labels=tuple(labels.facts["majority_labels"]),
    )
    lineage |= {"clusterers": fitted.facts["id"], "labels": labels.fingerprint}
    return Upstream(crop_table, labels_PNZ, facts, labels, lineage, seen)


def training_part(table: manifest.Manifest, cfg: splits.Config | None) -> manifest.Manifest:
    """``table`` without the test and validation scans of ``cfg`` (all of it when that is None)."""
    if cfg is None:
        return table
    split = splits.make(table.scans, cfg)
    held_out = {*split.test, *split.val}
    kept = tuple(s for s in table.scans if s.scan_id not in held_out)
    say("split", f"{split.describe()}; pretraining on {len(kept)} scans, without test and validation")
    return replace(table, scans=kept)


def pretrain(cfg: Pretraining, source: str, root: str, resources: Resources, experiment: str) -> Artifact:
    """All stages from scans at ``source`` to a pretrained network under ``root``. Run again, it resumes."""
    cfg = resolve(cfg)
    train.accumulation(cfg.train, resources.workers)
    share = cluster.share(resources)
    up = upstream(cfg, source, root, share)
    crop_table, labels_PNZ, lineage = up.crops, up.labels_PNZ, up.lineage
    own = {"backbone": cfg.backbone, "method": cfg.method, "train": config.to_dict(cfg.train)}
    parents = {up.parent.stage: up.parent.fingerprint}
    uri, fingerprint = artifacts.address(root, "pretrain", own, parents)
    name = f"pretrain-{cfg.method['name']}-{cfg.backbone['name']}-{fingerprint[:8]}"
    method_cfg = methods.config(cfg.method["name"], options(cfg.method))
    order = data.Order(len(crop_table), cfg.train.global_batch, cfg.train.seed)
    feed = data.Feed(crop_table, labels_PNZ, cfg.method["name"], method_cfg, order)
    tracking = tracking_of("pretrain", name, fingerprint, cfg, lineage, root, experiment)
    found = artifacts.find(uri)
    if found is not None:
        say("pretrain", f"already done: {uri}")
        catch_up(tracking, uri, found)
        return found
    # Before any hour is spent: what this run will save is what finetuning will be able to load.
    handover = transfer.prove(cfg.backbone, up.facts.in_channels)
    say("handover", handover.summary())
    started = time.monotonic()
    pictures = _pictures(feed, labels_PNZ, cfg, crop_table)
    job = train.Job(
        uri=uri,
        fingerprint=fingerprint,
        backbone=cfg.backbone,
        method=cfg.method,
        train=cfg.train,
        facts=up.facts,
        tracking=tracking,
        progress=sys.stdout.isatty(),
        files={**pictures, "config.yaml": config.to_yaml(cfg).encode()},
    )
    say("pretrain", f"{name} on {len(crop_table)} crops, {order.steps_per_epoch} steps an epoch  {uri}")
    result = train.fit(job, feed, resources, share)
    history = result["history"]
    pictures["curves.png"] = report.curves(history)
    page = report.run_page(name, _sections(cfg, pictures, lineage, uri)).encode()
    files = {k: Stored(**v) for k, v in result["files"].items()}
    for file, content in {**job.files, **pictures, "report.html": page, SEEN_FILE: up.seen}.items():
        files[file] = store.write(store.join(uri, file), content)
    artifact = artifacts.commit(
        uri,
        "pretrain",
        fingerprint,
        config=config.to_dict(cfg),
        parents={**parents, **lineage},
        files=files,
        facts={"final": history[-1], "steps": history[-1]["step"], "tracked": result["tracked"]},
    )
    catch_up(tracking, uri, artifact)
    last = history[-1]
    say("pretrain", f"done, loss {last['loss']:.4f}  {took(started)}  {uri}/report.html")
    return artifact


SEEN_FILE = "seen.parquet"


def tracking_of(
    stage: str,
    name: str,
    fingerprint: str,
    cfg: Any,
    lineage: dict[str, str],
    root: str,
    experiment: str,
) -> dict[str, Any]:
    """What `registry.Tracker` is to know of a run."""
    return {
        "fingerprint": fingerprint,
        "experiment": experiment,
        "run_name": name,
        "params": config.to_dict(cfg),
        "tags": {
            "logonet.stage": stage,
            "logonet.git_commit": registry.git_commit(os.path.dirname(os.path.dirname(__file__))),
            "logonet.command": registry.command_line(sys.argv),
            **{f"logonet.{k}": v for k, v in lineage.items()},
        },
        "artifact_root": store.join(root, "mlflow-artifacts"),
    }


def catch_up(tracking: dict[str, Any], uri: str, artifact: Artifact) -> None:
    """Bring MLflow up to date from the run's own records, once; until the server was there, at every call."""
    delivered = store.join(uri, "tracked.json")
    if store.exists(delivered):
        return
    history = json.loads(artifact.read("history.json"))
    files = {n: artifact.read(n) for n in artifact.files if n.endswith((".png", ".yaml", ".html"))}
    if registry.catch_up(**tracking, history=history, files=files):
        store.write_json(delivered, {"run": tracking["run_name"], "experiment": tracking["experiment"]})
        say("mlflow", f"run '{tracking['run_name']}' in experiment '{tracking['experiment']}'")
    else:
        say(
            "mlflow", "the tracking server is away; the run is complete and the same command catches up later"
        )


def options(part: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in part.items() if k != "name"}


def _pictures(
    feed: data.Feed, labels_PNZ: np.ndarray | None, cfg: Pretraining, table: data.CropTable
) -> dict[str, bytes]:
    """What the run is asked to learn, before it starts: a masked chain and a sheet of clusters."""
    if labels_PNZ is None:
        return {}
    shown = feed.sample(0, 0)
    pictures = {}
    if "chain" in shown:
        pictures["masked_chain.png"] = report.chain_picture(
            from_uint16(shown["image"]),
            shown["hidden"],
            shown["chain"],
            shown["patch_size"],
            shown["labels"],
        )
    pictures["clusters.png"] = cluster_sheet(table, labels_PNZ, which=0, seed=cfg.train.seed)
    return pictures


def cluster_sheet(table: data.CropTable, labels_PNZ: np.ndarray, which: int, seed: int) -> bytes:
    """A contact sheet of clusterer ``which``: slices of at most 64 crops, a row for each big cluster."""
    chosen = np.linspace(0, len(table) - 1, min(64, len(table))).astype(int)
    slices_SXY = np.concatenate([np.moveaxis(table.read(int(i))[0], -1, 0) for i in chosen])
    labels_S = labels_PNZ[chosen, which].reshape(-1)
    k = int(labels_PNZ[:, which].max()) + 1
    exemplars = clusterers.exemplars(labels_S, k, per_code=8, seed=seed)
    title = f"Clusterer {which}: slices that share a pseudo-label"
    return report.contact_sheet(from_uint16(slices_SXY), labels_S, k, exemplars, title)


def _sections(
    cfg: Pretraining, pictures: dict[str, bytes], lineage: dict[str, str], uri: str
) -> list[tuple[str, Any]]:
    sections: list[tuple[str, Any]] = [("Training", pictures["curves.png"])]
    if "masked_chain.png" in pictures:
        sections.append(("A masked chain of slices and its pseudo-labels", pictures["masked_chain.png"]))
    if "clusters.png" in pictures:
        sections.append(("What one clusterer calls alike", pictures["clusters.png"]))
    sections.append(("Lineage", "".join(f"<p><b>{k}</b> <code>{v}</code></p>" for k, v in lineage.items())))
    sections.append(("Config", f"<pre>{config.to_yaml(cfg)}</pre><p>Artifact: <code>{uri}</code></p>"))
    return sections


def took(started: float) -> str:
    return f"{time.monotonic() - started:.1f} s"
