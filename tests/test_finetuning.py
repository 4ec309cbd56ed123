"""Whole small pipelines with labels: from a bucket of phantoms to a registered model, and what may go wrong between."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import HERE, assert_same_gradients, on_ray, timeless, tiny_backbone
from safetensors.torch import load, save

from logonet import cli, networks, pipelines, tracking, training
from logonet.clustering import kmeans
from logonet.core.errors import UserError
from logonet.data import classes, cropping, phantom, prepared_scans, provenance, splits, volume
from logonet.inference import sliding_window
from logonet.inference.load import load_model
from logonet.pipelines.finetuning import Init, make_split
from logonet.pipelines.preparation import make_cases
from logonet.storage import artifacts, object_store
from logonet.storage.artifacts import Artifact

SIZE = (32, 32, 32)
# Of 8 phantoms 2 test, 2 validate, 4 train. Among fewer the leak check takes some, alike as they are, for copies.
SPLIT = splits.Config(test_share=0.25, folds=3)
WEIGHTS = ("method.safetensors", "best.safetensors", "model/weights.safetensors")
QUICK = pipelines.Evaluation(infer=sliding_window.Config(overlap=0))


@pytest.fixture(scope="module")
def scans(place: str) -> str:
    """Eight phantoms; one class has a name that data sets know and MLflow refuses."""
    listed = phantom.write_dataset(f"{place}/scans", 8, size_vox=(36, 32, 32))  # two windows each
    described = object_store.read_json(listed)
    described["labels"]["1"] = "liver & bile (ducts)"
    object_store.write_json(listed, described)
    return f"{place}/scans/"


@pytest.fixture(scope="module")
def home(place: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What is made lies in a folder, which is faster than a bucket; one test writes the same into the bucket."""
    return str(tmp_path_factory.mktemp("finetuning"))


@pytest.fixture(scope="module")
def root(home: str) -> str:
    return f"{home}/runs"


def pretraining(split: splits.Config) -> pipelines.Pretraining:
    return pipelines.Pretraining(
        split=split,
        crops=cropping.Config(size_vox=SIZE, per_scan=2),
        clusterers=kmeans.Config(n=2, k_min=3, k_max=5, iterations=5),
        backbone=tiny_backbone(),
        method={"name": "masked_clusters", "phi1": 0.2, "final_relu": False},
        train=training.Config(epochs=1, global_batch=4, batch_size=2, lr=3e-3, warmup_epochs=0.5),
    )


def finetuning(weights: str = "", train: Any = None, **changes: Any) -> pipelines.Finetuning:
    """Two epochs of two steps, validated after each."""
    settings: dict[str, Any] = {
        "epochs": 2,
        "steps_per_epoch": 2,
        "global_batch": 2,
        "lr": 3e-3,
        "warmup_epochs": 0.5,
    }
    settings |= {"validate_every_epochs": 1, **(train or {})}
    cfg = pipelines.Finetuning(
        split=SPLIT,
        crops=prepared_scans.CropSampling(size_vox=SIZE),
        backbone={} if weights else tiny_backbone(),
        train=training.Config(**settings),
        init=Init(weights),
        validation=sliding_window.Config(overlap=0),
    )
    return replace(cfg, **changes)


def finetune(cfg: pipelines.Finetuning, source: str, root: str) -> Artifact:
    """Trained in this process; one test looks at what Ray Train's workers make of the same."""
    return pipelines.finetune(cfg, source, root, HERE, "finetuning")


def pretrain(split: splits.Config, source: str, root: str) -> Artifact:
    return pipelines.pretrain(pretraining(split), source, root, HERE, "pretraining")


def evaluate(cfg: pipelines.Evaluation, model: str, source: str, root: str) -> Artifact:
    return pipelines.evaluate_model(cfg, model, source, root, HERE, "finetuning")


def versions(root: str) -> dict[str, str]:
    return {e.uri: e.version for e in object_store.listing(root)}


def sums(artifact: Artifact) -> dict[str, str]:
    return {name: artifact.files[name].sha256 for name in WEIGHTS}


