"""BYOL (Grill et al. 2020) in three dimensions: predict how a slowly moving copy of the network sees the other view.

Each view goes through an encoder and, averaged over space, a projector. A predictor on the trained network's
projection of one view guesses the copy's projection of the other (Eq. 2), and the copy follows the trained network
(Eq. 1). There are no negatives. The decoder and the classifier are not trained. SimTROT's BYOL has views "texture",
2 crops a batch, SGD at 1e-4 with momentum 0.99.

Shapes: B samples, C input channels, X Y Z the crop's axes, F features, N rows, D columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from logonet.core.config import Count, Share
from logonet.methods import DataSpec, _selfsup, _views
from logonet.methods._parts import means
from logonet.methods._selfsup import EncoderModule
from logonet.networks import Network

NEEDS = frozenset({"crops"})
LEAST_BATCH = 2  # the heads' batch norm
prepare, sizes, warning = _views.prepare, _views.sizes, _selfsup.collapse


@dataclass(frozen=True)
class Config(_views.Config, key="method"):
    """Defaults are SimTROT's BYOL with nnssl's views and BYOL's schedule of the momentum.

    Attributes:
        hidden: width of the heads' hidden layer; None is that of their input, the encoder's coarsest map.
        projection: width of projections and predictions.
        momentum_start, momentum_end: share that the copy keeps of itself at each step, along half a cosine over
            the training. SimTROT keeps 0.99 throughout: set both to it.
    """

    hidden: Count | None = None
    projection: Count = 256
    momentum_start: Share = 0.99
    momentum_end: Share = 1.0


def check(cfg: Config, data_spec: DataSpec) -> None:
    """Raise UserError when ``cfg`` cannot work on crops like these."""
    _views.check(cfg, data_spec)
    _selfsup.check_momentum(cfg)


class BYOL(EncoderModule[Config]):
    """Backbone, projector and predictor, and a copy of the first two; ``forward`` as the package's contract says."""

    def __init__(self, cfg: Config, network: Network, data_spec: DataSpec) -> None:
        super().__init__(cfg, network, data_spec.in_channels, sizes(cfg, data_spec.size_vox)[0])
        hidden = cfg.hidden or self.width
        self.projector = _selfsup.mlp((self.width, hidden, cfg.projection), norm=True)
        self.predictor: nn.Module = _selfsup.mlp((cfg.projection, hidden, cfg.projection), norm=True)
        self.target_backbone = _selfsup.teacher_of(network)
        self.target_projector = _selfsup.teacher_of(self.projector)

    def forward(self, batch: Mapping[str, Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss, from 0 to 8, and metrics of one batch of what ``prepare`` returns; ``progress`` drives `after_step`."""
        both_NCXYZ = torch.cat([batch["first"], batch["second"]])
        num_samples = len(batch["first"])
        feats = self.backbone.encode(both_NCXYZ)
        rows_NF = _selfsup.pooled(_selfsup.joined(feats, self.levels))
        # In float32: batch norm amplifies the differences of a few rows, and with them bfloat16's rounding.
        with torch.autocast(rows_NF.device.type, enabled=False):
            projections = [self.projector(view_BF) for view_BF in rows_NF.chunk(2)]
            predictions = [self.predictor(projection_BD) for projection_BD in projections]
        targets = self.targets(both_NCXYZ)
        one, other = (_selfsup.byol_loss(p, t) for p, t in zip(predictions, reversed(targets)))
        loss = one + other
        return loss, {
            **means(num_samples, loss=loss, spread=_selfsup.spread(projections[0])),
            "embeddings_BF": _selfsup.pooled(feats[-1].detach())[:num_samples].float(),
        }

    @torch.no_grad()
    def targets(self, both_NCXYZ: Tensor) -> list[Tensor]:
        """The copy's projections of the first and of the second view, (B, D) each."""
        rows_NF = _selfsup.pooled(_selfsup.joined(self.target_backbone.encode(both_NCXYZ), self.levels))
        with torch.autocast(rows_NF.device.type, enabled=False):
            return [self.target_projector(view_BF) for view_BF in rows_NF.chunk(2)]

    def after_step(self, progress: float) -> None:
        """Update the copy."""
        pairs = (self.target_backbone, self.backbone), (self.target_projector, self.projector)
        _selfsup.follow_all(self.cfg, progress, *pairs)


build = BYOL
