"""SMIT: rebuild hidden blocks, and say of them and of the whole view what a teacher says that sees everything
(Jiang et al. 2022; equations are those of iBOT, Zhou et al. 2022, which it brings to three dimensions).

Two views are cut out of a crop. The network sees each with most of its blocks hidden, their tokens replaced by a
learnt one; a moving average of it sees them whole. Three losses are added up: the mean absolute error of hidden voxels,
which a 1x1x1 convolution rebuilds from the coarsest features; at every hidden block the cross-entropy of the network's
token with the teacher's of the same view; and that of the mean of all tokens with the teacher's of the other view.
Tokens are those of the level that has one for each block. Only the encoder is trained.

Written from the papers. The released code holds the last layer of the projections still for the first of 500 epochs,
and begins the momentum anew in every epoch, so that it stays near 0.996; here nothing is held still and the momentum
rises over the whole training.

SMIT trains a Swin transformer (depths 2, 2, 4, 2, four heads, windows of 4) on views of 96^3 of crops of 128^3 voxels
of 2 mm, CT from -175 to 250 HU, with AdamW, lr 6e-4, batches of 6, 20 of 500 epochs of warm-up, cosine.

Shapes: B samples, M views of all samples (first ones, then second ones), C input channels, X Y Z a view's axes, uvw its
blocks', N blocks (C order), H those that are hidden, F features, K prototypes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logonet.core.config import Count, Fraction, NonNegative, Positive, Section, Share, SizeVox
from logonet.core.errors import UserError
from logonet.methods import DataSpec, _masked, _selfsup
from logonet.methods._masked import depth_to_space, grid_of, masked_error
from logonet.methods._parts import (
    MethodModule,
    check_weights,
    freeze_unreached,
    intensity,
    ratio,
    sums,
    wide,
)
from logonet.networks import TokenNetwork, Triple

NEEDS = frozenset({"crops"})
WANTS = frozenset({"encode_hidden"})
UNIT = 16  # voxels a side of a block
LEAST_UNIT = 64  # voxels of a block
VIEW_STEP = 32  # voxels; views not given are multiples of it, which suit Swin transformers
ONE_HOT, UNIFORM = 0.01, 0.99  # shares of the largest entropy beyond which the teacher says nothing


@dataclass(frozen=True)
class Config(Section, key="method"):
    """Defaults are SMIT's.

    Attributes:
        ratio: share of a view's blocks to hide, rounded down.
        unit_vox: sides (X, Y, Z in voxels) of a block: the stride of one of the backbone's levels. None is 16 in each
            axis, or the coarsest level's where no level has that.
        view_vox: a view's size (X, Y, Z in voxels). None is three quarters of the crop's sides, rounded down to
            multiples of 32 (96 of 128), and of sides below 64 at most 32.
        w_rebuild, w_patch, w_image: weights of the three losses. 0 switches a loss off.
        hidden, bottleneck, prototypes: widths of a projection's hidden layers and of its normalised output, and the
            number of unit vectors (K) that this is compared with.
        student_temperature: of the softmax.
        teacher_temperature: at the beginning and after the warm-up.
        temperature_warmup: share of the training over which the teacher's temperature of whole views rises, linearly;
            that of blocks rises as long, thereafter.
        centre_momentum: of the running mean of the teacher's outputs, which is taken off them.
        momentum_start, momentum_end: the teacher's share of itself, along half a cosine.
    """

    ratio: Fraction = 0.7
    unit_vox: SizeVox | None = None
    view_vox: SizeVox | None = None
    w_rebuild: NonNegative = 1.0
    w_patch: NonNegative = 0.1
    w_image: NonNegative = 0.1
    hidden: Count = 2048
    bottleneck: Count = 256
    prototypes: Count = 8192
    student_temperature: Positive = 0.1
    teacher_temperature: tuple[Positive, Positive] = (0.04, 0.07)
    temperature_warmup: Share = 0.06
    centre_momentum: Share = 0.9
    momentum_start: Share = 0.996
    momentum_end: Share = 1.0

    def view(self, size_vox: Sequence[int]) -> Triple:
        """A view's size where crops have ``size_vox`` voxels."""
        x, y, z = (max(3 * s // 4 // VIEW_STEP * VIEW_STEP, min(s, VIEW_STEP)) for s in size_vox)
        return self.view_vox or (x, y, z)

    def temperatures(self, progress: float) -> dict[str, float]:
        """The teacher's, by what it looks at."""
        low, high = self.teacher_temperature
        done = progress / self.temperature_warmup if self.temperature_warmup else math.inf
        risen = {"image": min(done, 1.0), "patch": min(max(done - 1, 0.0), 1.0)}
        return {kind: low + (high - low) * share for kind, share in risen.items()}


def check(cfg: Config, data_spec: DataSpec) -> None:
    """Raise UserError when ``cfg`` cannot work on crops like these."""
    check_weights(cfg, "w_rebuild", "w_patch", "w_image")
    _selfsup.check_momentum(cfg)
    view_vox = cfg.view(data_spec.size_vox)
    if any(view > side for view, side in zip(view_vox, data_spec.size_vox)):
        raise UserError(
            f"method.view_vox is {view_vox} and crops have {data_spec.size_vox}; use smaller views"
        )
    _check_unit(cfg, cfg.unit_vox or (UNIT,) * 3, view_vox)


def _check_unit(cfg: Config, unit_vox: Triple, view_vox: Triple) -> None:
    if not _masked.divides(unit_vox, view_vox):
        raise UserError(
            f"smit hides blocks of {unit_vox} voxels, which do not divide views of {view_vox}; set method.view_vox to "
            "multiples"
        )
    if math.prod(unit_vox) < LEAST_UNIT:
        raise UserError(
            f"a block of {unit_vox} voxels is too small; set method.unit_vox to {LEAST_UNIT} or more"
        )
    blocks = math.prod(grid_of(view_vox, unit_vox))
    if int(cfg.ratio * blocks) < 1:
        raise UserError(
            f"smit hides {cfg.ratio} of {blocks} blocks, which is less than one; use larger views or a larger "
            "method.ratio"
        )


def sizes(cfg: Config, size_vox: Triple) -> tuple[Triple, ...]:
    """Views, not crops, pass through ``encode``."""
    return (cfg.view(size_vox),)


def prepare(sample: Mapping[str, Any], cfg: Config, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Cut two views and draw what to hide.

    Returns:
        ``views`` uint16 (2, C, X, Y, Z); ``scores`` float32 (2, ...), one for each 64 voxels: the first of them are
        the blocks', in C order, and the lowest are hidden. How many blocks there are is up to the backbone.
    """
    image_CXYZ = sample["image_CXYZ"]
    view_vox = cfg.view(image_CXYZ.shape[1:])
    views = []
    for _ in range(2):
        corner = [int(rng.integers(s - v + 1)) for s, v in zip(image_CXYZ.shape[1:], view_vox)]
        x, y, z = (slice(low, low + v) for low, v in zip(corner, view_vox))
        views.append(image_CXYZ[:, x, y, z])
    count = -(-math.prod(view_vox) // LEAST_UNIT)
    return {"views": np.stack(views), "scores": rng.random((2, count), dtype=np.float32)}


class Projection(nn.Module):
    """A MLP of three layers, its output normalised, and the cosines (N, K) of that with K prototypes."""

    def __init__(self, cfg: Config, width: int) -> None:
        super().__init__()
        self.mlp = _selfsup.mlp((width, cfg.hidden, cfg.hidden, cfg.bottleneck), activation=nn.GELU)
        self.prototypes_KF = nn.Parameter(torch.randn(cfg.prototypes, cfg.bottleneck))

    def forward(self, rows_NF: Tensor) -> Tensor:
        # Exponentials of cosines over a temperature are no place for bfloat16.
        with torch.autocast(rows_NF.device.type, enabled=False):
            out_NF = F.normalize(self.mlp(wide(rows_NF)), dim=-1)
            return F.linear(out_NF, F.normalize(self.prototypes_KF, dim=1))


class SMIT(MethodModule[Config]):
    """Backbone, token, light layer, projections and teacher; ``forward`` as the package's contract says.

    Parts that only losses with weight 0 would use do not exist.
    """

    backbone: TokenNetwork

    def __init__(self, cfg: Config, network: TokenNetwork, data_spec: DataSpec) -> None:
        """Raises UserError where the blocks do not suit the network."""
        super().__init__(cfg, network)
        view_vox = cfg.view(data_spec.size_vox)
        strides = [(s, s, s) if isinstance(s, int) else s for s in network.strides]
        wanted = cfg.unit_vox or ((UNIT,) * 3 if (UNIT,) * 3 in strides else strides[-1])
        if wanted not in strides:
            raise UserError(
                f"method.unit_vox is {wanted} and the levels of {type(network).__name__} have strides of "
                f"{', '.join(map(str, strides))}; set it to one of them, so that a block has one token"
            )
        self.unit_vox: Triple = wanted
        self.stride: Triple = strides[-1]
        self.level = len(strides) - 1 - strides[::-1].index(wanted)
        _check_unit(cfg, self.unit_vox, view_vox)
        if cfg.w_rebuild and not _masked.divides(self.stride, view_vox):
            raise UserError(f"method.view_vox is {view_vox}; its sides must be multiples of {self.stride}")
        self.token_E = nn.Parameter(nn.init.trunc_normal_(torch.empty(network.embed_channels), std=0.02))
        self.rebuild: Any = None
        if cfg.w_rebuild:
            numbers = data_spec.in_channels * math.prod(self.stride)
            self.rebuild = nn.Conv3d(network.channels[-1], numbers, 1)
        self.weights = {kind: w for kind, w in (("patch", cfg.w_patch), ("image", cfg.w_image)) if w}
        width = network.channels[self.level]
        self.projections: Any = nn.ModuleDict({kind: Projection(cfg, width) for kind in self.weights})
        x = torch.empty(1, data_spec.in_channels, *view_vox, device="meta")
        freeze_unreached(network, lambda net: self._used(net.encode(x)))
        self.teacher: Any = None
        if self.weights:
            self.teacher = _selfsup.teacher_of(network)
            self.teacher_projections: Any = _selfsup.teacher_of(self.projections)
        for kind in self.weights:
            self.register_buffer(f"centre_{kind}_K", torch.zeros(cfg.prototypes))
            # The sum of the teacher's outputs since the last step and, behind it, their number.
            self.register_buffer(f"heard_{kind}_K", torch.zeros(cfg.prototypes + 1), persistent=False)

    def _used(self, feats: list[Tensor]) -> Tensor:
        """A sum of all that some loss looks at."""
        used = [feats[-1]] * bool(self.cfg.w_rebuild) + [feats[self.level]] * bool(self.weights)
        return torch.stack([feat.sum() for feat in used])

    def forward(self, batch: Mapping[str, Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one batch of what ``prepare`` returns; ``progress`` drives the teacher."""
        cfg, num_samples = self.cfg, len(batch["views"])
        image_MCXYZ = intensity(batch["views"]).transpose(0, 1).flatten(0, 1)
        hidden_MH, hidden_Muvw = self.hidden(
            batch["scores"].transpose(0, 1).flatten(0, 1), image_MCXYZ.shape[2:]
        )
        feats = self.encode(image_MCXYZ, hidden_Muvw)
        loss_B = image_MCXYZ.new_zeros(num_samples)
        metrics: dict[str, Tensor] = {"masked_share": ratio(hidden_Muvw.sum(), hidden_Muvw.numel())}
        if self.rebuild is not None:
            guess_MCXYZ = depth_to_space(self.rebuild(feats[-1]), self.stride)
            hidden_M1XYZ = _masked.enlarged(hidden_Muvw, self.unit_vox)[:, None]
            l1_B = masked_error(guess_MCXYZ, image_MCXYZ, hidden_M1XYZ).view(2, -1).mean(0)
            loss_B = loss_B + cfg.w_rebuild * l1_B
            metrics |= sums(num_samples, l1=l1_B)
            metrics["prediction_spread"] = _masked.spread(guess_MCXYZ, image_MCXYZ, hidden_M1XYZ)
        if self.weights:
            student = self._projected(self.projections, feats[self.level], hidden_MH)
            with torch.no_grad():
                seen = self.teacher.encode(image_MCXYZ)[self.level]
                taught = self._projected(self.teacher_projections, seen, hidden_MH)
        for kind, weight in self.weights.items():
            p_MRK = self._distribution(kind, taught[kind], progress)
            # Of a view's blocks the same view is asked, of the whole view the other one.
            told_MRK = p_MRK if kind == "patch" else p_MRK.roll(num_samples, 0)
            entropy_B = cross_entropy(told_MRK, student[kind], cfg.student_temperature).view(2, -1).mean(0)
            loss_B = loss_B + weight * entropy_B
            share_M = torch.special.entr(p_MRK).sum(2).mean(1) / math.log(max(cfg.prototypes, 2))
            entropies = {
                f"{kind}_consistency": entropy_B,
                f"teacher_{kind}_entropy": share_M.view(2, -1).mean(0),
            }
            metrics |= sums(num_samples, **entropies)
        metrics["embeddings_BF"] = _selfsup.pooled(feats[-1].detach())[:num_samples].float()
        return loss_B.mean(), metrics | sums(num_samples, loss=loss_B)

    def hidden(self, scores_MS: Tensor, view_vox: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Which blocks are hidden: their indices int64 (M, H), and bool (M, u, v, w)."""
        u, v, w = grid_of(view_vox, self.unit_vox)
        scores_MN = scores_MS[:, : u * v * w]
        hidden_MH = scores_MN.argsort(dim=1, stable=True)[:, : int(self.cfg.ratio * u * v * w)]
        hidden_MN = torch.zeros_like(scores_MN, dtype=torch.bool).scatter(1, hidden_MH, True)
        return hidden_MH, hidden_MN.unflatten(1, (u, v, w))

    def encode(self, image_MCXYZ: Tensor, hidden_Muvw: Tensor) -> list[Tensor]:
        """Features, which no hidden voxel has a part in: tokens that overlap their neighbours would tell of them."""
        seen_MCXYZ = image_MCXYZ * ~_masked.enlarged(hidden_Muvw, self.unit_vox)[:, None]
        times = [unit // side for unit, side in zip(self.unit_vox, self.backbone.embed_stride)]
        return self.backbone.encode_hidden(seen_MCXYZ, _masked.enlarged(hidden_Muvw, times), self.token_E)

    def _projected(self, projections: Any, map_MFuvw: Tensor, hidden_MH: Tensor) -> dict[str, Tensor]:
        """Of hidden blocks (M, H, K) and of whole views (M, 1, K), as far as losses want them."""
        tokens_MNF = map_MFuvw.flatten(2).transpose(1, 2)
        at_MHF = hidden_MH[:, :, None].expand(-1, -1, tokens_MNF.shape[2])
        rows = {
            "patch": lambda: tokens_MNF.gather(1, at_MHF),
            "image": lambda: wide(tokens_MNF).mean(1, keepdim=True),
        }
        return {kind: projections[kind](rows[kind]()) for kind in self.weights}

    def _distribution(self, kind: str, taught_MRK: Tensor, progress: float) -> Tensor:
        """The teacher's probabilities, centred and sharpened (M, R, K); in training what it said is noted."""
        if self.training:
            rows_NK = taught_MRK.flatten(0, 1)
            heard_K = getattr(self, f"heard_{kind}_K")
            heard_K += torch.cat([rows_NK.sum(0), rows_NK.new_full((1,), len(rows_NK))])
        centred_MRK = taught_MRK - getattr(self, f"centre_{kind}_K")
        return (centred_MRK / self.cfg.temperatures(progress)[kind]).softmax(-1)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Update the teacher and its centres."""
        if not self.weights:
            return
        pairs = (self.teacher, self.backbone), (self.teacher_projections, self.projections)
        _selfsup.follow_all(self.cfg, progress, *pairs)
        for kind in self.weights:
            heard_K = getattr(self, f"heard_{kind}_K")
            sum_K, count_1 = _selfsup.gathered(heard_K[None])[0].sum(0).split([self.cfg.prototypes, 1])
            getattr(self, f"centre_{kind}_K").lerp_(sum_K / count_1, 1 - self.cfg.centre_momentum)
            heard_K.zero_()


def cross_entropy(p_MRK: Tensor, cosine_MRK: Tensor, temperature: float) -> Tensor:
    """Of each view the mean over its R rows of -sum p log softmax(cosine / temperature), (M,)."""
    return -(p_MRK * (cosine_MRK / temperature).log_softmax(-1)).sum(-1).mean(1)


def warning(entry: Mapping[str, Any]) -> str | None:
    """A sentence of advice where the teacher's output is always one prototype, or all of them alike."""
    for kind in ("patch", "image"):
        entropy = entry.get(f"teacher_{kind}_entropy", 0.5)
        if not ONE_HOT < entropy < UNIFORM:
            return (
                f"the teacher says the same of everything (teacher_{kind}_entropy {entropy:.3f} of the largest), so "
                f"method.w_{kind} teaches nothing: if this lasts, change method.teacher_temperature or lower train.lr"
            )
    return _masked.still(entry)


build = SMIT
