"""SegResNet (Myronenko 2018, without its autoencoder): MONAI's, with the interface of `Network`.

Letters: B batch, C input channels, F features, K classes, XYZ the crop's axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, MultipleOf
from torch import Tensor

from logonet.core.config import Count, Section
from logonet.core.errors import UserError
from logonet.networks import Network, Triple

GROUPS = 8  # of the group normalisation, and so what widths must be multiples of

TINY: dict[str, Any] = {"init_filters": 8, "blocks_down": (1, 1, 1), "blocks_up": (1, 1)}


@dataclass(frozen=True)
class Config(Section, key="backbone"):
    """The defaults are Myronenko's network.

    Attributes:
        init_filters: width at full resolution; each coarser level doubles it.
        blocks_down: residual blocks of each level of the encoder, fine to coarse.
        blocks_up: of each level of the decoder, coarse to fine; one level fewer.
    """

    init_filters: Annotated[int, Ge(GROUPS), MultipleOf(GROUPS)] = 32
    blocks_down: tuple[Count, ...] = (1, 2, 2, 4)
    blocks_up: tuple[Count, ...] = (1, 1, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.blocks_up or len(self.blocks_up) != len(self.blocks_down) - 1:
            raise UserError(
                f"backbone.blocks_up has {len(self.blocks_up)} entries and backbone.blocks_down "
                f"{len(self.blocks_down)}; give blocks_up one fewer than blocks_down"
            )

    @property
    def strides(self) -> tuple[int, ...]:
        """Voxels of the crop per voxel of each level's feature, fine to coarse."""
        return tuple(2**level for level in range(len(self.blocks_down)))


def size_multiple(cfg: Config) -> Triple:
    return (cfg.strides[-1],) * 3


def build(cfg: Config, in_channels: int, num_classes: int) -> Network:
    from monai.networks.nets import SegResNet as Wrapped

    return SegResNet(cfg, Wrapped(**options(cfg, in_channels, num_classes)))


def options(cfg: Config, in_channels: int, num_classes: int) -> dict[str, Any]:
    """MONAI's names for them. Without the final block, which it builds all the same, its ``decode`` stops before it."""
    same = {key: getattr(cfg, key) for key in ("init_filters", "blocks_down", "blocks_up")}
    return {"in_channels": in_channels, "out_channels": num_classes, "use_conv_final": False, **same}


class SegResNet(Network):
    """18,796,398 parameters and 244.64 G multiply-accumulates (as thop counts) at 96^3 with 14 classes.

    Features: the encoder's levels.
    """

    encoder_prefixes: tuple[str, ...] = ("net.convInit.", "net.down_layers.")
    head_prefixes: tuple[str, ...] = ("net.conv_final.2.",)

    def __init__(self, cfg: Config, net: Any) -> None:
        super().__init__()
        self.net = net
        self.strides = cfg.strides
        self.channels = tuple(cfg.init_filters * stride for stride in cfg.strides)
        self.feature_channels = cfg.init_filters

    def encode(self, x_BCXYZ: Tensor) -> list[Tensor]:
        return self.net.encode(x_BCXYZ)[1]

    def decode_features(self, x_BCXYZ: Tensor, feats: list[Tensor]) -> Tensor:
        norm, act, _ = self.net.conv_final
        return act(norm(self.net.decode(feats[-1], feats[::-1])))
