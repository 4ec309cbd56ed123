"""LoGoNet: one ULKANet on the whole crop, eight small ones on its octants (paper section 3.2).

Letters: B batch, C input channels, F features, K classes, XYZ the crop's axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from logonet.core.config import Count
from logonet.core.errors import UserError
from logonet.networks import Network, Triple, compiled
from logonet.networks._lka import TINY as TINY
from logonet.networks._lka import Ulka, UlkaConfig, seg_head, to_layout


@dataclass(frozen=True)
class Config(UlkaConfig):
    """
    Attributes:
        global_blocks: encoder blocks of the net that sees the whole crop.
        local_blocks: encoder blocks of each of the eight nets that see an octant.
    """

    global_blocks: Count = 4
    local_blocks: Count = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.local_blocks > self.global_blocks:
            raise UserError(
                f"backbone.local_blocks is {self.local_blocks}; it must be at most backbone.global_blocks "
                f"({self.global_blocks})"
            )


def size_multiple(cfg: Config) -> Triple:
    stride = max(2 ** (cfg.global_blocks + 1), 2 * 2 ** (cfg.local_blocks + 1))
    return (stride,) * 3


class LoGoNet(Network):
    """67,679,406 parameters and 246.2 G multiply-accumulates at 96^3 (normal, 14 classes); the paper
    prints 67.5 M and 246.96 G.

    Features: at each level that both nets have, the global features and, after them in the channel
    axis, the eight local ones put back into their 2 x 2 x 2 grid; deeper, the global features alone.
    """

    head_prefixes = ("head.",)

    def __init__(self, cfg: Config, in_channels: int, num_classes: int) -> None:
        super().__init__()
        width = cfg.full_width
        self.global_net = Ulka(cfg, cfg.global_blocks, in_channels, width)
        self.local_nets: Any = nn.ModuleList(
            Ulka(cfg, cfg.local_blocks, in_channels, width) for _ in range(8)
        )
        self.head = seg_head(width, num_classes, cfg.plain)
        dims, both = self.global_net.dims, cfg.local_blocks
        self.channels = tuple(2 * dim if level < both else dim for level, dim in enumerate(dims))
        self.strides = self.global_net.strides
        self.feature_channels = width
        self.encoder_prefixes = ("global_net.encoder.", *(f"local_nets.{n}.encoder." for n in range(8)))
        self.channels_last = cfg.channels_last

    def compile_parts(self) -> None:
        """Compile each net by itself: the eight local ones share what is compiled for the first."""
        for net in (self.global_net, *self.local_nets):
            net.encode, net.decoder.forward = compiled(net.encode), compiled(net.decoder.forward)

    def encode(self, x_BCXYZ: Tensor) -> list[Tensor]:
        x = to_layout(x_BCXYZ, self.channels_last)
        feats = self.global_net.encode(x)
        per_cube = [net.encode(cube) for net, cube in zip(self.local_nets, octants(x))]
        local = [join_octants(level) for level in zip(*per_cube)]
        both = len(local)
        return [torch.cat(pair, dim=1) for pair in zip(feats, local)] + feats[both:]

    def decode_features(self, x_BCXYZ: Tensor, feats: list[Tensor]) -> Tensor:
        x = to_layout(x_BCXYZ, self.channels_last)
        dims = self.global_net.dims
        whole = [feat[:, :dim] for feat, dim in zip(feats, dims)]
        both = len(self.local_nets[0].dims)
        per_level = [octants(feat[:, dim:]) for feat, dim in zip(feats[:both], dims)]
        per_cube = zip(self.local_nets, octants(x), zip(*per_level))
        local = [net.output(net.decoder(cube, list(levels))) for net, cube, levels in per_cube]
        return AddOctants.apply(self.global_net.output(self.global_net.decoder(x, whole)), *local)


def octants(x_BCXYZ: Tensor) -> list[Tensor]:
    """The eight half-sided sub-volumes (views); number 4i + 2j + k is half i of X, j of Y and k of Z."""
    return [octant for x in x_BCXYZ.chunk(2, 2) for xy in x.chunk(2, 3) for octant in xy.chunk(2, 4)]


def join_octants(cubes: Sequence[Tensor]) -> Tensor:
    """Undo `octants`."""
    rows = [torch.cat((cubes[n], cubes[n + 1]), dim=4) for n in (0, 2, 4, 6)]
    planes = [torch.cat((rows[n], rows[n + 1]), dim=3) for n in (0, 2)]
    return torch.cat(planes, dim=2)


class AddOctants(torch.autograd.Function):
    """``whole + join_octants(cubes)`` without joining them first: at full resolution each copy shows."""

    @staticmethod
    def forward(ctx: Any, whole_BCXYZ: Tensor, *cubes: Tensor) -> Tensor:
        out = whole_BCXYZ.clone()
        for part, cube in zip(octants(out), cubes):
            part.add_(cube)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads[0], *octants(grads[0])


build = LoGoNet
