"""What the self-supervised methods share: the trained part of an encoder, moving-average teachers, contrasts.

Shapes: B samples, C input channels, F features, X Y Z the crop's axes, x y z a map's, N rows (one for each
embedding), D columns.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from logonet.core.errors import UserError
from logonet.methods._parts import C, MethodModule, wide
from logonet.networks import Network, Triple

# Spread of projections: 1 is healthy, and freshly initialised networks begin at 0.02 or above.
COLLAPSED_SPREAD = 0.01


class EncoderModule(MethodModule[C]):
    """A method that trains the encoder alone and looks at its coarsest map.

    Attributes:
        levels: what `joined` joins.
        width: F of what it returns.
    """

    def __init__(self, cfg: C, network: Network, in_channels: int, size_vox: Triple) -> None:
        super().__init__(cfg, network)
        self.levels = train_encoder(network, in_channels, size_vox)
        self.width = sum(network.channels[level] for level in self.levels)


def train_encoder(network: Network, in_channels: int, size_vox: Triple) -> tuple[int, ...]:
    """Freeze everything but the encoder.

    Returns:
        The levels of ``encode`` for `joined`: the coarsest, and any finer one without which some convolution or
        linear layer of the encoder would never be trained. Most networks need only the coarsest; in LoGoNet the
        nets that see an octant end two levels above it. Norms that only finer maps pass through do not add a
        level: they are frozen too.
    """
    # On the meta device nothing is computed. Autograd's graph shows which parameters a map depends on.
    shapes = copy.deepcopy(network).requires_grad_(True).to("meta").train()
    with torch.enable_grad():
        feats = shapes.encode(torch.empty(2, in_channels, *size_vox, device="meta"))
    names = {parameter: name for name, parameter in shapes.named_parameters()}
    levels: list[int] = []
    reached: set[Tensor] = set()
    for level in reversed(range(len(feats))):
        reaches = _leaves(feats[level]) & names.keys()
        if not levels or any(weight.ndim > 1 for weight in reaches - reached):
            levels.append(level)
            reached |= reaches
    trained = {names[parameter] for parameter in reached}  # type: ignore[index]
    for name, parameter in network.named_parameters():
        if name not in trained:
            parameter.requires_grad_(False)
    return tuple(levels)


def _leaves(output: Tensor) -> set[Tensor]:
    """The leaves of autograd's graph that ``output`` depends on."""
    found, seen, todo = set(), set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        todo += [before for before, _ in node.next_functions]
    return found


def joined(feats: Sequence[Tensor], levels: tuple[int, ...]) -> Tensor:
    """The map of ``levels[0]``, (B, F, x, y, z), and the other levels' maps at its size, concatenated along F."""
    coarse = feats[levels[0]]
    return torch.cat([_shrunk(feats[level], coarse.shape[2:]) for level in levels], dim=1)


def _shrunk(map_BFxyz: Tensor, size: Sequence[int]) -> Tensor:
    """Means of equal boxes. Pooling is not used because its backward pass on CUDA is not deterministic."""
    if map_BFxyz.shape[2:] == size:
        return map_BFxyz
    x, y, z = size
    assert all(old % new == 0 for old, new in zip(map_BFxyz.shape[2:], size)), "maps must nest"
    boxes = map_BFxyz.unflatten(4, (z, -1)).unflatten(3, (y, -1)).unflatten(2, (x, -1))
    return boxes.mean(dim=(3, 5, 7))


def pooled(map_BFxyz: Tensor) -> Tensor:
    """The mean over space, (B, F), in float32 or better."""
    return wide(map_BFxyz).mean(dim=(2, 3, 4))


def momentum(progress: float, start: float = 0.996, end: float = 1.0) -> float:
    """The decay of a moving average: from ``start`` to ``end`` along half a cosine (BYOL, 2020, section 3.3)."""
    return end - (end - start) * (1 + math.cos(math.pi * progress)) / 2


def check_momentum(cfg: Any) -> None:
    """Raise UserError unless ``momentum_start`` and ``momentum_end`` suit `momentum`."""
    if cfg.momentum_start > cfg.momentum_end:
        raise UserError(
            f"method.momentum_start is {cfg.momentum_start}; it must be at most method.momentum_end, "
            f"{cfg.momentum_end}"
        )


M = TypeVar("M", bound=nn.Module)


def teacher_of(student: M) -> M:
    """A copy, frozen parameters included, that no gradient reaches. Make it when the student is ready."""
    return copy.deepcopy(student).requires_grad_(False)


