"""What `logonet chaos` plans, compares and finds, without a cluster. ``make chaos`` does the killing."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from logonet import cli
from logonet.cli.machines import ChaosArgs
from logonet.core.errors import UserError
from logonet.storage import artifacts, object_store
from logonet.sweep import records
from tools import chaos
from tools.mlflow_server import MLflowServer


def test_the_plan_has_every_kind_and_depends_on_seed_and_stage_alone() -> None:
    kills = chaos.plan(0, "pretrain", 20)
    assert Counter(k.kind for k in kills) == Counter(
        {"worker": 6, "driver": 4, "raylet": 4, "mlflow": 2, "checkpoint": 2, "disk": 2}
    )
    assert kills == chaos.plan(0, "pretrain", 20)
    assert [k.index for k in kills] == list(range(20))
    others = (chaos.plan(1, "pretrain", 20), chaos.plan(0, "sweep", 20))
    assert all([k.kind for k in other] != [k.kind for k in kills] for other in others)
    assert 0 < sum(k.any_moment for k in chaos.plan(0, "pretrain", 200)) < 80
    for kill in kills:
        least_s, most_s = chaos.ANY_MOMENT_S if kill.any_moment else chaos.AFTER_PROGRESS_S
        assert least_s <= kill.delay_s <= most_s
        assert 0 <= kill.victim < 1


def write_run(root: str, weights: bytes = b"weights", loss: float = 0.5, unix_s: float = 1.0) -> str:
    """An artifact with weights, a history and a page, as pretraining leaves one; its folder."""
    uri = f"{root}/pretrain/0123"
    history = [{"epoch": 1, "loss": loss, "unix_s": unix_s, "peak_memory_mb": unix_s}]
    files = {
        "method.safetensors": object_store.write(f"{uri}/method.safetensors", weights),
        "history.json": object_store.write_json(f"{uri}/history.json", history),
        "report.html": object_store.write(f"{uri}/report.html", str(unix_s).encode()),
    }
    artifacts.commit(uri, "pretrain", "0123", config={}, parents={}, files=files, facts={})
    return uri


def write_prediction(root: str, label_map: bytes = b"labels", seconds: float = 1.0) -> None:
    stored = object_store.write(f"{root}/a.nii.gz", label_map)
    row = {"name": "a", "status": "done", "reason": "", "output": f"{root}/a.nii.gz", "sha256": stored.sha256}
    object_store.write_json(
        f"{root}/.cases/a/row.json", {**row, "volumes_ml": {"liver": 1.0}, "seconds": seconds}
    )


def write_sweep(root: str, wall_s: float = 1.0, **values: Any) -> None:
    uri = f"{root}/sweep/grid"
    spec = records.Spec("grid", {}, {}, "accuracy", "in", "", "random", 0, {}, {})
    if not object_store.exists(f"{uri}/{records.SPEC}"):
        records.claim(uri, spec)
    trial = records.Trial(0, {"method.phi1": 0.1}, "done", history=[{"epoch": 1, "unix_s": wall_s}])
    records.write(uri, replace(trial, pretrain=f"{root}/pretrain/0123", wall_s=wall_s, **values))


def test_the_outcome_leaves_out_times_and_folders_and_nothing_else(tmp_path: Path) -> None:
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    for root, time_s in ((a, 1.0), (b, 2.0)):
        write_run(root, unix_s=time_s)
        write_prediction(root, seconds=time_s)
        write_sweep(root, wall_s=time_s)
    found = chaos.outcome(a)
    assert sorted(found) == [
        ".cases/a/row.json",
        "pretrain/0123/history.json",
        "pretrain/0123/method.safetensors",
        "sweep/grid/trial 0",
    ]
    assert found == chaos.outcome(b)

    def changed() -> list[str]:
        now = chaos.outcome(b)
        return [name for name in found if found[name] != now[name]]

    write_run(b, weights=b"Weights")
    write_prediction(b, label_map=b"Labels")
    write_sweep(b, settings={"method.phi1": 0.2})
    assert sorted(changed()) == [n for n in sorted(found) if "history" not in n]
    write_run(b, loss=0.6)
    assert "pretrain/0123/history.json" in changed()


def test_what_is_half_written_is_found(tmp_path: Path) -> None:
    root = str(tmp_path)
    uri = write_run(root)
    write_prediction(root)
    write_sweep(root)
    assert chaos.damaged(root, set()) == []

    os.truncate(f"{uri}/method.safetensors", 3)
    os.truncate(f"{root}/a.nii.gz", 3)
    os.truncate(f"{root}/sweep/grid/trials/0000.json", 30)
    assert chaos.damaged(root, set()) == [
        f"{uri}/method.safetensors",
        f"{root}/.cases/a/row.json",
        f"{root}/sweep/grid/trials",
    ]
    torn = {uri}
    assert f"{uri}/method.safetensors" not in chaos.damaged(root, torn)
    assert torn == {uri}
    write_run(root)
    chaos.damaged(root, torn)
    assert torn == set(), "what is whole again is watched again"
    os.truncate(f"{uri}/manifest.json", 30)
    assert f"{uri}/manifest.json" in chaos.damaged(root, torn)


def test_the_newest_finished_checkpoint_is_torn(tmp_path: Path) -> None:
    root = str(tmp_path)
    assert chaos.tear(root) is None
    write_prediction(root)
    assert chaos.tear(root) == f"{root}/.cases/a"
    with pytest.raises(ValueError, match=r"delimiter|Unterminated|Expecting"):
        json.loads(Path(f"{root}/.cases/a/row.json").read_text())
    for step in (5, 10, 15):
        uri = f"{root}/pretrain/0123/checkpoints/step-{step:08d}"
        files = {"model.safetensors": object_store.write(f"{uri}/model.safetensors", b"x" * 1000)}
        os.utime(f"{uri}/model.safetensors", ns=(step, step))
        if step < 15:  # the last one is still being written
            artifacts.commit(uri, "checkpoint", "0123", config={}, parents={}, files=files, facts={})
    assert chaos.tear(root) == f"{root}/pretrain/0123/checkpoints/step-00000010"
    assert os.path.getsize(f"{root}/pretrain/0123/checkpoints/step-00000010/model.safetensors") == 900


def test_a_result_knows_whether_it_is_equal_and_survives_its_file(tmp_path: Path) -> None:
    good = chaos.Round(kills=[{"kind": "driver"}, {"kind": "disk"}], statuses=[-9, 2, 0], wall_s=70)
    result = chaos.Result("pretrain", 3, undisturbed_s=30, rounds=[good])
    row = result.row()
    assert (row["kills"], row["driver"], row["disk"], row["restarts"], row["equal"]) == (2, 1, 1, 2, True)
    assert row["lost_s"] == 40
    assert result.done < result.kills
    object_store.write_json(str(tmp_path / "pretrain.json"), asdict(result))
    assert chaos.Result.read(ChaosArgs(dir=str(tmp_path)), "pretrain") == result
    for bad in ({"differing": ["x"]}, {"unfit": ["x"]}, {"statuses": [2]}, {"statuses": []}):
        assert not replace(good, **bad).equal


# A stage of six parts that goes on where it was; "forgetful" tells how often it was started, "busy" does something
# before its first checkpoint.
TOY = """
import os, sys, time
from logonet.storage import artifacts, object_store as store
root, mode = sys.argv[1:]
uri = root + "/pretrain/0123"
starts = sum(1 for _ in store.listing(root + "/starts"))
store.write(f"{root}/starts/{starts}", b"")
if mode == "busy":
    store.write(f"{uri}/crops/{starts}", b"")
    time.sleep(0.5)
