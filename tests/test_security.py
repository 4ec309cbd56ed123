"""What docs/security.md promises, as far as it can be shown without a cluster; test_listening.py has the rest."""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydicom
import pytest
from test_export import make
from test_volume import dicom_series

from logonet import cli, pipelines, tracking, training
from logonet.cli import endings
from logonet.clustering import kmeans
from logonet.core import redaction
from logonet.core.errors import UserError
from logonet.data import importers, manifest
from logonet.data.manifest import Scan
from logonet.distributed import bucket_inference, cluster
from logonet.inference import export, model
from logonet.inference.load import load_model
from logonet.pipelines import finetuning
from logonet.storage import artifacts, object_store, parquet
from logonet.storage.object_store import Stored
from logonet.training import checkpoints

ROOT = Path(__file__).parents[1]
PLANTED = "pLaNtEd0123456789"  # a secret, wherever one could be

# ---------------------------------------------------------------------------------- nothing is unpickled

# Whatever could run what it reads. Names are those of the library, also where it is imported under another.
RUNS = {
    *(
        f"{m}.{f}"
        for m in ("pickle", "cloudpickle", "ray.cloudpickle", "dill")
        for f in ("load", "loads", "Unpickler")
    ),
    *("marshal.load", "marshal.loads", "shelve.open", "joblib.load", "runpy.run_path", "runpy.run_module"),
    *("torch.load", "torch.jit.load", "torch.hub.load", "torch.export.load", "onnx.load"),
    *("numpy.load", "pandas.read_pickle", "pandas.read_hdf", "pandas.eval"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load"),
    # Parquet may hold Ray's pickled objects; `tables` looks before it reads.
    *(
        "pandas.read_parquet",
        "pyarrow.parquet.read_table",
        "pyarrow.parquet.ParquetFile",
        "ray.data.read_parquet",
    ),
    *("eval", "exec", "compile", "__import__", "importlib.import_module", "os.system", "os.popen"),
}
RUNS_BY_LAST_NAME = {
    "load_model",
    "read_pickle",
    "read_hdf",
    "unsafe_load",
    "full_load",
    "Unpickler",
    "load_pickle",
}
ALLOWED = {
    (
        "logonet/backbones/__init__.py",
        "importlib.import_module",
    ): "a name out of names(), a listing of the folder",
    ("logonet/methods/__init__.py", "importlib.import_module"): "the same",
    (
        "logonet/distributed/executor.py",
        "pickle.loads",
    ): "answers of our own Ray tasks, which never leave Ray",
    (
        "logonet/storage/parquet.py",
        "pyarrow.parquet.read_table",
    ): "the one place; no value is looked at before its type is",
}


def running_calls(source: str) -> list[tuple[int, str]]:
    """(line, dotted name) of each mention of what RUNS, through whatever name it was imported by."""
    tree = ast.parse(source)
    means: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                means[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module:
            means |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}

    def dotted(node: ast.expr) -> str:
        if isinstance(node, ast.Attribute):
            return f"{dotted(node.value)}.{node.attr}"
        return means.get(node.id, node.id) if isinstance(node, ast.Name) else "?"

    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute | ast.Name) or not isinstance(node.ctx, ast.Load):
            continue
        name = dotted(node)
        last = name.rpartition(".")[2]
        if name in RUNS or (last in RUNS_BY_LAST_NAME and "." in name):
            found.append((node.lineno, name))
        if isinstance(node, ast.Attribute) and last == "allow_pickle":
            found.append((node.lineno, name))
    found += [
        (node.value.lineno, node.arg)
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only", "shell")
    ]
    return found


@pytest.mark.parametrize(
    "line",
    [
        "import torch\ntorch.load(f)",
        "import pickle as p\np.loads(b)",
        "from pickle import loads as harmless\nharmless(b)",
        "import ray\nray.cloudpickle.loads(b)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import mlflow\nmlflow.pyfunc.load_model(uri)",
        "import yaml\nyaml.load(t, Loader=yaml.Loader)",
        "import pandas as pd\npd.read_parquet(f)",
        "import pyarrow.parquet as pq\npq.read_table(f)",
        "read = eval\n",
        "import subprocess\nsubprocess.run(c, shell=True)",
    ],
)
def test_the_search_for_calls_that_run_what_they_read_finds_them(line: str) -> None:
    assert running_calls(line)


