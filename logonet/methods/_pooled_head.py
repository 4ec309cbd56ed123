"""A logit for every slice, clusterer and cluster from the encoder alone.

Algorithm 1 reads the decoder's full-resolution features, and a decoder with fine skips can name a slice's cluster
without the deep levels, which then learn nothing. Here the decoder has no part: each level is averaged over a slice's
plane, so all that is known of a slice has come through the encoder.

Shapes: B samples, F feature channels, x y z a level's axes, Z slices of the crop, N clusterers, K clusters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 256  # of the hidden layer


class PooledHead(nn.Module):
    """Layer norm and an MLP on the features of all levels, each averaged over X and Y and interpolated along Z.

    In: features, fine to coarse, each (B, F, x, y, z). Out: logits (B, Z, N, K).

    Args:
        channels: F of each level.
    """

    def __init__(
        self, channels: Sequence[int], num_slices: int, num_clusterers: int, num_classes: int
    ) -> None:
        super().__init__()
        self.num_slices, self.num_clusterers = num_slices, num_clusterers
        width = sum(channels)
        layers = nn.Linear(width, WIDTH), nn.GELU(), nn.Linear(WIDTH, num_clusterers * num_classes)
        self.mlp = nn.Sequential(nn.LayerNorm(width), *layers)

    def forward(self, feats: Sequence[Tensor]) -> Tensor:
        pooled = [feat_BFxyz.mean((2, 3)) for feat_BFxyz in feats]
        levels = [F.interpolate(feat_BFz, self.num_slices, mode="linear") for feat_BFz in pooled]
        logits_BZM = self.mlp(torch.cat(levels, 1).transpose(1, 2))
        return logits_BZM.unflatten(2, (self.num_clusterers, -1))
