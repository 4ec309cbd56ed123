"""SimMIM: hide blocks of a crop and rebuild their voxels with one light layer (Xie et al. 2022; in 3D, MIM-Med3D,
Chen et al. 2023).

Where the network has tokens, those of hidden blocks are replaced by a learnt vector before positions are added,
and the layer takes the encoder's last features: a 1x1x1 convolution to a cell's voxels and a 3D pixel shuffle.
Elsewhere the layer is a 1x1x1 convolution on the full-resolution features. With ``loss=l2`` that is the masked
autoencoder for CNNs of nnssl (Wald et al. 2024: blocks of 16 voxels, 3 of 4 hidden), whose encoder and decoder both
transfer. In both cases the image itself is masked, so that neither a skip from the image nor overlapping tokens reveal
the target.

MIM-Med3D trains ViT-B with AdamW, lr 1e-4 (3e-4 on BraTS), weight decay 1e-5, 50 epochs of warm-up, constant after.

Shapes: B samples, C input channels, E a token's width, F features, X Y Z the crop's axes, uvw its units', xyz its
tokens'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from logonet.core.config import OMIT_DEFAULT, Fraction, Section, SizeVox
from logonet.core.errors import UserError
from logonet.methods import DataSpec
from logonet.methods._masked import depth_to_space, divides, enlarged, masked_error, spread, still
from logonet.methods._parts import MethodModule, freeze_unreached, intensity, ratio, sums
from logonet.networks import Network, TokenNetwork, Triple

NEEDS = frozenset({"crops"})
BYPASS_SCORE = "loss"
UNIT = 16  # voxels a side: a ViT's patch
LEAST_UNIT = 64  # voxels: a crop has one random number for each so many

warning = still


@dataclass(frozen=True)
class Config(Section, key="method"):
    """
    Attributes:
        ratio: share of the units to hide, rounded down. MIM-Med3D's; 0.6 in 2D.
        unit_vox: sides (X, Y, Z in voxels) of what is hidden or seen as a whole; they must divide the crop's. None
            is 16 in each axis, or where the backbone has tokens the stride of its coarsest features (32 for Swin
            UNETR), so that no coarsest cell sees both hidden and visible tokens.
        head: what the light layer stands on: "encoder" its last features, "decoder" the full-resolution ones;
            "auto" is the encoder's where the backbone has tokens.
        loss: "l1" is the mean absolute error of hidden voxels, SimMIM's; "l2" the mean squared one, MAE's.
    """

    ratio: Fraction = 0.75
    unit_vox: SizeVox | None = None
    head: Literal["auto", "encoder", "decoder"] = "auto"
    loss: Literal["l1", "l2"] = field(default="l1", metadata=OMIT_DEFAULT)


def check(cfg: Config, data_spec: DataSpec) -> None:
    """Raise UserError when ``cfg`` cannot work on crops like these."""
    _check_unit(cfg, cfg.unit_vox or (UNIT,) * 3, data_spec.size_vox)


def _check_unit(cfg: Config, unit_vox: Triple, size_vox: Triple) -> None:
    if not divides(unit_vox, size_vox):
        raise UserError(
            f"simmim hides units of {unit_vox} voxels, which do not divide crops of {size_vox}; set method.unit_vox "
            "to sides that do, or change crops.size_vox"
        )
    if math.prod(unit_vox) < LEAST_UNIT:
        raise UserError(f"method.unit_vox is {unit_vox}; a unit must have {LEAST_UNIT} voxels or more")
    units = math.prod(side // unit for side, unit in zip(size_vox, unit_vox))
    if int(cfg.ratio * units) < 1:
        raise UserError(
            f"simmim hides {cfg.ratio} of {units} units of {unit_vox} voxels, which is less than one; use larger crops "
            "(crops.size_vox) or a larger method.ratio"
        )


def prepare(sample: Mapping[str, Any], cfg: Config, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw what to hide.

    Returns:
        ``image`` uint16 (C, X, Y, Z) untouched, ``scores`` float32, one for each 64 voxels: the first of them are
        the units', in C order, and the lowest are hidden. How many units there are is up to the backbone.
    """
    image_CXYZ = sample["image_CXYZ"]
    count = -(-math.prod(image_CXYZ.shape[1:]) // LEAST_UNIT)
    return {"image": image_CXYZ, "scores": rng.random(count, dtype=np.float32)}


class SimMIM(MethodModule[Config]):
    """Backbone, mask tokens and light layer; ``forward`` as the package's contract says."""

    backbone: TokenNetwork

    def __init__(self, cfg: Config, network: TokenNetwork, data_spec: DataSpec) -> None:
        """Raises UserError where the units do not suit the network, which need not be one of tokens."""
        super().__init__(cfg, network)
        self.tokens = hasattr(network, "encode_hidden")
        self.on_encoder = cfg.head == "encoder" or (cfg.head == "auto" and self.tokens)
        stride = network.strides[-1]
        self.stride: Triple = (stride, stride, stride) if isinstance(stride, int) else stride
        self.unit_vox = cfg.unit_vox or (self.stride if self.tokens else (UNIT,) * 3)
        _check_unit(cfg, self.unit_vox, data_spec.size_vox)
        if self.tokens and not divides(self.stride, self.unit_vox):
            raise UserError(
                f"method.unit_vox is {self.unit_vox} and one coarsest cell of {type(network).__name__} sees "
                f"{self.stride} voxels; set method.unit_vox to a multiple, so that no cell is hidden in part"
            )
        if self.on_encoder and not divides(self.stride, data_spec.size_vox):
            raise UserError(
                f"simmim's head on the encoder rebuilds cells of {self.stride} voxels, which do not divide crops of "
                f"{data_spec.size_vox}; set method.head=decoder or change crops.size_vox"
            )
        self.token_C = nn.Parameter(torch.zeros(data_spec.in_channels))
        if self.tokens:
            self.token_E = nn.Parameter(nn.init.trunc_normal_(torch.empty(network.embed_channels), std=0.02))
        width, numbers = network.feature_channels, data_spec.in_channels
        if self.on_encoder:
            width, numbers = network.channels[-1], data_spec.in_channels * math.prod(self.stride)
        self.head = nn.Conv3d(width, numbers, 1)
        x = torch.empty(1, data_spec.in_channels, *data_spec.size_vox, device="meta")
        freeze_unreached(network, lambda net: self._used(net, x, net.encode(x)))

    def _used(self, net: Network, x_BCXYZ: Tensor, feats: list[Tensor]) -> Tensor:
        """What the light layer stands on."""
        return feats[-1] if self.on_encoder else net.decode_features(x_BCXYZ, feats)

    def forward(self, batch: Mapping[str, Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one batch of what ``prepare`` returns; they do not depend on ``progress``."""
        image_BCXYZ = intensity(batch["image"])
        hidden_Buvw = self.hidden(batch["scores"], image_BCXYZ.shape[2:])
        feats, guess_BCXYZ = self.predict(image_BCXYZ, hidden_Buvw)
        hidden_B1XYZ = enlarged(hidden_Buvw, self.unit_vox)[:, None]
        loss_B = masked_error(guess_BCXYZ, image_BCXYZ, hidden_B1XYZ, self.cfg.loss == "l2")
        return loss_B.mean(), {
            **sums(len(loss_B), loss=loss_B),
            "masked_share": ratio(hidden_Buvw.sum(), hidden_Buvw.numel()),
            "prediction_spread": spread(guess_BCXYZ, image_BCXYZ, hidden_B1XYZ),
            "embeddings_BF": feats[-1].detach().float().mean(dim=(2, 3, 4)),
        }

    def hidden(self, scores_BS: Tensor, size_vox: Sequence[int]) -> Tensor:
        """Which units are hidden, bool (B, u, v, w): in every sample int(ratio * units) of them."""
        u, v, w = (side // unit for side, unit in zip(size_vox, self.unit_vox))
        scores_BN = scores_BS[:, : u * v * w]
        lowest_BH = scores_BN.argsort(dim=1, stable=True)[:, : int(self.cfg.ratio * u * v * w)]
        hidden_BN = torch.zeros_like(scores_BN, dtype=torch.bool).scatter(1, lowest_BH, True)
        return hidden_BN.unflatten(1, (u, v, w))

    def predict(self, image_BCXYZ: Tensor, hidden_Buvw: Tensor) -> tuple[list[Tensor], Tensor]:
        """Encoder features, and the whole crop as rebuilt, (B, C, X, Y, Z), without a look at hidden units."""
        hidden_BXYZ = enlarged(hidden_Buvw, self.unit_vox)
        x_BCXYZ = torch.where(hidden_BXYZ[:, None], self.token_C[:, None, None, None], image_BCXYZ)
        if self.tokens:
            times = [unit // side for unit, side in zip(self.unit_vox, self.backbone.embed_stride)]
            feats = self.backbone.encode_hidden(x_BCXYZ, enlarged(hidden_Buvw, times), self.token_E)
        else:
            feats = self.backbone.encode(x_BCXYZ)
        guess = self.head(self._used(self.backbone, x_BCXYZ, feats))
        return feats, depth_to_space(guess, self.stride) if self.on_encoder else guess


build = SimMIM
