"""Attention U-Net (Oktay et al. 2018): MONAI's, with the interface of `Network`.

Letters: B batch, C input channels, F features, K classes, XYZ the crop's axes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from logonet.core.config import Count, Section
from logonet.networks import Network, Triple
from logonet.networks._shared import chained, check_levels

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


def size_multiple(cfg: Config) -> Triple:
    return (math.prod(cfg.strides),) * 3


class AttentionUnet(Network):
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
        """For each level but the coarsest, fine to coarse: the module that leads down and the one that leads up."""
        layer = self.net.model[1]
        for _ in self.channels[2:]:
            down, deeper = layer.submodule
            yield down, layer
            layer = deeper
        yield layer.submodule, layer

    def encode(self, x_BCXYZ: Tensor) -> list[Tensor]:
        return chained([self.net.model[0], *(down for down, _ in self._levels())], x_BCXYZ)

    def decode_features(self, x_BCXYZ: Tensor, feats: list[Tensor]) -> Tensor:
        *skips, f = feats
        layers = [layer for _, layer in self._levels()]
        for layer, skip in zip(reversed(layers), reversed(skips)):
            f = layer.upconv(f)
            f = layer.merge(torch.cat((layer.attention(g=f, x=skip), f), dim=1))
        return f


build = AttentionUnet