def history_of(artifact: Artifact) -> list[dict[str, Any]]:
    return json.loads(artifact.read("history.json"))


@pytest.fixture(scope="module")
def pretrained(scans: str, root: str) -> Artifact:
    """Pretrained on what the finetuning trains on, without its test and validation scans."""
    return pretrain(SPLIT, scans, root)


@pytest.fixture(scope="module")
def every_step(pretrained: Artifact) -> pipelines.Finetuning:
    return finetuning(pretrained.uri, {"checkpoint_every_steps": 1, "keep_checkpoints": 4})


@pytest.fixture(scope="module")
def finetuned(every_step: pipelines.Finetuning, scans: str, root: str) -> Artifact:
    return finetune(every_step, scans, root)


@pytest.fixture(scope="module")
def evaluated(root: str, finetuned: Artifact) -> Artifact:
    return evaluate(QUICK, finetuned.uri, "", root)


@pytest.fixture(scope="module")
def registered(evaluated: Artifact) -> list[str]:
    return pipelines.register(evaluated.uri, "phantoms")


@pytest.fixture(scope="module")
def frozen(scans: str, root: str, pretrained: Artifact) -> Artifact:
    cfg = finetuning(pretrained.uri, {"epochs": 1}, method={"name": "supervised", "encoder": "frozen"})
    return finetune(cfg, scans, root)


def tracked(artifact: Artifact) -> Any:
    """The one MLflow run of an artifact."""
    client = tracking.runs.connect(tracking.tracking_uri())
    experiments = [e.experiment_id for e in client.search_experiments()]
    (run,) = client.search_runs(
        experiments, f"tags.`{tracking.runs.FINGERPRINT_TAG}` = '{artifact.fingerprint}'"
    )
    assert run.info.status == "FINISHED"
    return run


# ------------------------------------------------------------------------------------- the whole chain


def test_finetuning_takes_the_whole_encoder_over_and_is_tracked(
    finetuned: Artifact, pretrained: Artifact
) -> None:
    assert artifacts.verify(finetuned, full=True) == []
    handover = json.loads(finetuned.read("transfer.json"))
    assert handover["encoder_share"] == 1.0
    assert handover["totals"]["matched"]["params"] > handover["encoder_params"]
    assert handover["source"].startswith(pretrained.uri)
    history = history_of(finetuned)
    assert [(e["epoch"], e["step"]) for e in history] == [(1, 2), (2, 4)]
    best = max(history, key=lambda e: (e["val_dice"], -e["step"]))
    assert finetuned.facts["best_step"] == best["step"]
    assert load(finetuned.read("best.safetensors")).keys() == load(finetuned.read(WEIGHTS[2])).keys()
    assert b"Weights taken over" in finetuned.read("report.html")

    run = tracked(finetuned)
    assert {k: run.data.tags[f"logonet.{k}"] for k in ("manifest", "split", "cases")} == {
        k: finetuned.parents[k] for k in ("manifest", "split", "cases")
    }
    assert run.data.tags["logonet.pretrain"] == pretrained.fingerprint
    assert run.data.tags["logonet.pretrain_clusterers"] == pretrained.parents["clusterers"]
    client = tracking.runs.connect(tracking.tracking_uri())
    points = client.get_metric_history(run.info.run_id, "val_dice")
    assert [p.value for p in points] == [e["val_dice"] for e in history]
    assert {"transfer.json", "report.html", "curves.png"} & {
        f.path for f in client.list_artifacts(run.info.run_id)
    }


