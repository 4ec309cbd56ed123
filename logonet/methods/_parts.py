"""Pieces that more than one method (or the loop that trains them) uses.

Shapes: B samples, C input channels, X Y Z the crop's axes, N rows, F features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def intensity(image_BCXYZ: Tensor) -> Tensor:
    """Stored integers (round(65535 * intensity)) as float32 in [0, 1], same shape."""
    return image_BCXYZ.to(torch.float32) / 65535


def freeze(module: nn.Module, prefixes: Iterable[str]) -> None:
    """Stop gradients of the parameters whose dotted name lies under one of ``prefixes``."""
    stems = _stems(prefixes)
    for name, parameter in module.named_parameters():
        if f"{name}.".startswith(stems):
            parameter.requires_grad_(False)


def freeze_unreached(module: nn.Module, output: Callable[[Any], Tensor]) -> None:
    """Stop gradients of the parameters that ``output(module)`` does not depend on.

    Args:
        output: is given a copy without weights, in eval mode, to run on tensors of the meta device.
    """
    shapes = copy.deepcopy(module).to("meta").eval()
    with torch.enable_grad():
        output(shapes).sum().backward()
    for own, shape in zip(module.parameters(), shapes.parameters(), strict=True):
        if shape.grad is None:
            own.requires_grad_(False)


def modules_under(module: nn.Module, prefixes: Iterable[str]) -> list[nn.Module]:
    """The submodules whose dotted name is, or lies under, one of ``prefixes``."""
    stems = _stems(prefixes)
    return [part for name, part in module.named_modules() if f"{name}.".startswith(stems)]


def _stems(prefixes: Iterable[str]) -> tuple[str, ...]:
    return tuple(prefix.rstrip(".") + "." for prefix in prefixes)


def ratio(total: Tensor, count: Tensor | float) -> Tensor:
    """A metric for the loop: (total, count) stacked, shape (2, ...), detached float64."""
    # float64: counts of voxels pass 2**24 within one epoch, where float32 stops counting.
    total = total.detach().to(torch.float64)
    return torch.stack([total, torch.as_tensor(count, device=total.device).to(total).expand_as(total)])


def effective_rank(embeddings_NF: Tensor) -> float:
    """How many directions a set of embeddings really uses: exp of the entropy of the normalised singular
    values of the centred matrix (Roy & Vetterli 2007). Between 1 and min(N - 1, F); 0 when all
    embeddings are equal, NaN when one is not finite.
    """
    x_NF = embeddings_NF.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(x_NF).all()):
        return float("nan")
    values = torch.linalg.svdvals(x_NF - x_NF.mean(0))
    # Collapsed embeddings differ by float32 rounding, which is noise of full rank: it must not count.
    noise = torch.finfo(torch.float32).eps * max(x_NF.shape) ** 0.5 * x_NF.norm()
    values = values[values > noise]
    if not len(values):
        return 0.0
    share = values / values.sum()
    return float(torch.exp(-(share * share.log()).sum()))
