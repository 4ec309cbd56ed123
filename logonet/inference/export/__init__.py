"""A trained segmentation network for others to run: a MONAI bundle, or ONNX.

The bundle repeats in MONAI's transforms what `logonet.inference.sliding_window` does, with the same labels but for two
things: interpolation is not summed in the same order, so voxels where two classes are equally likely may go the
other way; and MONAI's Spacing may begin its grid up to half a voxel off on an oblique scan.

ONNX is the network alone, one window of intensities in [0, 1] to logits: cutting windows and blending them
is left to whoever runs it.

Letters: B windows, C input channels, K classes, XYZ axes of a window.
"""

from __future__ import annotations

from typing import Literal

from logonet.inference.export.bundle import bundle, inference, metadata, unit_range
from logonet.inference.export.onnx import Parity, onnx
from logonet.inference.export.shared import logits_only, network

__all__ = [
    "Parity",
    "bundle",
    "inference",
    "logits_only",
    "metadata",
    "network",
    "onnx",
    "unit_range",
    "write",
]


def write(folder_uri: str, out: str, format: Literal["bundle", "onnx"]) -> str:
    """`bundle` or `onnx`, and what to tell the user of it."""
    if format == "onnx":
        return f"{out}: {onnx(folder_uri, out)}"
    bundle(folder_uri, out)
    return f"{out}: run it there with 'python -m monai.bundle run --config_file configs/inference.json'"