def test_scores_of_the_test_cases_with_tables_pictures_and_a_run(
    evaluated: Artifact, finetuned: Artifact
) -> None:
    scores = pd.read_csv(io.BytesIO(evaluated.read("cases.csv")))
    assert sorted(set(scores["scan_id"])) == sorted(finetuned.facts["test"])
    assert set(scores["class"]) == {"liver & bile (ducts)", "spleen", "right kidney"}
    summary = pd.read_csv(io.BytesIO(evaluated.read("summary.csv")))
    mean = summary[(summary["class"] == "mean") & (summary["metric"] == "dice")].iloc[0]
    assert mean["mean"] == pytest.approx(evaluated.facts["dice"])
    assert mean["ci_low"] <= mean["mean"] <= mean["ci_high"]
    page = evaluated.read("report.html").decode()
    pictures = [evaluated.read(name) for name in ("organs.png", "cases.png")] + [finetuned.read("curves.png")]
    assert all(base64.b64encode(picture).decode() in page for picture in pictures)
    assert finetuned.fingerprint in page  # in the lineage

    # One score from the label map as it was stored.
    row = scores[scores["class"] == "spleen"].iloc[0]
    found, truth = (
        volume.decode_nifti(object_store.read(uri), uri, allow_constant=True).array_CXYZ[0] == 2
        for uri in (
            f"{evaluated.uri}/predictions/{row['scan_id']}.nii.gz",
            f"{finetuned.facts['source']}labelsTr/{row['scan_id'].rpartition('-')[0]}.nii.gz",
        )
    )
    assert row["dice"] == pytest.approx(2 * (found & truth).sum() / (found.sum() + truth.sum()))

    run = tracked(evaluated)
    assert run.data.metrics["dice"] == pytest.approx(evaluated.facts["dice"])
    assert {"dice/liver _ bile _ducts_", "dice/spleen"} <= run.data.metrics.keys()
    assert run.data.tags["logonet.finetune"] == finetuned.fingerprint


def test_registered_models_carry_the_lineage_and_are_the_same_models(
    registered: list[str], evaluated: Artifact, finetuned: Artifact, pretrained: Artifact
) -> None:
    segmentation, encoder, codes = registered
    assert [uri.split("/")[1] for uri in registered] == [
        "logonet-seg-phantoms",
        "logonet-encoder",
        "logonet-clusterers",
    ]
    tags = tracking.lineage(segmentation)
    expected = {
        "manifest": finetuned.parents["manifest"],
        "pretrain_clusterers": pretrained.parents["clusterers"],
        "pretrain": pretrained.fingerprint,
        "finetune": finetuned.fingerprint,
        "evaluation": evaluated.fingerprint,
        "test_dice": f"{evaluated.facts['dice']:.6g}",
        "contaminated": "none",
    }
    assert {k: tags[f"logonet.{k}"] for k in expected} == expected
    assert tags["run_id"] == tracked(finetuned).info.run_id
    assert tracking.lineage(encoder)["logonet.pretrain"] == pretrained.fingerprint
    assert tracking.lineage(encoder)["run_id"] == tracked(pretrained).info.run_id
    assert tracking.lineage(codes)["logonet.clusterers"] == pretrained.parents["clusterers"]

    again = pipelines.register(evaluated.uri, "phantoms", ("champion",))
    assert again == registered
    by_alias = load_model("models:/logonet-seg-phantoms@champion")
    assert by_alias == replace(load_model("models:/logonet-seg-phantoms@candidate"), uri=by_alias.uri)
    direct = load_model(finetuned.uri)
    assert (by_alias.folder, by_alias.id, by_alias.seen) == (direct.folder, direct.id, direct.seen)
    assert direct.lineage.items() <= by_alias.lineage.items()
    assert by_alias.lineage["registered"] == segmentation


def test_the_registered_encoder_finetunes_to_the_same_bits(
    registered: list[str],
    every_step: pipelines.Finetuning,
    finetuned: Artifact,
    pretrained: Artifact,
    scans: str,
    home: str,
) -> None:
    cfg = replace(every_step, init=Init("models:/logonet-encoder@candidate"))
    other = finetune(cfg, scans, f"{home}/elsewhere")
    assert sums(other) == sums(finetuned)
    assert other.parents["registered"] == registered[1]
    for key in ("pretrain", "pretrain_uri", "pretrain_manifest", "pretrain_clusterers"):
        assert other.parents[key] == finetuned.parents[key]
    assert other.read("seen.parquet") == finetuned.read("seen.parquet")


