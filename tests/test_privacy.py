"""No secret and no patient's name gets out, as docs/security.md promises."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pydicom
import pytest
from test_dicom import dicom_series

from logonet import cli, pipelines, tracking
from logonet.cli import endings
from logonet.core import redaction
from logonet.core.errors import UserError
from logonet.data import importers, manifest
from logonet.data.manifest import Scan
from logonet.distributed import bucket_inference, cluster
from logonet.pipelines import stage
from logonet.storage import object_store

ROOT = Path(__file__).parents[1]
PLANTED = "pLaNtEd0123456789"  # a secret, wherever one could be


# ------------------------------------------------------------------------------------------- secrets

URIS = [
    f"s3://AKIAIOSFODNN7EXAMPLE:{PLANTED}@bucket/runs",
    f"s3://user:{PLANTED}/with/slashes@bucket/runs",
    f"https://user:{PLANTED}@host:9000/bucket/x",
    f"https://bucket.host/x.nii.gz?X-Amz-Signature={PLANTED}&X-Amz-Date=1",
    f"https://host/x.nii.gz?token={PLANTED}",
]
COMMANDS = [
    ["register", "URI"],
    ["export", "URI", "--out", "out"],
    ["compare", "URI", "URI"],
    ["data", "leakcheck", "URI"],
    ["sweep-report", "URI"],
    ["phantoms", "URI"],
]


@pytest.mark.parametrize("uri", URIS)
@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(c[:2]))
def test_a_command_never_repeats_a_credential(
    uri: str, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["logonet", *(uri if word == "URI" else word for word in command)])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    said = capsys.readouterr()
    assert "error: " in said.err
    assert PLANTED not in said.err + said.out
    assert not any(tmp_path.iterdir())


def test_known_secrets_are_told_by_their_value(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "MY_API_KEY", "RAY_AUTH_TOKEN"):
        with monkeypatch.context() as patch:
            patch.setenv(name, PLANTED)
            told = f"the server says: cannot parse {PLANTED} as a date"
            assert PLANTED not in str(UserError(told))
            assert PLANTED not in redaction.redact(told)
            record = logging.LogRecord("x", logging.WARNING, "x", 1, "%s", (told,), None)
            assert PLANTED not in endings._Formatter("%(message)s").format(record)
            try:
                raise RuntimeError(told) from ValueError(told)
            except RuntimeError as err:
                endings._traceback(type(err), err, err.__traceback__)
            said = capsys.readouterr().err
            assert "RuntimeError: the server says" in said
            assert PLANTED not in said
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "session-token")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "session token")
    sentence = "s3://b/x: the session token has run out; log in again, or correct AWS_SECRET_ACCESS_KEY and the token"
    assert str(UserError(sentence)) == sentence, "an innocent sentence is garbled"
    assert str(pickle.loads(pickle.dumps(UserError(sentence)))) == sentence  # as Ray carries it


def test_workers_are_told_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job's runtime environment can be read on Ray's dashboard."""
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    for name in (
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "MLFLOW_TRACKING_PASSWORD",
        "MLFLOW_TRACKING_TOKEN",
    ):
        monkeypatch.setenv(name, f"{PLANTED}-{name}")
    for uri in URIS[2:]:
        for name in cluster.PASSED_ON:
            monkeypatch.setenv(name, uri)
        assert PLANTED not in json.dumps(cluster._env_vars())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert cluster._env_vars()["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"


def test_mlflow_never_holds_a_secret(
    mlflow_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every byte of its database and artifacts, after a run whose command, config and failures were full of them."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PLANTED)
    monkeypatch.setenv("SOME_PASSWORD", f"{PLANTED}-too")
    argv = [
        "jobs/pretrain.py",
        "--set",
        f"store.secret={PLANTED}",
        "--api-key",
        PLANTED,
        "--note",
        PLANTED,
        *URIS,
    ]
    monkeypatch.setattr(sys, "argv", argv)
    cfg = pipelines.Pretraining(backbone={"name": "logonet", "password": PLANTED, "note": f"see {PLANTED}"})
    lineage = {"manifest_uri": URIS[0], "weights_file": URIS[3]}
    files = {
        "config.yaml": f"note: {PLANTED}".encode(),
        "history.json": b'[{"epoch": 1, "step": 1, "loss": 1.0}]',
    }
    runs = f"{tmp_path}/runs"
    stage.run_tracked(
        runs,
        "pretrain",
        "name",
        cfg,
        {},
        {},
        lineage,
        lambda run: stage.Made(files, {}),
        lambda a: "",
        "secrets",
    )
    shutil.rmtree(f"{runs}/pretrain")  # the artifact itself holds its config as it is
    tracking.register("logonet-encoder", {"a.json": b"{}"}, {"logonet.pretrain_uri": URIS[1]}, kind="encoder")
    written = [path for folder in (mlflow_home, tmp_path) for path in folder.rglob("*") if path.is_file()]
    assert any(path.name == "mlflow.db" for path in written)
    assert any(path.name == "config.yaml" for path in written)
    assert not [path for path in written if PLANTED.encode() in path.read_bytes()]


# -------------------------------------------------------------------------------------------- patients

IDENTIFIERS = {
    "PatientName": "Planted^Patient",
    "PatientID": "planted-id",
    "PatientBirthDate": "19010203",
    "PatientAddress": "planted street",
    "AccessionNumber": "plantedaccess",
    "StudyInstanceUID": "1.2.826.0.1.111222333",
    "SeriesInstanceUID": "1.2.826.0.1.444555666",
    "FrameOfReferenceUID": "1.2.826.0.1.777888999",
    "StudyID": "plantedstudy",
    "InstitutionName": "planted hospital",
    "OtherPatientIDs": ["planted-other"],
    "ReferringPhysicianName": "Planted^Doctor",
    "StudyDescription": "planted knee",
}
TEXTS = ("lanted", "19010203", "111222333", "444555666", "777888999")


def damaged(k: int, dataset: Any) -> None:
    """One slice in which names stand where numbers and codes belong."""
    if k == 2:
        dataset.add_new("StudyDate", "DA", "Planted^Patient")
        dataset.add_new("PixelSpacing", "LO", "Planted^Patient")


@pytest.mark.parametrize("whole", [True, False])
def test_no_dicom_tag_that_names_a_patient_gets_out(whole: bool, tmp_path: Path, capsys: Any) -> None:
    tags: dict[str, Any] = {**IDENTIFIERS, **({} if whole else {"damaged": damaged})}
    series = tmp_path / "study" / "series"
    series.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, of what is written here
        for name, data in dicom_series((12, 12, 12), **tags)[0]:
            (series / Path(name).name).write_bytes(data)
    assert pydicom.dcmread(series / "0.dcm").PatientName == "Planted^Patient"
    (source,) = importers.sources(str(tmp_path / "study"))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        answer = manifest.inspect(source)
    assert isinstance(answer, Scan) == whole, answer
    table = manifest.Manifest.of([answer])
    print(table.describe(), table.summary())
    written = table.scans_parquet() + table.quarantine_parquet() + table.quarantine_csv()
    seen_text = repr((source, answer, [str(w.message) for w in warned])) + capsys.readouterr().out
    for text in TEXTS:
        assert text.encode() not in written, text
        assert text not in seen_text, text
    if whole:
        assert answer.subject == "series"  # its folder's name: no subject is taken from a tag


def test_names_of_files_are_hidden_where_that_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "scans" / "Miller Ann, 1950").mkdir(parents=True)
    (tmp_path / "scans/Miller Ann, 1950/t1.dcm").write_bytes(b"torn")
    (tmp_path / "scans/Smith^Joe.nii.gz").write_bytes(b"torn")
    (tmp_path / "scans/Smith^Joe_seg.nii.gz").write_bytes(b"torn")
    monkeypatch.setattr(redaction, "_names", {})

    def said() -> str:
        sources = importers.sources(str(tmp_path / "scans"))
        answers = [manifest.inspect(source) for source in sources]
        for answer in answers:
            assert isinstance(answer, manifest.Quarantined)
            stage.say("", f"quarantined: {answer.reason}")
        for item in bucket_inference.items_of(sources, str(tmp_path / "scans")):
            stage.say("1/2", f"{item.name}  1.0 s")
        stage.say("", "1/2 subject Smith_Joe-0123456789: a scan id")
        print(endings.shown(manifest.Manifest.of(answers).describe()))
        return capsys.readouterr().out

    assert "Miller" in said()
    monkeypatch.setenv(redaction.HIDE_NAMES, "1")
    hidden = said()
    for name in ("Miller", "Ann", "1950", "Smith", "Joe"):
        assert name not in hidden
    assert redaction.name_of(f"{tmp_path}/scans/Smith^Joe.nii.gz") in hidden
    monkeypatch.setattr(sys, "argv", ["jobs/pretrain.py", "--data", f"{tmp_path}/scans/Miller Ann, 1950"])
    assert "Miller" not in redaction.command_line(sys.argv)


@pytest.mark.slow
def test_a_whole_run_writes_no_secret_and_no_patient(bucket: str, tmp_path: Path) -> None:
    """A pretraining on DICOM series in a bucket, in a process of its own: every byte that it leaves anywhere."""
    import tempfile

    folder = f"{bucket}/scans/Miller^Ann 1950"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(2):
            for name, data in dicom_series((40, 40, 40), **IDENTIFIERS, RescaleIntercept=-1024 - number)[0]:
                object_store.write(f"{folder}/visit{number}/{Path(name).name}", data)
        for name, data in dicom_series((6, 5, 4), **IDENTIFIERS, damaged=damaged)[0]:
            object_store.write(f"{folder}/torn/{Path(name).name}", data)
    ray_folder = tempfile.mkdtemp(prefix="sec-", dir="/tmp")  # short: it holds sockets
    env = {
        **os.environ,
        "LOGONET_HOME": str(tmp_path / "home"),
        "RAY_TMPDIR": ray_folder,
        "PYTHONPATH": str(ROOT),
    }
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        env.pop(name, None)
    for name in ("MLFLOW_TRACKING_PASSWORD", "MY_API_KEY", "SOME_SECRET"):
        env[name] = PLANTED
    env |= {redaction.HIDE_NAMES: "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "jobs/pretrain.py", "--recipe", "demo", "--data", f"{bucket}/scans/"]
    command += ["--root", f"{bucket}/runs", "--workers", "2", "--object-store-mb", "300"]
    for setting in ("clusterers.n=2", "clusterers.iterations=2", "train.epochs=1", "split=null"):
        command += ["--set", setting]
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=540)
        said = done.stdout + done.stderr
        assert done.returncode == 0, said[-3000:]
        places = {"output": said.encode()}
        for place in (tmp_path, Path(ray_folder)):
            places |= {str(p): p.read_bytes() for p in place.rglob("*") if p.is_file() and not p.is_symlink()}
        places |= {e.uri: object_store.read(e.uri) for e in object_store.listing(f"{bucket}/runs")}
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)
    for part in ("/home/mlflow.db", "/logs/", "report.html", "quarantine.csv"):
        assert any(part in place for place in places), part
    assert "quarantined" in said
    for text in (PLANTED, os.environ["AWS_SECRET_ACCESS_KEY"], *TEXTS):
        leaks = [place for place, data in places.items() if text.encode() in data]
        assert not leaks, (text, leaks)
    # Names may be in the root, which is the user's own; and were they not, this would show nothing.
    named = {place for place, data in places.items() if b"Miller" in data}
    assert any(place.startswith(f"{bucket}/runs/manifest/") for place in named)
    assert not [place for place in named if not place.startswith(f"{bucket}/runs/") or "mlflow" in place], (
        named
    )
