"""SimTROT (Hu et al. 2023), also called SimPROT, SimPROT-W and BPROT: views are compared token by token.

The tokens are the positions of the encoder's coarsest map. Both views show the same crop with different textures; in
the second, boxes are filled with noise. The first is turned and mirrored, and its map is turned and mirrored back, so
that positions match again, while an encoder that encodes nothing but positions fails. In the framework "simclr" a
token attracts its other view and repels all others (Eq. 1), those at the same position of other crops ``w`` times
(Eq. 3); in "byol" it predicts the token of a slowly moving copy (Eq. 2). Rows of the paper's Table 4: "simclr" with
``mask`` and ``rotate`` and w = 5 is SimPROT-W, with w = 1 SimPROT, "byol" with both BPROT.

Negatives come from one's own worker's batch, and "other crops" help most where they are of other patients; memory
for the contrast grows with the square of the batch's tokens. The paper trains with SGD at 1e-4, Nesterov momentum
0.99, weight decay 1e-5, 2 crops a batch.

Departures from the released code, which does not do what the paper says: maps are restored by the exact inverse
(it passes 2 of 12 cases); a row holds one token's channels (it mixes tokens); ``w`` weighs every cross-crop pair
outside the exponential (it scales half the similarities inside); the projector is trained (it is made anew each
epoch) and ends without ReLU; each sample has its own mask of an exact number of boxes (it draws one over the
batch); textures are drawn once per view (twice for the second).

Shapes: B samples, C input channels, X Y Z the crop's axes (Z slices), F features, x y z the map's axes, T = x * y * z
tokens, R rows, D columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Gt, Lt
from torch import Tensor, nn

from logonet.core.config import Count, Positive, Section, Share, SizeVox
from logonet.core.errors import UserError
from logonet.data import volume
from logonet.methods import DataSpec, _selfsup, _views
from logonet.methods._parts import means, wide
from logonet.methods._selfsup import EncoderModule
from logonet.networks import Network

NEEDS = frozenset({"crops"})
LEAST_BATCH = 2  # without other crops tokens could encode nothing but their position
COLLAPSED_INDEX = 0.5  # position-collapse index: 0 is healthy, at 1 tokens encode nothing but their position
NOISE_STD = 0.1  # of what fills masked boxes, about 0; the crop's window is [0, 1]


@dataclass(frozen=True)
class Config(Section, key="method"):
    """Defaults are SimPROT-W's.

    Attributes:
        framework: "simclr" contrasts tokens, "byol" predicts those of a moving copy.
        mask: fill boxes of the second view with noise.
        mask_unit_vox: a box (X, Y, Z in voxels). The paper's for abdominal CT; (8, 8, 8) for brains.
        mask_ratio: share of the boxes that are filled, rounded down.
        rotate: turn and mirror the first view, and its map back. Quarter turns in the slice plane need X and Y to
            be of one length in the crop, and in the map too; where they are not, turns are by 0 or 180 degrees.
        flips: "plane" mirrors no axis, X or Y, as the paper; "all" any of the three, each by itself.
        w: weight of the tokens at the same place of other crops, of "simclr"; 1 treats all negatives alike.
        temperature: tau, of "simclr".
        hidden: width of the heads' hidden layer; None is twice the map's for "simclr", the map's for "byol".
        projection: width of the projections; None is the map's for "simclr", 256 for "byol".
        momentum_start, momentum_end: of "byol", as of the method of that name. The paper's code keeps 0.99.
    """

    framework: Literal["simclr", "byol"] = "simclr"
    mask: bool = True
    mask_unit_vox: SizeVox = (8, 8, 4)
    mask_ratio: Annotated[float, Gt(0), Lt(1)] = 0.75
    rotate: bool = True
    flips: Literal["plane", "all"] = "plane"
    w: Positive = 5.0
    temperature: Positive = 0.5
    hidden: Count | None = None
    projection: Count | None = None
    momentum_start: Share = 0.99
    momentum_end: Share = 1.0


def check(cfg: Config, data_spec: DataSpec) -> None:
    """Raise UserError when ``cfg`` cannot work on crops like these."""
    _selfsup.check_momentum(cfg)
    if cfg.mask and any(side % unit for side, unit in zip(data_spec.size_vox, cfg.mask_unit_vox)):
        raise UserError(
            f"method.mask_unit_vox {cfg.mask_unit_vox} does not divide crops of {data_spec.size_vox} voxels; choose "
            "sides that do, or set method.mask to false"
        )


def prepare(sample: Mapping[str, Any], cfg: Config, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Make two views and draw the move of the first.

    Returns:
        ``first`` and ``second``, float32 (C, X, Y, Z), nominally in [0, 1], with boxes of noise in the second;
        ``move`` int64 (4,): see `moved`. The first is moved on the device, where its map is moved back.
    """
    image_CXYZ = volume.from_uint16(sample["image_CXYZ"])
    size_vox: Any = image_CXYZ.shape[1:]
    drawn, other = (_views.draw(_views.RECIPES["texture"], size_vox, rng) for _ in range(2))
    first = _views.apply(image_CXYZ, drawn)
    if cfg.mask:
        seen_XYZ = ~draw_boxes(size_vox, cfg.mask_unit_vox, cfg.mask_ratio, rng)
        # Drawing noise takes most of the time, so one field fills the boxes and is the view's own noise outside.
        own_std, silent = other.augment.noise_std, replace(other.augment, noise_std=0.0)
        second = rng.standard_normal(image_CXYZ.shape, np.float32)
        second *= NOISE_STD
        np.multiply(second, own_std / NOISE_STD, out=second, where=seen_XYZ)
        np.add(second, _views.apply(image_CXYZ, replace(other, augment=silent)), out=second, where=seen_XYZ)
    else:
        second = _views.apply(image_CXYZ, other)
    move = draw_move(size_vox, cfg.flips, rng) if cfg.rotate else (0, 0, 0, 0)
    return {"first": first, "second": second, "move": np.array(move, np.int64)}


