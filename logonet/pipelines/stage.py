"""What every stage shares: find or make and commit, lines of a job's log, and the MLflow run of an artifact."""

from __future__ import annotations

import html
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import logonet
from logonet import reporting, tracking, training
from logonet.core import config, redaction
from logonet.core.config import Component
from logonet.core.errors import UserError
from logonet.core.execution import Executor
from logonet.storage import artifacts, object_store
from logonet.storage.artifacts import Artifact
from logonet.storage.object_store import Stored
from logonet.training import weight_transfer
from logonet.training.dataset import Dataset


class StageExecutor(Executor, Protocol):
    """What stages run on: `logonet.distributed.executor.RayExecutor` or `logonet.training.local.LocalExecutor`."""

    def check(self, cfg: training.Config, method: Component) -> None:
        """UserError when the workers cannot share the steps of ``cfg``."""

    def train(self, job: training.Job, dataset: Dataset) -> dict[str, Any]:
        """Train ``job``; returns {"history", "files", "tracked"}. Run again, it resumes."""


@dataclass(frozen=True)
class Trial:
    """What a sweep adds to a run that is one of its trials. The run itself is one like any other.

    Attributes:
        started: told the artifact's URI before training begins.
        tags: of its MLflow run, such as its parent.
    """

    started: Callable[[str], None] | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Made:
    """What a stage has computed: files by name, still to be stored or stored already, and facts about them."""

    files: Mapping[str, bytes | Stored]
    metadata: Mapping[str, Any]


def open_stage(uri: str, *stages: str) -> Artifact:
    """The finished artifact at ``uri``. UserError when it is none of ``stages``."""
    artifact = artifacts.find(uri)
    if artifact is None or artifact.stage not in stages:
        raise UserError(
            f"{uri} is no finished {' or '.join(stages)} artifact; give ROOT/{'|'.join(stages)}/<fingerprint>"
        )
    return artifact


def run_stage(
    root: str,
    stage: str,
    cfg: Any,
    parents: Mapping[str, str],
    make: Callable[[str], Made],
    describe: Callable[[Artifact], str],
    *,
    recorded: Any = None,
    lineage: Mapping[str, str] | None = None,
) -> Artifact:
    """The finished artifact of a stage: found where it was made before, otherwise made and committed.

    Args:
        cfg, parents: what the artifact is made of; they decide its address.
        make: computes it; told the URI, below which it may keep what an interrupted run can go on with.
        describe: what the log says of it.
        recorded: the config to record, where that is more than ``cfg``.
        lineage: more ancestors to record, which do not decide the address.
    """
    uri, fingerprint = artifacts.address(root, stage, cfg, parents)
    if (found := artifacts.find(uri)) is not None:
        say(stage, f"{describe(found)}  (already there: {uri})")
        return found
    started = time.monotonic()
    made = make(uri)
    stored = {
        name: object_store.write(object_store.join(uri, name), file) if isinstance(file, bytes) else file
        for name, file in made.files.items()
    }
    artifact = artifacts.commit(
        uri,
        stage,
        fingerprint,
        config=cfg if recorded is None else recorded,
        parents={**parents, **(lineage or {})},
        files=stored,
        facts=made.metadata,
    )
    say(stage, f"{describe(artifact)}  {took(started)}  {uri}")
    return artifact


def say(stage: str, text: str) -> None:
    """One line of a job's log."""
    print(redaction.without_names(redaction.without_secrets(f"{stage:<11} {text}")), flush=True)


def took(started: float) -> str:
    return f"{time.monotonic() - started:.1f} s"


def plain(name: str) -> str:
    """``name`` in the characters that MLflow takes in a metric's name."""
    return re.sub(r"[^\w./ -]", "_", name)


def last_loss(artifact: Artifact) -> str:
    """What the log says of a finished training."""
    final = artifact.facts["final"]
    return f"{final['epoch']} epochs, loss {final['loss']:.4f}"


# What MLflow shows of a run: nothing that names a scan, since file names can be patients'.
TRACKED = (
    ".png",
    ".yaml",
    ".html",
    ".tex",
    "summary.csv",
    "summary.json",
    "transfer.json",
    "comparisons.csv",
    "runs.csv",
)