def test_a_registered_model_is_not_judged_on_what_it_has_seen(
    registered: list[str], evaluated: Artifact, finetuned: Artifact, scans: str, root: str
) -> None:
    """Its own data set as new data: the six it was trained and validated on are refused, or left out."""
    with pytest.raises(UserError, match="6 of 8 test cases are known to training"):
        evaluate(QUICK, registered[0], scans, root)
    again = evaluate(replace(QUICK, leaks="exclude"), registered[0], scans, root)
    assert len(again.facts["excluded"]) == 6
    assert not again.facts["contaminated"]
    assert again.read("cases.csv") == evaluated.read("cases.csv")
    # It leads back to the finetuning, so it can be registered too.
    made = pipelines.register(again.uri, "phantoms-again", ("candidate",))
    chosen = load_model(made[0])
    assert chosen.id == load_model(finetuned.uri).id
    assert chosen.lineage["excluded"] == f"6, listed in {again.uri}/leaks.csv"
    told = json.dumps([tracking.lineage(made[0]), chosen.lineage]) + str(chosen.seen)
    assert not [name for name in again.facts["excluded"] if name in told], "patients' names may be file names"


def test_the_same_commands_again_write_nothing(
    every_step: pipelines.Finetuning, finetuned: Artifact, evaluated: Artifact, scans: str, root: str
) -> None:
    before = versions(root)
    assert finetune(every_step, scans, root) == finetuned
    assert evaluate(QUICK, finetuned.uri, "", root) == evaluated
    assert versions(root) == before
    tracked(finetuned), tracked(evaluated)


def test_two_evaluations_are_compared_on_the_command_line(
    evaluated: Artifact, frozen: Artifact, root: str, tmp_path: Any, monkeypatch: Any, capsys: Any
) -> None:
    other = evaluate(QUICK, frozen.uri, "", root)
    monkeypatch.setattr(sys, "argv", ["logonet", "compare", evaluated.uri, other.uri, "--out", str(tmp_path)])
    capsys.readouterr()
    cli.main()
    assert "p Wilcoxon" in capsys.readouterr().out
    compared = pd.read_csv(tmp_path / "compare.csv")
    mean = compared[(compared["class"] == "mean") & (compared["metric"] == "dice")].iloc[0]
    assert mean["a"] == pytest.approx(evaluated.facts["dice"])
    assert mean["b"] == pytest.approx(other.facts["dice"])
    assert mean["n"] == 2
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------- validation cases, ensembles, post-processing


def test_a_model_is_judged_on_its_own_validation_cases(
    evaluated: Artifact, finetuned: Artifact, registered: list[str], scans: str, root: str
) -> None:
    judged = evaluate(replace(QUICK, on="val"), finetuned.uri, "", root)
    split = artifacts.find(finetuned.parents["split_uri"])
    assert split is not None
    scores = pipelines.scores_of(judged.uri)
    assert sorted(set(scores["scan_id"])) == json.loads(split.read("split.json"))["val"]
    assert judged.facts["on"] == "val"
    assert "on" not in evaluated.facts
    assert b"The checkpoint was chosen on these cases" in judged.read("report.html")
    assert b"Validation cases" not in evaluated.read("report.html")
    with pytest.raises(UserError, match=r"was not split on these scans; give a finetuning artifact"):
        evaluate(replace(QUICK, on="val"), registered[0], scans, root)


