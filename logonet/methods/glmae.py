"""GL-MAE: masked autoencoding of global and local views, held together by a teacher that sees whole global ones
(Zhuang et al. 2024; section and equation numbers are that paper's).

A global view is a large part of a crop in low resolution, a local one a small part in high resolution. An encoder
sees some patches of each, and a decoder, which is discarded after pretraining, rebuilds the others (Eq. 3, 4). A class
token accompanies the patches. Its projection for masked global and local views is trained to match (Eq. 9, 10) that of
a teacher, a moving average of encoder and projection (Eq. 5), for complete global views.

The paper's encoder is UNETR's transformer with ``backbone.positions=sincos`` and ``backbone.qkv_bias=true`` (and an
epsilon of 1e-6 in its normalisations, where MONAI's is 1e-5).

The paper cuts views out of whole volumes. So crops should be large, whatever the backbone's size: as large as most
scans, with ``trim`` and a low ``crops.min_image_share`` for the smaller ones, or at least 160 voxels a side; of smaller
crops a global view is a magnified part. Views are resampled from the crop's own voxels and take 31 MB a sample at the
paper's sizes, however large the crop.

The paper trains with AdamW, lr 1e-2, batches of 256, 1600 epochs. This learning rate is implausible for AdamW: MAE's
1.5e-4 per 256 samples with 40 epochs of warm-up, weight decay 0.05 and betas 0.9 and 0.95 is safer.

Shapes: B samples, C input channels, X Y Z a view's axes, W views of a sample, M those of all samples, N patches
(C order), V those that are seen, P numbers of a patch, E the encoder's width, K the projection's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn

from logonet.core.config import OMIT_DEFAULT, Count, Fraction, NonNegative, Positive, Section, Share, SizeVox
from logonet.core.errors import UserError
from logonet.data import augment, volume
from logonet.methods import DataSpec, _masked, _selfsup, _views
from logonet.methods._masked import grid_of
from logonet.methods._parts import MethodModule, check_weights, freeze_unreached, intensity, sums
from logonet.methods._selfsup import teacher_of
from logonet.networks import TokenNetwork, Triple

NEEDS = frozenset({"crops"})
WANTS = frozenset({"encode_visible"})
LARGE = 96  # sides in voxels of a crop from which on views have the paper's sizes
MEAN_MOMENTUM = 0.9  # of the running mean of the teacher's projections; DINO's
ONE_HOT, UNIFORM = 0.01, 0.99  # shares of the largest entropy beyond which the teacher says nothing
ALIKE = 0.9999  # cosine of the teacher's projections to their mean; fresh from initialisation about 0.995


@dataclass(frozen=True)
class Config(Section, key="method"):
    """Defaults are the paper's where it gives them.

    Attributes:
        num_global, num_local: p and q, views of a crop; to do without local ones set w_local and w_gl to 0.
        global_vox, local_vox: their sizes (X, Y, Z in voxels). None is the paper's 160 and 96 voxels a side for crops
            of 96 or more; for smaller ones the crop's size, rounded to patches, and half of it, but two patches a
            side.
        global_scale, local_scale: what share of the crop's sides a view spans, drawn from this range.
        augment: how views are distorted besides. The paper leaves that to a supplement: nothing here.
        ratio: share of a view's patches to mask, rounded up.
        patch_vox: sides (X, Y, Z in voxels) of a patch: those of the backbone's tokens.
        decoder_width, decoder_depth, decoder_heads: of the decoder; not the paper's, which has none, but MAE's.
        all_voxels: count visible patches in the reconstruction losses too, as Eq. 3 and 4 are written; their text,
            and MAE, have the masked ones.
        projection_hidden, projection: widths of the two hidden layers and of the output (K) of the projection. The
            first is ours.
        w_local, w_global, w_gg, w_gl: 1, beta_1, beta_2 and beta_3 of Eq. 11. 0 switches a loss off.
        student_temperature, teacher_temperature: of Eq. 7, which has one without a value; DINO's.
        centre: take the running mean off the teacher's projections (DINO; not the paper's).
        momentum_start, momentum_end: the teacher's share of itself, along half a cosine; 1 - mu of Eq. 5. BYOL's.
        trim: views are of the crop without the planes at its sides that are all 0, with which a scan that is smaller
            than the crop is padded, so that a global view spans its share of the scan.
    """

    num_global: Count = 2
    num_local: Count = 8
    global_vox: SizeVox | None = None
    local_vox: SizeVox | None = None
    global_scale: tuple[Fraction, Fraction] = (0.5, 1.0)
    local_scale: tuple[Fraction, Fraction] = (0.25, 0.5)
    augment: augment.Config = field(default_factory=augment.none)
    ratio: Annotated[float, Ge(0), Lt(1)] = 0.6
    patch_vox: SizeVox = (16, 16, 16)
    decoder_width: Count = 512
    decoder_depth: Count = 8
    decoder_heads: Count = 16
    all_voxels: bool = False
    projection_hidden: Count = 2048
    projection: Count = 512
    w_local: NonNegative = 1.0
    w_global: NonNegative = 1.0
    w_gg: NonNegative = 1.0
    w_gl: NonNegative = 1.0
    student_temperature: Positive = 0.1
    teacher_temperature: Positive = 0.04
    centre: bool = False
    momentum_start: Share = 0.996
    momentum_end: Share = 1.0
    trim: bool = field(default=False, metadata=OMIT_DEFAULT)

    @property
    def views(self) -> tuple[str, ...]:
        """The kinds of views that some loss wants."""
        wanted = {"global": self.w_global + self.w_gg + self.w_gl, "local": self.w_local + self.w_gl}
        return tuple(kind for kind, weight in wanted.items() if weight)

    def sizes(self, size_vox: Triple) -> dict[str, Triple]:
        """A global and a local view's size where crops have ``size_vox`` voxels."""
        if min(size_vox) >= LARGE:
            whole, half = (160, 160, 160), (96, 96, 96)
        else:
            x, y, z = (max(1, round(side / patch)) for side, patch in zip(size_vox, self.patch_vox))
            a, b, c = self.patch_vox
            whole = a * x, b * y, c * z
            half = a * _half(x), b * _half(y), c * _half(z)
        return {"global": self.global_vox or whole, "local": self.local_vox or half}


