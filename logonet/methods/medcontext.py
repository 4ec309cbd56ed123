"""MedContext (Gani et al. 2023): finetuning that also segments masked crops, as a teacher does whole ones.

The student, which is the network that is kept, segments the crop X and its masked copy X^M, both against the labels.
In addition its logits of X^M are drawn to the logits of X from the teacher, the student's moving average (Eq. 2 to 6).
The mask consists of tubes: units of the slice plane, over the whole length of Z.

Published settings: UNETR and SwinUNETR, AdamW at 1e-4, weight decay 1e-5, 50 epochs of warm-up, 5000 epochs (Synapse),
4 crops of 96^3 a step; nnFormer, crops of (128, 128, 64), ``unit_vox=4``, SGD with Nesterov momentum 0.99, gradients
clipped at 12. A step costs two passes of the student and one, without gradient, of the teacher.

Shapes: B samples, C input channels, K classes (0 is background), X Y Z the crop's axes, x y units of the slice plane,
V voxels, E columns of a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from logonet.core.config import OMIT_DEFAULT, Count, Fraction, NonNegative, Share
from logonet.core.errors import UserError
from logonet.data import augment
from logonet.methods import DataSpec, _segmentation
from logonet.methods._parts import MethodModule, check_weights, means, ratio, sums, wide
from logonet.methods._selfsup import check_momentum, follow, follow_all, pooled, teacher_of
from logonet.networks import Network, SegOut, TokenNetwork

NEEDS = frozenset({"labels"})
SMALLEST = 1e-8  # lower bound of a mean square of logits in a denominator
CONSTANT = 1e-3  # variation of the teacher's logits; healthy training has tenths


@dataclass(frozen=True)
class Config(_segmentation.Losses, key="method"):
    """Defaults are the paper's where it gives them, but for ``squared``: its Eq. 3 has squares.

    Attributes:
        augment: as of ``supervised``.
        mask_ratio: share of the units of the slice plane that are hidden, rounded down (0.4, the best of Table 7).
        unit_vox: side of a unit in voxels. The paper's is a token of its network: UNETR's 16, nnFormer's 4.
            SwinUNETR's would be 2, which its neighbours give away: leave it at 16 there.
        beta: weight of the consistency (Eq. 4). The paper does not give it; the released code has 0.5.
        consistency: "paper" is Eq. 2. "released" divides the mean squared difference by the norm of the teacher's
            logits, not squared, as the released code does: at 96^3 and 14 classes next to nothing.
        momentum_start, momentum_end: share that the teacher keeps of itself at each step, along half a cosine.
        w_whole, w_masked: weights of the supervised losses of the whole crop and of the masked one. The paper's loss
            ablation: w_masked=0 is the consistency alone (CL), beta=0 the masked student's loss alone (MSL).
        export: whose weights are validated and stored, and so segment. The paper finds the student's better.
    """

    mask_ratio: Fraction = 0.4
    unit_vox: Count = 16
    beta: NonNegative = 0.5
    consistency: Literal["paper", "released"] = "paper"
    momentum_start: Share = 0.996
    momentum_end: Share = 1.0
    augment: augment.Config = field(default_factory=augment.Config)
    w_whole: NonNegative = field(default=1.0, metadata=OMIT_DEFAULT)
    w_masked: NonNegative = field(default=1.0, metadata=OMIT_DEFAULT)
    export: Literal["student", "teacher"] = field(default="student", metadata=OMIT_DEFAULT)


def check(cfg: Config, data_spec: DataSpec) -> None:
    """Raise UserError when ``cfg`` cannot work on labelled crops like these."""
    check_weights(cfg, "w_dice", "w_ce")
    check_weights(cfg, "w_whole", "w_masked")
    check_weights(cfg, "w_masked", "beta")  # else nothing would look at the masked crop
    check_momentum(cfg)
    if any(side % cfg.unit_vox for side in data_spec.size_vox[:2]):
        num_x, num_y, _ = data_spec.size_vox
        raise UserError(
            f"unit_vox is {cfg.unit_vox}, which does not divide the crop's slices of {num_x}x{num_y} voxels; set it "
            f"to a divisor of {math.gcd(num_x, num_y)}"
        )
    num_units = math.prod(units(cfg, data_spec.size_vox))
    if not 0 < num_hidden(cfg, num_units) < num_units:
        raise UserError(
            f"mask_ratio {cfg.mask_ratio} hides {num_hidden(cfg, num_units)} of the {num_units} units of a slice; "
            "lower unit_vox, or set it in (0, 1)"
        )
    _segmentation.check_classes("medcontext", data_spec)


def units(cfg: Config, size_vox: tuple[int, ...]) -> tuple[int, int]:
    """How many units a slice has along X and Y."""
    return size_vox[0] // cfg.unit_vox, size_vox[1] // cfg.unit_vox


def num_hidden(cfg: Config, num_units: int) -> int:
    """How many of the units of a slice are hidden."""
    # 1e-9: 0.29 * 100 is 28.999999999999996.
    return int(cfg.mask_ratio * num_units + 1e-9)


def prepare(sample: Mapping[str, Any], cfg: Config, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Distort one crop as ``supervised`` does, and draw what to hide of it.

    Returns:
        ``image`` float32 (C, X, Y, Z), nominally in [0, 1]; ``labels`` uint8 (X, Y, Z); ``hidden`` bool (x, y), the
        units of the slice plane that are hidden in every slice.
    """
    ready = _segmentation.distorted(sample, cfg.augment, rng)
    hidden_xy = np.zeros(units(cfg, ready["labels"].shape), dtype=bool)
    # The paper draws each unit by itself (Eq. 1); an exact number, of each crop anew, has less noise. The released
    # code gives one mask to a whole batch.
    hidden_xy.flat[rng.permutation(hidden_xy.size)[: num_hidden(cfg, hidden_xy.size)]] = True
    return {**ready, "hidden": hidden_xy}


