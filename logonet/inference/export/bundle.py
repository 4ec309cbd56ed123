"""A MONAI bundle of a model. What does not depend on the model is in ``templates/``."""

from __future__ import annotations

import importlib.metadata
import io
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np
import torch

import logonet
from logonet.core.config import to_dict
from logonet.core.errors import UserError
from logonet.data import volume
from logonet.data.preprocessing import Preprocessing
from logonet.inference import model, postprocessing
from logonet.inference.sliding_window import Config as InferConfig
from logonet.storage import object_store

PACKAGES = ("logonet", "nibabel", "pytorch-ignite", "safetensors")  # what a bundle needs beside MONAI's own


def write_bundle(folder_uri: str, out_dir: str) -> None:
    """Write a MONAI bundle (configs, weights, a page of documentation) of the model in ``folder_uri``.

    The same model gives the same bundle. Running it needs logonet, for the network's definition.

    Args:
        folder_uri: a folder of `model.files`, local or s3://.
        out_dir: the bundle's folder, local or s3://.

    Raises:
        UserError: when the model cannot be read, or ``out_dir`` holds something else.
    """
    spec, weights = model.read(folder_uri)
    model.build(spec, weights)  # a bundle whose weights do not fit would fail only where it is used
    _need_plain_texts(spec)
    last = object_store.join(out_dir, "configs/metadata.json")
    if not object_store.exists(last) and any(object_store.listing(out_dir)):
        raise UserError(f"{out_dir} is not empty and not a bundle; name a new folder")
    state = io.BytesIO()
    torch.save({name: weights[name] for name in sorted(weights)}, state)
    files: dict[str, bytes | memoryview] = {
        "models/model.pt": state.getbuffer(),
        "configs/inference.json": _json(inference(spec)),
        "configs/logging.conf": _template("logging.conf").encode(),
        "docs/README.md": _readme(spec).encode(),
        "LICENSE": _template("LICENSE").encode(),
        "configs/metadata.json": _json(metadata(spec)),
    }
    for name, data in files.items():
        object_store.write(object_store.join(out_dir, name), data)


def _need_plain_texts(spec: model.Spec) -> None:
    """MONAI evaluates texts of a config that begin with "$"; class names come from the author of the dataset.json.

    Raises:
        UserError: naming a text that MONAI would not take as text.
    """
    options = [value for part in spec.components for value in to_dict(part).values()]
    texts = [*spec.classes, *(v for v in options if isinstance(v, str))]
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


def scaled(image: Any, settings: Mapping[str, Any], modality: str) -> Any:
    """A scan's channels mapped to [0, 1] as the model's config says, where a window or `unit_range` does not do it."""
    array_CXYZ = np.asarray(image)
    low_high = Preprocessing.of(settings).intensity_range(array_CXYZ, modality, "the scan")
    return image * 0 + torch.from_numpy(volume.window(array_CXYZ, low_high))


def region_labels(logits_RXYZ: Any, region_values: Sequence[int]) -> Any:
    """The label map (1, X, Y, Z) of regions' logits: each region as its value, those later on top."""
    values_XYZ = torch.zeros_like(logits_RXYZ[:1])
    for logits_XYZ, value in zip(logits_RXYZ, region_values):
        values_XYZ[0][logits_XYZ > 0] = value
    return values_XYZ


def largest_components(labels_1XYZ: Any, values: Sequence[Sequence[int]], background: int) -> Any:
    """The label map (1, X, Y, Z) with the largest component alone of each class, or region, of ``values``."""
    labels_XYZ = torch.as_tensor(labels_1XYZ[0]).cpu().numpy().copy()
    for own in values:
        postprocessing.keep_largest(labels_XYZ, own, background)
    return labels_1XYZ * 0 + torch.from_numpy(labels_XYZ).to(labels_1XYZ.device)


