"""3D UX-Net (Lee et al. 2023): large depthwise convolutions in place of SwinUNETR's windows.

Letters: B batch, C input channels, F features, K classes, XYZ the crop's axes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logonet.core.config import OMIT_DEFAULT, Count, Section
from logonet.core.errors import UserError
from logonet.networks import Network, SegOut, Triple
from logonet.networks._conv import PointConv3d, channels_first, channels_last, conv
from logonet.networks._lka import to_layout
from logonet.networks._shared import GROUPS, Norm, check_groups

EXPANSION = 4  # hidden over outer width of a block
EPS = 1e-6  # of the encoder's layer normalisations

# "optimised" is the second of the paper's two nets, in the appendix: no bottleneck of 768 features, a deeper
# third stage. Neither the text nor the code says what replaces the bottleneck; see UXNet3D.
_DEPTHS: dict[str, tuple[int, ...]] = {"normal": (2, 2, 2, 2), "optimised": (2, 2, 8, 2)}

TINY: dict[str, Any] = {"feature_size": 8, "depths": (1, 1, 1, 1), "kernel_size": 3, "norm": "group"}


@dataclass(frozen=True)
class Config(Section, key="backbone"):
    """The defaults are the released network.

    Attributes:
        variant: "optimised" ends in one convolution block where "normal" has a residual block of twice the
            width, and has eight blocks in the third stage.
        feature_size: width at full resolution and of the first stage; each later stage doubles it.
        depths: blocks of each of the four stages; None is the variant's.
        kernel_size: of the depthwise convolutions; odd.
        scaling: how a block widens and narrows: each channel alone ("depthwise", the paper's DCS), all of them together
            ("mlp") or not at all ("none"), the latter two of the paper's ablation (section 6.3).
        block: "released" or, as the paper's Eq. 1 has it, "paper"; see ReleasedBlock and PaperBlock.
        norm: of the decoder; the encoder has layer normalisation.
        channels_last: memory layout and layers that are fast on a CPU, or torch's own: the same numbers. CUDA's layout
            is always torch's own.
        convolution: the large one's kind, "depthwise" or, of the paper's ablation, "dense".
        deep_supervision: give logits of the decoder's levels at a half and a quarter of the resolution in training, as
            the paper does in nnU-Net's frame (Table 6).
    """

    variant: Literal["normal", "optimised"] = "normal"
    feature_size: Count = 48
    depths: tuple[Count, Count, Count, Count] | None = None
    kernel_size: Count = 7
    scaling: Literal["depthwise", "mlp", "none"] = "depthwise"
    block: Literal["released", "paper"] = "released"
    norm: Norm = "instance"
    channels_last: bool = True
    convolution: Literal["depthwise", "dense"] = field(default="depthwise", metadata=OMIT_DEFAULT)
    deep_supervision: bool = field(default=False, metadata=OMIT_DEFAULT)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_groups("feature_size", (self.feature_size,), self.norm)
        if self.kernel_size % 2 == 0:
            raise UserError(f"backbone.kernel_size is {self.kernel_size}; it must be odd")


def size_multiple(cfg: Config) -> Triple:
    return 16, 16, 16


class UXNet3D(Network):
    """53,006,510 parameters and 632.28 G multiply-accumulates (as thop counts; 577.79 G in truth) at 96^3 with
    14 classes. The paper's 639.4 G belong to ``scaling="mlp"``.

    The optimised variant has 32,040,110 parameters, of which the paper's 32.1 M leave one candidate: a single
    convolution block of 384 features as the bottleneck. Its 626.58 G are far from the paper's 536.1 G, which
    no change at a 16th of the resolution reaches: all of the normal net's bottleneck costs about 20 G.

    With dense convolutions there are 186,858,830 parameters, the paper's 3.5 times as many.

    Features: the four stages, each normalised over its channels.
    """

    encoder_prefixes = ("stem.", "stem_norm.", "downs.", "down_norms.", "stages.", "out_norms.")
    strides = (2, 4, 8, 16)

    def __init__(self, cfg: Config, in_channels: int, num_classes: int) -> None:
        super().__init__()
        dims = [cfg.feature_size * 2**stage for stage in range(4)]
        self.stem = nn.Conv3d(in_channels, dims[0], 7, 2, 3)
        self.stem_norm = nn.LayerNorm(dims[0], EPS)
        self.downs = nn.ModuleList(nn.Conv3d(dim, 2 * dim, 2, 2) for dim in dims[:-1])
        self.down_norms = nn.ModuleList(nn.LayerNorm(dim, EPS) for dim in dims[:-1])
        kind = ReleasedBlock if cfg.block == "released" else PaperBlock
        self.stages = nn.ModuleList(
            nn.Sequential(*(kind(dim, cfg) for _ in range(depth)))
            for dim, depth in zip(dims, cfg.depths or _DEPTHS[cfg.variant])
        )
        self.out_norms = nn.ModuleList(nn.LayerNorm(dim, EPS) for dim in dims)

        # The decoder's widths, by level: one more than the encoder has stages, as the image is one too.
        last = 2 * dims[-1] if cfg.variant == "normal" else dims[-1]
        widths = [*dims, last]
        self.skips = nn.ModuleList(ResBlock(*pair, cfg) for pair in zip([in_channels, *dims], dims))
        bottleneck = ResBlock if cfg.variant == "normal" else ConvBlock
        self.bottleneck = bottleneck(dims[-1], last, cfg)
        self.ups = nn.ModuleList(Up(*pair, cfg) for pair in zip(widths[:0:-1], widths[-2::-1]))
        self.last = ResBlock(dims[0], dims[0], cfg)
        self.output = conv(dims[0], num_classes, 1, plain=not cfg.channels_last)
        self.deep_heads = nn.ModuleList(
            conv(dim, num_classes, 1, plain=not cfg.channels_last)
            for dim in (dims[1:3] if cfg.deep_supervision else ())
        )
        self.head_prefixes = ("output.", "deep_heads.") if cfg.deep_supervision else ("output.",)
        self.channels, self.feature_channels = tuple(dims), dims[0]
        self.cpu_layout = cfg.channels_last

    def encode(self, x_BCXYZ: Tensor) -> list[Tensor]:
        # A one-channel image has no layout of its own to hand on.
        x = channel_norm(self.stem_norm, layout(self.stem(x_BCXYZ), self.cpu_layout))
        feats = []
        for n, (stage, out_norm) in enumerate(zip(self.stages, self.out_norms)):
            if n:
                x = layout(self.downs[n - 1](channel_norm(self.down_norms[n - 1], x)), self.cpu_layout)
            x = stage(x)
            feats.append(channel_norm(out_norm, x))
        return feats

    def decode_features(self, x_BCXYZ: Tensor, feats: list[Tensor]) -> Tensor:
        return self.last(self._upwards(x_BCXYZ, feats)[0])

    def decode(self, x_BCXYZ: Tensor, feats: list[Tensor]) -> SegOut:
        if not (self.deep_heads and self.training):
            return super().decode(x_BCXYZ, feats)
        finest, *coarser = self._upwards(x_BCXYZ, feats)
        deep = [head(level) for head, level in zip(self.deep_heads, coarser)]
        return SegOut(self.output(self.last(finest)), deep, None)

    def _upwards(self, x_BCXYZ: Tensor, feats: list[Tensor]) -> list[Tensor]:
        """The decoder's levels, fine to coarse."""
        images = [layout(x_BCXYZ, self.cpu_layout), *feats[:-1]]
        f, levels = self.bottleneck(feats[-1]), []
        for up, skip, image in zip(self.ups, reversed(self.skips), reversed(images)):
            f = up(f, skip(image))  # not all skips at once: the finest takes most memory
            levels.append(f)
        return levels[::-1]


class Scaling(nn.Module):
    """Widen, GELU, narrow, by 1x1x1 convolutions within each channel or, as an MLP, across them."""

    def __init__(self, dim: int, cfg: Config) -> None:
        super().__init__()
        mlp = cfg.scaling == "mlp"
        kind = PointConv3d if mlp and cfg.channels_last else nn.Conv3d
        self.widen = kind(dim, EXPANSION * dim, 1, groups=1 if mlp else dim)
        self.narrow = kind(EXPANSION * dim, dim, 1, groups=1 if mlp else dim)

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        return self.narrow(F.gelu(self.widen(x_BCXYZ)))


class ReleasedBlock(nn.Module):
    """ConvNeXt's block: one residual around both convolutions, with a learnt scale, small at first.

    The paper's Eq. 1 has two residuals and no scale (PaperBlock). This is the default against the paper as
    its counts (53.0 M) and results are the released code's.
    """

    def __init__(self, dim: int, cfg: Config) -> None:
        super().__init__()
        self.large = large(dim, cfg)
        self.norm = nn.LayerNorm(dim, EPS)
        self.scaling = nn.Identity() if cfg.scaling == "none" else Scaling(dim, cfg)
        self.gamma = nn.Parameter(torch.full((dim,), 1e-6))

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        branch = self.scaling(channel_norm(self.norm, self.large(x_BCXYZ)))
        return torch.addcmul(x_BCXYZ, branch, self.gamma.view(-1, 1, 1, 1))


class PaperBlock(nn.Module):
    """Eq. 1: a residual around each convolution, normalisation before it; without scaling, the first alone."""

    def __init__(self, dim: int, cfg: Config) -> None:
        super().__init__()
        self.large = large(dim, cfg)
        self.norm1 = nn.LayerNorm(dim, EPS)
        self.scaled = cfg.scaling != "none"
        if self.scaled:
            self.scaling, self.norm2 = Scaling(dim, cfg), nn.LayerNorm(dim, EPS)

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        x = self.large(channel_norm(self.norm1, x_BCXYZ)) + x_BCXYZ
        return self.scaling(channel_norm(self.norm2, x)) + x if self.scaled else x


class ResBlock(nn.Module):
    """Two convolutions and a shortcut, which is a 1x1x1 convolution where the width changes: MONAI's."""

    def __init__(self, in_channels: int, out_channels: int, cfg: Config) -> None:
        super().__init__()
        self.first = ConvBlock(in_channels, out_channels, cfg)
        self.conv = unbiased(out_channels, out_channels, 3, cfg)
        self.norm = decoder_norm(out_channels, cfg)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            one = unbiased(in_channels, out_channels, 1, cfg)
            self.shortcut = nn.Sequential(one, decoder_norm(out_channels, cfg))

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        f = self.norm(self.conv(self.first(x_BCXYZ)))
        return F.leaky_relu(f + self.shortcut(x_BCXYZ), 0.01)


class ConvBlock(nn.Module):
    """Conv3D, normalisation, LeakyReLU."""

    def __init__(self, in_channels: int, out_channels: int, cfg: Config) -> None:
        super().__init__()
        self.conv = unbiased(in_channels, out_channels, 3, cfg)
        self.norm = decoder_norm(out_channels, cfg)

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.conv(x_BCXYZ)), 0.01)