@pytest.mark.slow
def test_an_ensemble_and_its_post_processing_from_validation_to_registry(
    finetuned: Artifact, frozen: Artifact, root: str
) -> None:
    both = f"{finetuned.uri},{frozen.uri}"
    done = pipelines.postprocess(QUICK, both, "", root, HERE, "finetuning")
    val = replace(QUICK, on="val")
    scores = pd.concat([pipelines.scores_of(evaluate(val, uri, "", root).uri) for uri in both.split(",")])
    columns = scores.groupby("class", sort=False)[["dice", "dice_largest_component"]].mean()
    rises = columns["dice_largest_component"] > columns["dice"]
    assert done.facts["largest_component"] == list(columns.index[rises])
    assert rises.any(), "the test needs a class that gains"
    chosen = load_model(done.uri, device="cpu")
    assert chosen.spec.largest_component == tuple(done.facts["largest_component"])
    assert [artifact.uri for artifact in chosen.artifacts] == [finetuned.uri, frozen.uri]
    with pytest.raises(UserError, match="has its post-processing already"):
        pipelines.postprocess(QUICK, done.uri, "", root, HERE, "finetuning")

    plain, processed = (evaluate(QUICK, uri, "", root) for uri in (both, done.uri))
    test = [set(pipelines.scores_of(e.uri)["scan_id"]) for e in (plain, processed)]
    assert test == [set(finetuned.facts["test"])] * 2
    assert processed.parents["postprocess"] == done.fingerprint
    assert plain.fingerprint != processed.fingerprint
    for judged, model in ((plain, load_model(both)), (processed, chosen)):
        segmentation, encoder, _ = pipelines.register(judged.uri, "pair", ("pair",))
        assert encoder.startswith("models:/logonet-encoder/")
        again = load_model(segmentation)
        assert again.id == model.id
        assert again.lineage["finetune_uri"] == both
        assert again.lineage["test_dice"] == f"{judged.facts['dice']:.6g}"
        assert again.seen == model.seen is not None
    with pytest.raises(UserError, match="is an ensemble, whose weights are of several networks"):
        finetune(finetuning("models:/logonet-seg-pair@pair"), finetuned.facts["source"], root)


# ------------------------------------------------------------------------------------------- training


def test_an_interrupted_finetuning_resumes_exactly(
    every_step: pipelines.Finetuning, finetuned: Artifact, scans: str, root: str, home: str, capfd: Any
) -> None:
    """What is left when a run dies in epoch 2: the state after step 3 and the best network until then."""
    resumed = f"{home}/resumed"
    best = max((e for e in history_of(finetuned) if e["step"] <= 3), key=lambda e: e["val_dice"])
    left = [
        f"finetune/{finetuned.fingerprint}/checkpoints/step-00000003/",
        f"finetune/{finetuned.fingerprint}/best/step-{best['step']:08d}.safetensors",
        *(f"{stage}/" for stage in ("manifest", "split", "cases")),
    ]
    for entry in object_store.listing(root):
        name = object_store.relative(entry.uri, root)
        if name.startswith(tuple(left)):
            object_store.write(f"{resumed}/{name}", object_store.read(entry.uri))
    again = finetune(every_step, scans, resumed)
    assert again.fingerprint == finetuned.fingerprint
    assert sums(again) == sums(finetuned)
    assert timeless(history_of(again)) == timeless(history_of(finetuned))
    assert again.facts["best_step"] == finetuned.facts["best_step"]


def test_two_workers_of_ray_train_take_the_same_steps(
    every_step: pipelines.Finetuning, finetuned: Artifact, scans: str, place: str, ray_local: None
) -> None:
    two = pipelines.finetune(every_step, scans, f"{place}/runs", on_ray(), "workers")
    assert artifacts.verify(two, full=True) == []
    assert two.fingerprint == finetuned.fingerprint
    assert two.files.keys() == finetuned.files.keys()
    assert_same_gradients(two, finetuned)
    for a, b in zip(history_of(two), history_of(finetuned)):
        assert a.keys() == b.keys()
        assert 0 <= a["val_dice"] <= 1