@dataclass(frozen=True)
class Run:
    """A tracked run, before it has been made: its artifact's address, its name, and what MLflow is to know of it."""

    uri: str
    fingerprint: str
    name: str
    tracking: dict[str, Any] | None


def run_tracked(
    root: str,
    stage: str,
    label: str,
    cfg: Any,
    own: Any,
    parents: Mapping[str, str],
    lineage: Mapping[str, str],
    make: Callable[[Run], Made],
    describe: Callable[[Artifact], str],
    experiment: str | None,
    trial: Trial | None = None,
) -> Artifact:
    """`run_stage` for a run that MLflow shows.

    Args:
        label: of the run, before the first digits of its fingerprint.
        cfg: the whole config, which is recorded; ``own`` is the part of it that decides the address.
        experiment: of MLflow; None tracks nothing.
    """
    uri, fingerprint = artifacts.address(root, stage, own, parents)
    run = Run(uri, fingerprint, f"{label}-{fingerprint[:8]}", None)
    if experiment is not None:
        tags = {
            "logonet.stage": "evaluate" if stage == "evaluation" else stage,
            "logonet.git_commit": tracking.git_commit(os.path.dirname(os.path.dirname(logonet.__file__))),
            "logonet.command": redaction.command_line(sys.argv),
            **{f"logonet.{k}": v for k, v in lineage.items()},
            **(trial.tags if trial else {}),
        }
        known = {
            "fingerprint": fingerprint,
            "experiment": experiment,
            "run_name": run.name,
            "params": config.to_dict(cfg),
            "tags": tags,
            "artifact_root": object_store.join(root, "mlflow-artifacts"),
        }
        run = replace(run, tracking=known)
    if trial and trial.started:
        trial.started(uri)
    artifact = run_stage(
        root, stage, own, parents, lambda _: make(run), describe, recorded=cfg, lineage=lineage
    )
    catch_up(run.tracking, artifact)
    return artifact


def catch_up(run: dict[str, Any] | None, artifact: Artifact) -> None:
    """Bring MLflow up to date from the run's own records, once; until the server was there, at every call."""
    delivered = object_store.join(artifact.uri, "tracked.json")
    if run is None or object_store.exists(delivered):
        return
    history = json.loads(artifact.read("history.json"))
    files = {n: artifact.read(n) for n in artifact.files if n.endswith(TRACKED)}
    tracker = tracking.Tracker(**run)
    tracker.sync(history)
    tracker.log_files(files)
    if tracker.close():
        object_store.write_json(delivered, {"run": run["run_name"], "experiment": run["experiment"]})
        say("mlflow", f"run '{run['run_name']}' in experiment '{run['experiment']}'")
    else:
        told = "the tracking server is away; the run is complete and the same command catches up later"
        say("mlflow", told)


SAMPLES = {"crops": "crops", "clusterers": "clusterers", "labels": "pseudo-labels"}
CHAIN = {
    "pretrain_manifest": "scans of pretraining",
    **{f"pretrain_{key}": what for key, what in SAMPLES.items()},
    "pretrain": "pretraining",
    "manifest": "scans",
    **SAMPLES,
    "sweep": "sweep",
    "split": "split",
    "cases": "labelled cases",
    "weights": "initial weights",
    "finetune": "finetuning",
    "postprocess": "post-processing",
    "registered": "registered model",
    "test_manifest": "scans judged on",
}


def transfer_section(handover: weight_transfer.Report) -> tuple[str, Any]:
    """A page's section of what weights were taken over."""
    return "Weights taken over", reporting.transfer_section(handover.by_module(), handover.summary())


def page(
    run: Run, sections: Sequence[tuple[str, Any]], lineage: Mapping[str, str], own: str, config_yaml: str
) -> bytes:
    """A run's page: its sections, where it comes from (``own`` names its own box), and the config behind it."""
    known = [
        (what, lineage[key], lineage.get(f"{key}_uri", "")) for key, what in CHAIN.items() if lineage.get(key)
    ]
    end: list[tuple[str, Any]] = [
        ("Lineage", reporting.lineage([*known, (own, run.fingerprint, "this page")])),
        ("Artifact", f"<p><code>{html.escape(run.uri)}</code></p>"),
    ]
    if config_yaml:
        end.insert(1, ("Config of the training", f"<pre>{html.escape(config_yaml)}</pre>"))
    return reporting.run_page(run.name, [*sections, *end]).encode()
