"""Artifacts of every stage for the fuzz tests, their damage, and the commands that read them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_damage import Random, damaged, damaged_json, some
from fuzz_scans import damage_json_in, make_decathlon, phantom_files
from fuzz_settings import damage_tensors_in, damaged_tensors

from logonet.core import seeding
from logonet.core.errors import UserError

# ------------------------------------------------------------------------------------------- artifacts


def sealed(folder: Path) -> None:
    """Make manifest.json true again of whatever the files now are: damage that no checksum shows."""
    from logonet.storage import artifacts

    path = folder / "manifest.json"
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return
    if not isinstance(content, dict):
        return
    content.pop("checksum", None)
    if isinstance(content.get("files"), dict):
        for name in content["files"]:
            file = folder / name if name.isprintable() and len(name) < 200 else folder / "none"
            if file.is_file() and isinstance(content["files"][name], dict):
                data = file.read_bytes()
                content["files"][name] |= {
                    "size_bytes": len(data),
                    "sha256": hashlib.sha256(data).hexdigest(),
                }
    try:
        content["checksum"] = artifacts._checksum(content)
    except (ValueError, RecursionError):
        return
    path.write_text(json.dumps(content))


def _commit(folder: Path, stage: str, config: Any, files: dict[str, bytes], facts: Any) -> None:
    from logonet.storage import artifacts, object_store

    stored = {name: object_store.write(f"{folder}/{name}", blob) for name, blob in files.items()}
    artifacts.commit(str(folder), stage, "0" * 16, config=config, parents={}, files=stored, facts=facts)


def _damage_manifest(rng: Random, folder: Path) -> str:
    path = folder / "manifest.json"
    if rng.random() < 0.3:
        path.write_bytes(damaged(rng, path.read_bytes()))
        return "bytes"
    path.write_bytes(damaged_json(rng, path.read_bytes()))
    if rng.random() < 0.8:
        sealed(folder)
        return "values, sealed"
    return "values"


def damage_artifact(*names: str) -> Callable[[Random, Path], str]:
    """Damage to one of an artifact's files or its manifest; sealed or not."""

    def damage(rng: Random, folder: Path) -> str:
        name = some(rng, ["manifest.json", *names])
        if name == "manifest.json":
            return f"manifest.json: {_damage_manifest(rng, folder)}"
        path = folder / name
        if name.endswith(".safetensors"):
            path.write_bytes(damaged_tensors(rng, path.read_bytes()))
        elif name.endswith(".json"):
            path.write_bytes(damaged_json(rng, path.read_bytes()))
        else:
            path.write_bytes(damaged(rng, path.read_bytes()))
        if rng.random() < 0.5:
            sealed(folder)
            name += ", sealed"
        return name

    return damage


def make_imported(folder: Path) -> None:
    from logonet.data import importers, manifest

    (folder / "data").mkdir()
    make_decathlon(folder / "data")
    sources = importers.sources(f"{folder}/data/dataset.json")
    table = manifest.Manifest.of(map(manifest.inspect, sources))
    files = {"scans.parquet": table.scans_parquet(), "quarantine.parquet": table.quarantine_parquet()}
    _commit(folder, "manifest", {"source": "x"}, files, {"id": table.id})


def reach_imported(folder: Path) -> Iterator[str]:
    """data leakcheck of a manifest."""
    from logonet import pipelines
    from logonet.data import leakage

    table = pipelines.open_manifest(str(folder))
    leakage.table(leakage.find(table.scans, table.scans))
    table.describe()
    yield from ()


def make_crops(folder: Path) -> None:
    from logonet.data import crop_shards
    from logonet.storage.parquet import Rows

    rng = seeding.rng(0, "crops")
    crops_RCXYZ = rng.integers(0, 65535, (3, 1, 4, 4, 4)).astype(np.uint16)
    refs = Rows.of(crop_shards.write_shard(str(folder), "scan-1", crops_RCXYZ), crop_shards.CropRef)
    _commit(
        folder,
        "crops",
        {"size_vox": [4, 4, 4]},
        {"crops.parquet": refs.to_parquet()},
        {"crops": 3, "in_channels": 1},
    )


def damage_crops(rng: Random, folder: Path) -> str:
    if rng.random() < 0.5:
        return damage_tensors_in("shards/scan-1.safetensors")(rng, folder)
    return damage_artifact("crops.parquet")(rng, folder)


