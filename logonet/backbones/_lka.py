"""The blocks of ULKANet: large kernel attention, encoder, decoder (paper sections 3.1 and 7).

Letters: B batch, C channels, F features of the decoder, XYZ the volume's axes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from logonet.errors import UserError

LkaRoute = Literal["auto", "polyphase", "plain"]

# Paper Table 12.
_VARIANTS: dict[str, dict[str, tuple[int, ...]]] = {
    "normal": {"dims": (64, 128, 256, 512), "depths": (3, 4, 6, 3), "mlp_ratios": (8, 8, 4, 4)},
    "large": {"dims": (96, 192, 384, 768), "depths": (3, 3, 24, 3), "mlp_ratios": (8, 8, 4, 4)},
}


@dataclass(frozen=True)
class UlkaConfig:
    """Options that ULKANet and LoGoNet share."""

    variant: Literal["normal", "large"] = "normal"  # presets of the three lists below, paper Table 12
    dims: tuple[int, ...] | None = None  # width of each encoder block
    depths: tuple[int, ...] | None = None  # LKA modules in each encoder block
    mlp_ratios: tuple[int, ...] | None = None  # hidden width of each MLP over its block's width
    full_width: int = 32  # decoder width at full resolution
    prenorm_residual: bool = (
        False  # residual from the block's input (usual), not the normalised tensor (paper)
    )
    channels_last: bool = True  # memory layout only; about twice as fast on CPU
    checkpointing: bool = False  # recompute LKA modules and Decs in backward: less memory, more time
    lka: LkaRoute = "auto"  # how the dilated depthwise convolution runs; every route gives the same numbers

    def widths(self, blocks: int) -> list[tuple[int, int, int]]:
        """(dim, depth, mlp_ratio) of the first ``blocks`` encoder blocks."""
        columns = []
        for key, preset in _VARIANTS[self.variant].items():
            column = getattr(self, key) or preset
            if len(column) < blocks:
                raise UserError(
                    f"backbone.{key} has {len(column)} entries, but {blocks} encoder blocks are asked for; "
                    f"give {blocks} or ask for fewer blocks"
                )
            columns.append(column[:blocks])
        return list(zip(*columns))


class DilatedDepthwiseConv3d(nn.Conv3d):
    """DiConv3D of eq. 2: depthwise, kernel 7, dilation 3, padding 9.

    thop looks modules up by exact type, so it counts the plain ``nn.Conv3d`` only: count with
    ``lka="plain"``, or pass this class to thop's ``custom_ops``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 7, padding=9, dilation=3, groups=channels)

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        return dilated_depthwise(x_BCXYZ, self.weight, self.bias)


def dilated_depthwise(x_BCXYZ: Tensor, weight_C1KKK: Tensor, bias_C: Tensor | None) -> Tensor:
    """``F.conv3d(x, weight, bias, padding=9, dilation=3, groups=C)`` for K = 7, exactly.

    The output at voxel p meets only inputs at p + 3*t, so the volume falls apart into 27 interleaved
    sub-volumes that never meet. Each takes an ordinary convolution, for which there are fast kernels.
    """
    sub, size = _split(x_BCXYZ)
    reach = [min(3, n - 1) for n in sub.shape[2:]]  # taps beyond it only ever meet padding
    rx, ry, rz = reach
    weight = weight_C1KKK[:, :, 3 - rx : 4 + rx, 3 - ry : 4 + ry, 3 - rz : 4 + rz]
    out = F.conv3d(sub, weight, bias_C, padding=reach, groups=x_BCXYZ.shape[1])
    return _join(out, size)


