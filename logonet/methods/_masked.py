"""What methods that hide parts of a crop and rebuild them share.

Shapes: B samples, C input channels, X Y Z the crop's axes, xyz those of its patches, N patches (C order), V those
that are seen, P numbers of a patch (C times its voxels), E the encoder's width, D the decoder's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from logonet.core.errors import UserError
from logonet.methods import DataSpec
from logonet.networks import TokenNetwork, Triple
from logonet.networks._shared import resized_positions, sincos, without_cross_attention

STILL = 1e-3  # share of the true variance; only constant predictions stay below it


def space_to_depth(image_BCXYZ: Tensor, patch: Sequence[int]) -> Tensor:
    """Each patch's voxels as channels, (B, P, x, y, z), in the order C, X, Y, Z."""
    px, py, pz = patch
    cut = "b c (x px) (y py) (z pz) -> b (c px py pz) x y z"
    return rearrange(image_BCXYZ, cut, px=px, py=py, pz=pz)


def depth_to_space(map_BPxyz: Tensor, patch: Sequence[int]) -> Tensor:
    """The 3D pixel shuffle that undoes `space_to_depth`."""
    px, py, pz = patch
    joint = "b (c px py pz) x y z -> b c (x px) (y py) (z pz)"
    return rearrange(map_BPxyz, joint, px=px, py=py, pz=pz)


def patches(image_BCXYZ: Tensor, patch: Sequence[int]) -> Tensor:
    """(B, N, P)."""
    return space_to_depth(image_BCXYZ, patch).flatten(2).transpose(1, 2)


