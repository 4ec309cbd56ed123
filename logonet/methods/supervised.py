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
from torch.autograd.function import once_differentiable

from logonet.core.config import NonNegative, Section
from logonet.core.errors import UserError
from logonet.data import augment
from logonet.methods import DataSpec
from logonet.methods._parts import freeze, modules_under, ratio

NEEDS = frozenset({"labels"})
SMOOTH = 1e-5  # the epsilon of Eq. 7


@dataclass(frozen=True)
class Config(Section, key="method"):
    """Defaults are the best row of the paper's Table 10.

    Attributes:
        w_dice: w_dl of Eq. 6.
        w_ce: w_cl of Eq. 6.
        encoder: "frozen" trains the decoder and the classifier on an encoder that stays what it is, running
            statistics of its normalisations included.
        augment: how crops are distorted.
    """

    w_dice: NonNegative = 1.0
    w_ce: NonNegative = 1.0
    encoder: Literal["train", "frozen"] = "train"
    augment: augment.Config = field(default_factory=augment.Config)


def check(cfg: Config, facts: DataSpec) -> None:
    """Raise UserError when ``cfg`` cannot work on labels like these."""
    check_losses(cfg)
    if facts.num_classes < 2:
        raise UserError(
            f"supervised learns from labels and the data declares {facts.num_classes} classes, background "
            "included; import labelled scans that declare at least 2"
        )


def check_losses(cfg: Any) -> None:
    if not cfg.w_dice + cfg.w_ce:
        raise UserError("method.w_dice and method.w_ce are both 0; set one of them above 0")


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


def build(cfg: Config, backbone: nn.Module, facts: DataSpec) -> nn.Module:
    """The segmentation module on ``backbone``."""
    return Supervised(cfg, backbone, facts)


class Supervised(nn.Module):
    """``forward`` as the package's contract says."""

    def __init__(self, cfg: Config, backbone: Any, facts: DataSpec) -> None:
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
        guess_BV, truth_BV = logits_BKXYZ.argmax(1).flatten(1), labels_BXYZ.flatten(1)
        guess_BK, truth_BK, right_BK = (
            per_class(values, where_BV, self.num_classes)[:, 1:]
            for values, where_BV in [(None, guess_BV), (None, truth_BV), (guess_BV == truth_BV, truth_BV)]
        )
        both_BK, sizes_BK = 2 * right_BK, guess_BK + truth_BK
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
    logits_BKV, labels_BV = logits_BKXYZ.flatten(2), labels_BXYZ.flatten(1)
    with torch.autocast(logits_BKV.device.type, enabled=False):
        logits_BKV = logits_BKV.to(torch.promote_types(logits_BKV.dtype, torch.float32))
        ce_B, both_BK, p_BK = _SoftmaxSums.apply(logits_BKV, labels_BV.long())
        t_BK = per_class(None, labels_BV, logits_BKV.shape[1]).to(p_BK)
        dice_BK = (2 * both_BK + SMOOTH) / (p_BK + t_BK + SMOOTH)
        return 1 - dice_BK.mean(1), ce_B


class _SoftmaxSums(torch.autograd.Function):
    """What Eq. 7 and 8 need of the softmax p of logits_BKV: the mean of -log p at the label, (B,); for each
    class the sum of p where it is the label, (B, K); and of p everywhere, (B, K).

    By hand, because the loss is where training needs most memory: one map of the logits' size is kept, where
    one-hot labels and what autograd keeps of each step make several.
    """

    @staticmethod
    def forward(ctx: Any, logits_BKV: Tensor, labels_BV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_p_BKV = F.log_softmax(logits_BKV, dim=1)
        ctx.save_for_backward(log_p_BKV, labels_BV)
        log_p_BV = log_p_BKV.gather(1, labels_BV[:, None])[:, 0]
        both_BK = per_class(log_p_BV.exp(), labels_BV, logits_BKV.shape[1])
        return -log_p_BV.mean(1), both_BK.to(log_p_BV), log_p_BKV.exp().sum(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_ce_B: Tensor, d_both_BK: Tensor, d_p_BK: Tensor) -> tuple[Tensor, None]:
        log_p_BKV, labels_BV = ctx.saved_tensors
        label_B1V, p_BKV = labels_BV[:, None], log_p_BKV.exp()
        # dL/dz = p (dL/dp - sum over classes of p dL/dp), where dL/dp is d_p plus, at the label, d_both. Of
        # the cross-entropy it is p, at the label p - 1.
        at_label_B1V = d_both_BK.gather(1, labels_BV)[:, None] * p_BKV.gather(1, label_B1V)
        inner_B1V = (d_p_BK[:, :, None] * p_BKV).sum(1, keepdim=True) + at_label_B1V
        d_ce_B11 = d_ce_B[:, None, None] / labels_BV.shape[1]
        d_logits_BKV = (d_p_BK[:, :, None] - (inner_B1V - d_ce_B11)).mul_(p_BKV)
        return d_logits_BKV.scatter_add_(1, label_B1V, at_label_B1V - d_ce_B11), None


def per_class(values_BV: Tensor | None, labels_BV: Tensor, num_classes: int) -> Tensor:
    """The sum of ``values_BV`` (None: of ones) over the voxels of each class, float64 (B, num_classes)."""
    # float64: these are sums of one number after the other, on CUDA in no fixed order, so in float32 they
    # would be coarse and differ from run to run.
    values = torch.ones((), device=labels_BV.device) if values_BV is None else values_BV
    sums_BK = torch.zeros(len(labels_BV), num_classes, dtype=torch.float64, device=labels_BV.device)
    return sums_BK.scatter_add_(1, labels_BV.long(), values.double().expand_as(labels_BV))


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
