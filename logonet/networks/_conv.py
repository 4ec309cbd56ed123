"""Convolutions equal to torch's, on faster routes where torch's own is slow on a CPU.

Letters: B batch, C and O channels, K kernel side, XYZ the volume's axes.

What was measured (float32, one EPYC core, torch 2.13; ``benchmarks/lka.py`` repeats it):

- dilated depthwise has no fast kernel in any memory layout; a stride-3 split makes it an ordinary one;
- depthwise has a fast kernel forward (oneDNN's brdgmm, channels last), but none backward: both
  gradients are written as forward convolutions;
- 1x1x1 is 3 to 6 times faster as a matrix product, and keeps the layout, which torch's route loses;
- torch gives oneDNN a batch of one only if C*X*Y > 20480 (``ConvParams::use_mkldnn``) and else takes an
  im2col up to 9 times slower: such a volume is cut into slabs, which are a batch;
- the first convolution has too few input channels to vectorise over: the taps along Z become channels;
- trilinear upsampling's backward pass is 4 times slower on a strided gradient, such as that of a map that was
  concatenated with another: the gradient is made contiguous before.

On other devices, and in other layouts, everything but the split is torch's own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

_CHANNELS_LAST = torch.channels_last_3d
_ONEDNN_FLOOR = 20480  # of C * X * Y, for a batch of one
_FEW_CHANNELS = 4


def conv(
    ins: int, outs: int, kernel: int, *, dilation: int = 1, groups: int = 1, bias: bool = True, plain: bool
) -> nn.Conv3d:
    """A stride-1 convolution that keeps the volume's size.

    thop looks modules up by exact type, so it counts ``nn.Conv3d`` but none of its subclasses: count
    multiply-accumulates with ``plain``, which is torch's own throughout.
    """
    kind: type[nn.Conv3d] = Conv3d
    if plain:
        kind = nn.Conv3d
    elif groups > 1:
        kind = DepthwiseConv3d
    elif kernel == 1:
        kind = PointConv3d
    padding = dilation * (kernel // 2)
    return kind(ins, outs, kernel, padding=padding, dilation=dilation, groups=groups, bias=bias)


class Upsample(nn.Upsample):
    """Trilinear, sides doubled; bit for bit the same, forward and backward."""

    def __init__(self) -> None:
        super().__init__(scale_factor=2, mode="trilinear", align_corners=False)

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        return _Upsample.apply(x_BCXYZ) if _on_cpu(x_BCXYZ) else super().forward(x_BCXYZ)


class _Upsample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BCXYZ: Tensor) -> Tensor:
        ctx.size = x_BCXYZ.shape
        return F.interpolate(x_BCXYZ, scale_factor=2, mode="trilinear", align_corners=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous(memory_format=_CHANNELS_LAST)
        size = grad.shape[2:]
        return torch.ops.aten.upsample_trilinear3d_backward(grad, size, ctx.size, False, 2.0, 2.0, 2.0)


class Conv3d(nn.Conv3d):
    """Dense, odd kernel."""

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        return dense(x_BCXYZ, self.weight, self.bias)


class PointConv3d(nn.Conv3d):
    """Dense, kernel 1."""

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        return point(x_BCXYZ, self.weight, self.bias)


class DepthwiseConv3d(nn.Conv3d):
    """One filter per channel, dilation 1 or 3."""

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        route = dilated_depthwise if self.dilation[0] == 3 else depthwise
        return route(x_BCXYZ, self.weight, self.bias)


def dense(x_BCXYZ: Tensor, weight_OCKKK: Tensor, bias_O: Tensor | None) -> Tensor:
    """``F.conv3d(x, weight, bias, padding=K // 2)``; K may differ between the axes."""
    x, weight = x_BCXYZ, weight_OCKKK
    padding = [k // 2 for k in weight.shape[2:]]
    if not _on_cpu(x):
        return F.conv3d(x, weight, bias_O, padding=padding)
    if x.shape[1] <= _FEW_CHANNELS and weight.shape[4] > 1:
        return dense(*_taps_as_channels(x, weight), bias_O)
    b, c, nx, ny, _ = x.shape
    depth = nx // next((n for n in range(2, nx + 1) if nx % n == 0), 1)
    if b > 1 or c * nx * ny > _ONEDNN_FLOOR or depth == nx:
        return F.conv3d(x, weight, bias_O, padding=padding)
    halo = padding[0]
    x = F.pad(x, (0, 0, 0, 0, halo, halo))
    x = torch.cat([x[:, :, i : i + depth + 2 * halo] for i in range(0, nx, depth)])
    out = F.conv3d(x, weight, bias_O, padding=[0, *padding[1:]])
    # In channels last, slabs in the batch and one volume lie in memory alike.
    return channels_first(channels_last(out).reshape(1, nx, *out.shape[3:], out.shape[1]))


def _taps_as_channels(x_BCXYZ: Tensor, weight_OCKKK: Tensor) -> tuple[Tensor, Tensor]:
    o, c, kx, ky, kz = weight_OCKKK.shape
    b, _, *size = x_BCXYZ.shape
    taps_BCXYZK = F.pad(x_BCXYZ, (kz // 2, kz // 2)).unfold(4, kz, 1)
    x = taps_BCXYZK.permute(0, 2, 3, 4, 1, 5).reshape(b, *size, c * kz)
    # contiguous(): of one channel the reshape is a view whose voxels overlap.
    return channels_first(x.contiguous()), weight_OCKKK.permute(0, 1, 4, 2, 3).reshape(o, c * kz, kx, ky, 1)


def point(x_BCXYZ: Tensor, weight_OC111: Tensor, bias_O: Tensor | None) -> Tensor:
    """``F.conv3d(x, weight, bias)`` for kernel 1."""
    if not _on_cpu(x_BCXYZ):
        return F.conv3d(x_BCXYZ, weight_OC111, bias_O)
    return channels_first(F.linear(channels_last(x_BCXYZ), weight_OC111.flatten(1), bias_O))


def depthwise(x_BCXYZ: Tensor, weight_C1KKK: Tensor, bias_C: Tensor | None) -> Tensor:
    """``F.conv3d(x, weight, bias, padding=K // 2, groups=C)``; K may differ between the axes."""
    if not _on_cpu(x_BCXYZ):
        padding = [k // 2 for k in weight_C1KKK.shape[2:]]
        return F.conv3d(x_BCXYZ, weight_C1KKK, bias_C, padding=padding, groups=x_BCXYZ.shape[1])
    if torch.is_autocast_enabled("cpu"):  # a Function is not autocast
        dtype = torch.get_autocast_dtype("cpu")
        x_BCXYZ, weight_C1KKK = x_BCXYZ.to(dtype), weight_C1KKK.to(dtype)
        bias_C = None if bias_C is None else bias_C.to(dtype)
    return _Depthwise.apply(x_BCXYZ, weight_C1KKK, bias_C)


class _Depthwise(torch.autograd.Function):
    """Depthwise convolution of a channels-last volume whose gradients take the fast forward kernel."""

    @staticmethod
    def forward(ctx: Any, x_BCXYZ: Tensor, weight_C1KKK: Tensor, bias_C: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_BCXYZ, weight_C1KKK)
        ctx.padding = [k // 2 for k in weight_C1KKK.shape[2:]]
        return F.conv3d(x_BCXYZ, weight_C1KKK, bias_C, padding=ctx.padding, groups=x_BCXYZ.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous(memory_format=_CHANNELS_LAST)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = F.conv3d(grad, weight.flip(2, 3, 4), padding=ctx.padding, groups=x.shape[1])
        if ctx.needs_input_grad[1]:
            # The second wins for small kernels on large maps; the first everywhere else.
            by_conv = max(weight.shape[2:]) > 3 or x.shape[2:].numel() < 27
            route = _weight_grad_by_conv if by_conv else _weight_grad_by_planes
            wide = torch.promote_types(weight.dtype, torch.float32)  # a sum over all voxels
            grad_weight = route(x.to(wide), grad.to(wide), ctx.padding).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3, 4))
        return grad_x, grad_weight, grad_bias


def _weight_grad_by_conv(x_BCXYZ: Tensor, grad_BCXYZ: Tensor, padding: list[int]) -> Tensor:
    """The correlation of input and output gradient, as a depthwise convolution whose filter is the latter."""
    b, c, *size = x_BCXYZ.shape
    x = channels_first(x_BCXYZ.permute(2, 3, 4, 0, 1).reshape(1, *size, b * c))
    out = F.conv3d(x, grad_BCXYZ.reshape(b * c, 1, *size), padding=padding, groups=b * c)
    return out.reshape(b, c, 1, *out.shape[2:]).sum(0)


def _weight_grad_by_planes(x_BCXYZ: Tensor, grad_BCXYZ: Tensor, padding: list[int]) -> Tensor:
    """One 2D depthwise convolution for each tap along X; unlike 3D, torch has a fast gradient of that."""
    b, c, nx, ny, nz = x_BCXYZ.shape
    rx, ry, rz = padding

    def planes(v_BXYZC: Tensor) -> Tensor:
        return v_BXYZC.reshape(b * nx, ny, nz, c).permute(0, 3, 1, 2)

    x = F.pad(channels_last(x_BCXYZ), (0, 0, 0, 0, 0, 0, rx, rx))
    grad = planes(channels_last(grad_BCXYZ))
    size = (c, 1, 2 * ry + 1, 2 * rz + 1)
    shifted = (planes(x[:, i : i + nx]) for i in range(2 * rx + 1))
    taps = [conv2d_weight(part, size, grad, padding=(ry, rz), groups=c) for part in shifted]
    return torch.stack(taps, dim=2)


def dilated_depthwise(x_BCXYZ: Tensor, weight_C1KKK: Tensor, bias_C: Tensor | None) -> Tensor:
    """``F.conv3d(x, weight, bias, padding=3 * (K // 2), dilation=3, groups=C)``.

    The output at voxel p meets only inputs at p + 3*t, so the volume falls apart into 27 interleaved
    sub-volumes that never meet; each takes an ordinary convolution. Taps further apart than a
    sub-volume is long meet padding alone and are cut off.
    """
    size = x_BCXYZ.shape[2:]
    reach = [min(k // 2, -(-n // 3) - 1) for k, n in zip(weight_C1KKK.shape[2:], size)]
    weight = weight_C1KKK
    for axis, r in enumerate(reach, start=2):
        weight = weight.narrow(axis, weight.shape[axis] // 2 - r, 2 * r + 1)
    if not any(reach):
        out = x_BCXYZ * weight.view(-1, 1, 1, 1)  # a single tap is a scale
        return out if bias_C is None else out + bias_C.view(-1, 1, 1, 1)
    out = depthwise(_split(x_BCXYZ), weight, bias_C)
    return _join(out, size, x_BCXYZ.stride(1) == 1)


def _split(x_BCXYZ: Tensor) -> Tensor:
    """The 27 stride-3 sub-volumes, stacked into the batch; channels last."""
    px, py, pz = (-n % 3 for n in x_BCXYZ.shape[2:])
    x = channels_last(x_BCXYZ)
    x = F.pad(x, (0, 0, 0, pz, 0, py, 0, px)) if px or py or pz else x
    b, nx, ny, nz, c = x.shape
    x = x.reshape(b, nx // 3, 3, ny // 3, 3, nz // 3, 3, c).permute(2, 4, 6, 0, 1, 3, 5, 7)
    return channels_first(x.reshape(27 * b, nx // 3, ny // 3, nz // 3, c))


def _join(x_PCXYZ: Tensor, size: torch.Size, keep_last: bool) -> Tensor:
    """Undo `_split`."""
    p, c, nx, ny, nz = x_PCXYZ.shape
    x = channels_last(x_PCXYZ).reshape(3, 3, 3, p // 27, nx, ny, nz, c)
    if keep_last:
        x = channels_first(x.permute(3, 4, 0, 5, 1, 6, 2, 7).reshape(p // 27, 3 * nx, 3 * ny, 3 * nz, c))
    else:
        x = x.permute(3, 7, 4, 0, 5, 1, 6, 2).reshape(p // 27, c, 3 * nx, 3 * ny, 3 * nz)
    x = x[:, :, : size[0], : size[1], : size[2]]
    return x.contiguous(memory_format=_CHANNELS_LAST if keep_last else torch.contiguous_format)


def _on_cpu(x_BCXYZ: Tensor) -> bool:
    """On a CPU with channels fastest in memory: contiguous or, as an octant is, a view of such a volume."""
    return x_BCXYZ.device.type == "cpu" and (x_BCXYZ.stride(1) == 1 or x_BCXYZ.shape[1] == 1)


def channels_last(x_BCXYZ: Tensor) -> Tensor:
    return x_BCXYZ.permute(0, 2, 3, 4, 1)


def channels_first(x_BXYZC: Tensor) -> Tensor:
    return x_BXYZC.permute(0, 4, 1, 2, 3)
