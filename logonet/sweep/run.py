"""A sweep: Ray Tune over pretraining runs, with records of our own, so that whatever dies loses nothing.

A trial is a pretraining run like any other: an artifact under ``<root>/pretrain``, which its own checkpoints resume,
and which shares crops, clusterers and pseudo-labels with all others. Ray Tune searches and stops early. What has
been tried lies in `records`; Ray's own state of the experiment is scratch, since after a crash it lags behind.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import ray
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from logonet import artifacts, cluster, config, draws, probe, registry, splits, stages, store, train
from logonet.artifacts import Artifact
from logonet.cluster import Resources, Share
from logonet.errors import UserError, user_sentence
from logonet.stages import Finetuning, Pretraining
from logonet.stages.common import say
from logonet.stages.finetuning import Init
from logonet.sweep import outcome, records
from logonet.sweep import space as spaces
from logonet.sweep.outcome import MEASURES, Objective
from logonet.sweep.records import Trial
from logonet.sweep.space import Settings, Space

SHARED = ("crops", "clusterers", "labels", "cases")  # what trials have in common
STATE = "state.json"
CONTROLLER = "controller"  # of the workers' group; beside train.PLACE
LOST_TRIALS = 3  # how often a trial is started anew when the machine under it is lost
SAME_DRAWS = 200  # draws that bring nothing new before a space counts as exhausted
TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial's first word is where it writes
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the old one keeps silent when told to
}


@dataclass(frozen=True)
class Config:
    """How to search and whom to believe.

    Attributes:
        objective: what is made large. "probe": Dice of a linear head on the frozen encoder; "effective_rank": of the
            embeddings; "accuracy": of the pseudo-labels, over that of always naming the most frequent; "finetune":
            validation Dice of a finetuning that follows each pretraining. Never the pretext loss, whose scale
            depends on the number of clusters.
        search: "random" draws by the seed (and walks through grids); "optuna" learns from the trials before.
        stop_early: by asynchronous successive halving (ASHA) on every epoch's report.
        grace_epochs: no trial is stopped before.
        reduction: at each rung the best 1 / reduction of the trials go on.
        seed: of the search.
    """

    objective: Objective = "probe"
    search: Literal["random", "optuna"] = "random"
    stop_early: bool = True
    grace_epochs: int = 1
    reduction: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.grace_epochs < 1 or self.reduction <= 1:
            raise UserError("grace_epochs must be at least 1, and reduction above 1")


@dataclass(frozen=True)
class Budget:
    """What the sweep may cost; a larger one on the same root goes on.

    Attributes:
        trials: settings to try; 0 is the whole grid, where all keys are grids.
        hours: of the clock, over all calls; 0 does not limit. Trials that run when it is over wait for more.
    """

    trials: int = 0
    hours: float = 0.0


@dataclass(frozen=True)
class Sweep:
    """What is searched, on what, and how.

    Attributes:
        base: the pretraining that trials vary.
        finetuning: of objective "finetune", of ``confirm`` and of the winner; its network is the trial's.
        labelled: labelled scans for the probe and the finetuning; empty for those of ``source``.
        confirm: so many of the trials that ran to the end, the best first, are finetuned: whether the proxy can be
            believed is in the report, and the winner is the one with the best validation Dice.
        register: finetune the winner too and register it as ``logonet-seg-<register>``; empty does not.
    """

    name: str
    space: Space
    base: Pretraining
    finetuning: Finetuning
    source: str
    root: str
    experiment: str
    config: Config = field(default_factory=Config)
    labelled: str = ""
    confirm: int = 0
    register: str = ""

    @property
    def uri(self) -> str:
        return store.join(self.root, "sweep", self.name)

    @property
    def judged_on(self) -> str:
        return self.labelled or self.source

    @property
    def epochs(self) -> int:
        """Of a trial's reports to the scheduler."""
        return (self.finetuning if self.config.objective == "finetune" else self.base).train.epochs


