"""The loop: schedules, accumulation, checkpoints, and a resumed run that equals an uninterrupted one."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import timeless, tiny_backbone

from logonet import methods, networks, training
from logonet.clustering import kmeans
from logonet.core import seeding
from logonet.core.errors import UserError
from logonet.data import crop_shards, cropping, phantom, prepared_scans
from logonet.distributed import data_tasks, preemption, trainer
from logonet.distributed.cluster import ResourceAllocation, Resources
from logonet.inference import metrics, sliding_window
from logonet.methods import DataSpec
from logonet.storage import object_store
from logonet.training import checkpoints, dataset, linear_probe, schedule

SIZE = (32, 32, 32)
SIZES = (5, 7)
SHARE = ResourceAllocation(
    workers=1,
    use_gpu=False,
    cpus_per_worker=1,
    threads_per_worker=1,
    cpus_per_data_task=1,
    cpus_per_task=1,
    cpus=3,
)
FACTS = DataSpec(size_vox=SIZE, cluster_sizes=SIZES, majority_labels=(0, 0))


# ------------------------------------------------------------------------------------------- schedules


def test_learning_rate_warms_up_linearly_then_follows_a_cosine() -> None:
    cfg = training.Config(epochs=10, warmup_epochs=2, lr=1.0, min_lr=0.1)
    lrs = [training.lr_at(s, cfg, steps_per_epoch=5) for s in range(50)]
    assert lrs[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    for s in range(10, 50):
        expected = 0.1 + 0.9 * (1 + math.cos(math.pi * (s - 10) / 40)) / 2
        assert lrs[s] == pytest.approx(expected)
    assert all(a > b for a, b in itertools.pairwise(lrs[10:]))


@pytest.mark.parametrize(
    ("workers", "batch", "glob", "count"), [(1, 1, 16, 16), (16, 1, 16, 1), (2, 2, 8, 2), (3, 1, 16, 6)]
)
def test_accumulation_keeps_the_global_batch(workers: int, batch: int, glob: int, count: int) -> None:
    assert training.accumulation(training.Config(global_batch=glob, batch_size=batch), workers) == count


def test_a_global_batch_that_does_not_divide_names_those_that_do() -> None:
    with pytest.raises(UserError, match=r"train.global_batch=14 or 16"):
        training.accumulation(training.Config(global_batch=15, batch_size=2), workers=3)


def test_a_worker_without_anything_to_do_is_refused() -> None:
    with pytest.raises(UserError, match=r"--workers 8 or fewer, or --set train.global_batch=18 or more"):
        training.accumulation(training.Config(global_batch=16, batch_size=2), workers=9)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("precision", "fp8"),
        ("gradient_sync", "x"),
        ("warmup_epochs", 200.0),
        ("batch_size", 0),
        ("steps_per_epoch", 0),
        ("validate_every_epochs", -1),
    ],
)
def test_settings_that_cannot_work_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        training.Config(**{field: value})


@pytest.mark.parametrize("patience", [3, 0])
def test_patience_without_validation_is_refused(patience: int) -> None:
    with pytest.raises(ValueError, match=r"patience"):
        training.Config(patience=patience)


def test_the_death_of_the_process_that_leads_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    import ray.train.torch
    from ray.exceptions import ActorDiedError

    class Dies:
        def __init__(self, *_: Any, **settings: Any) -> None: ...

        def fit(self) -> None:
            raise ActorDiedError

    monkeypatch.setattr(ray.train.torch, "TorchTrainer", Dies)
    monkeypatch.setattr(ray, "put", lambda value: value)
    job = training.Job("/nowhere", "0" * 16, {}, {"name": "masked_clusters"}, training.Config(), FACTS)
    with pytest.raises(trainer.LeaderLost, match="the same command goes on from the newest checkpoint"):
        trainer.fit(job, object(), Resources(workers=1), SHARE)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------- the order


@pytest.mark.parametrize(("samples", "glob"), [(10, 4), (3, 8), (8, 8)])
def test_an_epoch_visits_every_sample_and_only_whole_steps(samples: int, glob: int) -> None:
    order = schedule.SampleSchedule(samples, glob, seed=1)
    for epoch in range(3):
        seen = [
            order.at(epoch * order.steps_per_epoch + s, slot)
            for s in range(order.steps_per_epoch)
            for slot in range(glob)
        ]
        assert [i for _, i in seen[:samples]] == seeding.epoch_order(1, epoch, samples).tolist()
        counts = np.bincount([i for _, i in seen], minlength=samples)
        assert counts.min() >= 1
        assert counts.max() - counts.min() <= 1


def test_the_order_is_a_slow_loop_over_permutations() -> None:
    order, step = schedule.SampleSchedule(5, 2, seed=9), 0
    for epoch in range(2):
        perm = seeding.epoch_order(9, epoch, 5).tolist()
        padded = (perm + perm)[:6]
        for s in range(3):
            assert [order.at(step, k)[1] for k in range(2)] == padded[2 * s : 2 * s + 2]
            step += 1


@pytest.mark.parametrize(("samples", "glob"), [(10, 4), (3, 8), (1, 4), (8, 8)])
def test_nothing_is_drawn_twice(samples: int, glob: int) -> None:
    """Also where a pass is filled up from its own start: other crops, other masks."""
    order = schedule.SampleSchedule(samples, glob, seed=1)
    seen = [order.at(step, slot) for step in range(3 * order.steps_per_pass) for slot in range(glob)]
    assert len(set(seen)) == len(seen)
    if samples % glob == 0:
        assert [draw for draw, _ in seen] == np.repeat(range(3), samples).tolist()


def test_an_epoch_of_a_number_of_steps_changes_no_samples() -> None:
    plain, counted = (
        schedule.SampleSchedule(5, 2, seed=3),
        schedule.SampleSchedule(5, 2, seed=3, epoch_steps=7),
    )
    assert (plain.steps_per_epoch, counted.steps_per_epoch) == (3, 7)
    places = list(itertools.product(range(20), range(2)))
    assert [plain.at(*p) for p in places] == [counted.at(*p) for p in places]


# ------------------------------------------------------------------------------------------ checkpoints


def a_state(step: int = 3, world: int = 2) -> checkpoints.State:
    gen = torch.Generator().manual_seed(step)
    return checkpoints.State(
        step=step,
        model={"w": torch.rand(4, 3, generator=gen), "n": torch.tensor(7)},
        optimizer={"step/w": torch.tensor(3.0), "exp_avg/w": torch.rand(4, 3, generator=gen)},
        partial=[{"loss": torch.rand(2, generator=gen, dtype=torch.float64)} for _ in range(world)],
        history=[{"epoch": 1, "loss": 0.1 + 0.2, "per": [1.0, 2.0]}],
        world=world,
    )


def assert_same(a: checkpoints.State, b: checkpoints.State) -> None:
    assert (a.step, a.history, a.world) == (b.step, b.history, b.world)
    for group, tensors in a.groups().items():
        assert tensors.keys() == b.groups()[group].keys()
        for name, t in tensors.items():
            assert torch.equal(t, b.groups()[group][name]), name
            assert t.dtype == b.groups()[group][name].dtype


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    checkpoints.save_state(f"{tmp_path}/checkpoints/step-00000003", "f" * 16, a_state())
    found = checkpoints.newest(str(tmp_path), "f" * 16)
    assert found is not None
    assert_same(found, a_state())


def test_a_blank_copy_has_the_same_shapes() -> None:
    blank = checkpoints.State.blank(a_state().describe())
    for name, t in blank.model.items():
        assert t.shape == a_state().model[name].shape
    assert [sorted(p) for p in blank.partial] == [["loss"], ["loss"]]


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
def test_a_torn_newest_checkpoint_falls_back_and_is_kept(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (3, 6):
        checkpoints.save_state(f"{tmp_path}/checkpoints/step-{step:08d}", "f" * 16, a_state(step))
    newest = tmp_path / "checkpoints" / "step-00000006"
    victim = newest / ("manifest.json" if damage == "manifest" else "optimizer.safetensors")
    raw = victim.read_bytes()
    if damage == "remove":
        victim.unlink()
    elif damage == "flip":
        victim.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    else:
        victim.write_bytes(raw[: len(raw) // 2])
    found = checkpoints.newest(str(tmp_path), "f" * 16)
    assert found is not None
    assert found.step == 3
    assert "step-00000006" in caplog.text
    assert (newest / "model.safetensors").exists()


@pytest.mark.parametrize("keep", [1, 2])
def test_what_was_saved_after_a_fallback_survives_pruning(tmp_path: Path, keep: int) -> None:
    for step in (6, 12):
        checkpoints.save_state(f"{tmp_path}/checkpoints/step-{step:08d}", "f" * 16, a_state(step))
        (tmp_path / "checkpoints" / f"step-{step:08d}" / "model.safetensors").write_bytes(b"torn")
    writer = checkpoints.Writer(str(tmp_path), "f" * 16, keep=keep)
    writer.save(a_state(1))
    writer.wait()
    found = checkpoints.newest(str(tmp_path), "f" * 16)
    assert found is not None
    assert found.step == 1


def test_a_store_that_refuses_is_not_taken_for_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starting again from step 0 because the store was away for a minute would be the worst answer."""
    checkpoints.save_state(f"{tmp_path}/checkpoints/step-00000003", "f" * 16, a_state())

    def refuse(*args: Any, **kwargs: Any) -> bytes:
        raise UserError("the store is away; wait")

    monkeypatch.setattr(object_store, "read", refuse)
    with pytest.raises(UserError, match="the store is away"):
        checkpoints.newest(str(tmp_path), "f" * 16)


