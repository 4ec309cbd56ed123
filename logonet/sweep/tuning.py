"""Ray Tune: it starts trials, stops them early and suggests settings. The driver writes down what trials report."""

from __future__ import annotations

import logging
import math
import os
import tempfile
import time
import warnings
from collections.abc import Iterable
from functools import partial
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from logonet import tracking
from logonet.core import config, seeding
from logonet.core.errors import UserError
from logonet.core.redaction import without_secrets
from logonet.distributed import cluster, ray_compat
from logonet.pipelines.stage import say
from logonet.storage import object_store
from logonet.sweep import outcome, records
from logonet.sweep import space as spaces
from logonet.sweep.outcome import MEASURES
from logonet.sweep.records import Trial
from logonet.sweep.settings import Sweep
from logonet.sweep.space import Space
from logonet.sweep.trial import Plan, key_of, run_trial

LOST_TRIALS = 3  # how often a trial is started anew when its machine is lost
LOOK_FOR_ORPHANS_S = 2.0
TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial first reports where it writes
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the old one keeps silent when told to
}


def drive(plan: Plan, recorder: Recorder, trials: int, runs: int, left_s: float = math.inf) -> None:
    """Let Tune drive ``trials`` trials, ``runs`` at a time, for ``left_s``."""
    for name, value in TUNE_SETTINGS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    sweep, known = plan.sweep, len(plan.settings) > 0
    began, spent_s = time.monotonic(), records.state(sweep.uri).get("spent_s", 0.0)
    tuner = tune.Tuner(
        # A trial's process only waits; its workers have resources of their own, counted by allocate_trials.
        tune.with_resources(tune.with_parameters(run_trial, plan=plan), {"CPU": cluster.DRIVER_CPUS}),
        param_space={"place": tune.grid_search(list(range(trials)))} if known else {},
        tune_config=tune.TuneConfig(
            num_samples=1 if known else trials,
            max_concurrent_trials=runs,
            search_alg=None if known else optuna_search(sweep, recorder.trials.values()),
            scheduler=FIFOScheduler() if plan.pretrained else scheduler(sweep, recorder.trials.values()),
            time_budget_s=None if math.isinf(left_s) else left_s,
        ),
        run_config=tune.RunConfig(
            name=f"{sweep.name}-{time.time_ns():x}",
            storage_path=f"{tempfile.gettempdir()}/logonet-ray-tune",
            callbacks=[recorder],
            failure_config=tune.FailureConfig(max_failures=LOST_TRIALS),
            verbose=0,
        ),
    )
    try:
        tuner.fit()
        ray_compat.free_placement_groups()  # those of trials that ran when the time was up
    finally:
        records.note(sweep.uri, spent_s=round(spent_s + time.monotonic() - began, 1))


# ----------------------------------------------------------------------------------------------- recording


class Recorder(tune.Callback):
    """Writes down, in the driver, all that trials report."""

    def __init__(self, plan: Plan, trials: dict[str, Trial], tracker: tracking.Tracker) -> None:
        self.plan, self.trials, self.tracker = plan, trials, tracker
        self.began: dict[str, float] = {}
        self.looked = time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune saves its callbacks; all that this one knows is in the records

    def _of(self, tuned: Any) -> Trial:
        settings = self.plan.settings_of(tuned.config)
        index = 1 + max((t.index for t in self.trials.values()), default=-1)
        return self.trials.setdefault(key_of(settings), Trial(index, dict(settings)))

    def _write(self, trial: Trial, said: str = "") -> None:
        records.write(self.plan.sweep.uri, trial)
        if said:
            say(f"trial {trial.index}", said)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        mine = self._of(trial)
        self.began[trial.trial_id] = time.monotonic() - mine.wall_s
        if not self.plan.pretrained:
            mine.status, mine.reason = "running", ""
            self._write(mine)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        mine, said = self._of(trial), ""
        mine.wall_s = round(time.monotonic() - self.began[trial.trial_id], 1)
        mine.pretrain = result.get("pretrain", mine.pretrain)
        mine.final = result.get("final") or mine.final
        if "failed" in result:
            mine.reason = result["failed"]
            beside = object_store.join(self.plan.sweep.uri, records.TRIALS, f"{mine.index:04d}.error.txt")
            object_store.write(beside, without_secrets(result["trace"]).encode())
        if "t" in result:
            entry, known = result["entry"], {e["epoch"]: e for e in mine.history}
            if entry["epoch"] not in known:
                sweep, value = self.plan.sweep, entry.get("objective")
                said = f"epoch {entry['epoch']}/{sweep.epochs}  {MEASURES[sweep.config.objective]} "
                said += "not measured" if value is None else f"{value:.4f}"
                said += f"  {outcome.settings_text(mine.settings)}"
            mine.history = sorted((known | {entry["epoch"]: entry}).values(), key=lambda e: e["epoch"])
        self._write(mine, said)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if time.monotonic() - self.looked > LOOK_FOR_ORPHANS_S:
            self.looked = time.monotonic()
            ray_compat.free_placement_groups(orphans=True)  # or the next trial would wait for their CPUs

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        mine, result = self._of(trial), trial.last_result or {}
        if self.plan.pretrained:
            dice = mine.final.get("dice")
            self._write(mine, mine.reason if dice is None else f"finetuned: validation Dice {dice:.4f}")
            return
        if "failed" in result:
            mine.status = "failed"
        elif result.get("finished"):
            mine.status = "done"
        else:  # by the scheduler; Tune reports nothing of trials that run when the time is up
            mine.status, mine.reason = "stopped", f"stopped after epoch {mine.history[-1]['epoch']}"
        self._write(mine, f"{mine.status}  {mine.reason}".rstrip())
        self.tracker.sync(outcome.best_so_far(list(self.trials.values())))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        # The trial's own failures are results; this is a machine that was lost too often.
        mine, times = self._of(trial), LOST_TRIALS + 1
        mine.reason = f"the process that drove it was lost {times} times; the same command tries again"
        if not self.plan.pretrained:
            mine.status = "failed"
        self._write(mine, f"failed  {mine.reason}")


