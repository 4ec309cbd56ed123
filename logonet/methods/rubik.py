"""Rubik's cube pretexts: undo the moves of a cube (Rubik's Cube++), or name what was done to its cells (Rubik's Cube+).

"restore" is Tao et al. 2020, whom LoGoNet's Table 7 cites: the crop is cut into cubies, slabs one cubie thick are
turned in their planes, and the whole network gives the crop back. "classify" is Zhu et al. 2020: the crop's eight
octants are put into one of K orders, some of them turned by 180 degrees, some masked with noise, and the encoder
tells the order, the turns and the masks; the decoder is not trained.

Rubik's Cube++ adds an adversarial term: a discriminator tells restored crops from real ones. There the two networks
train in turn. Here, where a method is one loss under one optimizer, they train at once, and the discriminator's
gradient is reversed before it enters the network (Ganin & Lempitsky 2015), which makes the same game of it. Its form, a
discriminator of patches (Isola et al. 2017), and its weight are ours.

Of Rubik's Cube+ its published descriptions have 2 x 2 x 2 cells, a gap of about 10 voxels between them, K orders, turns
by 180 degrees about two axes, and masks. The other numbers here, and all of Rubik's Cube++'s, are ours or recollected.
Neither paper's training settings are given in those that compare with them: take those of the other pretexts.

Shapes: B samples, C input channels, X Y Z the crop's axes, x y z a cell cut's, F features, K orders, L logits. There
are 8 cells.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor, nn

from logonet.core import seeding
from logonet.core.config import OMIT_DEFAULT, Count, NonNegative, Positive, Section
from logonet.core.errors import UserError
from logonet.methods import DataSpec
from logonet.methods._parts import MethodModule, freeze, intensity, ratio, sums, wide
from logonet.methods._selfsup import EncoderModule, joined, pooled
from logonet.networks import Network, Triple

NEEDS = frozenset({"crops"})
CELLS = 8
# The axes that are mirrored: none; Y and Z, 180 degrees about X; X and Y, about Z.
TURNS = ((), (1, 2), (0, 1))
SETTLING_EPOCHS = 5  # no warning before
LEAST_ADVERSARIAL = 8  # sides in voxels that the discriminator halves three times


@dataclass(frozen=True)
class Config(Section, key="method"):
    """LoGoNet gives no setting of its rival; see above which of these numbers are the papers'.

    Attributes:
        form: "restore" (Rubik's Cube++) or "classify" (Rubik's Cube+).
        cubie_vox: restore; side of a cubie, 6 of which span a crop of 96.
        moves: restore; fewest and most moves of a crop, both included.
        w_restore: restore; weight of the mean squared error.
        cell_multiple_vox: classify; a cell gives a cut, at random places, whose sides are the largest multiples of this
            below the cell's own, so that its content cannot be continued into its neighbour's. 16 suits most
            backbones and makes 32 of 48 at 96^3; the papers' cuts are about 42, which 6 makes.
        orders: classify; K, the orders that are told apart.
        turn, mask: classify; whether cells are turned and masked besides.
        hidden: classify; width of the layer that the heads share.
        w_adversarial: restore; weight of the adversarial term, 0 does without. 1 goes with a w_restore of 10.
    """

    form: Literal["restore", "classify"] = "restore"
    cubie_vox: Count = 16
    moves: tuple[Count, Count] = (3, 10)
    w_restore: Positive = 10.0
    cell_multiple_vox: Count = 16
    orders: Annotated[int, Ge(2), Le(math.factorial(CELLS))] = 100
    turn: bool = True
    mask: bool = True
    hidden: Count = 512
    w_adversarial: NonNegative = field(default=0.0, metadata=OMIT_DEFAULT)


def check(cfg: Config, data_spec: DataSpec) -> None:
    """Raise UserError when ``cfg`` cannot work on crops like these."""
    text = "x".join(map(str, data_spec.size_vox))
    if cfg.form == "restore":
        if any(side % cfg.cubie_vox or side == cfg.cubie_vox for side in data_spec.size_vox):
            raise UserError(
                f"method.cubie_vox is {cfg.cubie_vox} and crops have {text} voxels; set it so that 2 cubies or "
                "more fill every side"
            )
        if cfg.moves[0] > cfg.moves[1]:
            raise UserError(f"method.moves is {cfg.moves}; set (fewest, most) with fewest <= most")
        if cfg.w_adversarial and min(data_spec.size_vox) < LEAST_ADVERSARIAL:
            raise UserError(
                f"crops have {text} voxels, and method.w_adversarial wants sides of {LEAST_ADVERSARIAL} or more; set "
                "it to 0 or use larger crops"
            )
        return
    if min(cut_size(cfg, data_spec.size_vox)) < 1 or any(s % 2 for s in data_spec.size_vox):
        raise UserError(
            f"method.cell_multiple_vox is {cfg.cell_multiple_vox} and crops have {text} voxels; sides must be even, "
            "and cells, half as wide, wider than this: lower it or use larger crops"
        )


def sizes(cfg: Config, size_vox: Triple) -> tuple[Triple, ...]:
    """The crop's size, or that of a cell's cut."""
    return (size_vox if cfg.form == "restore" else cut_size(cfg, size_vox),)


def cut_size(cfg: Config, size_vox: tuple[int, ...]) -> Triple:
    """Sides (voxels) of what is cut out of a cell; 0 where nothing fits."""
    multiple = cfg.cell_multiple_vox
    x, y, z = ((side // 2 - 1) // multiple * multiple for side in size_vox)
    return x, y, z


def prepare(sample: Mapping[str, Any], cfg: Config, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Turn slabs, or cells.

    Returns:
        restore: ``image`` uint16 (C, X, Y, Z) after the moves and ``target`` uint16, before them.
        classify: ``cells`` uint16 (8, C, x, y, z), ``order`` int64, its number, ``turned`` bool (2, 8), which cells
            are turned about X and about Z, and ``masked`` bool (8,).
    """
    image_CXYZ = sample["image_CXYZ"]
    if cfg.form == "restore":
        moves = draw_moves(cfg, image_CXYZ.shape[1:], rng)
        return {"image": moved(image_CXYZ, moves, cfg.cubie_vox), "target": image_CXYZ}
    return _cells(image_CXYZ, cfg, rng)


