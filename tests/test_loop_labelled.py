"""The loop on labelled scans: validation, the best weights, patience, initial weights."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import timeless
from loops import (
    LABELLED_SIZE,
    Killed,
    LocalLoop,
    killed_at,
    labelled_dataset,
    labelled_job,
    other_weights,
    steps_saved,
)

from logonet import methods, training
from logonet.core.errors import UserError
from logonet.data import prepared_scans
from logonet.inference import metrics, sliding_window
from logonet.storage import object_store
from logonet.training import checkpoints
from logonet.training.dataset import LabelledDataset
from logonet.training.local import local_batches
from logonet.training.loop import Loop
from logonet.training.schedule import MicroBatches, SampleSchedule


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> LabelledDataset:
    return labelled_dataset(tmp_path_factory.mktemp("cases"))


def scripted(monkeypatch: pytest.MonkeyPatch, dice: Sequence[float]) -> None:
    """Validation that answers ``dice`` of the epoch, when one is due."""

    def validate(loop: Loop, epoch: int) -> dict[str, Any]:
        due = epoch % loop.cfg.validate_every_epochs == 0 or epoch == loop.cfg.epochs
        return {"val_dice": dice[epoch - 1], "val_dice_per_class": [dice[epoch - 1]] * 2} if due else {}

    monkeypatch.setattr(Loop, "_validate", validate)


def test_a_batch_holds_every_crop_of_its_cases_whatever_the_number_of_ranks(
    labelled: LabelledDataset,
) -> None:
    def stream(rank: int, world: int, batch_size: int) -> list[dict[str, np.ndarray]]:
        positions = MicroBatches(labelled.schedule, batch_size, 0, 3, rank, world)
        return list(local_batches(labelled, positions))

    one = stream(rank=0, world=1, batch_size=2)
    assert [b["image"].shape for b in one] == [(4, 1, *LABELLED_SIZE)] * 3
    for step, batch in enumerate(one):
        want = labelled.rows([labelled.schedule.at(step, slot) for slot in range(2)])
        for key in ("image", "labels"):
            assert np.array_equal(batch[key], np.stack([row[key] for row in want]))
    ranks = [stream(rank=rank, world=2, batch_size=1) for rank in range(2)]
    for step, batch in enumerate(one):
        both = np.concatenate([ranks[0][step]["image"], ranks[1][step]["image"]])
        assert np.array_equal(both, batch["image"])


def test_a_case_that_comes_again_gives_other_crops(labelled: LabelledDataset) -> None:
    """One-shot finetuning with a global batch of 4: four times two different crops of the one case."""
    feed = dataclasses.replace(labelled, train=(3,), schedule=SampleSchedule(1, 4, seed=0))
    rows = feed.rows([feed.schedule.at(0, slot) for slot in range(4)])
    assert len({row["image"].tobytes() for row in rows}) == 8


def test_finetuning_learns_and_validates_when_due(labelled: LabelledDataset, tmp_path: Path) -> None:
    job = labelled_job(str(tmp_path), epochs=5, validate_every_epochs=2)
    loop = LocalLoop(labelled, job)
    history = loop.train()
    assert history[-1]["loss"] < 0.9 * history[0]["loss"]
    assert [e["epoch"] for e in history if "val_dice" in e] == [2, 4, 5]
    for entry in history:
        assert 0 <= entry["train_dice"] <= 1
        assert len(entry["train_dice_per_class"]) == 2
    # The last entry against the network as it is now, the slow way.
    net = loop.method.backbone.eval()
    dice_VK = []
    for place in labelled.val:
        image_CXYZ, truth_XYZ = prepared_scans.read_case(labelled.table.refs[place])
        found_XYZ = sliding_window.labels(
            net, image_CXYZ.astype(np.float32) / 65535, LABELLED_SIZE, sliding_window.Config(), "cpu"
        )
        dice_VK.append([metrics.score(found_XYZ == k, truth_XYZ == k, (1, 1, 1))["dice"] for k in (1, 2)])
    assert history[-1]["val_dice_per_class"] == pytest.approx(np.mean(dice_VK, 0).tolist(), rel=1e-12)
    assert history[-1]["val_dice"] == pytest.approx(float(np.mean(dice_VK)), rel=1e-12)
    assert loop.method.training
    assert "validation Dice" in training.epoch_line(history[-1], 5)
    assert "validation Dice" not in training.epoch_line(history[0], 5)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_validation_computes_in_the_precision_of_training(
    labelled: LabelledDataset, tmp_path: Path, precision: str, dtype: torch.dtype
) -> None:
    loop = LocalLoop(labelled, labelled_job(str(tmp_path), precision=precision))
    first = next(m for m in loop.method.backbone.modules() if isinstance(m, torch.nn.Conv3d))
    seen = set()
    first.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    loop._validate(1)
    assert seen == {dtype}


def test_without_validation_nothing_is_read_and_no_best_is_kept(
    labelled: LabelledDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared_scans, "read_case", lambda ref: pytest.fail("a validation case was read"))
    loop = LocalLoop(labelled, labelled_job(str(tmp_path), epochs=1, validate_every_epochs=0))
    history = loop.train()
    assert "val_dice" not in history[0]
    assert "best.safetensors" not in checkpoints.save_final(
        str(tmp_path), loop.method, loop.network, history, training.best_step(history)
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
    labelled: LabelledDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([[0.5, math.nan], [0.3, math.nan], [math.nan, math.nan]])
    monkeypatch.setattr("logonet.training.loop.case_dice", lambda *args: next(answers))
    values = LocalLoop(labelled, labelled_job(str(tmp_path)))._validate(1)
    assert values["val_dice"] == pytest.approx(0.4)
    assert values["val_dice_per_class"][0] == pytest.approx(0.4)
    assert math.isnan(values["val_dice_per_class"][1])


def test_a_network_whose_answer_is_no_number_stops_with_a_sentence(
    labelled: LabelledDataset, tmp_path: Path
) -> None:
    loop = LocalLoop(labelled, labelled_job(str(tmp_path)))
    with torch.no_grad():
        next(loop.method.backbone.parameters()).fill_(math.nan)
    with pytest.raises(training.Diverged, match=r"validation failed .* lower train\.lr"):
        loop._validate(1)


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
    labelled: LabelledDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dice: list[float], step: int
) -> None:
    """And they outlive the checkpoints of their time."""
    scripted(monkeypatch, dice)
    loop = LocalLoop(labelled, labelled_job(str(tmp_path), epochs=6, keep_checkpoints=1))
    after: dict[int, dict[str, torch.Tensor]] = {}

    def remember(metrics: dict[str, Any]) -> None:
        after[metrics["step"]] = {n: t.clone() for n, t in loop.method.backbone.state_dict().items()}

    history = loop.train(remember)
    assert training.best_step(history) == step
    assert [os.path.basename(u) for u in checkpoints.all_of(str(tmp_path))] == ["step-00000012"]
    files = checkpoints.save_final(
        str(tmp_path), loop.method, loop.network, history, training.best_step(history)
    )
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


def test_a_teacher_is_validated_and_kept_where_the_method_says_so(
    labelled: LabelledDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"unit_vox": 4, "export": "teacher", "momentum_start": 0.5}
    asks = dataclasses.replace(
        labelled, method="medcontext", method_config=methods.config("medcontext", options)
    )
    job = labelled_job(str(tmp_path), epochs=1)
    loop = LocalLoop(asks, dataclasses.replace(job, method={"name": "medcontext", **options}))
    seen: list[Any] = []
    real = sliding_window.labels
    monkeypatch.setattr(
        sliding_window, "labels", lambda net, *args, **kw: seen.append(net) or real(net, *args, **kw)
    )
    history = loop.train()
    teacher, student = loop.method.teacher.state_dict(), loop.method.backbone.state_dict()
    assert seen
    assert all(net is loop.method.teacher for net in seen)
    files = checkpoints.save_final(
        str(tmp_path), loop.method, loop.network, history, training.best_step(history)
    )
    for file in ("best.safetensors", "backbone.safetensors"):
        kept = training.load_weights(training.Init(f"{tmp_path}/{file}", files[file].sha256))
        assert all(torch.equal(kept[name], teacher[name]) for name in teacher)
    assert any(not torch.equal(student[name], teacher[name]) for name in teacher)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_run_killed_after_a_new_best_can_go_back_to_the_old_one(
    labelled: LabelledDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    """The checkpoint that names the new best was never written, and on other hardware it is no best any more."""
    job = labelled_job(str(tmp_path), keep_checkpoints=keep)
    first = LocalLoop(labelled, job)
    scripted(monkeypatch, [0.1, 0.2, 0.3, 0.4])
    save = first.writer.save

    def dying_save(state: checkpoints.State) -> None:
        if state.step == 6:
            raise Killed
        save(state)

    monkeypatch.setattr(first.writer, "save", dying_save)
    with pytest.raises(Killed):
        first.train()
    first.writer.wait()
    scripted(monkeypatch, [0.1, 0.2, 0.15, 0.12])
    second = LocalLoop(labelled, job)
    history = second.train()
    assert training.best_step(history) == 4
    assert "best.safetensors" in checkpoints.save_final(
        str(tmp_path), second.method, second.network, history, 4
    )


def test_a_best_has_a_checkpoint_at_once_however_young_the_last_one_is(
    labelled: LabelledDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the bests before the next checkpoint would push out the one that the last checkpoint names."""
    scripted(monkeypatch, [0.1, 0.6, 0.5, 0.4, 0.7, 0.8, 0.7, 0.6])
    settings: dict[str, Any] = {"epochs": 8, "checkpoint_every_s": 1e6, "keep_checkpoints": 1}
    whole = LocalLoop(labelled, labelled_job(f"{tmp_path}/whole", **settings))
    expected = whole.train()
    assert (steps_saved(whole.job), training.best_step(expected)) == ([16], 12)
    job = labelled_job(f"{tmp_path}/killed", **settings)
    for at_step, saved in ((9, 4), (11, 10), (15, 12)):
        killed_at(monkeypatch, LocalLoop(labelled, job), at_step)
        assert steps_saved(job) == [saved]
    again = LocalLoop(labelled, job)
    assert timeless(again.train()) == timeless(expected)
    best = checkpoints.save_final(job.uri, again.method, again.network, again.history, 12)["best.safetensors"]
    assert (
        best
        == checkpoints.save_final(whole.job.uri, whole.method, whole.network, expected, 12)[
            "best.safetensors"
        ]
    )


