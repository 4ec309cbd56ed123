"""Learning rates, batch sizes, the order of samples."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from logonet import training
from logonet.clustering import kmeans
from logonet.core import seeding
from logonet.core.errors import UserError
from logonet.data import cropping
from logonet.training.schedule import SampleSchedule


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
    with pytest.raises(UserError, match=field):
        training.Config(**{field: value})


@pytest.mark.parametrize("patience", [3, 0])
def test_patience_without_validation_is_refused(patience: int) -> None:
    with pytest.raises(UserError, match=r"patience"):
        training.Config(patience=patience)


@pytest.mark.parametrize(("samples", "glob"), [(10, 4), (3, 8), (8, 8)])
def test_an_epoch_visits_every_sample_and_only_whole_steps(samples: int, glob: int) -> None:
    order = SampleSchedule(samples, glob, seed=1)
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
    order, step = SampleSchedule(5, 2, seed=9), 0
    for epoch in range(2):
        perm = seeding.epoch_order(9, epoch, 5).tolist()
        padded = (perm + perm)[:6]
        for s in range(3):
            assert [order.at(step, k)[1] for k in range(2)] == padded[2 * s : 2 * s + 2]
            step += 1


@pytest.mark.parametrize(("samples", "glob"), [(10, 4), (3, 8), (1, 4), (8, 8)])
def test_nothing_is_drawn_twice(samples: int, glob: int) -> None:
    """Also where a pass is filled up from its own start: other crops, other masks."""
    order = SampleSchedule(samples, glob, seed=1)
    seen = [order.at(step, slot) for step in range(3 * order.steps_per_pass) for slot in range(glob)]
    assert len(set(seen)) == len(seen)
    if samples % glob == 0:
        assert [draw for draw, _ in seen] == np.repeat(range(3), samples).tolist()


def test_an_epoch_of_a_number_of_steps_changes_no_samples() -> None:
    plain, counted = (
        SampleSchedule(5, 2, seed=3),
        SampleSchedule(5, 2, seed=3, epoch_steps=7),
    )
    assert (plain.steps_per_epoch, counted.steps_per_epoch) == (3, 7)
    places = list(itertools.product(range(20), range(2)))
    assert [plain.at(*p) for p in places] == [counted.at(*p) for p in places]


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
