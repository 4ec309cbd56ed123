"""Sweeps on real Ray, a real S3 server and a real MLflow: how trials end, and how a sweep goes on."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from typing import Any

import pytest
import tenacity
from helpers import HERE, timeless, tiny_backbone
from sweeps import ONE, finished, pretraining, runs_of, sweep, versions, write_scans

from logonet import pipelines
from logonet.clustering import kmeans
from logonet.core.errors import UserError
from logonet.data import cropping, phantom, splits
from logonet.distributed import cluster, ray_compat
from logonet.distributed.cluster import Resources
from logonet.storage import artifacts, object_store
from logonet.sweep import records
from logonet.sweep import run as searching
from logonet.sweep.settings import Budget, Config, resolve
from logonet.sweep.trial import key_of
from logonet.training import checkpoints

pytestmark = pytest.mark.timeout(1500)


@pytest.fixture
def scans(bucket: str, ray_local: None) -> str:
    return write_scans(bucket)


def larger(**training_options: Any) -> pipelines.Pretraining:
    """With enough to learn that a good learning rate can be told from a bad one."""
    return replace(
        pretraining(**training_options),
        crops=cropping.Config(size_vox=(32, 32, 32), per_scan=2),
        backbone=tiny_backbone(),
        split=splits.Config(test_share=0.25, folds=3),
        clusterers=kmeans.Config(n=3, k_min=3, k_max=6, iterations=5),
        probe=None,
    )


def groups_held() -> int:
    """Placement groups that some worker still holds."""
    from ray.util.placement_group import placement_group_table

    return sum(group["state"] != "REMOVED" for group in placement_group_table().values())


def test_a_sweep_on_ray(bucket: str, scans: str) -> None:
    """Two trials, side by side where there is room; then nothing is left to do."""
    tried = sweep(
        bucket,
        scans,
        {"search": {"method.phi1": {"grid": [0.1, 0.4]}}},
        base=replace(pretraining(), probe=None),
        config=Config(objective="effective_rank", stop_early=False),
    )
    pipelines.upstream(resolve(tried).base, scans, tried.root, HERE)  # others test the stages on Ray
    winner = searching.run(tried, ONE, Budget())
    trials = records.read_all(tried.uri)
    assert [t.status for t in trials] == ["done"] * 2, [t.reason for t in trials]
    assert winner == max(trials, key=lambda t: t.objective)
    for trial in trials:
        history = json.loads(artifacts.find(trial.pretrain).read("history.json"))  # type: ignore[union-attr]
        assert [e["effective_rank"] for e in history] == [e["objective"] for e in trial.history]
    assert len(finished(tried.root, "labels")) == 1
    assert groups_held() == 0
    before = versions(tried.root)
    assert searching.run(tried, ONE, Budget()) == winner
    changed = {uri for uri, version in versions(tried.root).items() if before.get(uri) != version}
    assert not {uri for uri in changed if "/pretrain/" in uri or "/trials/" in uri}


@pytest.mark.slow
def test_trials_fail_stop_and_go_on_each_by_itself(bucket: str, ray_local: None) -> None:
    """One learns, one diverges, one learns nothing and is stopped; then one is found as a kill would leave it."""
    scans = phantom.write_dataset(f"{bucket}/scans", 8, size_vox=(36, 36, 36), classes=2)
    space = {
        "search": {"train.lr": {"choice": [1e-2, 1e-9, 1e30]}},
        "first": [{"train.lr": 1e-2}, {"train.lr": 1e30}, {"train.lr": 1e-9}],
    }
    tried = sweep(
        bucket,
        scans,
        space,
        base=larger(epochs=4, checkpoint_every_s=0),
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
            assert groups_held() == 0
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
    with pytest.raises(UserError, match=r"1 worker x 64 CPUs do not fit .* fewer workers"):
        searching.run(tried, resources, Budget())
    assert list(object_store.listing(tried.uri)) == [], "a sweep that cannot run was begun"
    with pytest.raises(UserError, match=r"64 trials of 1 workers do not fit .* --concurrent [123] "):
        searching.run(tried, ONE, Budget(), at_once=64)


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
            assert groups_held() == 0
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


def test_the_placement_group_of_a_controller_that_died_is_freed(ray_local: None) -> None:
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
        ray_compat.free_placement_groups(orphans=True)
        return set(ray_compat.placement_groups())

    assert kept | {lost} <= held_after_looking()
    ray.kill(dies)
    for attempt in tenacity.Retrying(stop=tenacity.stop_after_delay(30), wait=tenacity.wait_fixed(0.2)):
        with attempt:
            assert lost not in held_after_looking()
    assert kept <= held_after_looking()
    ray.kill(lives)
    remove_placement_group(own)


def test_as_many_trials_as_fit(ray_local: None) -> None:
    """The session's Ray has 4 logical CPUs on a machine of fewer or as many cores."""
    runs, share = cluster.allocate_trials(ONE, most=9)
    assert runs == min(os.cpu_count() or 1, 3)
    busy = runs * (share.workers * share.cpus_per_worker + cluster.DRIVER_CPUS)
    assert 0 < share.cpus_per_data_task <= 4 - busy, "data tasks would wait for ever"
    assert cluster.allocate_trials(ONE, most=1)[0] == 1
    assert cluster.allocate_trials(Resources(workers=2), most=9)[0] == 1


def test_what_workers_of_a_ray_of_our_own_are_given(ray_local: None) -> None:
    """Train's watcher over its controller does not miss the dashboard every second; waiting threads do not spin; memory
    that is freed is kept."""
    import ray
    from ray.train.v2._internal.execution.controller import placement_group_cleaner

    @ray.remote
    def look(name: str) -> tuple[int, list[str | None]]:
        names = ("GOMP_SPINCOUNT", "MALLOC_ARENA_MAX")
        return logging.getLogger(name).getEffectiveLevel(), [os.environ.get(key) for key in names]

    assert ray.get(look.remote(placement_group_cleaner.logger.name)) == (logging.ERROR, ["1000", "1"])