def test_nothing_that_is_read_is_run() -> None:
    found = {
        (str(path.relative_to(ROOT)), name): line
        for folder in ("logonet", "jobs")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, name in running_calls(path.read_text())
    }
    new = [
        f"{path}:{line} uses {name}" for (path, name), line in found.items() if (path, name) not in ALLOWED
    ]
    assert not new, f"{'; '.join(new)}: read it in a way that runs nothing, or say in ALLOWED why it is safe"
    assert ALLOWED.keys() == found.keys(), "an exception is no longer needed"


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


@pytest.fixture
def trace(tmp_path: Path) -> Iterator[Path]:
    """What must not be there at the end; and the bomb itself works."""
    trace = tmp_path / "it-was-run"
    pickle.loads(pickle.dumps(Bomb(trace)))
    assert trace.exists()
    trace.unlink()
    yield trace
    assert not trace.exists(), "a planted pickle was run"


@pytest.fixture(scope="module")
def mlflow_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture
def mlflow_home(mlflow_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All that MLflow writes; one for the file, since making its tables takes seconds."""
    monkeypatch.setenv("LOGONET_HOME", str(mlflow_folder))
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(name, raising=False)
    for name, value in tracking.MLFLOW_DEFAULTS.items():
        monkeypatch.setenv(name, value)
    return mlflow_folder


def bombs(trace: Path) -> dict[str, bytes]:
    """A pickle as such and as torch.save writes it."""
    import torch

    zipped = io.BytesIO()
    torch.save({"weight": Bomb(trace)}, zipped)
    return {"pickle": pickle.dumps(Bomb(trace)), "torch": zipped.getvalue()}


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_a_pickle_for_weights_is_refused_in_a_sentence(kind: str, trace: Path, tmp_path: Path) -> None:
    """As --init FILE, in a model folder, as a checkpoint and as clusterers."""
    bomb = bombs(trace)[kind]
    file = tmp_path / "weights.safetensors"
    file.write_bytes(bomb)
    weights = finetuning.find_weights(str(file), str(tmp_path / "runs"))
    assert weights is not None
    with pytest.raises(UserError, match=r"is no safetensors file"):
        training.load_weights(training.Init(weights.uri, weights.sha256))
    with pytest.raises(UserError, match=r"holds no finished artifact"):
        finetuning.find_weights(str(file.rename(tmp_path / "weights.pt")), str(tmp_path / "runs"))

    folder = Path(make(tmp_path / "model"))
    (folder / model.WEIGHTS_FILE).write_bytes(bomb)
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        load_model(str(folder))

    run = str(tmp_path / "run")
    files = {
        f"{group}.safetensors": object_store.write(f"{run}/{group}.safetensors", bomb)
        for group in checkpoints.TENSOR_FILES
    }
    facts = {"step": 1, "world": 1, "history": []}
    artifacts.commit(run, checkpoints.STAGE, "f00d", config={}, parents={}, files=files, facts=facts)
    with pytest.raises(checkpoints.Damaged):
        checkpoints.load_state(run, "f00d")
    with pytest.raises(UserError):
        kmeans.ClustererSet.from_bytes(bomb)


def test_a_pickle_in_the_registry_is_refused(trace: Path, tmp_path: Path, mlflow_home: Path) -> None:
    bomb = bombs(trace)["torch"]
    config = (Path(make(tmp_path / "model")) / model.CONFIG_FILE).read_bytes()
    blobs = {model.CONFIG_FILE: config, model.WEIGHTS_FILE: bomb}
    uri = tracking.register("logonet-seg-bomb", blobs, {}, kind="segmentation")
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        load_model(uri)
    # Beside the files that were registered, where MLflow itself would look for code to load.
    version = tracking.runs.connect(tracking.tracking_uri()).get_model_version("logonet-seg-bomb", "1")
    (Path(version.source) / "python_model.pkl").write_bytes(bomb)
    (Path(version.source) / "MLmodel").write_text(
        "flavors: {python_function: {loader_module: mlflow.pyfunc.model, python_model: python_model.pkl}}"
    )
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        load_model(uri)


def test_a_parquet_table_with_pickled_objects_is_refused(trace: Path, tmp_path: Path) -> None:
    """Ray's own column type, which any process knows that has imported ray.data."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray

    column = ArrowPythonObjectArray.from_objects([Bomb(trace)])
    for name, array in {
        "plain": column,
        "nested": pa.StructArray.from_arrays([column], names=["inner"]),
        "list": pa.ListArray.from_arrays(pa.array([0, 1]), column),
    }.items():
        sink = io.BytesIO()
        pq.write_table(pa.table({"scan_id": array}), sink)
        if name == "plain":
            pq.read_table(io.BytesIO(sink.getvalue())).to_pylist()
            assert trace.exists(), "the table is harmless; the test shows nothing"
            trace.unlink()
        with pytest.raises(UserError, match="'scan_id' has an extension type"):
            parquet.read_parquet(sink.getvalue(), "scans.parquet")
    with pytest.raises(UserError, match="'scan_id' has an extension type"):
        manifest.Manifest.from_parquet(sink.getvalue(), sink.getvalue())
    with pytest.raises(UserError, match=r"x\.parquet is not a Parquet table"):
        parquet.read_parquet(b"PAR1 torn", "x.parquet")


def test_a_bundle_holds_no_text_that_monai_would_run(tmp_path: Path) -> None:
    """Class names come from whoever wrote the dataset.json; MONAI's configs evaluate what begins with a $."""
    folder = Path(make(tmp_path / "model"))
    values = json.loads((folder / model.CONFIG_FILE).read_text())
    for text in ("$__import__('os').abort()", "@network", "%metadata"):
        values["classes"][1] = text
        (folder / model.CONFIG_FILE).write_text(json.dumps(values))
        with pytest.raises(UserError, match="which a MONAI config would not take as text"):
            export.write_bundle(str(folder), str(tmp_path / "bundle"))
        assert not (tmp_path / "bundle").exists()


# --------------------------------------------------------------------------- nothing leaves its folder


@pytest.mark.parametrize("name", ["../x", "a/../../x", "..", "a/.."])
def test_a_name_with_dots_is_no_name(name: str) -> None:
    with pytest.raises(UserError, match="leads out of /root"):
        object_store.join("/root", name)
    assert object_store.join("/root", "/etc/passwd") == "/root/etc/passwd"
    assert object_store.join("s3://b/r", "a..b", "...") == "s3://b/r/a..b/..."


@pytest.mark.parametrize("name", ["../outside.bin", "/etc/passwd", "a/../../outside.bin"])
def test_a_manifest_that_lists_files_elsewhere_counts_as_torn(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "outside.bin").write_bytes(b"secret")
    uri = str(tmp_path / "artifact")
    good = artifacts.commit(
        uri,
        "s",
        "f00d",
        config={},
        parents={},
        files={"in.bin": object_store.write(f"{uri}/in.bin", b"in")},
        facts={},
    )
    assert artifacts.find(uri) == good
    content = json.loads((tmp_path / "artifact" / artifacts.MANIFEST).read_text())
    del content["checksum"]
    content["files"] = {name: dataclasses.asdict(Stored(6, good.files["in.bin"].sha256))}
    object_store.write_json(
        f"{uri}/{artifacts.MANIFEST}", content | {"checksum": artifacts._checksum(content)}
    )
    with caplog.at_level(logging.WARNING):
        assert artifacts.find(uri) is None
    assert "outside its folder" in caplog.text


def listed(folder: Path, image: str, label: str = "", name: str = "dataset.json") -> str:
    item = {"image": image, **({"label": label} if label else {})}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({"training": [item]}))
    return str(folder / name)


