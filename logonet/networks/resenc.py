"""nnU-Net's own networks: the residual encoder U-Net (Isensee et al. 2024, "nnU-Net Revisited") and the plain one
(Isensee et al. 2021), with the interface of `Network`.

Parameters have the names of the package dynamic-network-architectures, so weights go to nnU-Net and come from there
(`logonet.inference.export.nnunet`). It registers most of them under two names, and the encoder's under four; here each
has the first. The package itself is not used, since it installs torchvision, timm and a model hub's client.

Letters: B batch, C input channels, F features, K classes, XYZ the crop's axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logonet.core.config import Count, Section, SizeVox
from logonet.core.errors import UserError
from logonet.networks import Network, SegOut, Triple
from logonet.networks._shared import GROUPS, chained, check_groups, total_strides

ONE: Triple = (1, 1, 1)
Norm = Literal["instance_affine", "group"]

TINY: dict[str, Any] = {
    "features": (8, 12, 16),
    "kernel_size": ((3, 3, 3),) * 3,
    "strides": (ONE, (2, 2, 2), (2, 2, 2)),
    "blocks": (1, 2, 1),
    "norm": "group",
    "zero_init": False,
}


@dataclass(frozen=True)
class Config(Section, key="backbone"):
    """The defaults are ResEnc-L, which nnU-Net recommends; with its patches of M and XL the same network is ResEnc-M
    and ResEnc-XL, unless the patch asks for other strides or one more stage.

    Attributes:
        encoder: "residual", or "plain" for nnU-Net's first network, of stacked convolutions.
        features: width of each stage, fine to coarse.
        kernel_size, strides: of each stage along X, Y and Z; kernels are odd, the first stride is 1.
        blocks: residual blocks of each stage, or convolutions of a plain encoder; None is nnU-Net's 1, 3, 4, 6, 6, 6,
            ... or 2 everywhere.
        decoder_convs: of each of the decoder's stages; None is nnU-Net's 1, or 2 with a plain encoder.
        norm: nnU-Net's own is "instance_affine"; "group" also works where the coarsest stage is a single voxel.
        deep_supervision: give auxiliary logits of all of the decoder's stages in training.
        zero_init: the last norm of each residual block begins at 0, so that blocks begin as their skips.
    """

    encoder: Literal["residual", "plain"] = "residual"
    features: tuple[Count, ...] = (32, 64, 128, 256, 320, 320)
    kernel_size: tuple[SizeVox, ...] = ((3, 3, 3),) * 6
    strides: tuple[SizeVox, ...] = (ONE, *((2, 2, 2),) * 5)
    blocks: tuple[Count, ...] | None = None
    decoder_convs: Count | None = None
    norm: Norm = "instance_affine"
    deep_supervision: bool = False
    zero_init: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        stages = len(self.features)
        for key in ("kernel_size", "strides", "depths"):
            if len(getattr(self, key)) != stages or stages < 2:
                raise UserError(
                    f"backbone.features has {stages} entries and backbone.{key.replace('depths', 'blocks')} "
                    f"{len(getattr(self, key))}; give the same number of both, at least 2"
                )
        if self.strides[0] != ONE:
            raise UserError(f"backbone.strides begins with {self.strides[0]}; it must begin with {ONE}")
        if any(side % 2 == 0 for kernel in self.kernel_size for side in kernel):
            raise UserError(f"backbone.kernel_size is {self.kernel_size}; kernels must be odd")
        check_groups("features", self.features, self.norm)

    @property
    def residual(self) -> bool:
        return self.encoder == "residual"

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks, or convolutions, of each stage."""
        stages = len(self.features)
        return self.blocks or ((1, 3, 4, *(6,) * stages)[:stages] if self.residual else (2,) * stages)

    @property
    def convs(self) -> int:
        """Of each of the decoder's stages."""
        return self.decoder_convs or (1 if self.residual else 2)


def size_multiple(cfg: Config) -> Triple:
    return total_strides(cfg.strides)[-1]


