"""UNETR (Hatamizadeh et al. 2022): MONAI's, with the interface of `Network`.

Letters: B batch, C input channels, E a token's width, F features, K classes, N tokens of a crop, V those that
are seen, XYZ the crop's axes, xyz those of the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from logonet.core.config import OMIT_DEFAULT, Count, Section, SizeVox
from logonet.core.errors import UserError
from logonet.networks import TokenNetwork, Triple, check_img_size
from logonet.networks._shared import chained, resized_positions, sincos, upwards, without_cross_attention

PatchSide = Literal[8, 16]  # the decoder doubles sides four times, or three

# Of the transformer's 12 layers: Dosovitskiy et al. 2021, Table 1, and Touvron et al. 2021, Table 1.
_VARIANTS: dict[str, dict[str, int]] = {
    "vit_b": {"hidden_size": 768, "mlp_dim": 3072, "num_heads": 12},
    "vit_t": {"hidden_size": 192, "mlp_dim": 768, "num_heads": 3},
}

TINY: dict[str, Any] = {
    "img_size": (32, 32, 32),
    "feature_size": 4,
    "hidden_size": 12,
    "mlp_dim": 24,
    "num_heads": 2,
}


@dataclass(frozen=True)
class Config(Section, key="backbone"):
    """The defaults are the UNETR of LoGoNet's Table 1, on ViT-B.

    Attributes:
        img_size: the one crop size (X, Y, Z in voxels) the net takes: it learns a vector for each position.
        feature_size: width at full resolution.
        variant: presets of the three below.
        hidden_size, mlp_dim, num_heads: of the transformer's 12 layers; None is the variant's.
        positions: "learned" vectors, or "sincos", which are fixed (GL-MAE's).
        qkv_bias: a bias in attention's projections, which GL-MAE's transformer has and UNETR's lacks.
        patch: voxels of a token along X, Y and Z, each 8 or 16. SimTROT has (16, 16, 8) for thick slices. Along an
            axis of 8 the decoder's last step, to full resolution, keeps the size.
    """

    img_size: SizeVox = (96, 96, 96)
    feature_size: Count = 32
    variant: Literal["vit_b", "vit_t"] = "vit_b"
    hidden_size: Count | None = None
    mlp_dim: Count | None = None
    num_heads: Count | None = None
    positions: Literal["learned", "sincos"] = "learned"
    qkv_bias: bool = False
    patch: tuple[PatchSide, PatchSide, PatchSide] = field(default=(16, 16, 16), metadata=OMIT_DEFAULT)

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(side % p for side, p in zip(self.img_size, self.patch)):
            near = tuple(-(-side // p) * p for side, p in zip(self.img_size, self.patch))
            raise UserError(
                f"backbone.img_size is {self.img_size}; its sides must be multiples of backbone.patch {self.patch}; "
                f"use {near}"
            )
        hidden, heads = self.vit["hidden_size"], self.vit["num_heads"]
        if hidden % heads:
            raise UserError(
                f"backbone.hidden_size {hidden} is not a multiple of backbone.num_heads {heads}; change either"
            )
        if self.positions == "sincos" and hidden % 6:
            raise UserError(
                f"backbone.hidden_size is {hidden}; with backbone.positions sincos it must be a multiple of 6, a sine "
                "and a cosine for each axis"
            )

    @property
    def vit(self) -> dict[str, Any]:
        """hidden_size, mlp_dim and num_heads."""
        preset = _VARIANTS[self.variant]
        own = {key: getattr(self, key) for key in preset}
        return {key: preset[key] if value is None else value for key, value in own.items()}


def size_multiple(cfg: Config) -> Triple:
    return cfg.patch


class UNETR(TokenNetwork):
    """101,787,214 parameters and 264.60 G multiply-accumulates (as thop counts) at 96^3 with 14 classes, on ViT-T
    16,362,382 and 241.27 G; MONAI's has 18,432 (4,608) parameters more, which it never uses.

    Features: tokens after layers 4, 7, 10 and 12 of the transformer as maps, all at a patch's stride, the last
    normalised. What makes a pyramid of them, MONAI's encoder1 to encoder4, is the decoder's.
    """

    encoder_prefixes = ("net.vit.",)
    head_prefixes = ("net.out.",)

    def __init__(self, cfg: Config, in_channels: int, num_classes: int) -> None:
        super().__init__()
        from monai.networks.blocks import UnetrUpBlock
        from monai.networks.nets import UNETR as Wrapped

        self.cfg = cfg
        self.embed_channels = width = cfg.vit["hidden_size"]
        self.embed_stride, self.strides = (
            cfg.patch,
            (cfg.patch if len(set(cfg.patch)) > 1 else cfg.patch[0],) * 4,
        )
        # MONAI's patches have 16 voxels a side: what depends on their size, but for the grid, is replaced.
        size = [16 * tokens for tokens in self._grid]
        self.net: Any = Wrapped(
            in_channels, num_classes, size, cfg.feature_size, qkv_bias=cfg.qkv_bias, **cfg.vit
        )
        without_cross_attention(self.net.vit.blocks)
        if cfg.patch != (16, 16, 16):
            embedding = nn.Conv3d(in_channels, width, cfg.patch, cfg.patch)
            self.net.vit.patch_embedding.patch_embeddings = embedding
            f, last = cfg.feature_size, [p // 8 for p in cfg.patch]
            self.net.decoder2 = UnetrUpBlock(3, 2 * f, f, 3, last, "instance", res_block=True)
        if cfg.positions == "sincos":
            self.net.vit.patch_embedding.position_embeddings = sincos(self._grid, self.embed_channels)
        self.positions = {"net.vit.patch_embedding.position_embeddings": self._grid}
        self.channels = (self.embed_channels,) * 4
        self.feature_channels = cfg.feature_size

    def encode(self, x_BCXYZ: Tensor) -> list[Tensor]:
        """Raises UserError when the crop is not of the size the net was built for."""
        check_img_size("unetr", self.cfg.img_size, x_BCXYZ.shape[2:])
        return self._features(self._embed(x_BCXYZ))

    def encode_hidden(self, x_BCXYZ: Tensor, hidden_Bxyz: Tensor, token_E: Tensor) -> list[Tensor]:
        """Raises UserError when the crop is not of the size the net was built for."""
        check_img_size("unetr", self.cfg.img_size, x_BCXYZ.shape[2:])
        map_BExyz = self._embed(x_BCXYZ)
        token_E111 = token_E[:, None, None, None].to(map_BExyz.dtype)
        return self._features(torch.where(hidden_Bxyz[:, None], token_E111, map_BExyz))

    def encode_visible(self, x_BCXYZ: Tensor, keep_BV: Tensor, prefix_B1E: Tensor | None) -> Tensor:
        tokens_BNE = self._placed(self._embed(x_BCXYZ))
        tokens_BVE = tokens_BNE.gather(1, keep_BV[:, :, None].expand(-1, -1, self.embed_channels))
        if prefix_B1E is not None:
            tokens_BVE = torch.cat([prefix_B1E.to(tokens_BVE.dtype), tokens_BVE], dim=1)
        return self._layers(tokens_BVE)[-1]

    def _features(self, map_BExyz: Tensor) -> list[Tensor]:
        layers = self._layers(self._placed(map_BExyz))
        return [self.net.proj_feat(tokens) for tokens in (layers[3], layers[6], layers[9], layers[12])]

    def _embed(self, x_BCXYZ: Tensor) -> Tensor:
        return self.net.vit.patch_embedding.patch_embeddings(x_BCXYZ)

    def _layers(self, tokens_BNE: Tensor) -> list[Tensor]:
        """What each of the 12 layers gives, and last that of the twelfth, normalised."""
        return chained([*self.net.vit.blocks, self.net.vit.norm], tokens_BNE)

    @property
    def _grid(self) -> Triple:
        """Tokens along X, Y and Z."""
        x, y, z = (side // p for side, p in zip(self.cfg.img_size, self.cfg.patch))
        return x, y, z

    def _placed(self, map_BExyz: Tensor) -> Tensor:
        """The tokens of a map in C order, each with its position's vector added, (B, N, E)."""
        positions_1NE: Tensor = self.net.vit.patch_embedding.position_embeddings
        resized_1NE = resized_positions(positions_1NE, self._grid, map_BExyz.shape[2:])
        return map_BExyz.flatten(2).transpose(1, 2) + resized_1NE

    def decode_features(self, x_BCXYZ: Tensor, feats: list[Tensor]) -> Tensor:
        net = self.net
        encoders = (net.encoder1, net.encoder2, net.encoder3, net.encoder4)
        skips = [encoder(x) for encoder, x in zip(encoders, (x_BCXYZ, *feats))]
        ups = (net.decoder5, net.decoder4, net.decoder3, net.decoder2)
        return upwards(ups, [*skips, feats[3]])[0]


build = UNETR