def build(cfg: Config, network: Network, data_spec: DataSpec) -> MethodModule[Config]:
    """The module of ``cfg.form`` on ``network``."""
    return (Restore if cfg.form == "restore" else Classify)(cfg, network, data_spec)


def warning(entry: Mapping[str, Any]) -> str | None:
    """A sentence of advice where, after some epochs, nothing is restored or orders are only guessed."""
    if entry.get("epoch", 0) <= SETTLING_EPOCHS:
        return None
    if (error := entry.get("restored_error", 0.0)) >= 1:
        return (
            f"the crops that come back are further from the truth than the moved ones (error {error:.2f} of theirs): "
            "lower train.lr, or method.moves"
        )
    if "order_loss" in entry and entry["order_loss"] >= -math.log(entry["order_chance"]):
        return (
            f"orders are guessed no better than by chance (accuracy {entry['order_accuracy']:.3f}, by chance "
            f"{entry['order_chance']:.3f}): lower train.lr or method.orders, or train on more crops"
        )
    return None


# ---------------------------------------------------------------------------------------------- restore


class Move(NamedTuple):
    """Slab number ``slab`` of those orthogonal to ``axis`` (0 X, 1 Y, 2 Z) turns by ``quarters`` of 90 degrees."""

    axis: int
    slab: int
    quarters: int