class MedContext(MethodModule[Config]):
    """Student, teacher and what hidden parts are replaced by; ``forward`` as the package's contract says."""

    backbone: TokenNetwork

    def __init__(self, cfg: Config, network: TokenNetwork, data_spec: DataSpec) -> None:
        """The network need not be one of tokens.

        Raises:
            UserError: where it is, and units are not made of whole tokens.
        """
        super().__init__(cfg, network)
        self.num_classes, self.ignores = data_spec.num_classes, data_spec.ignores
        self.regions = _segmentation.Regions(data_spec.regions) if data_spec.regions else None
        self.teacher = teacher_of(network)
        # In the released UNETR the first skip reads the unmasked crop, so the network sees what is hidden after all.
        # Here hidden voxels are blanked before anything reads them, and tokens, where there are any, are replaced too:
        # before positions are added, or all hidden tokens would be equal, as they are in the released code.
        self.blank = nn.Parameter(torch.zeros(data_spec.in_channels))
        self.token: nn.Parameter | None = None
        if hasattr(network, "encode_hidden"):
            stride_x, stride_y, _ = network.embed_stride
            if cfg.unit_vox % stride_x or cfg.unit_vox % stride_y:
                raise UserError(
                    f"unit_vox is {cfg.unit_vox} and a token of the network {stride_x}x{stride_y} voxels wide; set it "
                    f"to a multiple of {math.lcm(stride_x, stride_y)}"
                )
            self.token = nn.Parameter(torch.zeros(network.embed_channels))
        self.train()

    def train(self, mode: bool = True) -> MedContext:
        """As nn.Module's, but of the teacher only the batch norms change mode; its dropout stays off."""
        super().train(mode)
        self.teacher.train(False)
        for module in self.teacher.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train(mode)
        return self

    @property
    def exported(self) -> Network:
        """The student or the teacher."""
        return self.teacher if self.cfg.export == "teacher" else self.backbone

    def forward(self, batch: Mapping[str, Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one batch of what ``prepare`` returns; ``progress`` drives the teacher alone."""
        if progress == 0:
            # Pretrained weights are loaded after the module is built, and only into the student.
            follow(self.teacher, self.backbone, 0.0)
        x_BCXYZ, labels_BXYZ, hidden_BXYZ = batch["image"], batch["labels"], self.voxels(batch)
        feats = self.backbone.encode(x_BCXYZ)
        whole = self.backbone.decode(x_BCXYZ, feats)
        masked = self.masked(x_BCXYZ, hidden_BXYZ)
        with torch.no_grad():
            target_BKXYZ = self.teacher.decode(x_BCXYZ, self.teacher.encode(x_BCXYZ)).logits
        whole_B, dice_B, ce_B = self._supervised(whole, labels_BXYZ)
        masked_B, masked_dice_B, masked_ce_B = self._supervised(masked, labels_BXYZ)
        apart_B = consistency(masked.logits, target_BKXYZ, self.cfg.consistency)
        loss = (self.cfg.w_whole * whole_B + self.cfg.w_masked * masked_B + self.cfg.beta * apart_B).mean()
        num_samples = len(labels_BXYZ)
        metrics = self._metrics(whole.logits, masked.logits, target_BKXYZ, labels_BXYZ)
        if whole.aux_loss is not None:
            # For the whole crop alone: an auxiliary loss, such as reconstructing the input, makes no sense for blanks.
            loss = loss + whole.aux_loss
            metrics |= means(num_samples, aux_loss=whole.aux_loss)
        metrics |= means(num_samples, loss=loss) | sums(num_samples, dice_loss=dice_B, ce=ce_B)
        metrics |= sums(num_samples, masked_dice_loss=masked_dice_B, masked_ce=masked_ce_B)
        metrics |= sums(num_samples, consistency=apart_B)
        metrics["masked_share"] = ratio(hidden_BXYZ.sum(), hidden_BXYZ.numel())
        metrics["embeddings_BF"] = pooled(feats[-1].detach()).float()
        return loss, metrics

    def voxels(self, batch: Mapping[str, Tensor]) -> Tensor:
        """What is hidden, bool (B, X, Y, Z)."""
        side = self.cfg.unit_vox
        hidden_BXY = batch["hidden"].repeat_interleave(side, dim=1).repeat_interleave(side, dim=2)
        return hidden_BXY[..., None].expand(batch["labels"].shape)

    def masked(self, x_BCXYZ: Tensor, hidden_BXYZ: Tensor) -> SegOut:
        """The student's ``decode`` of a crop of which it cannot see the hidden voxels."""
        x_BCXYZ = torch.where(hidden_BXYZ[:, None], self.blank[:, None, None, None], x_BCXYZ)
        if self.token is None:
            return self.backbone.decode(x_BCXYZ, self.backbone.encode(x_BCXYZ))
        step_x, step_y, step_z = self.backbone.embed_stride
        hidden_Bxyz = hidden_BXYZ[:, ::step_x, ::step_y, ::step_z]
        return self.backbone.decode(x_BCXYZ, self.backbone.encode_hidden(x_BCXYZ, hidden_Bxyz, self.token))

    def after_step(self, progress: float) -> None:
        """Let the teacher follow.

        Algorithm 1 prints a minus where Eq. 6 has a plus; with it the teacher would become the student's negative. The
        released code warms the momentum up by the step of the epoch, so that its teacher is nearly the student.
        """
        follow_all(self.cfg, progress, (self.teacher, self.backbone))

    def _supervised(self, out: SegOut, labels_BXYZ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted loss over all outputs, and the Dice loss and cross-entropy of the finest; each (B,)."""
        # Eq. 3 lacks 1/C and turns the cross-entropy's sign: the DiceCE of ``supervised`` is meant.
        if self.regions is None:
            parts = _segmentation.of_all_outputs(out, labels_BXYZ, self.ignores, self.cfg)
        else:
            parts = self.regions.losses(out, labels_BXYZ, self.cfg)
        losses = [self.cfg.w_dice * dice_B + self.cfg.w_ce * ce_B for dice_B, ce_B in parts]
        weighted = [w * loss_B for w, loss_B in zip(_segmentation.deep_weights(len(parts)), losses)]
        return torch.stack(weighted).sum(0), *parts[0]

    @torch.no_grad()
    def _metrics(
        self, whole: Tensor, masked: Tensor, target: Tensor, labels_BXYZ: Tensor
    ) -> dict[str, Tensor]:
        """``train_dice`` and ``train_dice_per_class`` as of ``supervised``, of the whole crop.

        ``agreement``: Dice of what the student answers to the masked crop with what the teacher answers to the whole
        one, averaged over the classes, background included, or the regions that either answers.
        ``teacher_variation``: variance of the teacher's logits over voxels as a share of their mean square; 0 where it
        says the same everywhere.
        """
        if self.regions is None:
            found = _segmentation.hard_dice(whole, labels_BXYZ, self.num_classes)
            alike_BK, answers_BK = _segmentation.overlap(masked.argmax(1), target.argmax(1), self.num_classes)
        else:
            found = self.regions.metrics(whole, labels_BXYZ)
            one_BKV, other_BKV = (logits.flatten(2) > 0 for logits in (masked, target))
            alike_BK = 2 * (one_BKV & other_BKV).sum(2).double()
            answers_BK = (one_BKV.sum(2) + other_BKV.sum(2)).double()
        target_BKV = target.flatten(2).float()
        variance_B, square_B = target_BKV.var(2, correction=0).mean(1), target_BKV.square().mean((1, 2))
        return {
            **found,
            "agreement": _segmentation.mean_dice(alike_BK, answers_BK),
            **sums(len(variance_B), teacher_variation=variance_B / square_B.clamp_min(SMALLEST)),
        }


def consistency(
    student_BKXYZ: Tensor, teacher_BKXYZ: Tensor, mode: Literal["paper", "released"] = "paper"
) -> Tensor:
    """How far the student's logits are from the teacher's, (B,), in float32 or better: see `Config`.

    Eq. 2 is of one volume. The released code takes its norms over the batch, whose loss would then not be the mean
    of its samples' losses and change with the number of workers.
    """
    with torch.autocast(student_BKXYZ.device.type, enabled=False):
        student_BV, teacher_BV = (wide(x).flatten(1) for x in (student_BKXYZ, teacher_BKXYZ))
        # Means, where Eq. 2 has sums: the same ratio, and no sum of millions of squares in float32.
        error_B = (student_BV - teacher_BV).square().mean(1)
        power_B = teacher_BV.square().mean(1).clamp_min(SMALLEST)
        return error_B / (power_B if mode == "paper" else (power_B * teacher_BV.shape[1]).sqrt())


def warning(entry: Mapping[str, Any]) -> str | None:
    """Whether the teacher has become constant: then there is nothing to be consistent with."""
    value = entry.get("teacher_variation", math.inf)
    if value >= CONSTANT:
        return None
    return (
        f"the teacher gives all voxels nearly the same logits (variation {value:.1e}, where healthy ones have tenths): "
        "lower train.lr, or method.beta"
    )


build = MedContext
