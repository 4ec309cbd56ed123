"""Convolutions in bfloat16 on a CPU, of maps that are no longer than the kernel.

Their weights' gradients torch 2.13 (oneDNN) gets wrong on processors with AVX512-BF16: it writes beyond its
buffers, and the gradient is finite and wrong, or infinite, or the process crashes. Seen for kernels of 3, 5 and
7, strides 1 and 2, dense and depthwise, straight and transposed; never where each side is longer than the
kernel's. Such maps have few voxels, so they are convolved in float32 and the result is rounded, as bfloat16's
kernels do.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_OPERATORS: dict[str, Callable[..., Tensor]] = {
    "conv3d": torch.ops.aten.conv3d.default,
    "conv3d.padding": torch.ops.aten.conv3d.padding,
    "conv_transpose3d.input": torch.ops.aten.conv_transpose3d.input,
}


@functools.cache
def mend_autocast() -> torch.library.Library:
    """From now on ``torch.autocast("cpu")`` computes these convolutions in float32, in this process.

    In autocast itself, since a context around the forward pass would not reach what is computed again in the
    backward pass (``checkpointing``).

    Returns:
        What holds the change: it ends with this object.
    """
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # that a kernel is replaced
        for name, operator in _OPERATORS.items():
            library.impl(name, functools.partial(_convolve, operator), "AutocastCPU")
    return library


def _convolve(
    operator: Callable[..., Tensor], x_BCXYZ: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any
) -> Tensor:
    low = torch.get_autocast_dtype("cpu")
    short = any(kernel > 1 and side <= kernel for side, kernel in zip(x_BCXYZ.shape[2:], weight.shape[2:]))
    dtype = torch.float32 if short else low
    with torch.autocast("cpu", enabled=False):
        tensors = (t if t is None else t.to(dtype) for t in (x_BCXYZ, weight, bias))
        return operator(*tensors, *args).to(low)