def draw_moves(cfg: Config, size_vox: Sequence[int], rng: np.random.Generator) -> list[Move]:
    """The moves of one crop, in their order. A slab that is not square turns by 180 degrees only."""
    moves = []
    for _ in range(rng.integers(cfg.moves[0], cfg.moves[1] + 1)):
        axis = int(rng.integers(3))
        first, second = (size_vox[other] for other in range(3) if other != axis)
        quarters = int(rng.integers(1, 4)) if first == second else 2
        moves.append(Move(axis, int(rng.integers(size_vox[axis] // cfg.cubie_vox)), quarters))
    return moves


def moved(image_CXYZ: np.ndarray, moves: Sequence[Move], cubie_vox: int) -> np.ndarray:
    """A copy of the crop after ``moves``."""
    out = image_CXYZ.copy()
    for axis, slab, quarters in moves:
        first, second = (other + 1 for other in range(3) if other != axis)
        where = [slice(None)] * 4
        where[axis + 1] = slice(slab * cubie_vox, (slab + 1) * cubie_vox)
        out[tuple(where)] = np.rot90(out[tuple(where)], quarters, (first, second))
    return out


class Restore(MethodModule[Config]):
    """The network with a 1x1x1 convolution in the classifier's place, and a discriminator if one is wanted; ``forward``
    as the package's contract says."""

    def __init__(self, cfg: Config, network: Network, data_spec: DataSpec) -> None:
        super().__init__(cfg, network)
        freeze(network, network.head_prefixes)
        self.head = nn.Conv3d(network.feature_channels, data_spec.in_channels, 1)
        self.discriminator = discriminator(data_spec.in_channels) if cfg.w_adversarial else None

    def forward(self, batch: Mapping[str, Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one batch of what ``prepare`` returns; ``progress`` drives nothing here.

        ``restored_error`` is the squared error as a share of that of leaving the crop as it was moved, and
        ``adversarial_loss`` the discriminator's: ln 2 where it cannot tell the crops apart.
        """
        x_BCXYZ, target_BCXYZ = intensity(batch["image"]), intensity(batch["target"])
        feats = self.backbone.encode(x_BCXYZ)
        found_BCXYZ = self.head(self.backbone.decode_features(x_BCXYZ, feats))
        error_B, unmoved_B = (
            (image.to(target_BCXYZ) - target_BCXYZ).square().flatten(1).mean(1)
            for image in (found_BCXYZ, x_BCXYZ)
        )
        loss_B = self.cfg.w_restore * error_B
        metrics = {}
        if self.discriminator is not None:
            told_B = adversarial(self.discriminator, target_BCXYZ, found_BCXYZ)
            loss_B = loss_B + self.cfg.w_adversarial * told_B
            metrics = sums(len(told_B), adversarial_loss=told_B)
        metrics |= {
            "loss": ratio(loss_B.sum(), len(loss_B)),
            "restored_error": ratio(error_B.double().sum(), unmoved_B.double().sum()),
            "embeddings_BF": pooled(feats[-1].detach()).float(),
        }
        return loss_B.mean(), metrics


def discriminator(in_channels: int) -> nn.Sequential:
    """From crops to a logit for each patch: positive where it looks real."""
    layers: list[nn.Module] = []
    for before, width in ((in_channels, 32), (32, 64), (64, 128)):
        layers += [nn.Conv3d(before, width, 4, 2, 1), nn.GroupNorm(8, width), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv3d(128, 1, 3, padding=1))


def adversarial(tell: nn.Module, real_BCXYZ: Tensor, found_BCXYZ: Tensor) -> Tensor:
    """The discriminator's loss for each sample, (B,), whose gradient reaches ``found_BCXYZ`` reversed."""
    real, found = (wide(tell(x)).flatten(1) for x in (real_BCXYZ, _Reversed.apply(found_BCXYZ)))
    return (F.softplus(-real).mean(1) + F.softplus(found).mean(1)) / 2


class _Reversed(torch.autograd.Function):
    """Forward the identity, backward its negative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return -grads[0]


# --------------------------------------------------------------------------------------------- classify


@functools.cache
def orders_of(num: int) -> np.ndarray:
    """``num`` orders of the cells, int8 (num, 8), read-only.

    The first is drawn. Each next one is drawn of those whose Hamming distance to the nearest that is there is largest.
    A function of ``num`` alone, so that a run's config says which orders it learnt, and nothing else is stored.
    """
    every = np.array(list(itertools.permutations(range(CELLS))), np.int8)
    generator = seeding.rng(0, "orders")
    chosen = [int(generator.integers(len(every)))]
    nearest = np.full(len(every), CELLS + 1)
    while len(chosen) < num:
        nearest = np.minimum(nearest, (every != every[chosen[-1]]).sum(1))
        best = np.flatnonzero(nearest == nearest.max())
        chosen.append(int(best[generator.integers(len(best))]))
    table = every[chosen]
    table.flags.writeable = False
    return table


def _cells(image_CXYZ: np.ndarray, cfg: Config, rng: np.random.Generator) -> dict[str, np.ndarray]:
    halves = [side // 2 for side in image_CXYZ.shape[1:]]
    cut = cut_size(cfg, image_CXYZ.shape[1:])
    order = int(rng.integers(cfg.orders))
    turn_8 = rng.integers(len(TURNS), size=CELLS) if cfg.turn else np.zeros(CELLS, int)
    masked_8 = rng.random(CELLS) < 0.5 if cfg.mask else np.zeros(CELLS, bool)
    cells = []
    for place, cell in enumerate(orders_of(cfg.orders)[order]):
        corner = np.unravel_index(int(cell), (2, 2, 2))
        start = [c * half + int(rng.integers(half - side + 1)) for c, half, side in zip(corner, halves, cut)]
        piece = image_CXYZ[:, *(slice(s, s + side) for s, side in zip(start, cut))]
        piece = np.flip(piece, tuple(axis + 1 for axis in TURNS[turn_8[place]]))
        if masked_8[place]:
            # With 0 as in the paper, not with a learnt value: telling that it is there is the task.
            piece = piece * (rng.random(cut) < 0.5)
        cells.append(piece)
    return {
        "cells": np.stack(cells).astype(np.uint16, copy=False),
        "order": np.asarray(order, np.int64),
        "turned": np.stack([turn_8 == 1, turn_8 == 2]),
        "masked": masked_8,
    }


class Classify(EncoderModule[Config]):
    """Encoder, a layer on the means of all cells' maps, and a head for each task; ``forward`` as the contract says."""

    def __init__(self, cfg: Config, network: Network, data_spec: DataSpec) -> None:
        super().__init__(cfg, network, data_spec.in_channels, cut_size(cfg, data_spec.size_vox))
        outputs = {"order": cfg.orders}
        outputs |= {"turn": 2 * CELLS} if cfg.turn else {}
        outputs |= {"mask": CELLS} if cfg.mask else {}
        self.shared = nn.Sequential(nn.Linear(CELLS * self.width, cfg.hidden), nn.ReLU())
        self.heads = nn.ModuleDict({task: nn.Linear(cfg.hidden, num) for task, num in outputs.items()})

    def forward(self, batch: Mapping[str, Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one batch of what ``prepare`` returns; ``progress`` drives nothing here.

        The loss is the mean of the tasks' losses. ``order_chance`` is the ``order_accuracy`` of guessing.
        """
        num_samples = len(batch["order"])
        # In [0, 1], as finetuning sees crops, where the paper scales each cell: what transfers must fit.
        feats = self.backbone.encode(intensity(batch["cells"].flatten(0, 1)))
        rows_BF = pooled(joined(feats, self.levels)).unflatten(0, (num_samples, CELLS)).flatten(1)
        # A few rows only, and softmax and log-sum-exp are no place for bfloat16.
        with torch.autocast(rows_BF.device.type, enabled=False):
            shared = self.shared(rows_BF)
            logits = {task: head(shared) for task, head in self.heads.items()}
            losses_B = {"order": F.cross_entropy(logits["order"], batch["order"].long(), reduction="none")}
            for task, key in (("turn", "turned"), ("mask", "masked")):
                if task in logits:
                    truth_BL = batch[key].flatten(1).to(logits[task])
                    bits_BL = F.binary_cross_entropy_with_logits(logits[task], truth_BL, reduction="none")
                    losses_B[task] = bits_BL.mean(1)
            loss_B = torch.stack(list(losses_B.values())).mean(0)
        return loss_B.mean(), {
            **sums(num_samples, loss=loss_B, **{f"{task}_loss": one_B for task, one_B in losses_B.items()}),
            **self._accuracies(logits, batch),
            "embeddings_BF": pooled(feats[-1].detach()).float().unflatten(0, (num_samples, CELLS)).mean(1),
        }

    @torch.no_grad()
    def _accuracies(self, logits: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        right_B = logits["order"].argmax(1).eq(batch["order"])
        chance = torch.full((), len(right_B) / self.cfg.orders, device=right_B.device)
        found = {
            "order_accuracy": ratio(right_B.sum(), len(right_B)),
            "order_chance": ratio(chance, len(right_B)),
        }
        for task, key in (("turn", "turned"), ("mask", "masked")):
            if task in logits:
                right_BL = (logits[task] > 0).eq(batch[key].flatten(1))
                found[f"{task}_accuracy"] = ratio(right_BL.sum(), right_BL.numel())
        return found
