"""Exported models against MONAI's own checks and ONNX Runtime, and against our own predictions."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tilted

from logonet import networks
from logonet.core.errors import UserError
from logonet.data import volume
from logonet.data.phantom import phantom
from logonet.inference import export, model
from logonet.inference.export import onnx
from logonet.inference.export.shared import logits_only
from logonet.inference.sliding_window import Predictor

VALUES = (0, 7, 3)

# Of shape (X, Y, Z) in voxels, spacing in mm, axes; with the largest share of voxels that may differ, of an
# untrained network, which is undecided in many places.
SCANS = {
    "anisotropic": ((36, 30, 40), (2.0, 2.5, 3.0), "LPI", 0.0, 0.001),
    "small": ((20, 28, 24), (3.0, 3.0, 5.0), "ASL", 0.0, 0.001),
    "oblique": ((32, 36, 20), (3.0, 3.0, 4.0), "RAS", 20.0, 0.03),
}

# What MONAI's meta_schema_20240725.json demands, in our words: the real one is fetched from the network.
TENSOR = {
    "type": "object",
    "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"],
    "properties": {
        "num_channels": {"type": "integer"},
        "spatial_shape": {"type": "array", "items": {"type": ["string", "integer"]}},
        "dtype": {"type": "string"},
        "value_range": {"type": "array", "items": {"type": "number"}},
        "is_patch_data": {"type": "boolean"},
        "channel_def": {"type": "object"},
    },
}
TENSORS = {"type": "object", "minProperties": 1, "additionalProperties": TENSOR}
TEXTS = ["schema", "version", "monai_version", "pytorch_version", "numpy_version", "task", "description"]
TEXTS += ["authors", "copyright"]
SCHEMA = {
    "type": "object",
    "required": [*TEXTS, "required_packages_version", "network_data_format"],
    "properties": {
        **{name: {"type": "string", "minLength": 1} for name in TEXTS},
        "required_packages_version": {"type": "object"},
        "changelog": {"type": "object"},
        "network_data_format": {
            "type": "object",
            "required": ["inputs", "outputs"],
            "properties": {"inputs": TENSORS, "outputs": TENSORS},
        },
    },
}


def make(
    folder: pathlib.Path,
    modality: str = "CT",
    name: str = "logonet",
    size_vox: tuple[int, int, int] = (32, 32, 32),
    in_channels: int = 1,
    special: dict[str, Any] | None = None,
    **options: Any,
) -> str:
    """An untrained model's folder; ``special`` are keys of its config beside the usual ones."""
    options = networks.tiny(name) | options
    spec = model.Spec(
        backbone={"name": name, **options},
        in_channels=in_channels,
        classes=("background", "liver", "spleen"),
        label_values=VALUES,
        size_vox=size_vox,
        spacing_mm=(3.0, 3.0, 3.0),
        window_hu=(-200.0, 300.0),
        mr_percentiles=(0.5, 99.5),
        modality=modality,
        **(special or {}),
    )
    torch.manual_seed(0)
    net = networks.build(name, in_channels, spec.num_outputs, **options)
    folder.mkdir(parents=True, exist_ok=True)
    for file, data in model.files(spec, net.state_dict()).items():
        (folder / file).write_bytes(data)
    return str(folder)


def make_small(folder: pathlib.Path) -> str:
    """Of a network that is written as ONNX within seconds."""
    return make(folder, name="unet", size_vox=(16, 16, 16))


@functools.cache
def made(base: pathlib.Path, modality: str) -> tuple[str, pathlib.Path]:
    """A model's folder and its bundle."""
    folder, bundle = make(base / f"model-{modality}", modality), base / f"bundle-{modality}"
    export.write_bundle(folder, str(bundle))
    return folder, bundle


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("made")


