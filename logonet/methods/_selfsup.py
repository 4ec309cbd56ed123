"""What the self-supervised methods share: teachers that follow, projection heads, contrasts.

Shapes: N rows (one for each embedding), D columns.
"""

from __future__ import annotations

import copy
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def momentum(progress: float, start: float = 0.996, end: float = 1.0) -> float:
    """A teacher's share of itself: from ``start`` to ``end`` along half a cosine (BYOL, 2020, section 3.3)."""
    return end - (end - start) * (1 + math.cos(math.pi * progress)) / 2


def teacher_of(student: nn.Module) -> nn.Module:
    """A copy that no gradient reaches. Make it after the student is ready: frozen parameters are copied too."""
    return copy.deepcopy(student).requires_grad_(False)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """teacher <- decay * teacher + (1 - decay) * student; buffers, such as running statistics, are copied."""
    for weight, new in zip(teacher.parameters(), student.parameters(), strict=True):
        weight.mul_(decay).add_(new, alpha=1 - decay)
    for buffer, statistic in zip(teacher.buffers(), student.buffers(), strict=True):
        buffer.copy_(statistic)


def gathered(x_ND: Tensor) -> tuple[Tensor, int]:
    """The rows of every rank, in the order of the ranks, and how many come before one's own.

    Gradients flow back to the rank a row is from. Where each rank's loss is a mean over its own rows, the
    average of the ranks' gradients is then that of the mean over all rows.
    """
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x_ND, 0
    from torch.distributed.nn.functional import all_gather

    return torch.cat(list(all_gather(x_ND))), dist.get_rank() * len(x_ND)


def nt_xent(a_ND: Tensor, b_ND: Tensor, temperature: float, gather: bool = False) -> Tensor:
    """SimCLR's loss (2020, Eq. 1) of N pairs, meaned over all 2N rows; row i of ``a`` belongs to row i of ``b``.

    Args:
        gather: take the rows of all ranks as negatives, rather than one's own alone.
    """
    (all_a, before), (all_b, _) = (gathered(x) if gather else (x, 0) for x in (a_ND, b_ND))
    rows = len(a_ND)
    own = torch.arange(before, before + rows, device=a_ND.device)
    # In float32 or better: exponentials of cosines over a temperature are no place for bfloat16.
    with torch.autocast(a_ND.device.type, enabled=False):
        every = F.normalize(torch.cat([all_a, all_b]).to(_wide(a_ND)), dim=1)
        anchors = torch.cat([own, own + len(all_a)])
        positives = torch.cat([own + len(all_a), own])
        logits = every[anchors] @ every.T / temperature
        logits = logits.scatter(1, anchors[:, None], -math.inf)  # a row is not its own negative
        return F.cross_entropy(logits, positives)


def cosine(a_ND: Tensor, b_ND: Tensor) -> Tensor:
    """The cosine of each pair of rows, (N,), in float32 or better; 0 for a row of zeros."""
    with torch.autocast(a_ND.device.type, enabled=False):
        wide = _wide(a_ND)
        return (F.normalize(a_ND.to(wide), dim=1) * F.normalize(b_ND.to(wide), dim=1)).sum(1)


def mlp(widths: tuple[int, ...], norm: bool = False, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers of ``widths``, an activation (before it, with ``norm``, batch norm) between any two."""
    layers: list[nn.Module] = []
    for i, (old, new) in enumerate(itertools.pairwise(widths)):
        if i:
            layers += [nn.BatchNorm1d(old)] if norm else []
            layers += [activation()]
        layers.append(nn.Linear(old, new))
    return nn.Sequential(*layers)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