def test_the_plan_had_said_what_the_run_would_write(
    every_step: pipelines.Finetuning, finetuned: Artifact, scans: str, root: str
) -> None:
    """Before anything is prepared, against what is stored: to the byte where values have no say."""
    from logonet.planning import labelled, planner, request

    cfg = request.resolve(every_step)  # the weights tell the network
    assert isinstance(cfg, pipelines.Finetuning)
    table, _ = pipelines.import_scans(scans, root, HERE)
    found = labelled.of_split(table, cfg, "the import")
    assert found.labels is not None
    cfg = replace(cfg, data=found.labels)
    work = planner.work(cfg, gpu=False)
    planned = labelled.sizes(cfg, found, work.network, work.facts.num_classes)
    assert ["background", *cfg.data.members] == finetuned.facts["classes"]
    split = json.loads(object_store.read(f"{finetuned.parents['split_uri']}/split.json"))
    for part in ("train", "val", "test"):
        assert sorted(s.scan_id for s in found.scans if s.part == part) == split[part]

    files = finetuned.files
    net = work.network
    for name in ("best.safetensors", "backbone.safetensors", "model/weights.safetensors"):
        assert net.backbone_file == files[name].size_bytes, name
    assert net.model_file == files["method.safetensors"].size_bytes
    stored = object_store.listing(finetuned.uri)
    last = f"/checkpoints/step-{planned.steps:08d}/"  # those within an epoch hold its sums so far too
    saved = [e.size_bytes for e in stored if last in e.uri and e.uri.endswith(".safetensors")]
    assert net.checkpoint_bytes == sum(saved)
    best = sum(e.size_bytes for e in stored if "/best/" in e.uri)
    final = sum(files[n].size_bytes for n in WEIGHTS) + net.backbone_file
    assert best + final + 4 * net.checkpoint_bytes <= planned.stages[-1].kept
    assert planned.steps == finetuned.facts["steps"]
    assert planned.windows == (2, 2)

    used = {s.scan_id for s in found.scans if s.is_case}
    store = [e for e in object_store.listing(f"{root}/scans") if any(i in e.uri for i in used)]
    images, labels = (
        sum(e.size_bytes for e in store if f"/{kind}/" in e.uri) for kind in ("images", "labels")
    )
    assert planned.files["prepared"] == images
    # At most as many positions of each class are kept as are planned.
    positions = len(used) * labelled.POSITIONS_BYTES * len(cfg.data.members)
    assert planned.files["prepared_labels"] - positions < labels <= planned.files["prepared_labels"]


def test_random_weights(scans: str, root: str) -> None:
    done = finetune(finetuning(train={"epochs": 1}), scans, root)
    assert done.parents["weights"] == "random"
    assert "transfer.json" not in done.files


def test_a_frozen_encoder_stays_what_it_was(frozen: Artifact, pretrained: Artifact) -> None:
    before = load(pretrained.read("backbone.safetensors"))
    for file in ("best.safetensors", "backbone.safetensors"):
        after = load(frozen.read(file))
        net: Any = networks.build(
            "logonet", 1, 2, **{k: v for k, v in tiny_backbone().items() if k != "name"}
        )
        encoder = [n for n in before if n.startswith(tuple(net.encoder_prefixes))]
        assert len(encoder) > 20
        assert all(torch.equal(before[n], after[n]) for n in encoder)
        others = [n for n in before if n not in encoder and before[n].shape == after[n].shape]
        assert any(not torch.equal(before[n], after[n]) for n in others)


def test_label_fractions_are_nested_and_share_the_prepared_cases(scans: str, root: str) -> None:
    executor = HERE
    table, _ = pipelines.import_scans(scans, root, executor)
    used, prepared = [], set()
    for fraction in (0.25, 0.5, 1.0):
        cfg = replace(SPLIT, fraction=fraction)
        split, _ = make_split(table, cfg, "refuse", None, root)
        found, artifact = make_cases(
            table, split.test + split.excluded, prepared_scans.Config(), classes.Config(), root, executor
        )
        used.append((set(split.train), split.val, split.test))
        prepared.add(artifact.uri)
        assert len(found) == 6
    assert [len(train) for train, _, _ in used] == [1, 2, 4]
    assert used[0][0] < used[1][0] < used[2][0]
    assert len({rest[1:] for rest in used}) == 1
    assert len(prepared) == 1


# ----------------------------------------------------------------------------------------------- leaks