def write_scans(folder: pathlib.Path, modality: str) -> None:
    folder.mkdir()
    for seed, (name, (size, spacing_mm, orientation, tilt_deg, _)) in enumerate(SCANS.items()):
        scan = tilted(phantom(seed, size, spacing_mm, modality, orientation=orientation)[0], tilt_deg)
        data = volume.encode_nifti(scan.array_CXYZ[0].astype(np.int16), scan.affine)
        (folder / f"{name}.nii.gz").write_bytes(data)


def check_labels(folder: str, scans: pathlib.Path, outputs: pathlib.Path, modality: str) -> None:
    predictor = Predictor.load(folder)
    for name, (*_, allowed) in SCANS.items():
        scan = volume.decode_nifti((scans / f"{name}.nii.gz").read_bytes(), name)
        own_XYZ = predictor.segment(scan, modality)
        data = (outputs / f"{name}_seg.nii.gz").read_bytes()
        other = volume.decode_nifti(data, name, allow_constant=True)
        np.testing.assert_allclose(other.affine, scan.affine, atol=1e-4)
        assert other.stored_dtype == "uint8"
        assert len(np.unique(own_XYZ)) > 1, "the test needs a network that says more than one thing"
        assert np.mean(own_XYZ != other.array_CXYZ[0]) <= allowed, name


@pytest.mark.parametrize(
    "modality", ["mixed", *(pytest.param(m, marks=pytest.mark.slow) for m in ("CT", "MR"))]
)
def test_monai_verifies_the_bundle(base: pathlib.Path, tmp_path: pathlib.Path, modality: str) -> None:
    from monai.bundle import verify_metadata, verify_net_in_out

    _, bundle = made(base, modality)
    meta, config = str(bundle / "configs/metadata.json"), str(bundle / "configs/inference.json")
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))  # which keeps MONAI from fetching its own
    verify_metadata(meta_file=meta, filepath=str(tmp_path / "schema.json"))
    verify_net_in_out(net_id="network_def", meta_file=meta, config_file=config, device="cpu")


@pytest.mark.parametrize(
    ("trained", "modality"),
    [
        ("CT", "CT"),
        ("mixed", "MR"),
        pytest.param("MR", "MR", marks=pytest.mark.slow),
        pytest.param("mixed", "CT", marks=pytest.mark.slow),
    ],
)
def test_monai_runs_the_bundle_with_our_labels(
    base: pathlib.Path, tmp_path: pathlib.Path, trained: str, modality: str
) -> None:
    from monai.bundle import ConfigWorkflow

    folder, bundle = made(base, trained)
    write_scans(tmp_path / "scans", modality)
    told = {"modality": modality} if trained == "mixed" else {}
    workflow = ConfigWorkflow(
        str(bundle / "configs/inference.json"),
        logging_file=False,
        workflow_type="infer",
        bundle_root=str(bundle),
        dataset_dir=str(tmp_path / "scans"),
        output_dir=str(tmp_path / "eval"),
        **told,
    )
    workflow.initialize()
    assert not workflow.check_properties()
    workflow.run()
    workflow.finalize()
    check_labels(folder, tmp_path / "scans", tmp_path / "eval", modality)


def test_monai_runs_a_bundle_of_several_channels_and_regions(tmp_path: pathlib.Path) -> None:
    from monai.bundle import ConfigWorkflow

    regions = {"regions": {"both": ("liver", "spleen"), "spleen": ("spleen",)}, "region_values": (7, 3)}
    special = {**regions, "intensity": ("window_percentiles", "zscore")}
    folder = make(tmp_path / "model", "CT+MR", "unet", in_channels=2, special=special)
    export.write_bundle(folder, str(tmp_path / "bundle"))
    (tmp_path / "scans").mkdir()
    pair = [phantom(seed, (36, 30, 28), (3.0, 3.0, 3.0), m) for seed, m in enumerate(("CT", "MR"))]
    both_XYZC = np.stack([scan.array_CXYZ[0] for scan, _ in pair], -1).astype(np.int16)
    data = volume.encode_nifti(both_XYZC, pair[0][0].affine)
    (tmp_path / "scans/a.nii.gz").write_bytes(data)
    workflow = ConfigWorkflow(
        str(tmp_path / "bundle/configs/inference.json"),
        logging_file=False,
        workflow_type="infer",
        bundle_root=str(tmp_path / "bundle"),
        dataset_dir=str(tmp_path / "scans"),
        output_dir=str(tmp_path / "eval"),
    )
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    own_XYZ = Predictor.load(folder).segment(volume.decode_nifti(data, "a"), "CT+MR")
    found = volume.decode_nifti((tmp_path / "eval/a_seg.nii.gz").read_bytes(), "a", allow_constant=True)
    assert set(np.unique(own_XYZ)) <= {0, 7, 3}
    assert len(np.unique(own_XYZ)) > 1, "the test needs a network that says more than one thing"
    assert np.mean(own_XYZ != found.array_CXYZ[0]) <= 0.001


