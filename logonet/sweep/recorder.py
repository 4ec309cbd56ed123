"""What is heard of trials, written down in the driver as it is heard."""

from __future__ import annotations

import time
from typing import Any

import ray
import tenacity
from ray import tune

from logonet import tracking
from logonet.distributed import trainer
from logonet.pipelines.common import say
from logonet.sweep import outcome, records
from logonet.sweep.outcome import MEASURES
from logonet.sweep.records import Trial
from logonet.sweep.trial import CONTROLLER, Plan, key_of

LOST_TRIALS = 3  # how often a trial is started anew when the machine under it is lost
LOOK_FOR_ORPHANS_S = 5.0


class Recorder(tune.Callback):
    """Writes down, in the driver, all that is heard of trials."""

    def __init__(
        self, plan: Plan, trials: dict[str, Trial], tracker: tracking.Tracker, confirms: bool
    ) -> None:
        self.plan, self.trials = plan, trials
        self.tracker, self.confirms = tracker, confirms
        self.began: dict[str, float] = {}
        self.running: dict[str, dict[str, str]] = {}  # by Tune's id of the trial: PLACE and CONTROLLER
        self.looked = time.monotonic()

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
        if trainer.PLACE in result:
            self.running[trial.trial_id] = {k: result[k] for k in (trainer.PLACE, CONTROLLER)}
        if "pretrain" in result:
            mine.pretrain = result["pretrain"]
        if result.get("final"):
            mine.final = result["final"]
        if "failed" in result:
            mine.reason = result["failed"]
            records.write_traceback(self.plan.sweep.uri, mine.index, result["trace"])
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

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if time.monotonic() - self.looked > LOOK_FOR_ORPHANS_S:
            self.looked = time.monotonic()
            _free_orphans()

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
        else:  # by the scheduler; of trials that run when the time is up Tune says nothing
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
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(held[trainer.PLACE]))))

    def free_all(self) -> None:
        """Give back every place, at the end, when no trial runs any more."""
        for trial_id in list(self.running):
            self._free(trial_id)
        _free_strays()

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


@tenacity.retry(
    retry=tenacity.retry_if_result(bool),
    wait=tenacity.wait_fixed(1),
    stop=tenacity.stop_after_delay(30),
    retry_error_callback=lambda state: state.outcome.result() if state.outcome else 0,
)
def _free_strays() -> int:
    """Remove what places this job still holds; how many those were.

    When the time is up Tune also ends trials that have not said yet where their workers are, and Ray's cleaner may
    never come by. More than once, because a controller that is on its way out may still ask for a place.
    """
    held = _places()
    for place in held:
        _remove(place)
    return len(held)


def _free_orphans() -> int:
    """Remove the places of controllers that died; how many those were.

    Ray removes a place when its job and its controller are both gone, and Train's own cleaner of it may have died with
    the same machine: the trial, begun anew, would wait for CPUs that nobody uses until the sweep is over.
    """
    # A place made by the driver (Tune's, of a trial) has no actor for its creator, and is said to have lost it.
    nobody = ray.ActorID.nil().binary()
    orphans = [p for p in _places() if p.creator_actor_dead and p.creator_actor_id != nobody]
    for place in orphans:
        _remove(place)
    return len(orphans)


def _places() -> list[Any]:
    """The places (placement groups) that this job holds, as Ray's GCS keeps them.

    Ray's public list of places asks its dashboard, which a Ray of our own has not; its public table does not say whose
    a place is.
    """
    from ray._private.state import state
    from ray.core.generated import gcs_pb2

    job = ray.get_runtime_context().get_job_id()
    row: Any = vars(gcs_pb2)["PlacementGroupTableData"]  # generated without types
    table = map(row.FromString, state._connect_and_get_accessor().get_placement_group_table())
    return [place for place in table if place.creator_job_id.hex() == job and place.state != row.REMOVED]


def _remove(place: Any) -> None:
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    remove_placement_group(PlacementGroup(ray.PlacementGroupID(place.placement_group_id)))
