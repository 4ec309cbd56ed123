"""Sweeps with trials in this process: what trials share, how the best are confirmed, how a sweep goes on."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import HERE
from sweeps import ONE, SPLIT, finetuning, finished, pretraining, runs_of, sweep, versions, write_scans

from logonet import tracking, training
from logonet.core.config import Component
from logonet.core.errors import UserError
from logonet.data import splits
from logonet.distributed import cluster, trainer
from logonet.storage import artifacts, object_store
from logonet.sweep import outcome, records, settings, tuning
from logonet.sweep import run as searching
from logonet.sweep import space as spaces
from logonet.sweep import trial as running
from logonet.sweep.records import Trial
from logonet.sweep.settings import Budget, Config, Sweep
from logonet.sweep.trial import key_of, objective_of, tune_result

ALLOCATION = cluster.ResourceAllocation(1, False, 1, 1, 1, 1, 3)
GRID = {"search": {"method.phi1": {"grid": [0.1, 0.4]}}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One MLflow database for all tests: making one takes seconds."""
    return str(tmp_path_factory.mktemp("home"))


@pytest.fixture
def trials_run_here(monkeypatch: pytest.MonkeyPatch, home: str) -> list[int]:
    """Trials run in this process, one after another, in place of Tune's; the list counts those of each call."""
    driven: list[int] = []

    def drive(plan: Any, recorder: Any, trials: int, runs: int, left_s: float = math.inf) -> None:
        driven.append(trials)
        for place in range(trials):
            tuned = SimpleNamespace(trial_id=str(place), config={"place": place}, last_result={})

            def report(result: dict[str, Any], tuned: Any = tuned) -> None:
                tuned.last_result = result
                recorder.on_trial_result(0, [], tuned, result)

            monkeypatch.setattr(running.tune, "report", report)
            recorder.on_trial_start(0, [], tuned)
            running.run_trial(tuned.config, plan)
            recorder.on_trial_complete(0, [], tuned)

    monkeypatch.setattr(searching, "drive", drive)
    monkeypatch.setattr(searching.cluster, "allocate_trials", lambda *_: (1, ALLOCATION))
    for module in (searching, running):
        monkeypatch.setattr(module, "RayExecutor", lambda *_: HERE)
    monkeypatch.setattr(running, "Report", lambda *_, **__: None)  # it needs Tune around it
    monkeypatch.setattr(training, "dry_run", lambda *_: None)  # of each setting, again and again
    monkeypatch.setenv("LOGONET_HOME", home)
    return driven


