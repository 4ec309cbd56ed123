"""Segmentation from labels with Dice and cross-entropy (LoGoNet's appendix, Eq. 6-8 and Table 10).

Finetuning and training from scratch are both this; they differ in the weights the backbone comes with.

Shapes: B samples, C input channels, K classes (0 is background), X Y Z the crop's axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logonet import augment
from logonet.errors import UserError
from logonet.methods import Facts
from logonet.methods._parts import freeze, modules_under, ratio

NEEDS = frozenset({"labels"})
SMOOTH = 1e-5  # the epsilon of Eq. 7


@dataclass(frozen=True)
class Config:
    """Defaults are the best row of the paper's Table 10.

    Attributes:
        w_dice: w_dl of Eq. 6.
        w_ce: w_cl of Eq. 6.
        encoder: "frozen" trains the decoder and the classifier on an encoder that stays what it is, running
            statistics of its normalisations included.
        augment: how crops are distorted.
    """

    w_dice: float = 1.0
    w_ce: float = 1.0
    encoder: Literal["train", "frozen"] = "train"
    augment: augment.Config = field(default_factory=augment.Config)


def check(cfg: Config, facts: Facts) -> None:
    """Raise UserError when ``cfg`` cannot work on labels like these."""
    if min(cfg.w_dice, cfg.w_ce) < 0 or cfg.w_dice + cfg.w_ce == 0:
        raise UserError(
            f"w_dice is {cfg.w_dice} and w_ce is {cfg.w_ce}; set both to 0 or above and one of them above 0"
        )
    if facts.num_classes < 2:
        raise UserError(
            f"supervised learns from labels and the data declares {facts.num_classes} classes, background "
            "included; import labelled scans that declare at least 2"
        )


def prepare(sample: Mapping[str, Any], cfg: Config, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Distort one crop.

    Returns:
        ``image`` float32 (C, X, Y, Z), nominally in [0, 1], and ``labels`` uint8 (X, Y, Z).
    """
    image_CXYZ = sample["image_CXYZ"].astype(np.float32) / 65535
    labels_XYZ = sample["labels_XYZ"].astype(np.uint8, copy=False)
    drawn = augment.draw(cfg.augment, labels_XYZ.shape, rng)
    image_CXYZ, labels_XYZ = augment.apply(image_CXYZ, labels_XYZ, drawn)
    return {"image": image_CXYZ, "labels": labels_XYZ}


def build(cfg: Config, backbone: nn.Module, facts: Facts) -> nn.Module:
    """The segmentation module on ``backbone``."""
    return Supervised(cfg, backbone, facts)


