"""MAE3D: encode a quarter of a crop's patches and rebuild the rest from them (He et al. 2022; in 3D, Chen et al. 2023).

The encoder sees only visible tokens; a narrow decoder, which is discarded after pretraining, also gets the positions
of the masked ones. The network must be one of plain tokens. "MAE for CNNs", a whole network on crops with blocks
blanked out, is `simmim` with its head on the decoder.

MAE3D trains ViT-B with AdamW, lr 3e-4, weight decay 0.05, 300 of 3000 epochs of warm-up, cosine to 1e-4, batches of
4 volumes with 4 crops each, on CT from -175 to 250 HU.

Shapes: B samples, C input channels, X Y Z the crop's axes, N patches (C order), V those that are seen, P numbers of
a patch (C times its voxels), E the encoder's width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logonet.core.config import Count, Fraction, Section, SizeVox
from logonet.core.errors import UserError
from logonet.methods import DataSpec, _masked
from logonet.methods._masked import grid_of
from logonet.methods._parts import MethodModule, freeze_unreached, intensity, ratio, sums
from logonet.networks import TokenNetwork

NEEDS = frozenset({"crops"})
WANTS = frozenset({"encode_visible"})

warning = _masked.still


@dataclass(frozen=True)
class Config(Section, key="method"):
    """Defaults are MAE3D's.

    Attributes:
        ratio: share of the patches to mask, rounded down.
        patch_vox: sides (X, Y, Z in voxels) of a patch: those of the backbone's tokens.
        decoder_width, decoder_depth, decoder_heads: of the decoder. He et al. have 16 heads.
        normalise_patches: rebuild each patch less its mean, over its standard deviation (He et al.'s variant).
    """

    ratio: Fraction = 0.75
    patch_vox: SizeVox = (16, 16, 16)
    decoder_width: Count = 512
    decoder_depth: Count = 8
    decoder_heads: Count = 8
    normalise_patches: bool = False


def check(cfg: Config, data_spec: DataSpec) -> None:
    """Raise UserError when ``cfg`` cannot work on crops like these."""
    _masked.check_decoder(cfg.decoder_width, cfg.decoder_heads)
    if not _masked.divides(cfg.patch_vox, data_spec.size_vox):
        raise UserError(
            f"mae3d masks patches of {cfg.patch_vox} voxels, which do not divide crops of {data_spec.size_vox}; change "
            "crops.size_vox"
        )
    num_patches = math.prod(grid_of(data_spec.size_vox, cfg.patch_vox))
    if not 0 < int(cfg.ratio * num_patches) < num_patches:
        raise UserError(
            f"mae3d masks {cfg.ratio} of the {num_patches} patches of a crop, which leaves none to see or none to "
            "rebuild; change method.ratio or use larger crops (crops.size_vox)"
        )


def prepare(sample: Mapping[str, Any], cfg: Config, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw what to see.

    Returns:
        ``image`` uint16 (C, X, Y, Z) untouched, ``keep`` int64 (V,), the visible patches.
    """
    image_CXYZ = sample["image_CXYZ"]
    num_patches = math.prod(grid_of(image_CXYZ.shape[1:], cfg.patch_vox))
    num_visible = num_patches - int(cfg.ratio * num_patches)
    return {"image": image_CXYZ, "keep": _masked.draw_visible(num_patches, num_visible, rng)}


class MAE3D(MethodModule[Config]):
    """Backbone and decoder; ``forward`` as the package's contract says."""

    backbone: TokenNetwork

    def __init__(self, cfg: Config, network: TokenNetwork, data_spec: DataSpec) -> None:
        """Raises UserError where the network's tokens are of another size."""
        _masked.check_patch(cfg.patch_vox, network)
        super().__init__(cfg, network)
        grid = grid_of(data_spec.size_vox, cfg.patch_vox)
        self.decoder = _masked.Decoder(cfg, network, data_spec, grid)
        x = torch.empty(1, data_spec.in_channels, *data_spec.size_vox, device="meta")
        keep = torch.zeros(1, 1, dtype=torch.int64, device="meta")
        freeze_unreached(network, lambda net: net.encode_visible(x, keep, None))

    def forward(self, batch: Mapping[str, Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one batch of what ``prepare`` returns; they do not depend on ``progress``."""
        image_BCXYZ, keep_BV = intensity(batch["image"]), batch["keep"].long()
        tokens_BVE, guess_BNP = self.predict(image_BCXYZ, keep_BV)
        target_BNP = _masked.patches(image_BCXYZ, self.cfg.patch_vox)
        if self.cfg.normalise_patches:
            target_BNP = normalised(target_BNP)
        hidden_BN = _masked.unseen(keep_BV, target_BNP.shape[1])
        loss_B = masked_l1(guess_BNP, target_BNP, hidden_BN)
        return loss_B.mean(), {
            **sums(len(loss_B), loss=loss_B),
            "masked_share": ratio(hidden_BN.sum(), hidden_BN.numel()),
            "prediction_spread": _masked.spread(guess_BNP, target_BNP, hidden_BN[:, :, None]),
            "embeddings_BF": tokens_BVE.detach().float().mean(1),
        }

    def predict(self, image_BCXYZ: Tensor, keep_BV: Tensor) -> tuple[Tensor, Tensor]:
        """The visible patches' vectors (B, V, E) and all patches as rebuilt from them, (B, N, P)."""
        # The released code leaves the encoder's last normalisation out, and UNETR puts it in afterwards: here
        # what is trained is what will be used.
        tokens_BVE = self.backbone.encode_visible(image_BCXYZ, keep_BV, None)
        grid = grid_of(image_BCXYZ.shape[2:], self.cfg.patch_vox)
        return tokens_BVE, self.decoder(tokens_BVE, keep_BV, grid)


def masked_l1(guess_BNP: Tensor, target_BNP: Tensor, hidden_BN: Tensor) -> Tensor:
    """Of each sample the mean absolute error over masked patches, (B,), in float32.

    As released; He et al. and GL-MAE square the error.
    """
    return _masked.over_patches((guess_BNP.float() - target_BNP).abs(), hidden_BN)


def normalised(patches_BNP: Tensor) -> Tensor:
    """Each patch with mean 0 and standard deviation 1 (a constant one with 0s)."""
    variance_BN1, mean_BN1 = torch.var_mean(patches_BNP, dim=2, keepdim=True)
    return (patches_BNP - mean_BN1) / (variance_BN1 + 1e-6).sqrt()


build = MAE3D
