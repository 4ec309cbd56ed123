"""What the backbones that wrap MONAI's networks share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from logonet.core.errors import UserError

# "instance" is MONAI's default, without learnt scale and shift; nnU-Net itself has them. "group" also
# works where the coarsest level is a single voxel.
Norm = Literal["instance", "instance_affine", "group"]
GROUPS = 4


def norm_name(norm: Norm | Literal["batch"]) -> Any:
    """MONAI's name of a normalisation."""
    names: dict[str, Any] = {
        "batch": "batch",
        "instance": "instance",
        "instance_affine": ("instance", {"affine": True}),
        "group": ("group", {"num_groups": GROUPS}),
    }
    return names[norm]


def check_groups(key: str, widths: Sequence[int], norm: Norm) -> None:
    """Refuse widths that group normalisation cannot divide.

    Raises:
        UserError: naming the option ``key``.
    """
    if norm == "group" and any(width % GROUPS for width in widths):
        raise UserError(
            f"backbone.{key} has {list(widths)}; with backbone.norm group each must be a multiple of {GROUPS}"
        )


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


def check_img_size(name: str, why: str, img_size: tuple[int, int, int], size_vox: Sequence[int]) -> None:
    """Refuse a crop that is not of the one size a network was built for; ``why`` is a relative clause.

    Raises:
        UserError: naming that size.
    """
    if tuple(size_vox) != img_size:
        raise UserError(
            f"crop size {tuple(size_vox)} does not fit backbone '{name}', {why}; set backbone.img_size to the "
            f"crop's size or use crops of {img_size}"
        )


def check_coarsest(
    name: str,
    norm: Norm | Literal["batch"],
    multiple: Sequence[int],
    size_vox: Sequence[int],
    instead: str = "group",
) -> None:
    """Refuse a crop whose coarsest feature would be one voxel, which instance normalisation cannot take;
    ``instead`` is the one that can.

    Raises:
        UserError: naming the nearest size that leaves two voxels or more.
    """
    if norm in ("group", "batch") or any(side >= 2 * m for side, m in zip(size_vox, multiple)):
        return
    near = tuple(max(-(-side // m), 1) * m for side, m in zip(size_vox, multiple))
    if near == tuple(multiple):
        near = (2 * near[0], *near[1:])
    raise UserError(
        f"crop size {tuple(size_vox)} leaves backbone '{name}' one voxel at its coarsest level, where its "
        f"instance normalisation has nothing to average; set backbone.norm to {instead} or use {near}"
    )
