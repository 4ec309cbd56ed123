"""The loop: schedules, accumulation, checkpoints, and a resumed run that equals an uninterrupted one."""

from __future__ import annotations

import functools
import itertools
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import timeless, tiny_backbone

from logonet import checkpoints, clusterers, crops, data, draws, methods, store, train
from logonet.cluster import Share
from logonet.errors import UserError
from logonet.methods import Facts

SIZE = (32, 32, 32)
SIZES = (5, 7)
SHARE = Share(
    workers=1,
    use_gpu=False,
    cpus_per_worker=1,
    threads_per_worker=1,
    cpus_per_data_task=1,
    cpus_per_task=1,
    cpus=3,
)
FACTS = Facts(size_vox=SIZE, cluster_sizes=SIZES, majority_labels=(0, 0))


# ------------------------------------------------------------------------------------------- schedules


def test_learning_rate_warms_up_linearly_then_follows_a_cosine() -> None:
    cfg = train.Config(epochs=10, warmup_epochs=2, lr=1.0, min_lr=0.1)
    lrs = [train.lr_at(s, cfg, steps_per_epoch=5) for s in range(50)]
    assert lrs[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    for s in range(10, 50):
        expected = 0.1 + 0.9 * (1 + math.cos(math.pi * (s - 10) / 40)) / 2
        assert lrs[s] == pytest.approx(expected)
    assert all(a > b for a, b in itertools.pairwise(lrs[10:]))


@pytest.mark.parametrize(
    ("workers", "batch", "glob", "count"), [(1, 1, 16, 16), (16, 1, 16, 1), (2, 2, 8, 2)]
)
def test_accumulation_keeps_the_global_batch(workers: int, batch: int, glob: int, count: int) -> None:
    assert train.accumulation(train.Config(global_batch=glob, batch_size=batch), workers) == count


def test_a_global_batch_that_does_not_divide_names_those_that_do() -> None:
    with pytest.raises(UserError, match=r"train.global_batch=15 or 18"):
        train.accumulation(train.Config(global_batch=16), workers=3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("precision", "fp8"),
        ("gradient_sync", "x"),
        ("warmup_epochs", 200.0),
        ("batch_size", 0),
    ],
)
def test_settings_that_cannot_work_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        train.Config(**{field: value})


# ------------------------------------------------------------------------------------------- the order


@pytest.mark.parametrize(("samples", "glob"), [(10, 4), (3, 8), (8, 8)])
def test_an_epoch_visits_every_sample_and_only_whole_steps(samples: int, glob: int) -> None:
    order = data.Order(samples, glob, seed=1)
    for epoch in range(3):
        seen = [
            order.at(epoch * order.steps_per_epoch + s, slot)
            for s in range(order.steps_per_epoch)
            for slot in range(glob)
        ]
        assert {e for e, _ in seen} == {epoch}
        counts = np.bincount([i for _, i in seen], minlength=samples)
        assert counts.min() >= 1
        assert counts.max() - counts.min() <= 1


def test_the_order_is_a_slow_loop_over_permutations() -> None:
    order, step = data.Order(5, 2, seed=9), 0
    for epoch in range(2):
        perm = draws.epoch_order(9, epoch, 5).tolist()
        padded = (perm + perm)[:6]
        for s in range(3):
            assert [order.at(step, k)[1] for k in range(2)] == padded[2 * s : 2 * s + 2]
            step += 1


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

    monkeypatch.setattr(store, "read", refuse)
    with pytest.raises(UserError, match="the store is away"):
        checkpoints.newest(str(tmp_path), "f" * 16)


def test_another_runs_checkpoint_is_not_taken(tmp_path: Path) -> None:
    checkpoints.save_state(f"{tmp_path}/checkpoints/step-00000003", "f" * 16, a_state())
    assert checkpoints.newest(str(tmp_path), "0" * 16) is None


def test_the_writer_keeps_the_newest_and_raises_what_went_wrong(tmp_path: Path) -> None:
    writer = checkpoints.Writer(str(tmp_path), "f" * 16, keep=2)
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


# ------------------------------------------------------------------------------------------- the worker