class Up(nn.Module):
    """Sides doubled, joined with the level's skip, mixed by a residual block."""

    def __init__(self, in_channels: int, out_channels: int, cfg: Config) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(in_channels, out_channels, 2, 2, bias=False)
        self.mix = ResBlock(2 * out_channels, out_channels, cfg)
        self.cpu_layout = cfg.channels_last

    def forward(self, f_BCXYZ: Tensor, skip_BCXYZ: Tensor) -> Tensor:
        f = layout(self.up(f_BCXYZ), self.cpu_layout)
        return self.mix(torch.cat((f, skip_BCXYZ), dim=1))


def large(dim: int, cfg: Config) -> nn.Conv3d:
    """A block's convolution of ``kernel_size``."""
    groups = dim if cfg.convolution == "depthwise" else 1
    return conv(dim, dim, cfg.kernel_size, groups=groups, plain=not cfg.channels_last)


class InstanceNorm3d(nn.InstanceNorm3d):
    """As group normalisation with a group for each channel, which unlike torch's own keeps channels last."""

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        return F.group_norm(x_BCXYZ, self.num_features, self.weight, self.bias, self.eps)


def layout(x_BCXYZ: Tensor, cpu_layout: bool) -> Tensor:
    """Channels last on a CPU alone: CUDA's group normalisation would undo it after every convolution."""
    return to_layout(x_BCXYZ, cpu_layout and x_BCXYZ.device.type != "cuda")


def decoder_norm(channels: int, cfg: Config) -> nn.Module:
    if cfg.norm == "group":
        return nn.GroupNorm(GROUPS, channels)
    kind = InstanceNorm3d if cfg.channels_last else nn.InstanceNorm3d
    return kind(channels, affine=cfg.norm == "instance_affine")


def unbiased(in_channels: int, out_channels: int, kernel: int, cfg: Config) -> nn.Conv3d:
    """A convolution without bias, which the normalisation after it would take away."""
    return conv(in_channels, out_channels, kernel, bias=False, plain=not cfg.channels_last)


def channel_norm(norm: nn.Module, x_BCXYZ: Tensor) -> Tensor:
    return channels_first(norm(channels_last(x_BCXYZ)))


build = UXNet3D