def grid_of(size_vox: Sequence[int], patch_vox: Triple) -> Triple:
    """Patches along X, Y and Z."""
    x, y, z = (side // patch for side, patch in zip(size_vox, patch_vox))
    return x, y, z


def draw_visible(num_patches: int, num_visible: int, rng: np.random.Generator) -> np.ndarray:
    """The visible patches, int64 (V,), in ascending order."""
    return np.sort(rng.permutation(num_patches)[:num_visible])


def unseen(keep_BV: Tensor, num_patches: int) -> Tensor:
    """All patches except ``keep``, bool (B, N)."""
    every_BN = torch.ones(len(keep_BV), num_patches, dtype=torch.bool, device=keep_BV.device)
    return every_BN.scatter(1, keep_BV, False)


def over_patches(error_BNP: Tensor, which_BN: Tensor) -> Tensor:
    """The mean error of each sample over the patches in ``which`` (bool), (B,)."""
    return (error_BNP.mean(2) * which_BN).sum(1) / which_BN.sum(1)


def enlarged(map_Bxyz: Tensor, times: Sequence[int]) -> Tensor:
    """Each cell repeated along X, Y and Z."""
    for axis, n in enumerate(times, start=1):
        map_Bxyz = map_Bxyz.repeat_interleave(n, dim=axis)
    return map_Bxyz


def masked_error(
    guess_BCXYZ: Tensor, image_BCXYZ: Tensor, hidden_B1XYZ: Tensor, squared: bool = False
) -> Tensor:
    """Of each sample the mean absolute, or squared, error over hidden voxels, (B,), in float32; 0 where none is hidden.

    SimMIM divides the batch's sum by the batch's count, which is the same where every sample hides as many voxels.
    """
    error_BCXYZ = guess_BCXYZ.float() - image_BCXYZ
    error_BCXYZ = (error_BCXYZ.square() if squared else error_BCXYZ.abs()) * hidden_B1XYZ
    count_B = image_BCXYZ.shape[1] * hidden_B1XYZ.flatten(1).sum(1)
    return error_BCXYZ.flatten(1).sum(1) / (count_B + 1e-5)


def check_patch(patch_vox: Triple, network: TokenNetwork) -> None:
    """Refuse a network whose tokens are of another size."""
    if patch_vox != network.embed_stride:
        raise UserError(
            f"method.patch_vox is {patch_vox} and a token of {type(network).__name__} has {network.embed_stride} "
            f"voxels; set method.patch_vox to {network.embed_stride}"
        )


def check_decoder(width: int, num_heads: int) -> None:
    if width % num_heads:
        raise UserError(
            f"method.decoder_width is {width}; it must be a multiple of method.decoder_heads ({num_heads})"
        )


def divides(patch_vox: Triple, size_vox: Sequence[int]) -> bool:
    """Whether patches fill a crop."""
    return all(side % patch == 0 for side, patch in zip(size_vox, patch_vox))


def spread(guess: Tensor, truth: Tensor, hidden: Tensor) -> Tensor:
    """A metric (total, count): the variance, within each sample, of what was guessed for hidden voxels over that of
    the truth. All are (B, ...) and ``hidden`` is bool, which may have axes of 1 and hides the same number in each.
    """
    with torch.no_grad():
        where_BV = hidden.expand_as(truth).flatten(1)
        flat = [x.double().flatten(1) for x in (guess, truth)]
        # Products, not indices: how many a mask picks is known on CUDA only once all work before it is done.
        means = [(x * where_BV).sum(1, keepdim=True) / where_BV.sum(1, keepdim=True) for x in flat]
        return torch.stack([((x - mean) * where_BV).square().sum() for x, mean in zip(flat, means)])


def still(entry: Mapping[str, Any]) -> str | None:
    """A sentence of advice where an epoch's ``prediction_spread`` says that the predictions hardly vary."""
    value = entry.get("prediction_spread", math.inf)
    if value >= STILL:
        return None
    return (
        f"what the network rebuilds hardly varies (prediction_spread {value:.1g} of the true variance): if this "
        "lasts, change train.lr or lower method.ratio"
    )


class Decoder(nn.Module):
    """MAE's decoder: a narrow transformer that rebuilds every patch from the encoded visible ones (He et al. 2022).

    Args:
        cfg: has ``decoder_width``, ``decoder_depth``, ``decoder_heads`` and ``patch_vox``.
        grid: patches along each axis; others are interpolated.
        glmae: as in GL-MAE, vectors of positions are fixed and attention's projections have a bias; else vectors are
            learnt and there is no bias.
    """

    def __init__(
        self, cfg: Any, network: TokenNetwork, data_spec: DataSpec, grid: Triple, glmae: bool = False
    ) -> None:
        super().__init__()
        from monai.networks.blocks.transformerblock import TransformerBlock

        width, num_heads = cfg.decoder_width, cfg.decoder_heads
        self.grid = grid
        self.embed = nn.Linear(network.embed_channels, width)
        self.mask_token = nn.Parameter(nn.init.normal_(torch.empty(width), std=0.02))
        if glmae:
            self.positions = sincos(grid, width)
        else:
            table = nn.init.trunc_normal_(torch.empty(1, math.prod(grid), width), std=0.02)
            self.positions = nn.Parameter(table)
        options: Any = {"qkv_bias": glmae, "use_flash_attention": True}
        blocks = [TransformerBlock(width, 4 * width, num_heads, **options) for _ in range(cfg.decoder_depth)]
        self.blocks = without_cross_attention(nn.ModuleList(blocks))
        self.norm = nn.LayerNorm(width)
        self.predict = nn.Linear(width, data_spec.in_channels * math.prod(cfg.patch_vox))

    def forward(
        self, tokens_BVE: Tensor, keep_BV: Tensor, grid: Triple, prefix_B1E: Tensor | None = None
    ) -> Tensor:
        """All N patches (B, N, P) of a crop of ``grid`` patches, in C order; a prefix takes part and is dropped."""
        seen_BVD = self.embed(tokens_BVE)
        at_BVD = keep_BV[:, :, None].expand(-1, -1, seen_BVD.shape[2])
        every_BND = self.mask_token.to(seen_BVD.dtype).expand(len(seen_BVD), math.prod(grid), -1)
        x = every_BND.scatter(1, at_BVD, seen_BVD) + resized_positions(self.positions, self.grid, grid)
        if prefix_B1E is not None:
            x = torch.cat([self.embed(prefix_B1E).to(x.dtype), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.predict(self.norm(x[:, -math.prod(grid) :]))
