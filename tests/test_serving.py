"""A registered model answers arrays and files, in Python and over HTTP, with what the predictor says itself."""

from __future__ import annotations

import base64
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from logonet import networks, tracking
from logonet.core.errors import BadScan, UserError
from logonet.data import volume
from logonet.data.phantom import phantom
from logonet.data.volume import Volume
from logonet.inference import model, serving

SIZE = (32, 32, 32)
CLASSES = ("background", "liver", "spleen")
VALUES = (0, 7, 3)


def spec_of(modality: str = "CT", **given: Any) -> model.Spec:
    values: dict[str, Any] = {
        "backbone": {"name": "logonet", **networks.tiny("logonet")},
        "in_channels": 1,
        "classes": CLASSES,
        "label_values": VALUES,
        "size_vox": SIZE,
        "spacing_mm": (3.0, 3.0, 3.0),
        "window_hu": (-200.0, 300.0),
        "mr_percentiles": (0.5, 99.5),
        "modality": modality,
    }
    return model.Spec(**(values | given))


def files_of(spec: model.Spec) -> dict[str, bytes]:
    torch.manual_seed(0)
    name = spec.backbone.name
    net = networks.build(name, 1, len(spec.classes), **networks.tiny(name))
    return model.files(spec, net.state_dict())


def write(folder: pathlib.Path, files: dict[str, bytes]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("model"), files_of(spec_of()))


@pytest.fixture(scope="module")
def served(folder: str) -> serving.Served:
    return serving._load_pyfunc(folder)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> serving.Served:
    return serving._load_pyfunc(write(tmp_path_factory.mktemp("mixed"), files_of(spec_of("mixed"))))


def scan(size: tuple[int, int, int] = (36, 20, 24), **given: Any) -> tuple[Volume, bytes]:
    image, _ = phantom(given.pop("seed", 1), size_vox=size, **given)
    return image, volume.encode_nifti(image.array_CXYZ[0].astype(np.int16), image.affine)