@pytest.fixture(scope="module")
def feed(tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> Any:
    """Six crops with made-up labels, as a reference in Ray's store."""
    import ray

    folder = tmp_path_factory.mktemp("crops")
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 1, SIZE[2])
    refs: list[data.CropRef] = []
    labels = []
    for n in range(3):
        crops_RCXYZ = []
        for _ in range(2):
            noise = rng.random((1, *SIZE)) * 0.2
            crops_RCXYZ.append(((ramp * rng.uniform(0.4, 0.8) + noise) * 65535).astype(np.uint16))
            labels.append([np.floor(ramp * (k - 1)).astype(np.int16) for k in SIZES])
        blob = data._shard_bytes(f"scan{n}", np.stack(crops_RCXYZ))
        name = f"shards/scan{n}.safetensors"
        store.write(f"{folder}/{name}", blob)
        refs += data._shard_index(f"{folder}/{name}", name, len(blob))
    table = data.CropTable(str(folder), SIZE, 1, tuple(refs))
    order = data.Order(len(table), 4, seed=0)
    cfg = methods.config("masked_clusters", {"phi1": 0.2})
    return [ray.put(data.Feed(table, np.array(labels), "masked_clusters", cfg, order))]


def a_job(uri: str, **settings: Any) -> train.Job:
    cfg = train.Config(
        **{"epochs": 4, "global_batch": 4, "batch_size": 2, "lr": 1e-3, "warmup_epochs": 1, **settings}
    )
    return train.Job(uri, "a" * 16, tiny_backbone(), {"name": "masked_clusters", "phi1": 0.2}, cfg, FACTS)


def a_worker(feed: Any, job: train.Job) -> train.Worker:
    return train.Worker(job, feed, SHARE, rank=0, world=1, device=torch.device("cpu"))


class Killed(Exception):
    pass


def test_training_learns_and_logs_what_it_must(feed: Any, tmp_path: Path) -> None:
    history = a_worker(feed, a_job(str(tmp_path))).run(lambda metrics: None)
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
    feed: Any, tmp_path: Path, every: int | None, die_at_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of an epoch (2 steps each), with checkpoints at epochs' ends or at every step."""
    whole = a_worker(feed, a_job(f"{tmp_path}/whole", checkpoint_every_steps=every))
    expected = whole.run(lambda metrics: None)

    job = a_job(f"{tmp_path}/killed", checkpoint_every_steps=every)
    first = a_worker(feed, job)
    real_step = train.step

    def dying_step(*args: Any, **kwargs: Any) -> Any:
        if first.step == die_at_step:
            raise Killed
        return real_step(*args, **kwargs)

    monkeypatch.setattr(train, "step", dying_step)
    with pytest.raises(Killed):
        first.run(lambda metrics: None)
    first.writer.wait()
    monkeypatch.setattr(train, "step", real_step)

    second = a_worker(feed, job)
    history = second.run(lambda metrics: None)
    assert timeless(history) == timeless(expected)
    for (name, a), b in zip(whole.method.state_dict().items(), second.method.state_dict().values()):
        assert torch.equal(a, b), name


def test_a_finished_run_is_not_trained_again(feed: Any, tmp_path: Path) -> None:
    job = a_job(str(tmp_path))
    expected = a_worker(feed, job).run(lambda metrics: None)
    again = a_worker(feed, job)
    assert again.run(lambda metrics: pytest.fail("trained again")) == expected


def test_accumulated_micro_batches_equal_one_batch(feed: Any, tmp_path: Path) -> None:
    """Gradients of 2 x 2 samples equal those of a slow loop over the same two batches."""
    job = a_job(str(tmp_path), epochs=1, warmup_epochs=0)
    worker = a_worker(feed, job)
    batches = list(data.batches(feed, start_step=0, stop_step=1, rank=0, world=1, batch_size=2, share=SHARE))
    assert len(batches) == 2
    torch.manual_seed(draws.integer(0, "init"))
    method = train.build_method(job.backbone, job.method, FACTS).train()
    for batch in train.to_tensors(iter(batches), torch.device("cpu")):
        (method(batch, 0.0)[0] / 2).backward()
    expected = {n: p.grad.clone() for n, p in method.named_parameters() if p.requires_grad}
    seen: dict[str, torch.Tensor] = {}
    train.step(
        worker.method,
        worker.optimizer,
        train.to_tensors(iter(batches), torch.device("cpu")),
        count=2,
        progress=0.0,
        lr=1e-3,
        cfg=job.train,
        seeds=[0, 0],
        autocast=torch.autocast("cpu", enabled=False),
        sync=lambda params: seen.update({n: p.grad.clone() for n, p in zip(worker.names, params)}),
    )
    assert seen.keys() == expected.keys()
    for name, grad in expected.items():
        assert torch.equal(grad, seen[name]), name


