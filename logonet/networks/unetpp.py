"""UNet++ (Zhou et al. 2018): MONAI's BasicUNetPlusPlus, with the interface of `Network`.

Letters: B batch, C input channels, F features, K classes, XYZ the crop's axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from logonet.core.config import Count, Section
from logonet.networks import Network, SegOut, Triple
from logonet.networks._shared import Norm, chained, check_groups, norm_name

LEVELS = 5  # fixed by MONAI
Width = Annotated[int, Ge(2)]  # the inner nodes halve it

TINY: dict[str, Any] = {"features": (4, 4, 8, 8, 12, 4), "norm": "group"}


@dataclass(frozen=True)
class Config(Section, key="backbone"):
    """The defaults are MONAI's; no widths are known that give the UNet++ of LoGoNet's Table 1.

    Attributes:
        features: width of each of the five levels, fine to coarse, and then of the last node.
        norm: of every convolution.
        deep_supervision: give the logits of the inner nodes at full resolution in training.
    """

    features: tuple[Count, Count, Width, Width, Width, Count] = (32, 32, 64, 128, 256, 32)
    norm: Norm = "instance_affine"
    deep_supervision: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_groups("features", self.features, self.norm)


def size_multiple(cfg: Config) -> Triple:
    return (2 ** (LEVELS - 1),) * 3


class UNetPlusPlus(Network):
    """6,980,174 parameters and 563.70 G multiply-accumulates (as thop counts) at 96^3 with 14 classes.

    MONAI's has 1,386 parameters and 1.19 G more: the classifiers of the three inner nodes at full resolution,
    which it also runs without deep supervision. Here they exist with it alone and run in training alone, and
    ``SegOut.deep`` then holds their logits, the last node's neighbour first. Features: the encoder's levels.
    """

    strides = tuple(2**level for level in range(LEVELS))
    encoder_prefixes = tuple(f"net.conv_{level}_0." for level in range(LEVELS))

    def __init__(self, cfg: Config, in_channels: int, num_classes: int) -> None:
        super().__init__()
        from monai.networks.nets import BasicUNetPlusPlus as Wrapped

        norm = norm_name(cfg.norm)
        self.net: Any = Wrapped(3, in_channels, num_classes, cfg.features, cfg.deep_supervision, norm=norm)
        heads = [f"final_conv_0_{column}" for column in range(LEVELS - 1, 0, -1)]
        if not cfg.deep_supervision:
            for head in heads[1:]:
                delattr(self.net, head)
            del heads[1:]
        self.heads = heads  # fine to coarse
        self.channels = cfg.features[:LEVELS]
        self.feature_channels = cfg.features[LEVELS]
        self.head_prefixes = tuple(f"net.{head}." for head in heads)

    def encode(self, x_BCXYZ: Tensor) -> list[Tensor]:
        return chained([getattr(self.net, f"conv_{level}_0") for level in range(LEVELS)], x_BCXYZ)

    def decode_features(self, x_BCXYZ: Tensor, feats: list[Tensor]) -> Tensor:
        return self._finest(feats)[-1]

    def decode(self, x_BCXYZ: Tensor, feats: list[Tensor]) -> SegOut:
        nodes = self._finest(feats)[::-1]
        last, *inner = [getattr(self.net, head) for head in self.heads]
        deep = [head(node) for head, node in zip(inner, nodes[1:])] if self.training else []
        return SegOut(last(nodes[0]), deep, None)

    def _finest(self, feats: list[Tensor]) -> list[Tensor]:
        """The decoder's nodes at full resolution, first to last. Node X(level, column) of the paper's Eq. 1 takes
        all nodes before it at its level and the one below the last of these."""
        grid = [[feat] for feat in feats]
        for diagonal in range(1, LEVELS):
            for column in range(1, diagonal + 1):
                level = diagonal - column
                # Not the block's own forward: it asks torch.jit for a type, which no compiler can follow.
                node, before = getattr(self.net, f"upcat_{level}_{column}"), grid[level]
                below = node.upsample(grid[level + 1][column - 1])
                before.append(node.convs(torch.cat((*before, below), dim=1)))
        return grid[0][1:]


build = UNetPlusPlus
