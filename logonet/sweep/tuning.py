"""Ray Tune: who goes on, who is stopped, what is tried next."""

from __future__ import annotations

import logging
import math
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from logonet.core import config, seeding
from logonet.core.errors import UserError
from logonet.distributed import cluster
from logonet.sweep import records
from logonet.sweep import space as spaces
from logonet.sweep.recorder import LOST_TRIALS, Recorder
from logonet.sweep.records import Trial
from logonet.sweep.settings import Sweep
from logonet.sweep.trial import Plan

TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial's first word is where it writes
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the old one keeps silent when told to
}


def drive(fn: Any, plan: Plan, recorder: Recorder, trials: int, runs: int, left_s: float) -> None:
    """Let Tune drive ``trials`` trials, ``runs`` at a time."""
    for name, value in TUNE_SETTINGS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    cfg = plan.sweep.config
    decides = cfg.search == "optuna" and not recorder.confirms
    began, spent_s = time.monotonic(), records.state(plan.sweep.uri).get("spent_s", 0.0)
    tuner = tune.Tuner(
        # A trial's process only waits; its workers have resources of their own, counted by cluster.shares.
        tune.with_resources(fn, {"CPU": cluster.DRIVER_CPUS}),
        param_space={} if decides else {"place": tune.grid_search(list(range(trials)))},
        tune_config=tune.TuneConfig(
            num_samples=trials if decides else 1,
            max_concurrent_trials=runs,
            search_alg=_optuna(plan, recorder) if decides else None,
            scheduler=FIFOScheduler() if recorder.confirms else scheduler(plan.sweep, recorder.trials),
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
        recorder.free_all()  # what still ran when the time was up
    finally:
        records.note(plan.sweep.uri, spent_s=round(spent_s + time.monotonic() - began, 1))


@dataclass(frozen=True)
class _Ended:
    """As much of a trial as a scheduler looks at."""

    trial_id: str


def scheduler(sweep: Sweep, trials: Mapping[str, Trial]) -> TrialScheduler:
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
        if trial.ended:
            ended: Any = _Ended(f"ended-{trial.index}")
            asha.on_trial_add(None, ended)  # type: ignore[arg-type]
            for entry in trial.history:
                heard = {"t": entry["epoch"], **{k: entry[k] for k in ("objective",) if k in entry}}
                asha.on_trial_result(None, ended, heard)  # type: ignore[arg-type]
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
    ended = [key for key, t in recorder.trials.items() if t.ended]
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
        seed=seeding.integer(sweep.config.seed, "optuna", len(ended)) % 2**31,
    )
    for key in ended:
        value = recorder.trials[key].objective
        if not math.isnan(value) and (point := points[key]) is not None:
            search.add_evaluated_point(point, value)
    return search
