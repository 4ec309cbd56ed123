"""The model registry against a real SQLite database, a real bucket and a real server."""

from __future__ import annotations

import json
import logging
import pathlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from logonet import tracking
from logonet.core.errors import UserError
from logonet.tracking import Tracker, download, lineage, register, set_alias
from tools.mlflow_server import MLflowServer

FILES = {"config.json": b'{"k": 3}', "weights.safetensors": b"\x00" * 1000, "more/notes.json": b"[]"}
TAGS = {"logonet.manifest": "m1", "logonet.pretrain": "p1"}


@pytest.fixture(scope="module")
def database(mlflow_template: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return shutil.copy(mlflow_template, tmp_path_factory.mktemp("mlflow"))


@pytest.fixture
def client(database: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    monkeypatch.setenv("LOGONET_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    for key, value in tracking.MLFLOW_DEFAULTS.items():
        monkeypatch.setenv(key, value)
    return tracking.runs.connect(tracking.tracking_uri())


def contents(folder: str) -> dict[str, bytes]:
    root = pathlib.Path(folder)
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def put(name: str, files: dict[str, bytes] = FILES, **given: Any) -> str:
    return register(name, files, TAGS, **{"kind": "encoder", **given})


def stored(client: Any, name: str, version: str = "1") -> pathlib.Path:
    """The folder in which the registry keeps a version's files."""
    return pathlib.Path(client.get_model_version_download_uri(name, version)) / "data"


def test_what_is_registered_comes_back(client: Any, tmp_path: pathlib.Path) -> None:
    uri = put("back", aliases=["candidate", "champion"])
    assert uri == "models:/back/1"
    for source in (uri, "models:/back@champion", "models:/back@candidate"):
        folder = download(source, str(tmp_path / "cache"))
        assert folder == str(tmp_path / "cache" / "back" / "1")
        assert contents(folder) == FILES
    version = client.get_model_version("back", "1")
    assert version.current_stage == "None"
    assert [p.name for p in (tmp_path / "cache" / "back").iterdir()] == ["1"], "temporary folders are left"


def test_a_version_carries_its_lineage_without_secrets(client: Any) -> None:
    tags = {**TAGS, "logonet.command": "finetune --set x=s3://u:hunter2@b s3://b/Ann_Miller.nii.gz"}
    uri = register("lineage", FILES, tags, kind="clusterers")
    found = lineage("models:/lineage@candidate")
    assert found["model"] == uri
    assert found["logonet.manifest"] == "m1"
    assert found["logonet.kind"] == "clusterers"
    assert found["logonet.size_bytes"] == str(sum(map(len, FILES.values())))
    assert client.get_run(found["run_id"]).info.status == "FINISHED"
    assert "hunter2" not in json.dumps(found)
    assert "Miller" not in json.dumps(found)


def test_the_same_files_are_one_version(client: Any) -> None:
    first = put("once", aliases=["candidate"])
    second = put("once", {**FILES, "config.json": b"{}"}, aliases=["candidate"])
    assert (first, second) == ("models:/once/1", "models:/once/2")
    again = register("once", FILES, {**TAGS, "logonet.evaluation": "e9"}, kind="encoder")
    assert again == first
    assert len(client.search_model_versions("name = 'once'")) == 2
    assert lineage("models:/once@candidate")["model"] == first
    assert lineage(first)["logonet.evaluation"] == "e9"
    # A moved byte between two files is another model.
    assert put("once", {"config.json": b"", "weights.safetensors": b"x"}) != put(
        "once", {"config.json": b"x", "weights.safetensors": b""}
    )


def test_a_version_is_linked_to_the_run_that_made_it(
    client: Any, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    for fingerprint, experiment in (("aaaa", "one"), ("bbbb", "two")):
        t = Tracker(fingerprint, experiment, "a run", {}, {}, artifact_root=str(tmp_path / experiment))
        t.sync([{"epoch": 0, "step": 0, "loss": 1.0}])
        assert t.close()
    uri = put("linked", run_fingerprint="bbbb")
    run = client.get_run(lineage(uri)["run_id"])
    assert run.data.tags["logonet.fingerprint"] == "bbbb"
    assert stored(client, "linked").is_relative_to(tmp_path / "two")
    (output,) = run.outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "linked", "version": 1}]

    with caplog.at_level(logging.WARNING, logger="logonet.tracking"):
        uri = put("unlinked", run_fingerprint="cccc")
    assert "no run with fingerprint cccc" in caplog.text
    run = client.get_run(lineage(uri)["run_id"])
    assert run.info.run_name == "register unlinked"


def test_aliases_move(client: Any) -> None:
    first, second = put("moves"), put("moves", {"a": b"2"})
    assert set_alias(first, "champion") == first
    assert set_alias("models:/moves@candidate", "champion") == second
    assert lineage("models:/moves@champion")["model"] == second


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("models:/asks", "must be of the form models:/NAME@ALIAS"),
        ("runs:/abc/model", "must be of the form models:/NAME@ALIAS"),
        ("models:/askd@candidate", r"unknown registered model 'askd'; did you mean 'asks'\?"),
        ("models:/asks@champion", r"no alias '@champion' \(versions: 1; aliases: @candidate is 1\)"),
        ("models:/asks/7", r"no version 7 \(versions: 1; aliases: @candidate is 1\)"),
    ],
)
def test_what_does_not_exist_is_answered_by_what_does(
    client: Any, tmp_path: pathlib.Path, uri: str, sentence: str
) -> None:
    put("asks")
    for ask in (lambda: download(uri, str(tmp_path)), lambda: lineage(uri), lambda: set_alias(uri, "x")):
        with pytest.raises(UserError, match=sentence) as err:
            ask()
        assert "\n" not in str(err.value)


