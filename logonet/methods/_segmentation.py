"""What methods that learn from labels share: the distorted crop, Dice and cross-entropy.

Equation numbers are those of LoGoNet's appendix.

Shapes: B samples, C input channels, K classes (0 is background), X Y Z the crop's axes, V voxels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from logonet.core.config import OMIT_DEFAULT, NonNegative, Section
from logonet.core.errors import UserError
from logonet.data import augment, volume
from logonet.data.classes import IGNORE, membership
from logonet.methods import DataSpec
from logonet.methods._parts import ratio, wide
from logonet.networks import SegOut

SMOOTH = 1e-5  # the epsilon of Eq. 7


@dataclass(frozen=True)
class Losses(Section, key="method"):
    """Dice and cross-entropy, in the configs of methods that learn from labels.

    Attributes:
        w_dice: w_dl of Eq. 6.
        w_ce: w_cl of Eq. 6.
        batch_dice: Eq. 7's sums are over the voxels of all crops of a forward pass, as nnFormer and nnU-Net have it, so
            that a class that a crop lacks is not counted as missed in it.
        background: Eq. 7's mean over the classes includes background; nnFormer and nnU-Net leave it out. It stays in
            the cross-entropy.
        squared: Eq. 7's denominator has the squares of the probabilities (MedContext's Eq. 3, MONAI's recipes).
    """

    w_dice: NonNegative = 1.0
    w_ce: NonNegative = 1.0
    batch_dice: bool = field(default=False, metadata=OMIT_DEFAULT)
    background: bool = field(default=True, metadata=OMIT_DEFAULT)
    squared: bool = field(default=False, metadata=OMIT_DEFAULT)


PLAIN = Losses()


def check_classes(name: str, data_spec: DataSpec) -> None:
    """Raise UserError where the labels have nothing but background."""
    if data_spec.num_classes < 2 and not data_spec.regions:
        raise UserError(
            f"{name} learns from labels and the data declares {data_spec.num_classes} classes, background included; "
            "import labelled scans that declare at least 2"
        )


def distorted(
    sample: Mapping[str, Any], cfg: augment.Config, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """One crop, distorted: ``image`` float32 (C, X, Y, Z), nominally in [0, 1], and ``labels`` uint8 (X, Y, Z)."""
    image_CXYZ = volume.from_uint16(sample["image_CXYZ"])
    labels_XYZ = sample["labels_XYZ"].astype(np.uint8, copy=False)
    drawn = augment.draw(cfg, labels_XYZ.shape, rng)
    image_CXYZ, labels_XYZ = augment.apply(image_CXYZ, labels_XYZ, drawn)
    return {"image": image_CXYZ, "labels": labels_XYZ}


def of_all_outputs(
    out: SegOut, labels_BXYZ: Tensor, ignores: bool, cfg: Losses = PLAIN
) -> list[tuple[Tensor, Tensor]]:
    """`dice_and_ce` of each output of a network, fine to coarse, against the labels at its size."""
    outputs = (out.logits, *out.deep)
    return [dice_and_ce(logits, nearest(labels_BXYZ, logits), ignores, cfg) for logits in outputs]


def dice_and_ce(
    logits_BKXYZ: Tensor, labels_BXYZ: Tensor, ignores: bool = False, cfg: Losses = PLAIN
) -> tuple[Tensor, Tensor]:
    """Dice loss (Eq. 7) and cross-entropy (Eq. 8) of each sample, both (B,), whatever the logits in float32 or better.

    Eq. 7 is taken per class, background included, and averaged over classes; Eq. 8, a sum over classes, is
    averaged over voxels. The paper names MONAI's DiceCELoss, and this is that with softmax, one-hot labels and
    both smoothing terms equal to SMOOTH.

    Args:
        ignores: labels may be IGNORE; such voxels are left out of all sums, as nnU-Net leaves them out.
        cfg: variants of Eq. 7; the weights are not applied here. With ``batch_dice`` all samples have the same Dice
            loss.
    """
    logits_BKV, labels_BV = logits_BKXYZ.flatten(2), labels_BXYZ.flatten(1)
    with torch.autocast(logits_BKV.device.type, enabled=False):
        logits_BKV = wide(logits_BKV)
        known_BV = (labels_BV != IGNORE).to(logits_BKV) if ignores else None
        labels_BV = labels_BV.long() if known_BV is None else labels_BV.long() * (known_BV > 0)
        ce_B, both_BK, p_BK = _SoftmaxSums.apply(logits_BKV, labels_BV, known_BV, cfg.squared)
        t_BK = per_class(known_BV, labels_BV, logits_BKV.shape[1]).to(p_BK)
        first = 0 if cfg.background else 1
        return _dice_loss(both_BK[:, first:], p_BK[:, first:], t_BK[:, first:], cfg.batch_dice), ce_B


def _dice_loss(both_BK: Tensor, p_BK: Tensor, t_BK: Tensor, over_batch: bool) -> Tensor:
    """1 - Eq. 7, averaged over the classes, of each sample or of all together, (B,), from sums over voxels."""
    if over_batch:
        both_BK, p_BK, t_BK = (x_BK.sum(0, keepdim=True).expand_as(x_BK) for x_BK in (both_BK, p_BK, t_BK))
    dice_BK = (2 * both_BK + SMOOTH) / (p_BK + t_BK + SMOOTH)
    return 1 - dice_BK.mean(1)


class Regions(nn.Module):
    """Losses and metrics of outputs that are regions, which overlap: each is decided by itself, by its own sigmoid.

    Dice and binary cross-entropy as nnU-Net's DC_and_BCE_loss has them, of each sample, with Eq. 7's smoothing.

    Args:
        members: the class indices of each of the R regions.
    """

    bits: Tensor

    def __init__(self, members: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.register_buffer("bits", torch.from_numpy(membership(members)), persistent=False)
        self.num_regions = len(members)

    def targets(self, labels_BXYZ: Tensor) -> tuple[Tensor, Tensor]:
        """bool (B, R, V): the voxels of each region; bool (B, 1, V): those that count."""
        labels_B1V = labels_BXYZ.flatten(1)[:, None]
        shifts_R1 = torch.arange(self.num_regions, device=labels_B1V.device)[:, None]
        inside_BRV = (self.bits[labels_B1V.long()].int() >> shifts_R1) & 1 > 0
        return inside_BRV, labels_B1V != IGNORE

    def losses(self, out: SegOut, labels_BXYZ: Tensor, cfg: Losses = PLAIN) -> list[tuple[Tensor, Tensor]]:
        """Dice loss and cross-entropy, each (B,), of each output of a network, fine to coarse."""
        return [self._losses(logits, nearest(labels_BXYZ, logits), cfg) for logits in (out.logits, *out.deep)]

    def _losses(self, logits_BRXYZ: Tensor, labels_BXYZ: Tensor, cfg: Losses) -> tuple[Tensor, Tensor]:
        with torch.autocast(logits_BRXYZ.device.type, enabled=False):
            logits_BRV = wide(logits_BRXYZ.flatten(2))
            inside_BRV, known_B1V = (mask.to(logits_BRV) for mask in self.targets(labels_BXYZ))
            ce_BRV = F.binary_cross_entropy_with_logits(logits_BRV, inside_BRV, reduction="none")
            ce_B = (ce_BRV.mean(1, keepdim=True) * known_B1V).sum((1, 2)) / known_B1V.sum((1, 2)).clamp_min(1)
            p_BRV = logits_BRV.sigmoid() * known_B1V
            t_BRV = inside_BRV * known_B1V
            p_BR = (p_BRV.square() if cfg.squared else p_BRV).sum(2)
            return _dice_loss((p_BRV * t_BRV).sum(2), p_BR, t_BRV.sum(2), cfg.batch_dice), ce_B

    @torch.no_grad()
    def metrics(self, logits_BRXYZ: Tensor, labels_BXYZ: Tensor) -> dict[str, Tensor]:
        """As `hard_dice`, of each region."""
        inside_BRV, known_B1V = self.targets(labels_BXYZ)
        found_BRV, inside_BRV = (logits_BRXYZ.flatten(2) > 0) & known_B1V, inside_BRV & known_B1V
        both_BR = 2 * (found_BRV & inside_BRV).sum(2).double()
        sizes_BR = (found_BRV.sum(2) + inside_BRV.sum(2)).double()
        per_region_2R = ratio(both_BR.sum(0), sizes_BR.sum(0))
        return {"train_dice_per_class": per_region_2R, "train_dice": mean_dice(both_BR, sizes_BR)}


class _SoftmaxSums(torch.autograd.Function):
    """What Eq. 7 and 8 need of the softmax p of logits_BKV: the mean of -log p at the label, (B,); for each
    class the sum of p where it is the label, (B, K); and of p, or of its square, everywhere, (B, K).

    By hand, because the loss is where training needs most memory: one map of the logits' size is kept, where
    one-hot labels and what autograd keeps of each step make several.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_BKV: Tensor, labels_BV: Tensor, known_BV: Tensor | None, squared: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.squared = squared
        log_p_BKV = F.log_softmax(logits_BKV, dim=1)
        ctx.save_for_backward(log_p_BKV, labels_BV, known_BV)
        log_p_BV, p_BKV = log_p_BKV.gather(1, labels_BV[:, None])[:, 0], log_p_BKV.exp()
        p_BV = log_p_BV.exp()
        if known_BV is None:
            ce_B = -log_p_BV.mean(1)
        else:
            ce_B = -(log_p_BV * known_BV).sum(1) / known_BV.sum(1).clamp_min(1)
            p_BV, p_BKV = p_BV * known_BV, p_BKV.mul_(known_BV[:, None])
        both_BK = per_class(p_BV, labels_BV, logits_BKV.shape[1])
        return ce_B, both_BK.to(log_p_BV), (p_BKV.square_() if squared else p_BKV).sum(2)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_ce_B: Tensor, d_both_BK: Tensor, d_sum_BK: Tensor
    ) -> tuple[Tensor, None, None, None]:
        log_p_BKV, labels_BV, known_BV = ctx.saved_tensors
        label_B1V, p_BKV = labels_BV[:, None], log_p_BKV.exp()
        # dL/dz = p (dL/dp - sum over classes of p dL/dp), where dL/dp is d_p plus, at the label, d_both. Of
        # the cross-entropy it is p, at the label p - 1.
        at_label_B1V = d_both_BK.gather(1, labels_BV)[:, None] * p_BKV.gather(1, label_B1V)
        d_p = d_sum_BK[:, :, None]
        d_p = 2 * d_p * p_BKV if ctx.squared else d_p
        inner_B1V = (d_p * p_BKV).sum(1, keepdim=True) + at_label_B1V
        counted_B = labels_BV.shape[1] if known_BV is None else known_BV.sum(1).clamp_min(1)
        d_ce_B11 = (d_ce_B / counted_B)[:, None, None]
        d_logits_BKV = (d_p - (inner_B1V - d_ce_B11)).mul_(p_BKV)
        d_logits_BKV = d_logits_BKV.scatter_add_(1, label_B1V, at_label_B1V - d_ce_B11)
        return d_logits_BKV if known_BV is None else d_logits_BKV.mul_(known_BV[:, None]), None, None, None


