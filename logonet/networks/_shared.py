"""What several networks share: names of normalisations, checks of options, positions of tokens."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from logonet.core.errors import UserError
from logonet.networks import Triple

# "instance" is MONAI's default, without learnt scale and shift; nnU-Net itself has them. "group" also
# works where the coarsest level is a single voxel.
Norm = Literal["instance", "instance_affine", "group"]
GROUPS = 4


def norm_name(norm: Norm | Literal["batch"]) -> Any:
    """MONAI's name of a normalisation."""
    options = {"instance_affine": {"affine": True}, "group": {"num_groups": GROUPS}}
    return (norm.removesuffix("_affine"), options[norm]) if norm in options else norm


def chained(modules: Iterable[Callable[[Tensor], Tensor]], x: Tensor) -> list[Tensor]:
    """The output of every module, each of which takes the one before it."""
    outputs = []
    for module in modules:
        x = module(x)
        outputs.append(x)
    return outputs


def upwards(stages: Iterable[Callable[[Tensor, Tensor], Tensor]], feats: Sequence[Tensor]) -> list[Tensor]:
    """The levels, fine to coarse, that a decoder's ``stages`` (coarse to fine) make of an encoder's features."""
    *skips, x = feats
    levels = []
    for stage, skip in zip(stages, reversed(skips)):
        x = stage(x, skip)
        levels.append(x)
    return levels[::-1]


def total_strides(strides: Sequence[Triple]) -> list[Triple]:
    """Voxels of the crop per voxel of each level, where ``strides`` lead from each level to the next."""
    so_far = (strides[: level + 1] for level in range(len(strides)))
    return [(math.prod(x), math.prod(y), math.prod(z)) for x, y, z in (zip(*s) for s in so_far)]


def check_levels(channels: Sequence[int], strides: Sequence[int]) -> None:
    """Refuse widths and strides of the levels that MONAI would choke on.

    Raises:
        UserError: naming the option.
    """
    if len(channels) < 2 or len(strides) != len(channels) - 1:
        raise UserError(
            f"backbone.channels has {len(channels)} entries and backbone.strides {len(strides)}; give at least 2 "
            "channels and one stride fewer"
        )


def check_heads(key: str, heads: Sequence[int], widths: Sequence[int]) -> None:
    """Refuse numbers of attention heads that do not divide the widths of their stages.

    Raises:
        UserError: naming the option ``key``.
    """
    if any(width % num for width, num in zip(widths, heads)):
        raise UserError(f"backbone.{key} is {heads}; they must divide the widths {widths}")


def check_groups(key: str, widths: Sequence[int], norm: Norm) -> None:
    """Refuse widths that group normalisation cannot divide.

    Raises:
        UserError: naming the option ``key``.
    """
    if norm == "group" and any(width % GROUPS for width in widths):
        raise UserError(
            f"backbone.{key} has {list(widths)}; with backbone.norm group each must be a multiple of {GROUPS}"
        )


def without_cross_attention(blocks: nn.ModuleList) -> nn.ModuleList:
    """MONAI's transformer blocks without the norm of a cross-attention that they never run: no gradient reaches it."""
    for block in blocks:
        block.cross_attn = block.norm_cross_attn = nn.Identity()  # type: ignore[assignment]
    return blocks


def sincos(grid: Triple, width: int) -> nn.Parameter:
    """Fixed vectors of positions, (1, N, width): sines and cosines along each axis (MONAI's), padded with zeros
    where 6 does not divide ``width``."""
    from monai.networks.blocks.pos_embed_utils import build_sincos_position_embedding

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of torch.meshgrid, whose default will change
        table = build_sincos_position_embedding(list(grid), width // 6 * 6, 3)
    return nn.Parameter(F.pad(table.detach(), (0, width % 6)), requires_grad=False)


def resized_positions(positions_1NE: Tensor, grid: Triple, new: Sequence[int]) -> Tensor:
    """Vectors of the positions of ``grid``, interpolated to the ``new`` one where it differs."""
    if tuple(new) == grid:
        return positions_1NE
    own_1Exyz = positions_1NE.transpose(1, 2).unflatten(2, grid)
    resized = F.interpolate(own_1Exyz, size=tuple(new), mode="trilinear", align_corners=False)
    return resized.flatten(2).transpose(1, 2)