@pytest.mark.parametrize(
    ("every", "patience", "dice", "epochs"),
    [
        pytest.param(1, 3, [0.2, 0.5, 0.4, 0.45, 0.5, 0.9, 0.9, 0.9], 5, marks=pytest.mark.slow),
        (1, 1, [0.5, 0.4, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9], 2),
        (2, 2, [0.0, 0.5, 0.0, 0.4, 0.0, 0.3, 0.0, 0.9], 6),
        (3, 1, [0.0, 0.0, 0.5, 0.0, 0.0, 0.6, 0.0, 0.1], 8),  # validated at the end too
        pytest.param(1, 4, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], 8, marks=pytest.mark.slow),
    ],
)
def test_patience_ends_a_run_and_a_resumed_one_at_the_same_epoch(
    labelled: LabelledDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    every: int,
    patience: int,
    dice: list[float],
    epochs: int,
) -> None:
    scripted(monkeypatch, dice)
    settings: dict[str, Any] = {"epochs": 8, "validate_every_epochs": every, "patience": patience}
    whole = LocalLoop(labelled, labelled_job(f"{tmp_path}/whole", **settings))
    expected = whole.train()
    assert len(expected) == epochs
    again = LocalLoop(labelled, labelled_job(f"{tmp_path}/whole", **settings))
    assert again.train(lambda metrics: pytest.fail("trained on")) == expected
    job = labelled_job(f"{tmp_path}/killed", **settings)
    killed_at(monkeypatch, LocalLoop(labelled, job), at_step=2 * epochs - 1)
    assert timeless(LocalLoop(labelled, job).train()) == timeless(expected)