@pytest.fixture(scope="module")
def contaminated(pretrained: Artifact, finetuned: Artifact, scans: str, root: str) -> Artifact:
    """As if pretrained on all scans but one, of the two that are tested."""
    table, _ = pipelines.import_scans(scans, root, HERE)
    used = [scan for scan in table.scans if scan.scan_id != finetuned.facts["test"][0]]
    uri = f"{root}/pretrain/{'c' * 16}"
    blobs = {"backbone.safetensors": pretrained.read("backbone.safetensors")}
    blobs["seen.parquet"] = provenance.to_bytes(used, "pretraining")
    return artifacts.commit(
        uri,
        "pretrain",
        "c" * 16,
        config=pretrained.config,
        parents=pretrained.parents,
        files={name: object_store.write(f"{uri}/{name}", blob) for name, blob in blobs.items()},
        facts=pretrained.facts,
    )


def test_test_cases_that_pretraining_has_seen(
    contaminated: Artifact, scans: str, root: str, capfd: Any
) -> None:
    cfg = finetuning(contaminated.uri, {"epochs": 1})
    with pytest.raises(UserError, match="1 of 2 test cases are known to training or pretraining") as err:
        finetune(cfg, scans, root)
    assert "\n" not in str(err.value)

    table, _ = pipelines.import_scans(scans, root, HERE)
    known = contaminated.read("seen.parquet")
    smaller, artifact = make_split(table, SPLIT, "exclude", known, root)
    assert len(smaller.test) == len(smaller.excluded) == 1
    assert artifact.facts["leaking"] == list(smaller.excluded)
    assert smaller.excluded[0] in artifact.read("leaks.csv").decode()
    with pytest.raises(UserError, match=r"all 2 test scans .* have leaked"):
        make_split(table, SPLIT, "exclude", provenance.to_bytes(table.scans, "pretraining"), root)

    allowed = finetune(replace(cfg, leaks="allow"), scans, root)
    assert len(allowed.facts["test"]) == 2
    assert allowed.facts["contaminated"] == list(smaller.excluded)
    recorded = artifacts.find(allowed.parents["split_uri"])
    assert recorded is not None
    assert smaller.excluded[0] in recorded.read("leaks.csv").decode()
    # Judging it is refused all the same, and so it is on its validation cases, which pretraining has seen too.
    with pytest.raises(UserError, match="1 of 2 test cases are known to training"):
        evaluate(QUICK, allowed.uri, "", root)
    with pytest.raises(UserError, match="2 of 2 validation cases are known to training"):
        evaluate(replace(QUICK, on="val"), allowed.uri, "", root)


def test_pretraining_on_the_training_part_is_no_leak(
    pretrained: Artifact, finetuned: Artifact, scans: str, root: str
) -> None:
    table, _ = pipelines.import_scans(scans, root, HERE)
    split, artifact = make_split(table, SPLIT, "refuse", pretrained.read("seen.parquet"), root)
    assert artifact.facts["leaking"] == []
    assert artifact.facts["pretraining_known"]
    assert list(split.test) == finetuned.facts["test"]
    assert not split.excluded


# -------------------------------------------------------------------------------- what users get wrong


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("workers were started")

    monkeypatch.setattr("logonet.distributed.trainer.fit", never)


def refused(cfg: pipelines.Finetuning, source: str, root: str) -> str:
    """The one sentence that a finetuning ends in; no run is left behind."""
    before = {e.uri for e in object_store.listing(f"{root}/finetune")}
    with pytest.raises(UserError) as err:
        pipelines.finetune(cfg, source, root, HERE, "finetuning")
    assert "\n" not in str(err.value)
    assert {e.uri for e in object_store.listing(f"{root}/finetune")} == before
    return str(err.value)