class ResEnc(Network):
    """ResEnc-L has 102,348,226 parameters with 2 classes. Features: the encoder's stages."""

    encoder_prefixes = ("encoder.",)
    head_prefixes = ("decoder.seg_layers.",)

    def __init__(self, cfg: Config, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.encoder = _Encoder(cfg, in_channels)
        self.decoder = _Decoder(cfg, num_classes)
        self.channels, self.strides = cfg.features, tuple(total_strides(cfg.strides))
        self.feature_channels = cfg.features[0]
        for module in self.modules():
            if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
                nn.init.kaiming_normal_(module.weight, a=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if isinstance(module, _Block) and cfg.zero_init:
                nn.init.zeros_(module.conv2.norm.weight)

    def encode(self, x_BCXYZ: Tensor) -> list[Tensor]:
        return chained(self.encoder.stages, self.encoder.stem(x_BCXYZ))

    def decode_features(self, x_BCXYZ: Tensor, feats: list[Tensor]) -> Tensor:
        return self.decoder.levels(feats)[-1]

    def decode(self, x_BCXYZ: Tensor, feats: list[Tensor]) -> SegOut:
        *coarser, finest = self.decoder.levels(feats)
        *deep_heads, head = self.decoder.seg_layers.values()
        deep = [deep_head(level) for deep_head, level in zip(deep_heads, coarser)] if self.training else []
        return SegOut(head(finest), deep[::-1], None)


class _Encoder(nn.Module):
    def __init__(self, cfg: Config, in_channels: int) -> None:
        super().__init__()
        first, before = cfg.features[0], in_channels
        self.stem: nn.Module = nn.Identity()
        if cfg.residual:
            self.stem = _Convs(1, in_channels, first, cfg.kernel_size[0], ONE, cfg.norm)
            before = first
        stages: list[nn.Module] = []
        for width, *how, depth in zip(cfg.features, cfg.kernel_size, cfg.strides, cfg.depths):
            shape: Any = (depth, before, width, *how, cfg.norm)
            stages.append(_Blocks(*shape) if cfg.residual else nn.Sequential(_Convs(*shape)))
            before = width
        self.stages = nn.Sequential(*stages)


class _Decoder(nn.Module):
    """Stages coarse to fine: what is below enlarged, the skip beside it, convolutions; and a classifier of each stage,
    or of the last alone."""

    def __init__(self, cfg: Config, num_classes: int) -> None:
        super().__init__()
        below, above = cfg.features[:0:-1], cfg.features[-2::-1]
        kernels, strides = cfg.kernel_size[-2::-1], cfg.strides[:0:-1]
        self.stages = nn.ModuleList(
            _Convs(cfg.convs, 2 * width, width, kernel, ONE, cfg.norm)
            for width, kernel in zip(above, kernels)
        )
        self.transpconvs = nn.ModuleList(
            nn.ConvTranspose3d(old, new, stride, stride) for old, new, stride in zip(below, above, strides)
        )
        classified = range(len(above)) if cfg.deep_supervision else [len(above) - 1]
        # Named by their stage, as nnU-Net's are, which has them all.
        self.seg_layers = nn.ModuleDict({str(s): nn.Conv3d(above[s], num_classes, 1) for s in classified})

    def levels(self, feats: Sequence[Tensor]) -> list[Tensor]:
        """Every stage's output, coarse to fine."""
        *skips, x = feats
        levels = []
        for up, stage, skip in zip(self.transpconvs, self.stages, reversed(skips)):
            x = stage(torch.cat((up(x), skip), dim=1))
            levels.append(x)
        return levels


class _Conv(nn.Module):
    """A convolution, its norm and a leaky ReLU."""

    def __init__(
        self,
        old: int,
        new: int,
        kernel: Triple,
        stride: Triple,
        norm: Norm,
        bias: bool = True,
        act: bool = True,
    ) -> None:
        super().__init__()
        x, y, z = kernel
        self.conv = nn.Conv3d(old, new, kernel, stride, (x // 2, y // 2, z // 2), bias=bias)
        self.norm: Any = nn.GroupNorm(GROUPS, new) if norm == "group" else nn.InstanceNorm3d(new, affine=True)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return F.leaky_relu(x, inplace=True) if self.act else x


class _Convs(nn.Module):
    """Convolutions, the first of which changes width and resolution."""

    def __init__(self, depth: int, old: int, new: int, kernel: Triple, stride: Triple, norm: Norm) -> None:
        super().__init__()
        rest = (_Conv(new, new, kernel, ONE, norm) for _ in range(depth - 1))
        self.convs = nn.Sequential(_Conv(old, new, kernel, stride, norm), *rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.convs(x)


class _Block(nn.Module):
    """A residual block of ResNet-D (He et al. 2019), whose skip averages before it projects."""

    def __init__(self, old: int, new: int, kernel: Triple, stride: Triple, norm: Norm) -> None:
        super().__init__()
        self.conv1 = _Conv(old, new, kernel, stride, norm)
        self.conv2 = _Conv(new, new, kernel, ONE, norm, act=False)
        skip: list[nn.Module] = [nn.AvgPool3d(stride, stride)] if stride != ONE else []
        skip += [_Conv(old, new, ONE, ONE, norm, bias=False, act=False)] if old != new else []
        self.skip = nn.Sequential(*skip)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.conv2(self.conv1(x)) + self.skip(x), inplace=True)


class _Blocks(nn.Module):
    """Residual blocks, the first of which changes width and resolution."""

    def __init__(self, depth: int, old: int, new: int, kernel: Triple, stride: Triple, norm: Norm) -> None:
        super().__init__()
        rest = (_Block(new, new, kernel, ONE, norm) for _ in range(depth - 1))
        self.blocks = nn.Sequential(_Block(old, new, kernel, stride, norm), *rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


build = ResEnc
