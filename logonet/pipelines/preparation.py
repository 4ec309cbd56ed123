"""From scans to what training learns from.

    scans -> manifest -> crops -> clusterers -> labels    (pretraining)
                     \\-> cases                           (finetuning, and the probe of pretraining)

Shapes: P crops, N clusterers, Z slices of a crop.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import numpy as np

from logonet.clustering import kmeans, quality
from logonet.core import config
from logonet.core.errors import UserError
from logonet.data import crop_shards, cropping, importers, manifest, prepared_scans
from logonet.distributed import data_tasks
from logonet.distributed.cluster import ResourceAllocation
from logonet.pipelines.common import say, took
from logonet.storage import artifacts, object_store
from logonet.storage.artifacts import Artifact


def import_scans(source: str, root: str, share: ResourceAllocation) -> tuple[manifest.Manifest, Artifact]:
    """The manifest of everything at ``source``: a prefix, an MSD dataset.json or a DICOM series folder."""
    sources = importers.sources(source)
    # Versions (ETags, modification times) stand in for content until it is read: an unchanged listing is not
    # read again, and a replaced scan gives a new manifest.
    listed = [asdict(s) for s in sources]
    cfg: dict[str, Any] = {"source": source, "listing": config.fingerprint(listed), "scans": len(sources)}
    uri, fingerprint = artifacts.address(root, "manifest", cfg, {})
    if (found := artifacts.find(uri)) is not None:
        table = manifest.Manifest.from_parquet(
            found.read("scans.parquet"), found.read("quarantine.parquet"), uri
        )
        say("manifest", f"{table.summary()}  (already there: {uri})")
        return _usable(table, source, uri), found
    started = time.monotonic()
    earlier = object_store.join(uri, UNREAD_FILE)
    answers, waiting = _answers(earlier, sources) if object_store.exists(earlier) else ([], sources)
    answers += data_tasks.inspect_scans(waiting, share, known=len(answers))
    table = manifest.Manifest.of(answers)
    unread = sorted(a.uri for a in answers if isinstance(a, manifest.Unread))
    if unread:
        # Used, but not for good: it has an address of its own, and the same command asks for the missing ones again.
        cfg["unread"] = unread
        uri, fingerprint = artifacts.address(root, "manifest", cfg, {})
    files = {
        "scans.parquet": object_store.write(object_store.join(uri, "scans.parquet"), table.scans_parquet()),
        "quarantine.parquet": object_store.write(
            object_store.join(uri, "quarantine.parquet"), table.quarantine_parquet()
        ),
        "quarantine.csv": object_store.write(
            object_store.join(uri, "quarantine.csv"), table.quarantine_csv()
        ),
    }
    facts = {"id": table.id, "scans": len(table.scans), "quarantined": len(table.quarantined)}
    artifact = artifacts.commit(
        uri, "manifest", fingerprint, config=cfg, parents={}, files=files, facts=facts
    )
    if unread:
        object_store.write_json(earlier, {"manifest": uri, "unread": unread})
        say("manifest", f"{len(unread)} scans could not be read; the same command tries them again")
    say("manifest", f"{table.summary()}  {took(started)}  {uri}")
    for bad in table.quarantined:
        say("", f"quarantined: {bad.reason}")
    return _usable(table, source, uri), artifact


UNREAD_FILE = "unread.json"


def _answers(
    uri: str, sources: list[manifest.Source]
) -> tuple[list[manifest.Scan | manifest.Quarantined], list[manifest.Source]]:
    """What an earlier import of the same listing has found out, and the sources that it could not read."""
    earlier = object_store.read_json(uri)
    if artifacts.find(earlier["manifest"]) is None:
        return [], sources
    table, unread = open_manifest(earlier["manifest"]), set(earlier["unread"])
    kept = [q for q in table.quarantined if q.uri not in unread]
    return [*table.scans, *kept], [s for s in sources if s.uri in unread]


def open_manifest(uri: str) -> manifest.Manifest:
    """The table of a finished manifest artifact."""
    artifact = artifacts.find(uri)
    if artifact is None or artifact.stage != "manifest":
        raise UserError(
            f"{uri} holds no finished manifest; give ROOT/manifest/<id>, which 'logonet data import' makes"
        )
    return manifest.Manifest.from_parquet(
        artifact.read("scans.parquet"), artifact.read("quarantine.parquet"), uri
    )


def _usable(table: manifest.Manifest, source: str, uri: str) -> manifest.Manifest:
    if not table.scans:
        raise UserError(
            f"none of the {len(table.quarantined)} scans at {source} can be used; the reasons are in "
            f"{uri}/quarantine.csv"
        )
    return table


def make_crops(
    table: manifest.Manifest, cfg: cropping.Config, root: str, share: ResourceAllocation
) -> tuple[crop_shards.CropTable, Artifact]:
    """Random crops of every scan, stored as uint16; the parent is the manifest's content, not its place."""
    own, parents = config.to_dict(cfg), {"manifest": table.id}
    uri, fingerprint = artifacts.address(root, "crops", own, parents)
    found = artifacts.find(uri)
    if found is None:
        started = time.monotonic()
        refs, bad = data_tasks.cut_scans(list(table.scans), cfg, uri, share)
        for q in bad:
            say("", f"quarantined: {q.reason}")
        if not refs:
            raise UserError(
                f"no scan gave a crop of {'x'.join(map(str, cfg.size_vox))} voxels (the first says: "
                f"{bad[0].reason}); use a smaller crops.size_vox or lower crops.min_image_share"
            )
        crop_table = crop_shards.CropTable(uri, cfg.size_vox, 1, tuple(refs))
        files = {
            "crops.parquet": object_store.write(
                object_store.join(uri, "crops.parquet"), crop_table.to_parquet()
            ),
            "quarantine.json": object_store.write_json(
                object_store.join(uri, "quarantine.json"), [{"uri": q.uri, "reason": q.reason} for q in bad]
            ),
        }
        facts = {"crops": len(refs), "in_channels": 1, "quarantined": len(bad)}
        found = artifacts.commit(
            uri, "crops", fingerprint, config=own, parents=parents, files=files, facts=facts
        )
        say("crops", f"{len(refs)} crops of {len(table.scans) - len(bad)} scans  {took(started)}  {uri}")
        return crop_table, found
    crop_table = crop_shards.CropTable.open(found)
    say("crops", f"{len(crop_table)} crops  (already there: {uri})")
    return crop_table, found


