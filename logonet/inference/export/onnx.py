"""ONNX of a network, with a parity check against ONNX Runtime."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from logonet import networks
from logonet.core.config import Component, to_dict
from logonet.core.errors import UserError
from logonet.inference import model
from logonet.inference.export.shared import PLAIN, logits_only
from logonet.storage import object_store

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-3  # of the largest logit, between PyTorch and ONNX Runtime


@dataclass(frozen=True)
class Parity:
    """The agreement of ONNX Runtime with PyTorch on one random window per batch size."""

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


def write_onnx(folder_uri: str, out_file: str, tolerance: float = TOLERANCE) -> Parity:
    """Write the network as ONNX, ``image`` (B, C, X, Y, Z) to ``logits`` (B, K, X, Y, Z), once it is verified.

    Only the batch is free: the window is ``size_vox``. If a network does not trace with a free batch, the batch
    is 1. ONNX Runtime's logits on random windows are compared with PyTorch's before anything is written.

    Args:
        folder_uri: a folder of `model.files`, local or s3://.
        out_file: local or s3://.
        tolerance: largest difference allowed, as a share of the largest logit.

    Raises:
        UserError: naming the operator that ONNX lacks, a missing package, or the difference found.
    """
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"ONNX export needs {', '.join(missing)}; install them with pip install 'logonet[export]'"
        )
    spec, weights = model.read(folder_uri)
    name = spec.backbone.name
    portable = dataclasses.replace(
        spec, backbone=_portable(spec.backbone), ensemble=tuple(map(_portable, spec.ensemble))
    )
    traced = logits_only(model.build(portable, weights))
    with tempfile.TemporaryDirectory(prefix="logonet-onnx-") as folder:
        path = os.path.join(folder, "network.onnx")
        any_batch, opset = _trace(traced, name, (spec.in_channels, *spec.size_vox), path)
        # Compare with the network as it runs here, so that the check covers the plain options too.
        own = logits_only(model.build(spec, weights))
        difference, largest = _compare(own, path, spec, (1, 2) if any_batch else (1,))
        if not difference <= tolerance * largest:  # NaN too
            raise UserError(
                f"{folder_uri}: logits of the ONNX graph differ from PyTorch's by up to {difference:.2g}, more "
                f"than {tolerance:g} of the largest ({largest:.2g}); nothing is written, please report network "
                f"'{name}'"
            )
        object_store.write_file(path, out_file)
        return Parity(difference, largest, any_batch, opset, os.path.getsize(path))


def _portable(backbone: Component) -> Component:
    """The same network with the options of a portable graph."""
    known = {f.name for f in dataclasses.fields(networks.config(backbone.name))}
    plain = {key: value for key, value in PLAIN.items() if key in known}
    return Component(backbone.name, {**to_dict(backbone.config), **plain})


def _trace(net: nn.Module, name: str, shape_CXYZ: Sequence[int], path: str) -> tuple[bool, int]:
    """Write ``net`` to ``path``; whether the batch is free, and the opset."""
    for any_batch in (True, False):
        dynamic = {0: torch.export.Dim("batch")} if any_batch else None
        try:
            program = _export(net, torch.zeros(1 + any_batch, *shape_CXYZ), dynamic)
        except (torch.onnx.OnnxExporterError, RuntimeError) as err:
            fault = err
        else:
            program.save(path, external_data=False)
            return any_batch, program.model.opset_imports[""]
    raise UserError(f"network '{name}' cannot be written as ONNX: {_reason(fault)}")


def _export(net: nn.Module, x_BCXYZ: Tensor, dynamic: Mapping[int, Any] | None) -> Any:
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():  # the exporter prints its progress
        return torch.onnx.export(
            net,
            (x_BCXYZ,),
            dynamo=True,
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes=(dynamic,),
            verbose=False,
        )


def _reason(err: BaseException | None) -> str:
    """The operator that failed, if the exporter's long texts name it, else the first sentence of the cause."""
    texts: list[str] = []
    while err is not None:
        texts.insert(0, str(err))
        err = err.__cause__
    for text in texts:
        for pattern in (r"No ONNX function found for <OpOverload\(op='([\w:.]+)'", r"\b(aten[.:]+\w+[\w.]*)"):
            if found := re.search(pattern, text):
                return f"ONNX has no operator for {found.group(1)}"
    return " ".join(texts[-1].split())[:300]


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
