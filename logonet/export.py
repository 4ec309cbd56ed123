"""A trained segmentation network for others to run: a MONAI bundle, or ONNX.

The bundle repeats in MONAI's transforms what `logonet.infer` does, with the same labels but for two things:
interpolation is not summed in the same order, so voxels where two classes are equally likely may go the
other way; and MONAI's Spacing may begin its grid up to half a voxel off on an oblique scan.

ONNX is the network alone, one window of intensities in [0, 1] to logits: cutting windows and blending them
is left to whoever runs it.

Letters: B windows, C input channels, K classes, XYZ axes of a window.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

import logonet
from logonet import backbones, model, store, volume
from logonet.errors import UserError
from logonet.infer import Config as InferConfig

SCHEMA_URL = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
)
PACKAGES = ("logonet", "nibabel", "pytorch-ignite", "safetensors")  # what a bundle needs beside MONAI's own
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# Options that only choose a faster route to the same numbers, and what they are in a graph for any machine.
PLAIN = {"lka": "plain", "channels_last": False, "checkpointing": False}
TOLERANCE = 1e-3  # of the largest logit, between PyTorch and ONNX Runtime


def write(folder_uri: str, out: str, format: Literal["bundle", "onnx"]) -> str:
    """`bundle` or `onnx`, and what to tell the user of it."""
    if format == "onnx":
        return f"{out}: {onnx(folder_uri, out)}"
    bundle(folder_uri, out)
    return f"{out}: run it there with 'python -m monai.bundle run --config_file configs/inference.json'"


def bundle(folder_uri: str, out_dir: str) -> None:
    """Write a MONAI bundle (configs, weights, a page of documentation) of the model in ``folder_uri``.

    The same model gives the same bundle. It needs logonet where it runs, for the network's definition.

    Args:
        folder_uri: a folder of `model.files`, local or s3://.
        out_dir: the bundle's folder, local or s3://.

    Raises:
        UserError: when the model cannot be read, or ``out_dir`` holds something else.
    """
    spec, weights = model.read(folder_uri)
    model.build(spec, weights)  # a bundle whose weights do not fit would only fail at the clinic
    _need_plain_texts(spec)
    last = store.join(out_dir, "configs/metadata.json")
    if not store.exists(last) and any(store.listing(out_dir)):
        raise UserError(f"{out_dir} is not empty and not a bundle; name a new folder")
    state = io.BytesIO()
    torch.save({name: weights[name] for name in sorted(weights)}, state)
    files: dict[str, bytes | memoryview] = {
        "models/model.pt": state.getbuffer(),
        "configs/inference.json": _json(inference(spec)),
        "configs/logging.conf": LOGGING.encode(),
        "docs/README.md": _readme(spec).encode(),
        "LICENSE": LICENSE.encode(),
        "configs/metadata.json": _json(metadata(spec)),
    }
    for name, data in files.items():
        store.write(store.join(out_dir, name), data)


def _need_plain_texts(spec: model.Spec) -> None:
    """MONAI runs texts of a config that begin with "$"; class names come from whoever wrote the dataset.json.

    Raises:
        UserError: naming one that would be no text there.
    """
    texts = [*spec.classes, *(value for value in spec.backbone.values() if isinstance(value, str))]
    for text in texts:
        if text.lstrip().startswith(("$", "@", "%")):
            raise UserError(
                f"the model has a class or option called '{text}', which a MONAI config would not take as text; "
                "rename it in the dataset.json and finetune again"
            )


def network(backbone: Mapping[str, Any], in_channels: int, num_classes: int) -> nn.Module:
    """A backbone whose ``forward`` gives logits_BKXYZ alone, in eval mode; its state dict is the backbone's."""
    options = {key: value for key, value in backbone.items() if key != "name"}
    cfg = backbones.config(backbone["name"], options)
    return _logits_only(backbones.build(backbone["name"], in_channels, num_classes, cfg))


def _logits_only(net: nn.Module) -> nn.Module:
    # A hook rather than a module around it: the names of the weights stay what they are.
    net.register_forward_hook(lambda module, args, out: out.logits)
    return net.eval()


def unit_range(image: Any, percentiles: Sequence[float]) -> Any:
    """An MR scan mapped to [0, 1] between two percentiles of its nonzero voxels, as `volume.window` does."""
    low_share, high_share = percentiles
    low, high = volume.percentile_range(np.asarray(image), low_share, high_share, "the scan")
    return ((image - low) / (high - low)).clip(0, 1)