def resolve(sweep: Sweep) -> Sweep:
    """``sweep`` with defaults written out, checked as far as that goes without data.

    Raises:
        UserError: a searched key or value that no trial could run, a split without validation cases...
    """
    base, tuned = stages.resolve(sweep.base), sweep.finetuning
    if sweep.config.objective == "probe" and base.probe is None:
        base = replace(base, probe=probe.Config())
    if base.split is not None:
        tuned = replace(tuned, split=base.split)  # or pretraining would know the finetuning's test cases
    # The trial's own network; and its Dice is wanted at the end whatever the recipe says.
    every = tuned.train.validate_every_epochs or tuned.train.epochs
    tuned = replace(tuned, backbone={}, train=replace(tuned.train, validate_every_epochs=every))
    split = base.split or splits.Config()
    finetunes = sweep.confirm or sweep.register or sweep.config.objective == "finetune"
    if (base.probe is not None or finetunes) and split.fold is None:
        raise UserError("the sweep is judged on validation cases and split.fold is null; set split.fold=0")
    if finetunes:  # before any hour is spent
        stages.resolve_finetuning(replace(tuned, backbone=base.backbone, init=Init()))
    spaces.check(sweep.space, config.to_dict(base), lambda values: _pretraining(values))
    return replace(sweep, base=base, finetuning=tuned)


def _pretraining(values: Mapping[str, Any]) -> Pretraining:
    return stages.resolve(config.from_dict(Pretraining, values))


def spec(sweep: Sweep) -> records.Spec:
    """What must not change under the sweep's name."""
    cfg = config.to_dict(sweep.config)
    return records.Spec(
        name=sweep.name,
        space=sweep.space.to_dict(),
        base=config.to_dict(sweep.base),
        objective=cfg.pop("objective"),
        source=sweep.source,
        labelled=sweep.labelled,
        search=cfg.pop("search"),
        seed=cfg.pop("seed"),
        finetuning=config.to_dict(sweep.finetuning),
        scheduler=cfg,
    )


# ----------------------------------------------------------------------------------------------- one trial


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
    share: Share
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
        if train.PLACE in said:  # before the first epoch; this runs in the actor that controls the workers
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
        cfg = _pretraining(spaces.apply(config.to_dict(plan.sweep.base), settings))
        if plan.upstream is not None:
            ray.get(plan.upstream.make.remote(cfg))
        artifact = stages.pretrain(
            cfg,
            plan.sweep.source,
            plan.sweep.root,
            plan.resources,
            plan.sweep.experiment,
            labelled=plan.sweep.labelled,
            trial=_within(plan, settings, Report(name, counts=not tunes), starts=True),
        )
        history = json.loads(artifact.read("history.json"))
        final: dict[str, Any] = {}
        if tunes:
            history, final = _finetuned(plan, settings, artifact, [Report(name, counts=True)])
        # Again, since a run that had ended before says nothing; the scheduler takes an epoch once.
        for entry in history:
            tune.report(told(entry, name))
        tune.report({"finished": True, "final": final})
    except (
        Exception
    ) as err:  # one trial's failure is its own: it is recorded with its reason, the others go on
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
    except Exception as err:
        tune.report({"failed": f"finetuning: {_reason(err)}", "trace": traceback.format_exc()})


def _within(plan: Plan, settings: Settings, *callbacks: Any, starts: bool = False) -> stages.Trial:
    tags = {"logonet.sweep": plan.sweep.uri, "logonet.sweep.settings": json.dumps(settings)}
    if plan.parent is not None and starts:
        tags[registry.PARENT_TAG] = plan.parent
    return stages.Trial(
        share=plan.share,
        callbacks=tuple(callbacks),
        started=(lambda uri: tune.report({"pretrain": uri})) if starts else None,
        tags=tags,
    )