class Supervised(nn.Module):
    """``forward`` as the package's contract says."""

    def __init__(self, cfg: Config, backbone: Any, facts: Facts) -> None:
        super().__init__()
        self.cfg, self.num_classes = cfg, facts.num_classes
        self.backbone: Any = backbone
        if cfg.encoder == "frozen":
            freeze(backbone, backbone.encoder_prefixes)
        self.train()

    def train(self, mode: bool = True) -> Supervised:
        """As nn.Module's, except that a frozen encoder stays in eval mode: batch norm would drift, dropout drop."""
        super().train(mode)
        if self.cfg.encoder == "frozen":
            for module in modules_under(self.backbone, self.backbone.encoder_prefixes):
                module.train(False)
        return self

    def forward(self, batch: Mapping[str, Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one batch of what ``prepare`` returns; ``progress`` drives nothing here."""
        x_BCXYZ, labels_BXYZ = batch["image"], batch["labels"]
        out = self.backbone.decode(x_BCXYZ, self.backbone.encode(x_BCXYZ))
        parts = [dice_and_ce(logits, nearest(labels_BXYZ, logits)) for logits in (out.logits, *out.deep)]
        losses = [(self.cfg.w_dice * dice_B + self.cfg.w_ce * ce_B).mean() for dice_B, ce_B in parts]
        loss = torch.stack([w * one for w, one in zip(deep_weights(len(parts)), losses)]).sum()
        num_samples = len(labels_BXYZ)
        metrics = self._metrics(out.logits, labels_BXYZ)
        if out.aux_loss is not None:
            loss = loss + out.aux_loss
            metrics["aux_loss"] = ratio(out.aux_loss * num_samples, num_samples)
        dice_B, ce_B = parts[0]
        metrics["dice_loss"] = ratio(dice_B.sum(), num_samples)
        metrics["ce"] = ratio(ce_B.sum(), num_samples)
        metrics["loss"] = ratio(loss * num_samples, num_samples)
        return loss, metrics

    @torch.no_grad()
    def _metrics(self, logits_BKXYZ: Tensor, labels_BXYZ: Tensor) -> dict[str, Tensor]:
        """Hard Dice without background.

        ``train_dice_per_class``, (2, K - 1): 2 |P and G| over |P| + |G|, both summed over all voxels seen.
        ``train_dice``, (2,): the mean over those classes of those crops that are present or predicted. Either
        count is 0 where there was nothing to find and nothing was found.
        """
        guess_BXYZ = logits_BKXYZ.argmax(1)
        both, sizes = [], []
        for k in range(1, self.num_classes):
            guess_BV, truth_BV = (a.flatten(1) == k for a in (guess_BXYZ, labels_BXYZ))
            both.append(2 * (guess_BV & truth_BV).sum(1))
            sizes.append(guess_BV.sum(1) + truth_BV.sum(1))
        both_BK, sizes_BK = torch.stack(both, 1).double(), torch.stack(sizes, 1).double()
        dice_BK = both_BK / sizes_BK.clamp_min(1)
        return {
            "train_dice_per_class": ratio(both_BK.sum(0), sizes_BK.sum(0)),
            "train_dice": ratio(dice_BK.sum(), (sizes_BK > 0).sum()),
        }


def dice_and_ce(logits_BKXYZ: Tensor, labels_BXYZ: Tensor) -> tuple[Tensor, Tensor]:
    """Dice loss (Eq. 7) and cross-entropy (Eq. 8) of each sample, both (B,), whatever the logits in float32 or better.

    Eq. 7 is taken per class, background included, and averaged over classes; Eq. 8, a sum over classes, is
    averaged over voxels. The paper names MONAI's DiceCELoss, and this is that with softmax, one-hot labels and
    both smoothing terms equal to SMOOTH.
    """
    with torch.autocast(logits_BKXYZ.device.type, enabled=False):
        logits = logits_BKXYZ.to(torch.promote_types(logits_BKXYZ.dtype, torch.float32)).flatten(2)
        labels_BV = labels_BXYZ.flatten(1)
        log_p_BKV = F.log_softmax(logits, dim=1)
        ce_B = -log_p_BKV.gather(1, labels_BV[:, None].long()).mean(dim=(1, 2))
        dice = []
        # One class at a time, against a bool map: a one-hot copy of the labels would be as large as the logits.
        for k, p_BV in enumerate(log_p_BKV.exp().unbind(1)):
            t_BV = labels_BV == k
            both_B, sizes_B = (p_BV * t_BV).sum(1), p_BV.sum(1) + t_BV.sum(1)
            dice.append(1 - (2 * both_B + SMOOTH) / (sizes_B + SMOOTH))
        return torch.stack(dice).mean(0), ce_B


def nearest(labels_BXYZ: Tensor, logits: Tensor) -> Tensor:
    """The labels at the size of ``logits`` (B, K, x, y, z), by nearest neighbour."""
    size = logits.shape[2:]
    if labels_BXYZ.shape[1:] == size:
        return labels_BXYZ
    # float32 holds every class index exactly, and not all of torch's integers can be interpolated.
    small = F.interpolate(labels_BXYZ[:, None].to(torch.float32), size=size, mode="nearest-exact")
    return small[:, 0].to(labels_BXYZ.dtype)


def deep_weights(num_outputs: int) -> Sequence[float]:
    """1, 1/2, 1/4, ... divided by their sum: what each output, fine to coarse, weighs in the loss."""
    total = 2 - 0.5 ** (num_outputs - 1)
    return [0.5**i / total for i in range(num_outputs)]
