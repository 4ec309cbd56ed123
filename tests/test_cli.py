"""The `logonet` command, run as its user runs it."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from jobs import finetune, pretrain
from logonet import cli, methods, networks, pipelines, recipes
from logonet.cli import machines
from logonet.core import config
from logonet.core.config import OMIT_DEFAULT
from logonet.data import phantom, splits, volume
from logonet.inference import metrics
from logonet.training import linear_probe


def logonet(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    try:
        cli.main(list(argv))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def plain(said: str) -> str:
    """``said`` without the boxes that help is drawn in, in one line."""
    return " ".join(re.sub("[\u2500-\u257f]", " ", said).split())


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert logonet(monkeypatch, *command.split(), "--help") == 0
    said = capsys.readouterr().out
    assert f"logonet {command}" in said
    assert not re.search(r"\] STR|\{STR", said), "an argument without a name"


@pytest.mark.parametrize("group", ["", "data", "clusters", "s3"])
def test_help_lists_the_commands_of_a_group_with_one_line(
    group: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert logonet(monkeypatch, *group.split(), "--help") == 0
    said = plain(capsys.readouterr().out)
    for words, function in cli.COMMANDS.items():
        above, _, name = words.rpartition(" ")
        first, *rest = (function.__doc__ or "").split("\n\n")
        assert "\n" not in first, words
        assert len(first) <= 120, words
        assert (f"{name} {first}" in said) == (above == group), words
        assert all(part.strip().startswith("Args:") for part in rest), words


@pytest.mark.parametrize("argv", [[], ["data"], ["data", "chekc"], ["compare", "a.csv"], ["nothing"]])
def test_half_a_command_is_refused(argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert logonet(monkeypatch, *argv) == 2
    assert "logonet" in capsys.readouterr().err


def test_phantoms_then_data_import(
    tmp_path: Path, ray_local: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert logonet(monkeypatch, "phantoms", f"{tmp_path}/scans", "--n", "2", "--size", "32") == 0
    assert logonet(monkeypatch, "data", "import", f"{tmp_path}/scans", "--root", f"{tmp_path}/runs") == 0
    assert "2 scans" in capsys.readouterr().out
    assert len(list(tmp_path.glob("runs/manifest/*/manifest.json"))) == 1


def test_importing_real_scans_and_a_dicom_series(
    shared_data: Path, tmp_path: Path, ray_local: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    scans = f"{shared_data}/scans"
    assert logonet(monkeypatch, "data", "import", scans, "--root", f"{tmp_path}/runs") == 0
    assert "6 scans, 3 CT, 3 MR" in capsys.readouterr().out
    assert logonet(monkeypatch, "data", "import", f"{scans}/ct_dicom", "--root", f"{tmp_path}/runs") == 0
    assert "1 scans" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ data check


def spoil(folder: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Write a label map of ``folder`` anew, changed."""
    path = folder / "labelsTr" / name
    label = volume.decode_nifti(path.read_bytes(), name, allow_constant=True)
    path.write_bytes(volume.encode_nifti(change(label.array_CXYZ[0]), label.affine))


