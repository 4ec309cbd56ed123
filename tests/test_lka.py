"""The fast routes of the convolutions give the numbers of ``F.conv3d``, forward and backward.

Letters: B batch, C and O channels, K kernel side, XYZ the volume's axes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logonet.networks import _conv

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = [(24, 9, 2), (7, 10, 25), (12, 12, 12), (6, 6, 6), (3, 3, 3), (4, 3, 7), (1, 5, 7)]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
LAYOUTS = {"channels_last": torch.channels_last_3d, "contiguous": torch.contiguous_format}
Conv = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def reference(**how: Any) -> Conv:
    return lambda x, weight, bias: F.conv3d(x, weight, bias, **how)


# name: our route, torch's, input channels, shape of the weight
ROUTES: dict[str, tuple[Conv, Conv, int, tuple[int, ...]]] = {
    "dilated": (_conv.dilated_depthwise, reference(padding=9, dilation=3, groups=6), 6, (6, 1, 7, 7, 7)),
    "depthwise 5": (_conv.depthwise, reference(padding=2, groups=6), 6, (6, 1, 5, 5, 5)),
    "depthwise 3": (_conv.depthwise, reference(padding=1, groups=6), 6, (6, 1, 3, 3, 3)),
    "dense": (_conv.dense, reference(padding=1), 6, (5, 6, 3, 3, 3)),
    "image": (_conv.dense, reference(padding=1), 1, (5, 1, 3, 3, 3)),
    "two images": (_conv.dense, reference(padding=1), 2, (5, 2, 3, 3, 3)),
    "point": (_conv.point, reference(), 6, (5, 6, 1, 1, 1)),
}


def results(conv: Conv, args: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of input, weight and bias, for a fixed output gradient."""
    leaves = [a.detach().to(dtype).requires_grad_() for a in args]
    out = conv(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(args[0].dtype)
    return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def every_case() -> list[Any]:
    """Batch, type, layout and size; by default all sizes of one kind, and the other kinds of two sizes."""
    cases = []
    for batch, dtype, layout, size in itertools.product((1, 2), TOLERANCES, LAYOUTS, SIZES):
        usual = (batch, dtype, layout) == (1, torch.float32, "channels_last")
        quick = usual or (size in SIZES[:2] and (dtype == torch.float32 or batch == 1))
        cases.append(pytest.param(batch, dtype, layout, size, marks=() if quick else pytest.mark.slow))
    return cases


@pytest.mark.parametrize(("batch", "dtype", "layout", "size"), every_case())
@pytest.mark.parametrize("route", ROUTES)
def test_equals_conv3d(
    route: str, batch: int, dtype: torch.dtype, layout: str, size: tuple[int, int, int]
) -> None:
    """Torch's side is in float64: its own bfloat16 weight gradients are wrong on the smallest maps.

    On processors without bfloat16 arithmetic torch sums an input's gradient in bfloat16 too: of a plain 5x5x5 depthwise
    convolution it is up to 0.028 off there.
    """
    summed_bf16 = dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    tolerance = TOLERANCES[dtype]
    ours, torchs, channels, weight_shape = ROUTES[route]
    rng = torch.Generator().manual_seed(0)
    x = torch.randn((batch, channels, *size), generator=rng).contiguous(memory_format=LAYOUTS[layout])
    weight, bias = torch.randn(weight_shape, generator=rng), torch.randn(weight_shape[0], generator=rng)
    args = (x.to(dtype), weight.to(dtype), bias.to(dtype))
    expected = results(torchs, args, torch.float64)
    for name, got, want in zip(("output", "input", "weight", "bias"), results(ours, args, dtype), expected):
        assert got.dtype == dtype, name
        bound = 2 * tolerance if summed_bf16 and name == "input" else tolerance
        assert (got - want).abs().max() <= bound * want.abs().max(), name


@pytest.mark.parametrize("size", [(12, 12, 12), (7, 10, 25), (6, 6, 6), (3, 3, 3)], ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_channels_last_is_handed_on(route: str, size: tuple[int, int, int]) -> None:
    """A route that fell back to another layout would put every later one on a slow path."""
    ours, _, channels, weight_shape = ROUTES[route]
    x = torch.randn(1, channels, *size).contiguous(memory_format=torch.channels_last_3d)
    out = ours(x, torch.randn(weight_shape), None)
    assert out.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("route", ["dilated", "depthwise 3", "depthwise 5"])
def test_a_view_of_channels_last_is_taken(route: str) -> None:
    """The local nets see octants of a larger volume."""
    ours, torchs, channels, weight_shape = ROUTES[route]
    x = torch.randn(1, channels, 12, 12, 12).contiguous(memory_format=torch.channels_last_3d)[..., 6:, :6, 6:]
    weight, bias = torch.randn(weight_shape), torch.randn(weight_shape[0])
    for got, want in zip(
        results(ours, (x, weight, bias), torch.float32), results(torchs, (x, weight, bias), torch.float32)
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_autocast_keeps_the_parameters_gradients_in_float32() -> None:
    layer = _conv.conv(4, 4, 5, groups=4, plain=False)
    x = torch.randn(1, 4, 6, 6, 6).contiguous(memory_format=torch.channels_last_3d)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(("kernel", "groups", "dilation"), [(3, 1, 1), (1, 1, 1), (5, 6, 1), (7, 6, 3)])
def test_plain_modules_are_torchs_and_hold_the_same_parameters(
    kernel: int, groups: int, dilation: int
) -> None:
    plain, fast = (
        _conv.conv(6, 6, kernel, groups=groups, dilation=dilation, plain=plain) for plain in (True, False)
    )
    assert type(plain) is nn.Conv3d  # thop counts this exact type
    fast.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(1, 6, 9, 8, 7).contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-5)


def test_compiles_into_one_graph() -> None:
    """Captured whole, without a break; the backend that runs the graph as it is needs no C compiler."""
    layer = _conv.conv(6, 6, 7, groups=6, dilation=3, plain=False)
    x = torch.randn(1, 6, 7, 6, 12).contiguous(memory_format=torch.channels_last_3d)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    ours, theirs = (torch.autograd.grad(f(x).square().sum(), layer.weight)[0] for f in (compiled, layer))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("layout", [torch.channels_last_3d, torch.contiguous_format])
def test_upsampling_is_torchs(layout: torch.memory_format) -> None:
    """Bit for bit, of a map that is joined with another, as its gradient is then a part of that of the whole."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5, 6).contiguous(memory_format=layout).requires_grad_()
    other = torch.randn(2, 2, 8, 10, 12).contiguous(memory_format=layout)
    plain = torch.nn.Upsample(scale_factor=2, mode="trilinear", align_corners=False)
    results = []
    for up in (_conv.Upsample(), plain):
        out = up(x)
        joined = torch.cat((out, other), dim=1)
        (grad,) = torch.autograd.grad(joined.square().sum(), x)
        results.append((out, grad))
        assert out.is_contiguous(memory_format=layout)
        assert grad.is_contiguous(memory_format=layout)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results))
