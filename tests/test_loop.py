"""The loop on crops: a resumed run equals an uninterrupted one; the probe."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import timeless
from loops import (
    FACTS,
    LARGER,
    SIZES,
    Killed,
    LocalLoop,
    a_job,
    a_job_of,
    a_probe,
    assert_same_run,
    crops_dataset,
    killed_at,
    labelled_dataset,
    labelled_job,
    other_weights,
    steps_saved,
)

from logonet import networks, training
from logonet.core import seeding
from logonet.data import crop_shards
from logonet.distributed import preemption, ray_compat
from logonet.training import checkpoints, linear_probe
from logonet.training.dataset import LabelledDataset, TrainingDataset
from logonet.training.local import local_batches
from logonet.training.loop import GO_ON, LEAVE, Loop
from logonet.training.schedule import MicroBatches


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> TrainingDataset:
    return crops_dataset(tmp_path_factory.mktemp("crops"))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> LabelledDataset:
    return labelled_dataset(tmp_path_factory.mktemp("cases"))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> training.Init:
    return other_weights(str(tmp_path_factory.mktemp("weights")))


@pytest.fixture(scope="module")
def whole(crops: TrainingDataset, tmp_path_factory: pytest.TempPathFactory) -> Loop:
    """What has run to its end uninterrupted; its history and weights are what others must come to."""
    loop = LocalLoop(crops, a_job(f"{tmp_path_factory.mktemp('whole')}"))
    loop.train()
    return loop


def test_training_learns_and_logs_what_it_must(whole: Loop) -> None:
    history = whole.history
    assert [e["epoch"] for e in history] == [1, 2, 3, 4]
    assert history[-1]["loss"] < history[0]["loss"]
    for entry in history:
        assert 0 <= entry["accuracy"] <= 1
        assert 0 < entry["accuracy_floor"] < 1
        assert len(entry["accuracy_per_clusterer"]) == len(SIZES)
        assert 1 <= entry["effective_rank"] <= 8
        assert 0 <= entry["data_wait_share"] <= 1
        assert entry["samples_per_s"] > 0
        assert entry["peak_memory_mb"] > 0


@pytest.mark.parametrize(
    ("die_at_step", "every"),
    [(3, None), (5, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((3, 1), (5, None)))],
)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(
    crops: TrainingDataset,
    whole: Loop,
    tmp_path: Path,
    every: int | None,
    die_at_step: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed in the middle of an epoch (2 steps each), with checkpoints at epochs' ends or at every step."""
    job = a_job(f"{tmp_path}/killed", checkpoint_every_steps=every)
    first = LocalLoop(crops, job)
    real_step = training.step

    def dying_step(*args: Any, **kwargs: Any) -> Any:
        if first.step == die_at_step:
            raise Killed
        return real_step(*args, **kwargs)

    monkeypatch.setattr("logonet.training.loop.step", dying_step)
    with pytest.raises(Killed):
        first.train()
    first.writer.wait()
    monkeypatch.setattr("logonet.training.loop.step", real_step)

    second = LocalLoop(crops, job)
    second.train()
    assert_same_run(second, whole)