def test_trials_share_what_they_have_in_common_and_the_winner_is_registered(
    tmp_path: Path, trials_run_here: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    tried = sweep(str(tmp_path), write_scans(str(tmp_path)), GRID, register="phantom")
    winner = searching.run(tried, ONE, Budget())
    assert winner is not None
    # Two trials on one set of everything upstream; the better one is finetuned.
    assert trials_run_here == [2, 1]
    assert len(finished(tried.root, "pretrain")) == 2
    for stage in ("manifest", "crops", "clusterers", "labels", "cases"):
        assert len(finished(tried.root, stage)) == 1, stage
    said = capsys.readouterr().out
    assert (
        "2 trials stand on 1 crops (1 made now), 1 prepared (1 made now), 1 clusterers (1 made now)" in said
    )
    trials = records.read_all(tried.uri)
    assert [t.status for t in trials] == ["done"] * 2, [t.reason for t in trials]
    assert {t.settings["method.phi1"] for t in trials} == {0.1, 0.4}
    for trial in trials:
        history = json.loads(artifacts.find(trial.pretrain).read("history.json"))  # type: ignore[union-attr]
        assert [e["probe_dice"] for e in history] == [e["objective"] for e in trial.history]
    assert winner == max(trials, key=lambda t: t.objective)
    assert [t for t in trials if t.final] == [winner]
    tuned = artifacts.find(winner.final["uri"])
    assert tuned is not None
    assert tuned.parents["pretrain"] == winner.pretrain.rsplit("/", 1)[1]

    # MLflow: a run of the sweep, one below it for each trial, and the finetuning.
    runs = runs_of(tried.experiment)
    by_stage: dict[str, list[Any]] = {}
    for run in runs:
        by_stage.setdefault(run.data.tags["logonet.stage"], []).append(run)
    (parent,) = by_stage["sweep"]
    children = by_stage["pretrain"]
    assert len(children) == 2
    assert {c.data.tags[tracking.PARENT_TAG] for c in children} == {parent.info.run_id}
    assert {c.info.status for c in [*children, parent]} == {"FINISHED"}
    objectives = {c.data.tags["logonet.fingerprint"]: c.data.metrics["objective"] for c in children}
    assert objectives == {t.pretrain.rsplit("/", 1)[1]: t.objective for t in trials}
    assert parent.data.metrics["best_objective"] == max(t.objective for t in trials)
    assert len(by_stage["finetune"]) == 1
    lineage = tracking.lineage("models:/logonet-seg-phantom@candidate")
    assert lineage["logonet.sweep_uri"] == tried.uri
    assert lineage["logonet.pretrain"] == winner.pretrain.rsplit("/", 1)[1]

    # Again: nothing is computed, nothing doubled.
    stages = ("pretrain", "crops", "finetune", "sweep/tried/trials")
    before = {s: versions(f"{tried.root}/{s}") for s in stages}
    again = searching.run(tried, ONE, Budget())
    assert again == winner
    assert trials_run_here == [2, 1]
    assert {s: versions(f"{tried.root}/{s}") for s in before} == before
    assert len(runs_of(tried.experiment)) == len(runs)
    page = object_store.read(f"{tried.uri}/report.html").decode()
    assert page.count("<img") >= 2

    other = replace(tried, space=spaces.parse({"search": {"method.phi1": {"grid": [0.1, 0.3]}}}, "test"))
    with pytest.raises(UserError, match=r"method\.phi1.*--name another name"):
        searching.run(other, ONE, Budget())


def test_one_trials_failure_is_recorded_and_tried_again(
    tmp_path: Path, trials_run_here: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials that ended are left alone; one that says "running" was interrupted, and goes on."""
    history = [{"epoch": e, "step": e, "probe_dice": 0.2 * e} for e in (1, 2)]

    def pretrain(cfg: Any, *args: Any, trial: Any, **options: Any) -> Any:
        trial.started(uri := f"{tmp_path}/pretrain/{cfg.train.lr}")
        if cfg.train.lr > 1:
            raise training.Diverged("the loss is not finite; lower train.lr")
        return SimpleNamespace(uri=uri, read=lambda name: json.dumps(history).encode())

    monkeypatch.setattr(running.pipelines, "pretrain", pretrain)
    monkeypatch.setattr(searching.pipelines, "upstream", lambda *_: SimpleNamespace(lineage={}))
    tried = sweep(str(tmp_path), "/nowhere", {"search": {"train.lr": {"grid": [1e-2, 1e30]}}})
    learns = searching.run(tried, ONE, Budget())
    trials = {t.settings["train.lr"]: t for t in records.read_all(tried.uri)}
    diverges = trials[1e30]
    assert learns == trials[1e-2]
    assert learns is not None and learns.status == "done"
    assert diverges.status == "failed"
    assert "lower train.lr" in diverges.reason
    error = f"{tried.uri}/trials/{diverges.index:04d}.error.txt"
    assert "Traceback" in object_store.read(error).decode()
    object_store.delete(error)
    statuses = {r.data.tags.get("logonet.sweep.trial"): r.info.status for r in runs_of(tried.experiment)}
    assert (statuses[str(learns.index)], statuses[str(diverges.index)]) == ("FINISHED", "FAILED")
    # A kill leaves a record that says "running", with the epochs of before.
    records.write(tried.uri, replace(learns, status="running", history=learns.history[:1]))
    assert searching.run(tried, ONE, Budget()) is not None
    assert trials_run_here == [2, 2], "the failed trial was not tried again"
    after = {t.settings["train.lr"]: t for t in records.read_all(tried.uri)}
    assert replace(after[1e-2], wall_s=learns.wall_s) == learns
    assert after[1e30].status == "failed"
    assert object_store.exists(error), "a failed trial was not tried again"


def test_a_sweep_out_of_hours_waits_for_more(
    tmp_path: Path, trials_run_here: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    tried = sweep(str(tmp_path), write_scans(str(tmp_path)), GRID)
    records.note(tried.uri, spent_s=7200.0)
    records.write(tried.uri, Trial(0, {"method.phi1": 0.1}, "running"))
    assert searching.run(tried, ONE, Budget(hours=1)) is None
    assert trials_run_here == []
    assert records.read_all(tried.uri)[0].status == "waiting"
    assert "the 1 hours of the budget are used up" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- without training


def planned(**changes: Any) -> Sweep:
    space = {"search": {"method.phi1": {"grid": [0.1, 0.2]}}}
    return sweep("s3://nowhere", "s3://nowhere/scans", space, **changes)


def test_a_budget_is_wanted_where_keys_are_drawn() -> None:
    drawn = spaces.parse({"search": {"method.phi1": {"uniform": [0.1, 0.4]}}}, "test")
    tried = replace(planned(), space=drawn)
    with pytest.raises(UserError, match=r"--budget\.trials"):
        searching.run(tried, ONE, Budget())


def test_halving_remembers_trials_of_calls_before() -> None:
    tried = planned(base=pretraining(epochs=4), config=Config(reduction=2))
    good = [{"epoch": e, "objective": 0.8} for e in (1, 2, 3, 4)]
    ended = Trial(0, {"method.phi1": 0.1}, status="done", history=good)

    class Fresh:
        trial_id = "fresh"

    def verdict(trials: list[Trial], value: float, epoch: int = 1) -> str:
        asha: Any = tuning.scheduler(tried, trials)
        asha.on_trial_add(None, Fresh)
        return asha.on_trial_result(None, Fresh, {"t": epoch, "objective": value})

    assert verdict([ended], 0.5) == "STOP"
    assert verdict([ended], 0.9) == "CONTINUE"
    assert verdict([], 0.5) == "CONTINUE"
    unfinished = replace(ended, status="running")
    assert verdict([unfinished], 0.5) == "CONTINUE", "what runs again tells its epochs itself"


def test_no_trial_is_stopped_at_its_last_epoch() -> None:
    for epochs in range(2, 10):
        tried = planned(base=pretraining(epochs=epochs), config=Config(reduction=2))
        asha: Any = tuning.scheduler(tried, [])

        class One:
            trial_id = "one"

        class Two:
            trial_id = "two"

        for trial in (One, Two):
            asha.on_trial_add(None, trial)
        for epoch in range(1, epochs):
            asha.on_trial_result(None, One, {"t": epoch, "objective": 0.5})
            assert asha.on_trial_result(None, Two, {"t": epoch, "objective": 0.5}) == "CONTINUE"
        asha.on_trial_result(None, One, {"t": epochs, "objective": 0.9})
        assert asha.on_trial_result(None, Two, {"t": epochs, "objective": 0.1}) == "CONTINUE"

        class Resumed:  # from a checkpoint beyond all rungs
            trial_id = "resumed"

        asha.on_trial_add(None, Resumed)
        assert asha.on_trial_result(None, Resumed, {"t": epochs, "objective": 0.1}) == "CONTINUE"


@pytest.mark.parametrize(
    ("name", "expected"), [("probe", 0.5), ("effective_rank", 7.0), ("accuracy", 0.25), ("finetune", 0.625)]
)
def test_objectives(name: Any, expected: float) -> None:
    entry = {
        "epoch": 1,
        "probe_dice": 0.5,
        "effective_rank": 7.0,
        "accuracy": 0.75,
        "accuracy_floor": 0.5,
        "val_dice": 0.625,
    }
    assert objective_of(entry, name) == expected
    assert objective_of({"epoch": 1}, name) is None
    assert tune_result(entry, name)["t"] == 1
    assert "t" not in tune_result(entry, name, counts=False), "an epoch of another phase moves no rung"


def test_the_finetuning_of_a_sweep_is_judged_on_the_pretrainings_split() -> None:
    resolved = settings.resolve(planned(finetuning=replace(finetuning(), split=splits.Config(seed=9))))
    assert resolved.finetuning.split == SPLIT
    assert resolved.finetuning.backbone == Component("")
    assert resolved.finetuning.train.validate_every_epochs == 1
    with pytest.raises(UserError, match=r"split\.fold=0"):
        settings.resolve(planned(base=replace(pretraining(), split=replace(SPLIT, fold=None))))


def test_settings_are_never_tried_twice(capsys: pytest.CaptureFixture[str]) -> None:
    tried = sweep(
        "s3://nowhere", "s3://nowhere/scans", {"search": {"method.phi1": {"choice": [0.1, 0.2, 0.3]}}}
    )
    trials: dict[str, Trial] = {}
    found = searching.open_trials(tried, trials, 5)
    assert sorted(t.settings["method.phi1"] for t in found) == [0.1, 0.2, 0.3]
    assert "3 different settings" in capsys.readouterr().out
    assert [t.index for t in found] == [0, 1, 2]
    done = replace(found[0], status="done")
    left = searching.open_trials(tried, {key_of(done.settings): done}, 5)
    assert [t.index for t in left] == [1, 2]


def test_what_tune_reports_is_recorded(tmp_path: Path) -> None:
    """Stopped by the scheduler, or lost with its machine; settings that a searcher suggests are new trials."""
    tried = sweep(str(tmp_path), "/nowhere", {"search": {"method.phi1": {"uniform": [0.1, 0.4]}}})
    synced: list[Any] = []
    tracker: Any = SimpleNamespace(sync=synced.append)
    trials: dict[str, Trial] = {}
    plan = running.Plan(tried, ONE, ALLOCATION, {}, None)
    recorder = tuning.Recorder(plan, trials, tracker)
    stopped, lost = (
        SimpleNamespace(trial_id=name, config={"method.phi1": phi1}, last_result={})
        for name, phi1 in (("stopped", 0.2), ("lost", 0.3))
    )
    for tuned in (stopped, lost):
        recorder.on_trial_start(0, [], tuned)
        entry = {"epoch": 1, "probe_dice": 0.5}
        recorder.on_trial_result(0, [], tuned, {"pretrain": "s3://out/pretrain/ab"})
        recorder.on_trial_result(0, [], tuned, tune_result(entry, "probe"))
        recorder.on_trial_result(0, [], tuned, tune_result({**entry, "probe_dice": 0.6}, "probe"))
    assert [t.status for t in records.read_all(tried.uri)] == ["running"] * 2
    recorder.on_trial_complete(0, [], stopped)
    recorder.on_trial_error(0, [], lost)
    first, second = records.read_all(tried.uri)
    assert (first.index, first.settings, first.status) == (0, {"method.phi1": 0.2}, "stopped")
    assert first.reason == "stopped after epoch 1"
    assert [e["objective"] for e in first.history] == [0.6], (
        "an epoch that is reported again replaces the first"
    )
    assert first.pretrain == "s3://out/pretrain/ab"
    assert (second.index, second.status) == (1, "failed")
    assert "lost 4 times" in second.reason
    assert synced[-1][-1]["best_objective"] == 0.6
    assert list(trials.values()) == [first, second]


def test_the_best_so_far_skips_what_was_not_measured() -> None:
    histories = [[], [0.3], [0.2], [math.nan], [0.5]]
    trials = [
        Trial(i, {}, "failed" if not h else "done", history=[{"epoch": 1, "objective": o} for o in h])
        for i, h in enumerate(histories)
    ]
    found = outcome.best_so_far([*trials[::-1], Trial(9, {}, "running")])
    assert [e["step"] for e in found] == [1, 2, 3, 4, 5]
    assert math.isnan(found[0]["best_objective"])
    assert [e["best_objective"] for e in found[1:]] == [0.3, 0.3, 0.3, 0.5]
    assert outcome.best_so_far([]) == []


@pytest.mark.parametrize(
    ("err", "recorded"), [(trainer.LeaderLost("gone"), False), (training.Diverged("nan"), True)]
)
def test_a_machines_failure_is_not_the_trials(
    monkeypatch: pytest.MonkeyPatch, err: UserError, recorded: bool
) -> None:
    """Recorded as failed, a trial that was only killed would be left out when the winner is chosen."""
    said: list[dict[str, Any]] = []

    def dies(*_: Any, **__: Any) -> None:
        raise err

    monkeypatch.setattr(running.tune, "report", said.append)
    monkeypatch.setattr(running.pipelines, "pretrain", dies)
    monkeypatch.setattr(running, "Report", lambda *_, **__: None)  # it wants a sweep around it
    tried = sweep("/nowhere", "/nowhere/scans", {"search": {"method.phi1": {"grid": [0.1]}}})
    plan = running.Plan(tried, ONE, ALLOCATION, {}, None, [{"method.phi1": 0.1}])
    with contextlib.nullcontext() if recorded else pytest.raises(trainer.LeaderLost):
        running.run_trial({"place": 0}, plan)
    assert [s["failed"] for s in said] == (["nan"] if recorded else [])


def test_a_trial_is_judged_by_its_finetuning(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the objective of the search, or to confirm what the search has found."""

    class Stored:
        def __init__(self, uri: str, history: list[dict[str, Any]]) -> None:
            self.uri, self.history = uri, history

        def read(self, name: str) -> bytes:
            return json.dumps(self.history).encode()

    epochs = [{"epoch": 1, "step": 1, "val_dice": 0.4}, {"epoch": 2, "step": 2, "val_dice": 0.7}]
    said: list[dict[str, Any]] = []
    started: list[Any] = []

    def pretrain(*args: Any, **options: Any) -> Stored:
        started.append(options["trial"])
        return Stored("pretrained", [{"epoch": 1, "step": 1}])

    def finetune(cfg: Any, source: str, *args: Any, **options: Any) -> Stored:
        assert (cfg.init.weights, source) == ("pretrained", "labelled")
        return Stored("tuned", epochs)

    monkeypatch.setattr(running.tune, "report", said.append)
    monkeypatch.setattr(running.pipelines, "pretrain", pretrain)
    monkeypatch.setattr(running.pipelines, "finetune", finetune)
    monkeypatch.setattr(running, "Report", lambda *_, **__: None)
    tried = planned(labelled="labelled", config=Config(objective="finetune"))
    plan = running.Plan(tried, ONE, ALLOCATION, {}, "parent", [{"method.phi1": 0.1}])
    running.run_trial({"place": 0}, plan)
    assert [r["objective"] for r in said if "t" in r] == [0.4, 0.7]
    assert said[-1] == {"finished": True, "final": {"dice": 0.7, "uri": "tuned"}}
    assert started[0].tags[tracking.PARENT_TAG] == "parent"

    plan = replace(plan, pretrained=["pretrained"])
    monkeypatch.setattr(running.artifacts, "find", lambda uri: Stored(uri, []))
    running.run_trial({"place": 0}, plan)
    assert said[-1] == {"finished": True, "final": {"dice": 0.7, "uri": "tuned"}}
    epochs.clear()
    running.run_trial({"place": 0}, plan)
    assert said[-1]["failed"] == "finetuning: the finetuning at tuned measured no validation Dice"
    monkeypatch.setattr(running.artifacts, "find", lambda uri: None)
    running.run_trial({"place": 0}, plan)
    assert said[-1]["failed"].startswith("finetuning: pretrained is gone")


def test_the_best_are_confirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    objectives = {0: 0.1, 1: 0.5, 2: 0.4, 3: math.nan}
    trials = {
        str(i): Trial(
            i, {"method.phi1": i / 10}, "done", history=[{"epoch": 1, "objective": o}], pretrain=f"p{i}"
        )
        for i, o in objectives.items()
    }
    trials["4"] = replace(trials["1"], index=4, status="stopped")
    trials["2"].final = {"dice": 0.6, "uri": "known"}
    driven: list[Any] = []
    monkeypatch.setattr(searching, "drive", lambda plan, recorder, *_: driven.append(plan))
    plan = running.Plan(planned(), ONE, ALLOCATION, {}, None)
    for wanted in (0, 1, 3):
        searching._confirm(plan, trials, SimpleNamespace(), wanted, 1)  # type: ignore[arg-type]
    assert [plan.pretrained for plan in driven] == [["p1"], ["p1", "p0"]]
    assert driven[0].settings == [{"method.phi1": 0.1}]


def test_optuna_goes_on_from_what_ended_and_what_was_begun() -> None:
    pytest.importorskip("optuna")
    sections = [{"k_min": 8, "k_max": 40}, {"k_min": 20, "k_max": 100}]
    space = {
        "search": {
            "method.chain_length": {"grid": [3, 5, 7]},
            "clusterers": {"choice": sections},
            "train.lr": {"loguniform": [1e-4, 1e-2]},
            "crops.per_scan": {"int": [1, 8]},
        },
        "first": [{"method.chain_length": 5, "clusterers": sections[0]}, {"method.chain_length": 11}],
    }
    tried = sweep("/nowhere", "/nowhere/scans", space, config=Config(search="optuna"))

    def point(lr: float, per_scan: int = 2, section: int = 0) -> dict[str, Any]:
        return {
            "method.chain_length": 3,
            "clusterers": sections[section],
            "train.lr": lr,
            "crops.per_scan": per_scan,
        }

    def ended(index: int, settings: dict[str, Any], objective: float) -> Trial:
        return Trial(index, settings, "done", history=[{"epoch": 1, "objective": objective}])

    trials = [ended(i, point(10 ** -(2 + i / 10), 1 + i % 8, i % 2), 1 - i / 20) for i in range(12)]
    begun = Trial(12, point(2e-3), "running")
    outside = ended(13, point(1.0), 0.9)  # a trial of 'first' may lie outside the ranges

    def suggested(*known: Trial, count: int = 8) -> list[dict[str, Any]]:
        search = tuning.optuna_search(tried, known)
        return [search.suggest(str(i)) for i in range(count)]

    found = suggested(*trials, begun, outside)
    assert found[0] == begun.settings, "what was begun goes on first"
    assert found[1] == spaces.complete(tried.space, vars_of(tried), tried.space.first[0])
    assert all(spaces.point(tried.space, {}, settings) == settings for settings in found[2:])
    assert found == suggested(*trials, begun, outside)
    assert found[2:] != suggested(*trials[:11], begun, outside)[2:], "it does not learn"
    assert {type(settings["crops.per_scan"]) for settings in found} == {int}
    search = tuning.optuna_search(tried, trials)
    search.suggest("a")
    search.on_trial_result("a", {"pretrain": "s3://a", "training_iteration": 1})
    search.on_trial_complete("a", {"objective": 0.5, "training_iteration": 1})


def vars_of(tried: Sweep) -> dict[str, Any]:
    from logonet.core import config

    return config.to_dict(tried.base)
