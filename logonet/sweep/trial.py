"""One trial: a pretraining, and where that is the objective a finetuning, as Ray Tune runs it.

It runs in a process of its own that only waits; the workers it starts have resources of their own.
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

CONTROLLER = "controller"  # of the workers' group; beside train.PLACE


@dataclass(frozen=True)
class Plan:
    """What a trial needs to know. Plain data, so that it travels.

    Attributes:
        share: the part of the cluster a trial gets.
        known: epochs that are recorded of trials that did not come to an end, by `key_of` their settings.
        parent: id of the sweep's MLflow run, or None when the server was away.
        settings: of the trials that are known beforehand.
        upstream: an actor that makes what trials share, one thing at a time, for searches that decide as they go.
    """

    sweep: Sweep
    resources: Resources
    share: ResourceAllocation
    known: Mapping[str, list[dict[str, Any]]]
    parent: str | None
    settings: Sequence[Settings] = ()
    upstream: Any = None

    def settings_of(self, point: Mapping[str, Any]) -> Settings:
        if "place" in point:
            return self.settings[point["place"]]
        return spaces.decode(self.sweep.space, point)


def key_of(settings: Settings) -> str:
    return config.fingerprint(settings)


def objective_of(entry: Mapping[str, Any], name: Objective) -> float | None:
    """The objective in an epoch's entry of the history; None where it was not measured."""
    if name == "accuracy":
        value = entry.get("accuracy", math.nan) - entry.get("accuracy_floor", math.nan)
    else:
        measured = {"probe": "probe_dice", "effective_rank": "effective_rank", "finetune": "val_dice"}
        value = entry.get(measured[name], math.nan)
    return float(value) if math.isfinite(value) else None


def told(entry: Mapping[str, Any], name: Objective, counts: bool = True) -> dict[str, Any]:
    """An epoch as Tune hears of it. ``counts``: it belongs to the phase that the objective is measured in."""
    value = objective_of(entry, name) if counts else None
    known = {} if value is None else {"objective": value}
    return {"entry": {**entry, **known}, **({"t": entry["epoch"], **known} if counts else {})}


class Report(TuneReportCallback):
    """Sends every epoch of a training run to Tune."""

    def __init__(self, name: Objective, counts: bool) -> None:
        super().__init__()
        self.name, self.counts = name, counts

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        said = metrics[0]
        if trainer.PLACE in said:  # before the first epoch; this runs in the actor that controls the workers
            controller = ray.get_runtime_context().current_actor
            said = {**said, CONTROLLER: ray.cloudpickle.dumps(controller).hex()}
        else:
            said = told(said, self.name, self.counts)
        super().after_report(run_context, [said], checkpoint)


def run_trial(point: Mapping[str, Any], plan: Plan) -> None:
    """What Tune runs for each trial: a pretraining, and where that is the objective a finetuning."""
    settings, name = plan.settings_of(point), plan.sweep.config.objective
    tunes = name == "finetune"
    try:
        for entry in plan.known.get(key_of(settings), ()):  # what the scheduler heard before it died
            tune.report(told(entry, name))
        cfg = pretraining_of(spaces.apply(config.to_dict(plan.sweep.base), settings))
        if plan.upstream is not None:
            ray.get(plan.upstream.make.remote(cfg))
        artifact = pipelines.pretrain(
            cfg,
            plan.sweep.source,
            plan.sweep.root,
            RayExecutor(plan.resources, plan.share, [Report(name, counts=not tunes)]),
            plan.sweep.experiment,
            labelled=plan.sweep.labelled,
            trial=_within(plan, settings, starts=True),
        )
        history = json.loads(artifact.read("history.json"))
        final: dict[str, Any] = {}
        if tunes:
            history, final = _finetuned(plan, settings, artifact, [Report(name, counts=True)])
        # Again, since a run that had ended before says nothing; the scheduler takes an epoch once.
        for entry in history:
            tune.report(told(entry, name))
        tune.report({"finished": True, "final": final})
    except trainer.LeaderLost:
        raise  # a machine's failure, not the trial's: Tune starts it anew, and it goes on
    except Exception as err:
        # One trial's failure is its own: it is recorded with its reason, the others go on.
        tune.report({"failed": _reason(err), "trace": traceback.format_exc()})


def confirm_trial(point: Mapping[str, Any], plan: Plan, uris: Sequence[str]) -> None:
    """Finetune what a trial has pretrained."""
    place = point["place"]
    try:
        artifact = artifacts.find(uris[place])
        if artifact is None:
            raise UserError(f"{uris[place]} is gone; run the sweep again under another name")
        _, final = _finetuned(plan, plan.settings[place], artifact, [])
        tune.report({"finished": True, "final": final})
    except trainer.LeaderLost:
        raise  # a machine's failure, not the trial's: Tune starts it anew, and it goes on
    except Exception as err:
        tune.report({"failed": f"finetuning: {_reason(err)}", "trace": traceback.format_exc()})


def _within(plan: Plan, settings: Settings, *, starts: bool = False) -> pipelines.Trial:
    tags = {"logonet.sweep": plan.sweep.uri, "logonet.sweep.settings": json.dumps(settings)}
    if plan.parent is not None and starts:
        tags[tracking.PARENT_TAG] = plan.parent
    return pipelines.Trial(
        started=(lambda uri: tune.report({"pretrain": uri})) if starts else None,
        tags=tags,
    )


def _finetuned(
    plan: Plan, settings: Settings, pretrained: Artifact, callbacks: Sequence[Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The finetuning's history, and {"dice": its best validation Dice, "uri"}."""
    cfg = plan.sweep.finetuning
    artifact = pipelines.finetune(
        replace(cfg, init=replace(cfg.init, weights=pretrained.uri)),
        plan.sweep.judged_on,
        plan.sweep.root,
        RayExecutor(plan.resources, plan.share, callbacks),
        plan.sweep.experiment,
        trial=_within(plan, settings),
    )
    history = json.loads(artifact.read("history.json"))
    step = training.best_step(history)
    if step is None:
        raise UserError(f"the finetuning at {artifact.uri} measured no validation Dice")
    best = next(e["val_dice"] for e in history if e["step"] == step)
    return history, {"dice": best, "uri": artifact.uri}


def _reason(err: BaseException) -> str:
    """One line; the traceback is kept beside the trial's record."""
    last = str(err).strip().splitlines()[-1:]
    return user_sentence(err) or ": ".join([type(err).__name__, *last])


@ray.remote(num_cpus=0)
class Upstream:
    """Makes what trials share, one after another: two that asked at once would both compute it."""

    def __init__(self, sweep: Sweep, executor: RayExecutor) -> None:
        self.sweep, self.executor = sweep, executor

    def make(self, cfg: Pretraining) -> None:
        pipelines.upstream(cfg, self.sweep.source, self.sweep.root, self.executor, self.sweep.labelled)
