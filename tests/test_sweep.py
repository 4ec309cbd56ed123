"""Sweeps on real Ray, a real S3 server and a real MLflow: what trials share, how they end, and how a sweep goes on."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from dataclasses import replace
from typing import Any

import pytest
import tenacity
from helpers import timeless, tiny_backbone

from logonet import pipelines, tracking, training
from logonet.clustering import kmeans
from logonet.core.errors import UserError
from logonet.data import cropping, phantom, prepared_scans, splits
from logonet.distributed import cluster, trainer
from logonet.distributed.cluster import Resources
from logonet.storage import artifacts, object_store
from logonet.sweep import recorder, records, settings, tuning
from logonet.sweep import run as searching
from logonet.sweep import space as spaces
from logonet.sweep import trial as running
from logonet.sweep.records import Trial
from logonet.sweep.settings import Budget, Config, Sweep
from logonet.sweep.trial import key_of, objective_of, told
from logonet.training import checkpoints, linear_probe

pytestmark = pytest.mark.timeout(1500)  # a dozen Ray Train runs in a test
ONE = Resources(workers=1)
SPLIT = splits.Config(test_share=0.25, folds=3)


def pretraining(**training: Any) -> pipelines.Pretraining:
    return pipelines.Pretraining(
        split=SPLIT,
        crops=cropping.Config(size_vox=(32, 32, 32), per_scan=2),
        clusterers=kmeans.Config(n=3, k_min=3, k_max=6, iterations=5),
        backbone=tiny_backbone(),
        method={"name": "masked_clusters", "phi1": 0.2, "final_relu": False},
        train=training.Config(
            **{"epochs": 2, "global_batch": 2, "batch_size": 2, "lr": 3e-3, "warmup_epochs": 0, **training}
        ),
        probe=linear_probe.Config(
            train_cases=2, val_cases=1, crops_per_case=1, voxels_per_crop=256, iterations=10
        ),
    )


def finetuning() -> pipelines.Finetuning:
    return pipelines.Finetuning(
        split=SPLIT,
        crops=prepared_scans.CropSampling(size_vox=(32, 32, 32)),
        train=training.Config(epochs=2, steps_per_epoch=2, global_batch=1, lr=1e-3, warmup_epochs=0),
    )


@pytest.fixture
def scans(bucket: str, ray_local: None) -> str:
    return phantom.write_dataset(f"{bucket}/scans", 8, size_vox=(36, 36, 36), classes=2)


def sweep(bucket: str, scans: str, space: dict[str, Any], **changes: Any) -> Sweep:
    made = Sweep(
        name="tried",
        space=spaces.parse(space, "test"),
        base=pretraining(),
        finetuning=finetuning(),
        source=scans,
        root=f"{bucket}/runs",
        experiment=bucket.rsplit("/", 1)[1],
        config=Config(stop_early=False),
    )
    return replace(made, **changes)


def versions(uri: str) -> dict[str, str]:
    return {e.uri: e.version for e in object_store.listing(uri)}


def finished(root: str, stage: str) -> list[str]:
    """URIs of the finished artifacts of ``stage``."""
    found = {
        object_store.relative(e.uri, f"{root}/{stage}").split("/")[0]
        for e in object_store.listing(f"{root}/{stage}")
    }
    return [uri for name in sorted(found) if artifacts.find(uri := f"{root}/{stage}/{name}") is not None]


def runs_of(experiment: str) -> list[Any]:
    client = tracking.runs.connect(tracking.tracking_uri())
    return client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


def places_held() -> int:
    """Placement groups that some worker still holds."""
    from ray.util.placement_group import placement_group_table

    return sum(group["state"] != "REMOVED" for group in placement_group_table().values())


def test_trials_share_what_they_have_in_common_and_the_winner_is_registered(
    bucket: str, scans: str, capfd: Any
) -> None:
    tried = sweep(bucket, scans, {"search": {"method.phi1": {"grid": [0.1, 0.2, 0.4]}}}, register="phantom")
    winner = searching.run(tried, ONE, Budget())
    assert winner is not None
    # Three trials on one set of everything upstream.
    assert len(finished(tried.root, "pretrain")) == 3
    for stage in ("manifest", "crops", "clusterers", "labels", "cases"):
        assert len(finished(tried.root, stage)) == 1, stage
    said = capfd.readouterr().out
    assert "3 trials stand on 1 crops (1 made now), 1 clusterers (1 made now)" in said
    trials = records.read_all(tried.uri)
    assert [t.status for t in trials] == ["done"] * 3
    assert {t.settings["method.phi1"] for t in trials} == {0.1, 0.2, 0.4}
    for trial in trials:
        history = json.loads(artifacts.find(trial.pretrain).read("history.json"))  # type: ignore[union-attr]
        assert [e["probe_dice"] for e in history] == [e["objective"] for e in trial.history]
        assert [e["epoch"] for e in trial.history] == [1, 2]
    best = max(trials, key=lambda t: t.objective)
    assert winner.index == best.index
    tuned = artifacts.find(winner.final["uri"])
    assert tuned is not None
    assert tuned.parents["pretrain"] == winner.pretrain.rsplit("/", 1)[1]

    # MLflow: a run of the sweep, one below it for each trial, and the winner's finetuning.
    runs = runs_of(tried.experiment)
    by_stage: dict[str, list[Any]] = {}
    for run in runs:
        by_stage.setdefault(run.data.tags["logonet.stage"], []).append(run)
    (parent,) = by_stage["sweep"]
    children = by_stage["pretrain"]
    assert len(children) == 3
    assert {c.data.tags[tracking.PARENT_TAG] for c in children} == {parent.info.run_id}
    assert {c.info.status for c in [*children, parent]} == {"FINISHED"}
    objectives = {c.data.tags["logonet.fingerprint"]: c.data.metrics["objective"] for c in children}
    assert objectives == {t.pretrain.rsplit("/", 1)[1]: t.objective for t in trials}
    assert parent.data.metrics["best_objective"] == best.objective
    assert len(by_stage["finetune"]) == 1
    lineage = tracking.lineage("models:/logonet-seg-phantom@candidate")
    assert lineage["logonet.sweep_uri"] == tried.uri
    assert lineage["logonet.pretrain"] == winner.pretrain.rsplit("/", 1)[1]

    # Again: nothing is computed, nothing doubled.
    before = {
        s: versions(f"{tried.root}/{s}") for s in ("pretrain", "crops", "finetune", "sweep/tried/trials")
    }
    again = searching.run(tried, ONE, Budget())
    assert again == winner
    assert {s: versions(f"{tried.root}/{s}") for s in before} == before
    assert len(runs_of(tried.experiment)) == len(runs)
    page = object_store.read(f"{tried.uri}/report.html").decode()
    assert page.count("<img") >= 2

    other = replace(tried, space=spaces.parse({"search": {"method.phi1": {"grid": [0.1, 0.3]}}}, "test"))
    with pytest.raises(UserError, match=r"method\.phi1.*--name another name"):
        searching.run(other, ONE, Budget())


@pytest.mark.slow
def test_trials_fail_stop_and_go_on_each_by_itself(bucket: str, scans: str) -> None:
    """One learns, one diverges, one learns nothing and is stopped; then one is found as a kill would leave it."""
    space = {
        "search": {"train.lr": {"choice": [1e-2, 1e-9, 1e30]}},
        "first": [{"train.lr": 1e-2}, {"train.lr": 1e30}, {"train.lr": 1e-9}],
    }
    tried = sweep(
        bucket,
        scans,
        space,
        base=replace(pretraining(epochs=4), probe=None),
        config=Config(objective="accuracy", grace_epochs=3, reduction=2),
    )
    winner = searching.run(tried, ONE, Budget(trials=3), at_once=1)
    learns, diverges, idles = records.read_all(tried.uri)
    assert winner == learns
    assert (learns.status, diverges.status, idles.status) == ("done", "failed", "stopped")
    assert "lower train.lr" in diverges.reason
    assert "Traceback" in object_store.read(f"{tried.uri}/trials/0001.error.txt").decode()
    # Ray frees the workers of a trial that was stopped by and by.
    for attempt in tenacity.Retrying(stop=tenacity.stop_after_delay(120), wait=tenacity.wait_fixed(1)):
        with attempt:
            assert places_held() == 0
    assert (idles.reason, len(idles.history)) == ("stopped after epoch 3", 3)
    assert artifacts.find(idles.pretrain) is None
    statuses = {r.data.tags.get("logonet.sweep.trial"): r.info.status for r in runs_of(tried.experiment)}
    assert (statuses["0"], statuses["1"], statuses["2"]) == ("FINISHED", "FAILED", "KILLED")

    # A kill in the second epoch: a record that says "running", one checkpoint, no artifact.
    whole = json.loads(artifacts.find(learns.pretrain).read("history.json"))  # type: ignore[union-attr]
    oldest = checkpoints.all_of(learns.pretrain)[0]
    for entry in list(object_store.listing(learns.pretrain)):
        if not entry.uri.startswith(oldest):
            object_store.delete(entry.uri)
    records.write(tried.uri, replace(learns, status="running", history=learns.history[:1]))
    kept = versions(f"{idles.pretrain}")
    resumed = searching.run(tried, ONE, Budget(trials=3), at_once=1)
    assert resumed is not None
    assert (resumed.index, resumed.status, resumed.pretrain) == (0, "done", learns.pretrain)
    assert timeless(resumed.history) == timeless(learns.history)
    again = artifacts.find(learns.pretrain)
    assert again is not None
    assert timeless(json.loads(again.read("history.json"))) == timeless(whole)
    after = records.read_all(tried.uri)
    assert after[2] == idles, "a trial that had been stopped was touched"
    assert versions(f"{idles.pretrain}") == kept
    assert after[1].status == "failed"
    assert after[1].wall_s > diverges.wall_s, "a failed trial was not tried again"


def test_a_trial_that_can_never_fit_is_one_sentence(bucket: str, scans: str) -> None:
    tried = sweep(bucket, scans, {"search": {"method.phi1": {"grid": [0.1, 0.2]}}})
    resources = Resources(workers=1, cpus_per_worker=64)
    with pytest.raises(UserError, match=r"1 workers x 64 CPUs do not fit .* fewer workers"):
        searching.run(tried, resources, Budget())
    assert list(object_store.listing(tried.uri)) == [], "a sweep that cannot run was begun"
    with pytest.raises(UserError, match=r"64 trials of 1 workers do not fit .* --concurrent [123] "):
        searching.run(tried, ONE, Budget(), at_once=64)


def test_a_budget_is_wanted_where_keys_are_drawn(bucket: str, scans: str) -> None:
    tried = sweep(bucket, scans, {"search": {"method.phi1": {"uniform": [0.1, 0.4]}}})
    with pytest.raises(UserError, match=r"--budget\.trials"):
        searching.run(tried, ONE, Budget())


@pytest.mark.slow
def test_a_sweep_out_of_hours_waits_for_more(bucket: str, scans: str) -> None:
    tried = sweep(
        bucket,
        scans,
        {"search": {"method.phi1": {"grid": [0.1, 0.2]}}},
        base=replace(pretraining(epochs=6), probe=None),
        config=Config(objective="accuracy", stop_early=False),
    )
    assert searching.run(tried, ONE, Budget(hours=12 / 3600), at_once=1) is None
    assert {t.status for t in records.read_all(tried.uri)} == {"waiting"}
    assert records.state(tried.uri)["spent_s"] >= 12
    for attempt in tenacity.Retrying(stop=tenacity.stop_after_delay(60), wait=tenacity.wait_fixed(1)):
        with attempt:
            assert places_held() == 0
    assert searching.run(tried, ONE, Budget(hours=12 / 3600), at_once=1) is None, "the hours were over"
    winner = searching.run(tried, ONE, Budget(), at_once=2)
    assert winner is not None
    assert [t.status for t in records.read_all(tried.uri)] == ["done", "done"]


@pytest.mark.slow
def test_optuna_goes_on_from_what_it_has_learnt(bucket: str, scans: str) -> None:
    pytest.importorskip("optuna")
    tried = sweep(
        bucket,
        scans,
        {"search": {"method.phi1": {"uniform": [0.1, 0.4]}, "clusterers.n": {"choice": [2, 3]}}},
        base=replace(pretraining(epochs=1), probe=None),
        config=Config(objective="effective_rank", search="optuna"),
    )
    searching.run(tried, ONE, Budget(trials=2))
    first = records.read_all(tried.uri)
    assert [t.status for t in first] == ["done"] * 2
    searching.run(tried, ONE, Budget(trials=3))
    second = records.read_all(tried.uri)
    assert second[:2] == first
    assert len(second) == 3
    assert len({key_of(t.settings) for t in second}) == 3
    clusterers_tried = {t.settings["clusterers.n"] for t in second}
    assert len(finished(tried.root, "clusterers")) == len(clusterers_tried)


# --------------------------------------------------------------------------------------------- without Ray


def planned(**changes: Any) -> Sweep:
    space = {"search": {"method.phi1": {"grid": [0.1, 0.2]}}}
    return sweep("s3://nowhere", "s3://nowhere/scans", space, **changes)


def test_halving_remembers_trials_of_calls_before() -> None:
    tried = planned(base=pretraining(epochs=4), config=Config(reduction=2))
    good = [{"epoch": e, "objective": 0.8} for e in (1, 2, 3, 4)]
    ended = Trial(0, {"method.phi1": 0.1}, status="done", history=good)

    class Fresh:
        trial_id = "fresh"

    def verdict(trials: list[Trial], value: float, epoch: int = 1) -> str:
        asha: Any = tuning.scheduler(tried, {str(t.index): t for t in trials})
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
        asha: Any = tuning.scheduler(tried, {})

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
    assert told(entry, name)["t"] == 1
    assert "t" not in told(entry, name, counts=False), "an epoch of another phase moves no rung"


def test_the_finetuning_of_a_sweep_is_judged_on_the_pretrainings_split() -> None:
    resolved = settings.resolve(planned(finetuning=replace(finetuning(), split=splits.Config(seed=9))))
    assert resolved.finetuning.split == SPLIT
    assert resolved.finetuning.backbone == {}
    assert resolved.finetuning.train.validate_every_epochs == 2
    with pytest.raises(UserError, match=r"split\.fold=0"):
        settings.resolve(planned(base=replace(pretraining(), split=replace(SPLIT, fold=None))))


def test_settings_are_never_tried_twice(capsys: pytest.CaptureFixture[str]) -> None:
    tried = sweep(
        "s3://nowhere", "s3://nowhere/scans", {"search": {"method.phi1": {"choice": [0.1, 0.2, 0.3]}}}
    )
    trials: dict[str, Trial] = {}
    found = searching._open(tried, trials, 5)
    assert sorted(t.settings["method.phi1"] for t in found) == [0.1, 0.2, 0.3]
    assert "3 different settings" in capsys.readouterr().out
    assert [t.index for t in found] == [0, 1, 2]
    done = replace(found[0], status="done")
    left = searching._open(tried, {key_of(done.settings): done}, 5)
    assert [t.index for t in left] == [1, 2]


def test_the_place_of_a_controller_that_died_is_given_back(ray_local: None) -> None:
    """Its machine went, and Train's cleaner with it; places of the living and of the driver stay."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    @ray.remote(num_cpus=0)
    class Controller:
        def place(self) -> str:
            group = placement_group([{"CPU": 0.01}])
            ray.get(group.ready())
            return group.id.hex()

    lives, dies = Controller.remote(), Controller.remote()
    own = placement_group([{"CPU": 0.01}])
    kept = {ray.get(lives.place.remote()), own.id.hex()}
    lost = ray.get(dies.place.remote())

    def held_after_looking() -> set[str]:
        recorder._free_orphans()
        return {place.placement_group_id.hex() for place in recorder._places()}

    assert kept | {lost} <= held_after_looking()
    ray.kill(dies)
    for attempt in tenacity.Retrying(stop=tenacity.stop_after_delay(30), wait=tenacity.wait_fixed(0.2)):
        with attempt:
            assert lost not in held_after_looking()
    assert kept <= held_after_looking()
    ray.kill(lives)
    remove_placement_group(own)


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
    monkeypatch.setattr(running.stages, "pretrain", dies)
    monkeypatch.setattr(running, "Report", lambda *_, **__: None)  # it wants a sweep around it
    tried = sweep("/nowhere", "/nowhere/scans", {"search": {"method.phi1": {"grid": [0.1]}}})
    plan = running.Plan(
        tried, ONE, cluster.ResourceAllocation(1, False, 1, 1, 1, 1, 3), {}, None, [{"method.phi1": 0.1}]
    )
    with contextlib.nullcontext() if recorded else pytest.raises(trainer.LeaderLost):
        running.run_trial({"place": 0}, plan)
    assert [s["failed"] for s in said] == (["nan"] if recorded else [])


def test_as_many_trials_as_fit(ray_local: None) -> None:
    """The session's Ray has 4 logical CPUs on a machine of fewer or as many cores."""
    runs, share = cluster.allocate_trials(ONE, most=9)
    assert runs == min(os.cpu_count() or 1, 3)
    busy = runs * (share.workers * share.cpus_per_worker + cluster.DRIVER_CPUS)
    assert 0 < share.cpus_per_data_task <= 4 - busy, "data tasks would wait for ever"
    assert cluster.allocate_trials(ONE, most=1)[0] == 1
    assert cluster.allocate_trials(Resources(workers=2), most=9)[0] == 1


def test_what_workers_of_a_ray_of_our_own_are_given(ray_local: None) -> None:
    """Train's watcher over its controller does not miss the dashboard every second; waiting threads do not spin."""
    import ray
    from ray.train.v2._internal.execution.controller import placement_group_cleaner

    @ray.remote
    def look(name: str) -> tuple[int, str | None]:
        return logging.getLogger(name).getEffectiveLevel(), os.environ.get("GOMP_SPINCOUNT")

    assert ray.get(look.remote(placement_group_cleaner.logger.name)) == (logging.ERROR, "1000")