def _finetuned(
    plan: Plan, settings: Settings, pretrained: Artifact, callbacks: Sequence[Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The finetuning's history, and {"dice": its best validation Dice, "uri"}."""
    cfg = plan.sweep.finetuning
    artifact = stages.finetune(
        replace(cfg, init=replace(cfg.init, weights=pretrained.uri)),
        plan.sweep.judged_on,
        plan.sweep.root,
        plan.resources,
        plan.sweep.experiment,
        trial=_within(plan, settings, *callbacks),
    )
    history = json.loads(artifact.read("history.json"))
    step = train.best_step(history)
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

    def __init__(self, sweep: Sweep, share: Share) -> None:
        self.sweep, self.share = sweep, share

    def make(self, cfg: Pretraining) -> None:
        stages.upstream(cfg, self.sweep.source, self.sweep.root, self.share, self.sweep.labelled)


# ------------------------------------------------------------------------------------------------- records


class Recorder(tune.Callback):
    """Writes down, in the driver, all that is heard of trials."""

    def __init__(
        self, plan: Plan, trials: dict[str, Trial], deadline: float, tracker: registry.Tracker, confirms: bool
    ) -> None:
        self.plan, self.trials, self.deadline = plan, trials, deadline
        self.tracker, self.confirms = tracker, confirms
        self.began: dict[str, float] = {}
        self.running: dict[str, dict[str, str]] = {}  # by Tune's id of the trial: PLACE and CONTROLLER

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its callbacks; what this one knows lies in the records

    def _of(self, tuned: Any) -> Trial:
        settings = self.plan.settings_of(tuned.config)
        key = key_of(settings)
        if key not in self.trials:
            index = 1 + max((t.index for t in self.trials.values()), default=-1)
            self.trials[key] = Trial(index, dict(settings))
        return self.trials[key]

    def _write(self, trial: Trial) -> None:
        records.write(self.plan.sweep.uri, trial)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        mine = self._of(trial)
        self.began[trial.trial_id] = time.monotonic() - mine.wall_s
        if not self.confirms:
            mine.status, mine.reason = "running", ""
            self._write(mine)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        mine = self._of(trial)
        mine.wall_s = round(time.monotonic() - self.began[trial.trial_id], 1)
        if train.PLACE in result:
            self.running[trial.trial_id] = {k: result[k] for k in (train.PLACE, CONTROLLER)}
        if "pretrain" in result:
            mine.pretrain = result["pretrain"]
        if result.get("final"):
            mine.final = result["final"]
        if "failed" in result:
            mine.reason = result["failed"]
            store.write(f"{self.plan.sweep.uri}/trials/{mine.index:04d}.error.txt", result["trace"].encode())
        if "t" in result:
            entry = result["entry"]
            new = entry["epoch"] not in {e["epoch"] for e in mine.history}
            mine.history = sorted(
                [e for e in mine.history if e["epoch"] != entry["epoch"]] + [entry], key=lambda e: e["epoch"]
            )
            if new:
                self._say_epoch(mine, entry)
        self._write(mine)

    def _say_epoch(self, trial: Trial, entry: dict[str, Any]) -> None:
        sweep = self.plan.sweep
        value = f"{entry['objective']:.4f}" if "objective" in entry else "not measured"
        text = f"epoch {entry['epoch']}/{sweep.epochs}  {MEASURES[sweep.config.objective]} {value}"
        say(f"trial {trial.index}", f"{text}  {outcome.settings_text(trial.settings)}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        mine, result = self._of(trial), trial.last_result or {}
        self._free(trial.trial_id)
        if self.confirms:
            if mine.final:
                say(f"trial {mine.index}", f"finetuned: validation Dice {mine.final['dice']:.4f}")
            else:
                say(f"trial {mine.index}", mine.reason)
            self._write(mine)
            return
        if "failed" in result:
            mine.status = "failed"
        elif result.get("finished"):
            mine.status = "done"
        elif time.monotonic() >= self.deadline:
            mine.status, mine.reason = "waiting", "the hours of the budget were over"
        else:
            mine.status, mine.reason = "stopped", f"stopped after epoch {mine.history[-1]['epoch']}"
        self._write(mine)
        say(f"trial {mine.index}", f"{mine.status}  {mine.reason}".rstrip())
        self.tracker.sync(outcome.best_so_far(list(self.trials.values())))

    def _free(self, trial_id: str) -> None:
        """End the workers of a trial and give back their place: Tune ends only the process that drives them.

        Ray's own cleaner may come late or never. The controller goes first, or it would start new workers.
        """
        from ray.util.placement_group import PlacementGroup, remove_placement_group

        if (held := self.running.pop(trial_id, None)) is not None:
            ray.kill(ray.cloudpickle.loads(bytes.fromhex(held[CONTROLLER])))
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(held[train.PLACE]))))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        # Failures of the trial's own are results; this is a machine that went, more often than is borne.
        mine = self._of(trial)
        mine.reason = (
            f"the process that drove it was lost {LOST_TRIALS + 1} times; the same command tries again"
        )
        if not self.confirms:
            mine.status = "failed"
        self._write(mine)
        say(f"trial {mine.index}", f"failed  {mine.reason}")


# --------------------------------------------------------------------------------------------------- sweep


