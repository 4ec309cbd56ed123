"""From scans to what training learns from.

    scans -> manifest -> crops -> clusterers -> labels    (pretraining)
                     \\-> cases                           (finetuning, and the probe of pretraining)

Shapes: N clusterers, K codes of one clusterer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from logonet.clustering import fitting, kmeans, quality
from logonet.core import config
from logonet.core.errors import UserError
from logonet.core.execution import Executor, run_all
from logonet.data import classes, crop_shards, cropping, importers, manifest, prepared_scans, preparing
from logonet.data.manifest import Manifest, Quarantined, Scan, Source
from logonet.data.preprocessing import Preprocessing
from logonet.pipelines.stage import Made, open_stage, run_stage, say
from logonet.storage import artifacts, object_store, parquet
from logonet.storage.artifacts import Artifact
from logonet.storage.parquet import Rows

MAX_UNREAD = 32  # scans that a store may withhold before it has given one
MAX_TOLD = 100  # lines about single scans
UNREAD_FILE = "unread.json"
SCANS_FILE = "scans.parquet"
CLUSTERERS_FILE = "clusterers.safetensors"
LABELLED_CROPS = 4000  # of the pool, where training labels the crops that it cuts itself


# ---------------------------------------------------------------------------------------------- manifest


def import_scans(
    source: str, root: str, executor: Executor, channels: Sequence[str] = ()
) -> tuple[Manifest, Artifact]:
    """The manifest of everything at ``source``: a prefix, an MSD dataset.json or a DICOM series folder.

    Args:
        channels: see `importers.survey`.
    """
    survey = importers.survey(source, channels)
    sources = survey.sources
    # Versions (ETags, modification times) stand in for content until it is read: an unchanged listing is not read
    # again, and a replaced scan gives a new manifest.
    listed = [asdict(s) for s in sources]
    cfg: dict[str, Any] = {"source": source, "listing": config.fingerprint(listed), "scans": len(sources)}
    uri, _ = artifacts.address(root, "manifest", cfg, {})
    table = None
    if artifacts.find(uri) is None:
        earlier = object_store.join(uri, UNREAD_FILE)
        answers, waiting = _answers(earlier, sources) if object_store.exists(earlier) else ([], sources)
        answers += inspect_scans(waiting, executor, known=len(answers))
        table = Manifest.of(answers)
        if unread := sorted(a.uri for a in answers if isinstance(a, manifest.Unread)):
            # Used, but not for good: it has an address of its own, and the same command asks for the missing ones
            # again.
            cfg["unread"] = unread
            uri, _ = artifacts.address(root, "manifest", cfg, {})
            object_store.write_json(earlier, {"manifest": uri, "unread": unread})
            say("manifest", f"{len(unread)} scans could not be read; the same command tries them again")
        told = [f"quarantined: {bad.reason}" for bad in table.quarantined] + table.remarks()
        for line in [*filter(None, [survey.told()]), *told[:MAX_TOLD]]:
            say("", line)
        if len(told) > MAX_TOLD:
            say("", f"and {len(told) - MAX_TOLD} more; quarantine.csv has them all")

    def make(uri: str) -> Made:
        assert table is not None
        files = {
            "scans.parquet": table.scans_parquet(),
            "quarantine.parquet": table.quarantine_parquet(),
            "quarantine.csv": table.quarantine_csv(),
            "unused.json": object_store.json_bytes(survey.unused),
        }
        counts = {"id": table.id, "scans": len(table.scans), "quarantined": len(table.quarantined)}
        return Made(files, counts)

    artifact = run_stage(root, "manifest", cfg, {}, make, lambda a: (table or _opened(a)).summary())
    executor.quarantined("manifest", artifact.facts["quarantined"])
    table = table or _opened(artifact)
    if not table.scans:
        raise UserError(
            f"none of the {len(table.quarantined)} scans at {source} can be used; the reasons are in "
            f"{artifact.uri}/quarantine.csv"
        )
    return table, artifact


def inspect_scans(sources: Sequence[Source], executor: Executor, known: int = 0) -> list[Scan | Quarantined]:
    """Read and check every scan; the answers are in the order of ``sources``.

    Args:
        known: how many others of the same import have been read before.

    Raises:
        UserError: for what concerns every scan, such as a store that withholds the first MAX_UNREAD of them.
    """
    read, unread = known, 0

    def note(answer: Scan | Quarantined) -> None:
        nonlocal read, unread
        if not isinstance(answer, manifest.Unread):
            read += 1
            return
        unread += 1
        if not read and unread == min(MAX_UNREAD, len(sources)):
            raise UserError(f"none of the first {unread} scans can be read; the last: {answer.reason}")

    return run_all(executor, manifest.inspect, sources, note=note)


def _answers(uri: str, sources: list[Source]) -> tuple[list[Scan | Quarantined], list[Source]]:
    """What an earlier import of the same listing has found out, and the sources that it could not read."""
    earlier = object_store.read_json(uri)
    if artifacts.find(earlier["manifest"]) is None:
        return [], sources
    table, unread = open_manifest(earlier["manifest"]), set(earlier["unread"])
    kept = [q for q in table.quarantined if q.uri not in unread]
    return [*table.scans, *kept], [s for s in sources if s.uri in unread]


def open_manifest(uri: str) -> Manifest:
    """The table of scans of a finished import, ROOT/manifest/ID. UserError where there is none."""
    return _opened(open_stage(uri, "manifest"))


def _opened(artifact: Artifact) -> Manifest:
    scans, quarantine = artifact.read("scans.parquet"), artifact.read("quarantine.parquet")
    return Manifest.from_parquet(scans, quarantine, artifact.uri)


# ------------------------------------------------------------------------------- crops and pseudo-labels


def make_crops(
    table: Manifest, cfg: cropping.Config, root: str, executor: Executor
) -> tuple[crop_shards.CropTable, Artifact]:
    """Random crops of every scan, stored as uint16; the parent is the manifest's content, not its place."""

    def make(uri: str) -> Made:
        refs, bad = preparing.cut_scans(table.scans, cfg, uri, executor)
        quarantine = _quarantine(bad)
        if not refs:
            raise UserError(
                f"no scan gave a crop of {'x'.join(map(str, cfg.size_vox))} voxels (the first says: "
                f"{bad[0].reason}); use a smaller crops.size_vox or lower crops.min_image_share"
            )
        counts = {ref.num_bytes // (2 * math.prod(cfg.size_vox)) for ref in refs}
        (in_channels,) = one_number_of_channels(counts)
        rows = Rows.of(refs, crop_shards.CropRef)
        files = {crop_shards.CROPS_FILE: rows.to_parquet(), "quarantine.json": quarantine}
        return Made(files, {"crops": len(refs), "in_channels": in_channels, "quarantined": len(bad)})

    own, parents = config.to_dict(cfg), {"manifest": table.id}
    artifact = run_stage(root, "crops", own, parents, make, lambda a: f"{a.facts['crops']} crops")
    executor.quarantined("crops", artifact.facts["quarantined"])
    return crop_shards.CropTable.open(artifact), artifact


def make_scans(
    table: Manifest, cfg: Preprocessing, root: str, executor: Executor
) -> tuple[Rows[prepared_scans.Ref], str]:
    """Every scan, prepared to cut fresh crops of, and the fingerprint of where they lie."""
    own = config.to_dict(prepared_scans.Config.of(cfg)) | {"scans": [s.scan_id for s in table.scans]}

    def make(uri: str) -> Made:
        refs, bad = preparing.prepare_scans(table.scans, None, prepared_scans.Config.of(cfg), root, executor)
        quarantine = _quarantine(bad)
        if not refs:
            raise UserError(
                f"none of the {len(table.scans)} scans can be used; the first says: {bad[0].reason}"
            )
        files = {SCANS_FILE: Rows.of(refs, prepared_scans.Ref).to_parquet(), "quarantine.json": quarantine}
        return Made(files, {"scans": len(refs), "quarantined": len(bad)})

    artifact = run_stage(
        root, "prepared", own, {"manifest": table.id}, make, lambda a: f"{a.facts['scans']} scans"
    )
    executor.quarantined("prepared", artifact.facts["quarantined"])
    where = artifact.uri_of(SCANS_FILE)
    return parquet.from_parquet(artifact.read(SCANS_FILE), prepared_scans.Ref, where), artifact.fingerprint


def one_number_of_channels(counts: set[int]) -> set[int]:
    """``counts``.

    Raises:
        UserError: the scans have several numbers of channels, for which there is no one network.
    """
    if len(counts) > 1:
        several = " and ".join(map(str, sorted(counts)))
        raise UserError(f"scans have {several} channels; give datasets of one number of channels")
    return counts


def _quarantine(bad: Sequence[Quarantined]) -> bytes:
    """quarantine.json of scans that a stage could not use; each is told."""
    for q in bad:
        say("", f"quarantined: {q.reason}")
    return object_store.json_bytes([{"uri": q.uri, "reason": q.reason} for q in bad])


def make_clusterers(
    table: crop_shards.CropTable, parent: Artifact, cfg: kmeans.Config, root: str, executor: Executor
) -> Artifact:
    """N K-means clusterers fitted on slices of the crops; they are read back only where labels are missing."""
    own, parents = config.to_dict(cfg), {"crops": parent.fingerprint}

    def make(uri: str) -> Made:
        slices_ST = fitting.sample_slices(table, cfg.max_slices, cfg.seed, executor)
        say("clusterers", f"fitting {cfg.n} on {len(slices_ST):,} slices of {slices_ST.shape[1]:,} voxels")
        fits = fitting.fit_clusterers(slices_ST, cfg, uri, executor, note=_note_quarters)
        fitted = kmeans.ClustererSet.from_fitted(fits, meta={"config": own, "crops": parent.fingerprint})
        counts = {"n": len(fitted.sizes_N), "slices": len(slices_ST)}
        metadata = {"id": fitted.id, **counts, **fitted.summary()}
        about = object_store.json_bytes({**metadata, "config": own})
        return Made({CLUSTERERS_FILE: fitted.to_bytes(), "clusterers.json": about}, metadata)

    artifact = run_stage(
        root, "clusterers", own, parents, make, lambda a: f"{a.facts['n']} clusterers {a.facts['id']}"
    )
    # The parts of what is now committed whole.
    object_store.delete_prefix(object_store.join(artifact.uri, "fits"))
    return artifact


def _note_quarters(done: int, total: int) -> None:
    if done % -(-total // 4) == 0 and done < total:
        say("clusterers", f"fitted {done}/{total}")


def labelled_scans(num_scans: int, num_crops: int) -> list[int]:
    """Positions of evenly spaced scans that have at most about LABELLED_CROPS of the crops."""
    most = max(1, LABELLED_CROPS * num_scans // num_crops)
    return np.unique(np.linspace(0, num_scans - 1, min(most, num_scans)).round().astype(int)).tolist()


def some_crops(table: crop_shards.CropTable) -> crop_shards.CropTable:
    """The crops of `labelled_scans`."""
    scans = table.by_scan()
    chosen = labelled_scans(len(scans), len(table))
    return table if len(chosen) == len(scans) else table.take([i for n in chosen for i in scans[n]])


def make_labels(
    table: crop_shards.CropTable,
    crops_artifact: Artifact,
    clusterers_artifact: Artifact,
    labeller: Callable[[], Any],
    root: str,
    executor: Executor,
) -> tuple[crop_shards.LabelTable, Artifact]:
    """Every clusterer's pseudo-label of every slice of every crop of ``table``.

    Args:
        table: the crops of ``crops_artifact``, or some of them.
        labeller: gives the `pseudo_labels.Labeller` of the clusterers, which takes a while.
    """
    every = len(table) == crops_artifact.facts["crops"]

    def make(uri: str) -> Made:
        of_clusterers = labeller()
        labels, counts_NK = fitting.label_crops(table, of_clusterers, uri, executor)
        majority, floor = quality.majority(counts_NK)
        metadata = {
            "majority_labels": majority.tolist(),
            "majority_share": floor.tolist(),
            "cluster_sizes": of_clusterers.sizes,
            "clusterers": clusterers_artifact.facts["id"],
        }
        return Made({crop_shards.LABELS_FILE: labels.refs.to_parquet()}, metadata)

    def describe(artifact: Artifact) -> str:
        return f"{len(table) * len(artifact.facts['cluster_sizes']) * table.size_vox[2]:,} pseudo-labels"

    own = {} if every else {"crops": len(table)}
    parents = {a.stage: a.fingerprint for a in (crops_artifact, clusterers_artifact)}
    artifact = run_stage(root, "labels", own, parents, make, describe)
    clusterers = len(artifact.facts["cluster_sizes"])
    return crop_shards.LabelTable.open(artifact, clusterers, table.size_vox[2]), artifact


# ---------------------------------------------------------------------------------------- labelled scans


def make_cases(
    table: Manifest,
    test_ids: tuple[str, ...],
    cfg: prepared_scans.Config,
    chosen: classes.Config,
    root: str,
    executor: Executor,
) -> tuple[prepared_scans.Table, Artifact]:
    """Every labelled scan that is no test case, prepared for training with the ``chosen`` classes."""
    labelled = [s for s in table.scans if s.label_uri]
    scans = [s for s in labelled if s.scan_id not in set(test_ids)]
    known = classes.union(labelled, chosen)
    if absent := classes.absent(labelled, chosen):
        some = ", ".join(absent[:3])
        say("cases", f"{len(absent)} names in data.classes are in no dataset ({some}); others stand for them")
    own = {**config.to_dict(cfg), "label_values": list(known.values), "scans": [s.scan_id for s in scans]}
    if chosen.members:
        own["classes"] = chosen.members
    if known.regions:
        own["regions"] = [list(known.regions.items()), known.region_values]

    def make(uri: str) -> Made:
        refs, bad = preparing.prepare_scans(scans, known, cfg, root, executor)
        quarantine = _quarantine(bad)
        if not refs:
            raise UserError(
                f"none of the {len(scans)} labelled scans can be used; the first says: {bad[0].reason}"
            )
        one_number_of_channels({ref.shape_cxyz[0] for ref in refs})
        # Of each list of classes once: it alone decides which values do not count.
        declared = {scan.classes: scan for scan in scans}.values()
        ignores = any(classes.IGNORE in known.of(scan).index_of for scan in declared)
        regions = dict(known.regions), known.region_values
        prepared = prepared_scans.Table(tuple(refs), known.names, known.values, ignores, *regions)
        files = {"cases.json": object_store.json_bytes(prepared.to_json()), "quarantine.json": quarantine}
        return Made(files, {"cases": len(refs), "quarantined": len(bad), "classes": list(known.names)})

    def describe(artifact: Artifact) -> str:
        return f"{artifact.facts['cases']} labelled scans, {len(artifact.facts['classes'])} classes"

    artifact = run_stage(root, "cases", own, {"manifest": table.id}, make, describe)
    executor.quarantined("cases", artifact.facts["quarantined"])
    return prepared_scans.Table.from_json(config.parse_json(artifact.read("cases.json"))), artifact
