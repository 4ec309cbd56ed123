"""Checkpoints: bit for bit, torn ones, pruning, the best weights."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from logonet.core.errors import UserError
from logonet.storage import object_store
from logonet.training import checkpoints


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
    assert len(a.partial) == len(b.partial)
    for ours, theirs in zip((a.model, a.optimizer, *a.partial), (b.model, b.optimizer, *b.partial)):
        assert ours.keys() == theirs.keys()
        for name, t in ours.items():
            assert torch.equal(t, theirs[name]), name
            assert t.dtype == theirs[name].dtype


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    checkpoints.save_state(f"{tmp_path}/checkpoints/step-00000003", "f" * 16, a_state())
    found = checkpoints.newest(str(tmp_path), "f" * 16)
    assert found is not None
    assert_same(found, a_state())


def test_a_blank_copy_has_the_same_shapes() -> None:
    described = pickle.loads(pickle.dumps(a_state().mapped(lambda t: t.to("meta"))))
    blank = described.mapped(lambda t: torch.empty_like(t, device="cpu"))
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
