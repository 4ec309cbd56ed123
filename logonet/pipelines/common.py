"""What every stage shares: lines of a job's log, and the MLflow run that goes with an artifact."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import logonet
from logonet import tracking
from logonet.core import config, redaction
from logonet.distributed.cluster import ResourceAllocation
from logonet.storage import object_store
from logonet.storage.artifacts import Artifact


@dataclass(frozen=True)
class Trial:
    """What a sweep decides for a run that is one of its trials. The run itself is one like any other.

    Attributes:
        share: the part of the cluster it gets.
        callbacks: Ray Train callbacks.
        started: told the artifact's URI before training begins.
        tags: of its MLflow run, such as its parent.
    """

    share: ResourceAllocation
    callbacks: tuple[Any, ...] = ()
    started: Callable[[str], None] | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


def say(stage: str, text: str) -> None:
    """One line of a job's log."""
    print(redaction.without_names(redaction.without_secrets(f"{stage:<11} {text}")), flush=True)


def took(started: float) -> str:
    return f"{time.monotonic() - started:.1f} s"


def options(part: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in part.items() if k != "name"}


# What MLflow shows of a run: nothing that names a scan, since file names can be patients'.
TRACKED = (".png", ".yaml", ".html", "summary.csv", "summary.json", "transfer.json")
SEEN_FILE = "seen.parquet"
LINEAGE_FILE = "lineage.json"  # of a registered model


def tracking_of(
    stage: str,
    name: str,
    fingerprint: str,
    cfg: Any,
    lineage: dict[str, str],
    root: str,
    experiment: str,
    trial: Trial | None = None,
) -> dict[str, Any]:
    """What `registry.Tracker` is to know of a run."""
    return {
        "fingerprint": fingerprint,
        "experiment": experiment,
        "run_name": name,
        "params": config.to_dict(cfg),
        "tags": {
            "logonet.stage": stage,
            "logonet.git_commit": tracking.git_commit(os.path.dirname(os.path.dirname(logonet.__file__))),
            "logonet.command": redaction.command_line(sys.argv),
            **{f"logonet.{k}": v for k, v in lineage.items()},
            **(trial.tags if trial else {}),
        },
        "artifact_root": object_store.join(root, "mlflow-artifacts"),
    }


def catch_up(run: dict[str, Any], uri: str, artifact: Artifact) -> None:
    """Bring MLflow up to date from the run's own records, once; until the server was there, at every call."""
    delivered = object_store.join(uri, "tracked.json")
    if object_store.exists(delivered):
        return
    history = json.loads(artifact.read("history.json"))
    files = {n: artifact.read(n) for n in artifact.files if n.endswith(TRACKED)}
    if tracking.catch_up(**run, history=history, files=files):
        object_store.write_json(delivered, {"run": run["run_name"], "experiment": run["experiment"]})
        say("mlflow", f"run '{run['run_name']}' in experiment '{run['experiment']}'")
    else:
        say(
            "mlflow", "the tracking server is away; the run is complete and the same command catches up later"
        )


CHAIN = (
    ("pretrain_manifest", "scans of pretraining"),
    ("pretrain_crops", "crops"),
    ("pretrain_clusterers", "clusterers"),
    ("pretrain_labels", "pseudo-labels"),
    ("pretrain", "pretraining"),
    ("manifest", "scans"),
    ("crops", "crops"),
    ("clusterers", "clusterers"),
    ("labels", "pseudo-labels"),
    ("sweep", "sweep"),
    ("split", "split"),
    ("cases", "labelled cases"),
    ("weights", "initial weights"),
    ("finetune", "finetuning"),
    ("registered", "registered model"),
    ("test_manifest", "scans judged on"),
)


def chain(lineage: Mapping[str, str], own: str, fingerprint: str) -> list[tuple[str, str, str]]:
    """The boxes of `report.lineage`: what is known of where a run comes from, and the run itself at the end."""
    uri = {key: lineage.get(f"{key}_uri", "") for key, _ in CHAIN}
    known = [(what, lineage[key], uri[key]) for key, what in CHAIN if lineage.get(key)]
    return [*known, (own, fingerprint, "this page")]
