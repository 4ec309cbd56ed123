"""Convolutions in bfloat16 on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logonet import networks

CPU = torch.device("cpu")


def gradients(function: Callable[[], Tensor], *leaves: Tensor) -> list[Tensor]:
    out = function()
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    return [out.detach(), *torch.autograd.grad(out, leaves, seed.to(out.dtype))]


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("kind", ["dense", "strided", "depthwise", "transposed", "padding same"])
def test_gradients_of_small_maps(kind: str, kernel: int, axis: int, side: int) -> None:
    """Torch's own are wrong where a side is no longer than the kernel's, and on some sizes it crashes."""
    kwargs: dict[str, dict[str, object]] = {
        "dense": {"padding": kernel // 2},
        "strided": {"padding": kernel // 2, "stride": 2},
        "depthwise": {"padding": kernel // 2, "groups": 16},
        "transposed": {"padding": kernel // 2, "stride": 2, "output_padding": 1},
        "padding same": {"padding": "same"},
    }
    convolve: Callable[..., Tensor] = F.conv_transpose3d if kind == "transposed" else F.conv3d
    rng = torch.Generator().manual_seed(0)
    size = [6, 6, 6]
    size[axis] = side
    x = torch.randn((2, 16, *size), generator=rng).to(memory_format=torch.channels_last_3d)
    x = x.bfloat16().float().requires_grad_()
    shape = (16, 1 if kind == "depthwise" else 16, kernel, kernel, kernel)
    weight = (torch.randn(shape, generator=rng) / 10).bfloat16().float().requires_grad_()
    want = gradients(lambda: convolve(x, weight, **kwargs[kind]), x, weight)
    with networks.autocast("bf16", CPU):
        got = gradients(lambda: convolve(x, weight, **kwargs[kind]), x, weight)
    assert got[0].dtype == torch.bfloat16
    for name, ours, theirs in zip(("output", "input", "weight"), got, want):
        assert (ours - theirs).norm() < 0.02 * theirs.norm(), name


def test_large_maps_are_computed_in_bfloat16() -> None:
    x, conv = torch.randn(1, 4, 8, 8, 8), nn.Conv3d(4, 4, 3, padding=1)
    with networks.autocast("bf16", CPU):
        out = conv(x)
    rounded = F.conv3d(x.bfloat16(), conv.weight.bfloat16(), conv.bias.bfloat16(), padding=1)  # type: ignore[union-attr]
    torch.testing.assert_close(out, rounded, rtol=0, atol=0)
    with networks.autocast("fp32", CPU):
        assert conv(x).dtype == torch.float32