def follow_all(cfg: Any, progress: float, *pairs: tuple[nn.Module, nn.Module]) -> None:
    """`follow` for pairs of a teacher and a student, with the `momentum` of ``progress``."""
    decay = momentum(progress, cfg.momentum_start, cfg.momentum_end)
    for teacher, student in pairs:
        follow(teacher, student, decay)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """teacher <- decay * teacher + (1 - decay) * student; buffers, such as running statistics, are copied."""
    # All weights at once, which on CUDA is two kernels; lerp_ would round otherwise.
    weights: list[Tensor] = list(teacher.parameters())
    torch._foreach_mul_(weights, decay)
    torch._foreach_add_(weights, [*student.parameters()], alpha=1 - decay)
    for buffer, statistic in zip(teacher.buffers(), student.buffers(), strict=True):
        buffer.copy_(statistic)


def gathered(x_ND: Tensor) -> tuple[Tensor, int]:
    """The rows of all ranks, in the order of the ranks, and the number of rows before this rank's own.

    Every rank has the same number of rows. Gradients flow back to the rank that a row comes from. Where each rank's
    loss is a mean over its own rows, the average of the ranks' gradients is the gradient of the mean over all rows.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x_ND, 0
    return _Gather.apply(x_ND), dist.get_rank() * len(x_ND)


class _Gather(torch.autograd.Function):
    """Forward: the rows of all ranks. Backward: the sum of all ranks' gradients of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor) -> Tensor:
        parts = [torch.empty_like(x_ND) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x_ND.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def nt_xent(a_ND: Tensor, b_ND: Tensor, temperature: float, gather: bool = False) -> Tensor:
    """SimCLR's loss (2020, Eq. 1) of N pairs, averaged over all 2N rows; row i of ``a`` and row i of ``b`` are a pair.

    Args:
        gather: take the rows of all ranks as negatives, not only this rank's.
    """
    # In float32 or better: bfloat16 is too coarse for exponentials of cosines over a temperature.
    with torch.autocast(a_ND.device.type, enabled=False):
        ready = [F.normalize(wide(x), dim=1) for x in (a_ND, b_ND)]
        (all_a, before), (all_b, _) = (gathered(x) if gather else (x, 0) for x in ready)
        own = torch.arange(before, before + len(a_ND), device=a_ND.device)
        every = torch.cat([all_a, all_b])
        anchors = torch.cat([own, own + len(all_a)])
        positives = torch.cat([own + len(all_a), own])
        logits = every[anchors] @ every.T / temperature
        logits = logits.scatter(1, anchors[:, None], -math.inf)  # a row is not its own negative
        return F.cross_entropy(logits, positives)


def cosine(a_ND: Tensor, b_ND: Tensor) -> Tensor:
    """The cosine of each pair of rows, (N,), in float32 or better; 0 for a row of zeros."""
    with torch.autocast(a_ND.device.type, enabled=False):
        return (F.normalize(wide(a_ND), dim=1) * F.normalize(wide(b_ND), dim=1)).sum(1)


def byol_loss(prediction_ND: Tensor, target_ND: Tensor) -> Tensor:
    """The mean of 2 - 2 cos over the rows (BYOL, 2020, Eq. 2), from 0 to 4. No gradient reaches ``target_ND``."""
    return (2 - 2 * cosine(prediction_ND, target_ND.detach())).mean()


@torch.no_grad()
def spread(rows_ND: Tensor) -> Tensor:
    """How much N >= 2 rows differ in direction, a scalar: 0 where all are equal, 1 where all are orthogonal.

    The standard deviation of the normalised rows' columns (as a root mean square) times sqrt(D), the measure of
    SimSiam (Chen & He 2021, section 4.1).
    """
    with torch.autocast(rows_ND.device.type, enabled=False):
        return F.normalize(wide(rows_ND), dim=1).var(0).sum().sqrt()


def collapse(entry: Mapping[str, Any]) -> str | None:
    """A sentence of advice where an epoch's ``spread`` says that all projections point the same way."""
    value = entry.get("spread", math.inf)
    if value >= COLLAPSED_SPREAD:
        return None
    return (
        f"the projections of different crops are nearly the same (spread {value:.3f}, where 1 is healthy): lower "
        "train.lr or raise train.batch_size"
    )


def mlp(widths: tuple[int, ...], norm: bool = False, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers of ``widths``, an activation (before it, with ``norm``, batch norm) between any two."""
    layers: list[nn.Module] = []
    for i, (old, new) in enumerate(itertools.pairwise(widths)):
        if i:
            layers += [nn.BatchNorm1d(old)] if norm else []
            layers += [activation()]
        layers.append(nn.Linear(old, new))
    return nn.Sequential(*layers)