def test_a_checkpoint_comes_when_the_last_one_is_old_and_changes_nothing(
    crops: TrainingDataset, whole: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of 100 s and a checkpoint every 250: after the third, in the middle of an epoch, and at the end."""
    job = a_job(f"{tmp_path}/killed", checkpoint_every_s=250, keep_checkpoints=9)
    assert job.train.identity() == dataclasses.replace(job.train, checkpoint_every_s=0).identity()
    first, second = LocalLoop(crops, job), LocalLoop(crops, job)
    clock = SimpleNamespace(monotonic=lambda: 100.0 * max(first.step, second.step), time=time.time)
    monkeypatch.setattr("logonet.training.loop.time", clock)
    killed_at(monkeypatch, first, at_step=5)
    assert steps_saved(job) == [3]
    first.step = 0
    second.train()
    assert steps_saved(job) == [3, 6, 8]
    assert_same_run(second, whole)


def test_a_finished_run_is_not_trained_again(crops: TrainingDataset, whole: Loop) -> None:
    again = LocalLoop(crops, whole.job)
    assert again.train(lambda metrics: pytest.fail("trained again")) == whole.history


def test_accumulated_micro_batches_equal_one_batch(crops: TrainingDataset, tmp_path: Path) -> None:
    """Gradients of 2 x 2 samples equal those of a slow loop over the same two batches."""
    job = a_job(str(tmp_path), epochs=1, warmup_epochs=0)
    loop = LocalLoop(crops, job)
    batches = list(local_batches(crops, MicroBatches(crops.schedule, 2, 0, 1)))
    assert len(batches) == 2
    torch.manual_seed(seeding.integer(0, "init"))
    method = training.build_method(job.backbone, job.method, FACTS).train()
    for batch in training.to_tensors(iter(batches), torch.device("cpu")):
        (method(batch, 0.0)[0] / 2).backward()
    expected = {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}
    seen: dict[str, torch.Tensor] = {}
    training.step(
        loop.method,
        loop.optimizer,
        training.to_tensors(iter(batches), torch.device("cpu")),
        count=2,
        progress=0.0,
        cfg=job.train,
        seeds=[0, 0],
        autocast=torch.autocast("cpu", enabled=False),
        sync=lambda params: seen.update(
            {n: p.grad.clone() for n, p in zip(loop.params, params) if p.grad is not None}
        ),
    )
    assert seen.keys() == expected.keys() == loop.params.keys()
    for name, grad in expected.items():
        assert torch.equal(grad, seen[name]), name


@pytest.mark.parametrize("at_step", [3, pytest.param(4, marks=pytest.mark.slow)])  # in epoch 2 and at its end
def test_sigterm_stores_the_step_and_the_run_goes_on_from_it(
    crops: TrainingDataset, whole: Loop, tmp_path: Path, at_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = a_job(f"{tmp_path}/left")
    first = LocalLoop(crops, job)
    real_step, reported = training.step, []

    def step_with_signal(*args: Any, **kwargs: Any) -> Any:
        if first.step + 1 == at_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real_step(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr("logonet.training.loop.step", step_with_signal)
        patched.setattr(ray_compat, "told", lambda run: False)  # there is no Ray here to ask
        heard = preemption.Notices("left", 0, lambda: None)
        with heard.listening(), pytest.raises(training.Left) as left:
            first.train(reported.append, interruptions=heard)
    assert left.value.step == at_step
    assert len(reported) == 1
    found = checkpoints.newest(job.uri, job.fingerprint)
    assert found is not None
    assert found.step == at_step
    second = LocalLoop(crops, job)
    second.train()
    assert_same_run(second, whole)


def test_a_sigterm_during_the_last_step_is_no_reason_to_leave(
    crops: TrainingDataset, whole: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = LocalLoop(crops, a_job(str(tmp_path)))
    heard = preemption.Notices("end", 0, lambda: None)
    monkeypatch.setattr(
        heard,
        "due",
        lambda *_: (LEAVE if loop.step == loop.total_steps else GO_ON, False),
    )
    loop.train(interruptions=heard)
    assert_same_run(loop, whole)


def test_a_loss_that_is_not_finite_stops_with_a_sentence(crops: TrainingDataset, tmp_path: Path) -> None:
    loop = LocalLoop(crops, a_job(str(tmp_path)))
    with torch.no_grad():
        next(p for p in loop.method.parameters() if p.requires_grad).fill_(math.nan)
    with pytest.raises(training.Diverged, match=r"norm became nan .* lower train.lr"):
        loop.train()
    assert checkpoints.newest(str(tmp_path), "a" * 16) is None


@pytest.mark.parametrize(
    ("name", "count"), [("ulkanet", 2), pytest.param("logonet", 4, marks=pytest.mark.slow)]
)
def test_a_compiled_network_takes_the_same_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, count: int
) -> None:
    """Through the tracer alone, so that no compiler is needed. LoGoNet's eight local nets are compiled once."""
    graphs: list[Any] = []
    crops = crops_dataset(tmp_path, LARGER)

    def eager(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=eager))
    settings = {"epochs": 1, "steps_per_epoch": 1, "global_batch": 2, "warmup_epochs": 0, "lr": 1e-7}

    def history(compiled: bool) -> list[dict[str, Any]]:
        job = a_job_of(name, f"{tmp_path}/{compiled}", compile=compiled, **settings)
        return LocalLoop(crops, job).train()

    plain, compiled = history(False), history(True)
    assert compiled[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-5)
    assert len(graphs) == count


