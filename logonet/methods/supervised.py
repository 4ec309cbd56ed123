"""Segmentation from labels with Dice and cross-entropy (LoGoNet's appendix, Eq. 6-8 and Table 10).

Where the data declares regions that overlap (BraTS), each is an output with a sigmoid of its own, under Dice and binary
cross-entropy. Finetuning and training from scratch are both this; they differ in the weights the backbone comes with.

Shapes: B samples, C input channels, K classes (0 is background), X Y Z the crop's axes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from logonet.data import augment
from logonet.methods import DataSpec, _segmentation
from logonet.methods._parts import MethodModule, check_weights, freeze, means, modules_under, sums
from logonet.networks import Network

NEEDS = frozenset({"labels"})


@dataclass(frozen=True)
class Config(_segmentation.Losses, key="method"):
    """Defaults are the best row of the paper's Table 10.

    Attributes:
        encoder: "frozen" trains the decoder and the classifier on an encoder that stays what it is, running
            statistics of its normalisations included.
        augment: how crops are distorted.
    """

    encoder: Literal["train", "frozen"] = "train"
    augment: augment.Config = field(default_factory=augment.Config)


def check(cfg: Config, data_spec: DataSpec) -> None:
    """Raise UserError when ``cfg`` cannot work on labels like these."""
    check_weights(cfg, "w_dice", "w_ce")
    _segmentation.check_classes("supervised", data_spec)


def prepare(sample: Mapping[str, Any], cfg: Config, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Distort one crop.

    Returns:
        ``image`` float32 (C, X, Y, Z), nominally in [0, 1], and ``labels`` uint8 (X, Y, Z).
    """
    return _segmentation.distorted(sample, cfg.augment, rng)


class Supervised(MethodModule[Config]):
    """``forward`` as the package's contract says."""

    def __init__(self, cfg: Config, network: Network, data_spec: DataSpec) -> None:
        super().__init__(cfg, network)
        self.num_classes, self.ignores = data_spec.num_classes, data_spec.ignores
        self.regions = _segmentation.Regions(data_spec.regions) if data_spec.regions else None
        if cfg.encoder == "frozen":
            freeze(network, network.encoder_prefixes)
        self.train()

    def train(self, mode: bool = True) -> Supervised:
        """As nn.Module's, but a frozen encoder stays in eval mode: no dropout, fixed running statistics."""
        super().train(mode)
        if self.cfg.encoder == "frozen":
            for module in modules_under(self.backbone, self.backbone.encoder_prefixes):
                module.train(False)
        return self

    def forward(self, batch: Mapping[str, Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one batch of what ``prepare`` returns; they do not depend on ``progress``."""
        x_BCXYZ, labels_BXYZ = batch["image"], batch["labels"]
        out = self.backbone.decode(x_BCXYZ, self.backbone.encode(x_BCXYZ))
        if self.regions is None:
            parts = _segmentation.of_all_outputs(out, labels_BXYZ, self.ignores, self.cfg)
            metrics = _segmentation.hard_dice(out.logits, labels_BXYZ, self.num_classes)
        else:
            parts = self.regions.losses(out, labels_BXYZ, self.cfg)
            metrics = self.regions.metrics(out.logits, labels_BXYZ)
        losses = [(self.cfg.w_dice * dice_B + self.cfg.w_ce * ce_B).mean() for dice_B, ce_B in parts]
        weights = _segmentation.deep_weights(len(parts))
        loss = torch.stack([w * one for w, one in zip(weights, losses)]).sum()
        num_samples = len(labels_BXYZ)
        if out.aux_loss is not None:
            loss = loss + out.aux_loss
            metrics |= means(num_samples, aux_loss=out.aux_loss)
        dice_B, ce_B = parts[0]
        return loss, metrics | sums(num_samples, dice_loss=dice_B, ce=ce_B) | means(num_samples, loss=loss)


build = Supervised
