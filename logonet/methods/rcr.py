"""RCR: rotation, contrast and reconstruction, the pretraining of Swin UNETR (Tang et al. 2022).

Each crop gives two views, each turned by its own number of quarter turns and with boxes cut out, filled first
with noise and then from another crop of the batch. On the encoder's coarsest map one head predicts the turn, one
makes the vectors that NT-Xent compares, and one rebuilds the turned crop as it was before the cuts. The decoder and the
classifier are not trained. The paper trains with AdamW at 4e-4 after 500 steps of warm-up, weight decay 1e-5,
crops of 96^3, on 5,050 CT scans.

Departures from the released code: it turns in the plane of the last two axes, which for RAS crops is not the slice
plane that the paper names, and here is; it cuts the crops of a batch one after the other, so that some are filled
from one that is not cut yet, where here all hold their noise before any is filled from another.

Shapes: B samples, N = 2 B what is seen of them, C input channels, X Y Z the crop's axes (Z slices), F features,
x y z a map's axes, T tokens (the places of the coarsest map), V = 2 views.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge, Lt
from torch import Tensor, nn

from logonet.core.config import Count, NonNegative, Positive, Section
from logonet.core.errors import UserError
from logonet.methods import DataSpec
from logonet.methods._parts import check_weights, intensity, means, ratio, wide
from logonet.methods._selfsup import EncoderModule, collapse, joined, nt_xent, pooled, spread
from logonet.networks import Network, Triple

NEEDS = frozenset({"crops"})
LEAST_BATCH = 2  # one crop has no negatives, and no other crop to fill its boxes from
Box = tuple[slice, ...]
BOX_SIDES = (0.05, 0.25)  # of a box, as shares of the crop's
warning = collapse


@dataclass(frozen=True)
class Config(Section, key="method"):
    """Defaults are the released code's.

    Attributes:
        max_cut: the largest share of voxels that a pass cuts out, drawn from 0 to this; there are two passes, and
            the last box may go beyond.
        pool: "token" gives the rotation head the map's first token and the contrast head its second (its last
            where there is but one); "mean" gives both the mean of all.
        contrast: width of what is compared.
        temperature: tau of NT-Xent.
        w_rotation, w_contrast, w_reconstruction: weights of the losses.
        gather: take the crops of all workers' batches as negatives, not only those of the worker's own.
    """

    max_cut: Annotated[float, Ge(0), Lt(1)] = 0.3
    pool: Literal["token", "mean"] = "token"
    contrast: Count = 512
    temperature: Positive = 0.5
    w_rotation: NonNegative = 1.0
    w_contrast: NonNegative = 1.0
    w_reconstruction: NonNegative = 1.0
    gather: bool = False


def gathers(cfg: Config) -> bool:
    """Whether ``forward`` waits for those of the other ranks."""
    return cfg.gather


def check(cfg: Config, data_spec: DataSpec) -> None:
    """Raise UserError when ``cfg`` cannot work on crops like these."""
    if data_spec.size_vox[0] != data_spec.size_vox[1]:
        raise UserError(
            f"rcr turns crops by 90 degrees in the plane of X and Y, and they have {data_spec.size_vox} voxels; set "
            "crops.size_vox to one length for both"
        )
    check_weights(cfg, "w_rotation", "w_contrast", "w_reconstruction")


def prepare(sample: Mapping[str, Any], cfg: Config, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Turn a crop twice, cut boxes out and fill them with noise, and draw what to cut next.

    Returns:
        ``whole`` uint16 (V, C, X, Y, Z) turned, ``cut`` the same with noise, ``turns`` int64 (V,) from 0 to 3,
        ``swap`` bool (V, X, Y, Z) the voxels to fill from another sample, ``other`` float64 (V,) in [0, 1) what
        share of the batch, which is not known here, comes before that sample.
    """
    views = [_seen(sample["image_CXYZ"], cfg.max_cut, rng) for _ in range(2)]
    return {key: np.stack([view[key] for view in views]) for key in views[0]}


