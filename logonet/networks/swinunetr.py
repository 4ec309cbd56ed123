"""Swin UNETR (Hatamizadeh et al. 2022): MONAI's, with the interface of `Network`.

Letters: B batch, C input channels, E a token's width, F features, K classes, XYZ the crop's axes, xyz those of
the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, MultipleOf
from torch import Tensor

from logonet.core.config import OMIT_DEFAULT, Count, Section
from logonet.networks import TokenNetwork, Triple
from logonet.networks._shared import Norm, check_heads, norm_name, total_strides, upwards

PatchSide = Literal[1, 2]
SAME = ("depths", "num_heads", "window_size", "feature_size", "use_v2")  # options that MONAI calls alike

TINY: dict[str, Any] = {
    "feature_size": 12,
    "depths": (2, 1, 1, 1),
    "num_heads": (1, 2, 2, 2),
    "window_size": 2,
    "norm": "group",
}


@dataclass(frozen=True)
class Config(Section, key="backbone"):
    """The defaults are the SwinUNETR of LoGoNet's Table 1.

    Attributes:
        feature_size: width at full resolution; each coarser level doubles it.
        depths: Swin blocks of each of the four stages; every second one is shifted.
        num_heads: attention heads of each stage.
        window_size: side of an attention window, in the stage's voxels.
        use_v2: a residual convolution block before each stage (SwinUNETR-V2).
        norm: of the convolution blocks; the transformer has layer normalisation.
        checkpointing: recompute the Swin blocks in backward: less memory, more time.
        patch: voxels of a token along X, Y and Z, each 1 or 2. SimTROT has (2, 2, 1) for thick slices. Along an axis
            of 1 the decoder's last step keeps the size.
    """

    feature_size: Annotated[int, Ge(12), MultipleOf(12)] = 48
    depths: tuple[Count, Count, Count, Count] = (2, 2, 2, 2)
    num_heads: tuple[Count, Count, Count, Count] = (3, 6, 12, 24)
    window_size: Annotated[int, Ge(2)] = 7
    use_v2: bool = False
    norm: Norm = "instance"
    checkpointing: bool = False
    patch: tuple[PatchSide, PatchSide, PatchSide] = field(default=(2, 2, 2), metadata=OMIT_DEFAULT)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads("num_heads", self.num_heads, [self.feature_size * 2**stage for stage in range(4)])


def size_multiple(cfg: Config) -> Triple:
    x, y, z = (16 * p for p in cfg.patch)
    return x, y, z


class SwinUNETR(TokenNetwork):
    """62,187,296 parameters and 329.84 G multiply-accumulates (as thop counts) at 96^3 with 14 classes.

    Features: the hidden states of the Swin transformer, each normalised over its channels. The
    convolutions that stand between them and the decoder, MONAI's encoder1 to encoder10, are the decoder's.
    """

    encoder_prefixes = ("net.swinViT.",)
    head_prefixes = ("net.out.",)

    def __init__(self, cfg: Config, in_channels: int, num_classes: int) -> None:
        super().__init__()
        from monai.networks.blocks import UnetrUpBlock
        from monai.networks.nets import SwinUNETR as Wrapped

        device = torch.get_default_device()
        # MONAI reads numbers out of a tensor here, which the meta device has none of.
        with torch.device("cpu"):
            others: Any = {"norm_name": norm_name(cfg.norm), "use_checkpoint": cfg.checkpointing}
            others["patch_size"] = cfg.patch
            same = {key: getattr(cfg, key) for key in SAME}
            self.net: Any = Wrapped(in_channels, num_classes, **same, **others)
            if cfg.patch != (2, 2, 2):  # MONAI's decoder doubles every side
                f, norm = cfg.feature_size, norm_name(cfg.norm)
                self.net.decoder1 = UnetrUpBlock(3, f, f, 3, cfg.patch, norm, res_block=True)
        self.net.to(device)
        strides = total_strides([cfg.patch, *[(2, 2, 2)] * 4])
        self.strides = tuple(s if len(set(s)) > 1 else s[0] for s in strides)
        self.embed_stride = cfg.patch
        self.channels = tuple(cfg.feature_size * 2**level for level in range(5))
        self.feature_channels = self.embed_channels = cfg.feature_size

    def encode(self, x_BCXYZ: Tensor) -> list[Tensor]:
        return self._stages(self.net.swinViT.patch_embed(x_BCXYZ))

    def encode_hidden(self, x_BCXYZ: Tensor, hidden_Bxyz: Tensor, token_E: Tensor) -> list[Tensor]:
        tokens_BExyz = self.net.swinViT.patch_embed(x_BCXYZ)
        token_E111 = token_E[:, None, None, None].to(tokens_BExyz.dtype)
        return self._stages(torch.where(hidden_Bxyz[:, None], token_E111, tokens_BExyz))

    def _stages(self, tokens_BExyz: Tensor) -> list[Tensor]:
        """MONAI's ``swinViT`` from its tokens on, which it does not offer by itself."""
        vit, x = self.net.swinViT, tokens_BExyz
        feats = [vit.proj_out(x, self.net.normalize)]
        for stage in (1, 2, 3, 4):
            if vit.use_v2:
                x = getattr(vit, f"layers{stage}c")[0](x.contiguous())
            x = getattr(vit, f"layers{stage}")[0](x.contiguous())
            feats.append(vit.proj_out(x, self.net.normalize))
        return feats

    def decode_features(self, x_BCXYZ: Tensor, feats: list[Tensor]) -> Tensor:
        net = self.net
        encoders = (net.encoder1, net.encoder2, net.encoder3, net.encoder4)
        skips = [encoder(x) for encoder, x in zip(encoders, (x_BCXYZ, *feats))]
        ups = (net.decoder5, net.decoder4, net.decoder3, net.decoder2, net.decoder1)
        return upwards(ups, [*skips, feats[3], net.encoder10(feats[4])])[0]


build = SwinUNETR
