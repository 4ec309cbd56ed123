"""The method module that a run trains, built and checked before anything is read."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch

from logonet import methods, networks
from logonet.core.config import Component
from logonet.core.errors import UserError
from logonet.methods import DataSpec
from logonet.storage import object_store
from logonet.training import weight_transfer
from logonet.training.config import Init


def load_weights(init: Init) -> dict[str, torch.Tensor]:
    """The tensors of ``init``'s file, which must be the very file that was meant."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(object_store.read(init.uri, sha256=init.sha256))
    except SafetensorError as err:
        raise UserError(f"{init.uri} is no safetensors file ({err}); give weights saved by logonet") from None


def load_initial(net: Any, init: Init) -> weight_transfer.Report:
    """Load ``init``'s weights into the backbone ``net``."""
    return weight_transfer.transfer(
        net,
        load_weights(init),
        source=init.uri,
        min_encoder_share=init.min_encoder_share,
        parts=init.parts,
        positions=_positions(init.backbone) if getattr(net, "positions", None) else {},
    )


def _positions(backbone: Component) -> Mapping[str, networks.Triple]:
    """`Network.positions` of the network that a config describes; empty where it describes none."""
    if not backbone.name:
        return {}
    with torch.device("meta"):
        return networks.from_component(backbone, in_channels=1, num_classes=2).positions


def dry_run(backbone: Component, method: Component, data_spec: DataSpec) -> None:
    """Build the pair and run the encoder on shapes alone: what cannot train says so before anything is read.

    Args:
        backbone, method: resolved.
        data_spec: with the batch size.

    Raises:
        UserError: such as a crop that shrinks to one voxel, which batch norm cannot normalise at batch size 1, or a
            method that needs of the network what it does not have.
    """
    batch, channels = data_spec.batch_size, data_spec.in_channels
    assert batch is not None
    if missing := methods.lacking(method.name, _shapes_only(backbone, channels)):
        able = [name for name in networks.names() if not missing - networks.abilities(name)]
        raise UserError(
            f"method '{method.name}' needs {' and '.join(sorted(missing))} of its backbone, which "
            f"'{backbone.name}' does not have; backbones that do: {', '.join(able) or 'none'}"
        )
    for size_vox in methods.sizes(method.name, method.config, data_spec.size_vox):
        networks.check_size(backbone.name, backbone.config, size_vox)
        if (why := _cannot_train(backbone, batch, channels, size_vox)) is not None:
            size = "x".join(map(str, size_vox))
            raise UserError(
                f"backbone '{backbone.name}' cannot train on batches of {batch} crops of {size} voxels "
                f"({why}); use a larger train.batch_size or crops.size_vox"
            )
    with torch.device("meta"):  # what only the two together can say; a copy, since methods freeze
        methods.from_component(method, copy.deepcopy(_shapes_only(backbone, channels)), data_spec)


@functools.lru_cache(maxsize=64)  # a sweep asks of every trial
def _shapes_only(backbone: Component, in_channels: int) -> Any:
    """The network without weights."""
    with torch.device("meta"):
        return networks.from_component(backbone, in_channels, num_classes=2).train()


@functools.lru_cache(maxsize=256)
def _cannot_train(
    backbone: Component, batch: int, in_channels: int, size_vox: tuple[int, int, int]
) -> str | None:
    """Why not, or None."""
    try:
        with torch.device("meta"):
            _shapes_only(backbone, in_channels).encode(torch.empty(batch, in_channels, *size_vox))
    except (ValueError, RuntimeError) as err:
        return str(err)
    return None


def build_method(backbone: Component, method: Component, data_spec: DataSpec) -> Any:
    """The method's module on a fresh network."""
    net = networks.from_component(backbone, data_spec.in_channels, max(data_spec.num_classes, 2))
    return methods.from_component(method, net, data_spec)