def run(sweep: Sweep, resources: Resources, budget: Budget, *, at_once: int = 0) -> Trial | None:
    """Search, and return the winner; None when no trial came to an end. Run again, it goes on.

    Args:
        budget: may be another than before.
        at_once: trials side by side; 0 takes as many as the cluster has room for.

    Raises:
        UserError: a trial that can never fit, a sweep of that name with other settings...
    """
    sweep = resolve(sweep)
    wanted = budget.trials or spaces.default_trials(sweep.space)
    if wanted is None:
        raise UserError("not all searched keys are grids; say how many trials with --budget.trials")
    train.accumulation(sweep.base.train, resources.workers)
    runs, share = cluster.shares(resources, wanted, at_once)
    records.claim(sweep.uri, spec(sweep))
    say("sweep", f"{sweep.uri}\n{spaces.describe(sweep.space)}")
    trials = {key_of(t.settings): t for t in records.read_all(sweep.uri)}
    tracker = registry.Tracker(**_tracking(sweep))
    parent = tracker.run_id()
    plan = Plan(sweep, resources, share, _unfinished(trials), parent)
    open_trials = _open(sweep, trials, wanted)
    if open_trials:
        left_s = _left_s(sweep, budget)
        if left_s <= 0:
            say(
                "sweep",
                f"the {budget.hours:g} hours of the budget are used up; a larger --budget.hours goes on",
            )
        else:
            known = sweep.config.search == "random"
            if known:
                plan = replace(plan, settings=[t.settings for t in open_trials])
                _make_shared(sweep, open_trials, cluster.share(resources))
            else:
                actor: Any = Upstream
                plan = replace(plan, upstream=actor.remote(sweep, share))
            say(
                "sweep",
                f"{len(open_trials)} of {wanted} trials to do, {runs} at once on {share.workers} workers each",
            )
            recorder = Recorder(plan, trials, time.monotonic() + left_s, tracker, confirms=False)
            _tune(tune.with_parameters(run_trial, plan=plan), plan, recorder, len(open_trials), runs, left_s)
    _confirm(plan, trials, tracker, max(sweep.confirm, 1 if sweep.register else 0), runs)
    winner = outcome.winner(list(trials.values()))
    files = outcome.report(sweep.uri, sweep.uri)
    _close_runs(sweep, trials, parent)
    waiting = len(_open(sweep, trials, wanted))
    tracker.log_files(files)
    if not tracker.close("KILLED" if waiting else "FINISHED"):
        say("mlflow", "the tracking server is away; the same command catches up later")
    print(outcome.summary(sweep.uri), flush=True)
    say("report", f"{sweep.uri}/report.html")
    if winner is not None and sweep.register:
        if not winner.final:
            raise UserError(f"the winner, trial {winner.index}, could not be registered: {winner.reason}")
        lineage = {"sweep": config.fingerprint(spec(sweep)), "sweep_uri": sweep.uri}
        stages.register(winner.final["uri"], sweep.register, lineage=lineage)
    return winner


def _tracking(sweep: Sweep) -> dict[str, Any]:
    return {
        "fingerprint": f"sweep-{config.fingerprint(spec(sweep))}",
        "experiment": sweep.experiment,
        "run_name": f"sweep-{sweep.name}",
        "params": config.to_dict(spec(sweep)),
        "tags": {"logonet.stage": "sweep", "logonet.sweep": sweep.uri},
        "artifact_root": store.join(sweep.root, "mlflow-artifacts"),
    }


def _unfinished(trials: Mapping[str, Trial]) -> dict[str, list[dict[str, Any]]]:
    return {key: t.history for key, t in trials.items() if t.status not in ("done", "stopped")}


def _open(sweep: Sweep, trials: dict[str, Trial], wanted: int) -> list[Trial]:
    """Trials to do: those that were begun or failed, and new ones; where a search decides as it goes, blank ones."""
    ended = [t for t in trials.values() if t.status in ("done", "stopped")]
    if sweep.config.search != "random":
        begun = [t for t in trials.values() if t.status not in ("done", "stopped")]
        blank = [Trial(-1, {})] * (wanted - len(ended) - len(begun))
        return begun + blank
    base = config.to_dict(sweep.base)
    chosen: dict[str, Trial] = {}
    index, since_new = 0, 0
    while len(chosen) < wanted and since_new < SAME_DRAWS:
        settings = spaces.complete(sweep.space, base, spaces.draw(sweep.space, index, sweep.config.seed))
        key = key_of(settings)
        since_new = since_new + 1 if key in chosen else 0
        if key not in chosen:
            chosen[key] = trials.get(key) or Trial(len(chosen), settings)
        index += 1
    if len(chosen) < wanted:
        say("sweep", f"the space holds {len(chosen)} different settings, fewer than the {wanted} asked for")
    for key, trial in chosen.items():
        trials.setdefault(key, trial)
    return [t for t in chosen.values() if t.status not in ("done", "stopped")]