def _split(x_BCXYZ: Tensor) -> tuple[Tensor, torch.Size]:
    """The 27 stride-3 sub-volumes, stacked into the batch (phases slowest)."""
    size = x_BCXYZ.shape[2:]
    px, py, pz = (-n % 3 for n in size)
    x = F.pad(x_BCXYZ, (0, pz, 0, py, 0, px)) if px or py or pz else x_BCXYZ
    b, c, nx, ny, nz = x.shape
    x = x.reshape(b, c, nx // 3, 3, ny // 3, 3, nz // 3, 3).permute(3, 5, 7, 0, 1, 2, 4, 6)
    return x.reshape(27 * b, c, nx // 3, ny // 3, nz // 3), size


def _join(x_PCXYZ: Tensor, size: torch.Size) -> Tensor:
    """Undo `_split`."""
    p, c, nx, ny, nz = x_PCXYZ.shape
    x = x_PCXYZ.reshape(3, 3, 3, p // 27, c, nx, ny, nz).permute(3, 4, 5, 0, 6, 1, 7, 2)
    x = x.reshape(p // 27, c, nx * 3, ny * 3, nz * 3)
    return x[:, :, : size[0], : size[1], : size[2]]


class LkaAttention(nn.Module):
    """eq. 2: 1x1(DiConv3D(ChConv3D(x)))."""

    def __init__(self, dim: int, lka: LkaRoute) -> None:
        super().__init__()
        self.local = nn.Conv3d(dim, dim, 5, padding=2, groups=dim)
        plain = lka == "plain"
        self.dilated = (
            nn.Conv3d(dim, dim, 7, padding=9, dilation=3, groups=dim)
            if plain
            else DilatedDepthwiseConv3d(dim)
        )
        self.point = nn.Conv3d(dim, dim, 1)

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        return self.point(self.dilated(self.local(x_BCXYZ)))


class Mlp(nn.Module):
    """Algorithm 4. Its line 5 can only act on the hidden width, and only depthwise is affordable there;
    its line 8 defines fc2 without applying it, which must be a slip."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv3d(dim, hidden, 1)
        self.depthwise = nn.Conv3d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Conv3d(hidden, dim, 1)

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.depthwise(F.gelu(self.fc1(x_BCXYZ)))))


class LkaModule(nn.Module):
    """Algorithm 3. It overwrites X by the normalised X, so the residual is taken from that
    (``prenorm=False``); ``prenorm=True`` is the usual residual around the normalisation."""

    def __init__(self, dim: int, mlp_ratio: int, prenorm: bool, lka: LkaRoute) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm3d(dim)
        self.attention = LkaAttention(dim, lka)
        self.norm2 = nn.BatchNorm3d(dim)
        self.mlp = Mlp(dim, mlp_ratio * dim)
        self.prenorm = prenorm

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        u = self.norm1(x_BCXYZ)
        x = torch.addcmul(x_BCXYZ if self.prenorm else u, self.attention(u), u)  # eq. 3
        v = self.norm2(x)
        return (x if self.prenorm else v) + self.mlp(v)


class EncoderBlock(nn.Module):
    """Patch embedding (Algorithm 2), LKA modules, LayerNorm over channels. Halves the sides, or
    quarters them in the first block."""

    def __init__(
        self, in_channels: int, dim: int, depth: int, mlp_ratio: int, first: bool, cfg: UlkaConfig
    ) -> None:
        super().__init__()
        kernel, stride = (7, 4) if first else (3, 2)
        self.patch = nn.Conv3d(in_channels, dim, kernel, stride, kernel // 2)
        self.patch_norm = nn.BatchNorm3d(dim)
        self.lka = nn.ModuleList(
            LkaModule(dim, mlp_ratio, cfg.prenorm_residual, cfg.lka) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.checkpointing = cfg.checkpointing

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        x = self.patch_norm(self.patch(x_BCXYZ))
        for module in self.lka:
            x = run(module, x, self.checkpointing)
        return self.norm(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


class ConvBlock(nn.Sequential):
    """Conv3D, BatchNorm, LeakyReLU (Figure 4)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv3d(in_channels, out_channels, 3, padding=1),
            nn.BatchNorm3d(out_channels),
            nn.LeakyReLU(inplace=True),
        )


def dec(in_channels: int, out_channels: int) -> nn.Sequential:
    """Three Conv blocks, then sides doubled (Figure 4)."""
    return nn.Sequential(
        ConvBlock(in_channels, out_channels),
        ConvBlock(out_channels, out_channels),
        ConvBlock(out_channels, out_channels),
        nn.Upsample(scale_factor=2, mode="trilinear", align_corners=False),
    )


def skip(in_channels: int, out_channels: int) -> nn.Sequential:
    """ "Conv x 2" of Figure 4."""
    return nn.Sequential(ConvBlock(in_channels, out_channels), ConvBlock(out_channels, out_channels))


class Decoder(nn.Module):
    """n + 1 Decs for n encoder blocks. A Dec keeps the width of the skip it was joined with; the first
    (the bottleneck) halves its input, the last goes to ``full_width``."""

    def __init__(self, in_channels: int, dims: list[int], full_width: int, checkpointing: bool) -> None:
        super().__init__()
        coarse_to_fine = dims[-2::-1]
        self.decs = nn.ModuleList([dec(dims[-1], dims[-1] // 2)])
        width = dims[-1] // 2
        for dim in coarse_to_fine:
            self.decs.append(dec(width + dim, dim))
            width = dim
        self.decs.append(dec(width, full_width))
        self.skips = nn.ModuleList(skip(dim, dim) for dim in coarse_to_fine)
        self.skip_image = skip(in_channels, full_width)
        self.last = ConvBlock(2 * full_width, full_width)
        self.checkpointing = checkpointing

    def forward(self, x_BCXYZ: Tensor, feats: list[Tensor]) -> Tensor:
        f = run(self.decs[0], feats[-1], self.checkpointing)
        for dec_i, skip_i, feat in zip(self.decs[1:], self.skips, feats[-2::-1]):
            f = torch.cat((f, run(skip_i, feat, self.checkpointing)), dim=1)
            f = run(dec_i, f, self.checkpointing)
        f = run(self.decs[-1], f, self.checkpointing)
        image = run(self.skip_image, x_BCXYZ, self.checkpointing)
        return run(self.last, torch.cat((f, image), dim=1), self.checkpointing)


class Ulka(nn.Module):
    """ULKANet(n, out): n encoder blocks, out channels at full resolution."""

    def __init__(self, cfg: UlkaConfig, blocks: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.columns = cfg.widths(blocks)
        dims = [dim for dim, _, _ in self.columns]
        self.encoder = nn.ModuleList(
            EncoderBlock(dims[i - 1] if i else in_channels, dim, depth, ratio, i == 0, cfg)
            for i, (dim, depth, ratio) in enumerate(self.columns)
        )
        self.decoder = Decoder(in_channels, dims, cfg.full_width, cfg.checkpointing)
        self.output = nn.Conv3d(cfg.full_width, out_channels, 1)
        self.dims = tuple(dims)
        self.strides = tuple(4 * 2**i for i in range(blocks))

    def encode(self, x_BCXYZ: Tensor) -> list[Tensor]:
        feats = []
        for block in self.encoder:
            x_BCXYZ = block(x_BCXYZ)
            feats.append(x_BCXYZ)
        return feats

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        return self.output(self.decoder(x_BCXYZ, self.encode(x_BCXYZ)))


def to_layout(x_BCXYZ: Tensor, channels_last: bool) -> Tensor:
    """The weights stay contiguous, as safetensors wants them: convolutions follow their input's layout."""
    return x_BCXYZ.contiguous(memory_format=torch.channels_last_3d) if channels_last else x_BCXYZ


def run(module: nn.Module, x: Tensor, checkpointing: bool) -> Tensor:
    """``module(x)``, its inner activations recomputed in backward if ``checkpointing``."""
    if not (checkpointing and torch.is_grad_enabled()):
        return module(x)

    def contexts() -> tuple[Any, Any]:
        return contextlib.nullcontext(), _frozen_statistics(module)

    return checkpoint(module, x, use_reentrant=False, context_fn=contexts)


@contextlib.contextmanager
def _frozen_statistics(module: nn.Module) -> Iterator[None]:
    """The recomputation must not move BatchNorm's running statistics a second time."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm3d)]
    if not module.training:
        norms = []
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
