"""Attention U-Net (Oktay et al. 2018): MONAI's, behind the backbones' contract.

Letters: B batch, C input channels, F features, K classes, XYZ the crop's axes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor, nn

from logonet.core.config import Count, Section
from logonet.networks import SegOut
from logonet.networks._monai import check_levels

TINY: dict[str, Any] = {"channels": (4, 8, 12), "strides": (2, 2)}


@dataclass(frozen=True)
class Config(Section, key="backbone"):
    """The defaults are the Attention U-Net of LoGoNet's Table 1.

    Attributes:
        channels: width of each level, fine to coarse; the gates are half as wide.
        strides: from each level to the next.
    """

    channels: tuple[Annotated[int, Ge(2)], ...] = (256, 256, 512, 512)
    strides: tuple[Count, ...] = (2, 2, 2)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_levels(self.channels, self.strides)


def size_multiple(cfg: Config) -> tuple[int, int, int]:
    return (math.prod(cfg.strides),) * 3


def build(cfg: Config, in_channels: int, num_classes: int) -> nn.Module:
    return AttentionUnet(cfg, in_channels, num_classes)


class AttentionUnet(nn.Module):
    """64,121,626 parameters and 7984.22 G multiply-accumulates (as thop counts) at 96^3 with 14 classes.

    Features: the encoder's levels. MONAI nests each level in the one above it, hence the names.
    """

    head_prefixes = ("net.model.2.",)

    def __init__(self, cfg: Config, in_channels: int, num_classes: int) -> None:
        super().__init__()
        from monai.networks.nets import AttentionUnet as Wrapped

        self.net: Any = Wrapped(3, in_channels, num_classes, cfg.channels, cfg.strides)
        self.channels = cfg.channels
        self.strides = tuple(math.prod(cfg.strides[:level]) for level in range(len(cfg.channels)))
        self.feature_channels = cfg.channels[0]
        names = {module: f"{name}." for name, module in self.named_modules()}
        self.encoder_prefixes = ("net.model.0.", *(names[down] for down, _ in self._levels()))

    def _levels(self) -> Iterator[tuple[Any, Any]]:
        """What leads down from each level but the coarsest, and that level's gated way up, fine to coarse."""
        layer = self.net.model[1]
        for _ in self.channels[2:]:
            down, deeper = layer.submodule
            yield down, layer
            layer = deeper
        yield layer.submodule, layer

    def encode(self, x_BCXYZ: Tensor) -> list[Tensor]:
        feats = [self.net.model[0](x_BCXYZ)]
        for down, _ in self._levels():
            feats.append(down(feats[-1]))
        return feats

    def decode_features(self, x_BCXYZ: Tensor, feats: list[Tensor]) -> Tensor:
        *skips, f = feats
        layers = [layer for _, layer in self._levels()]
        for layer, skip in zip(reversed(layers), reversed(skips)):
            f = layer.upconv(f)
            f = layer.merge(torch.cat((layer.attention(g=f, x=skip), f), dim=1))
        return f

    def decode(self, x_BCXYZ: Tensor, feats: list[Tensor]) -> SegOut:
        return SegOut(self.net.model[2](self.decode_features(x_BCXYZ, feats)), [], None)

    def forward(self, x_BCXYZ: Tensor) -> SegOut:
        return self.decode(x_BCXYZ, self.encode(x_BCXYZ))
