"""Optimizers, the learning rates of their parameter groups, and averaged weights."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from logonet.networks import Network, under
from logonet.training.config import Config
from logonet.training.schedule import lr_at

Size = tuple[int, int, int]


class Group(NamedTuple):
    """What parameters of one optimizer group have in common.

    Attributes:
        lr_scale: factor of the schedule's learning rate.
        encoder: whether they rest while the encoder is frozen.
        decays: whether weight decay acts on them.
    """

    lr_scale: float
    encoder: bool
    decays: bool


def build(
    params: Mapping[str, nn.Parameter], network: Network, size_vox: Size, cfg: Config, fused: bool = False
) -> torch.optim.Optimizer:
    """The optimizer that ``cfg`` names. With default settings it has one group, the parameters in their order.

    Args:
        params: those to train, by their names in the method: the network's begin with ``backbone.``.
        network: the method's.
        size_vox: of a crop that goes through the network.
        fused: one kernel for all tensors, on CUDA.
    """
    members: dict[Group, list[nn.Parameter]] = defaultdict(list)
    for name, group in groups_of(params, network, size_vox, cfg).items():
        members[group].append(params[name])
    groups = [
        {
            "params": own,
            "lr_scale": group.lr_scale,
            "encoder": group.encoder,
            "weight_decay": cfg.weight_decay if group.decays else 0.0,
        }
        for group, own in members.items()
    ]
    if cfg.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=cfg.lr, momentum=cfg.momentum, nesterov=cfg.momentum > 0, fused=fused or None
        )
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, fused=fused or None)


def groups_of(
    params: Mapping[str, nn.Parameter], network: Network, size_vox: Size, cfg: Config
) -> dict[str, Group]:
    """The group of each parameter.

    The head is the network's classifier and all that a method adds to the network. Vectors (biases, weights and
    biases of norms, scales) and scalars do not decay with ``decay_norms=false``.
    """
    levels = encoder_levels(network, size_vox) if cfg.layer_decay < 1 else {}
    num_levels = max(levels.values(), default=0) + 1
    found = {}
    for name, p in params.items():
        in_network = name.startswith("backbone.")
        own = name.removeprefix("backbone.")
        scale, in_encoder = 1.0, in_network and under(own, network.encoder_prefixes)
        if in_encoder:
            scale = cfg.encoder_lr_scale * cfg.layer_decay ** (num_levels - levels.get(own, num_levels - 1))
        elif not in_network or under(own, network.head_prefixes):
            scale = cfg.head_lr_scale
        frozen = in_encoder and cfg.frozen_epochs > 0
        found[name] = Group(scale, frozen, cfg.decay_norms or p.ndim > 1)
    return found


def encoder_levels(network: Network, size_vox: Size) -> dict[str, int]:
    """For each parameter that ``encode`` uses the first of the features, fine to coarse, that depends on it.

    Found in the graph of a pass on shapes alone, so that no network has to declare its layers.
    """
    shapes: Any = copy.deepcopy(network).to("meta").train()
    channels = next(m.in_channels for m in shapes.modules() if isinstance(m, nn.Conv3d))
    names = {id(p): name for name, p in shapes.named_parameters()}
    levels: dict[str, int] = {}
    seen: set[Any] = set()
    with torch.device("meta"):
        feats = shapes.encode(torch.empty(2, channels, *size_vox))
    for level, feat_BFXYZ in enumerate(feats):
        waiting = [feat_BFXYZ.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if (variable := getattr(node, "variable", None)) is not None and id(variable) in names:
                levels.setdefault(names[id(variable)], level)
            waiting += [parent for parent, _ in node.next_functions]
    return levels


def set_rates(optimizer: torch.optim.Optimizer, step: int, cfg: Config, steps_per_epoch: int) -> None:
    """Give every group its learning rate at ``step``."""
    lr = lr_at(step, cfg, steps_per_epoch)
    frozen = step < round(cfg.frozen_epochs * steps_per_epoch)
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if frozen and group["encoder"] else lr * group["lr_scale"]


class Average:
    """An exponential moving average of a network's weights; its buffers are the network's own.

    The average begins short: after n steps its decay is at most (1 + n) / (10 + n), so that it forgets the random
    weights it starts from.
    """

    def __init__(self, network: Network, decay: float):
        self.decay = decay
        self._steps = 0
        self._module = AveragedModel(network, multi_avg_fn=self._average)

    @property
    def network(self) -> Any:
        return self._module.module

    def update(self, network: Network, steps: int) -> None:
        """Take in the weights after ``steps`` steps."""
        self._steps = steps
        self._module.update_parameters(network)

    def state_dict(self) -> dict[str, Tensor]:
        return self._module.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._module.load_state_dict(state, strict=True)

    def _average(self, averaged: Sequence[Tensor], current: Sequence[Tensor], _: Any) -> None:
        decay = min(self.decay, (1 + self._steps) / (10 + self._steps))
        torch._foreach_lerp_(list(averaged), list(current), 1 - decay)