def make_clusterers(
    table: crop_shards.CropTable, parent: Artifact, cfg: kmeans.Config, root: str, share: ResourceAllocation
) -> Artifact:
    """N K-means clusterers fitted on slices of the crops; they are read back only where labels are missing."""
    own, parents = config.to_dict(cfg), {"crops": parent.fingerprint}
    uri, fingerprint = artifacts.address(root, "clusterers", own, parents)
    if (found := artifacts.find(uri)) is not None:
        say("clusterers", f"{found.facts['n']} clusterers {found.facts['id']}  (already there: {uri})")
        return found
    started = time.monotonic()
    slices_ST = data_tasks.sample_slices(table, cfg.max_slices, cfg.seed, share)
    say("clusterers", f"fitting {cfg.n} on {len(slices_ST):,} slices of {slices_ST.shape[1]:,} voxels")
    fits = data_tasks.fit_clusterers(slices_ST, cfg, uri, share, note=_note_quarters)
    fitted = kmeans.ClustererSet.from_fitted(fits, meta={"config": own, "crops": parent.fingerprint})
    files = {CLUSTERERS_FILE: object_store.write(object_store.join(uri, CLUSTERERS_FILE), fitted.to_bytes())}
    facts = {"id": fitted.id, "n": len(fitted.sizes_N), "slices": len(slices_ST), **fitted.summary()}
    files["clusterers.json"] = object_store.write_json(
        object_store.join(uri, "clusterers.json"), {**facts, "config": own}
    )
    artifact = artifacts.commit(
        uri, "clusterers", fingerprint, config=own, parents=parents, files=files, facts=facts
    )
    object_store.delete_prefix(object_store.join(uri, "fits"))  # the parts of what is now committed whole
    say("clusterers", f"{cfg.n} clusterers {fitted.id}  {took(started)}  {uri}")
    return artifact


