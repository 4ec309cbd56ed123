"""Recipes resolve; those of the papers run at smoke scale on phantoms with the structure of their datasets."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import HERE

from logonet import networks, pipelines, recipes
from logonet.core.errors import UserError
from logonet.data import phantom_datasets
from logonet.inference import sliding_window
from logonet.storage.artifacts import Artifact

# The dataset of each recipe, by what its name contains; the first that fits.
DATASETS = {
    "brats_nnformer": "msd_brain",
    "medcontext_brats": "brats21",
    "brats": "msd_brain",
    "heart": "heart",
    "msd": "tumour",
    "acdc": "acdc",
    "mmwhs": "mmwhs",
    "covid": "lesions",
    "feta": "feta",
    "flare": "flare",
    "amos": "amos",
}
GENERAL = {"paper", *recipes.general.PRETRAINING, *recipes.general.FINETUNING}
PRETRAINING = ["paper", *(set(recipes.PRETRAINING) - GENERAL)]
FINETUNING = sorted(set(recipes.FINETUNING) - GENERAL)


def dataset_of(recipe: str) -> str:
    return next((made for part, made in DATASETS.items() if part in recipe), "synapse")


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, str] = {}

    def of(recipe: str) -> str:
        name = dataset_of(recipe)
        if name not in made:
            made[name] = str(tmp_path_factory.mktemp(name))
            phantom_datasets.write(name, made[name])
        return made[name]

    return of


@pytest.mark.parametrize("scale", ["full", "smoke"])
@pytest.mark.parametrize("recipe", recipes.PRETRAINING)
def test_a_pretraining_resolves_and_says_what_it_is(recipe: str, scale: Any) -> None:
    cfg = recipes.scaled(recipes.PRETRAINING[recipe](), scale)
    assert pipelines.resolve(cfg).backbone.name == cfg.backbone.name
    assert len(recipes.PRETRAINING[recipe].__doc__ or "") > 100


@pytest.mark.parametrize("scale", ["full", "smoke"])
@pytest.mark.parametrize("recipe", recipes.FINETUNING)
def test_a_finetuning_resolves_and_says_what_it_is(recipe: str, scale: Any) -> None:
    cfg = recipes.scaled(recipes.FINETUNING[recipe](), scale)
    assert pipelines.resolve_finetuning(cfg).backbone.name == cfg.backbone.name
    assert len(recipes.FINETUNING[recipe].__doc__ or "") > 100


@pytest.mark.parametrize("recipe", recipes.FINETUNING)
def test_the_encoder_rests_first_where_weights_are_handed_over_and_no_paper_says_otherwise(
    recipe: str,
) -> None:
    cfg = recipes.FINETUNING[recipe]()
    pretrained = replace(cfg, init=replace(cfg.init, weights="backbone.safetensors"))
    rests = (
        min(cfg.train.warmup_epochs, cfg.train.epochs / 8) if recipe in recipes.general.FINETUNING else 0.0
    )
    assert pipelines.resolve_finetuning(pretrained).train.frozen_epochs == rests
    assert pipelines.resolve_finetuning(cfg).train.frozen_epochs == 0.0
    at_once = replace(pretrained, train=replace(cfg.train, encoder_frozen_epochs=0.0))
    assert pipelines.resolve_finetuning(at_once).train.frozen_epochs == 0.0


def test_smoke_scale_changes_size_and_length_alone() -> None:
    full = recipes.FINETUNING["simtrot_brats"]()
    smoke = recipes.scaled(full, "smoke")
    assert recipes.scaled(full, "full") is full
    assert (smoke.data, smoke.split, smoke.cases) == (full.data, full.split, full.cases)
    for key in ("optimizer", "schedule", "lr", "momentum", "weight_decay", "grad_clip"):
        assert getattr(smoke.train, key) == getattr(full.train, key)
    assert smoke.train.epochs * (smoke.train.steps_per_epoch or 0) == 6
    assert max(smoke.crops.size_vox) <= 64
    assert networks.tiny("nnformer").items() - {("img_size", (32, 32, 32))} <= smoke.backbone.config.items()


def test_phantoms_of_an_unknown_dataset_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="choose one of synapse, flare"):
        phantom_datasets.write("kits", str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", PRETRAINING)
def test_a_papers_pretraining_runs(recipe: str, scans: Any, tmp_path: Path) -> None:
    cfg = recipes.scaled(recipes.PRETRAINING[recipe](), "smoke")
    made = pipelines.pretrain(cfg, scans(recipe), str(tmp_path), HERE, None)
    assert made.facts["final"]["step"] == 6
    assert math.isfinite(made.facts["final"]["loss"])


def finetuned(recipe: str, scans: str, root: Path, init: str = "") -> Artifact:
    cfg = recipes.scaled(recipes.FINETUNING[recipe](), "smoke")
    given = pipelines.Finetuning(**{**vars(cfg), "init": type(cfg.init)(weights=init)})
    return pipelines.finetune(given, scans, str(root), HERE, None)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", FINETUNING)
def test_a_papers_finetuning_runs_and_is_judged(recipe: str, scans: Any, tmp_path: Path) -> None:
    init = ""
    if recipe == "uxnet3d_amos":  # the paper's transfer
        init = finetuned("uxnet3d_flare", scans("uxnet3d_flare"), tmp_path).uri
    made = finetuned(recipe, scans(recipe), tmp_path, init)
    assert made.facts["final"]["step"] == 6
    cfg = recipes.FINETUNING[recipe]()
    names = list(cfg.data.regions) or ["background", *cfg.data.members]
    if cfg.data.members:
        assert made.facts["regions" if cfg.data.regions else "classes"] == names
    if made.facts["test"]:
        judging = pipelines.Evaluation(infer=sliding_window.Config(overlap=0), leaks="allow")
        judged = pipelines.evaluate_model(judging, made.uri, "", str(tmp_path), HERE, None)
        assert judged.facts["cases"] == len(made.facts["test"])
    else:
        assert math.isfinite(made.facts["final"]["val_dice"])