def test_another_runs_checkpoint_is_not_taken(tmp_path: Path) -> None:
    checkpoints.save_state(f"{tmp_path}/checkpoints/step-00000003", "f" * 16, a_state())
    assert checkpoints.newest(str(tmp_path), "0" * 16) is None


def test_the_writer_keeps_the_newest_and_raises_what_went_wrong(tmp_path: Path) -> None:
    writer = checkpoints.Writer(str(tmp_path), "f" * 16, keep=2)
    # What a run leaves that is killed while it deletes an old one.
    object_store.write(f"{tmp_path}/checkpoints/step-00000000/model.safetensors", b"half")
    for step in (1, 2, 3):
        writer.save(a_state(step))
    writer.wait()
    assert [os.path.basename(u) for u in checkpoints.all_of(str(tmp_path))] == [
        "step-00000002",
        "step-00000003",
    ]
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    writer = checkpoints.Writer(str(blocked), "f" * 16, keep=2)
    writer.save(a_state(1))
    with pytest.raises(UserError, match="file"):
        writer.wait()


def test_a_saved_state_is_a_copy(tmp_path: Path) -> None:
    """Training goes on while the checkpoint is written; it must not see the next step's weights."""
    state = a_state()
    writer = checkpoints.Writer(str(tmp_path), "f" * 16, keep=1)
    writer.save(state)
    state.model["w"].zero_()
    state.history.append({"epoch": 2})
    writer.wait()
    found = checkpoints.newest(str(tmp_path), "f" * 16)
    assert found is not None
    assert_same(found, a_state())


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("behind", [0, 1])
def test_every_checkpoint_that_is_there_finds_its_best(tmp_path: Path, keep: int, behind: int) -> None:
    """Whenever a run is killed: also with the last checkpoint still being written, and with newer ones torn."""
    net, run = torch.nn.Linear(1, 1), str(tmp_path)
    writer = checkpoints.Writer(run, "f" * 16, keep=keep)
    for epoch in range(1, 9):
        checkpoints.save_best(run, epoch, net, keep)  # each epoch is better than those before
        for uri in checkpoints.all_of(run):
            best = checkpoints.load_state(uri, "f" * 16).step
            assert object_store.exists(checkpoints._best_uri(run, best)), (epoch, uri)
        if epoch > behind:
            writer.save(a_state(epoch - behind))
            writer.wait()
    assert len(checkpoints.all_of(run)) == keep
    assert len(list((tmp_path / "best").iterdir())) == keep + 2


def test_a_best_that_stays_the_best_outlives_every_checkpoint(tmp_path: Path) -> None:
    """After a fallback later ones may lie there too; they are not what the history says, and not in the way."""
    net, run = torch.nn.Linear(1, 1), str(tmp_path)
    for step in (90, 91, 92, 93):
        checkpoints.save_best(run, step, net, keep=1)
    checkpoints.save_best(run, 5, net, keep=1)
    writer = checkpoints.Writer(run, "f" * 16, keep=1)
    for step in range(5, 20, 5):
        writer.save(a_state(step))
    writer.wait()
    assert object_store.exists(checkpoints._best_uri(run, 5))


# ------------------------------------------------------------------------------------------- the worker


@pytest.fixture(scope="module")
def feed(tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> Any:
    """Six crops with made-up labels, as a reference in Ray's store."""
    import ray

    folder = tmp_path_factory.mktemp("crops")
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 1, SIZE[2])
    refs: list[crop_shards.CropRef] = []
    labels = []
    for n in range(3):
        crops_RCXYZ = []
        for _ in range(2):
            noise = rng.random((1, *SIZE)) * 0.2
            crops_RCXYZ.append(((ramp * rng.uniform(0.4, 0.8) + noise) * 65535).astype(np.uint16))
            labels.append([np.floor(ramp * (k - 1)).astype(np.int16) for k in SIZES])
        blob = crop_shards.shard_bytes(f"scan{n}", np.stack(crops_RCXYZ))
        name = f"shards/scan{n}.safetensors"
        object_store.write(f"{folder}/{name}", blob)
        refs += crop_shards.shard_index(f"{folder}/{name}", name, len(blob))
    table = crop_shards.CropTable(str(folder), SIZE, 1, tuple(refs))
    order = schedule.SampleSchedule(len(table), 4, seed=0)
    cfg = methods.config("masked_clusters", {"phi1": 0.2})
    return [ray.put(dataset.TrainingDataset(table, np.array(labels), "masked_clusters", cfg, order))]