def test_bad_names_and_aliases_are_refused(client: Any) -> None:
    with pytest.raises(UserError, match="model name 'a/b'"):
        put("a/b")
    with pytest.raises(UserError, match=r"could not register refused: .*alias"):
        put("refused", aliases=["v3"])


def test_damaged_files_are_not_handed_out(client: Any, tmp_path: pathlib.Path) -> None:
    uri = put("torn")
    weights = stored(client, "torn") / "weights.safetensors"
    good = weights.read_bytes()
    for bad in (good[:-1], b"\x01" + good[1:]):
        weights.write_bytes(bad)
        with pytest.raises(UserError, match="not what was registered"):
            download(uri, str(tmp_path))
    weights.unlink()
    with pytest.raises(UserError, match="register the model again"):
        download(uri, str(tmp_path))
    assert not (tmp_path / "torn" / "1").exists()
    weights.write_bytes(good)
    assert contents(download(uri, str(tmp_path))) == FILES


def test_a_damaged_copy_is_fetched_again_and_a_good_one_is_not(
    client: Any, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri = put("copy")
    folder = pathlib.Path(download(uri, str(tmp_path)))
    (folder / "config.json").write_bytes(b'{"k": 4}')
    assert contents(download(uri, str(tmp_path))) == FILES
    assert "fetched again" in caplog.text
    before = (folder / "config.json").stat().st_ino
    stored(client, "copy").rename(tmp_path / "gone")
    assert contents(download(uri, str(tmp_path))) == FILES
    assert (folder / "config.json").stat().st_ino == before


def test_many_processes_may_download_at_once(client: Any, tmp_path: pathlib.Path) -> None:
    uri = put("crowd")
    with ThreadPoolExecutor(6) as pool:
        folders = set(pool.map(lambda _: download(uri, str(tmp_path)), range(6)))
    assert [contents(folder) for folder in folders] == [FILES]
    assert [p.name for p in (tmp_path / "crowd").iterdir()] == ["1"]


def test_a_model_that_logonet_did_not_register_is_refused(client: Any, tmp_path: pathlib.Path) -> None:
    client.create_registered_model("foreign")
    client.create_model_version("foreign", str(tmp_path))
    with pytest.raises(UserError, match="its files cannot be verified"):
        download("models:/foreign/1", str(tmp_path))


def test_only_a_segmentation_can_be_loaded_by_pyfunc(client: Any) -> None:
    for kind in ("encoder", "clusterers", "segmentation"):
        put(f"kind-{kind}", kind=kind)
        folder = stored(client, f"kind-{kind}").parent
        model = (folder / "MLmodel").read_text()
        assert ("python_function" in model) == (kind == "segmentation")
        assert ("logonet.serving" in model) == (kind == "segmentation")
        assert not [p for p in folder.rglob("*") if p.suffix in (".pkl", ".pickle", ".pt", ".pth")]
    requirements = (folder / "requirements.txt").read_text()
    assert "logonet==" in requirements
    assert "\ntorch>=" in requirements


def test_a_registry_of_its_own(
    client: Any, mlflow_template: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    other = f"sqlite:///{shutil.copy(mlflow_template, tmp_path / 'registry.db')}"
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", other)
    uri = put("apart")
    assert contents(download(uri, str(tmp_path / "cache"))) == FILES
    assert [m.name for m in MlflowClient(tracking_uri=other).search_registered_models()] == ["apart"]
    assert "apart" not in [m.name for m in client.search_registered_models()]
    assert client.get_run(lineage(uri)["run_id"]).info.run_name == "register apart"


def test_a_registry_that_is_away_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:hunter2@127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match="could not read models:/x/1") as err:
        lineage("models:/x/1")
    assert "hunter2" not in str(err.value)


def test_models_of_a_sqlite_registry_go_to_the_bucket(
    client: Any,
    bucket: str,
    mlflow_template: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The experiment of the small runs keeps the location it was made with, so this needs a database of its own.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shutil.copy(mlflow_template, tmp_path)}")
    uri = put("bucketed", artifact_root=f"{bucket}/mlflow-artifacts")
    own = tracking.runs.connect(tracking.tracking_uri())
    location = own.get_model_version_download_uri("bucketed", "1")
    assert location.startswith(f"{bucket}/mlflow-artifacts/")
    assert contents(download(uri, str(tmp_path / "cache"))) == FILES

    from logonet.storage import object_store

    object_store.delete(f"{location}/data/config.json")
    with pytest.raises(UserError, match="not what was registered"):
        download(uri, str(tmp_path / "other"))
    object_store.delete_prefix(location)
    with pytest.raises(UserError, match="register the model again"):
        download(uri, str(tmp_path / "other"))


@pytest.mark.slow
def test_a_server_that_proxies_its_artifacts(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in tracking.MLFLOW_DEFAULTS.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "7")  # with MLflow's own growing pauses
    with MLflowServer(str(tmp_path)) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        uri = put("proxied", kind="segmentation")
        assert put("proxied", kind="segmentation") == uri == "models:/proxied/1"
        assert contents(download("models:/proxied@candidate", str(tmp_path / "cache"))) == FILES
        with pytest.raises(UserError, match="unknown registered model 'proxie'"):
            lineage("models:/proxie/1")