def test_a_compiled_function_has_more_variants_than_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[Any] = []

    def eager(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=eager))
    double = networks.compiled(lambda x, times: x * times)
    for ndim in range(1, 13):
        assert double(torch.ones((1,) * ndim), 2).sum() == 2
    assert len(graphs) == 12


@pytest.fixture(scope="module")
def probe_task(labelled: LabelledDataset) -> linear_probe.Task:
    return a_probe(labelled)


PROBED = ("probe_dice", "probe_dice_per_class", "probe_dice_floor")


@pytest.fixture(scope="module")
def probed(
    crops: TrainingDataset, probe_task: linear_probe.Task, tmp_path_factory: pytest.TempPathFactory
) -> Loop:
    job = a_job(f"{tmp_path_factory.mktemp('probed')}")
    loop = LocalLoop(crops, dataclasses.replace(job, probe=probe_task))
    loop.train()
    return loop


def test_probing_changes_no_bit_of_the_training(
    crops: TrainingDataset, whole: Loop, probed: Loop, tmp_path: Path, probe_task: linear_probe.Task
) -> None:
    history = probed.history
    without = [{k: v for k, v in e.items() if k not in PROBED} for e in history]
    assert timeless(without) == timeless(whole.history)
    for (name, a), b in zip(whole.method.state_dict().items(), probed.method.state_dict().values()):
        assert torch.equal(a, b), name
    assert [set(PROBED) <= e.keys() for e in history] == [False, True, False, True]
    # The last entry is of the network as it is now, and the floor of one that saw nothing.
    prober = linear_probe.Probe(probe_task, torch.device("cpu"))
    last = prober.measure(probed.method.backbone)
    assert last == {k: history[-1][k] for k in ("probe_dice", "probe_dice_per_class")}
    fresh = LocalLoop(crops, a_job(f"{tmp_path}/fresh"))
    assert prober.measure(fresh.method.backbone)["probe_dice"] == history[-1]["probe_dice_floor"]
    assert history[-1]["probe_dice_floor"] == history[1]["probe_dice_floor"] != last["probe_dice"]


@pytest.mark.slow
def test_a_killed_run_that_is_probed_equals_an_uninterrupted_one(
    crops: TrainingDataset,
    probed: Loop,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    probe_task: linear_probe.Task,
) -> None:
    """Its floor too, though the network that it resumes with is no fresh one."""
    job = dataclasses.replace(a_job(f"{tmp_path}/killed"), probe=probe_task)
    killed_at(monkeypatch, LocalLoop(crops, job), at_step=5)  # with a measurement before it and one to come
    second = LocalLoop(crops, job)
    second.train()
    assert_same_run(second, probed)


def test_the_floor_is_of_random_weights_though_the_run_starts_from_others(
    labelled: LabelledDataset, tmp_path: Path, pretrained: training.Init, probe_task: linear_probe.Task
) -> None:
    settings: dict[str, Any] = {"epochs": 1, "validate_every_epochs": 0}
    job = labelled_job(f"{tmp_path}/init", init=pretrained, **settings)
    floors = [
        LocalLoop(labelled, dataclasses.replace(j, probe=probe_task)).train()[0]["probe_dice_floor"]
        for j in (job, labelled_job(f"{tmp_path}/fresh", **settings))
    ]
    assert floors[0] == floors[1]