def _half(tokens: int) -> int:
    return max(tokens // 2, min(tokens, 2))


def check(cfg: Config, data_spec: DataSpec) -> None:
    """Raise UserError when ``cfg`` cannot work on crops like these."""
    check_weights(cfg, "w_local", "w_global", "w_gg", "w_gl")
    for key in ("global_scale", "local_scale"):
        low, high = getattr(cfg, key)
        if low > high:
            raise UserError(f"method.{key} is ({low}, {high}); set (low, high) with low <= high")
    _masked.check_decoder(cfg.decoder_width, cfg.decoder_heads)
    _selfsup.check_momentum(cfg)
    rebuilt = {"global": cfg.w_global, "local": cfg.w_local}
    for kind, size_vox in cfg.sizes(data_spec.size_vox).items():
        if not _masked.divides(cfg.patch_vox, size_vox):
            raise UserError(
                f"method.{kind}_vox is {size_vox}; its sides must be multiples of a patch's {cfg.patch_vox}"
            )
        num_patches = math.prod(grid_of(size_vox, cfg.patch_vox))
        visible = num_visible(num_patches, cfg.ratio)
        if visible < 1 or (visible == num_patches and rebuilt[kind] and not cfg.all_voxels):
            raise UserError(
                f"glmae masks {cfg.ratio} of the {num_patches} patches of a {kind} view, which leaves none to see or "
                f"none to rebuild; change method.ratio or set method.{kind}_vox to a larger size"
            )


def sizes(cfg: Config, size_vox: Triple) -> tuple[Triple, ...]:
    """Empty: views pass through ``encode_visible``, which takes any size."""
    return ()


def num_visible(num_patches: int, share: float) -> int:
    """Patches to see where ``share`` of them is masked, as MAE counts."""
    return int(num_patches * (1 - share) + 1e-9)


def prepare(sample: Mapping[str, Any], cfg: Config, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Cut views and draw what to see of each.

    Returns:
        Of the kinds of views that some loss wants ``global`` and ``local``, uint16 (W, C, X, Y, Z), and
        ``keep_global`` and ``keep_local``, int64 (W, V), the visible patches.
    """
    image_CXYZ = sample["image_CXYZ"]
    sizes_vox = cfg.sizes(image_CXYZ.shape[1:])
    if cfg.trim:
        image_CXYZ = trimmed(image_CXYZ)
    out: dict[str, np.ndarray] = {}
    for kind in cfg.views:
        size_vox, count = sizes_vox[kind], getattr(cfg, f"num_{kind}")
        num_patches = math.prod(grid_of(size_vox, cfg.patch_vox))
        visible, scale = num_visible(num_patches, cfg.ratio), getattr(cfg, f"{kind}_scale")
        out[kind] = np.stack([view(image_CXYZ, size_vox, scale, cfg.augment, rng) for _ in range(count)])
        keeps = [_masked.draw_visible(num_patches, visible, rng) for _ in range(count)]
        out[f"keep_{kind}"] = np.stack(keeps)
    return out


def trimmed(image_CXYZ: np.ndarray) -> np.ndarray:
    """The image without the planes at its sides that are all 0; itself where it is nothing else."""
    for axis in (1, 2, 3):
        filled = np.flatnonzero(np.moveaxis(image_CXYZ, axis, 0).any((1, 2, 3)))
        if len(filled):
            inside = [slice(None)] * 4
            inside[axis] = slice(filled[0], filled[-1] + 1)
            image_CXYZ = image_CXYZ[tuple(inside)]
    return image_CXYZ


def view(
    image_CXYZ: np.ndarray,
    size_vox: Triple,
    scale: tuple[float, float],
    distortion: augment.Config,
    rng: np.random.Generator,
) -> np.ndarray:
    """A box of the image, resized to ``size_vox``: uint16 (C, X, Y, Z).

    One number out of ``scale`` is the box's share of all three sides; it may lie anywhere.
    """
    share = rng.uniform(*scale)
    box: list[slice] = []
    for side in image_CXYZ.shape[1:]:
        length = max(1, round(share * side))
        first = int(rng.integers(side - length + 1))
        box.append(slice(first, first + length))
    part_CXYZ = volume.from_uint16(image_CXYZ[:, *box])
    sides = zip(part_CXYZ.shape[1:], size_vox)
    resized_CXYZ = augment.along_axes(part_CXYZ, [augment.resizing(old, new, order=1) for old, new in sides])
    out_CXYZ = _views.augmented(resized_CXYZ, augment.draw(distortion, size_vox, rng))
    np.clip(out_CXYZ, 0, 1, out=out_CXYZ)
    out_CXYZ *= 65535
    return np.rint(out_CXYZ, out=out_CXYZ).astype(np.uint16)


class ClassToken(nn.Module):
    """The token that stands for a whole view and, where a loss wants it, the projection of what becomes of it."""

    def __init__(self, cfg: Config, width: int) -> None:
        super().__init__()
        self.token_11E = nn.Parameter(nn.init.normal_(torch.empty(1, 1, width), std=0.02))
        hidden = cfg.projection_hidden
        self.project: nn.Module = nn.Identity()
        if cfg.w_gg or cfg.w_gl:
            self.project = _selfsup.mlp((width, hidden, hidden, cfg.projection), activation=nn.GELU)


class GLMAE(MethodModule[Config]):
    """Backbone, class token, decoder and teacher; ``forward`` as the package's contract says.

    Parts that only losses with weight 0 would use do not exist.
    """

    backbone: TokenNetwork
    mean_K: Tensor
    heard_K: Tensor

    def __init__(self, cfg: Config, network: TokenNetwork, data_spec: DataSpec) -> None:
        """Raises UserError where the network's tokens are of another size."""
        _masked.check_patch(cfg.patch_vox, network)
        super().__init__(cfg, network)
        width, size_vox = network.embed_channels, cfg.sizes(data_spec.size_vox)["local"]
        self.class_token = ClassToken(cfg, width)
        x = torch.empty(1, data_spec.in_channels, *size_vox, device="meta")
        keep, prefix = (torch.zeros(shape, device="meta") for shape in ((1, 1), (1, 1, width)))
        freeze_unreached(network, lambda net: net.encode_visible(x, keep.long(), prefix))
        self.decoder: Any = None
        if cfg.w_global or cfg.w_local:
            grid = grid_of(size_vox, cfg.patch_vox)
            self.decoder = _masked.Decoder(cfg, network, data_spec, grid, glmae=True)
        self.teacher: Any = None
        self.teacher_token: Any = None
        if cfg.w_gg or cfg.w_gl:
            self.teacher, self.teacher_token = teacher_of(network), teacher_of(self.class_token)
            self.register_buffer("mean_K", torch.zeros(cfg.projection))
            # The sum of the teacher's projections since the last step and, behind it, their number.
            self.register_buffer("heard_K", torch.zeros(cfg.projection + 1), persistent=False)

    def forward(self, batch: Mapping[str, Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one batch of what ``prepare`` returns; ``progress`` drives `after_step`."""
        cfg = self.cfg
        images = {kind: intensity(batch[kind]) for kind in cfg.views}
        weighed: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        if self.teacher is not None:
            taught_BWK = self.teach(images["global"])
            metrics |= self._hear(taught_BWK)
        weights = {"global": (cfg.w_global, cfg.w_gg), "local": (cfg.w_local, cfg.w_gl)}
        for kind, (w_rebuild, w_agree) in weights.items():
            if not (w_rebuild or w_agree):
                continue
            keep_BWV = batch[f"keep_{kind}"].long()
            tokens_BWVE = self.encode(images[kind], keep_BWV)
            if w_rebuild:
                mse_B, varied = self._rebuild(images[kind], tokens_BWVE, keep_BWV)
                weighed.append(w_rebuild * mse_B)
                metrics |= sums(len(mse_B), **{f"{kind}_mse": mse_B})
                metrics.setdefault("prediction_spread", varied)
            if w_agree:
                student_BWK = self.class_token.project(tokens_BWVE[:, :, 0])
                entropy_B = consistency(self._centred(taught_BWK), student_BWK, cfg)
                weighed.append(w_agree * entropy_B)
                metrics |= sums(len(entropy_B), **{f"{kind}_consistency": entropy_B})
            metrics.setdefault("embeddings_BF", tokens_BWVE[:, 0, 1:].detach().float().mean(1))
        loss_B = torch.stack(weighed).sum(0)
        return loss_B.mean(), metrics | sums(len(loss_B), loss=loss_B)

    def encode(self, image_BWCXYZ: Tensor, keep_BWV: Tensor) -> Tensor:
        """The class token's and the visible patches' vectors, (B, W, 1 + V, E)."""
        image_MCXYZ, keep_MV = image_BWCXYZ.flatten(0, 1), keep_BWV.flatten(0, 1)
        prefix_M1E = self.class_token.token_11E.expand(len(keep_MV), -1, -1)
        tokens_MVE = self.backbone.encode_visible(image_MCXYZ, keep_MV, prefix_M1E)
        return tokens_MVE.unflatten(0, image_BWCXYZ.shape[:2])

    def _rebuild(self, image_BWCXYZ: Tensor, tokens_BWVE: Tensor, keep_BWV: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 3 or 4 for each sample, (B,), and the metric `spread`.

        Both equations divide by a view's voxels and by its patches, which is read as a mean.
        """
        image_MCXYZ, keep_MV, tokens_MVE = (x.flatten(0, 1) for x in (image_BWCXYZ, keep_BWV, tokens_BWVE))
        grid = grid_of(image_MCXYZ.shape[2:], self.cfg.patch_vox)
        guess_MNP = self.decoder(tokens_MVE[:, 1:], keep_MV, grid, tokens_MVE[:, :1])
        target_MNP = _masked.patches(image_MCXYZ, self.cfg.patch_vox)
        hidden_MN = _masked.unseen(keep_MV, target_MNP.shape[1])
        counted_MN = torch.ones_like(hidden_MN) if self.cfg.all_voxels else hidden_MN
        mse_M = _masked.over_patches((guess_MNP.float() - target_MNP).square(), counted_MN)
        varied = _masked.spread(guess_MNP, target_MNP, counted_MN[:, :, None])
        return mse_M.unflatten(0, keep_BWV.shape[:2]).mean(1), varied

    @torch.no_grad()
    def teach(self, image_BWCXYZ: Tensor) -> Tensor:
        """The teacher's projections of complete views, (B, W, K) in float32."""
        image_MCXYZ = image_BWCXYZ.flatten(0, 1)
        num_patches = math.prod(grid_of(image_MCXYZ.shape[2:], self.cfg.patch_vox))
        every_MN = torch.arange(num_patches, device=image_MCXYZ.device).expand(len(image_MCXYZ), -1)
        prefix_M1E = self.teacher_token.token_11E.expand(len(image_MCXYZ), -1, -1)
        tokens_MNE = self.teacher.encode_visible(image_MCXYZ, every_MN, prefix_M1E)
        return self.teacher_token.project(tokens_MNE[:, 0]).float().unflatten(0, image_BWCXYZ.shape[:2])

    @torch.no_grad()
    def _hear(self, taught_BWK: Tensor) -> dict[str, Tensor]:
        """Signs of a collapsing teacher: an entropy near 0 (always the same class) or near its maximum (no class), or
        projections that point along their running mean for every volume."""
        rows_NK = taught_BWK.flatten(0, 1)
        if self.training:
            self.heard_K += torch.cat([rows_NK.sum(0), rows_NK.new_full((1,), len(rows_NK))])
        p_NK = (self._centred(rows_NK) / self.cfg.teacher_temperature).softmax(1)
        share_N = torch.special.entr(p_NK).sum(1) / math.log(max(self.cfg.projection, 2))
        cosine_N = _selfsup.cosine(rows_NK, self.mean_K.expand_as(rows_NK))
        return sums(len(share_N), teacher_entropy=share_N, teacher_cosine=cosine_N)

    def _centred(self, taught: Tensor) -> Tensor:
        return taught - self.mean_K if self.cfg.centre else taught

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Update the teacher (Eq. 5) and the running mean of its projections."""
        if self.teacher is None:
            return
        pairs = (self.teacher, self.backbone), (self.teacher_token, self.class_token)
        _selfsup.follow_all(self.cfg, progress, *pairs)
        sums_K, count_1 = _selfsup.gathered(self.heard_K[None])[0].sum(0).split([self.cfg.projection, 1])
        self.mean_K.lerp_(sums_K / count_1, 1 - MEAN_MOMENTUM)
        self.heard_K.zero_()


def consistency(teacher_BWK: Tensor, student_BVK: Tensor, cfg: Config) -> Tensor:
    """Eq. 9 and 10: of each sample the mean cross-entropy over all pairs of a complete and a masked view, (B,)."""
    # Exponentials of projections over a temperature are no place for bfloat16.
    with torch.autocast(student_BVK.device.type, enabled=False):
        p_BWK = (teacher_BWK.detach().float() / cfg.teacher_temperature).softmax(-1)
        log_q_BVK = (student_BVK.float() / cfg.student_temperature).log_softmax(-1)
        # The mean over pairs of a product is the product of the means.
        return -(p_BWK.mean(1) * log_q_BVK.mean(1)).sum(-1)


def warning(entry: Mapping[str, Any]) -> str | None:
    """A sentence of advice where the teacher's output is the same for every view, or uniform."""
    entropy, cosine_value = entry.get("teacher_entropy", 0.5), entry.get("teacher_cosine", 0.0)
    if entropy <= ONE_HOT:
        what = f"gives all its weight to one class (entropy {entropy:.3f} of the largest)"
        advice = "raise method.teacher_temperature or set method.centre=true"
    elif entropy >= UNIFORM:
        what = f"gives all classes the same weight (entropy {entropy:.3f} of the largest)"
        advice = "lower method.teacher_temperature"
    elif cosine_value >= ALIKE:
        what = f"says the same of all volumes (cosine {cosine_value:.5f} to their mean)"
        advice = "set method.centre=true or lower train.lr"
    else:
        return _masked.still(entry)
    return f"the teacher {what}, so the consistency losses teach nothing: if this lasts, {advice}"


build = GLMAE