@pytest.mark.parametrize("every", [None, 1])
def test_a_killed_finetuning_equals_an_uninterrupted_one_with_its_best(
    labelled: LabelledDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int | None
) -> None:
    def finished(loop: Loop, job: training.Job) -> tuple[list[dict[str, Any]], dict[str, str]]:
        history = loop.train()
        files = checkpoints.save_final(
            job.uri, loop.method, loop.network, history, training.best_step(history)
        )
        return timeless(history), {n: f.sha256 for n, f in files.items() if n != "history.json"}

    job = labelled_job(f"{tmp_path}/whole", checkpoint_every_steps=every)
    expected = finished(LocalLoop(labelled, job), job)
    assert set(expected[1]) == {"best.safetensors", "backbone.safetensors", "method.safetensors"}
    job = labelled_job(f"{tmp_path}/killed", checkpoint_every_steps=every)
    for at_step in (3, 6):  # twice: within an epoch and at the end of one
        killed_at(monkeypatch, LocalLoop(labelled, job), at_step)
    assert finished(LocalLoop(labelled, job), job) == expected


def test_an_epoch_of_a_number_of_steps(labelled: LabelledDataset, tmp_path: Path) -> None:
    """Passes are of 2 steps; epochs of 3 end, validate and save in the middle of one."""
    counted = dataclasses.replace(labelled, schedule=SampleSchedule(4, 2, seed=0, epoch_steps=3))
    job = labelled_job(f"{tmp_path}/counted", epochs=2, steps_per_epoch=3)
    loop = LocalLoop(counted, job)
    history = loop.train()
    assert [(e["epoch"], e["step"]) for e in history] == [(1, 3), (2, 6)]
    assert [os.path.basename(u) for u in checkpoints.all_of(job.uri)] == ["step-00000003", "step-00000006"]
    assert all("val_dice" in e for e in history)
    # The same samples in the same order as in three passes: with one learning rate, the same weights.
    flat: dict[str, Any] = {"warmup_epochs": 0, "min_lr": 3e-3, "validate_every_epochs": 0}
    a = LocalLoop(counted, labelled_job(f"{tmp_path}/a", epochs=2, steps_per_epoch=3, **flat))
    b = LocalLoop(labelled, labelled_job(f"{tmp_path}/b", epochs=3, **flat))
    assert (a.train()[-1]["step"], b.train()[-1]["step"]) == (6, 6)
    for (name, one), other in zip(a.method.state_dict().items(), b.method.state_dict().values()):
        assert torch.equal(one, other), name