def test_weights_of_another_network(
    pretrained: Artifact, scans: str, root: str, home: str, no_training: None
) -> None:
    other = networks.build("ulkanet", 1, 2, **networks.tiny("ulkanet"))
    object_store.write(f"{home}/other.safetensors", save(other.state_dict()))
    cfg = finetuning(f"{home}/other.safetensors", backbone=tiny_backbone())
    assert "0.0 % of the encoder's parameters and 95.0 % are asked for" in refused(cfg, scans, root)
    # The file beside the right one: the method's, in which every name begins with "backbone.".
    whole = finetuning(f"{pretrained.uri}/method.safetensors", backbone=tiny_backbone())
    assert "once 'backbone.' is taken off" in refused(whole, scans, root)
    wide = {**tiny_backbone(), "dims": [16, 32, 48, 64]}
    assert "build the backbone with the options of the source" in refused(
        finetuning(pretrained.uri, backbone=wide), scans, root
    )


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("{home}/nothing/here", "holds no finished artifact"),
        ("{home}/nothing.safetensors", "nothing.safetensors"),
        ("{cases}", "is a 'cases' artifact, which has no weights"),
        ("models:/logonet-none@candidate", "logonet-none"),
        ("models:/logonet-clusterers@candidate", "has no weights.safetensors"),
    ],
)
def test_weights_that_are_not_there(
    weights: str,
    said: str,
    registered: list[str],
    finetuned: Artifact,
    scans: str,
    root: str,
    home: str,
    no_training: None,
) -> None:
    uri = weights.format(home=home, cases=f"{root}/cases/{finetuned.parents['cases']}")
    assert said in refused(finetuning(uri, backbone=tiny_backbone()), scans, root)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"backbone": {}}, "config section 'backbone' has no name"),
        ({"method": {}}, "config section 'method' has no name"),
        (
            {"method": {"name": "masked_clusters"}},
            "does not learn from labels; finetuning takes medcontext, supervised",
        ),
        ({"split": replace(SPLIT, fold=None)}, "no validation cases; set train.validate_every_epochs=0"),
        ({"crops": prepared_scans.CropSampling(size_vox=(40, 32, 32))}, "multiple"),
        ({"split": replace(SPLIT, test_share=0.95)}, "leaves none of"),
    ],
)
def test_settings(
    changes: dict[str, Any], said: str, scans: str, root: str, pretrained: Artifact, no_training: None
) -> None:
    assert said in refused(finetuning(**changes), scans, root)


def test_scans_without_labels(scans: str, root: str, home: str, no_training: None) -> None:
    for name in ("a", "b"):
        image, _ = phantom.phantom(ord(name), (16, 16, 16))
        blob = volume.encode_nifti(image.array_CXYZ[0].astype(np.int16), image.affine)
        object_store.write(f"{home}/bare/{name}.nii.gz", blob)
    assert "none of the 2 scans has a label" in refused(finetuning(), f"{home}/bare/", root)


def test_a_label_value_that_is_not_declared(root: str, home: str, capfd: Any) -> None:
    """Its case is left out, with the reason; where all are, nothing is trained."""
    executor = HERE
    phantom.write_dataset(f"{home}/strange", 2, size_vox=(16, 16, 16))
    spoil(f"{home}/strange/labelsTr/phantom_001.nii.gz")
    table, _ = pipelines.import_scans(f"{home}/strange/", root, executor)
    found, artifact = make_cases(table, (), prepared_scans.Config(), classes.Config(), root, executor)
    assert [ref.scan_id.rpartition("-")[0] for ref in found.refs] == ["phantom_000"]
    assert found.label_values == (0, 1, 2, 3)
    (left_out,) = json.loads(artifact.read("quarantine.json"))
    assert "phantom_001" in left_out["uri"]
    assert re.search(
        r"the value 200, which is no class of the dataset \(those are 0, 1, 2, 3\)", left_out["reason"]
    )
    assert left_out["reason"] in capfd.readouterr().out
    spoil(f"{home}/strange/labelsTr/phantom_000.nii.gz")
    table, _ = pipelines.import_scans(f"{home}/strange/", root, executor)
    with pytest.raises(
        UserError, match=r"none of the 2 labelled scans can be used; the first says: .*value 200"
    ):
        make_cases(table, (), prepared_scans.Config(), classes.Config(), root, executor)


def spoil(uri: str) -> None:
    """Give one voxel of a label map the value 200."""
    label = volume.decode_nifti(object_store.read(uri), uri)
    labels_XYZ = label.array_CXYZ[0].astype(np.uint8)
    labels_XYZ[0, 0, 0] = 200
    object_store.write(uri, volume.encode_nifti(labels_XYZ, label.affine))
