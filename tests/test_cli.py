"""The `logonet` command, run as its user runs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from logonet import cli, phantom


def logonet(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", ["logonet", *argv])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize("command", [*cli.TWO_WORDS, "doctor", "phantoms"])
def test_every_command_has_help(command: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert logonet(monkeypatch, *command.split(), "--help") == 0
    assert command in capsys.readouterr().out


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


def test_doctor_prints_a_table_and_fails_on_a_store_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("LOGONET_HOME", str(tmp_path))
    assert logonet(monkeypatch, "doctor", "--root", f"{tmp_path}/runs", "--no-nodes") == 0
    said = capsys.readouterr().out
    assert "version of ray" in said
    assert "store by pyarrow" in said
    (tmp_path / "file").write_text("")
    assert logonet(monkeypatch, "doctor", "--root", f"{tmp_path}/file/runs", "--no-nodes") == 1


def test_a_user_error_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert logonet(monkeypatch, "phantoms", "ftp://x/y") == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_the_demo_prefix_is_what_phantoms_write(tmp_path: Path) -> None:
    assert phantom.write_dataset(str(tmp_path), 1, size_vox=(16, 16, 16)).endswith("dataset.json")
