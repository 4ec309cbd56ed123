"""One trial as Ray Tune runs it: a pretraining, then a finetuning if that is the objective.

A trial has a process of its own, which only waits; the workers that it starts have resources of their own.
"""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from logonet import pipelines, tracking, training
from logonet.core import config
from logonet.core.errors import UserError, user_sentence
from logonet.distributed import trainer
from logonet.distributed.cluster import ResourceAllocation, Resources
from logonet.distributed.executor import RayExecutor
from logonet.pipelines import Pretraining
from logonet.storage import artifacts
from logonet.storage.artifacts import Artifact
from logonet.sweep import space as spaces
from logonet.sweep.outcome import Objective
from logonet.sweep.settings import Sweep, pretraining_of
from logonet.sweep.space import Settings

MEASURED = {"probe": "probe_dice", "effective_rank": "effective_rank", "finetune": "val_dice"}


@dataclass(frozen=True)
class Plan:
    """What a trial needs to know. Plain data, so that it can be sent to other processes.

    Attributes:
        share: the part of the cluster that a trial gets.
        known: recorded epochs of trials that did not come to an end, by `key_of` their settings.
        parent: id of the sweep's MLflow run, or None when the server was away.
        settings: of the trials, if they are known beforehand.
        pretrained: URIs of what to finetune, one for each of ``settings``; empty for the search itself.
        upstream: an actor that makes what trials share, one thing at a time, for searches that decide as they go.
    """

    sweep: Sweep
    resources: Resources
    share: ResourceAllocation
    known: Mapping[str, list[dict[str, Any]]]
    parent: str | None
    settings: Sequence[Settings] = ()
    pretrained: Sequence[str] = ()
    upstream: Any = None

    def settings_of(self, point: Mapping[str, Any]) -> Settings:
        """The settings of a trial by its Tune config: a place among the known ones, or what a searcher suggests."""
        return self.settings[point["place"]] if "place" in point else dict(point)


def key_of(settings: Settings) -> str:
    return config.fingerprint(settings)


def objective_of(entry: Mapping[str, Any], name: Objective) -> float | None:
    """The objective in an epoch's entry of the history; None where it was not measured."""
    if name == "accuracy":
        value = entry.get("accuracy", math.nan) - entry.get("accuracy_floor", math.nan)
    else:
        value = entry.get(MEASURED[name], math.nan)
    return float(value) if math.isfinite(value) else None


def tune_result(entry: Mapping[str, Any], name: Objective, counts: bool = True) -> dict[str, Any]:
    """An epoch as it is reported to Tune. ``counts``: it belongs to the phase that the objective is measured in."""
    value = objective_of(entry, name) if counts else None
    known = {} if value is None else {"objective": value}
    return {"entry": {**entry, **known}, **({"t": entry["epoch"], **known} if counts else {})}


class Report(TuneReportCallback):
    """Reports every epoch of a training run to Tune."""

    def __init__(self, name: Objective, counts: bool) -> None:
        super().__init__()
        self.name, self.counts = name, counts

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        super().after_report(run_context, [tune_result(metrics[0], self.name, self.counts)], checkpoint)


def run_trial(point: Mapping[str, Any], plan: Plan) -> None:
    """What Tune runs for each trial. A failure is reported with its reason, so that the other trials go on."""
    settings = plan.settings_of(point)
    try:
        if plan.pretrained:
            uri = plan.pretrained[point["place"]]
            if (artifact := artifacts.find(uri)) is None:
                raise UserError(f"{uri} is gone; run the sweep again under another name")
            _, final = _finetune(plan, settings, artifact)
        else:
            final = _pretrain(plan, settings)
        tune.report({"finished": True, "final": final})
    except trainer.LeaderLost:
        raise  # a machine's failure, not the trial's: Tune starts the trial anew, and it goes on
    except Exception as err:
        reason = user_sentence(err) or ": ".join([type(err).__name__, *str(err).strip().splitlines()[-1:]])
        said = f"finetuning: {reason}" if plan.pretrained else reason
        tune.report({"failed": said, "trace": traceback.format_exc()})


def _pretrain(plan: Plan, settings: Settings) -> dict[str, Any]:
    """A trial of the search. Returns what `_finetune` does where a finetuning is the objective, else {}."""
    sweep, name = plan.sweep, plan.sweep.config.objective
    for entry in plan.known.get(key_of(settings), ()):  # the scheduler of this call has not seen them
        tune.report(tune_result(entry, name))
    cfg = pretraining_of(spaces.apply(config.to_dict(sweep.base), settings))
    if plan.upstream is not None:
        ray.get(plan.upstream.make.remote(cfg))
    executor = RayExecutor(plan.resources, plan.share, [Report(name, counts=name != "finetune")])
    tags = _tags(plan, settings) | ({} if plan.parent is None else {tracking.PARENT_TAG: plan.parent})
    trial = pipelines.Trial(started=lambda uri: tune.report({"pretrain": uri}), tags=tags)
    where = sweep.source, sweep.root, executor, sweep.experiment
    artifact = pipelines.pretrain(cfg, *where, labelled=sweep.labelled, trial=trial)
    if name == "finetune":
        history, final = _finetune(plan, settings, artifact, [Report(name, counts=True)])
    else:
        history, final = json.loads(artifact.read("history.json")), {}
    # Again, since a run that had ended before reports nothing; the scheduler takes an epoch once.
    for entry in history:
        tune.report(tune_result(entry, name))
    return final


def _finetune(
    plan: Plan, settings: Settings, pretrained: Artifact, callbacks: Sequence[Any] = ()
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The finetuning's history, and {"dice": its best validation Dice, "uri"}."""
    sweep, executor = plan.sweep, RayExecutor(plan.resources, plan.share, callbacks)
    cfg = replace(sweep.finetuning, init=replace(sweep.finetuning.init, weights=pretrained.uri))
    where = sweep.labelled or sweep.source, sweep.root, executor, sweep.experiment
    artifact = pipelines.finetune(cfg, *where, trial=pipelines.Trial(tags=_tags(plan, settings)))
    history = json.loads(artifact.read("history.json"))
    if (step := training.best_step(history)) is None:
        raise UserError(f"the finetuning at {artifact.uri} measured no validation Dice")
    best = next(e["val_dice"] for e in history if e["step"] == step)
    return history, {"dice": best, "uri": artifact.uri}


def _tags(plan: Plan, settings: Settings) -> dict[str, str]:
    return {"logonet.sweep": plan.sweep.uri, "logonet.sweep.settings": json.dumps(settings)}


@ray.remote(num_cpus=0)
class Upstream:
    """Makes what trials share, one after another: two that asked at once would both compute it."""

    def __init__(self, sweep: Sweep, executor: RayExecutor) -> None:
        self.sweep, self.executor = sweep, executor

    def make(self, cfg: Pretraining) -> None:
        pipelines.upstream(cfg, self.sweep.source, self.sweep.root, self.executor, self.sweep.labelled)