CLUSTERERS_FILE = "clusterers.safetensors"


def _note_quarters(done: int, total: int) -> None:
    if done % -(-total // 4) == 0 and done < total:
        say("clusterers", f"fitted {done}/{total}")


def make_labels(
    table: crop_shards.CropTable,
    crops_artifact: Artifact,
    clusterers_artifact: Artifact,
    root: str,
    share: ResourceAllocation,
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
    fitted = kmeans.ClustererSet.from_bytes(clusterers_artifact.read(CLUSTERERS_FILE))
    labels_PNZ = data_tasks.label_crops(table, fitted, share)
    majority, floor = quality.majority(labels_PNZ, fitted.sizes_N)
    files = {
        LABELS_FILE: object_store.write(object_store.join(uri, LABELS_FILE), save({"labels_PNZ": labels_PNZ}))
    }
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


def make_cases(
    table: manifest.Manifest,
    test_ids: tuple[str, ...],
    cfg: prepared_scans.Config,
    root: str,
    share: ResourceAllocation,
) -> tuple[prepared_scans.Table, Artifact]:
    """Every labelled scan that is no test case, prepared for training."""
    chosen = [s for s in table.scans if s.label_uri and s.scan_id not in set(test_ids)]
    classes, values = label_classes([s for s in table.scans if s.label_uri])
    own = {**config.to_dict(cfg), "label_values": list(values), "scans": [s.scan_id for s in chosen]}
    parents = {"manifest": table.id}
    uri, fingerprint = artifacts.address(root, "cases", own, parents)
    found = artifacts.find(uri)
    if found is not None:
        cases_table = prepared_scans.Table.from_json(config.parse_json(found.read("cases.json")))
        say("cases", f"{len(cases_table)} labelled cases  (already there: {uri})")
        return cases_table, found
    started = time.monotonic()
    refs, bad = data_tasks.prepare_cases(chosen, values, cfg, uri, share)
    for q in bad:
        say("", f"quarantined: {q.reason}")
    if not refs:
        raise UserError(
            f"none of the {len(chosen)} labelled scans can be used; the first says: {bad[0].reason}"
        )
    cases_table = prepared_scans.Table(tuple(refs), classes, values)
    files = {
        "cases.json": object_store.write_json(object_store.join(uri, "cases.json"), cases_table.to_json()),
        "quarantine.json": object_store.write_json(
            object_store.join(uri, "quarantine.json"), [{"uri": q.uri, "reason": q.reason} for q in bad]
        ),
    }
    facts = {"cases": len(refs), "quarantined": len(bad), "classes": list(classes)}
    found = artifacts.commit(uri, "cases", fingerprint, config=own, parents=parents, files=files, facts=facts)
    say("cases", f"{len(refs)} labelled cases, {len(classes)} classes  {took(started)}  {uri}")
    return cases_table, found


def label_classes(scans: list[manifest.Scan]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and label values of the classes, background first: what is declared, else what occurs.

    Raises:
        UserError: when the scans' datasets declare different names for one value, or one name for two.
    """
    names: dict[int, str] = {}
    for scan in scans:
        for value, name in enumerate(scan.classes):
            if name and names.setdefault(value, name) != name:
                raise UserError(
                    f"label value {value} is '{names[value]}' in one dataset and '{name}' in {scan.dataset}; "
                    "finetune on one of them, or give both the same labels"
                )
    if not names:
        names = {v: f"class {v}" for s in scans for v in s.label_values}
    names[0] = names.get(0) or "background"
    if not any(names):
        raise UserError("no scan has a label but background; nothing can be learnt")
    values = tuple(sorted(names))
    if "ignore" in names.values():  # nnU-Net's name of voxels that nobody has labelled
        raise UserError(
            "the dataset labels voxels as 'ignore', which would be learnt as a class; finetune on fully labelled scans"
        )
    for value in values:
        if list(names.values()).count(names[value]) > 1 or names[value] == "mean":
            raise UserError(
                f"the class name '{names[value]}' stands for several label values, or is 'mean', which the tables "
                "of scores need; give every label value a name of its own"
            )
    return tuple("background" if v == 0 else names[v] for v in values), values