for part in range(6):
    if not store.exists(f"{uri}/checkpoints/step-{part:08d}/manifest.json"):
        time.sleep(0.1)
        at = f"{uri}/checkpoints/step-{part:08d}"
        files = {"model.safetensors": store.write(at + "/model.safetensors", b"x" * 1000)}
        artifacts.commit(at, "checkpoint", "0123", config={}, parents={}, files=files, facts={})
weights = str(starts if mode == "forgetful" else 0).encode()
if mode == "stuck":
    time.sleep(600)
if mode == "broken":
    sys.exit(2)
files = {"method.safetensors": store.write(uri + "/method.safetensors", weights)}
artifacts.commit(uri, "pretrain", "0123", config={}, parents={}, files=files, facts={})
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., chaos.Round]:
    """Runs TOY in a mode, with real processes and a real disk, and does kills of some kinds to it."""
    script = tmp_path / "toy.py"
    script.write_text(TOY)
    monkeypatch.setenv("PYTHONPATH", chaos.REPOSITORY)

    def go(mode: str, *kinds: chaos.Kind, limit_s: float = 60.0) -> chaos.Round:
        monkeypatch.setattr(
            chaos, "command", lambda stage, cfg, root, name: [sys.executable, str(script), root, mode]
        )
        ray: Any = SimpleNamespace(address="none", nodes=[None], workers=lambda: [])
        doer = chaos.Chaos(ChaosArgs(dir=str(tmp_path), limit_s=limit_s), ray, MLflowServer(str(tmp_path)))
        kills = [chaos.Kill(i, kind, False, 0.0, 0.0, 0.3) for i, kind in enumerate(kinds)]
        expected = {"pretrain/0123/method.safetensors": hashlib.sha256(b"0").hexdigest()}
        return doer.round("pretrain", kills, 0, expected)

    return go