def test_data_check_passes_good_data(
    tmp_path: Path, ray_local: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    phantom.write_dataset(str(tmp_path), 3, size_vox=(24, 24, 24))
    assert logonet(monkeypatch, "data", "check", str(tmp_path)) == 0
    assert capsys.readouterr().out == "3 of 3 cases are fine\n\n3 of 3 cases are labelled\n"


def test_data_check_prints_every_offender(
    tmp_path: Path, ray_local: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    phantom.write_dataset(str(tmp_path), 7, size_vox=(24, 24, 24), orientations=["RAS"])
    names = [f"phantom_{i:03d}.nii.gz" for i in range(7)]
    images = tmp_path / "imagesTr"
    (images / names[0]).write_bytes((images / names[0]).read_bytes()[:200])
    spoil(tmp_path, names[1], lambda labels_XYZ: np.where(labels_XYZ == 1, 9, labels_XYZ).astype(np.uint8))
    spoil(tmp_path, names[2], np.zeros_like)
    spoil(tmp_path, names[3], lambda labels_XYZ: np.ascontiguousarray(labels_XYZ[1:]))
    (images / names[5]).write_bytes((images / names[4]).read_bytes())
    assert logonet(monkeypatch, "data", "check", str(tmp_path)) == 1
    said = capsys.readouterr().out
    assert "2 of 7 cases are fine, 5 with errors" in said
    for name, check in (
        (names[0], "opens"),
        (names[1], "label set"),
        (names[2], "label empty"),
        (names[3], "label shape"),
        (names[5], "duplicate"),
    ):
        assert re.search(rf"{name}.*{check}.*error", said), name
    assert not re.search(rf"imagesTr/{names[6]}.*error", said)


def test_data_check_of_warnings_alone_is_no_failure(
    tmp_path: Path, ray_local: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    phantom.write_dataset(str(tmp_path), 1, size_vox=(24, 24, 24), spacing_mm=(1.0, 1.0, 4.0))
    assert logonet(monkeypatch, "data", "check", str(tmp_path)) == 0
    assert "anisotropy" in capsys.readouterr().out


def test_data_check_of_nothing_is_one_sentence(
    tmp_path: Path, ray_local: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert logonet(monkeypatch, "data", "check", f"{tmp_path}/nowhere") == 2
    assert one_error(capsys).startswith(f"error: {tmp_path}/nowhere")


def one_error(capsys: Any) -> str:
    """The one line that was said on stderr."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


# -------------------------------------------------------------------------------------- data leakcheck


def imported(monkeypatch: pytest.MonkeyPatch, capsys: Any, scans: str, root: str) -> str:
    assert logonet(monkeypatch, "data", "import", scans, "--root", root) == 0
    return capsys.readouterr().out.strip().splitlines()[-1]


def test_data_leakcheck_between_manifests(
    tmp_path: Path, ray_local: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    root = f"{tmp_path}/runs"
    rng = np.random.default_rng(0)
    for name in ("test", "train", "clean"):  # noise: unlike phantoms, no two are alike
        (tmp_path / name).mkdir()
        for i in range(2):
            array_XYZ = rng.integers(0, 900, (16, 16, 16)).astype(np.int16)
            (tmp_path / name / f"{name}_{i}.nii.gz").write_bytes(volume.encode_nifti(array_XYZ, np.eye(4)))
    shutil.copy(tmp_path / "test/test_1.nii.gz", tmp_path / "train/train_0.nii.gz")
    test, train, clean = (
        imported(monkeypatch, capsys, f"{tmp_path}/{name}", root) for name in ("test", "train", "clean")
    )
    assert logonet(monkeypatch, "data", "leakcheck", test, clean) == 0
    assert capsys.readouterr().out.startswith("no leaks found")
    assert logonet(monkeypatch, "data", "leakcheck", test) == 0  # no duplicates in it
    capsys.readouterr()
    assert logonet(monkeypatch, "data", "leakcheck", test, clean, train, "--out", f"{tmp_path}/l.csv") == 1
    said = capsys.readouterr().out
    assert "same bytes" in said
    rows = pd.read_csv(tmp_path / "l.csv")
    assert rows["kind"].tolist() == ["file"]
    assert rows["scan_id"][0].startswith("test_1-")
    assert rows["other_id"][0].startswith("train_0-")
    assert rows["scan_id"][0] in said
    assert logonet(monkeypatch, "data", "leakcheck") == 2
    assert "data import" in one_error(capsys)


# ---------------------------------------------------------------------------------------------- compare


def scores(path: Path, flips: int, cases: int = 8) -> str:
    """A cases.csv of predictions that miss ``flips`` of the 64 voxels of their organ."""
    rows = []
    for i in range(cases):
        truth_XYZ = np.zeros((8, 8, 8), np.uint8)
        truth_XYZ[2:6, 2:6, 2:6] = 1
        pred_XYZ = truth_XYZ.copy()
        hit = np.flatnonzero(truth_XYZ)
        pred_XYZ.flat[np.random.default_rng(i).permutation(hit)[: flips + i]] = 0
        rows += metrics.case_rows(pred_XYZ, truth_XYZ, (1.0, 1.0, 1.0), {"liver": (1,)}, f"case{i}")
    path.write_bytes(pd.DataFrame(rows).to_csv(index=False).encode())
    return str(path)


def test_compare_two_tables_of_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    worse, better = scores(tmp_path / "a.csv", 20), scores(tmp_path / "b.csv", 2)
    assert logonet(monkeypatch, "compare", worse, better, "--out", f"{tmp_path}/out") == 0
    said = capsys.readouterr().out
    assert "liver" in said
    assert said.strip().splitlines()[-1] == f"{tmp_path}/out/compare.csv"
    table = pd.read_csv(tmp_path / "out" / "compare.csv")
    dice = table[(table["class"] == "liver") & (table["metric"] == "dice")].iloc[0]
    assert dice["a"] < dice["b"]
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_compare_on_other_cases_wants_to_be_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    a, b = scores(tmp_path / "a.csv", 5), scores(tmp_path / "b.csv", 2, cases=6)
    assert logonet(monkeypatch, "compare", a, b) == 2
    assert "case6" in one_error(capsys)
    assert logonet(monkeypatch, "compare", a, b, "--common") == 0
    assert "liver" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        ["compare", "{}", "{}"],
        ["compare", "{}/cases.csv", "{}/cases.csv"],
        ["register", "{}"],
        ["export", "{}", "--out", "{}/bundle"],
        ["data", "leakcheck", "{}"],
        ["clusters", "report", "{}", "--out", "{}/report"],
    ],
)
def test_an_artifact_that_is_not_there_is_one_sentence(
    argv: list[str], tmp_path: Path, ray_local: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    nowhere = f"{tmp_path}/runs/finetune/0123456789abcdef"
    assert logonet(monkeypatch, *(part.format(nowhere) for part in argv)) == 2
    assert nowhere in one_error(capsys)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------- settings of jobs


def test_settings_may_stand_anywhere_and_a_bare_name_chooses_a_part(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    argv = ["train.epochs=3", "--recipe", "demo", "method=simclr", "--set", "train.seed=1", "--show-config"]
    assert pretrain_job(monkeypatch, *argv, "backbone=unet", "train.seed=2") == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["method"]["name"] == "simclr"
    assert shown["method"]["temperature"] == 0.5
    assert shown["backbone"]["name"] == "unet"
    assert (shown["train"]["epochs"], shown["train"]["seed"]) == (3, 2)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], f"--recipe is missing; choose one of {', '.join(recipes.PRETRAINING)}"),
        (["--recipe", "demo", "simclr"], "'simclr' is not of the form section.key=value"),
        (["--recipe", "demo", "--dta", "x"], "unknown option '--dta'"),
        (["--recipe", "demo", "train=fast"], "'train' must be a mapping"),
        (["--recipe", "demo", "method=simcrl"], "unknown method 'simcrl'; did you mean 'simclr'?"),
    ],
)
def test_what_a_job_cannot_read_is_one_sentence(
    argv: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert pretrain_job(monkeypatch, *argv, "--show-config") == 2
    assert said in one_error(capsys)


def shown_keys(text: str) -> dict[str, str]:
    """key -> value of what --help lists."""
    return dict(re.findall(r"^  ([\w.]+)=(.*?)  \(", text, re.MULTILINE))


def flat(values: Any, path: str = "") -> set[str]:
    if not isinstance(values, dict) or not values:
        return {path}
    return {key for name, value in values.items() for key in flat(value, f"{path}.{name}".lstrip("."))}


def test_help_lists_every_key_with_its_value_type_and_meaning(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert pretrain_job(monkeypatch, "--help", "--recipe", "demo", "method=mae3d", "train.lr=0.5") == 0
    said = capsys.readouterr().out
    listed = shown_keys(said)
    assert listed["train.lr"] == "0.5"
    assert listed["crops.size_vox"] == "[32, 32, 32]"
    assert "--workers" in said
    assert re.search(r"^  train.lr=0.5  \(number, above 0\)\n      peak learning rate", said, re.MULTILINE)
    cfg = recipes.PRETRAINING["demo"]()
    whole = config.to_dict(replace(cfg, probe=linear_probe.Config(), split=splits.Config()))
    whole["method"] = config.to_dict(methods.config("mae3d"))
    whole["backbone"] = config.to_dict(networks.config("logonet"))
    # What leaves keys that came later at their defaults is stored as before they came.
    sections = {name: getattr(cfg, name) for name in ("data", "crops", "clusterers", "train")}
    sections |= {"split": splits.Config(), "backbone": networks.config("logonet")}
    sections |= {"method": methods.config("mae3d"), "probe": linear_probe.Config()}
    later = {
        f"{name}.{field.name}"
        for name, section in sections.items()
        for field in fields(section)
        if OMIT_DEFAULT.items() <= field.metadata.items()
    }
    assert later < listed.keys()
    assert listed.keys() - later == flat(whole)


def test_help_without_a_recipe_shows_the_defaults(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert finetune_job(monkeypatch, "-h") == 0
    said = capsys.readouterr().out
    assert shown_keys(said)["train.epochs"] == "5000"
    assert "that of init.weights" in said


# -------------------------------------------------------------------------------------- jobs/finetune.py


def pretrain_job(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", ["jobs/pretrain.py", *argv])
    try:
        cli.job("jobs/pretrain.py", "x", recipes.PRETRAINING, pretrain.run, pipelines.resolve)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def finetune_job(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", ["jobs/finetune.py", *argv])
    try:
        cli.job(
            "jobs/finetune.py",
            finetune.__doc__ or "",
            recipes.FINETUNING,
            finetune.run,
            pipelines.resolve_finetuning,
            finetune.Args,
            configure=finetune.configure,
        )
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize("name", sorted(recipes.FINETUNING))
def test_every_finetuning_recipe_resolves_and_says_what_it_is_for(name: str) -> None:
    pipelines.resolve_finetuning(recipes.FINETUNING[name]())
    assert len((recipes.FINETUNING[name].__doc__ or "").split()) > 15


def test_finetuning_takes_the_recipes_of_pretraining_by_name() -> None:
    """``--recipe small`` for both jobs, and the second can take the first's network."""
    for name in ("paper", *recipes.general.FINETUNING):
        make = recipes.FINETUNING[name]
        own, other = (
            recipe().backbone.resolve(networks.config, "backbone")
            for recipe in (make, recipes.PRETRAINING[name])
        )
        assert own == other, name


def test_finetunings_recipes_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert finetune_job(monkeypatch, "--list-recipes") == 0
    said = capsys.readouterr().out
    for name, make in recipes.FINETUNING.items():
        assert f"{name}\n    {' '.join((make.__doc__ or '').split())}\n" in said


@pytest.mark.parametrize("name", ["demo", "hippocampus_logonet"])
def test_a_shown_config_is_whole_and_can_be_given_back(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert finetune_job(monkeypatch, "--recipe", name, "--show-config") == 0
    shown = capsys.readouterr().out
    want = config.to_dict(pipelines.resolve_finetuning(recipes.FINETUNING[name]()))
    assert yaml.safe_load(shown) == want
    about = " ".join(line[2:] for line in shown.splitlines() if line.startswith("# "))
    assert about == " ".join((recipes.FINETUNING[name].__doc__ or "").split())
    assert want["backbone"]["name"] == "logonet"
    (tmp_path / "own.yaml").write_text(shown)
    again = ["--recipe", name, "--config", f"{tmp_path}/own.yaml"]
    assert finetune_job(monkeypatch, *again, "--show-config") == 0
    assert capsys.readouterr().out == shown


def test_init_is_short_for_the_weights(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    weights = ["--set", "init.weights=s3://a/pretrain/1", "--set", "init.parts=encoder"]
    for argv, want in (
        ([], ""),
        (weights, "s3://a/pretrain/1"),
        ([*weights, "--init", "models:/logonet-encoder@champion"], "models:/logonet-encoder@champion"),
    ):
        assert finetune_job(monkeypatch, "--recipe", "demo", *argv, "--show-config") == 0
        init = yaml.safe_load(capsys.readouterr().out)["init"]
        assert init["weights"] == want
        assert init["parts"] == ("encoder" if argv else "all")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--recipe", "papper"], "unknown recipe 'papper'; did you mean 'paper'?"),
        (["--recipe", "demo", "--set", "method.name=masked_clusters"], "does not learn from labels"),
        (["--recipe", "demo", "--set", "crops.size_vox=[40, 32, 32]"], "multiple"),
        (["--recipe", "demo", "--set", "crops.per_cas=3"], "did you mean 'crops.per_case'?"),
        (["--recipe", "demo", "--set", "train.patience=0"], "patience"),
        (["--recipe", "demo", "--set", "train.gradient_compression=bf16"], "set train.gradient_sync=ddp"),
        (["--recipe", "demo"], "--data is missing"),
        (["--recipe", "demo", "--data", "x"], "--root is missing"),
    ],
)
def test_what_finetuning_cannot_do_is_one_sentence(
    argv: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert finetune_job(monkeypatch, *argv) == 2
    assert said in one_error(capsys)


# ----------------------------------------------------------------------------------------------- doctor


def test_doctor_prints_a_table_and_fails_on_a_store_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("LOGONET_HOME", str(tmp_path))
    assert logonet(monkeypatch, "doctor", "--root", f"{tmp_path}/runs", "--no-nodes") == 0
    said = capsys.readouterr().out
    assert "version of ray" in said
    assert "store by logonet" in said
    (tmp_path / "file").write_text("")
    assert logonet(monkeypatch, "doctor", "--root", f"{tmp_path}/file/runs", "--no-nodes") == 1


def test_a_user_error_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert logonet(monkeypatch, "phantoms", "ftp://x/y") == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_tools_that_are_not_in_the_wheel_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(machines, "__file__", f"{tmp_path}/logonet/cli/machines.py")
    assert logonet(monkeypatch, "s3", "serve", "--dir", str(tmp_path)) == 2
    assert "tools/s3server.py" in one_error(capsys)


def test_the_demo_prefix_is_what_phantoms_write(tmp_path: Path) -> None:
    assert phantom.write_dataset(str(tmp_path), 1, size_vox=(16, 16, 16)).endswith("dataset.json")
