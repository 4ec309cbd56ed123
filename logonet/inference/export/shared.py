"""What the export formats share: the network whose forward pass gives logits alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from logonet.core.config import Component
from logonet.inference import model

# Options that only choose a faster way to the same numbers, with their values for a portable graph.
PLAIN = {"lka": "plain", "channels_last": False, "checkpointing": False}


def logits_only(net: nn.Module) -> nn.Module:
    # A hook and not a wrapping module, which would rename the weights.
    net.register_forward_hook(lambda module, args, out: out.logits)
    return net.eval()


def network(
    backbone: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    in_channels: int,
    num_classes: int,
    regions: bool = False,
) -> nn.Module:
    """A network in eval mode whose ``forward`` gives logits_BKXYZ alone; its state dict is unchanged.

    Args:
        backbone: of an ensemble all of its networks.
        regions: the outputs are regions.
    """
    parts = [backbone] if isinstance(backbone, Mapping) else backbone
    components = [Component.of(part, "backbone") for part in parts]
    return logits_only(model.assemble(components, in_channels, num_classes, regions))
