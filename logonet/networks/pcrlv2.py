"""PCRLv2's 3D U-Net (Zhou et al. 2023), without skip connections as published or with them.

Letters: B batch, C input channels, F features, K classes, XYZ the crop's axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logonet.core.config import Count, Section
from logonet.networks import Network, Triple
from logonet.networks._conv import conv
from logonet.networks._lka import conv_block, to_layout

LEVELS = 4

TINY: dict[str, Any] = {"width": 4}


@dataclass(frozen=True)
class Config(Section, key="backbone"):
    """The defaults are the network that PCRLv2 pretrains.

    Attributes:
        width: of the first convolution; the finest level has twice as many features, each coarser one
            twice those of the level above.
        skips: join the encoder's maps into the decoder. The published net has no skips, so that pretraining
            must send all it learns through the coarsest level; its authors add them for segmentation.
        channels_last: memory layout and convolutions that are fast on a CPU, or torch's own: the same numbers.
    """

    width: Count = 32
    skips: bool = False
    channels_last: bool = True


def size_multiple(cfg: Config) -> Triple:
    return (2 ** (LEVELS - 1),) * 3


class PCRLv2(Network):
    """16,752,078 parameters and 653.7 G multiply-accumulates at 96^3 with 14 classes (as thop counts, 832.4 G).
    The published 17.1 M have 360,201 more, in heads of PCRLv2's own pretraining, which a method would own.

    The classifier gives logits; the published sigmoid is left to the loss. Features: the encoder's levels.
    """

    encoder_prefixes = ("encoder.",)
    head_prefixes = ("output.",)

    def __init__(self, cfg: Config, in_channels: int, num_classes: int) -> None:
        super().__init__()
        plain, widths = not cfg.channels_last, [2 * cfg.width * 2**level for level in range(LEVELS)]
        self.encoder = nn.ModuleList(
            # A level widens in two steps, the first of which leaves the level above's features as many.
            double_conv(widths[level - 1] if level else in_channels, width // 2, width, plain)
            for level, width in enumerate(widths)
        )
        coarse_to_fine = widths[-2::-1]
        self.ups = nn.ModuleList(nn.ConvTranspose3d(2 * width, 2 * width, 2, 2) for width in coarse_to_fine)
        ins = 3 if cfg.skips else 2  # widths of what a level of the decoder takes
        self.decoder = nn.ModuleList(double_conv(ins * w, w, w, plain) for w in coarse_to_fine)
        self.output = conv(widths[0], num_classes, 1, plain=plain)
        self.skips, self.channels_last = cfg.skips, cfg.channels_last
        self.channels = tuple(widths)
        self.strides = tuple(2**level for level in range(LEVELS))
        self.feature_channels = widths[0]

    def encode(self, x_BCXYZ: Tensor) -> list[Tensor]:
        x = to_layout(x_BCXYZ, self.channels_last)
        feats = [self.encoder[0](x)]
        for level in self.encoder[1:]:
            feats.append(level(F.max_pool3d(feats[-1], 2)))
        return feats

    def decode_features(self, x_BCXYZ: Tensor, feats: list[Tensor]) -> Tensor:
        *finer, f = feats
        for up, level, skip in zip(self.ups, self.decoder, reversed(finer)):
            f = to_layout(up(f), self.channels_last)
            f = level(torch.cat((f, skip), dim=1) if self.skips else f)
        return f


def double_conv(ins: int, mid: int, outs: int, plain: bool) -> nn.Sequential:
    """Conv3D, BatchNorm, ReLU, twice."""
    pairs = ((ins, mid), (mid, outs))
    return nn.Sequential(*(conv_block(*pair, plain, nn.ReLU(inplace=True)) for pair in pairs))


build = PCRLv2