def inference(spec: model.Spec) -> dict[str, Any]:
    """``configs/inference.json``."""
    cfg = InferConfig()
    config: dict[str, Any] = {
        "imports": ["$import glob"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/data'",
        "output_dir": "$@bundle_root + '/eval'",
        "datalist": "$sorted(glob.glob(@dataset_dir + '/*.nii') + glob.glob(@dataset_dir + '/*.nii.gz'))",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": {
            "_target_": "logonet.export.network",
            "backbone": dict(spec.backbone),
            "in_channels": spec.in_channels,
            "num_classes": len(spec.classes),
        },
        "network": "$@network_def.to(@device)",
        "preprocessing": {"_target_": "Compose", "transforms": _preprocessing(spec)},
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': path} for path in @datalist]",
            "transform": "@preprocessing",
        },
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": list(spec.size_vox),
            "sw_batch_size": cfg.windows_per_batch,
            "overlap": cfg.overlap,
            "mode": "gaussian",
            "padding_mode": "constant",
        },
        "postprocessing": {"_target_": "Compose", "transforms": _postprocessing(spec)},
        "handlers": [
            {
                "_target_": "CheckpointLoader",
                "load_path": "$@bundle_root + '/models/model.pt'",
                "load_dict": {"model": "@network"},
                "map_location": "@device",
            }
        ],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
            "amp": False,
        },
        "run": ["$@evaluator.run()"],
    }
    if spec.modality == "mixed":
        config["modality"] = "CT"
    return config


def _preprocessing(spec: model.Spec) -> list[dict[str, Any]]:
    image = {"keys": "image"}
    steps: list[dict[str, Any]] = [
        {"_target_": "LoadImaged", **image, "reader": "NibabelReader", "ensure_channel_first": True},
        {"_target_": "Orientationd", **image, "axcodes": "RAS", "labels": None},
    ]
    if spec.spacing_mm is not None:
        pixdim = list(spec.spacing_mm)
        steps.append({"_target_": "Spacingd", **image, "pixdim": pixdim, "mode": "bilinear"})
    low, high = spec.window_hu
    ct = {
        "_target_": "ScaleIntensityRanged",
        **image,
        "a_min": low,
        "a_max": high,
        "b_min": 0.0,
        "b_max": 1.0,
    }
    ct |= {"clip": True}
    percentiles = list(spec.mr_percentiles)
    func = {"_target_": "logonet.export.unit_range", "_mode_": "callable", "percentiles": percentiles}
    mr: dict[str, Any] = {"_target_": "Lambdad", **image, "func": func}
    if spec.modality == "mixed":
        ct["_disabled_"], mr["_disabled_"] = "$@modality != 'CT'", "$@modality == 'CT'"
    steps += {"CT": [ct], "MR": [mr], "mixed": [ct, mr]}[spec.modality]
    return steps


def _postprocessing(spec: model.Spec) -> list[dict[str, Any]]:
    pred = {"keys": "pred"}
    values = list(spec.label_values)
    return [
        {
            "_target_": "Invertd",
            **pred,
            "transform": "@preprocessing",
            "orig_keys": "image",
            "nearest_interp": False,
            "to_tensor": True,
        },
        {"_target_": "AsDiscreted", **pred, "argmax": True},
        {
            "_target_": "MapLabelValued",
            **pred,
            "orig_labels": list(range(len(values))),
            "target_labels": values,
            "dtype": "$np.uint8",
        },
        {
            "_target_": "SaveImaged",
            **pred,
            "output_dir": "@output_dir",
            "output_postfix": "seg",
            "output_dtype": "$np.uint8",
            "resample": False,
            "separate_folder": False,
        },
    ]