def _left_s(sweep: Sweep, budget: Budget) -> float:
    return budget.hours * 3600 - _state(sweep).get("spent_s", 0.0) if budget.hours else math.inf


def _state(sweep: Sweep) -> dict[str, Any]:
    uri = store.join(sweep.uri, STATE)
    return json.loads(store.read(uri)) if store.exists(uri) else {}


def _make_shared(sweep: Sweep, trials: Sequence[Trial], share: Share) -> None:
    """Crops, clusterers, pseudo-labels and probe cases of all trials, each once, before any trial starts."""
    before = {stage: _artifacts(sweep, stage) for stage in SHARED}
    base = config.to_dict(sweep.base)
    stands_on: dict[str, set[str]] = {}
    for trial in trials:
        try:
            cfg = _pretraining(spaces.apply(base, trial.settings))
        except UserError:
            continue  # it says so itself, and is recorded with the reason
        shared = config.fingerprint(
            [
                config.to_dict(part) if part else None
                for part in (cfg.split, cfg.crops, cfg.clusterers, cfg.probe)
            ],
            cfg.method["name"],
        )
        if shared not in stands_on:
            try:
                up = stages.upstream(cfg, sweep.source, sweep.root, share, sweep.labelled)
            except UserError as err:
                say("shared", f"cannot be made for trial {trial.index}: {err}")
                continue
            # Some are known by what they hold; their URIs end on the fingerprint.
            stands_on[shared] = {value.rsplit("/", 1)[-1] for value in up.lineage.values()}
    counts = {
        stage: (
            sum(any(fp in ids for ids in stands_on.values()) for fp in now),
            len(now - before[stage]),
        )
        for stage in SHARED
        for now in [_artifacts(sweep, stage)]
    }
    told = ", ".join(f"{used} {stage} ({made} made now)" for stage, (used, made) in counts.items() if used)
    say("shared", f"{len(trials)} trials stand on {told}")
    store.write_json(
        store.join(sweep.uri, STATE),
        _state(sweep) | {"shared": {k: {"used": u, "made": m} for k, (u, m) in counts.items()}},
    )


def _artifacts(sweep: Sweep, stage: str) -> set[str]:
    """Fingerprints of the finished artifacts of ``stage``."""
    prefix = store.join(sweep.root, stage)
    paths = (store.relative(entry.uri, prefix).split("/") for entry in store.listing(prefix))
    return {path[0] for path in paths if path[1:] == [artifacts.MANIFEST]}