def a_job(uri: str, **settings: Any) -> training.Job:
    cfg = training.Config(
        **{"epochs": 4, "global_batch": 4, "batch_size": 2, "lr": 1e-3, "warmup_epochs": 1, **settings}
    )
    return training.Job(uri, "a" * 16, tiny_backbone(), {"name": "masked_clusters", "phi1": 0.2}, cfg, FACTS)


def a_worker(feed: Any, job: training.Job) -> training.Worker:
    return training.Worker(job, feed, SHARE, rank=0, world=1, device=torch.device("cpu"))


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def whole(feed: Any, tmp_path_factory: pytest.TempPathFactory) -> training.Worker:
    """What has run to its end uninterrupted; its history and weights are what others must come to."""
    worker = a_worker(feed, a_job(f"{tmp_path_factory.mktemp('whole')}"))
    worker.run(lambda metrics: None)
    return worker


def assert_same_run(worker: training.Worker, expected: training.Worker) -> None:
    assert timeless(worker.history) == timeless(expected.history)
    for (name, a), b in zip(expected.method.state_dict().items(), worker.method.state_dict().values()):
        assert torch.equal(a, b), name


def test_training_learns_and_logs_what_it_must(whole: training.Worker) -> None:
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


@pytest.mark.parametrize("every", [None, 1])
@pytest.mark.parametrize("die_at_step", [3, 5])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(
    feed: Any,
    whole: training.Worker,
    tmp_path: Path,
    every: int | None,
    die_at_step: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed in the middle of an epoch (2 steps each), with checkpoints at epochs' ends or at every step."""
    job = a_job(f"{tmp_path}/killed", checkpoint_every_steps=every)
    first = a_worker(feed, job)
    real_step = training.step

    def dying_step(*args: Any, **kwargs: Any) -> Any:
        if first.step == die_at_step:
            raise Killed
        return real_step(*args, **kwargs)

    monkeypatch.setattr("logonet.training.loop.step", dying_step)
    with pytest.raises(Killed):
        first.run(lambda metrics: None)
    first.writer.wait()
    monkeypatch.setattr("logonet.training.loop.step", real_step)

    second = a_worker(feed, job)
    second.run(lambda metrics: None)
    assert_same_run(second, whole)


def test_a_finished_run_is_not_trained_again(feed: Any, whole: training.Worker) -> None:
    again = a_worker(feed, whole.job)
    assert again.run(lambda metrics: pytest.fail("trained again")) == whole.history


def test_accumulated_micro_batches_equal_one_batch(feed: Any, tmp_path: Path) -> None:
    """Gradients of 2 x 2 samples equal those of a slow loop over the same two batches."""
    job = a_job(str(tmp_path), epochs=1, warmup_epochs=0)
    worker = a_worker(feed, job)
    batches = list(
        data_tasks.batches(feed, start_step=0, stop_step=1, rank=0, world=1, batch_size=2, share=SHARE)
    )
    assert len(batches) == 2
    torch.manual_seed(seeding.integer(0, "init"))
    method = training.build_method(job.backbone, job.method, FACTS).train()
    for batch in training.to_tensors(iter(batches), torch.device("cpu")):
        (method(batch, 0.0)[0] / 2).backward()
    expected = {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}
    seen: dict[str, torch.Tensor] = {}
    training.step(
        worker.method,
        worker.optimizer,
        training.to_tensors(iter(batches), torch.device("cpu")),
        count=2,
        progress=0.0,
        lr=1e-3,
        cfg=job.train,
        seeds=[0, 0],
        autocast=torch.autocast("cpu", enabled=False),
        sync=lambda params: seen.update(
            {n: p.grad.clone() for n, p in zip(worker.names, params) if p.grad is not None}
        ),
    )
    assert seen.keys() == expected.keys() == set(worker.names)
    for name, grad in expected.items():
        assert torch.equal(grad, seen[name]), name


def test_skipped_steps_are_never_read(feed: Any) -> None:
    """Resuming skips references: the stream from step 3 is the tail of the stream from step 0."""
    whole = list(
        data_tasks.batches(feed, start_step=0, stop_step=5, rank=0, world=1, batch_size=4, share=SHARE)
    )
    tail = list(
        data_tasks.batches(feed, start_step=3, stop_step=5, rank=0, world=1, batch_size=4, share=SHARE)
    )
    assert len(tail) == 2
    for a, b in zip(whole[3:], tail):
        for key in a:
            assert np.array_equal(a[key], b[key]), key


def test_ranks_share_a_step_whatever_their_number(feed: Any) -> None:
    one = list(
        data_tasks.batches(feed, start_step=0, stop_step=2, rank=0, world=1, batch_size=4, share=SHARE)
    )
    for step in range(2):
        parts = []
        for rank in range(2):
            stream = data_tasks.batches(
                feed, start_step=0, stop_step=2, rank=rank, world=2, batch_size=2, share=SHARE
            )
            parts.append(list(stream)[step]["image"])
        assert np.array_equal(np.concatenate(parts), one[step]["image"])


def test_ranks_that_have_unequally_many_batches_share_a_step_too(feed: Any) -> None:
    stream = functools.partial(data_tasks.batches, feed, start_step=1, stop_step=3, batch_size=1, share=SHARE)
    one = [batch["image"] for batch in stream(rank=0, world=1)]
    ranks = [[batch["image"] for batch in stream(rank=rank, world=3)] for rank in range(3)]
    assert [len(parts) for parts in ranks] == [2, 2, 4]
    for step in range(2):
        own = [part for rank, n in zip(ranks, (1, 1, 2)) for part in rank[step * n : (step + 1) * n]]
        assert np.array_equal(np.concatenate(own), np.concatenate(one[4 * step : 4 * step + 4]))


@pytest.mark.parametrize("at_step", [3, 4])  # in the middle of epoch 2 and at its end
def test_sigterm_stores_the_step_and_the_run_goes_on_from_it(
    feed: Any, whole: training.Worker, tmp_path: Path, at_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = a_job(f"{tmp_path}/left")
    first = a_worker(feed, job)
    real_step, reported = training.step, []

    def step_with_signal(*args: Any, **kwargs: Any) -> Any:
        if first.step + 1 == at_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real_step(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr("logonet.training.loop.step", step_with_signal)
        heard = preemption.Notices("left", 0, lambda: None)
        with heard.listening(), pytest.raises(training.Left) as left:
            first.run(reported.append, heard=heard)
    assert left.value.step == at_step
    assert len(reported) == 1
    found = checkpoints.newest(job.uri, job.fingerprint)
    assert found is not None
    assert found.step == at_step
    second = a_worker(feed, job)
    second.run(lambda metrics: None, heard=preemption.Notices("left", 0, lambda: None))
    assert_same_run(second, whole)


def test_a_sigterm_during_the_last_step_is_no_reason_to_leave(
    feed: Any, whole: training.Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = a_worker(feed, a_job(str(tmp_path)))
    heard = preemption.Notices("end", 0, lambda: None)
    monkeypatch.setattr(
        heard,
        "due",
        lambda *_: (preemption.LEAVE if worker.step == worker.total_steps else preemption.GO_ON, False),
    )
    worker.run(lambda metrics: None, heard=heard)
    assert_same_run(worker, whole)


def test_a_loss_that_is_not_finite_stops_with_a_sentence(feed: Any, tmp_path: Path) -> None:
    worker = a_worker(feed, a_job(str(tmp_path)))
    with torch.no_grad():
        next(p for p in worker.method.parameters() if p.requires_grad).fill_(math.nan)
    with pytest.raises(training.Diverged, match=r"norm became nan .* lower train.lr"):
        worker.run(lambda metrics: None)
    assert checkpoints.newest(str(tmp_path), "a" * 16) is None


@pytest.mark.parametrize("name", ["ulkanet", pytest.param("logonet", marks=pytest.mark.slow)])  # nine of them
def test_a_compiled_network_takes_the_same_steps(
    feed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Through the tracer with its eager backend, so that no compiler is needed."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    settings = {"epochs": 1, "steps_per_epoch": 1, "global_batch": 2, "warmup_epochs": 0, "lr": 1e-7}

    def history(compiled: bool) -> list[dict[str, Any]]:
        job = a_job(f"{tmp_path}/{compiled}", compile=compiled, **settings)
        job = dataclasses.replace(job, backbone={"name": name, **networks.tiny(name)})
        return a_worker(feed, job).run(lambda metrics: None)

    plain, compiled = history(False), history(True)
    assert compiled[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-5)


# ------------------------------------------------------------------------------ the worker on labelled cases

LABELLED_SIZE = (16, 16, 16)
CLASSES = ("background", "liver", "spleen")
LABELLED_FACTS = DataSpec(size_vox=LABELLED_SIZE, num_classes=len(CLASSES))
SUPERVISED = {"augment": {"flip_prob": 0.5}}


def dynunet() -> dict[str, Any]:
    return {"name": "dynunet", **networks.tiny("dynunet")}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> dataset.LabelledDataset:
    """Seven phantoms, four to train on and three to validate on."""
    folder, refs = tmp_path_factory.mktemp("cases"), []
    for i in range(7):
        scan, labels_XYZ = phantom.phantom(i, (20, 18, 16), (4.0, 4.0, 6.0), classes=len(CLASSES))
        image_CXYZ, indices_XYZ = prepared_scans.prepare(
            scan, labels_XYZ, "CT", (0, 1, 2), prepared_scans.Config(), f"case{i}"
        )
        uri = f"{folder}/cases/case{i}.safetensors"
        blob = prepared_scans.to_bytes(f"case{i}", image_CXYZ, indices_XYZ, seed=0)
        object_store.write(uri, blob)
        refs.append(prepared_scans.ref_of(uri, blob))
    return dataset.LabelledDataset(
        table=prepared_scans.Table(tuple(refs), CLASSES, (0, 1, 2)),
        train=(0, 1, 3, 4),
        val=(2, 5, 6),
        crops=prepared_scans.Crops(LABELLED_SIZE),
        method="supervised",
        method_config=methods.config("supervised", SUPERVISED),
        order=schedule.SampleSchedule(4, 2, seed=0),
    )


@pytest.fixture
def stored_feed(labelled: dataset.LabelledDataset, ray_local: None) -> Any:
    return in_ray(labelled)


def in_ray(feed: dataset.LabelledDataset) -> Any:
    import ray

    return [ray.put(feed)]


def labelled_job(uri: str, init: training.Init | None = None, **settings: Any) -> training.Job:
    values = {"epochs": 4, "global_batch": 2, "lr": 3e-3, "warmup_epochs": 1, "validate_every_epochs": 1}
    method = {"name": "supervised", **SUPERVISED}
    return training.Job(
        uri, "a" * 16, dynunet(), method, training.Config(**{**values, **settings}), LABELLED_FACTS, init=init
    )


def silent(metrics: dict[str, Any]) -> None: ...


def scripted(monkeypatch: pytest.MonkeyPatch, dice: Sequence[float]) -> None:
    """Validation that answers ``dice`` of the epoch, when one is due."""

    def validate(worker: training.Worker, epoch: int) -> dict[str, Any]:
        due = epoch % worker.cfg.validate_every_epochs == 0 or epoch == worker.cfg.epochs
        return {"val_dice": dice[epoch - 1], "val_dice_per_class": [dice[epoch - 1]] * 2} if due else {}

    monkeypatch.setattr(training.Worker, "_validate", validate)


def killed_at(monkeypatch: pytest.MonkeyPatch, worker: training.Worker, at_step: int) -> None:
    """Run ``worker`` until it dies before the step after ``at_step``; its last checkpoint is written."""
    real_step = training.step

    def dying_step(*args: Any, **kwargs: Any) -> Any:
        if worker.step == at_step:
            raise Killed
        return real_step(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr("logonet.training.loop.step", dying_step)
        with pytest.raises(Killed):
            worker.run(silent)
    worker.writer.wait()


def test_a_batch_holds_every_crop_of_its_cases_whatever_the_number_of_ranks(
    labelled: dataset.LabelledDataset, stored_feed: Any
) -> None:
    stream = functools.partial(data_tasks.batches, stored_feed, start_step=0, stop_step=3, share=SHARE)
    one = list(stream(rank=0, world=1, batch_size=2))
    assert [b["image"].shape for b in one] == [(4, 1, *LABELLED_SIZE)] * 3
    for step, batch in enumerate(one):
        want = [row for slot in range(2) for row in labelled.samples(*labelled.order.at(step, slot))]
        for key in ("image", "labels"):
            assert np.array_equal(batch[key], np.stack([row[key] for row in want]))
    ranks = [list(stream(rank=rank, world=2, batch_size=1)) for rank in range(2)]
    for step, batch in enumerate(one):
        both = np.concatenate([ranks[0][step]["image"], ranks[1][step]["image"]])
        assert np.array_equal(both, batch["image"])


def test_a_case_that_comes_again_gives_other_crops(labelled: dataset.LabelledDataset) -> None:
    """One-shot finetuning with a global batch of 4: four times two different crops of the one case."""
    feed = dataclasses.replace(labelled, train=(3,), order=schedule.SampleSchedule(1, 4, seed=0))
    rows = [row for slot in range(4) for row in feed.samples(*feed.order.at(0, slot))]
    assert len({row["image"].tobytes() for row in rows}) == 8


def test_finetuning_learns_and_validates_when_due(
    labelled: dataset.LabelledDataset, stored_feed: Any, tmp_path: Path
) -> None:
    job = labelled_job(str(tmp_path), epochs=5, validate_every_epochs=2)
    worker = a_worker(stored_feed, job)
    history = worker.run(silent)
    assert history[-1]["loss"] < 0.9 * history[0]["loss"]
    assert [e["epoch"] for e in history if "val_dice" in e] == [2, 4, 5]
    for entry in history:
        assert 0 <= entry["train_dice"] <= 1
        assert len(entry["train_dice_per_class"]) == 2
    # The last entry against the network as it is now, the slow way.
    net = worker.method.backbone.eval()
    dice_VK = []
    for place in labelled.val:
        image_CXYZ, truth_XYZ = prepared_scans.read_case(labelled.table.refs[place])
        found_XYZ = sliding_window.labels(
            net, image_CXYZ.astype(np.float32) / 65535, LABELLED_SIZE, sliding_window.Config(), "cpu"
        )
        dice_VK.append([metrics.score(found_XYZ == k, truth_XYZ == k, (1, 1, 1))["dice"] for k in (1, 2)])
    assert history[-1]["val_dice_per_class"] == pytest.approx(np.mean(dice_VK, 0).tolist(), rel=1e-12)
    assert history[-1]["val_dice"] == pytest.approx(float(np.mean(dice_VK)), rel=1e-12)
    assert worker.method.training
    assert "validation Dice" in training.epoch_line(history[-1], 5)
    assert "validation Dice" not in training.epoch_line(history[0], 5)


def test_without_validation_nothing_is_read_and_no_best_is_kept(
    stored_feed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared_scans, "read_case", lambda ref: pytest.fail("a validation case was read"))
    worker = a_worker(stored_feed, labelled_job(str(tmp_path), epochs=1, validate_every_epochs=0))
    history = worker.run(silent)
    assert "val_dice" not in history[0]
    assert "best.safetensors" not in checkpoints.save_final(
        str(tmp_path), worker.method, history, training.best_step(history)
    )
    assert not (tmp_path / "best").exists()


@pytest.mark.parametrize("seed", range(3))
def test_dice_of_a_case_is_a_slow_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    found_XYZ, truth_XYZ = (rng.integers(0, 4, (5, 4, 3)).astype(np.uint8) for _ in range(2))
    truth_XYZ[truth_XYZ == 3] = 0  # found and not there: 0
    got = training.case_dice(found_XYZ, truth_XYZ, num_classes=6)
    for k in (1, 2, 3):
        found, truth = ({tuple(p) for p in np.argwhere(a == k).tolist()} for a in (found_XYZ, truth_XYZ))
        assert got[k - 1] == pytest.approx(2 * len(found & truth) / (len(found) + len(truth)))
        assert got[k - 1] == pytest.approx(
            metrics.score(found_XYZ == k, truth_XYZ == k, (1.0, 1.0, 1.0))["dice"]
        )
    assert len(got) == 5
    assert all(math.isnan(d) for d in got[3:])  # neither found nor there: no score


def test_a_class_that_no_case_has_is_left_out_of_the_mean(
    labelled: dataset.LabelledDataset, ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([[0.5, math.nan], [0.3, math.nan], [math.nan, math.nan]])
    monkeypatch.setattr("logonet.training.loop.case_dice", lambda *args: next(answers))
    values = a_worker(in_ray(labelled), labelled_job(str(tmp_path)))._validate(1)
    assert values["val_dice"] == pytest.approx(0.4)
    assert values["val_dice_per_class"][0] == pytest.approx(0.4)
    assert math.isnan(values["val_dice_per_class"][1])


def test_a_network_whose_answer_is_no_number_stops_with_a_sentence(stored_feed: Any, tmp_path: Path) -> None:
    worker = a_worker(stored_feed, labelled_job(str(tmp_path)))
    with torch.no_grad():
        next(worker.method.backbone.parameters()).fill_(math.nan)
    with pytest.raises(training.Diverged, match=r"validation failed .* lower train\.lr"):
        worker._validate(1)


@pytest.mark.parametrize(
    ("dice", "best"),
    [
        ([0.1, 0.5, 0.4], 2),
        ([0.5, 0.5, 0.5], 1),  # the first of equals: less trained on the same cases
        ([math.nan, 0.0, math.nan], 2),
        ([math.nan, math.nan], None),
        ([None, None], None),
        ([], None),
    ],
)
def test_the_best_step(dice: list[float | None], best: int | None) -> None:
    history = [{"step": i + 1, **({} if d is None else {"val_dice": d})} for i, d in enumerate(dice)]
    assert training.best_step(history) == best


@pytest.mark.parametrize(
    ("dice", "step"), [([0.1, 0.6, 0.5, 0.6, 0.2, 0.3], 4), ([0.6, 0.5, 0.4, 0.3, 0.2, 0.1], 2)]
)
def test_the_best_weights_are_the_backbone_after_that_step(
    stored_feed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dice: list[float], step: int
) -> None:
    """And they outlive the checkpoints of their time."""
    scripted(monkeypatch, dice)
    worker = a_worker(stored_feed, labelled_job(str(tmp_path), epochs=6, keep_checkpoints=1))
    after: dict[int, dict[str, torch.Tensor]] = {}

    def remember(metrics: dict[str, Any]) -> None:
        after[metrics["step"]] = {n: t.clone() for n, t in worker.method.backbone.state_dict().items()}

    history = worker.run(remember)
    assert training.best_step(history) == step
    assert [os.path.basename(u) for u in checkpoints.all_of(str(tmp_path))] == ["step-00000012"]
    files = checkpoints.save_final(str(tmp_path), worker.method, history, training.best_step(history))
    best = training.load_weights(
        training.Init(f"{tmp_path}/best.safetensors", files["best.safetensors"].sha256)
    )
    last = training.load_weights(
        training.Init(f"{tmp_path}/backbone.safetensors", files["backbone.safetensors"].sha256)
    )
    assert best.keys() == last.keys() == after[step].keys()
    for name, tensor in best.items():
        assert torch.equal(tensor, after[step][name]), name
        assert torch.equal(last[name], after[12][name]), name
    assert any(not torch.equal(best[name], last[name]) for name in best)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_run_killed_after_a_new_best_can_go_back_to_the_old_one(
    stored_feed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    """The checkpoint that names the new best was never written, and on other hardware it is no best any more."""
    job = labelled_job(str(tmp_path), keep_checkpoints=keep)
    first = a_worker(stored_feed, job)
    scripted(monkeypatch, [0.1, 0.2, 0.3, 0.4])
    save = first.writer.save

    def dying_save(state: checkpoints.State) -> None:
        if state.step == 6:
            raise Killed
        save(state)

    monkeypatch.setattr(first.writer, "save", dying_save)
    with pytest.raises(Killed):
        first.run(silent)
    first.writer.wait()
    scripted(monkeypatch, [0.1, 0.2, 0.15, 0.12])
    second = a_worker(stored_feed, job)
    history = second.run(silent)
    assert training.best_step(history) == 4
    assert "best.safetensors" in checkpoints.save_final(str(tmp_path), second.method, history, 4)


@pytest.mark.parametrize(
    ("every", "patience", "dice", "epochs"),
    [
        (1, 3, [0.2, 0.5, 0.4, 0.45, 0.5, 0.9, 0.9, 0.9], 5),
        (1, 1, [0.5, 0.4, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9], 2),
        (2, 2, [0.0, 0.5, 0.0, 0.4, 0.0, 0.3, 0.0, 0.9], 6),
        (3, 1, [0.0, 0.0, 0.5, 0.0, 0.0, 0.6, 0.0, 0.1], 8),  # validated at the end too
        (1, 4, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], 8),
    ],
)
def test_patience_ends_a_run_and_a_resumed_one_at_the_same_epoch(
    stored_feed: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    every: int,
    patience: int,
    dice: list[float],
    epochs: int,
) -> None:
    scripted(monkeypatch, dice)
    settings: dict[str, Any] = {"epochs": 8, "validate_every_epochs": every, "patience": patience}
    whole = a_worker(stored_feed, labelled_job(f"{tmp_path}/whole", **settings))
    expected = whole.run(silent)
    assert len(expected) == epochs
    again = a_worker(stored_feed, labelled_job(f"{tmp_path}/whole", **settings))
    assert again.run(lambda metrics: pytest.fail("trained on")) == expected
    job = labelled_job(f"{tmp_path}/killed", **settings)
    killed_at(monkeypatch, a_worker(stored_feed, job), at_step=2 * epochs - 1)
    assert timeless(a_worker(stored_feed, job).run(silent)) == timeless(expected)


@pytest.mark.parametrize("every", [None, 1])
def test_a_killed_finetuning_equals_an_uninterrupted_one_with_its_best(
    stored_feed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int | None
) -> None:
    def finished(worker: training.Worker, job: training.Job) -> tuple[list[dict[str, Any]], dict[str, str]]:
        history = worker.run(silent)
        files = checkpoints.save_final(job.uri, worker.method, history, training.best_step(history))
        return timeless(history), {n: f.sha256 for n, f in files.items() if n != "history.json"}

    job = labelled_job(f"{tmp_path}/whole", checkpoint_every_steps=every)
    expected = finished(a_worker(stored_feed, job), job)
    assert set(expected[1]) == {"best.safetensors", "backbone.safetensors", "method.safetensors"}
    job = labelled_job(f"{tmp_path}/killed", checkpoint_every_steps=every)
    for at_step in (3, 6):  # twice: within an epoch and at the end of one
        killed_at(monkeypatch, a_worker(stored_feed, job), at_step)
    assert finished(a_worker(stored_feed, job), job) == expected


def test_an_epoch_of_a_number_of_steps(
    labelled: dataset.LabelledDataset, ray_local: None, tmp_path: Path
) -> None:
    """Passes are of 2 steps; epochs of 3 end, validate and save in the middle of one."""
    counted = dataclasses.replace(labelled, order=schedule.SampleSchedule(4, 2, seed=0, epoch_steps=3))
    job = labelled_job(f"{tmp_path}/counted", epochs=2, steps_per_epoch=3)
    worker = a_worker(in_ray(counted), job)
    history = worker.run(silent)
    assert [(e["epoch"], e["step"]) for e in history] == [(1, 3), (2, 6)]
    assert [os.path.basename(u) for u in checkpoints.all_of(job.uri)] == ["step-00000003", "step-00000006"]
    assert all("val_dice" in e for e in history)
    # The same samples in the same order as in three passes: with one learning rate, the same weights.
    flat: dict[str, Any] = {"warmup_epochs": 0, "min_lr": 3e-3, "validate_every_epochs": 0}
    a = a_worker(in_ray(counted), labelled_job(f"{tmp_path}/a", epochs=2, steps_per_epoch=3, **flat))
    b = a_worker(in_ray(labelled), labelled_job(f"{tmp_path}/b", epochs=3, **flat))
    assert (a.run(silent)[-1]["step"], b.run(silent)[-1]["step"]) == (6, 6)
    for (name, one), other in zip(a.method.state_dict().items(), b.method.state_dict().values()):
        assert torch.equal(one, other), name


# ---------------------------------------------------------------------------------------- initial weights


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> training.Init:
    """Weights that no fresh network has."""
    torch.manual_seed(99)
    net: Any = training.build_method(
        dynunet(), {"name": "supervised"}, dataclasses.replace(LABELLED_FACTS, num_classes=5)
    )
    uri = f"{tmp_path_factory.mktemp('weights')}/backbone.safetensors"
    return training.Init(uri, checkpoints._write_tensors(uri, net.backbone.state_dict()).sha256)


def test_initial_weights_are_loaded_at_step_0_and_not_on_resuming(
    stored_feed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretrained: training.Init
) -> None:
    job = labelled_job(str(tmp_path), init=pretrained)
    worker = a_worker(stored_feed, job)
    fresh = {n: t.clone() for n, t in worker.method.backbone.state_dict().items()}
    worker.restore()
    weights, now = training.load_weights(pretrained), worker.method.backbone.state_dict()
    prefixes = worker.method.backbone.head_prefixes
    heads = [n for n in now if n.startswith(prefixes)]
    assert 0 < len(heads) < len(now)
    for name, tensor in now.items():
        assert torch.equal(tensor, fresh[name] if name in heads else weights[name]), name
    killed_at(monkeypatch, a_worker(stored_feed, job), at_step=3)
    monkeypatch.setattr(
        training, "load_weights", lambda init: pytest.fail("initial weights on a resumed run")
    )
    resumed = a_worker(stored_feed, job)
    resumed.restore()
    assert resumed.step == 2
    kept = checkpoints.newest(str(tmp_path), job.fingerprint)
    assert kept is not None
    for name, tensor in resumed.method.state_dict().items():
        assert torch.equal(tensor, kept.model[name]), name


def test_a_run_that_died_before_its_first_checkpoint_starts_from_the_weights_again(
    stored_feed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretrained: training.Init
) -> None:
    job = labelled_job(f"{tmp_path}/whole", init=pretrained, epochs=1)
    expected = a_worker(stored_feed, job).run(silent)
    scratch = a_worker(stored_feed, labelled_job(f"{tmp_path}/scratch", epochs=1)).run(silent)
    assert expected[0]["loss"] != scratch[0]["loss"]
    job = labelled_job(f"{tmp_path}/killed", init=pretrained, epochs=1)
    killed_at(monkeypatch, a_worker(stored_feed, job), at_step=1)
    assert timeless(a_worker(stored_feed, job).run(silent)) == timeless(expected)


def test_weights_that_are_not_the_ones_meant_are_refused(
    stored_feed: Any, tmp_path: Path, pretrained: training.Init
) -> None:
    other = dataclasses.replace(pretrained, sha256="0" * 64)
    with pytest.raises(
        object_store.IntegrityError, match=r"backbone\.safetensors: its SHA-256 is not the recorded"
    ):
        a_worker(stored_feed, labelled_job(str(tmp_path), init=other)).run(silent)
    assert not checkpoints.all_of(str(tmp_path))
    text = f"{tmp_path}/notes.safetensors"
    noted = object_store.write(text, b"no weights at all, but more than eight bytes")
    with pytest.raises(UserError, match=r"notes\.safetensors is no safetensors file .* saved by logonet"):
        training.load_weights(training.Init(text, noted.sha256))


# --------------------------------------------------------------------------------------------- the probe


@pytest.fixture(scope="module")
def probe_task(labelled: dataset.LabelledDataset) -> linear_probe.Task:
    cfg = linear_probe.Config(
        every_epochs=2, train_cases=2, val_cases=1, crops_per_case=1, voxels_per_crop=300
    )
    ids = [ref.scan_id for ref in labelled.table.refs]
    return linear_probe.task(cfg, labelled.table, ids[:4], ids[4:], SIZE)


PROBED = ("probe_dice", "probe_dice_per_class", "probe_dice_floor")


@pytest.fixture(scope="module")
def probed(
    feed: Any, probe_task: linear_probe.Task, tmp_path_factory: pytest.TempPathFactory
) -> training.Worker:
    job = a_job(f"{tmp_path_factory.mktemp('probed')}")
    worker = a_worker(feed, dataclasses.replace(job, probe=probe_task))
    worker.run(silent)
    return worker


def test_probing_changes_no_bit_of_the_training(
    feed: Any, whole: training.Worker, probed: training.Worker, tmp_path: Path, probe_task: linear_probe.Task
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
    fresh = a_worker(feed, a_job(f"{tmp_path}/fresh"))
    assert prober.measure(fresh.method.backbone)["probe_dice"] == history[-1]["probe_dice_floor"]
    assert history[-1]["probe_dice_floor"] == history[1]["probe_dice_floor"] != last["probe_dice"]


def test_a_killed_run_that_is_probed_equals_an_uninterrupted_one(
    feed: Any,
    probed: training.Worker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    probe_task: linear_probe.Task,
) -> None:
    """Its floor too, though the network that it resumes with is no fresh one."""
    job = dataclasses.replace(a_job(f"{tmp_path}/killed"), probe=probe_task)
    killed_at(monkeypatch, a_worker(feed, job), at_step=5)  # with a measurement before it and one to come
    second = a_worker(feed, job)
    second.run(silent)
    assert_same_run(second, probed)


def test_the_floor_is_of_random_weights_though_the_run_starts_from_others(
    stored_feed: Any, tmp_path: Path, pretrained: training.Init, probe_task: linear_probe.Task
) -> None:
    settings: dict[str, Any] = {"epochs": 1, "validate_every_epochs": 0}
    job = labelled_job(f"{tmp_path}/init", init=pretrained, **settings)
    floors = [
        a_worker(stored_feed, dataclasses.replace(j, probe=probe_task)).run(silent)[0]["probe_dice_floor"]
        for j in (job, labelled_job(f"{tmp_path}/fresh", **settings))
    ]
    assert floors[0] == floors[1]


def test_the_time_of_probing_is_not_training_time(
    feed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probe_task: linear_probe.Task
) -> None:
    """On a clock that moves by an hour with every measurement and does not move else."""
    clock = [0.0]

    def slow(prober: linear_probe.Probe, net: Any) -> dict[str, Any]:
        clock[0] += 3600.0
        return {"probe_dice": 0.5, "probe_dice_per_class": [0.5, math.nan]}

    monkeypatch.setattr(linear_probe.Probe, "measure", slow)
    monkeypatch.setattr(training.loop.time, "monotonic", lambda: clock[0])
    job = dataclasses.replace(a_job(str(tmp_path), epochs=2), probe=probe_task)
    history = a_worker(feed, job).run(silent)
    assert clock[0] == 2 * 3600.0  # before the first epoch and after the second
    assert all(e["samples_per_s"] > 1e6 for e in history)


def test_the_epoch_line_says_probe_dice_against_the_untrained_network() -> None:
    entry = {
        "epoch": 2, "loss": 1.5, "probe_dice": 0.5123, "probe_dice_floor": 0.4312, "lr": 1e-4,
        "samples_per_s": 3.0, "data_wait_share": 0.05, "peak_memory_mb": 900.0,
    }  # fmt: skip
    line = training.epoch_line(entry, 10)
    assert line.startswith("epoch 2/10  loss 1.5000  probe Dice 0.512 (untrained 0.431)  lr")


# --------------------------------------------------------------------------------------------- the ranks


@pytest.mark.parametrize("mode", ["flat", "ddp"])
def test_three_ranks_average_the_gradients_of_four_batches(
    mode: str, ray_local: None, tmp_path: Path
) -> None:
    """Through real collectives: one rank has two of them. And what one rank hears, all do."""
    import ray

    @ray.remote(num_cpus=1)
    def take(rank: int, world: int) -> tuple[list[np.ndarray], int]:
        from datetime import timedelta
        from types import SimpleNamespace

        import torch.distributed as dist

        torch.set_num_threads(1)
        if world > 1:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{tmp_path}/meet-{mode}",
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=120),
            )
        try:
            torch.manual_seed(0)
            net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
            module: Any = torch.nn.Module()
            module.net = net
            module.forward = lambda batch, progress: (net(batch["x"]).square().mean(), {})
            x_MBF = torch.randn(4, 2, 6, generator=torch.Generator().manual_seed(1))
            sync = training.average_gradients if world > 1 else lambda params: None
            if mode == "ddp" and world > 1:
                kwargs = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
                module, sync = (
                    torch.nn.parallel.DistributedDataParallel(module, **kwargs),
                    lambda params: None,
                )
            own = schedule.shard_micro_batches(4, rank, world)
            for _ in range(2):  # DDP lays its buckets out anew after the first
                training.step(
                    module,
                    torch.optim.SGD(net.parameters(), lr=0.1),
                    ({"x": x_MBF[i]} for i in own),
                    count=len(own),
                    mean_count=4 / world,
                    progress=0.0,
                    lr=0.1,
                    cfg=training.Config(),
                    seeds=list(own),
                    autocast=torch.autocast("cpu", enabled=False),
                    sync=sync,
                )
            me: Any = SimpleNamespace(world=world, device=torch.device("cpu"))
            heard: Any = SimpleNamespace(
                due=lambda *_: (preemption.LEAVE if rank == 1 else preemption.GO_ON, False)
            )
            due = training.Worker._due(me, heard, 0.0, 0.0)
            return [p.detach().numpy() for p in net.parameters()], due
        finally:
            if world > 1:
                dist.destroy_process_group()

    alone, _ = ray.get(take.remote(0, 1))
    ranks = ray.get([take.remote(rank, 3) for rank in range(3)])
    for weights, due in ranks:
        assert due == preemption.LEAVE
        for a, b in zip(weights, alone):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_one_rank_probes_and_all_are_told(
    labelled: dataset.LabelledDataset, ray_local: None, tmp_path: Path, probe_task: linear_probe.Task
) -> None:
    import ray

    job = dataclasses.replace(labelled_job(str(tmp_path)), backbone=tiny_backbone(), probe=probe_task)
    feed, share = in_ray(labelled), SHARE

    @ray.remote(num_cpus=1)
    def measure(rank: int) -> tuple[bool, dict[str, Any], dict[str, Any]]:
        from datetime import timedelta

        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{job.uri}-meet",
            rank=rank,
            world_size=2,
            timeout=timedelta(seconds=120),
        )
        try:
            worker = training.Worker(job, feed, share, rank=rank, world=2, device=torch.device("cpu"))
            return worker.probe is not None, worker._measure_probe(1), worker._measure_probe(2)
        finally:
            dist.destroy_process_group()

    first, second = ray.get([measure.remote(rank) for rank in range(2)])
    assert (first[0], second[0]) == (True, False)
    assert first[1] == second[1] == {}
    assert first[2]["probe_dice"] > 0
    assert first[2].keys() == second[2].keys() == set(PROBED)
    assert first[2]["probe_dice"] == second[2]["probe_dice"]
    assert first[2]["probe_dice_per_class"] == second[2]["probe_dice_per_class"]


def test_two_ranks_share_the_validation_cases_and_measure_what_one_does(
    labelled: dataset.LabelledDataset, ray_local: None, tmp_path: Path
) -> None:
    """With batch norm, whose running statistics differ between ranks: those of rank 0 are the ones that are saved."""
    import ray

    big = DataSpec(size_vox=SIZE, num_classes=len(CLASSES))
    job = dataclasses.replace(labelled_job(str(tmp_path)), backbone=tiny_backbone(), facts=big)
    feed, share = in_ray(labelled), SHARE

    @ray.remote(num_cpus=1)
    def validate(rank: int, world: int) -> tuple[list[str], dict[str, Any], list[torch.Tensor]]:
        from datetime import timedelta

        import torch.distributed as dist

        read: list[str] = []
        real_read = prepared_scans.read_case
        torch.set_num_threads(1)
        if world > 1:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{job.uri}-meet",
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=120),
            )
        try:
            prepared_scans.read_case = lambda ref: read.append(ref.scan_id) or real_read(ref)  # type: ignore[assignment,func-returns-value]
            worker = training.Worker(job, feed, share, rank=rank, world=world, device=torch.device("cpu"))
            draw = torch.Generator().manual_seed(rank)
            for buffer in worker.method.backbone.buffers():
                if buffer.is_floating_point():
                    buffer.add_(torch.rand(buffer.shape, generator=draw))
            return read, worker._validate(1), [b.clone() for b in worker.method.backbone.buffers()]
        finally:
            prepared_scans.read_case = real_read
            if world > 1:
                dist.destroy_process_group()

    alone = ray.get(validate.remote(0, 1))
    both = ray.get([validate.remote(rank, 2) for rank in range(2)])
    assert alone[0] == ["case2", "case5", "case6"]
    assert [b[0] for b in both] == [["case2", "case6"], ["case5"]]
    assert both[0][1] == both[1][1] == alone[1]
    assert alone[1]["val_dice"] > 0
    for a, b, c in zip(alone[2], both[0][2], both[1][2]):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_validation_without_labelled_cases_is_refused_before_any_worker_starts(
    feed: Any, labelled: dataset.LabelledDataset, tmp_path: Path
) -> None:
    unlabelled = a_job(str(tmp_path), validate_every_epochs=1)
    for job, its_feed in (
        (unlabelled, data_tasks.opened(feed[0])),
        (labelled_job(str(tmp_path)), dataclasses.replace(labelled, val=())),
    ):
        with pytest.raises(UserError, match=r"train\.validate_every_epochs=0"):
            trainer.fit(job, its_feed, Resources(workers=1), SHARE)


# --------------------------------------------------------------------------------------------- the rest


def test_the_epoch_line_says_accuracy_against_its_floor() -> None:
    entry = {
        "epoch": 2, "loss": 1.5, "accuracy": 0.31, "accuracy_floor": 0.22, "effective_rank": 4.2, "lr": 1e-4,
        "samples_per_s": 3.0, "data_wait_share": 0.05, "peak_memory_mb": 900.0,
    }  # fmt: skip
    line = training.epoch_line(entry, 10)
    assert line.startswith("epoch 2/10  loss 1.5000  masked accuracy 0.310 (floor 0.220)")


def test_metrics_are_totals_over_counts_over_all_ranks() -> None:
    ranks = [
        {"accuracy": torch.tensor([1.0, 4.0]), "per": torch.tensor([[1.0, 0.0], [2.0, 0.0]])},
        {"accuracy": torch.tensor([3.0, 4.0]), "per": torch.tensor([[1.0, 0.0], [2.0, 0.0]])},
    ]
    values = training.reduce_metrics(ranks)
    assert values["accuracy"] == 0.5
    assert values["per"][0] == 0.5
    assert math.isnan(values["per"][1])


def test_crops_config_and_clusterers_config_have_the_papers_defaults() -> None:
    assert cropping.Config().size_vox == (96, 96, 96)
    assert cropping.Config().window_hu == (-1000.0, 1000.0)
    assert kmeans.Config().n == 80
    assert (kmeans.Config().k_min, kmeans.Config().k_max) == (80, 500)
    assert (kmeans.Config().iterations, kmeans.Config().fraction) == (350, 0.1)
    cfg = training.Config()
    assert (cfg.epochs, cfg.global_batch, cfg.lr, cfg.weight_decay) == (100, 16, 1e-4, 1e-5)
    assert (cfg.betas, cfg.warmup_epochs) == ((0.9, 0.999), 10)
