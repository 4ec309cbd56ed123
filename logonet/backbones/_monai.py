"""What the backbones that wrap MONAI's networks share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from logonet.errors import UserError

# "instance" is MONAI's default, without learnt scale and shift; nnU-Net itself has them. "group" also
# works where the coarsest level is a single voxel.
Norm = Literal["instance", "instance_affine", "group"]
GROUPS = 4


def norm_name(norm: Norm) -> Any:
    """MONAI's name of a normalisation."""
    names: dict[Norm, Any] = {
        "instance": "instance",
        "instance_affine": ("instance", {"affine": True}),
        "group": ("group", {"num_groups": GROUPS}),
    }
    return names[norm]


def check_coarsest(name: str, norm: Norm, multiple: Sequence[int], size_vox: Sequence[int]) -> None:
    """Refuse a crop whose coarsest feature would be one voxel, which instance normalisation cannot take.

    Raises:
        UserError: naming the nearest size that leaves two voxels or more.
    """
    if norm == "group" or any(side >= 2 * m for side, m in zip(size_vox, multiple)):
        return
    near = tuple(max(-(-side // m), 1) * m for side, m in zip(size_vox, multiple))
    if near == tuple(multiple):
        near = (2 * near[0], *near[1:])
    raise UserError(
        f"crop size {tuple(size_vox)} leaves backbone '{name}' one voxel at its coarsest level, where its "
        f"instance normalisation has nothing to average; set backbone.norm to group or use {near}"
    )
