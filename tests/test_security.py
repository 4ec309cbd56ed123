"""What docs/security.md promises, as far as it can be shown without a cluster; test_listening.py has the rest."""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import logging
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_export import make

from logonet import tracking, training
from logonet.clustering import kmeans
from logonet.core.errors import UserError
from logonet.data import importers, manifest
from logonet.data.manifest import Scan
from logonet.distributed import bucket_inference
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
        "logonet/networks/__init__.py",
        "importlib.import_module",
    ): "a name out of names(), a listing of the folder",
    ("logonet/methods/__init__.py", "importlib.import_module"): "the same",
    (
        "logonet/cli/machines.py",
        "importlib.import_module",
    ): "one of our own developers' tools, named in the code",
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
        own = name.startswith("logonet.")
        if name in RUNS or (last in RUNS_BY_LAST_NAME and "." in name and not own):
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
    for cut, item in (
        (preparing.CutScan(cropping.Config(), str(tmp_path / "crops")), (scan, 0)),
        (preparing.PrepareScan(None, prepared_scans.Config(), str(tmp_path / "store")), scan),
    ):
        with pytest.raises(UserError, match=r"leads out of"):
            cut(item)


def test_a_backbone_or_method_is_one_of_ours(tmp_path: Path) -> None:
    folder = Path(make(tmp_path / "model"))
    values = json.loads((folder / model.CONFIG_FILE).read_text())
    values["backbone"] = {"name": "..stages"}
    (folder / model.CONFIG_FILE).write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"unknown backbone '\.\.stages'"):
        load_model(str(folder))


def test_every_test_that_the_page_names_is_there() -> None:
    page = (ROOT / "docs" / "security.md").read_text()
    named = re.findall(r"`(test_\w+)`", page)
    defined = "".join(
        (ROOT / "tests" / f"test_{file}.py").read_text() for file in ("security", "privacy", "listening")
    )
    assert len(named) > 15
    assert not [name for name in named if f"def {name}(" not in defined]
