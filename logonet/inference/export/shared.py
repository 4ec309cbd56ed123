"""What the export formats share: the network without its extras, and the versions that it needs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from logonet import networks
from logonet.core.errors import UserError

# Options that only choose a faster route to the same numbers, and what they are in a graph for any machine.
PLAIN = {"lka": "plain", "channels_last": False, "checkpointing": False}


def logits_only(net: nn.Module) -> nn.Module:
    # A hook rather than a module around it: the names of the weights stay what they are.
    net.register_forward_hook(lambda module, args, out: out.logits)
    return net.eval()


def network(backbone: Mapping[str, Any], in_channels: int, num_classes: int) -> nn.Module:
    """A backbone whose ``forward`` gives logits_BKXYZ alone, in eval mode; its state dict is the backbone's."""
    options = {key: value for key, value in backbone.items() if key != "name"}
    cfg = networks.config(backbone["name"], options)
    return logits_only(networks.build(backbone["name"], in_channels, num_classes, cfg))


def need(packages: Sequence[str]) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"ONNX export needs {', '.join(missing)}; install them with pip install 'logonet[export]'"
        )


def installed_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def public_version(version: str) -> str:
    return version.split("+")[0]
