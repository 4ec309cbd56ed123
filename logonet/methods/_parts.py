"""Parts that several methods, or the training loop, share.

Shapes: B samples, C input channels, X Y Z the crop's axes, N rows, F features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from logonet.core.errors import UserError
from logonet.networks import Network, under

C = TypeVar("C")  # a method's Config


class MethodModule(nn.Module, Generic[C]):
    """The base class of what methods build. The docstring of ``logonet.methods`` says what it must do."""

    backbone: Network

    def __init__(self, cfg: C, network: Network) -> None:
        super().__init__()
        self.cfg = cfg
        self.backbone = network

    @property
    def exported(self) -> Network:
        """The network that is validated and whose weights are stored for use."""
        return self.backbone

    def forward(self, batch: Mapping[str, Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one batch of what ``prepare`` returns."""
        raise NotImplementedError


def check_weights(cfg: Any, *keys: str) -> None:
    """Raise UserError where the weights of all losses are 0."""
    if not any(getattr(cfg, key) for key in keys):
        names = " and ".join(f"method.{key}" for key in keys)
        raise UserError(f"{names} are all 0; set one of them above 0")


def intensity(image_BCXYZ: Tensor) -> Tensor:
    """Stored integers (round(65535 * intensity)) as float32 in [0, 1], same shape."""
    return image_BCXYZ.to(torch.float32) / 65535


def freeze(module: nn.Module, prefixes: Iterable[str]) -> None:
    """Freeze the parameters whose dotted name begins with one of ``prefixes``."""
    for name, parameter in module.named_parameters():
        if under(name, prefixes):
            parameter.requires_grad_(False)


def freeze_unreached(module: nn.Module, output: Callable[[Any], Tensor]) -> None:
    """Freeze the parameters that ``output(module)`` does not depend on.

    Args:
        output: gets a copy without weights, in eval mode, to run on tensors of the meta device.
    """
    shapes = copy.deepcopy(module).to("meta").eval()
    with torch.enable_grad():
        output(shapes).sum().backward()
    for own, shape in zip(module.parameters(), shapes.parameters(), strict=True):
        if shape.grad is None:
            own.requires_grad_(False)


def modules_under(module: nn.Module, prefixes: Iterable[str]) -> list[nn.Module]:
    """The submodules whose dotted name equals or begins with one of ``prefixes``."""
    return [part for name, part in module.named_modules() if under(name, prefixes)]


def wide(x: Tensor) -> Tensor:
    """``x`` in float32, or in its own type where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def ratio(total: Tensor, count: Tensor | float) -> Tensor:
    """A metric for the loop: (total, count) stacked, shape (2, ...), detached float64."""
    # float64: counts of voxels pass 2**24 within one epoch, where float32 stops counting.
    total = total.detach().to(torch.float64)
    # A number is filled in on the device: to copy it there would wait for all work that is queued.
    count = count.to(total) if isinstance(count, Tensor) else total.new_full((), count)
    return torch.stack([total, count.expand_as(total)])


def means(count: int, **values: Tensor) -> dict[str, Tensor]:
    """Metrics of the loop from means over ``count`` samples."""
    return {name: ratio(value * count, count) for name, value in values.items()}


def sums(count: int, **values_B: Tensor) -> dict[str, Tensor]:
    """Metrics of the loop, averaged over ``count`` samples, from one value for each sample."""
    return {name: ratio(value_B.sum(), count) for name, value_B in values_B.items()}


def effective_rank(embeddings_NF: Tensor) -> float:
    """The effective number of dimensions of a set of embeddings (Roy & Vetterli 2007).

    The exponential of the entropy of the normalised singular values of the centred matrix. Between 1 and
    min(N - 1, F); 0 when all embeddings are equal, NaN when one is not finite.
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
