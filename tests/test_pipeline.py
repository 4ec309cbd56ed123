"""Whole small pipelines: real Ray, a real S3 server, a real MLflow."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from helpers import HERE, assert_same_gradients, on_ray, timeless, tiny_backbone

from logonet import pipelines, training
from logonet.clustering import fitting, kmeans
from logonet.core.errors import UserError
from logonet.data import crop_shards, cropping, phantom, provenance
from logonet.pipelines import clusterer_report
from logonet.storage import artifacts, object_store
from logonet.storage.artifacts import Artifact
from logonet.training import checkpoints


def tiny(**changes: Any) -> pipelines.Pretraining:
    settings: dict[str, Any] = {
        "epochs": 2,
        "global_batch": 4,
        "batch_size": 2,
        "lr": 3e-3,
        "warmup_epochs": 0.5,
    }
    settings |= {"gradient_sync": "flat", "checkpoint_every_steps": 1, "keep_checkpoints": 4}
    return pipelines.Pretraining(
        crops=cropping.Config(size_vox=(32, 32, 32), per_scan=2),
        clusterers=kmeans.Config(n=3, k_min=3, k_max=6, iterations=5),
        backbone=tiny_backbone(),
        method={"name": "masked_clusters", "phi1": 0.2, "final_relu": False},
        train=training.Config(**(settings | changes)),
    )


def pretrain(cfg: pipelines.Pretraining, scans: str, root: str) -> Artifact:
    return pipelines.pretrain(cfg, scans, root, on_ray(), "pipeline")


@pytest.fixture(scope="module")
def scans(place: str) -> str:
    """Three phantoms and a torn one, as a listing: the dataset.json lies above it."""
    phantom.write_dataset(f"{place}/scans", 3, size_vox=(40, 40, 40))
    object_store.write(f"{place}/scans/imagesTr/broken.nii.gz", b"\x1f\x8b not gzip")
    return f"{place}/scans/imagesTr/"


@pytest.fixture(scope="module")
def root(place: str) -> str:
    return f"{place}/runs"


@pytest.fixture(scope="module")
def made(scans: str, root: str, ray_local: None) -> tuple[Artifact, str]:
    """The run that the tests look at, on two workers, and what it said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        return pretrain(tiny(), scans, root), said.getvalue()


@pytest.fixture(scope="module")
def done(made: tuple[Artifact, str]) -> Artifact:
    return made[0]


@pytest.fixture
def prepared(done: Artifact, scans: str, root: str) -> tuple[crop_shards.CropTable, Artifact]:
    """The crops that the run was made of."""
    table, _ = pipelines.import_scans(scans, root, HERE)
    return pipelines.make_crops(table, tiny().crops, root, HERE)


def history_of(artifact: Artifact) -> list[dict[str, Any]]:
    return json.loads(artifact.read("history.json"))


def test_from_a_bucket_of_scans_to_a_tracked_pretrained_network(
    made: tuple[Artifact, str], scans: str, root: str
) -> None:
    done, said = made
    assert artifacts.verify(done, full=True) == []
    assert "broken.nii.gz" in said
    assert "epoch 2/2" in said
    history = history_of(done)
    assert [e["epoch"] for e in history] == [1, 2]
    assert history[1]["loss"] < history[0]["loss"]
    for name in (
        "backbone.safetensors",
        "method.safetensors",
        "config.yaml",
        "report.html",
        "masked_chain.png",
    ):
        assert done.read(name)
    assert {"manifest", "crops", "clusterers", "labels"} <= done.parents.keys()
    table, _ = pipelines.import_scans(scans, root, HERE)
    assert {scan.sha256 for scan in provenance.from_bytes(done.read("seen.parquet"))} == {
        scan.sha256 for scan in table.scans
    }

    from logonet import tracking

    client = tracking.runs.connect(tracking.tracking_uri())
    experiment = client.get_experiment_by_name("pipeline")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 1
    assert runs[0].info.status == "FINISHED"
    assert runs[0].data.tags["logonet.clusterers"] == done.parents["clusterers"]
    points = client.get_metric_history(runs[0].info.run_id, "loss")
    assert [p.value for p in points] == [e["loss"] for e in history]
    assert "masked_chain.png" in {f.path for f in client.list_artifacts(runs[0].info.run_id)}
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    assert secret not in str(runs[0].to_dictionary()) + said

    before = {e.uri: e.version for e in object_store.listing(root)}
    assert pretrain(tiny(), scans, root) == done
    assert {e.uri: e.version for e in object_store.listing(root)} == before, "a finished run wrote something"
    assert len(client.search_runs([experiment.experiment_id])) == 1


def test_another_number_of_workers_takes_the_same_steps(done: Artifact, scans: str, root: str) -> None:
    """1 worker accumulating, 2 workers side by side: the same samples, and the same gradients to rounding."""
    one = pipelines.pretrain(tiny(keep_checkpoints=5), scans, root, HERE, "alone")
    # A run that varies only in training shares everything upstream.
    assert one.fingerprint != done.fingerprint
    for stage in ("manifest", "crops", "clusterers", "labels"):
        assert len({e.uri.split("/")[5] for e in object_store.listing(f"{root}/{stage}")}) == 1
    assert_same_gradients(one, done)
    for a, b in zip(history_of(one), history_of(done)):
        assert a["accuracy_floor"] == b["accuracy_floor"]
        assert a["masked_share"] == b["masked_share"]