def _seen(image_CXYZ: np.ndarray, max_cut: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
    turns = int(rng.integers(4))
    whole_CXYZ = np.rot90(image_CXYZ, turns, (1, 2))
    cut_CXYZ = whole_CXYZ.copy()
    swap_XYZ = np.zeros(cut_CXYZ.shape[1:], bool)
    for box in draw_boxes(swap_XYZ.shape, max_cut, rng):
        noise = rng.standard_normal(cut_CXYZ[:, *box].shape)
        noise -= noise.min()
        cut_CXYZ[:, *box] = np.round(65535 * noise / max(noise.max(), 1e-6))  # one voxel has no range
    for box in draw_boxes(swap_XYZ.shape, max_cut, rng):
        swap_XYZ[box] = True
    return {
        "whole": whole_CXYZ,
        "cut": cut_CXYZ,
        "turns": np.array(turns, np.int64),
        "swap": swap_XYZ,
        "other": np.array(rng.random()),
    }


def draw_boxes(size_vox: Sequence[int], max_cut: float, rng: np.random.Generator) -> list[Box]:
    """Boxes, which may overlap, until their sizes add up to a share of the crop drawn from 0 to ``max_cut``.

    A box begins anywhere and ends at the crop's far faces at the latest.
    """
    left = rng.uniform(0, max_cut) * math.prod(size_vox)
    boxes = []
    while left > 0:
        box = []
        for side in size_vox:
            low, high = (max(1, int(share * side)) for share in BOX_SIDES)
            start = int(rng.integers(side - low + 1))
            box.append(slice(start, min(start + int(rng.integers(low, high + 1)), side)))
        boxes.append(tuple(box))
        left -= math.prod(edge.stop - edge.start for edge in box)
    return boxes


def filled(cut_BCXYZ: Tensor, swap_BXYZ: Tensor, other_B: Tensor) -> Tensor:
    """Crops whose ``swap`` voxels come from another sample's; a sample that drew itself stays as it is."""
    num_samples = len(cut_BCXYZ)
    # A product with a number just below 1 may round to the number of samples itself.
    source_B = (other_B * num_samples).long().clamp_max(num_samples - 1)
    return torch.where(swap_BXYZ[:, None], cut_BCXYZ[source_B], cut_BCXYZ)


class RCR(EncoderModule[Config]):
    """Backbone and three heads; ``forward`` as the package's contract says."""

    def __init__(self, cfg: Config, network: Network, data_spec: DataSpec) -> None:
        super().__init__(cfg, network, data_spec.in_channels, data_spec.size_vox)
        self.rotation = nn.Linear(self.width, 4)
        self.contrast = nn.Linear(self.width, cfg.contrast)
        stride = network.strides[self.levels[0]]
        self.reconstruction = Reconstruction(self.width, stride, data_spec.in_channels)

    def forward(self, batch: Mapping[str, Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one batch of what ``prepare`` returns; they do not depend on ``progress``."""
        cfg, num_samples = self.cfg, len(batch["turns"])
        cuts = zip(*(batch[key].unbind(1) for key in ("cut", "swap", "other")))
        seen = [filled(intensity(cut), swap, other) for cut, swap, other in cuts]
        turns_N = batch["turns"].T.flatten()  # the first view of every sample, then the second
        whole_NCXYZ = intensity(batch["whole"]).transpose(0, 1).flatten(0, 1)

        feats = self.backbone.encode(torch.cat(seen))
        rotation_N4, first_BD, second_BD, rebuilt_NCXYZ = self.heads(feats, whole_NCXYZ.shape[2:])
        rotation = F.cross_entropy(rotation_N4, turns_N)
        contrast = nt_xent(first_BD, second_BD, cfg.temperature, cfg.gather)
        reconstruction = F.l1_loss(rebuilt_NCXYZ.to(whole_NCXYZ), whole_NCXYZ)
        loss = cfg.w_rotation * rotation + cfg.w_contrast * contrast + cfg.w_reconstruction * reconstruction
        right = rotation_N4.argmax(1).eq(turns_N).sum()
        parts = {"rotation": rotation, "contrast": contrast, "reconstruction": reconstruction}
        return loss, {
            **means(num_samples, loss=loss, **parts),
            "rotation_accuracy": ratio(right, len(turns_N)),
            **means(num_samples, spread=spread(first_BD)),
            "embeddings_BF": pooled(feats[-1].detach())[:num_samples].float(),
        }

    def heads(self, feats: Sequence[Tensor], size_vox: Sequence[int]) -> tuple[Tensor, ...]:
        """Logits of the turns (N, 4), what is compared of both views (B, D) each, and the crops rebuilt."""
        map_NFxyz = joined(feats, self.levels)
        if self.cfg.pool == "mean":
            told_NF = compared_NF = pooled(map_NFxyz)
        else:
            tokens_NFT = wide(map_NFxyz.flatten(2))
            told_NF, compared_NF = tokens_NFT[..., 0], tokens_NFT[..., min(1, tokens_NFT.shape[-1] - 1)]
        with torch.autocast(map_NFxyz.device.type, enabled=False):
            rotation_N4 = self.rotation(told_NF)
            first_BD, second_BD = self.contrast(compared_NF).chunk(2)
        return rotation_N4, first_BD, second_BD, self.reconstruction(map_NFxyz, size_vox)


class Reconstruction(nn.Module):
    """From the coarsest map (B, F, x, y, z) to a crop (B, C, X, Y, Z): for every doubling of the network's stride a
    convolution, a normalisation, leaky ReLU and a trilinear enlargement, which doubles each axis until it is the
    crop's, and at the end a 1x1x1 convolution. Widths halve at every step but the last.
    """

    LEAST_WIDTH = 8  # narrower maps would not be narrowed further

    def __init__(self, width: int, stride: int | Triple, out_channels: int) -> None:
        super().__init__()
        largest = stride if isinstance(stride, int) else max(stride)
        num_steps = max(1, math.ceil(math.log2(largest)))
        widths = [width]
        for _ in range(num_steps - 1):
            widths.append(max(min(widths[-1], self.LEAST_WIDTH), widths[-1] // 2))
        widths.append(widths[-1])
        self.convs = nn.ModuleList(nn.Conv3d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
        self.norms = nn.ModuleList(nn.InstanceNorm3d(b) for b in widths[1:])
        self.out = nn.Conv3d(widths[-1], out_channels, 1)

    def forward(self, map_BFxyz: Tensor, size_vox: Sequence[int]) -> Tensor:
        x = map_BFxyz
        for step, (conv, norm) in enumerate(zip(self.convs, self.norms), start=1):
            x = conv(x)
            if x[0, 0].numel() > 1:  # one voxel has no variance to be normalised
                x = norm(x)
            x = F.leaky_relu(x)
            last = step == len(self.convs)
            size = [whole if last else min(2 * side, whole) for side, whole in zip(x.shape[2:], size_vox)]
            x = F.interpolate(x, size=size, mode="trilinear", align_corners=False)
        return self.out(x)


build = RCR
