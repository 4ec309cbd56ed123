"""What must not change by accident: the ids of every recipe's artifacts, and what the demo computes.

An id covers a stage's config and its parents' ids. When one changes, everything made before is computed anew, so a
change here is a decision: run ``python tests/test_pins.py`` to write the new ids into tests/pins.json, and say so in
CHANGELOG.md.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logonet import pipelines, recipes, training
from logonet.clustering import fitting, kmeans
from logonet.core.execution import InProcess
from logonet.data import crop_shards, phantom, prepared_scans, preparing
from logonet.data.crop_shards import CropRef
from logonet.pipelines import pretraining
from logonet.storage.parquet import Rows

PINS = Path(__file__).with_name("pins.json")


class Reached(Exception):
    """Training would begin now."""


class Pretended(InProcess):
    """Everything that takes time gives something small instead; configs, parents and addresses are the real ones."""

    def check(self, cfg: Any, method: Any) -> None:
        pass

    def train(self, job: training.Job, dataset: Any) -> Any:
        raise Reached(job.fingerprint)


def stand_ins(patch: pytest.MonkeyPatch) -> None:
    def cut(scans: Any, cfg: Any, uri: str, executor: Any) -> Any:
        num_bytes = 2 * int(np.prod(cfg.size_vox))
        ids = [s.scan_id for s in scans]
        return [CropRef(f"{i}/00000", i, "shards/none", 0, num_bytes, "0" * 64) for i in ids], []

    def prepare(scans: Any, label_values: Any, cfg: Any, uri: str, executor: Any) -> Any:
        refs = [prepared_scans.Ref(s.scan_id, f"{uri}/none", 8, (1, 48, 48, 48), "0" * 64) for s in scans]
        return refs, []

    def from_fitted(fitted: Any, meta: Any) -> kmeans.ClustererSet:
        sizes_N = np.array(kmeans.cluster_counts(kmeans.Config(**meta["config"])))
        return kmeans.ClustererSet(np.zeros((int(sizes_N.sum()), 1), np.float32), sizes_N, dict(meta))

    def label(
        table: Any, labeller: Any, uri: str, executor: Any
    ) -> tuple[crop_shards.LabelTable, np.ndarray]:
        clusterers, depth = len(labeller.sizes), table.size_vox[2]
        rows = [replace(ref, num_bytes=2 * clusterers * depth) for ref in table.refs]
        labels = crop_shards.LabelTable(uri, Rows.of(rows, CropRef), clusterers, depth)
        return labels, np.ones((clusterers, max(labeller.sizes)), np.int64)

    patch.setattr(preparing, "cut_scans", cut)
    patch.setattr(preparing, "prepare_scans", prepare)
    patch.setattr(fitting, "sample_slices", lambda *args: np.zeros((1, 1), np.uint16))
    patch.setattr(fitting, "fit_clusterers", lambda *args, **kwargs: [])
    patch.setattr(kmeans.ClustererSet, "from_fitted", from_fitted)
    patch.setattr(fitting, "label_crops", label)
    patch.setattr(pretraining, "_pictures", lambda *args: {})


def ids_of(folder: Path, stage: str, recipe: str) -> dict[str, str]:
    """The ids of all artifacts of a recipe on 12 phantoms, by stage."""
    scans, root = folder / "scans", folder / f"{stage}-{recipe}"
    if not scans.exists():
        phantom.write_dataset(str(scans), 12, size_vox=(48, 48, 48), classes=3)
    run: Any = pipelines.pretrain if stage == "pretrain" else pipelines.finetune
    known = recipes.PRETRAINING if stage == "pretrain" else recipes.FINETUNING
    with pytest.raises(Reached) as reached:
        run(known[recipe](), str(scans / "dataset.json"), str(root), Pretended(), None)
    # A manifest's own id has its place and its files' times in it; what counts is its content's.
    made = {p.name: next(p.iterdir()).name for p in sorted(root.iterdir()) if p.name != "manifest"}
    scan_table = next((root / "manifest").iterdir()) / "manifest.json"
    return {"scans": json.loads(scan_table.read_text())["facts"]["id"], **made, stage: str(reached.value)}


# Those of the papers' datasets, which phantoms of three classes do not fit, are tried in tests/test_recipes.py.
RECIPES = [("pretrain", r) for r in ("paper", *recipes.general.PRETRAINING)]
RECIPES += [("finetune", r) for r in ("paper", *recipes.general.FINETUNING)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pins")


@pytest.mark.parametrize(("stage", "recipe"), RECIPES)
def test_ids_of_a_recipes_artifacts(
    stage: str, recipe: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_ins(monkeypatch)
    assert ids_of(folder, stage, recipe) == json.loads(PINS.read_text())["ids"][stage][recipe]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    pins = json.loads(PINS.read_text()) if PINS.exists() else {}
    pins["ids"] = {"pretrain": {}, "finetune": {}}
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patched:
        stand_ins(patched)
        for of_stage, named in RECIPES:
            pins["ids"][of_stage][named] = ids_of(Path(place), of_stage, named)
    PINS.write_text(json.dumps(pins, indent=1, sort_keys=True) + "\n")
    sys.exit(0)