def metadata(spec: model.Spec) -> dict[str, Any]:
    """``configs/metadata.json``."""
    import monai

    kind = {"CT": "hounsfield", "MR": "magnitude", "mixed": "hounsfield or magnitude"}[spec.modality]
    shape = list(spec.size_vox)
    organs = ", ".join(spec.classes[1:])
    image = {
        "type": "image",
        "format": kind,
        "modality": spec.modality,
        "num_channels": spec.in_channels,
        "spatial_shape": shape,
        "dtype": "float32",
        "value_range": [0, 1],
        "is_patch_data": True,
        "channel_def": {str(c): "image" for c in range(spec.in_channels)},
    }
    pred = {
        "type": "image",
        "format": "segmentation",
        "num_channels": len(spec.classes),
        "spatial_shape": shape,
        "dtype": "float32",
        "value_range": [],  # logits
        "is_patch_data": True,
        "channel_def": {str(k): name for k, name in enumerate(spec.classes)},
    }
    return {
        "schema": SCHEMA_URL,
        "version": logonet.__version__,
        "changelog": {logonet.__version__: "exported by logonet"},
        "monai_version": _public(monai.__version__),
        "pytorch_version": _public(torch.__version__),
        "numpy_version": np.__version__,
        "required_packages_version": {name: _version(name) for name in PACKAGES if _version(name)},
        "name": f"{spec.backbone['name']} segmentation of {organs}",
        "task": f"Segmentation of {organs} in {spec.modality} scans",
        "description": f"A {spec.backbone['name']} network trained with logonet.",
        "authors": "unstated: whoever trained the weights",
        "copyright": "see LICENSE",
        "data_type": "nibabel",
        "image_classes": f"one {spec.modality} scan, scaled to [0, 1]",
        "pred_classes": ", ".join(f"{v}: {name}" for v, name in zip(spec.label_values, spec.classes)),
        "intended_use": "Research. It has not been examined as a medical device.",
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": pred}},
    }


@dataclass(frozen=True)
class Parity:
    """How close ONNX Runtime comes to PyTorch on one random window for each batch size tried."""

    max_abs_difference: float
    max_abs_logit: float
    any_batch: bool  # else the graph takes one window at a time
    opset: int
    size_bytes: int

    def __str__(self) -> str:
        share = self.max_abs_difference / self.max_abs_logit
        return (
            f"logits differ from PyTorch's by at most {self.max_abs_difference:.1e} ({share:.1e} of the largest); "
            f"opset {self.opset}, {'any batch' if self.any_batch else 'batch 1'}, {self.size_bytes / 2**20:.1f} MiB"
        )


def onnx(folder_uri: str, out_file: str, tolerance: float = TOLERANCE) -> Parity:
    """Write the network as ONNX, ``image`` (B, C, X, Y, Z) to ``logits`` (B, K, X, Y, Z), once it is proven.

    Only the batch is free: the window is ``size_vox``. Where a network does not trace with a free batch, it
    is 1. ONNX Runtime's logits on random windows are compared with PyTorch's before anything is written.

    Args:
        folder_uri: a folder of `model.files`, local or s3://.
        out_file: local or s3://.
        tolerance: largest difference allowed, as a share of the largest logit.

    Raises:
        UserError: naming the operator that ONNX lacks, a package that is missing, or the difference found.
    """
    _need(ONNX_PACKAGES)
    spec, weights = model.read(folder_uri)
    name = spec.backbone["name"]
    known = {f.name for f in dataclasses.fields(backbones.config(name))}
    plain = {key: value for key, value in PLAIN.items() if key in known}
    traced = _logits_only(
        model.build(dataclasses.replace(spec, backbone={**spec.backbone, **plain}), weights)
    )
    with tempfile.TemporaryDirectory(prefix="logonet-onnx-") as folder:
        path = os.path.join(folder, "network.onnx")
        any_batch, opset = _trace(traced, name, (spec.in_channels, *spec.size_vox), path)
        # Compared with the network as it runs here, so that the plain routes are proven with it.
        own = _logits_only(model.build(spec, weights))
        difference, largest = _compare(own, path, spec, (1, 2) if any_batch else (1,))
        if not difference <= tolerance * largest:  # NaN too
            raise UserError(
                f"{folder_uri}: logits of the ONNX graph differ from PyTorch's by up to {difference:.2g}, more "
                f"than {tolerance:g} of the largest ({largest:.2g}); nothing is written, please report backbone "
                f"'{name}'"
            )
        store.write_file(path, out_file)
        return Parity(difference, largest, any_batch, opset, os.path.getsize(path))