def reach_crops(folder: Path) -> Iterator[str]:
    """What a run does with the crops that it finds: those of a killed run's shard, and those of a finished artifact."""
    from logonet.data import crop_shards
    from logonet.storage import artifacts

    path = folder / "shards" / "scan-1.safetensors"
    crop_shards.shard_index(str(path), "shards/scan-1.safetensors", path.stat().st_size)
    found = artifacts.find(str(folder))
    if found is None:
        return
    table = crop_shards.CropTable.open(found)
    for i in range(len(table)):
        try:
            table.read(i)
        except UserError as err:
            yield str(err)


def make_case(folder: Path) -> None:
    from helpers import prepared_case, stored_case

    from logonet.data import prepared_scans

    image, label = phantom_files(0)
    from logonet.data import manifest, volume

    scan = volume.decode_nifti(image, "x.nii")
    labels_XYZ = manifest._one_label("y.nii", label, scan)
    prepared = prepared_case(scan, labels_XYZ, "CT", prepared_scans.Config(), "scan-1")
    ref = stored_case(folder, "scan-1", *prepared)
    table = prepared_scans.Table((ref,), ("background", "liver", "spleen"), (0, 1, 2))
    _commit(folder, "cases", {}, {"cases.json": json.dumps(table.to_json()).encode()}, {"cases": 1})


def damage_case(rng: Random, folder: Path) -> str:
    if rng.random() < 0.5:
        kind = rng.choice(["images", "labels"])
        return damage_tensors_in(f"scans/p/{kind}/scan-1.safetensors")(rng, folder)
    return damage_artifact("cases.json")(rng, folder)


def reach_case(folder: Path) -> Iterator[str]:
    from logonet.core import config
    from logonet.data import prepared_scans
    from logonet.storage import artifacts

    image, labels = (
        str(folder / "scans" / "p" / kind / "scan-1.safetensors") for kind in ("images", "labels")
    )
    prepared_scans._header.cache_clear()
    prepared_scans._tensor.cache_clear()
    cfg = prepared_scans.CropSampling(size_vox=(8, 8, 8))
    refs = []
    files = prepared_scans.stored(image), prepared_scans.stored(labels)
    if files[0] is not None and files[1] is not None:
        refs.append(prepared_scans.ref_of("scan-1", *files))
    if (found := artifacts.find(str(folder))) is not None:
        table = prepared_scans.Table.from_json(config.parse_json(found.read("cases.json")))
        refs += [replace(ref, uri=image, labels_uri=labels) for ref in table.refs]
    for ref in refs:
        try:
            for start in prepared_scans.draw_corners(ref, cfg, seeding.rng(0, "starts")):
                prepared_scans.read_crop(ref, start, cfg.size_vox)
            prepared_scans.read_case(ref)
        except UserError as err:
            yield str(err)


def make_fits(folder: Path) -> None:
    from logonet.clustering import kmeans

    rng = seeding.rng(0, "fits")
    fits = [kmeans.Fitted(i, rng.random((3 + i, 16), np.float32), 0.5) for i in range(2)]
    (folder / "fit.safetensors").write_bytes(fits[0].to_bytes())
    whole = kmeans.ClustererSet.from_fitted(fits, {"config": {}})
    (folder / "set.safetensors").write_bytes(whole.to_bytes())


def reach_fits(folder: Path) -> Iterator[str]:
    from logonet.clustering import fitting, kmeans
    from logonet.clustering.pseudo_labels import Labeller
    from logonet.storage import object_store

    fitting._stored_fit(f"{folder}/fit.safetensors")
    uri = f"{folder}/set.safetensors"
    fitted = kmeans.ClustererSet.from_bytes(object_store.read(uri), uri)
    Labeller(fitted)(seeding.rng(0, "slices").random((4, 16), np.float32))
    fitted.summary()
    yield from ()


def make_run(folder: Path) -> None:
    import torch

    from logonet.training import checkpoints

    for step in (1, 2):
        weight = torch.full((2, 3), float(step))
        state = checkpoints.State(
            step,
            {"backbone.w": weight},
            {"exp_avg/w": weight},
            [{"loss": torch.ones(2)}],
            [{"step": step}],
            1,
        )
        checkpoints.save_state(f"{folder}/checkpoints/step-{step:08d}", "f" * 16, state)


def damage_run(rng: Random, folder: Path) -> str:
    told = []
    for step in (2, 1):
        own = folder / "checkpoints" / f"step-{step:08d}"
        names = [f"{group}.safetensors" for group in ("model", "optimizer", "partial")]
        told.append(f"step {step}: {damage_artifact(*names)(rng, own)}")
        if rng.random() < 0.7:
            break
    return "; ".join(told)


def reach_run(folder: Path) -> Iterator[str]:
    from logonet.training import checkpoints

    found = checkpoints.newest(str(folder), "f" * 16)
    if found is not None:
        sum(float(t.sum()) for t in found.tensors() if t.is_floating_point())
    yield from ()


