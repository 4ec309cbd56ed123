"""What tests of sweeps share: the smallest sweep on phantoms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from helpers import quick_backbone

from logonet import pipelines, tracking, training
from logonet.clustering import kmeans
from logonet.data import cropping, phantom, splits
from logonet.data.prepared_scans import CropSampling
from logonet.distributed.cluster import Resources
from logonet.storage import artifacts, object_store
from logonet.sweep import space as spaces
from logonet.sweep.settings import Config, Sweep
from logonet.training import linear_probe

ONE = Resources(workers=1)
SPLIT = splits.Config(test_share=0.2, folds=2)


def write_scans(root: str) -> str:
    return phantom.write_dataset(f"{root}/scans", 5, size_vox=(32, 32, 32), classes=2)


def pretraining(**training_options: Any) -> pipelines.Pretraining:
    options = {"epochs": 1, "global_batch": 2, "batch_size": 2, "lr": 3e-3, "warmup_epochs": 0}
    return pipelines.Pretraining(
        split=SPLIT,
        crops=cropping.Config(size_vox=(16, 16, 16), per_scan=2),
        clusterers=kmeans.Config(n=2, k_min=2, k_max=3, iterations=3),
        backbone=quick_backbone(),
        method={"name": "masked_clusters", "phi1": 0.2, "final_relu": False},
        train=training.Config(**(options | training_options)),
        probe=linear_probe.Config(
            train_cases=1, val_cases=1, crops_per_case=1, voxels_per_crop=128, iterations=5
        ),
    )


def finetuning() -> pipelines.Finetuning:
    return pipelines.Finetuning(
        split=SPLIT,
        crops=CropSampling(size_vox=(16, 16, 16)),
        train=training.Config(epochs=1, steps_per_epoch=1, global_batch=1, lr=1e-3, warmup_epochs=0),
    )


def sweep(root: str, scans: str, space: dict[str, Any], **changes: Any) -> Sweep:
    made = Sweep(
        name="tried",
        space=spaces.parse(space, "test"),
        base=pretraining(),
        finetuning=finetuning(),
        source=scans,
        root=f"{root}/runs",
        experiment=root.rsplit("/", 1)[1],
        config=Config(stop_early=False),
    )
    return replace(made, **changes)


def versions(uri: str) -> dict[str, str]:
    return {e.uri: e.version for e in object_store.listing(uri)}


def finished(root: str, stage: str) -> list[str]:
    """URIs of the finished artifacts of ``stage``."""
    found = {
        object_store.relative(e.uri, f"{root}/{stage}").split("/")[0]
        for e in object_store.listing(f"{root}/{stage}")
    }
    return [uri for name in sorted(found) if artifacts.find(uri := f"{root}/{stage}/{name}") is not None]


def runs_of(experiment: str) -> list[Any]:
    client = tracking.runs.connect(tracking.tracking_uri())
    return client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