# ---------------------------------------------------------------------------------------- initial weights


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> training.Init:
    return other_weights(str(tmp_path_factory.mktemp("weights")))


def test_initial_weights_are_loaded_at_step_0_and_not_on_resuming(
    labelled: LabelledDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretrained: training.Init
) -> None:
    job = labelled_job(str(tmp_path), init=pretrained)
    loop = LocalLoop(labelled, job)
    fresh = {n: t.clone() for n, t in loop.method.backbone.state_dict().items()}
    loop.restore()
    weights, now = training.load_weights(pretrained), loop.method.backbone.state_dict()
    prefixes = loop.method.backbone.head_prefixes
    heads = [n for n in now if n.startswith(prefixes)]
    assert 0 < len(heads) < len(now)
    for name, tensor in now.items():
        assert torch.equal(tensor, fresh[name] if name in heads else weights[name]), name
    killed_at(monkeypatch, LocalLoop(labelled, job), at_step=3)
    monkeypatch.setattr(
        "logonet.training.building.load_weights", lambda init: pytest.fail("initial weights on a resumed run")
    )
    resumed = LocalLoop(labelled, job)
    resumed.restore()
    assert resumed.step == 2
    kept = checkpoints.newest(str(tmp_path), job.fingerprint)
    assert kept is not None
    for name, tensor in resumed.method.state_dict().items():
        assert torch.equal(tensor, kept.model[name]), name


def test_a_run_that_died_before_its_first_checkpoint_starts_from_the_weights_again(
    labelled: LabelledDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretrained: training.Init
) -> None:
    job = labelled_job(f"{tmp_path}/whole", init=pretrained, epochs=1)
    expected = LocalLoop(labelled, job).train()
    scratch = LocalLoop(labelled, labelled_job(f"{tmp_path}/scratch", epochs=1)).train()
    assert expected[0]["loss"] != scratch[0]["loss"]
    job = labelled_job(f"{tmp_path}/killed", init=pretrained, epochs=1)
    killed_at(monkeypatch, LocalLoop(labelled, job), at_step=1)
    assert timeless(LocalLoop(labelled, job).train()) == timeless(expected)


def test_weights_that_are_not_the_ones_meant_are_refused(
    labelled: LabelledDataset, tmp_path: Path, pretrained: training.Init
) -> None:
    other = dataclasses.replace(pretrained, sha256="0" * 64)
    with pytest.raises(
        object_store.IntegrityError, match=r"backbone\.safetensors: its SHA-256 is not the recorded"
    ):
        LocalLoop(labelled, labelled_job(str(tmp_path), init=other)).train()
    assert not checkpoints.all_of(str(tmp_path))
    text = f"{tmp_path}/notes.safetensors"
    noted = object_store.write(text, b"no weights at all, but more than eight bytes")
    with pytest.raises(UserError, match=r"notes\.safetensors is no safetensors file .* saved by logonet"):
        training.load_weights(training.Init(text, noted.sha256))