def test_skipped_steps_are_never_read(feed: Any) -> None:
    """Resuming skips references: the stream from step 3 is the tail of the stream from step 0."""
    whole = list(data.batches(feed, start_step=0, stop_step=5, rank=0, world=1, batch_size=4, share=SHARE))
    tail = list(data.batches(feed, start_step=3, stop_step=5, rank=0, world=1, batch_size=4, share=SHARE))
    assert len(tail) == 2
    for a, b in zip(whole[3:], tail):
        for key in a:
            assert np.array_equal(a[key], b[key]), key


def test_ranks_share_a_step_whatever_their_number(feed: Any) -> None:
    one = list(data.batches(feed, start_step=0, stop_step=2, rank=0, world=1, batch_size=4, share=SHARE))
    for step in range(2):
        parts = []
        for rank in range(2):
            stream = data.batches(
                feed, start_step=0, stop_step=2, rank=rank, world=2, batch_size=2, share=SHARE
            )
            parts.append(list(stream)[step]["image"])
        assert np.array_equal(np.concatenate(parts), one[step]["image"])


def test_a_loss_that_is_not_finite_stops_with_a_sentence(feed: Any, tmp_path: Path) -> None:
    worker = a_worker(feed, a_job(str(tmp_path)))
    with torch.no_grad():
        next(p for p in worker.method.parameters() if p.requires_grad).fill_(math.nan)
    with pytest.raises(train.Diverged, match=r"norm became nan .* lower train.lr"):
        worker.run(lambda metrics: None)
    assert checkpoints.newest(str(tmp_path), "a" * 16) is None


def test_a_compiled_network_takes_the_same_steps(
    feed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the tracer with its eager backend, so that no compiler is needed."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    settings = {"epochs": 1, "warmup_epochs": 0, "lr": 1e-7}
    plain = a_worker(feed, a_job(f"{tmp_path}/plain", **settings)).run(lambda metrics: None)
    compiled = a_worker(feed, a_job(f"{tmp_path}/compiled", compile=True, **settings)).run(
        lambda metrics: None
    )
    assert compiled[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-5)


def test_the_epoch_line_says_accuracy_against_its_floor() -> None:
    entry = {
        "epoch": 2, "loss": 1.5, "accuracy": 0.31, "accuracy_floor": 0.22, "effective_rank": 4.2, "lr": 1e-4,
        "samples_per_s": 3.0, "data_wait_share": 0.05, "peak_memory_mb": 900.0,
    }  # fmt: skip
    line = train.epoch_line(entry, 10)
    assert line.startswith("epoch 2/10  loss 1.5000  masked accuracy 0.310 (floor 0.220)")


def test_metrics_are_totals_over_counts_over_all_ranks() -> None:
    ranks = [
        {"accuracy": torch.tensor([1.0, 4.0]), "per": torch.tensor([[1.0, 0.0], [2.0, 0.0]])},
        {"accuracy": torch.tensor([3.0, 4.0]), "per": torch.tensor([[1.0, 0.0], [2.0, 0.0]])},
    ]
    values = train.reduce_metrics(ranks)
    assert values["accuracy"] == 0.5
    assert values["per"][0] == 0.5
    assert math.isnan(values["per"][1])


def test_crops_config_and_clusterers_config_have_the_papers_defaults() -> None:
    assert crops.Config().size_vox == (96, 96, 96)
    assert crops.Config().window_hu == (-1000.0, 1000.0)
    assert clusterers.Config().n == 80
    assert (clusterers.Config().k_min, clusterers.Config().k_max) == (80, 500)
    assert (clusterers.Config().iterations, clusterers.Config().fraction) == (350, 0.1)
    cfg = train.Config()
    assert (cfg.epochs, cfg.global_batch, cfg.lr, cfg.weight_decay) == (100, 16, 1e-4, 1e-5)
    assert (cfg.betas, cfg.warmup_epochs) == ((0.9, 0.999), 10)