# ------------------------------------------------------------------------------- early stopping, suggestions


class Halving(ASHAScheduler):
    """Stops no trial at its last epoch; ASHA would, where a checkpoint is ahead of the trial's record by a rung."""

    def __init__(self, last: int, first: int, reduction: float) -> None:
        super().__init__("t", "objective", "max", last, first, reduction, stop_last_trials=False)
        self.last = last

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result.get("t", 0) > self.last:  # the first result of a trial says where it writes
            return TrialScheduler.CONTINUE
        return super().on_trial_result(tune_controller, trial, result)


def scheduler(sweep: Sweep, trials: Iterable[Trial]) -> TrialScheduler:
    """Successive halving that knows the trials that ended in calls before."""
    cfg = sweep.config
    # The last rung lies before the last epoch: a trial stopped there would be lost for nothing.
    if not cfg.stop_early or sweep.epochs <= cfg.grace_epochs:
        return FIFOScheduler()
    asha: Any = Halving(sweep.epochs - 1, cfg.grace_epochs, cfg.reduction)
    for trial in (t for t in trials if t.ended):
        ended = SimpleNamespace(trial_id=f"ended-{trial.index}")  # all that the scheduler looks at
        asha.on_trial_add(None, ended)
        for entry in trial.history:
            asha.on_trial_result(None, ended, {"t": entry["epoch"], **entry})
    return asha


def optuna_search(sweep: Sweep, trials: Iterable[Trial]) -> Any:
    """Optuna's sampler, told of every trial that ended, and asked to go on with those that did not."""
    try:
        import optuna
        from ray.tune.search.optuna import OptunaSearch
    except ImportError:
        raise UserError("--search optuna wants the package optuna; pip install 'logonet[optuna]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    class Search(OptunaSearch):
        def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
            if "objective" in result:  # a trial first reports where it writes
                super().on_trial_result(trial_id, result)

    point = partial(spaces.point, sweep.space, config.to_dict(sweep.base))
    tried = [(trial, point(trial.settings)) for trial in trials]
    todo = [p for trial, p in tried if not trial.ended]
    todo += [p for p in map(point, sweep.space.first) if p not in [known for _, known in tried]]
    ended = [(trial.objective, p) for trial, p in tried if trial.ended]
    search = Search(
        space=distributions(sweep.space),
        metric="objective",
        mode="max",
        points_to_evaluate=[p for p in todo if p is not None] or None,
        seed=seeding.integer(sweep.config.seed, "optuna", len(ended)) % 2**31,
    )
    for objective, p in ended:
        if p is not None and not math.isnan(objective):
            search.add_evaluated_point(p, objective)
    return search


def distributions(space: Space) -> dict[str, Any]:
    """The space as Optuna knows it."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    out: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Choices for a categorical")  # lists and mappings, fine in memory
        for key in space.keys:
            if key.listed:
                out[key.path] = CategoricalDistribution(key.values)
            elif key.sort == "int":
                out[key.path] = IntDistribution(*key.values)
            else:
                low, high = key.values
                out[key.path] = FloatDistribution(low, high, log=key.sort == "loguniform")
    return out
