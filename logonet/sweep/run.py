"""A sweep: Ray Tune over pretraining runs, with records of our own, so that nothing is lost whatever dies.

A trial is a pretraining run like any other: an artifact under ``<root>/pretrain``, which its own checkpoints resume,
and which shares crops, clusterers and pseudo-labels with all others. Ray Tune searches and stops early. What has
been tried is in `records`; Ray's own state of the experiment is scratch, since after a crash it lags behind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from logonet import pipelines, tracking, training
from logonet.core import config
from logonet.core.errors import UserError
from logonet.distributed import cluster
from logonet.distributed.cluster import Resources
from logonet.distributed.executor import RayExecutor
from logonet.pipelines.stage import say
from logonet.storage import artifacts, object_store
from logonet.sweep import outcome, records
from logonet.sweep import space as spaces
from logonet.sweep.records import Trial
from logonet.sweep.settings import Budget, Sweep, pretraining_of, resolve, spec
from logonet.sweep.trial import Plan, Upstream, key_of
from logonet.sweep.tuning import Recorder, drive

# What trials have in common: stage -> the key of a run's lineage that ends on the artifact's fingerprint.
SHARED = {
    "crops": "crops",
    "prepared": "prepared",
    "clusterers": "clusterers_uri",
    "labels": "labels",
    "cases": "probe_cases",
}
SAME_DRAWS = 200  # draws that bring nothing new before a space counts as exhausted
MLFLOW_STATUS = {"done": "FINISHED", "failed": "FAILED"}  # all others: KILLED


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
    mine = spec(sweep)
    own = config.fingerprint(mine)
    records.claim(sweep.uri, mine)
    say("sweep", f"{sweep.uri}\n{spaces.describe(sweep.space)}")
    trials = {key_of(t.settings): t for t in records.read_all(sweep.uri)}
    tracker = tracking.Tracker(
        f"sweep-{own}",
        sweep.experiment,
        f"sweep-{sweep.name}",
        params=config.to_dict(mine),
        tags={"logonet.stage": "sweep", "logonet.sweep": sweep.uri},
        artifact_root=object_store.join(sweep.root, "mlflow-artifacts"),
    )
    known = {key: t.history for key, t in trials.items() if not t.ended}
    plan = Plan(sweep, resources, share, known, tracker.run_id())
    spent_s = records.state(sweep.uri).get("spent_s", 0.0)
    left_s = budget.hours * 3600 - spent_s if budget.hours else math.inf
    todo = open_trials(sweep, trials, wanted)
    if todo and left_s > 0:
        ready = _prepared(plan, todo)
        say("sweep", f"{len(todo)} of {wanted} trials to do, {runs} at once on {share.workers} workers each")
        drive(ready, Recorder(ready, trials, tracker), len(todo), runs, left_s)
    elif todo:
        say("sweep", f"the {budget.hours:g} hours of the budget are used up; a larger --budget.hours goes on")
    for trial in trials.values():
        if trial.status == "running":  # Tune ends without reporting them when its time is up
            trial.status, trial.reason = "waiting", "the hours of the budget were over"
            records.write(sweep.uri, trial)
    _confirm(plan, trials, tracker, max(sweep.confirm, 1 if sweep.register else 0), runs)
    winner = outcome.winner(list(trials.values()))
    files = outcome.report(sweep.uri, sweep.uri)
    _close_runs(sweep, trials, tracker.run_id())  # by now a slow server may have answered
    tracker.log_files(files)
    if not tracker.close("KILLED" if open_trials(sweep, trials, wanted) else "FINISHED"):
        say("mlflow", "the tracking server is away; the same command catches up later")
    print(outcome.summary(sweep.uri), flush=True)
    say("report", f"{sweep.uri}/report.html")
    if winner is not None and sweep.register:
        if not winner.final:
            raise UserError(f"the winner, trial {winner.index}, could not be registered: {winner.reason}")
        lineage = {"sweep": own, "sweep_uri": sweep.uri}
        pipelines.register(winner.final["uri"], sweep.register, lineage=lineage)
    return winner


def open_trials(sweep: Sweep, trials: dict[str, Trial], wanted: int) -> list[Trial]:
    """The trials to do: those that were begun or failed, and new ones, which are added to ``trials``.

    A search that decides as it goes has blank ones in place of the new, which nobody knows yet.
    """
    if sweep.config.search != "random":
        begun = [t for t in trials.values() if not t.ended]
        return begun + [Trial(-1, {})] * (wanted - len(trials))
    base = config.to_dict(sweep.base)
    chosen: dict[str, Trial] = {}
    index, since_new = 0, 0
    while len(chosen) < wanted and since_new < SAME_DRAWS:
        settings = spaces.complete(sweep.space, base, spaces.draw(sweep.space, index, sweep.config.seed))
        key = key_of(settings)
        since_new = since_new + 1 if key in chosen else 0
        if key not in chosen:
            chosen[key] = trials.setdefault(key, Trial(len(chosen), settings))
        index += 1
    if len(chosen) < wanted:
        say("sweep", f"the space holds {len(chosen)} different settings, fewer than the {wanted} asked for")
    return [t for t in chosen.values() if not t.ended]


def _prepared(plan: Plan, todo: Sequence[Trial]) -> Plan:
    """``plan`` for the trials to do; what they share is made now, or while a search decides as it goes."""
    if plan.sweep.config.search == "random":
        make_shared(plan.sweep, todo, RayExecutor(plan.resources))
        return replace(plan, settings=[t.settings for t in todo])
    actor: Any = Upstream
    return replace(plan, upstream=actor.remote(plan.sweep, RayExecutor(plan.resources, plan.share)))


def make_shared(sweep: Sweep, trials: Sequence[Trial], executor: RayExecutor) -> None:
    """Crops, clusterers, pseudo-labels and probe cases of all trials, each once, before any trial starts."""
    before = {stage: _artifacts(sweep, stage) for stage in SHARED}
    base = config.to_dict(sweep.base)
    seen: set[Any] = set()
    used: dict[str, set[str]] = {stage: set() for stage in SHARED}
    for trial in trials:
        try:
            cfg = pretraining_of(spaces.apply(base, trial.settings))
            parts = config.fingerprint(
                cfg.data, cfg.split, cfg.crops, cfg.clusterers, cfg.probe, cfg.method.name
            )
            if parts in seen:
                continue
            up = pipelines.upstream(cfg, sweep.source, sweep.root, executor, sweep.labelled)
        except UserError as err:  # the trial itself fails with the reason, which is recorded
            say("shared", f"cannot be made for trial {trial.index}: {err}")
            continue
        seen.add(parts)
        for stage, key in SHARED.items():
            used[stage] |= {up.lineage[key].rsplit("/", 1)[-1]} if key in up.lineage else set()
    made = {stage: len(_artifacts(sweep, stage) - before[stage]) for stage in SHARED}
    told = ", ".join(f"{len(ids)} {stage} ({made[stage]} made now)" for stage, ids in used.items() if ids)
    say("shared", f"{len(trials)} trials stand on {told}")
    records.note(sweep.uri, shared={s: {"used": len(ids), "made": made[s]} for s, ids in used.items()})


def _artifacts(sweep: Sweep, stage: str) -> set[str]:
    """Fingerprints of the finished artifacts of ``stage``."""
    prefix = object_store.join(sweep.root, stage)
    paths = (object_store.relative(entry.uri, prefix).split("/") for entry in object_store.listing(prefix))
    return {path[0] for path in paths if path[1:] == [artifacts.MANIFEST]}


def _confirm(plan: Plan, trials: dict[str, Trial], tracker: tracking.Tracker, wanted: int, runs: int) -> None:
    """Finetune the ``wanted`` best of the trials that ran to the end."""
    ended = [t for t in trials.values() if t.status == "done" and not math.isnan(t.objective)]
    best = sorted(ended, key=lambda t: t.objective, reverse=True)[:wanted]
    if todo := [t for t in best if not t.final]:
        say("confirm", f"finetuning {len(todo)} of {len(ended)} trials that ran to the end")
        plan = replace(plan, settings=[t.settings for t in todo], pretrained=[t.pretrain for t in todo])
        drive(plan, Recorder(plan, trials, tracker), len(todo), runs)


def _close_runs(sweep: Sweep, trials: Mapping[str, Trial], parent: str | None) -> None:
    """Complete every trial's MLflow run: below the sweep's, with its status and its objective."""
    own = config.fingerprint(spec(sweep))
    tags = {"logonet.stage": "pretrain", "logonet.sweep": sweep.uri, tracking.PARENT_TAG: parent}
    for key, trial in trials.items():
        said = f"{trial.status} {trial.reason}"
        tracker = tracking.Tracker(
            fingerprint=trial.pretrain.rsplit("/", 1)[-1] or f"{own}-{key}",
            experiment=sweep.experiment,
            run_name=f"{sweep.name}-trial-{trial.index}",
            params=trial.settings,
            tags=tags | {"logonet.sweep.trial": str(trial.index), "logonet.sweep.outcome": said.strip()},
            artifact_root=object_store.join(sweep.root, "mlflow-artifacts"),
        )
        tracker.sync([{k: v for k, v in e.items() if k != "objective"} for e in trial.history])
        metrics = {"objective": trial.objective, "final_dice": trial.final.get("dice", math.nan)}
        tracker.close(MLFLOW_STATUS.get(trial.status, "KILLED"), timeout_s=20, metrics=metrics)