@pytest.mark.parametrize("sync", ["flat", pytest.param("ddp", marks=pytest.mark.slow)])
def test_an_interrupted_run_on_two_workers_resumes_exactly(scans: str, root: str, sync: str) -> None:
    """What is left when a run dies within epoch 2: the state after step 3, and no manifest."""
    cfg = tiny(gradient_sync=sync)
    whole = pretrain(cfg, scans, root)
    expected = history_of(whole)
    for entry in list(object_store.listing(whole.uri)):
        if "/checkpoints/step-00000003/" not in entry.uri:
            object_store.delete(entry.uri)
    assert len(checkpoints.all_of(whole.uri)) == 1
    again = pretrain(cfg, scans, root)
    assert timeless(history_of(again)) == timeless(expected)
    assert again.files["method.safetensors"].sha256 == whole.files["method.safetensors"].sha256


def test_all_scans_too_small_is_one_sentence(bucket: str) -> None:
    phantom.write_dataset(f"{bucket}/small", 2, size_vox=(8, 8, 8))
    cfg = tiny()
    with pytest.raises(UserError, match="no scan gave a crop of 32x32x32"):
        pipelines.pretrain(cfg, f"{bucket}/small/", f"{bucket}/runs", HERE, "small")
    assert not [e for e in object_store.listing(f"{bucket}/runs/crops") if e.uri.endswith("manifest.json")]


def test_no_scans_at_all_is_one_sentence(bucket: str) -> None:
    with pytest.raises(UserError, match="nowhere"):
        pipelines.pretrain(tiny(), f"{bucket}/nowhere/", f"{bucket}/runs", HERE, "none")


def test_clusterers_fitted_before_a_kill_are_kept(
    prepared: tuple[crop_shards.CropTable, Artifact], done: Artifact, root: str
) -> None:
    """A fit that died after one clusterer: the rest are fitted, the set is the same."""
    cfg = tiny()
    slices_ST = fitting.sample_slices(prepared[0], cfg.clusterers.max_slices, cfg.clusterers.seed, HERE)
    uri = done.parents["clusterers_uri"]
    object_store.delete_prefix(uri)
    counts = kmeans.cluster_counts(cfg.clusterers)
    kept = kmeans.fit_one(slices_ST, counts[1], 1, cfg.clusterers)
    object_store.write(f"{uri}/fits/00001.safetensors", kept.to_bytes())
    object_store.write(f"{uri}/fits/00002.safetensors", b"torn")
    again = pipelines.make_clusterers(*prepared, cfg.clusterers, root, HERE)
    assert (again.uri, again.facts["id"]) == (uri, done.parents["clusterers"])


def test_the_clusters_report_judges_and_shows(
    prepared: tuple[crop_shards.CropTable, Artifact], root: str, tmp_path: Path
) -> None:
    cfg = tiny()
    artifact = pipelines.make_clusterers(*prepared, cfg.clusterers, root, HERE)
    quality = clusterer_report.write(artifact.uri, str(tmp_path), max_slices=96, stability=2, executor=HERE)
    assert quality["k"].tolist() == kmeans.cluster_counts(cfg.clusterers)
    assert ((quality["perplexity"] >= 1) & (quality["perplexity"] <= quality["k"])).all()
    assert quality["nmi_two_seeds"].notna().sum() == 2
    page = (tmp_path / "report.html").read_text()
    assert "stability over two seeds" in page
    assert page.count("<img") == 1 + len(list(tmp_path.glob("sheet_*.png")))
    with pytest.raises(UserError, match="no finished clusterers artifact"):
        clusterer_report.write(prepared[1].uri, str(tmp_path), max_slices=96, stability=0, executor=HERE)


def test_the_plan_had_said_what_the_run_would_write(done: Artifact, scans: str, root: str) -> None:
    """Sizes, before anything is read, against what lies in the bucket: to the byte where values have no say."""
    import torch

    from logonet.planning import sizes

    cfg = pipelines.resolve(tiny())
    with torch.device("meta"):
        net = sizes.network(training.build_method(cfg.backbone, cfg.method, sizes.facts_of(cfg)))
    table, _ = pipelines.import_scans(scans, root, HERE)
    planned = sizes.sizes(cfg, sizes.of_manifest(table, "the import"), net)

    def size_of(uri: str) -> int:
        entry = object_store.stat(uri)
        assert entry is not None, uri
        return entry.size_bytes

    shards = object_store.listing(f"{root}/crops/{done.parents['crops']}/shards")
    assert planned.files["crops_cache"] == sum(e.size_bytes for e in shards)
    shards = object_store.listing(f"{root}/labels/{done.parents['labels']}/shards")
    assert planned.files["labels"] == sum(e.size_bytes for e in shards)
    images = [e.size_bytes for e in object_store.listing(f"{root}/scans") if "/images/" in e.uri]
    assert planned.files["prepared"] == sum(images)
    fitted_bytes = size_of(f"{done.parents['clusterers_uri']}/clusterers.safetensors")
    # The inertias in its header have as many digits as they have.
    assert abs(planned.files["clusterers"] - fitted_bytes) <= 3 * len(planned.cluster_sizes) + 8
    assert net.backbone_file == done.files["backbone.safetensors"].size_bytes
    assert net.model_file == done.files["method.safetensors"].size_bytes
    saved = {
        e.uri.rsplit("/", 1)[1]: e.size_bytes for e in object_store.listing(checkpoints.all_of(done.uri)[-1])
    }
    assert net.checkpoint_bytes == sum(n for name, n in saved.items() if name.endswith(".safetensors"))
    assert planned.steps == done.facts["steps"]
