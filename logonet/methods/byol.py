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
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from logonet.core.config import Count, Section, Share, SizeVox
from logonet.methods import DataSpec, _views
from logonet.methods._parts import ratio
from logonet.methods._selfsup import (
    byol_loss,
    check_momentum,
    collapse,
    follow,
    joined,
    mlp,
    momentum,
    pooled,
    spread,
    teacher_of,
    train_encoder,
)

NEEDS = frozenset({"crops"})
LEAST_BATCH = 2  # the heads' batch norm
SEES_BATCH = True
warning = collapse


@dataclass(frozen=True)
class Config(Section, key="method"):
    """Defaults are SimTROT's BYOL with nnssl's views and BYOL's schedule of the momentum.

    Attributes:
        views, view_vox: as of ``simclr``.
        hidden: width of the heads' hidden layer; None is that of their input, the encoder's coarsest map.
        projection: width of projections and predictions.
        momentum_start, momentum_end: share that the copy keeps of itself at each step, along half a cosine over
            the training. SimTROT keeps 0.99 throughout: set both to it.
    """

    views: _views.Views = "nnssl"
    view_vox: SizeVox | None = None
    hidden: Count | None = None
    projection: Count = 256
    momentum_start: Share = 0.99
    momentum_end: Share = 1.0


def check(cfg: Config, facts: DataSpec) -> None:
    """Raise UserError when ``cfg`` cannot work on crops like these."""
    _views.check(cfg.view_vox, facts.size_vox)
    check_momentum(cfg)


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
    return BYOL(cfg, backbone, facts)


class BYOL(nn.Module):
    """Backbone, projector and predictor, and a copy of the first two; ``forward`` as the package's contract says."""

    def __init__(self, cfg: Config, backbone: Any, facts: DataSpec) -> None:
        super().__init__()
        self.cfg = cfg
        self.backbone: Any = backbone
        self.levels = train_encoder(backbone, facts.in_channels, sizes(cfg, facts.size_vox)[0])
        width = sum(backbone.channels[level] for level in self.levels)
        hidden = cfg.hidden or width
        self.projector = mlp((width, hidden, cfg.projection), norm=True)
        self.predictor: nn.Module = mlp((cfg.projection, hidden, cfg.projection), norm=True)
        self.target_backbone: Any = teacher_of(backbone)
        self.target_projector = teacher_of(self.projector)

    def forward(self, batch: Mapping[str, Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss, from 0 to 8, and metrics of one batch of what ``prepare`` returns; ``progress`` drives `after_step`."""
        both_NCXYZ = torch.cat([batch["first"], batch["second"]])
        num_samples = len(batch["first"])
        feats = self.backbone.encode(both_NCXYZ)
        rows_NF = pooled(joined(feats, self.levels))
        # Batch norm blows the differences of a few rows up: those are not to be bfloat16's rounding.
        with torch.autocast(rows_NF.device.type, enabled=False):
            projections = [self.projector(view_BF) for view_BF in rows_NF.chunk(2)]
            predictions = [self.predictor(projection_BD) for projection_BD in projections]
        targets = self.targets(both_NCXYZ)
        one, other = (byol_loss(p, t) for p, t in zip(predictions, reversed(targets)))
        loss = one + other
        metrics = {
            "loss": ratio(loss * num_samples, num_samples),
            "spread": ratio(spread(projections[0]) * num_samples, num_samples),
            "embeddings_BF": pooled(feats[-1].detach())[:num_samples].float(),
        }
        return loss, metrics

    @torch.no_grad()
    def targets(self, both_NCXYZ: Tensor) -> list[Tensor]:
        """The copy's projections of the first and of the second view, (B, D) each."""
        rows_NF = pooled(joined(self.target_backbone.encode(both_NCXYZ), self.levels))
        with torch.autocast(rows_NF.device.type, enabled=False):
            return [self.target_projector(view_BF) for view_BF in rows_NF.chunk(2)]

    def after_step(self, progress: float) -> None:
        """Let the copy follow."""
        decay = momentum(progress, self.cfg.momentum_start, self.cfg.momentum_end)
        follow(self.target_backbone, self.backbone, decay)
        follow(self.target_projector, self.projector, decay)