def make_split(folder: Path) -> None:
    from logonet.data import splits

    cases = {f"scan-{i}": splits.Case(f"d/s{i}", f"{i}" * 64, f"{i}" * 64) for i in range(4)}
    split = splits.Split(("scan-0", "scan-1"), ("scan-2",), ("scan-3",), cases=cases)
    (folder / "split.json").write_text(split.to_json())


def damage_split(rng: Random, folder: Path) -> str:
    told = damage_json_in("split.json")(rng, folder)
    path = folder / "split.json"
    if rng.random() < 0.5:  # with the id that what is now there would have
        from logonet.data import splits

        try:
            values = json.loads(path.read_bytes())
            cases = {i: splits.Case(**row) for i, row in values["cases"].items()}
            own = splits.Split(
                **{k: tuple(v) for k, v in values.items() if k not in ("id", "cases")}, cases=cases
            )
            values["id"] = own.id
            path.write_text(json.dumps(values))
            told += ", sealed"
        except Exception:  # beyond sealing: stays as it is
            pass
    return told


def reach_split(folder: Path) -> Iterator[str]:
    from logonet.data import splits
    from logonet.storage import object_store

    uri = f"{folder}/split.json"
    splits.Split.from_json(object_store.read(uri), uri).describe()
    yield from ()


def make_trials(folder: Path) -> None:
    from logonet.sweep import records

    for i in range(2):
        history = [{"epoch": 1, "objective": 0.5, "loss": 1.0}]
        records.write(
            str(folder), records.Trial(i, {"train.lr": 0.1}, "done", history=history, final={"dice": 0.5})
        )
    (folder / "state.json").write_text(json.dumps({"spent_s": 1.0, "shared": {}}))


def damage_trials(rng: Random, folder: Path) -> str:
    from logonet.core import config

    name = some(rng, ["trials/0000.json", "trials/0001.json", "state.json"])
    told = damage_json_in(name)(rng, folder)
    if rng.random() < 0.6:
        try:
            values = json.loads((folder / name).read_bytes())
            values.pop("checksum", None)
            (folder / name).write_text(json.dumps(values | {"checksum": config.fingerprint(values)}))
            told += ", sealed"
        except (ValueError, TypeError, AttributeError, RecursionError):
            pass
    return told


def reach_trials(folder: Path) -> Iterator[str]:
    from logonet.sweep import records

    trials = records.read_all(str(folder))
    records.table(trials, ["train.lr"]).to_csv()
    float(records.state(str(folder)).get("spent_s", 0.0))
    yield from ()


def make_tables(folder: Path) -> None:
    import pandas as pd

    from logonet.data import importers, manifest, provenance
    from logonet.inference import metrics

    make_decathlon(folder)
    sources = importers.sources(f"{folder}/dataset.json")
    table = manifest.Manifest.of(map(manifest.inspect, sources))
    (folder / "seen.parquet").write_bytes(provenance.to_bytes(table.scans, "training"))
    rows = []
    for i in range(4):
        truth_XYZ = np.zeros((6, 6, 6), np.uint8)
        truth_XYZ[1:3, 1:4, 1:4], truth_XYZ[4:, 4:, 3:] = 1, 2
        pred_XYZ = np.roll(truth_XYZ, i % 2, axis=0)
        rows += metrics.case_rows(
            pred_XYZ, truth_XYZ, (1.0, 1.0, 2.0), {"liver": (1,), "spleen": (2,)}, f"scan-{i}"
        )
    (folder / "cases.csv").write_text(pd.DataFrame(rows).to_csv(index=False))


def damage_bytes_in(name: str) -> Callable[[Random, Path], str]:
    def damage(rng: Random, folder: Path) -> str:
        (folder / name).write_bytes(damaged(rng, (folder / name).read_bytes()))
        return name

    return damage


def reach_seen(folder: Path) -> Iterator[str]:
    """The leak check of an evaluation against what a registered model has seen."""
    from logonet.data import leakage, provenance
    from logonet.storage import object_store

    table = object_store.read(f"{folder}/seen.parquet")
    leakage.table(leakage.find(provenance.from_bytes(table), provenance.from_bytes(provenance.join(table))))
    yield from ()


def reach_scores(folder: Path) -> Iterator[str]:
    """logonet compare of two cases.csv."""
    from logonet import pipelines
    from logonet.inference import statistics

    uri = f"{folder}/cases.csv"
    statistics.compare(pipelines.scores_of(uri), pipelines.scores_of(uri))
    yield from ()