def test_a_run_that_goes_on_is_equal_and_one_that_does_not_is_not(
    toy: Callable[..., Any], tmp_path: Path
) -> None:
    done = toy("sound", "driver", "checkpoint", "disk")
    assert done.equal
    assert [note["kind"] for note in done.kills] == ["driver", "checkpoint", "disk"]
    assert len(done.statuses) >= 3 and -9 in done.statuses
    assert done.kills[1]["what"].startswith("pretrain/0123/checkpoints/step-")
    logged = [json.loads(line) for line in (tmp_path / "kills.jsonl").read_text().splitlines()]
    assert logged == done.kills
    assert not (tmp_path / "pretrain" / "run-0").exists(), "an equal run's folder is not kept"

    done = toy("forgetful", "driver")
    assert (done.equal, done.differing) == (False, ["pretrain/0123/method.safetensors"])
    run = tmp_path / "pretrain" / "run-0"
    assert (run / "pretrain" / "0123" / "manifest.json").exists(), "one that differs is, to be looked at"
    chaos.Disk(str(run)).close()


def test_no_checkpoint_is_torn_before_there_is_one(toy: Callable[..., Any]) -> None:
    """Killed at its first write instead, a run would begin anew for ever."""
    done = toy("busy", "checkpoint")
    assert done.equal
    assert done.statuses == [-9, 0]


@pytest.mark.parametrize(("mode", "ended"), [("stuck", [chaos.HUNG]), ("broken", [2, 2, 2, 2])])
def test_a_run_that_never_ends_well_ends(
    toy: Callable[..., Any], tmp_path: Path, mode: str, ended: list[int]
) -> None:
    done = toy(mode, limit_s=1.5 if mode == "stuck" else 60.0)
    assert not done.equal
    assert done.statuses == ended
    chaos.Disk(str(tmp_path / "pretrain" / "run-0")).close()


def test_what_cannot_be_done_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="pretrain"):
        chaos.run(ChaosArgs(stages=("pretran",)))
    with pytest.raises(UserError, match="--nodes 3"):
        chaos.run(ChaosArgs(workers=4))
    object_store.write_json(str(tmp_path / "settings.json"), {"seed": 1})
    monkeypatch.setattr("sys.argv", ["logonet", "chaos", "--dir", str(tmp_path), "--seed", "2"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = chaos.Round(kills=[{"kind": "driver"}], statuses=[-9, 0], compared=3, wall_s=2.0)
    result = chaos.Result("cluster", 1, undisturbed_s=1.0, rounds=[done])
    object_store.write_json(str(tmp_path / "cluster.json"), asdict(result))
    words = ["logonet", "chaos", "--dir", str(tmp_path), "--stages", "cluster", "--kills", "1"]
    monkeypatch.setattr("sys.argv", words)
    cli.main()  # without a cluster, and without an exit status
    object_store.write_json(
        str(tmp_path / "cluster.json"), asdict(replace(result, rounds=[replace(done, differing=["x"])]))
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
