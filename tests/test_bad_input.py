"""What users get wrong ends in one sentence that names it and the mend, status 2, and nothing half-written."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import HERE

from logonet import cli, pipelines, recipes
from logonet.clustering import fitting
from logonet.core import errors
from logonet.core.errors import UserError
from logonet.data import phantom
from logonet.storage import object_store

REPO = Path(__file__).parents[1]
TINY = ["--set", "clusterers.n=2", "--set", "clusterers.iterations=2", "--set", "train.epochs=1"]
TINY += ["--set", "split=null"]


def pretrain(monkeypatch: pytest.MonkeyPatch, capsys: Any, *argv: str) -> str:
    """Run jobs/pretrain.py in this process; it must fail, with one sentence, which is returned."""
    from jobs.pretrain import run

    command = ["jobs/pretrain.py", "--recipe", "demo", "--experiment", "bad", *TINY, *argv]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        cli.job("jobs/pretrain.py", "x", recipes.PRETRAINING, run, pipelines.resolve)
    assert end.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in said if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert not [line for line in said if line.startswith("Traceback")], said
    return errors[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["backbone.name=logonett"], "unknown backbone 'logonett'; did you mean 'logonet'?"),
        (["method.name=masked_cluster"], "unknown method 'masked_cluster'; did you mean 'masked_clusters'?"),
        (["backbone.dimss=[1]"], "did you mean 'backbone.dims'?"),
        (["method.phi3=0.1"], "did you mean 'method.phi"),
        (["crops.size_vox=[40, 32, 32]"], "multiple"),
        (["method.chain_length=33"], "33"),
        (["train.batch_size=1", "train.global_batch=1"], "cannot train on batches of 1 crops of 32x32x32"),
        (["train.global_batch=3"], "use --set train.global_batch=2 or 4"),
        (["train.lr=fast"], "train.lr is 'fast'"),
        (["method.phi1=1.5"], "phi1"),
        (["clusterers.k_min=50"], "k_m"),
    ],
)
def test_settings(
    settings: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    tmp_path: Path,
) -> None:
    argv = [part for s in settings for part in ("--set", s)]
    where = ["--data", f"{tmp_path}/scans", "--root", f"{tmp_path}/runs"]
    assert said in pretrain(monkeypatch, capsys, *argv, *where)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ["--recipe", "papper", "--data", "a", "--root", "b"],
            "unknown recipe 'papper'; did you mean 'paper'?",
        ),
        (["--data", "a"], "--root is missing"),
        (["--data", "a", "--root", "b", "--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--data", "/nowhere/scans", "--root", "b"], "/nowhere/scans"),
    ],
)
def test_arguments(
    argv: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: Any, ray_local: None, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in pretrain(monkeypatch, capsys, *argv)
    assert not list(tmp_path.rglob("*"))


def test_an_unreachable_store_wrong_keys_and_a_missing_bucket(
    bucket: str, ray_local: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    where = ["--data", f"{bucket}/scans/", "--root", f"{bucket}/runs"]
    missing = ["--data", "s3://no-such-bucket-here/scans/", "--root", f"{bucket}/runs"]
    assert "no-such-bucket-here" in pretrain(monkeypatch, capsys, *missing)
    with monkeypatch.context() as wrong:
        wrong.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
        said = pretrain(monkeypatch, capsys, *where)
        assert bucket in said
        assert "wrong-secret" not in said
    with monkeypatch.context() as away:
        away.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
        assert "127.0.0.1:9" in pretrain(monkeypatch, capsys, *where)


def test_only_bad_scans_are_named_with_their_reasons(
    tmp_path: Path, ray_local: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "torn.nii.gz").write_bytes(b"\x1f\x8b\x08garbage")
    (tmp_path / "scans" / "text.nii").write_bytes(b"not a scan")
    where = ["--data", f"{tmp_path}/scans", "--root", f"{tmp_path}/runs"]
    for _ in range(2):  # also where the empty manifest is already there
        assert "none of the 2 scans" in pretrain(monkeypatch, capsys, *where)
    (listed,) = (tmp_path / "runs" / "manifest").glob("*/quarantine.csv")
    assert "torn.nii.gz" in listed.read_text()
    assert "text.nii" in listed.read_text()


def test_a_shard_that_changed_is_noticed_and_named(tmp_path: Path, ray_local: None, capsys: Any) -> None:
    """One flipped bit in a stored crop must never be trained on."""
    phantom.write_dataset(f"{tmp_path}/scans", 2, size_vox=(40, 40, 40))
    cfg = cli.job_config(
        cli.JobArgs(recipe="demo", set=("clusterers.n=2", "train.epochs=1", "split=null")),
        recipes.PRETRAINING,
    )
    root = f"{tmp_path}/runs"
    up = pipelines.upstream(pipelines.resolve(cfg), f"{tmp_path}/scans", root, HERE)
    victim = sorted(Path(up.crops.uri, "shards").glob("*"))[0]
    raw = bytearray(victim.read_bytes())
    raw[-1] ^= 1
    victim.write_bytes(raw)
    damaged = [i for i, ref in enumerate(up.crops.refs) if ref.shard.endswith(victim.name)][-1]
    with pytest.raises(UserError, match=victim.name):
        up.crops.read(damaged)
    with pytest.raises(Exception, match=victim.name) as err:
        fitting.sample_slices(up.crops, max_slices=10**6, seed=0, executor=HERE)
    told = errors.user_sentence(err.value)
    assert told is not None
    assert victim.name in told
    assert "\n" not in told


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tiny file system to fill it wants root")
def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(
    tmp_path: Path, ray_local: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    phantom.write_dataset(f"{tmp_path}/scans", 2, size_vox=(40, 40, 40))
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("this sandbox may not mount a tmpfs")
    try:
        where = ["--data", f"{tmp_path}/scans", "--root", f"{disk}/runs"]
        said = pretrain(monkeypatch, capsys, *where)
        assert str(disk) in said
        assert "full" in said or "space" in said
        assert not list(disk.glob("runs/crops/*/manifest.json"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        cfg = cli.job_config(
            cli.JobArgs(recipe="demo", set=("clusterers.n=2", "split=null")), recipes.PRETRAINING
        )
        up = pipelines.upstream(pipelines.resolve(cfg), f"{tmp_path}/scans", f"{disk}/runs", HERE)
        assert [up.crops.read(i).shape for i in range(len(up.crops))] == [(1, 32, 32, 32)] * len(up.crops)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_script_ends_with_status_2_and_no_traceback(tmp_path: Path) -> None:
    """Also from another folder."""
    job = subprocess.run(
        [sys.executable, f"{REPO}/jobs/pretrain.py", "--recipe", "demo", "train.epoch=3"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert job.returncode == 2
    assert (
        job.stderr.strip()
        .splitlines()[-1]
        .startswith("error: unknown config key 'train.epoch'; did you mean")
    )
    assert "Traceback" not in job.stderr


def test_our_own_mistakes_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError), cli.sentences():
        1 / 0  # noqa: B018


def test_a_user_error_is_found_behind_rays_wrappers() -> None:
    from ray.exceptions import RayTaskError
    from ray.train import WorkerGroupError  # type: ignore[attr-defined]

    cause = UserError("crop x is damaged; restore it")
    wrapped = RayTaskError("f", "traceback text", cause).as_instanceof_cause()
    assert errors.user_sentence(wrapped) == str(cause)
    assert errors.user_sentence(WorkerGroupError("rank 1 failed", {1: wrapped})) == str(cause)
    assert errors.user_sentence(RuntimeError("ours")) is None


def test_help_and_recipes_are_readable(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs.pretrain import run

    for flag, wanted in (
        ("--help", "--data"),
        ("--list-recipes", "hippocampus"),
        ("--show-config", "chain_length"),
    ):
        monkeypatch.setattr(sys, "argv", ["jobs/pretrain.py", "--recipe", "demo", flag])
        with contextlib.suppress(SystemExit):  # tyro leaves --help this way
            cli.job("jobs/pretrain.py", "x", recipes.PRETRAINING, run, pipelines.resolve)
        assert wanted in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(recipes.PRETRAINING))
def test_every_recipe_resolves_and_says_what_it_is_for(name: str) -> None:
    pipelines.resolve(recipes.PRETRAINING[name]())
    assert len((recipes.PRETRAINING[name].__doc__ or "").split()) > 20


def test_nothing_is_written_before_a_config_is_checked(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        cli.job_config(cli.JobArgs(recipe="demo", set=("nothing=1",)), recipes.PRETRAINING)
    assert object_store.stat(str(tmp_path / "runs")) is None
