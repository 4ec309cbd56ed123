"""A trained network for other programs: as a MONAI bundle, as ONNX, or as a checkpoint that nnU-Net finetunes.

The bundle repeats `logonet.inference.sliding_window` with MONAI's transforms and gives the same labels, except for
two things: interpolation sums in another order, so voxels where two classes are equally likely may differ; and
MONAI's Spacing may begin its grid up to half a voxel off on an oblique scan.

ONNX is the network alone, from one window of intensities in [0, 1] to logits; the program that runs it has to cut
and blend the windows.

For nnU-Net see `logonet.inference.export.nnunet`.

Letters: B windows, C input channels, K classes, XYZ axes of a window.
"""

from __future__ import annotations

from typing import Literal

from logonet.inference.export.bundle import (
    largest_components,
    region_labels,
    scaled,
    unit_range,
    write_bundle,
)
from logonet.inference.export.nnunet import write_nnunet
from logonet.inference.export.onnx import write_onnx
from logonet.inference.export.shared import network

# Bundles name the first five.
__all__ = [
    "largest_components",
    "network",
    "region_labels",
    "scaled",
    "unit_range",
    "write",
    "write_bundle",
    "write_nnunet",
    "write_onnx",
]


def write(folder_uri: str, out: str, format: Literal["bundle", "onnx"]) -> str:
    """Export the model, and return what to tell the user."""
    if format == "onnx":
        return f"{out}: {write_onnx(folder_uri, out)}"
    write_bundle(folder_uri, out)
    return f"{out}: run it there with 'python -m monai.bundle run --config_file configs/inference.json'"