def test_the_time_of_probing_is_not_training_time(
    crops: TrainingDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probe_task: linear_probe.Task
) -> None:
    """On a clock that moves by an hour with every measurement and does not move else."""
    clock = [0.0]

    def slow(prober: linear_probe.Probe, net: Any) -> dict[str, Any]:
        clock[0] += 3600.0
        return {"probe_dice": 0.5, "probe_dice_per_class": [0.5, math.nan]}

    monkeypatch.setattr(linear_probe.Probe, "measure", slow)
    monkeypatch.setattr(training.loop.time, "monotonic", lambda: clock[0])
    job = dataclasses.replace(a_job(str(tmp_path), epochs=2), probe=probe_task)
    history = LocalLoop(crops, job).train()
    assert clock[0] == 2 * 3600.0  # before the first epoch and after the second
    assert all(e["samples_per_s"] > 1e6 for e in history)


def test_the_epoch_line_says_probe_dice_against_the_untrained_network() -> None:
    entry = {
        "epoch": 2, "loss": 1.5, "probe_dice": 0.5123, "probe_dice_floor": 0.4312, "lr": 1e-4,
        "samples_per_s": 3.0, "data_wait_share": 0.05, "peak_memory_mb": 900.0,
    }  # fmt: skip
    line = training.epoch_line(entry, 10)
    assert line.startswith("epoch 2/10  loss 1.5000  probe Dice 0.512 (untrained 0.431)  lr")


# --------------------------------------------------------------------------------------------- batches


def images(
    dataset: TrainingDataset, size: int, start: int, stop: int, rank: int = 0, world: int = 1
) -> list[np.ndarray]:
    positions = MicroBatches(dataset.schedule, size, start, stop, rank, world)
    return [batch["image"] for batch in local_batches(dataset, positions)]


def test_skipped_steps_are_never_read(crops: TrainingDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run's batches are the tail of the whole run's."""
    whole = images(crops, 4, 0, 5)
    read: list[int] = []
    real_read = crop_shards.CropTable.read
    monkeypatch.setattr(
        crop_shards.CropTable, "read", lambda table, i: (read.append(i), real_read(table, i))[1]
    )
    tail = images(crops, 4, 3, 5)
    assert len(read) == 8
    for a, b in zip(whole[3:], tail, strict=True):
        assert np.array_equal(a, b)


def test_ranks_share_a_step_whatever_their_number(crops: TrainingDataset) -> None:
    one = images(crops, 4, 0, 2)
    parts = [images(crops, 2, 0, 2, rank, 2) for rank in range(2)]
    for step in range(2):
        assert np.array_equal(np.concatenate([part[step] for part in parts]), one[step])


def test_ranks_that_have_unequally_many_batches_share_a_step_too(crops: TrainingDataset) -> None:
    one = images(crops, 1, 1, 3)
    ranks = [images(crops, 1, 1, 3, rank, 3) for rank in range(3)]
    assert [len(parts) for parts in ranks] == [2, 2, 4]
    for step in range(2):
        own = [part for rank, n in zip(ranks, (1, 1, 2)) for part in rank[step * n : (step + 1) * n]]
        assert np.array_equal(np.concatenate(own), np.concatenate(one[4 * step : 4 * step + 4]))


def test_loader_processes_give_the_same_batches_in_the_same_order(crops: TrainingDataset) -> None:
    positions = MicroBatches(crops.schedule, 2, 0, 3)
    here = [batch["image"] for batch in local_batches(crops, positions)]
    there = [np.asarray(batch["image"]) for batch in local_batches(crops, positions, num_workers=2)]
    assert len(here) == len(there) == 6
    for a, b in zip(here, there):
        assert np.array_equal(a, b)
