"""The residual U-Net (Kerfoot et al. 2018): MONAI's, with the interface of `Network`.

Letters: B batch, C input channels, F features, K classes, XYZ the crop's axes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from logonet.core.config import Count, Natural, Section
from logonet.networks import Network, SegOut, Triple
from logonet.networks._shared import chained, check_levels, norm_name

TINY: dict[str, Any] = {"channels": (4, 8, 12), "strides": (2, 2), "num_res_units": 1, "norm": "batch"}


@dataclass(frozen=True)
class Config(Section, key="backbone"):
    """The defaults are the network of MONAI's tutorials.

    Attributes:
        channels: width of each level, fine to coarse, and then of the bottom, at the last level's resolution.
        strides: of each level; that of the first is from the crop's resolution, so 1 keeps it.
        num_res_units: convolutions of each level's residual unit; 0 is a plain U-Net.
        norm: the last one normalises the logits, so there is none over groups of channels.
    """

    channels: tuple[Count, ...] = (16, 32, 64, 128, 256)
    strides: tuple[Count, ...] = (2, 2, 2, 2)
    num_res_units: Natural = 2
    norm: Literal["instance", "instance_affine", "batch"] = "batch"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_levels(self.channels, self.strides)


def size_multiple(cfg: Config) -> Triple:
    return (math.prod(cfg.strides),) * 3


class UNet(Network):
    """4,824,517 parameters and 25.34 G multiply-accumulates (as thop counts) at 96^3 with 14 classes.

    Features: the encoder's levels and the bottom. From the finest level MONAI's decoder goes to the logits in
    one transposed convolution (and, with residual units, a convolution of these). That is the classifier here,
    and `decode_features` gives what it takes, upsampled to full resolution; `decode` needs no upsampling.
    """

    def __init__(self, cfg: Config, in_channels: int, num_classes: int) -> None:
        super().__init__()
        from monai.networks.nets import UNet as Wrapped

        options: Any = {"num_res_units": cfg.num_res_units, "norm": norm_name(cfg.norm)}
        self.net: Any = Wrapped(3, in_channels, num_classes, cfg.channels, cfg.strides, **options)
        self.channels = cfg.channels
        strides = [math.prod(cfg.strides[: level + 1]) for level in range(len(cfg.strides))]
        self.strides = (*strides, strides[-1])
        self.feature_channels = cfg.channels[0] + cfg.channels[0 if len(cfg.strides) > 1 else 1]
        names = {module: f"{name}." for name, module in self.named_modules()}
        self.encoder_prefixes = tuple(names[down] for down, _ in self._levels())
        self.head_prefixes = ("net.model.2.",)

    def _levels(self) -> Iterator[tuple[Any, Any]]:
        """The way down to each level and up from it, fine to coarse; there is no way up from the bottom."""
        block = self.net.model
        for _ in self.channels[1:]:
            down, skip, up = block
            yield down, up
            block = skip.submodule
        yield block, None

    def encode(self, x_BCXYZ: Tensor) -> list[Tensor]:
        return chained([down for down, _ in self._levels()], x_BCXYZ)

    def decode_features(self, x_BCXYZ: Tensor, feats: list[Tensor]) -> Tensor:
        f, size = self._finest(feats), x_BCXYZ.shape[2:]
        return f if f.shape[2:] == size else F.interpolate(f, size, mode="trilinear")

    def decode(self, x_BCXYZ: Tensor, feats: list[Tensor]) -> SegOut:
        return SegOut(self.net.model[2](self._finest(feats)), [], None)

    def _finest(self, feats: list[Tensor]) -> Tensor:
        """What the classifier takes, at the resolution of the finest level."""
        *skips, f = feats
        _, *ups = [up for _, up in self._levels()][:-1]
        for up, skip in zip(reversed(ups), reversed(skips)):
            f = up(torch.cat((skip, f), dim=1))
        return torch.cat((skips[0], f), dim=1)


build = UNet