def _trace(net: nn.Module, name: str, shape_CXYZ: Sequence[int], path: str) -> tuple[bool, int]:
    """Write ``net`` to ``path``; whether the batch is free, and the opset."""
    try:
        program = _export(net, torch.zeros(2, *shape_CXYZ), {0: torch.export.Dim("batch")})
        any_batch = True
    except (torch.onnx.OnnxExporterError, RuntimeError):
        any_batch = False
    if not any_batch:
        try:
            program = _export(net, torch.zeros(1, *shape_CXYZ), None)
        except (torch.onnx.OnnxExporterError, RuntimeError) as err:
            raise UserError(f"backbone '{name}' cannot be written as ONNX: {_reason(err)}") from None
    program.save(path, external_data=False)
    return any_batch, program.model.opset_imports[""]


def _export(net: nn.Module, x_BCXYZ: Tensor, dynamic: Mapping[int, Any] | None) -> Any:
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():  # it reports its progress there
        return torch.onnx.export(
            net,
            (x_BCXYZ,),
            dynamo=True,
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes=(dynamic,),
            verbose=False,
        )


def _reason(err: BaseException) -> str:
    """The operator at fault, as far as the exporter's pages of text tell, else their first sentence."""
    texts = [str(e) for e in _chain(err)]
    for text in texts:
        for pattern in (r"No ONNX function found for <OpOverload\(op='([\w:.]+)'", r"\b(aten[.:]+\w+[\w.]*)"):
            if found := re.search(pattern, text):
                return f"ONNX has no operator for {found.group(1)}"
    return " ".join(texts[-1].split())[:300]


def _chain(err: BaseException | None) -> Iterator[BaseException]:
    """Causes first."""
    if err is not None:
        yield from _chain(err.__cause__)
        yield err


def _compare(net: nn.Module, path: str, spec: model.Spec, batches: Sequence[int]) -> tuple[float, float]:
    """Largest absolute difference, and largest absolute logit, over random windows in [0, 1]."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    difference = largest = 0.0
    for batch in batches:
        x_BCXYZ = rng.random((batch, spec.in_channels, *spec.size_vox), np.float32)
        with torch.inference_mode():
            own_BKXYZ = net(torch.from_numpy(x_BCXYZ)).numpy()
        (other_BKXYZ,) = session.run(["logits"], {"image": x_BCXYZ})
        difference = max(difference, float(np.abs(own_BKXYZ - other_BKXYZ).max()))
        largest = max(largest, float(np.abs(own_BKXYZ).max()))
    return difference, largest


def _need(packages: Sequence[str]) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"ONNX export needs {', '.join(missing)}; install them with pip install 'logonet[export]'"
        )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _public(version: str) -> str:
    return version.split("+")[0]


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=4) + "\n").encode()


def _readme(spec: model.Spec) -> str:
    rows = "\n".join(f"| {v} | {name} |" for v, name in zip(spec.label_values, spec.classes))
    spacing = "its own" if spec.spacing_mm is None else "x".join(f"{s:g}" for s in spec.spacing_mm) + " mm"
    told = "\nSay which kind your scans are with `--modality CT` or `--modality MR`.\n"
    return README.format(
        backbone=spec.backbone["name"],
        modality=spec.modality,
        rows=rows,
        spacing=spacing,
        size="x".join(map(str, spec.size_vox)),
        version=logonet.__version__,
        told=told if spec.modality == "mixed" else "",
    )


README = """# {backbone} segmentation, {modality}

| value | class |
|---|---|
{rows}

Scans are turned to RAS axes, resampled to {spacing} and seen through windows of {size} voxels.

## Run it

    pip install logonet=={version} pytorch-ignite fire
    python -m monai.bundle run --config_file configs/inference.json --dataset_dir /folder/of/nifti

in this folder. Label maps are written to `eval/` on each scan's own voxels.
{told}
`jobs/predict.py` gives the same labels in less memory, except where two classes are about equally likely and
on oblique scans, where MONAI may begin its grid up to half a voxel off.
"""

LOGGING = """[loggers]
keys=root

[handlers]
keys=console

[formatters]
keys=plain

[logger_root]
level=INFO
handlers=console

[handler_console]
class=StreamHandler
level=INFO
formatter=plain
args=(sys.stdout,)

[formatter_plain]
format=%(asctime)s - %(name)s - %(levelname)s - %(message)s
"""

LICENSE = """The configuration files and documentation in this folder were written by logonet and are licensed
under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0

The weights in models/ are not covered by that. Their licence is a matter of whoever trained them and of
the scans they were trained on; ask the person who gave you this folder.
"""
