"""A sweep: Ray Tune over pretraining runs, with records of our own, so that whatever dies loses nothing.

A trial is a pretraining run like any other: an artifact under ``<root>/pretrain``, which its own checkpoints resume,
and which shares crops, clusterers and pseudo-labels with all others. Ray Tune searches and stops early. What has
been tried lies in `records`; Ray's own state of the experiment is scratch, since after a crash it lags behind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray import tune

from logonet import pipelines, tracking, training
from logonet.core import config
from logonet.core.errors import UserError
from logonet.distributed import cluster
from logonet.distributed.cluster import Resources
from logonet.distributed.executor import RayExecutor
from logonet.pipelines.common import say
from logonet.storage import artifacts, object_store
from logonet.sweep import outcome, records
from logonet.sweep import space as spaces
from logonet.sweep.recorder import Recorder
from logonet.sweep.records import Trial
from logonet.sweep.settings import Budget, Sweep, pretraining_of, resolve, spec
from logonet.sweep.trial import Plan, Upstream, confirm_trial, key_of, run_trial
from logonet.sweep.tuning import drive

SHARED = ("crops", "clusterers", "labels", "cases")  # what trials have in common
SAME_DRAWS = 200  # draws that bring nothing new before a space counts as exhausted


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
    training.accumulation(sweep.base.train, resources.fixed("a sweep"))
    runs, share = cluster.allocate_trials(resources, wanted, at_once)
    records.claim(sweep.uri, spec(sweep))
    say("sweep", f"{sweep.uri}\n{spaces.describe(sweep.space)}")
    trials = {key_of(t.settings): t for t in records.read_all(sweep.uri)}
    tracker = tracking.Tracker(**_tracking(sweep))
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
                _make_shared(sweep, open_trials, RayExecutor(resources))
            else:
                actor: Any = Upstream
                plan = replace(plan, upstream=actor.remote(sweep, RayExecutor(resources, share)))
            say(
                "sweep",
                f"{len(open_trials)} of {wanted} trials to do, {runs} at once on {share.workers} workers each",
            )
            recorder = Recorder(plan, trials, tracker, confirms=False)
            drive(tune.with_parameters(run_trial, plan=plan), plan, recorder, len(open_trials), runs, left_s)
    for trial in trials.values():
        if trial.status == "running":  # Tune ends without a word about them when its time is up
            trial.status, trial.reason = "waiting", "the hours of the budget were over"
            records.write(sweep.uri, trial)
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
        pipelines.register(winner.final["uri"], sweep.register, lineage=lineage)
    return winner


def _tracking(sweep: Sweep) -> dict[str, Any]:
    return {
        "fingerprint": f"sweep-{config.fingerprint(spec(sweep))}",
        "experiment": sweep.experiment,
        "run_name": f"sweep-{sweep.name}",
        "params": config.to_dict(spec(sweep)),
        "tags": {"logonet.stage": "sweep", "logonet.sweep": sweep.uri},
        "artifact_root": object_store.join(sweep.root, "mlflow-artifacts"),
    }


def _unfinished(trials: Mapping[str, Trial]) -> dict[str, list[dict[str, Any]]]:
    return {key: t.history for key, t in trials.items() if not t.ended}


def _open(sweep: Sweep, trials: dict[str, Trial], wanted: int) -> list[Trial]:
    """Trials to do: those that were begun or failed, and new ones; where a search decides as it goes, blank ones."""
    ended = [t for t in trials.values() if t.ended]
    if sweep.config.search != "random":
        begun = [t for t in trials.values() if not t.ended]
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
    return [t for t in chosen.values() if not t.ended]


def _left_s(sweep: Sweep, budget: Budget) -> float:
    return budget.hours * 3600 - records.state(sweep.uri).get("spent_s", 0.0) if budget.hours else math.inf


def _make_shared(sweep: Sweep, trials: Sequence[Trial], executor: RayExecutor) -> None:
    """Crops, clusterers, pseudo-labels and probe cases of all trials, each once, before any trial starts."""
    before = {stage: _artifacts(sweep, stage) for stage in SHARED}
    base = config.to_dict(sweep.base)
    stands_on: dict[str, set[str]] = {}
    for trial in trials:
        try:
            cfg = pretraining_of(spaces.apply(base, trial.settings))
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
                up = pipelines.upstream(cfg, sweep.source, sweep.root, executor, sweep.labelled)
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
    records.note(sweep.uri, shared={stage: {"used": u, "made": m} for stage, (u, m) in counts.items()})


def _artifacts(sweep: Sweep, stage: str) -> set[str]:
    """Fingerprints of the finished artifacts of ``stage``."""
    prefix = object_store.join(sweep.root, stage)
    paths = (object_store.relative(entry.uri, prefix).split("/") for entry in object_store.listing(prefix))
    return {path[0] for path in paths if path[1:] == [artifacts.MANIFEST]}


def _confirm(
    plan: Plan, trials: Mapping[str, Trial], tracker: tracking.Tracker, wanted: int, runs: int
) -> None:
    """Finetune the best of the trials that ran to the end, as many as ``wanted``."""
    ended = [t for t in trials.values() if t.status == "done" and not math.isnan(t.objective)]
    best = sorted(ended, key=lambda t: t.objective, reverse=True)[:wanted]
    todo = [t for t in best if not t.final]
    if not todo:
        return
    say("confirm", f"finetuning {len(todo)} of {len(ended)} trials that ran to the end")
    plan = replace(plan, settings=[t.settings for t in todo])
    fn = tune.with_parameters(confirm_trial, plan=plan, uris=[t.pretrain for t in todo])
    drive(fn, plan, Recorder(plan, dict(trials), tracker, confirms=True), len(todo), runs, math.inf)


ENDED = {
    "done": "FINISHED",
    "stopped": "KILLED",
    "failed": "FAILED",
    "waiting": "KILLED",
    "running": "KILLED",
}


def _close_runs(sweep: Sweep, trials: Mapping[str, Trial], parent: str | None) -> None:
    """Every trial's MLflow run: there, below the sweep's, with its end and its objective."""
    fingerprint = config.fingerprint(spec(sweep))
    for key, trial in trials.items():
        tags = {
            "logonet.stage": "pretrain",
            "logonet.sweep": sweep.uri,
            "logonet.sweep.trial": str(trial.index),
        }
        tags |= {"logonet.sweep.outcome": f"{trial.status} {trial.reason}".strip()}
        if parent is not None:
            tags[tracking.PARENT_TAG] = parent
        metrics = {"objective": trial.objective, "final_dice": trial.final.get("dice", math.nan)}
        tracking.catch_up(
            fingerprint=trial.pretrain.rsplit("/", 1)[-1] or f"{fingerprint}-{key}",
            experiment=sweep.experiment,
            run_name=f"{sweep.name}-trial-{trial.index}",
            params=trial.settings,
            tags=tags,
            artifact_root=object_store.join(sweep.root, "mlflow-artifacts"),
            history=[{k: v for k, v in e.items() if k != "objective"} for e in trial.history],
            files={},
            status=ENDED[trial.status],
            metrics=metrics,
            timeout_s=20,
        )
