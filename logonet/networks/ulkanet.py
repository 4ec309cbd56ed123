"""ULKANet used alone (paper section 3.1 and Table 6).

Letters: B batch, C input channels, F features, K classes, XYZ the crop's axes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from logonet.core.config import Count
from logonet.networks import Network, Triple
from logonet.networks._lka import TINY as TINY
from logonet.networks._lka import Ulka, UlkaConfig, to_layout


@dataclass(frozen=True)
class Config(UlkaConfig):
    """
    Attributes:
        blocks: encoder blocks.
    """

    blocks: Count = 4


def size_multiple(cfg: Config) -> Triple:
    stride = 2 ** (cfg.blocks + 1)
    return (stride,) * 3


class ULKANet(Network):
    """40,698,414 parameters and 115.1 G multiply-accumulates at 96^3 (normal, 14 classes)."""

    encoder_prefixes = ("net.encoder.",)
    head_prefixes = ("net.output.",)

    def __init__(self, cfg: Config, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.net = Ulka(cfg, cfg.blocks, in_channels, num_classes)
        self.channels, self.strides = self.net.dims, self.net.strides
        self.feature_channels = cfg.full_width
        self.channels_last = cfg.channels_last

    def encode(self, x_BCXYZ: Tensor) -> list[Tensor]:
        return self.net.encode(to_layout(x_BCXYZ, self.channels_last))

    def decode_features(self, x_BCXYZ: Tensor, feats: list[Tensor]) -> Tensor:
        return self.net.decoder(to_layout(x_BCXYZ, self.channels_last), feats)


build = ULKANet
