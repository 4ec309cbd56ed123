"""How good a pretrained encoder is, in seconds: Dice of a linear head on its frozen features (linear probing).

Measured while pretraining goes on, so that a sweep can stop what leads nowhere; the pretext loss cannot serve,
being of another scale for every other number of clusters. The head sees the features of all levels at once,
standardised and interpolated to voxels. It is fitted on voxels drawn from a few fixed crops of labelled cases,
and judged on every voxel of the crops of other cases.

Everything that is drawn is drawn once and from the seed, so two measurements differ by their networks alone.

Letters: B batch, C input channels, F features of one level or of all, K classes (0 is background), V voxels
drawn of the training crops, XYZ the crop's axes (RAS).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge, Lt
from torch import Tensor, nn

from logonet.core import seeding
from logonet.core.config import Count, Section
from logonet.core.errors import UserError
from logonet.data import prepared_scans, volume
from logonet.data.classes import IGNORE
from logonet.inference import metrics

FLAT = 1e-6  # a feature that varies by less than this share of its size is constant, but for rounding


@dataclass(frozen=True)
class Config(Section, key="probe"):
    """What is measured, how often and on how much.

    Attributes:
        every_epochs: measure at the end of every so many epochs, and of the last one.
        train_cases: labelled cases to fit the head on, at most.
        val_cases: labelled cases to measure Dice on, at most.
        crops_per_case: of either, each centred on a voxel of some class.
        voxels_per_crop: drawn of a training crop for the fit, in equal parts of the classes that it shows.
        iterations: of L-BFGS.
        weight_decay: L2 penalty on the head's weights of the standardised features.
        seed: of the cases, crops and voxels drawn.
    """

    every_epochs: Count = 1
    train_cases: Count = 16
    val_cases: Count = 16
    crops_per_case: Count = 2
    voxels_per_crop: Count = 2048
    iterations: Count = 50
    weight_decay: Annotated[float, Ge(0), Lt(math.inf)] = 1e-2
    seed: int = 0


@dataclass(frozen=True)
class Task:
    """A probe to measure. Plain data, so that it travels; ``train`` and ``val`` are positions in the table."""

    cfg: Config
    table: prepared_scans.Table
    train: tuple[int, ...]
    val: tuple[int, ...]
    size_vox: tuple[int, int, int]


def task(
    cfg: Config,
    table: prepared_scans.Table,
    train_ids: Sequence[str],
    val_ids: Sequence[str],
    size_vox: tuple[int, int, int],
) -> Task:
    """A probe on at most ``cfg.train_cases`` and ``cfg.val_cases`` of the scans that are named.

    Args:
        train_ids, val_ids: scans to choose from; those that the table lacks (quarantined ones) are passed over.
        size_vox: of the crops, along X, Y, Z: the size that the encoder is pretrained on.

    Raises:
        UserError: nothing to fit on, nothing to measure on, or no class but background.
    """
    if len(table.classes) < 2:
        raise UserError("the probe's cases know no class but background; give labels of at least two classes")
    place = table.index_of()

    def choose(use: str, ids: Sequence[str], most: int) -> tuple[int, ...]:
        there = sorted(set(ids) & place.keys())
        if not there:
            raise UserError(
                f"the probe has no labelled cases for its {use} part; give it cases that are labelled and not "
                "quarantined, or leave the probe out"
            )
        order = seeding.rng(cfg.seed, "probe", use).permutation(len(there))
        return tuple(sorted(place[there[i]] for i in order[:most]))

    train, val = choose("train", train_ids, cfg.train_cases), choose("val", val_ids, cfg.val_cases)
    return Task(cfg, table, train, val, size_vox)


@dataclass(frozen=True)
class _Fitted:
    """A training crop and the voxels drawn from it; each stands for as many voxels as its weight says."""

    image_CXYZ: np.ndarray  # uint16
    voxels_V3: np.ndarray  # int64
    labels_V: np.ndarray  # int64
    weights_V: np.ndarray  # float32


@dataclass(frozen=True)
class Head:
    """Logits are ``weight_KF @ features + bias_K``; the features are raw, their standardising is folded in."""

    weight_KF: Tensor
    bias_K: Tensor


class Probe:
    """Measures one network after another on the same crops, which are read at the first measurement and kept
    (3 bytes per voxel of one channel).
    """

    def __init__(self, task: Task, device: torch.device) -> None:
        self.task, self.device = task, device
        self.num_classes = len(task.table.classes)

    def measure(self, net: Any) -> dict[str, Any]:
        """Probe Dice of ``net``, a backbone: ``{"probe_dice", "probe_dice_per_class"}``, the latter without
        background. All NaN when the features are not finite.

        Nothing of the network changes, its modules' training flags included, and no random state. Crops go through
        it one by one. Dice of a class is 2 |found & truth| / (|found| + |truth|) over the voxels of all crops: a mean
        over few crops would hang on those that show a sliver of the class. It is NaN where the class is neither
        found nor there, and then left out of the mean.
        """
        overlap_2K = np.zeros((2, self.num_classes), np.int64)
        with _evaluating(net), torch.no_grad():
            head = self._fit(net)
            for image_CXYZ, labels_XYZ in self._val_crops:
                logits_KXYZ = dense_logits(self._encode(net, image_CXYZ), head, self.task.size_vox)
                if not torch.isfinite(logits_KXYZ).all():
                    nothing = [math.nan] * (self.num_classes - 1)
                    return {"probe_dice": math.nan, "probe_dice_per_class": nothing}
                found_XYZ = logits_KXYZ.argmax(0).cpu().numpy()
                overlap_2K += metrics.overlap(found_XYZ, labels_XYZ, self.num_classes)
        dice = torch.from_numpy(metrics.dice(overlap_2K)[1:])
        return {"probe_dice": dice.nanmean().item(), "probe_dice_per_class": dice.tolist()}

    @functools.cached_property
    def _train_crops(self) -> list[_Fitted]:
        crops = []
        for place in self.task.train:
            rng = self._rng("voxels", place)
            for image_CXYZ, labels_XYZ in self._crops(place):
                voxels_V3, weights_V = draw_voxels(labels_XYZ, self.task.cfg.voxels_per_crop, rng)
                labels_V = labels_XYZ[tuple(voxels_V3.T)].astype(np.int64)
                crops.append(_Fitted(image_CXYZ, voxels_V3, labels_V, weights_V))
        return crops

    @functools.cached_property
    def _val_crops(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return [crop for place in self.task.val for crop in self._crops(place)]

    def _crops(self, place: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        cfg, size_vox, ref = self.task.cfg, self.task.size_vox, self.task.table.refs[place]
        centred = prepared_scans.CropSampling(size_vox, cfg.crops_per_case, foreground_share=1.0)
        for start in prepared_scans.draw_corners(ref, centred, self._rng("crops", place)):
            yield prepared_scans.read_crop(ref, start, size_vox)

    def _rng(self, use: str, place: int) -> np.random.Generator:
        return seeding.rng(self.task.cfg.seed, "probe", use, self.task.table.refs[place].scan_id)

    def _encode(self, net: Any, image_CXYZ: np.ndarray) -> list[Tensor]:
        return net.encode(torch.from_numpy(volume.from_uint16(image_CXYZ))[None].to(self.device))

    def _fit(self, net: Any) -> Head:
        crops = self._train_crops
        labels_V, weights_V = (
            torch.from_numpy(np.concatenate(parts)).to(self.device)
            for parts in zip(*((crop.labels_V, crop.weights_V) for crop in crops))
        )
        x_VF = torch.empty(len(labels_V), sum(net.channels), device=self.device)
        for rows_VF, crop in zip(x_VF.split([len(crop.labels_V) for crop in crops]), crops):
            feats = self._encode(net, crop.image_CXYZ)
            rows_VF.copy_(at_voxels(feats, crop.voxels_V3, self.task.size_vox))
        return fit_head(x_VF, labels_V, weights_V, self.num_classes, self.task.cfg)


def draw_voxels(
    labels_XYZ: np.ndarray, num_voxels: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """About ``num_voxels`` voxels in equal parts of the classes there are, all of a class that has fewer.

    Returns:
        voxels_V3 int64, and weights_V float32: voxels of the crop that each stands for.
    """
    voxels, weights = [], []
    present = np.flatnonzero(np.bincount(labels_XYZ.ravel())[:IGNORE])
    for k in present:
        of_class = np.flatnonzero(labels_XYZ.ravel() == k)
        drawn = rng.choice(of_class, min(len(of_class), -(-num_voxels // len(present))), replace=False)
        voxels.append(np.sort(drawn))
        weights.append(np.full(len(drawn), len(of_class) / len(drawn), np.float32))
    places = np.unravel_index(np.concatenate(voxels), labels_XYZ.shape)
    return np.stack(places, 1), np.concatenate(weights)


def at_voxels(feats: Sequence[Tensor], voxels_V3: np.ndarray, size_vox: Sequence[int]) -> Tensor:
    """x_VF: the features of all levels at some voxels of the crop, interpolated as ``F.interpolate`` does (trilinear,
    ``align_corners=False``), but there alone.

    Args:
        feats: fine to coarse, each (1, F, X', Y', Z').
    """
    # Voxel p's centre in [-1, 1]; grid_sample wants the last axis first.
    centres_V3 = (2 * voxels_V3 + 1) / np.array(size_vox) - 1
    grid = torch.from_numpy(centres_V3[:, ::-1].copy())[None, :, None, None].to(feats[0])
    levels_1FV11 = [F.grid_sample(f, grid, padding_mode="border", align_corners=False) for f in feats]
    return torch.cat(levels_1FV11, 1)[0, :, :, 0, 0].T


def dense_logits(feats: Sequence[Tensor], head: Head, size_vox: Sequence[int]) -> Tensor:
    """logits_KXYZ at every voxel of the crop.

    The head goes first and the interpolation after, which commute, both being linear: so K channels of a level are
    brought to full resolution instead of hundreds.
    """
    logits_1KXYZ = head.bias_K[:, None, None, None]
    for feat_1FXYZ, weight_KF in zip(feats, head.weight_KF.split([f.shape[1] for f in feats], 1)):
        small_1KXYZ = torch.einsum("kf,bfxyz->bkxyz", weight_KF, feat_1FXYZ)
        large_1KXYZ = F.interpolate(small_1KXYZ, tuple(size_vox), mode="trilinear", align_corners=False)
        logits_1KXYZ = logits_1KXYZ + large_1KXYZ
    return logits_1KXYZ[0]


def fit_head(x_VF: Tensor, labels_V: Tensor, weights_V: Tensor, num_classes: int, cfg: Config) -> Head:
    """Cross-entropy plus soft Dice over the weighted voxels, by full-batch L-BFGS from zeros: no randomness.

    Without the Dice too little is found of classes of few voxels, without the cross-entropy the fit takes longer.
    ``x_VF`` is standardised in place. The head is NaN when a feature is not finite.
    """
    mean_F, scale_F = standardise(x_VF)
    weight_KF, bias_K = x_VF.new_zeros(num_classes, x_VF.shape[1]), x_VF.new_zeros(num_classes)
    if not torch.isfinite(mean_F).all():
        return Head(weight_KF + math.nan, bias_K + math.nan)
    params = [weight_KF.requires_grad_(), bias_K.requires_grad_()]
    optimizer = torch.optim.LBFGS(
        params, max_iter=cfg.iterations, history_size=10, line_search_fn="strong_wolfe"
    )
    share_V = weights_V / weights_V.sum()
    truth_VK = F.one_hot(labels_V, num_classes)

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits_VK = F.linear(x_VF, weight_KF, bias_K)
        loss = head_loss(logits_VK, truth_VK, share_V) + 0.5 * cfg.weight_decay * weight_KF.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    raw_KF = weight_KF.detach() * scale_F
    return Head(raw_KF, bias_K.detach() - raw_KF @ mean_F)


def standardise(x_VF: Tensor) -> tuple[Tensor, Tensor]:
    """Bring every feature to mean 0 and variance 1, in place; constant ones to 0. Returns mean_F and scale_F."""
    mean_F = x_VF.mean(0, dtype=torch.float64).float()
    x_VF.sub_(mean_F)
    std_F = x_VF.square().mean(0, dtype=torch.float64).sqrt().float()
    scale_F = torch.where(std_F > FLAT * mean_F.abs(), 1 / std_F, 0.0)
    x_VF.mul_(scale_F)
    return mean_F, scale_F


def head_loss(logits_VK: Tensor, truth_VK: Tensor, share_V: Tensor) -> Tensor:
    """Cross-entropy plus the soft Dice loss, 1 - Dice, of the classes that there are but background.

    Args:
        share_V: what each voxel counts; their sum is 1.
    """
    log_VK = logits_VK.log_softmax(1)
    entropy = -(share_V * (log_VK * truth_VK).sum(1)).sum()
    found_VK = log_VK.exp()
    both_K = share_V @ (found_VK * truth_VK)
    sizes_K = share_V @ (found_VK + truth_VK)
    there = truth_VK.any(0)[1:]
    dice_loss = (1 - 2 * both_K / sizes_K)[1:][there].sum() / there.sum().clamp(min=1)
    return entropy + dice_loss


@contextlib.contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module has its own flag again."""
    flags = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