@pytest.mark.parametrize("regions", [False, True])
def test_monai_runs_the_bundle_of_an_ensemble_with_its_post_processing(
    tmp_path: pathlib.Path, regions: bool
) -> None:
    from monai.bundle import ConfigWorkflow

    special: dict[str, Any] = {"largest_component": ("liver", "spleen")}
    if regions:
        special |= {"regions": {"liver": ("liver",), "spleen": ("spleen",)}, "region_values": (7, 3)}
    folders = [
        make(tmp_path / name, "CT", name, (16, 16, 16), special=special)
        for name in ("unet", "attention_unet")
    ]
    spec, weights = model.ensemble([model.read(folder) for folder in folders])
    for file, data in model.files(spec, weights).items():
        (tmp_path / file).write_bytes(data)
    export.write_bundle(str(tmp_path), str(tmp_path / "bundle"))
    (tmp_path / "scans").mkdir()
    scan, _ = phantom(0, (20, 18, 22), (3.0, 3.0, 3.0))
    data = volume.encode_nifti(scan.array_CXYZ[0].astype(np.int16), scan.affine)
    (tmp_path / "scans/a.nii.gz").write_bytes(data)
    places = {"dataset_dir": str(tmp_path / "scans"), "output_dir": str(tmp_path / "eval")}
    config = str(tmp_path / "bundle/configs/inference.json")
    root = {"bundle_root": str(tmp_path / "bundle")}
    workflow = ConfigWorkflow(config, logging_file=False, workflow_type="infer", **root, **places)
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    found = volume.decode_nifti((tmp_path / "eval/a_seg.nii.gz").read_bytes(), "a", allow_constant=True)
    predictor = Predictor.load(str(tmp_path))
    own_XYZ = predictor.segment(volume.decode_nifti(data, "a"), "CT")
    assert np.mean(own_XYZ != found.array_CXYZ[0]) <= 0.001
    predictor.spec = dataclasses.replace(predictor.spec, largest_component=())
    assert (predictor.segment(scan, "CT") != own_XYZ).any(), "the test needs organs in pieces"


@pytest.mark.slow
def test_the_command_of_the_readme(tmp_path: pathlib.Path) -> None:
    folder = make(tmp_path / "model")
    assert "python -m monai.bundle run" in export.write(folder, str(tmp_path / "bundle"), "bundle")
    write_scans(tmp_path / "scans", "CT")
    (line,) = (
        line
        for line in (tmp_path / "bundle/docs/README.md").read_text().splitlines()
        if "monai.bundle run" in line
    )
    command = line.replace("/folder/of/nifti", str(tmp_path / "scans")).split()
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path / "bundle", check=True)
    check_labels(folder, tmp_path / "scans", tmp_path / "bundle/eval", "CT")


