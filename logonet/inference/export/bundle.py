"""A MONAI bundle of a model."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

import logonet
from logonet.core.errors import UserError
from logonet.data import volume
from logonet.inference import model
from logonet.inference.export.shared import installed_version, public_version
from logonet.inference.sliding_window import Config as InferConfig
from logonet.storage import object_store

SCHEMA_URL = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
)
PACKAGES = ("logonet", "nibabel", "pytorch-ignite", "safetensors")  # what a bundle needs beside MONAI's own


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
    last = object_store.join(out_dir, "configs/metadata.json")
    if not object_store.exists(last) and any(object_store.listing(out_dir)):
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
        object_store.write(object_store.join(out_dir, name), data)


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
            "_target_": "logonet.inference.export.network",
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
    func = {
        "_target_": "logonet.inference.export.unit_range",
        "_mode_": "callable",
        "percentiles": percentiles,
    }
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
        "monai_version": public_version(monai.__version__),
        "pytorch_version": public_version(torch.__version__),
        "numpy_version": np.__version__,
        "required_packages_version": {
            name: installed_version(name) for name in PACKAGES if installed_version(name)
        },
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