def inference(spec: model.Spec) -> dict[str, Any]:
    """``configs/inference.json``."""
    config: dict[str, Any] = json.loads(_template("inference.json"))
    num_classes, options = spec.num_outputs, InferConfig()
    config["network_def"].update(
        backbone=to_dict(spec.backbone), in_channels=spec.in_channels, num_classes=num_classes
    )
    if spec.ensemble:
        parts = [to_dict(part) for part in spec.ensemble]
        config["network_def"].update(backbone=parts, regions=bool(spec.regions))
    config["inferer"].update(
        roi_size=list(spec.size_vox), sw_batch_size=options.windows_per_batch or 1, overlap=options.overlap
    )
    load, orientation, spacing, ct, mr = config["preprocessing"]["transforms"]
    ct["a_min"], ct["a_max"] = spec.window_hu
    mr["func"]["percentiles"] = list(spec.mr_percentiles)
    if spec.modality == "mixed":
        ct["_disabled_"], mr["_disabled_"] = "$@modality != 'CT'", "$@modality == 'CT'"
        config["modality"] = "CT"
    usual = {"CT": [ct], "MR": [mr], "mixed": [ct, mr]}
    if spec.modality in usual and spec.intensity == "auto":
        intensities = usual[spec.modality]
    elif spec.modality == "mixed":
        raise UserError("a bundle cannot tell how to scale scans of mixed modalities; use 'logonet predict'")
    else:
        settings = {"settings": to_dict(Preprocessing.of(spec)), "modality": spec.modality}
        intensities = [_call("image", "scaled", settings)]
    steps = [load, orientation, *intensities]
    if spec.spacing_mm is not None:
        steps.insert(2, {**spacing, "pixdim": list(spec.spacing_mm)})
    config["preprocessing"]["transforms"] = steps
    inverse, _, values, save = config["postprocessing"]["transforms"]
    values.update(orig_labels=list(range(num_classes)), target_labels=list(spec.label_values))
    if spec.regions:
        found = _call("pred", "region_labels", {"region_values": list(spec.region_values)})
        config["postprocessing"]["transforms"] = [inverse, found, save]
    if spec.largest_component:
        kept = [list(spec.scored[name]) for name in spec.largest_component]
        # Not MONAI's KeepLargestConnectedComponentd, which wants scikit-image and, of equal ones, may keep another.
        call = _call("pred", "largest_components", {"values": kept, "background": int(spec.written[0])})
        config["postprocessing"]["transforms"].insert(-1, call)
    return config


def _call(key: str, function: str, given: dict[str, Any]) -> dict[str, Any]:
    """A transform that calls one of our functions."""
    name = f"logonet.inference.export.{function}"
    return {"_target_": "Lambdad", "keys": key, "func": {"_target_": name, "_mode_": "callable", **given}}


def metadata(spec: model.Spec) -> dict[str, Any]:
    """``configs/metadata.json``."""
    import monai

    values: dict[str, Any] = json.loads(_template("metadata.json"))
    organs, backbone = ", ".join(spec.classes[1:]), " + ".join(part.name for part in spec.components)
    values.update(
        version=logonet.__version__,
        changelog={logonet.__version__: "exported by logonet"},
        monai_version=monai.__version__.split("+")[0],
        pytorch_version=torch.__version__.split("+")[0],
        numpy_version=np.__version__,
        required_packages_version={name: v for name in PACKAGES if (v := _installed(name))},
        name=f"{backbone} segmentation of {organs}",
        task=f"Segmentation of {organs} in {spec.modality} scans",
        description=f"A {backbone} network trained with logonet.",
        image_classes=f"one {spec.modality} scan, scaled to [0, 1]",
        pred_classes=", ".join(f"{v}: {name}" for v, name in zip(spec.label_values, spec.classes)),
    )
    formats = {"CT": "hounsfield", "MR": "magnitude", "mixed": "hounsfield or magnitude"}
    image = values["network_data_format"]["inputs"]["image"]
    image.update(format=formats.get(spec.modality, "hounsfield or magnitude"), modality=spec.modality)
    pred = values["network_data_format"]["outputs"]["pred"]
    for tensor, channels in (
        (image, ["image"] * spec.in_channels),
        (pred, list(spec.regions) or spec.classes),
    ):
        channel_def = {str(c): name for c, name in enumerate(channels)}
        tensor.update(num_channels=len(channels), spatial_shape=list(spec.size_vox), channel_def=channel_def)
    return values


def _template(name: str) -> str:
    return resources.files("logonet.inference.export").joinpath("templates", name).read_text()


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=4) + "\n").encode()


def _readme(spec: model.Spec) -> str:
    told = "\nSay which kind your scans are with `--modality CT` or `--modality MR`.\n"
    return _template("README.md").format(
        backbone=" + ".join(part.name for part in spec.components),
        modality=spec.modality,
        rows="\n".join(f"| {v} | {name} |" for v, name in zip(spec.label_values, spec.classes)),
        spacing="x".join(f"{s:g}" for s in spec.spacing_mm) + " mm" if spec.spacing_mm else "its own",
        size="x".join(map(str, spec.size_vox)),
        version=logonet.__version__,
        told=told if spec.modality == "mixed" else "",
    )