def test_a_bundle_is_its_models_weights_and_repeats(tmp_path: pathlib.Path) -> None:
    folder, out = make(tmp_path / "model"), tmp_path / "bundle"
    export.write_bundle(folder, str(out))
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    names = {str(p.relative_to(out)) for p in before}
    assert {"LICENSE", "docs/README.md", "configs/logging.conf", "models/model.pt"} <= names
    state = torch.load(out / "models/model.pt", weights_only=True)
    _, weights = model.read(folder)
    assert set(state) == set(weights)
    assert all(torch.equal(state[name], weights[name]) for name in weights)
    export.write_bundle(folder, str(out))
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_a_bundle_does_not_land_on_other_files(tmp_path: pathlib.Path) -> None:
    folder = make(tmp_path / "model")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match="is not empty and not a bundle"):
        export.write_bundle(folder, str(tmp_path / "home"))
    assert [p.name for p in (tmp_path / "home").iterdir()] == ["thesis.txt"]


def test_onnx_runtime_agrees_for_any_batch(tmp_path: pathlib.Path) -> None:
    import onnxruntime

    folder, out = make_small(tmp_path / "model"), tmp_path / "network.onnx"
    parity = export.write_onnx(folder, str(out))
    assert parity.any_batch
    assert parity.max_abs_difference <= 1e-5 * parity.max_abs_logit
    assert parity.size_bytes == out.stat().st_size
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["network.onnx"], "weights beside the graph"
    spec, weights = model.read(folder)
    net = model.build(spec, weights)
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x_BCXYZ = torch.rand(batch, 1, 16, 16, 16)
        with torch.inference_mode():
            own = net(x_BCXYZ).logits.numpy()
        (other,) = session.run(["logits"], {"image": x_BCXYZ.numpy()})
        np.testing.assert_allclose(other, own, atol=1e-5)

    with torch.no_grad():
        list(net.parameters())[-1].add_(0.01)
    difference, largest = onnx._compare(logits_only(net), str(out), spec, (1,))
    assert difference > onnx.TOLERANCE * largest, "a weight that is slightly wrong goes unnoticed"


@pytest.mark.slow
@pytest.mark.parametrize("name", networks.names())
def test_every_backbone_becomes_onnx(name: str, tmp_path: pathlib.Path) -> None:
    folder = make(tmp_path / "model", name=name, size_vox=smallest_size(name))
    parity = export.write_onnx(folder, str(tmp_path / "network.onnx"))
    assert parity.max_abs_difference <= 1e-4 * parity.max_abs_logit
    assert "logits differ" in str(parity)


def smallest_size(name: str) -> tuple[int, int, int]:
    """A window that the smallest net of this name takes."""
    cfg = networks.config(name, networks.tiny(name))
    for size in ((32, 32, 32), (64, 64, 64)):
        with contextlib.suppress(UserError):
            networks.check_size(name, cfg, size)
            return size
    pytest.fail(f"{name} takes neither 32 nor 64 voxels")


def test_a_graph_that_differs_is_not_left_behind(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = make_small(tmp_path / "model"), tmp_path / "network.onnx"
    monkeypatch.setattr(onnx, "_trace", lambda net, name, shape_CXYZ, path: (True, 18))
    for differing in (0.01, math.nan):
        monkeypatch.setattr(onnx, "_compare", lambda net, path, spec, batches, found=differing: (found, 1.0))
        with pytest.raises(UserError, match=r"differ from PyTorch's by up to .*nothing is written"):
            export.write_onnx(folder, str(out))
        assert not out.exists()


def test_an_operator_that_onnx_lacks_is_named(tmp_path: pathlib.Path) -> None:
    class Airy(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.airy_ai(x)

    out = tmp_path / "network.onnx"
    with pytest.raises(
        UserError, match=r"'airynet' cannot be written as ONNX: ONNX has no operator for .*airy"
    ):
        onnx._trace(Airy(), "airynet", (1, 4, 4, 4), str(out))
    assert not out.exists()


def test_missing_packages_are_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "ONNX_PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(UserError, match=r"needs no_such_package; .*logonet\[export\]"):
        export.write_onnx(make(tmp_path / "model"), str(tmp_path / "network.onnx"))
