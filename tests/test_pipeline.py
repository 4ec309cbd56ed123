"""Whole small pipelines: real Ray, a real S3 server, a real MLflow."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from helpers import timeless, tiny_backbone

from logonet import (
    artifacts,
    checkpoints,
    cluster,
    clusterers,
    clusters_report,
    crops,
    data,
    phantom,
    stages,
    store,
    train,
)
from logonet.cluster import Resources
from logonet.errors import UserError

RESOURCES = Resources(workers=2)


def tiny(**training: Any) -> stages.Pretraining:
    return stages.Pretraining(
        crops=crops.Config(size_vox=(32, 32, 32), per_scan=2),
        clusterers=clusterers.Config(n=3, k_min=3, k_max=6, iterations=5),
        backbone=tiny_backbone(),
        method={"name": "masked_clusters", "phi1": 0.2, "final_relu": False},
        train=train.Config(
            **{"epochs": 2, "global_batch": 4, "batch_size": 2, "lr": 3e-3, "warmup_epochs": 0.5, **training}
        ),
    )


@pytest.fixture
def scans(bucket: str, ray_local: None) -> str:
    phantom.write_dataset(f"{bucket}/scans", 3, size_vox=(40, 40, 40))
    return f"{bucket}/scans/"


def test_from_a_bucket_of_scans_to_a_tracked_pretrained_network(scans: str, bucket: str, capfd: Any) -> None:
    scans += "imagesTr/"  # a listing, not the dataset.json above it
    store.write(f"{scans}broken.nii.gz", b"\x1f\x8b not gzip")
    root = f"{bucket}/runs"
    done = stages.pretrain(tiny(), scans, root, RESOURCES, "pipeline")
    assert artifacts.verify(done, full=True) == []
    said = capfd.readouterr().out
    assert "broken.nii.gz" in said
    history = json.loads(done.read("history.json"))
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

    from logonet import registry

    client = registry._client(registry.tracking_uri())
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

    before = {e.uri: e.version for e in store.listing(root)}
    again = stages.pretrain(tiny(), scans, root, RESOURCES, "pipeline")
    assert again == done
    assert {e.uri: e.version for e in store.listing(root)} == before, "a finished run wrote something"
    assert len(client.search_runs([experiment.experiment_id])) == 1

    # A run that varies only in training shares everything upstream.
    other = stages.pretrain(tiny(lr=1e-3), scans, root, RESOURCES, "pipeline")
    assert other.fingerprint != done.fingerprint
    for stage in ("manifest", "crops", "clusterers", "labels"):
        assert len({e.uri.split("/")[5] for e in store.listing(f"{root}/{stage}")}) == 1


def test_another_number_of_workers_takes_the_same_steps(scans: str, bucket: str) -> None:
    """1 worker accumulating, 2 workers side by side: the same samples and losses to rounding."""
    # A tiny learning rate: AdamW's first step has the size of lr whatever the gradient's, so with a large one
    # rounding of a gradient near 0 would move weights by 2 lr.
    cfg, root = tiny(epochs=1, lr=1e-7), f"{bucket}/runs"
    one = stages.pretrain(cfg, scans, root, Resources(workers=1), "workers")
    a = json.loads(one.read("history.json"))
    store.delete_prefix(one.uri)
    two = stages.pretrain(cfg, scans, root, Resources(workers=2), "workers")
    assert one.fingerprint == two.fingerprint
    b = json.loads(two.read("history.json"))
    assert a[0]["loss"] == pytest.approx(b[0]["loss"], rel=1e-5)
    assert a[0]["accuracy_floor"] == b[0]["accuracy_floor"]
    assert a[0]["masked_share"] == b[0]["masked_share"]


@pytest.mark.parametrize("sync", ["flat", pytest.param("ddp", marks=pytest.mark.slow)])
def test_an_interrupted_run_on_two_workers_resumes_exactly(
    scans: str, bucket: str, sync: str, tmp_path: Any
) -> None:
    """What is left when a run dies after epoch 1: its checkpoint, and no manifest."""
    cfg = tiny(gradient_sync=sync, keep_checkpoints=3)
    whole = stages.pretrain(cfg, scans, f"{bucket}/whole", RESOURCES, "resume")
    expected = json.loads(whole.read("history.json"))
    kept = f"{bucket}/whole/pretrain/{whole.fingerprint}"
    for entry in list(store.listing(kept)):
        if "/checkpoints/step-00000002/" not in entry.uri:
            store.delete(entry.uri)
    assert len(checkpoints.all_of(kept)) == 1
    again = stages.pretrain(cfg, scans, f"{bucket}/whole", RESOURCES, "resume")
    assert timeless(json.loads(again.read("history.json"))) == timeless(expected)
    assert again.files["method.safetensors"].sha256 == whole.files["method.safetensors"].sha256


def test_all_scans_too_small_is_one_sentence(bucket: str, ray_local: None) -> None:
    phantom.write_dataset(f"{bucket}/small", 2, size_vox=(8, 8, 8))
    cfg = tiny()
    with pytest.raises(UserError, match="no scan gave a crop of 32x32x32"):
        stages.pretrain(cfg, f"{bucket}/small/", f"{bucket}/runs", RESOURCES, "small")
    assert not [e for e in store.listing(f"{bucket}/runs/crops") if e.uri.endswith("manifest.json")]


def test_no_scans_at_all_is_one_sentence(bucket: str, ray_local: None) -> None:
    with pytest.raises(UserError, match="nowhere"):
        stages.pretrain(tiny(), f"{bucket}/nowhere/", f"{bucket}/runs", RESOURCES, "none")


def test_clusterers_fitted_before_a_kill_are_kept(scans: str, bucket: str) -> None:
    """A fit that died after one clusterer: the rest are fitted, the set is the same."""
    cfg, share = tiny(), cluster.share(RESOURCES)
    table, _ = stages.import_scans(scans, f"{bucket}/runs", share)
    crop_table, crops_artifact = stages.make_crops(table, cfg.crops, f"{bucket}/runs", share)
    artifact = stages.make_clusterers(crop_table, crops_artifact, cfg.clusterers, f"{bucket}/runs", share)
    slices_ST = data.sample_slices(crop_table, cfg.clusterers.max_slices, cfg.clusterers.seed, share)
    store.delete_prefix(artifact.uri)
    counts = clusterers.cluster_counts(cfg.clusterers)
    kept = clusterers.fit_one(slices_ST, counts[1], 1, cfg.clusterers)
    store.write(f"{artifact.uri}/fits/00001.safetensors", kept.to_bytes())
    store.write(f"{artifact.uri}/fits/00002.safetensors", b"torn")
    again = stages.make_clusterers(crop_table, crops_artifact, cfg.clusterers, f"{bucket}/runs", share)
    assert again.facts["id"] == artifact.facts["id"]


def test_the_clusters_report_judges_and_shows(scans: str, bucket: str, tmp_path: Path) -> None:
    cfg, share, root = tiny(), cluster.share(RESOURCES), f"{bucket}/runs"
    table, _ = stages.import_scans(scans, root, share)
    crop_table, crops_artifact = stages.make_crops(table, cfg.crops, root, share)
    artifact = stages.make_clusterers(crop_table, crops_artifact, cfg.clusterers, root, share)
    quality = clusters_report.write(artifact.uri, str(tmp_path), max_slices=96, stability=2, share=share)
    assert quality["k"].tolist() == clusterers.cluster_counts(cfg.clusterers)
    assert ((quality["perplexity"] >= 1) & (quality["perplexity"] <= quality["k"])).all()
    assert quality["nmi_two_seeds"].notna().sum() == 2
    page = (tmp_path / "report.html").read_text()
    assert "stability over two seeds" in page
    assert page.count("<img") == 1 + len(list(tmp_path.glob("sheet_*.png")))
    with pytest.raises(UserError, match="no finished clusterers artifact"):
        clusters_report.write(crops_artifact.uri, str(tmp_path), max_slices=96, stability=0, share=share)