def per_class(values_BV: Tensor | None, labels_BV: Tensor, num_classes: int) -> Tensor:
    """The sum of ``values_BV`` (None: of ones) over the voxels of each class, float64 (B, num_classes)."""
    values = torch.ones((), device=labels_BV.device) if values_BV is None else values_BV
    if labels_BV.device.type == "cuda":
        return by_comparison(values, labels_BV, num_classes)
    # float64: these are sums of one number after the other, so in float32 they would be coarse.
    sums_BK = torch.zeros(len(labels_BV), num_classes, dtype=torch.float64, device=labels_BV.device)
    return sums_BK.scatter_add_(1, labels_BV.long(), values.double().expand_as(labels_BV))


def by_comparison(values: Tensor, labels_BV: Tensor, num_classes: int) -> Tensor:
    """`per_class` in a pass for each class: slower on a CPU, but on CUDA all voxels of a class would else queue for one
    address, and in no fixed order."""
    sums = [torch.where(labels_BV == k, values, 0).sum(1, dtype=torch.float64) for k in range(num_classes)]
    return torch.stack(sums, dim=1)


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


def overlap(guess_BXYZ: Tensor, truth_BXYZ: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """For each class 2 |P and G| and |P| + |G|, float64 (B, K); voxels to ignore count as background in both."""
    known_BV = truth_BXYZ.flatten(1) != IGNORE
    guess_BV, truth_BV = guess_BXYZ.flatten(1) * known_BV, truth_BXYZ.flatten(1) * known_BV
    sizes_BK = per_class(None, guess_BV, num_classes) + per_class(None, truth_BV, num_classes)
    return 2 * per_class(guess_BV == truth_BV, truth_BV, num_classes), sizes_BK


@torch.no_grad()
def hard_dice(logits_BKXYZ: Tensor, labels_BXYZ: Tensor, num_classes: int) -> dict[str, Tensor]:
    """Metrics: the Dice of the answers, without background.

    ``train_dice_per_class``, (2, K - 1): 2 |P and G| over |P| + |G|, both summed over all voxels seen.
    ``train_dice``, (2,): the mean over those classes of those crops that are present or predicted. Either
    count is 0 where there was nothing to find and nothing was found.
    """
    both_BK, sizes_BK = (x_BK[:, 1:] for x_BK in overlap(logits_BKXYZ.argmax(1), labels_BXYZ, num_classes))
    per_class_2K = ratio(both_BK.sum(0), sizes_BK.sum(0))
    return {"train_dice_per_class": per_class_2K, "train_dice": mean_dice(both_BK, sizes_BK)}


def mean_dice(both_BK: Tensor, sizes_BK: Tensor) -> Tensor:
    """A metric: the mean of ``both / sizes`` over the classes of crops whose size is above 0."""
    return ratio((both_BK / sizes_BK.clamp_min(1)).sum(), (sizes_BK > 0).sum())
