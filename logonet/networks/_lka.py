"""The blocks of ULKANet: large kernel attention, encoder, decoder (paper sections 3.1 and 7).

Letters: B batch, C channels, F features of the decoder, XYZ the volume's axes.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from logonet.core.config import Count, Section
from logonet.core.errors import UserError
from logonet.networks._conv import Upsample, channels_first, channels_last, conv
from logonet.networks._shared import chained

TINY: dict[str, Any] = {
    "dims": (8, 16, 24, 32),
    "depths": (1, 1, 1, 1),
    "mlp_ratios": (2, 2, 2, 2),
    "full_width": 8,
}

# Paper Table 12.
_VARIANTS: dict[str, dict[str, tuple[int, ...]]] = {
    "normal": {"dims": (64, 128, 256, 512), "depths": (3, 4, 6, 3), "mlp_ratios": (8, 8, 4, 4)},
    "large": {"dims": (96, 192, 384, 768), "depths": (3, 3, 24, 3), "mlp_ratios": (8, 8, 4, 4)},
}


@dataclass(frozen=True)
class UlkaConfig(Section, key="backbone"):
    """Options that ULKANet and LoGoNet share.

    Attributes:
        variant: presets of the three lists below (paper Table 12).
        dims: width of each encoder block.
        depths: LKA modules in each encoder block.
        mlp_ratios: hidden width of each MLP over its block's width.
        full_width: decoder width at full resolution.
        prenorm_residual: take the residual from the block's input, as is usual; the paper takes the normalised tensor.
        channels_last: memory layout only; about twice as fast on CPU.
        checkpointing: recompute LKA modules and Decs in backward: less memory, more time.
        lka: convolutions on fast routes ("polyphase"), or torch's own ("plain"): the same numbers.
    """

    variant: Literal["normal", "large"] = "normal"
    dims: tuple[Count, ...] | None = None
    depths: tuple[Count, ...] | None = None
    mlp_ratios: tuple[Count, ...] | None = None
    full_width: Count = 32
    prenorm_residual: bool = False
    channels_last: bool = True
    checkpointing: bool = False
    lka: Literal["polyphase", "plain"] = "polyphase"

    @property
    def plain(self) -> bool:
        return self.lka == "plain"

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


class LkaAttention(nn.Module):
    """eq. 2: 1x1(DiConv3D(ChConv3D(x)))."""

    def __init__(self, dim: int, plain: bool) -> None:
        super().__init__()
        self.local = conv(dim, dim, 5, groups=dim, plain=plain)
        self.dilated = conv(dim, dim, 7, dilation=3, groups=dim, plain=plain)
        self.point = conv(dim, dim, 1, plain=plain)

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        return self.point(self.dilated(self.local(x_BCXYZ)))


class Mlp(nn.Module):
    """Algorithm 4. Its line 5 can only act on the hidden width, and only depthwise is affordable there;
    its line 8 defines fc2 without applying it, which must be a slip."""

    def __init__(self, dim: int, hidden: int, plain: bool) -> None:
        super().__init__()
        self.fc1 = conv(dim, hidden, 1, plain=plain)
        self.depthwise = conv(hidden, hidden, 3, groups=hidden, plain=plain)
        self.fc2 = conv(hidden, dim, 1, plain=plain)

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.depthwise(F.gelu(self.fc1(x_BCXYZ)))))


class LkaModule(nn.Module):
    """Algorithm 3. It overwrites X by the normalised X, so the residual is taken from that
    (``prenorm=False``); ``prenorm=True`` is the usual residual around the normalisation."""

    def __init__(self, dim: int, mlp_ratio: int, cfg: UlkaConfig) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm3d(dim)
        self.attention = LkaAttention(dim, cfg.plain)
        self.norm2 = nn.BatchNorm3d(dim)
        self.mlp = Mlp(dim, mlp_ratio * dim, cfg.plain)
        self.prenorm = cfg.prenorm_residual

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
        self.lka = nn.ModuleList(LkaModule(dim, mlp_ratio, cfg) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.channels_last, self.checkpointing = cfg.channels_last, cfg.checkpointing

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        # A one-channel image has no layout of its own to hand on.
        x = self.patch_norm(to_layout(self.patch(x_BCXYZ), self.channels_last))
        for module in self.lka:
            x = run(module, x, self.checkpointing)
        return channels_first(self.norm(channels_last(x)))


def conv_block(ins: int, outs: int, plain: bool, activation: nn.Module | None = None) -> nn.Sequential:
    """Conv3D, BatchNorm, LeakyReLU (Figure 4) or another activation."""
    norm, activation = nn.BatchNorm3d(outs), activation or nn.LeakyReLU(0.01, inplace=True)
    return nn.Sequential(OrderedDict(conv=conv(ins, outs, 3, plain=plain), norm=norm, activation=activation))


def dec(ins: int, outs: int, plain: bool) -> nn.Sequential:
    """Three Conv blocks, then sides doubled (Figure 4)."""
    upsample = nn.Upsample(scale_factor=2, mode="trilinear", align_corners=False) if plain else Upsample()
    return nn.Sequential(conv_block(ins, outs, plain), *skip(outs, outs, plain), upsample)


def skip(ins: int, outs: int, plain: bool) -> nn.Sequential:
    """ "Conv x 2" of Figure 4."""
    return nn.Sequential(conv_block(ins, outs, plain), conv_block(outs, outs, plain))


class Decoder(nn.Module):
    """n + 1 Decs for n encoder blocks. A Dec keeps the width of the skip it was joined with; the first
    (the bottleneck) halves its input, the last goes to ``full_width``."""

    def __init__(self, in_channels: int, dims: list[int], cfg: UlkaConfig) -> None:
        super().__init__()
        coarse_to_fine = dims[-2::-1]
        self.decs = nn.ModuleList([dec(dims[-1], dims[-1] // 2, cfg.plain)])
        width = dims[-1] // 2
        for dim in coarse_to_fine:
            self.decs.append(dec(width + dim, dim, cfg.plain))
            width = dim
        self.decs.append(dec(width, cfg.full_width, cfg.plain))
        self.skips = nn.ModuleList(skip(dim, dim, cfg.plain) for dim in coarse_to_fine)
        self.skip_image = skip(in_channels, cfg.full_width, cfg.plain)
        self.last = conv_block(2 * cfg.full_width, cfg.full_width, cfg.plain)
        self.checkpointing = cfg.checkpointing

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
        columns = cfg.widths(blocks)
        dims = [dim for dim, _, _ in columns]
        self.encoder = nn.ModuleList(
            EncoderBlock(dims[i - 1] if i else in_channels, dim, depth, ratio, i == 0, cfg)
            for i, (dim, depth, ratio) in enumerate(columns)
        )
        self.decoder = Decoder(in_channels, dims, cfg)
        self.output = conv(cfg.full_width, out_channels, 1, plain=cfg.plain)
        self.dims = tuple(dims)
        self.strides = tuple(4 * 2**i for i in range(blocks))

    def encode(self, x_BCXYZ: Tensor) -> list[Tensor]:
        return chained(self.encoder, x_BCXYZ)


def seg_head(width: int, num_classes: int, plain: bool) -> nn.Sequential:
    """Conv3D, BatchNorm, GELU, classifier (Figure 1a)."""
    block = conv_block(width, width, plain, nn.GELU())
    block.add_module("classifier", conv(width, num_classes, 1, plain=plain))
    return block


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
    """The recomputation must not update BatchNorm's running statistics a second time."""
    norms: list[Any] = [m for m in module.modules() if isinstance(m, nn.BatchNorm3d)]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)