def draw_boxes(
    size_vox: Sequence[int], unit_vox: tuple[int, int, int], share: float, rng: np.random.Generator
) -> np.ndarray:
    """Voxels of int(share * N) of the N boxes that the crop divides into, bool (X, Y, Z)."""
    grid = tuple(side // unit for side, unit in zip(size_vox, unit_vox))
    hidden_N = np.zeros(math.prod(grid), bool)
    hidden_N[rng.permutation(len(hidden_N))[: int(share * len(hidden_N))]] = True
    hidden_XYZ = hidden_N.reshape(grid)
    for axis in (2, 1, 0):  # Z first: longer and longer runs are copied
        hidden_XYZ = hidden_XYZ.repeat(unit_vox[axis], axis)
    return hidden_XYZ


def draw_move(
    size_vox: Sequence[int], flips: Literal["plane", "all"], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Quarter turns from X towards Y, and for each of X, Y, Z whether it is mirrored thereafter."""
    turns = int(rng.integers(4)) if size_vox[0] == size_vox[1] else 2 * int(rng.integers(2))
    if flips == "all":
        x, y, z = (int(flip) for flip in rng.integers(2, size=3))
        return turns, x, y, z
    axis = int(rng.integers(3))
    return turns, int(axis == 1), int(axis == 2), 0


def moved(image_BCXYZ: Tensor, move_B4: Tensor) -> Tensor:
    """Images turned, then mirrored, each by its own move."""
    return _flipped(_swapped(image_BCXYZ, move_B4), move_B4)


def restored(map_BFxyz: Tensor, move_B4: Tensor) -> Tensor:
    """Maps of moved images in the images' own order: the exact inverse of `moved`, last step first."""
    return _swapped(_flipped(map_BFxyz, move_B4), move_B4)


def _swapped(x_BCXYZ: Tensor, move_B4: Tensor) -> Tensor:
    """The first half of a turn: a quarter turn is a swap of X and Y and a flip of X, half a turn a flip of both."""
    if x_BCXYZ.shape[2] != x_BCXYZ.shape[3]:  # there are no quarter turns then
        return x_BCXYZ
    return _where(move_B4[:, 0] % 2 == 1, x_BCXYZ.transpose(2, 3), x_BCXYZ)


def _flipped(x_BCXYZ: Tensor, move_B4: Tensor) -> Tensor:
    turns_B, *mirrored = move_B4.unbind(1)
    turned = turns_B % 2 + turns_B // 2, turns_B // 2, torch.zeros_like(turns_B)
    for axis, (times_B, once_B) in enumerate(zip(turned, mirrored), start=2):
        x_BCXYZ = _where((times_B + once_B) % 2 == 1, x_BCXYZ.flip(axis), x_BCXYZ)
    return x_BCXYZ


def _where(which_B: Tensor, changed_BCXYZ: Tensor, x_BCXYZ: Tensor) -> Tensor:
    """Both ways are computed, as moves are known to the device alone: to read them would wait for all its work."""
    return torch.where(which_B[:, None, None, None, None], changed_BCXYZ, x_BCXYZ)


def tokens(map_BFxyz: Tensor) -> Tensor:
    """(B, T, F) in float32 or better: each row the F channels at one place."""
    return wide(map_BFxyz).flatten(2).transpose(1, 2)


class SimTROT(EncoderModule[Config]):
    """Backbone and heads, and for "byol" a copy; ``forward`` as the package's contract says."""

    def __init__(self, cfg: Config, network: Network, data_spec: DataSpec) -> None:
        super().__init__(cfg, network, data_spec.in_channels, data_spec.size_vox)
        stride, width = network.strides[self.levels[0]], self.width
        self.square = isinstance(stride, int) or stride[0] == stride[1]
        if cfg.framework == "simclr":
            self.projector = _selfsup.mlp((width, cfg.hidden or 2 * width, cfg.projection or width))
        else:
            hidden, projection = cfg.hidden or width, cfg.projection or 256
            self.projector = _selfsup.mlp((width, hidden, projection), norm=True)
            self.predictor = _selfsup.mlp((projection, hidden, projection), norm=True)
            self.target_backbone = _selfsup.teacher_of(network)
            self.target_projector = _selfsup.teacher_of(self.projector)

    def forward(self, batch: Mapping[str, Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one batch of what ``prepare`` returns; ``progress`` drives `after_step`."""
        move_B4 = batch["move"]
        if not self.square:
            move_B4 = torch.cat([move_B4[:, :1] // 2 * 2, move_B4[:, 1:]], dim=1)
        both_NCXYZ = torch.cat([moved(batch["first"], move_B4), batch["second"]])
        num_samples = len(move_B4)
        feats = self.backbone.encode(both_NCXYZ)
        views = self._views(feats, move_B4)
        with torch.autocast(views[0].device.type, enabled=False):
            z_first, z_second = (_by_row(self.projector, view_BTF) for view_BTF in views)
            if self.cfg.framework == "simclr":
                loss = token_contrast(z_first, z_second, self.cfg.temperature, self.cfg.w)
            else:
                t_first, t_second = self._targets(both_NCXYZ, move_B4)
                one = _selfsup.byol_loss(self.predictor(z_first.flatten(0, 1)), t_second.flatten(0, 1))
                other = _selfsup.byol_loss(self.predictor(z_second.flatten(0, 1)), t_first.flatten(0, 1))
                loss = one + other
        index = (position_collapse(z_first) + position_collapse(z_second)) / 2
        apart = _selfsup.spread(z_first.flatten(0, 1))
        return loss, {
            **means(num_samples, loss=loss, position_collapse=index, spread=apart),
            "embeddings_BF": _selfsup.pooled(feats[-1].detach())[:num_samples].float(),
        }

    def _views(self, feats: Sequence[Tensor], move_B4: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, T, F) of the first view, put back in order, and of the second."""
        first_BFxyz, second_BFxyz = _selfsup.joined(feats, self.levels).chunk(2)
        return tokens(restored(first_BFxyz, move_B4)), tokens(second_BFxyz)

    @torch.no_grad()
    def _targets(self, both_NCXYZ: Tensor, move_B4: Tensor) -> list[Tensor]:
        views = self._views(self.target_backbone.encode(both_NCXYZ), move_B4)
        return [_by_row(self.target_projector, view_BTF) for view_BTF in views]

    def after_step(self, progress: float) -> None:
        """Update the copy, if there is one."""
        if self.cfg.framework == "byol":
            pairs = (self.target_backbone, self.backbone), (self.target_projector, self.projector)
            _selfsup.follow_all(self.cfg, progress, *pairs)


def _by_row(head: nn.Module, rows_BTF: Tensor) -> Tensor:
    """``head``, whose batch norm takes a table, of every token."""
    return head(rows_BTF.flatten(0, 1)).unflatten(0, rows_BTF.shape[:2])


def token_contrast(first_BTD: Tensor, second_BTD: Tensor, temperature: float, w: float) -> Tensor:
    """Eq. 3 meaned over all 2BT tokens; with w = 1 it is NT-Xent (Eq. 1) of BT pairs.

    As printed Eq. 3 divides the exponentials by tau and leaves the positive out of the sum; here, as in Eq. 1,
    tau divides the cosine and the sum is over all tokens but the anchor: the positive, those at other places and,
    times w, those at the same place of other samples.
    """
    with torch.autocast(first_BTD.device.type, enabled=False):
        num_samples, num_tokens, _ = first_BTD.shape
        rows = torch.cat([first_BTD, second_BTD]).flatten(0, 1)
        rows_RD = F.normalize(wide(rows), dim=1)
        logits_RR = rows_RD @ rows_RD.T / temperature
        row_R = torch.arange(len(rows_RD), device=rows_RD.device)
        place_R, sample_R = row_R % num_tokens, row_R // num_tokens % num_samples
        same_place = place_R[:, None] == place_R
        same_sample = sample_R[:, None] == sample_R
        logits_RR = logits_RR + math.log(w) * (same_place & ~same_sample)
        logits_RR = logits_RR.masked_fill(row_R[:, None] == row_R, -math.inf)  # no token is its own negative
        return F.cross_entropy(logits_RR, row_R.roll(num_samples * num_tokens))


@torch.no_grad()
def position_collapse(rows_BTD: Tensor) -> Tensor:
    """The mean cosine of tokens at one place of two samples less that of two places of one sample, a scalar.

    1 where tokens encode nothing but their position; about 0 where they are healthy, or all equal. Where the map
    has only one token the second mean is 0.
    """
    with torch.autocast(rows_BTD.device.type, enabled=False):
        num_samples, num_tokens, _ = rows_BTD.shape
        z_BTD = F.normalize(wide(rows_BTD), dim=2)
        own = z_BTD.square().sum()
        # The cosines of all pairs out of n unit vectors are the squared length of their sum, less n.
        across = (z_BTD.sum(0).square().sum() - own) / (num_tokens * num_samples * (num_samples - 1))
        within = (z_BTD.sum(1).square().sum() - own) / max(1, num_samples * num_tokens * (num_tokens - 1))
        return across - within


def warning(entry: Mapping[str, Any]) -> str | None:
    """One sentence with advice where an epoch's entry of the history says that training has collapsed."""
    index = entry.get("position_collapse", 0.0)
    if index > COLLAPSED_INDEX:
        return (
            f"tokens tell their place in the crop and little else (position-collapse index {index:.2f}, where 0 is "
            "healthy): raise method.w, set method.rotate to true or raise train.batch_size"
        )
    return _selfsup.collapse(entry)


build = SimTROT