@pytest.mark.parametrize(
    "outside",
    [
        "../../x.nii.gz",
        "/etc/x.nii.gz",
        "~/x.nii.gz",
        "s3://other/x.nii.gz",
        "file:///etc/x.nii.gz",
        "a/../../x.nii.gz",
    ],
)
@pytest.mark.parametrize("what", ["image", "label"])
def test_a_dataset_json_names_what_lies_below_it(
    outside: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "given" / "set"
    names = {"image": "in.nii.gz", "label": "", what: outside}
    uri = listed(folder, **names)
    for given in (uri, str(folder)):
        with pytest.raises(
            UserError, match=r"names .*x\.nii\.gz, which does not lie below .*LOGONET_DATA_ROOTS"
        ) as said:
            importers.sources(given)
        assert str(said.value).startswith(uri)
    allowed = f"s3://other, /etc,{tmp_path},~"
    monkeypatch.setenv(importers.DATA_ROOTS, allowed)
    if not outside.startswith("s3"):
        assert len(importers.sources(uri)) == 1
    # Neither does a neighbour count whose name begins alike.
    monkeypatch.setenv(importers.DATA_ROOTS, f"{folder}")
    with pytest.raises(UserError):
        importers.sources(listed(folder, f"{folder}-more/x.nii.gz"))


def test_up_and_down_within_what_was_given_is_allowed(tmp_path: Path) -> None:
    uri = listed(tmp_path / "given" / "lists", "../images/x.nii.gz")
    assert len(importers.sources(str(tmp_path / "given"))) == 1
    with pytest.raises(UserError, match="does not lie below"):
        importers.sources(uri)  # it was the list that was given, and not what is above it


def test_links_count_where_they_lie_but_no_way_back_out_of_them(tmp_path: Path) -> None:
    """A link is made by who owns the folder; what '..' means behind one is the other folder's parent."""
    (tmp_path / "elsewhere/deep").mkdir(parents=True)
    (tmp_path / "elsewhere/deep/x.nii.gz").write_bytes(b"x")
    given = tmp_path / "given"
    given.mkdir()
    (given / "link").symlink_to(tmp_path / "elsewhere/deep")
    (given / "round").symlink_to(given)  # walked once, not for ever
    assert [s.uri for s in importers.sources(str(given))] == [f"{given}/link/x.nii.gz"]
    assert len(importers.sources(listed(given, "link/x.nii.gz"))) == 1
    with pytest.raises(UserError, match="does not lie below"):
        importers.sources(listed(given, "link/../y.nii.gz"))


def test_a_csv_is_the_users_own_unless_it_lies_in_a_bucket(tmp_path: Path, bucket: str) -> None:
    text = f"image\n{tmp_path}/x.nii.gz\ns3://{bucket.removeprefix('s3://')}/y.nii.gz\n"
    (tmp_path / "scans.csv").write_text(text)
    assert len(importers.sources(str(tmp_path / "scans.csv"))) == 2
    object_store.write(f"{bucket}/scans.csv", text.encode())
    with pytest.raises(UserError, match=r"line 2: names .*x\.nii\.gz, which does not lie below s3://"):
        importers.sources(f"{bucket}/scans.csv")


def test_a_label_map_stays_in_the_output_whatever_a_buckets_keys_are(tmp_path: Path, bucket: str) -> None:
    keys = ["../../x.nii.gz", "a/../../../y.nii.gz", "a//b.nii.gz", "a/./c.nii.gz", "fine/d..nii.gz"]
    for key in keys:
        object_store._client().put_object(Bucket=bucket.removeprefix("s3://"), Key=f"in/{key}", Body=b"x")
    items = bucket_inference.items_of(importers.sources(f"{bucket}/in/"), f"{bucket}/in/")
    assert len(items) == len(keys)
    output = tmp_path / "output"
    written = {Path(bucket_inference._label_uri(str(output), item.name)).resolve() for item in items}
    rows = {Path(bucket_inference._row_uri(str(output), item.name)).resolve() for item in items}
    assert len(written) == len(rows) == len(keys)
    assert all(path.is_relative_to(output) for path in written | rows)
    assert output / "_/_/x.nii.gz" in written


def test_a_scan_id_from_a_store_cannot_lead_out(tmp_path: Path) -> None:
    """Crops and cases are named after the scans of a manifest, which may have come from anyone."""
    from logonet.data import cropping, prepared_scans, preparing

    values = {f.name: () if "tuple" in str(f.type) else "" for f in dataclasses.fields(Scan)}
    scan = Scan(**{**values, "scan_id": "../../outside"})  # type: ignore[arg-type]
    for cut in (
        preparing.CutScan(cropping.Config(), str(tmp_path / "crops"), {}),
        preparing.PrepareScan((0, 1), prepared_scans.Config(), str(tmp_path / "cases")),
    ):
        with pytest.raises(UserError, match=r"leads out of"):
            cut(scan)


def test_a_backbone_or_method_is_one_of_ours(tmp_path: Path) -> None:
    folder = Path(make(tmp_path / "model"))
    values = json.loads((folder / model.CONFIG_FILE).read_text())
    values["backbone"] = {"name": "..stages"}
    (folder / model.CONFIG_FILE).write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"unknown backbone '\.\.stages'"):
        load_model(str(folder))


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
    told = pipelines.common.tracking_of(
        "pretrain", "name", "f00d", cfg, lineage, str(tmp_path / "runs"), "secrets"
    )
    history = [{"epoch": 1, "step": 1, "loss": 1.0}]
    files = {"config.yaml": f"note: {PLANTED}".encode()}
    assert tracking.catch_up(**told, history=history, files=files, timeout_s=300)
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
            pipelines.common.say("", f"quarantined: {answer.reason}")
        for item in bucket_inference.items_of(sources, str(tmp_path / "scans")):
            pipelines.common.say("1/2", f"{item.name}  1.0 s")
        pipelines.common.say("", "1/2 subject Smith_Joe-0123456789: a scan id")
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


def test_every_test_that_the_page_names_is_there() -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    named = re.findall(r"`(test_\w+)`", page)
    defined = "".join((ROOT / "tests" / f"test_{file}.py").read_text() for file in ("security", "listening"))
    assert len(named) > 15
    assert not [name for name in named if f"def {name}(" not in defined]