def _tune(fn: Any, plan: Plan, recorder: Recorder, trials: int, runs: int, left_s: float) -> None:
    """Let Tune drive ``trials`` trials, ``runs`` at a time."""
    for name, value in TUNE_SETTINGS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    cfg = plan.sweep.config
    decides = cfg.search == "optuna" and not recorder.confirms
    began, spent_s = time.monotonic(), _state(plan.sweep).get("spent_s", 0.0)
    tuner = tune.Tuner(
        # A trial's process only waits; its workers have resources of their own, counted by cluster.shares.
        tune.with_resources(fn, {"CPU": cluster.DRIVER_CPUS}),
        param_space={} if decides else {"place": tune.grid_search(list(range(trials)))},
        tune_config=tune.TuneConfig(
            num_samples=trials if decides else 1,
            max_concurrent_trials=runs,
            search_alg=_optuna(plan, recorder) if decides else None,
            scheduler=FIFOScheduler() if recorder.confirms else _scheduler(plan.sweep, recorder.trials),
            time_budget_s=None if math.isinf(left_s) else left_s,
        ),
        run_config=tune.RunConfig(
            name=f"{plan.sweep.name}-{time.time_ns():x}",
            storage_path=f"{tempfile.gettempdir()}/logonet-ray-tune",
            callbacks=[recorder],
            failure_config=tune.FailureConfig(max_failures=LOST_TRIALS),
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    finally:
        spent = _state(plan.sweep) | {"spent_s": round(spent_s + time.monotonic() - began, 1)}
        store.write_json(store.join(plan.sweep.uri, STATE), spent)


@dataclass(frozen=True)
class _Ended:
    """As much of a trial as a scheduler looks at."""

    trial_id: str


def _scheduler(sweep: Sweep, trials: Mapping[str, Trial]) -> TrialScheduler:
    """Successive halving that knows the trials that ended in calls before."""
    cfg = sweep.config
    # The last rung lies before the last epoch: a trial stopped there would be lost for nothing.
    if not cfg.stop_early or sweep.epochs <= cfg.grace_epochs:
        return FIFOScheduler()
    asha = ASHAScheduler(
        time_attr="t",
        metric="objective",
        mode="max",
        max_t=sweep.epochs - 1,
        grace_period=cfg.grace_epochs,
        reduction_factor=cfg.reduction,
        stop_last_trials=False,
    )
    for trial in trials.values():
        if trial.status in ("done", "stopped"):
            ended: Any = _Ended(f"ended-{trial.index}")
            asha.on_trial_add(None, ended)  # type: ignore[arg-type]
            for entry in trial.history:
                asha.on_trial_result(None, ended, told(entry, cfg.objective))  # type: ignore[arg-type]
    return asha


def _optuna(plan: Plan, recorder: Recorder) -> Any:
    """Optuna's sampler, told of every trial that ended, and asked to go on with those that did not."""
    try:
        import optuna
        from ray.tune.search.optuna import OptunaSearch
    except ImportError:
        raise UserError("--search optuna wants the package optuna; pip install 'logonet[optuna]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sweep, base = plan.sweep, config.to_dict(plan.sweep.base)
    points = {key: spaces.encode(sweep.space, t.settings, base) for key, t in recorder.trials.items()}
    ended = [key for key, t in recorder.trials.items() if t.status in ("done", "stopped")]
    first = [spaces.encode(sweep.space, settings, base) for settings in sweep.space.first]
    open_points = [p for key, p in points.items() if key not in ended]
    untried = [p for p in first if p not in points.values()]

    class Search(OptunaSearch):
        def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
            if "objective" in result:  # a trial's first word is where it writes
                super().on_trial_result(trial_id, result)

    search = Search(
        space=OptunaSearch.convert_search_space(spaces.domains(sweep.space)),
        metric="objective",
        mode="max",
        points_to_evaluate=[p for p in open_points + untried if p is not None] or None,
        seed=draws.integer(sweep.config.seed, "optuna", len(ended)) % 2**31,
    )
    for key in ended:
        value = outcome.objective(recorder.trials[key])
        if not math.isnan(value) and (point := points[key]) is not None:
            search.add_evaluated_point(point, value)
    return search


def _confirm(
    plan: Plan, trials: Mapping[str, Trial], tracker: registry.Tracker, wanted: int, runs: int
) -> None:
    """Finetune the best of the trials that ran to the end, as many as ``wanted``."""
    ended = [t for t in trials.values() if t.status == "done" and not math.isnan(outcome.objective(t))]
    best = sorted(ended, key=outcome.objective, reverse=True)[:wanted]
    todo = [t for t in best if not t.final]
    if not todo:
        return
    say("confirm", f"finetuning {len(todo)} of {len(ended)} trials that ran to the end")
    plan = replace(plan, settings=[t.settings for t in todo])
    fn = tune.with_parameters(confirm_trial, plan=plan, uris=[t.pretrain for t in todo])
    _tune(fn, plan, Recorder(plan, dict(trials), math.inf, tracker, confirms=True), len(todo), runs, math.inf)


ENDED = {
    "done": "FINISHED",
    "stopped": "KILLED",
    "failed": "FAILED",
    "waiting": "KILLED",
    "running": "KILLED",
}


def _close_runs(sweep: Sweep, trials: Mapping[str, Trial], parent: str | None) -> None:
    """Every trial's MLflow run: there, below the sweep's, with its end and its objective."""
    for key, trial in trials.items():
        tags = {
            "logonet.stage": "pretrain",
            "logonet.sweep": sweep.uri,
            "logonet.sweep.trial": str(trial.index),
        }
        tags |= {"logonet.sweep.outcome": f"{trial.status} {trial.reason}".strip()}
        if parent is not None:
            tags[registry.PARENT_TAG] = parent
        metrics = {"objective": outcome.objective(trial), "final_dice": trial.final.get("dice", math.nan)}
        registry.catch_up(
            fingerprint=trial.pretrain.rsplit("/", 1)[-1] or f"{config.fingerprint(spec(sweep))}-{key}",
            experiment=sweep.experiment,
            run_name=f"{sweep.name}-trial-{trial.index}",
            params=trial.settings,
            tags=tags,
            artifact_root=store.join(sweep.root, "mlflow-artifacts"),
            history=[{k: v for k, v in e.items() if k != "objective"} for e in trial.history],
            files={},
            status=ENDED[trial.status],
            metrics=metrics,
            timeout_s=20,
        )
