"""SimCLR (Chen et al. 2020) in three dimensions: two views of a crop attract, those of other crops repel.

Each view goes through the encoder, whose coarsest map is averaged over space and projected; NT-Xent (Eq. 1)
compares the projections. The decoder and the classifier are not trained. Published settings for volumes: nnssl,
the ``views`` of that name of 64^3 voxels, projector (2048, 2048, 2048), 32 crops a batch, AdamW at 1e-3; SimTROT's
SimCLR, views "texture" of the whole crop, 2 crops a batch, SGD at 1e-4 with momentum 0.99. LoGoNet's authors give
none.

Shapes: B samples, C input channels, X Y Z the crop's axes, F features, N rows, D columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import MinLen
from torch import Tensor, nn

from logonet.core.config import Count, Positive, Section, SizeVox
from logonet.methods import DataSpec, _views
from logonet.methods._parts import ratio
from logonet.methods._selfsup import collapse, cosine, joined, mlp, nt_xent, pooled, spread, train_encoder

NEEDS = frozenset({"crops"})
LEAST_BATCH = 2  # a crop alone has nothing to be told from
SEES_BATCH = True
warning = collapse


@dataclass(frozen=True)
class Config(Section, key="method"):
    """Defaults are SimCLR's head with nnssl's views of whole crops.

    Attributes:
        views: "nnssl" has noise, blur, brightness, contrast, low resolution, gamma, mirroring and quarter turns;
            "texture", of SimTROT, has noise, Gibbs noise, intensity scale and shift, and moves nothing.
        view_vox: None makes both views of the whole crop; else they have this size (X, Y, Z in voxels) and the
            second lies at most half of it from the first along each axis.
        temperature: tau of NT-Xent.
        projector: widths of the projector's layers after its input, the last that of the projections; None is
            (the input's, 128).
        gather: negatives are the crops of all workers' batches, rather than of one's own.
    """

    views: _views.Views = "nnssl"
    view_vox: SizeVox | None = None
    temperature: Positive = 0.5
    projector: Annotated[tuple[Count, ...], MinLen(1)] | None = None
    gather: bool = False


def gathers(cfg: Config) -> bool:
    """Whether ``forward`` waits for those of the other ranks."""
    return cfg.gather


def check(cfg: Config, facts: DataSpec) -> None:
    """Raise UserError when ``cfg`` cannot work on crops like these."""
    _views.check(cfg.view_vox, facts.size_vox)


def sizes(cfg: Config, size_vox: tuple[int, int, int]) -> tuple[tuple[int, int, int], ...]:
    """The size of a view."""
    return (cfg.view_vox or size_vox,)


def prepare(sample: Mapping[str, Any], cfg: Config, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Make two views.

    Returns:
        ``first`` and ``second``, float32 (C, X, Y, Z), nominally in [0, 1].
    """
    return _views.pair(sample, cfg.views, cfg.view_vox, rng)


def build(cfg: Config, backbone: nn.Module, facts: DataSpec) -> nn.Module:
    """The pretraining module on ``backbone``."""
    return SimCLR(cfg, backbone, facts)


class SimCLR(nn.Module):
    """Backbone and projector; ``forward`` as the package's contract says."""

    def __init__(self, cfg: Config, backbone: Any, facts: DataSpec) -> None:
        super().__init__()
        self.cfg = cfg
        self.backbone: Any = backbone
        self.levels = train_encoder(backbone, facts.in_channels, sizes(cfg, facts.size_vox)[0])
        width = sum(backbone.channels[level] for level in self.levels)
        self.projector = mlp((width, *(cfg.projector or (width, 128))))

    def forward(self, batch: Mapping[str, Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one batch of what ``prepare`` returns; ``progress`` drives nothing here."""
        num_samples = len(batch["first"])
        feats = self.backbone.encode(torch.cat([batch["first"], batch["second"]]))
        rows_NF = pooled(joined(feats, self.levels))
        # The head is small, and rounding its few rows to bfloat16 could tell crops apart, or alike, that are not.
        with torch.autocast(rows_NF.device.type, enabled=False):
            first_ND, second_ND = self.projector(rows_NF).chunk(2)
        loss = nt_xent(first_ND, second_ND, self.cfg.temperature, self.cfg.gather)
        metrics = {
            "loss": ratio(loss * num_samples, num_samples),
            "alignment": ratio(cosine(first_ND, second_ND).sum(), num_samples),
            "spread": ratio(spread(first_ND) * num_samples, num_samples),
            "embeddings_BF": pooled(feats[-1].detach())[:num_samples].float(),
        }
        return loss, metrics
