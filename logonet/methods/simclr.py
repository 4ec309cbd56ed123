"""SimCLR (Chen et al. 2020) in three dimensions: two views of a crop attract, views of other crops repel.

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
from typing import Annotated

import torch
from annotated_types import MinLen
from torch import Tensor

from logonet.core.config import Count, Positive
from logonet.methods import DataSpec, _views
from logonet.methods._parts import means, sums
from logonet.methods._selfsup import EncoderModule, collapse, cosine, joined, mlp, nt_xent, pooled, spread
from logonet.networks import Network

NEEDS = frozenset({"crops"})
LEAST_BATCH = 2  # one crop has no negatives
prepare, sizes, check, warning = _views.prepare, _views.sizes, _views.check, collapse


@dataclass(frozen=True)
class Config(_views.Config, key="method"):
    """Defaults are SimCLR's head with nnssl's views of whole crops.

    Attributes:
        temperature: tau of NT-Xent.
        projector: widths of the projector's layers after its input, the last that of the projections; None is
            (the input's, 128).
        gather: take the crops of all workers' batches as negatives, not only those of the worker's own.
    """

    temperature: Positive = 0.5
    projector: Annotated[tuple[Count, ...], MinLen(1)] | None = None
    gather: bool = False


def gathers(cfg: Config) -> bool:
    """Whether ``forward`` waits for those of the other ranks."""
    return cfg.gather


class SimCLR(EncoderModule[Config]):
    """Backbone and projector; ``forward`` as the package's contract says."""

    def __init__(self, cfg: Config, network: Network, data_spec: DataSpec) -> None:
        super().__init__(cfg, network, data_spec.in_channels, sizes(cfg, data_spec.size_vox)[0])
        self.projector = mlp((self.width, *(cfg.projector or (self.width, 128))))

    def forward(self, batch: Mapping[str, Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one batch of what ``prepare`` returns; they do not depend on ``progress``."""
        num_samples = len(batch["first"])
        feats = self.backbone.encode(torch.cat([batch["first"], batch["second"]]))
        rows_NF = pooled(joined(feats, self.levels))
        # In float32: the head is small, and bfloat16 is too coarse to compare its few rows.
        with torch.autocast(rows_NF.device.type, enabled=False):
            first_ND, second_ND = self.projector(rows_NF).chunk(2)
        loss = nt_xent(first_ND, second_ND, self.cfg.temperature, self.cfg.gather)
        return loss, {
            **means(num_samples, loss=loss),
            **sums(num_samples, alignment=cosine(first_ND, second_ND)),
            **means(num_samples, spread=spread(first_ND)),
            "embeddings_BF": pooled(feats[-1].detach())[:num_samples].float(),
        }


build = SimCLR