def as_text(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize(("batch", "size"), [(1, (32, 32, 32)), (2, (20, 37, 12))])
def test_arrays_of_any_size_and_batch(served: serving.Served, size: tuple[int, int, int], batch: int) -> None:
    scans = [scan(size, seed=n)[0].array_CXYZ for n in range(batch)]
    labels = served.predict(np.stack(scans))
    assert isinstance(labels, np.ndarray)
    assert labels.dtype == np.uint8
    assert labels.shape == (batch, *size)
    assert len(np.unique(labels)) > 1, "the test needs a network that says more than one thing"
    assert set(np.unique(labels)) <= set(VALUES)
    for array_CXYZ, labels_XYZ in zip(scans, labels):
        own = served.predictor.segment(Volume(array_CXYZ, np.diag([3.0, 3, 3, 1])), "CT")
        np.testing.assert_array_equal(labels_XYZ, own)


def test_three_and_four_axes_are_scans_of_one_channel(served: serving.Served) -> None:
    array_BCXYZ = np.stack([scan(seed=n)[0].array_CXYZ for n in range(2)])
    whole = served.predict(array_BCXYZ)
    np.testing.assert_array_equal(served.predict(array_BCXYZ[:, 0]), whole)
    np.testing.assert_array_equal(served.predict(array_BCXYZ[1, 0].tolist()), whole[1:])


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ([[[1.0, 2.0], [3.0]]], "must be an array of numbers"),
        ([[["a"]]], "must be an array of numbers"),
        (np.zeros((4, 4)), r"have shape \(4, 4\); the model wants \(scans, 1, X, Y, Z\)"),
        (np.zeros((1, 2, 8, 8, 8)), r"the model wants \(scans, 1, X, Y, Z\)"),
        (np.zeros((0, 1, 8, 8, 8)), "the model wants"),
        (np.full((8, 8, 8), np.nan), "not finite"),
        (pd.DataFrame({"image": ["x"]}), r"columns \['image'\]; it must have one named 'nifti'"),
        (pd.DataFrame({"nifti": ["not base64!"]}), "row 0: its 'nifti' is not base64"),
        (pd.DataFrame({"nifti": [None]}), "row 0: its 'nifti' is not base64"),
        (pd.DataFrame({"nifti": [as_text(b"hello")]}), "row 0: "),
        (pd.DataFrame({"nifti": [as_text(scan(modality="MR")[1])]}), "row 0: is MR, but the model was"),
    ],
)
def test_what_is_wrong_is_one_sentence(served: serving.Served, bad: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as err:
        served.predict(bad)
    assert "\n" not in str(err.value)


def test_files_come_back_on_their_own_voxels(served: serving.Served) -> None:
    scans = [scan((30, 24, 28), spacing_mm=(3.0, 4.0, 5.0), orientation="LPI"), scan(seed=2)]
    table = pd.DataFrame({"nifti": [as_text(scans[0][1]), scans[1][1]]}, index=["a", "b"])
    answer = served.predict(table)
    assert isinstance(answer, pd.DataFrame)
    assert list(answer.index) == ["a", "b"]
    for (image, _), text, volumes in zip(scans, answer["nifti"], answer["volumes_ml"]):
        data = base64.b64decode(text)
        label_map = volume.decode_nifti(data, "answer.nii.gz", allow_constant=True)
        np.testing.assert_allclose(label_map.affine, image.affine, atol=1e-5)
        expected = served.predictor.segment(image, "CT")
        np.testing.assert_array_equal(label_map.array_CXYZ[0], expected)
        voxel_ml = np.prod(image.spacing_mm) / 1000
        for name, value in zip(CLASSES[1:], VALUES[1:]):
            assert json.loads(volumes)[name] == pytest.approx(voxel_ml * (expected == value).sum(), rel=1e-5)
        assert len(np.unique(expected)) > 1


def test_a_model_of_both_kinds_is_told_or_guesses(mixed: serving.Served) -> None:
    image, data = scan()
    affine = np.diag([3.0, 3, 3, 1])
    as_ct = mixed.predictor.segment(Volume(image.array_CXYZ, affine), "CT")
    as_mr = mixed.predictor.segment(Volume(image.array_CXYZ, affine), "MR")
    assert (as_ct != as_mr).any()
    array = image.array_CXYZ[None]
    np.testing.assert_array_equal(mixed.predict(array)[0], as_ct)
    np.testing.assert_array_equal(mixed.predict(array, params={"modality": ""})[0], as_ct)
    np.testing.assert_array_equal(mixed.predict(array, params={"modality": "MR"})[0], as_mr)
    own_ct = mixed.predict(pd.DataFrame({"nifti": [data], "modality": [None]}))["nifti"][0]
    own_mr = mixed.predict(pd.DataFrame({"nifti": [data], "modality": ["MR"]}))["nifti"][0]
    assert own_ct != own_mr
    with pytest.raises(BadScan, match="'pet' is neither CT nor MR"):
        mixed.predict(array, params={"modality": "PET"})


def test_serving_does_not_import_mlflow() -> None:
    code = "import sys, logonet.inference.serving; sys.exit('mlflow' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.fixture(scope="module")
def registered(
    mlflow_template: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, str]]:
    """A registered model's URI, and the environment in which its registry is reached."""
    home = tmp_path_factory.mktemp("home")
    shutil.copy(mlflow_template, home)
    with pytest.MonkeyPatch.context() as patch:
        settings = {"MLFLOW_TRACKING_URI": f"sqlite:///{home}/mlflow.db", "LOGONET_HOME": str(home)}
        settings |= {**tracking.MLFLOW_DEFAULTS, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
        for name, value in settings.items():
            patch.setenv(name, value)
        uri = tracking.register("logonet-seg-test", files_of(spec_of()), {}, kind="segmentation")
    return uri, settings


def test_pyfunc_loads_it_where_pickles_are_forbidden(
    registered: tuple[str, dict[str, str]], served: serving.Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    _, settings = registered
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    loaded = mlflow.pyfunc.load_model("models:/logonet-seg-test@candidate")
    image, data = scan()
    array = image.array_CXYZ[None]
    np.testing.assert_array_equal(loaded.predict(array), served.predict(array))
    pd.testing.assert_frame_equal(
        loaded.predict(pd.DataFrame({"nifti": [data]})), served.predict(pd.DataFrame({"nifti": [data]}))
    )


def post(url: str, body: Any) -> tuple[int, Any]:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as err:
        return err.code, err.read().decode()


@pytest.mark.slow
def test_mlflow_models_serve(
    registered: tuple[str, dict[str, str]], served: serving.Served, tmp_path: pathlib.Path
) -> None:
    uri, settings = registered
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", uri, "--env-manager", "local"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    env = {**os.environ, **settings, "PATH": path, "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
    url = f"http://127.0.0.1:{port}"
    with open(tmp_path / "serve.log", "wb") as out:
        # Its own session: mlflow starts uvicorn through a shell.
        server = subprocess.Popen(
            command, cwd=tmp_path, env=env, stdout=out, stderr=out, start_new_session=True
        )
    try:
        wait_for(f"{url}/ping", server, tmp_path / "serve.log")
        for size in ((32, 32, 32), (20, 28, 12)):
            array = np.stack([scan(size, seed=n)[0].array_CXYZ for n in range(2)])
            status, answer = post(f"{url}/invocations", {"inputs": array.tolist()})
            assert status == 200, answer
            np.testing.assert_array_equal(answer["predictions"], served.predict(array))

        texts = [[as_text(scan(size)[1])] for size in ((32, 32, 32), (20, 28, 12))]
        status, answer = post(
            f"{url}/invocations", {"dataframe_split": {"columns": ["nifti"], "data": texts}}
        )
        assert status == 200, answer
        expected = served.predict(pd.DataFrame(texts, columns=["nifti"]))
        assert answer["predictions"] == json.loads(expected.to_json(orient="records"))

        status, answer = post(f"{url}/invocations", {"dataframe_split": {"columns": ["x"], "data": [["y"]]}})
        assert status == 400
        assert "it must have one named 'nifti'" in answer
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)


def wait_for(url: str, server: subprocess.Popen[bytes], log: pathlib.Path) -> None:
    while True:
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=10):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)


@pytest.mark.real
def test_a_real_scan_through_the_door(served: serving.Served, shared_data: pathlib.Path) -> None:
    data = (shared_data / "scans" / "ct_trunk_3mm.nii.gz").read_bytes()
    answer = served.predict(pd.DataFrame({"nifti": [as_text(data)]}))
    label_map = volume.decode_nifti(base64.b64decode(answer["nifti"][0]), "answer", allow_constant=True)
    image = volume.decode_nifti(data, "ct_trunk_3mm.nii.gz")
    assert label_map.shape_xyz == image.shape_xyz
    np.testing.assert_array_equal(label_map.affine, image.affine)
    assert set(np.unique(label_map.array_CXYZ)) <= set(VALUES)
