"""The method module that a run trains, built and checked before anything is read."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

import torch
from torch import nn

from logonet import methods, networks
from logonet.core.errors import UserError
from logonet.methods import DataSpec
from logonet.storage import object_store
from logonet.training.config import Init


def load_weights(init: Init) -> dict[str, torch.Tensor]:
    """The tensors of ``init``'s file, which must be the very file that was meant."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(object_store.read(init.uri, sha256=init.sha256))
    except SafetensorError as err:
        raise UserError(f"{init.uri} is no safetensors file ({err}); give weights saved by logonet") from None


def dry_run(backbone: dict[str, Any], method: dict[str, Any], facts: DataSpec) -> None:
    """Build the pair and run the encoder on shapes alone: what cannot train says so before anything is read.

    Args:
        backbone: {"name": ..., **options}; ``method`` alike.
        facts: with the batch size.

    Raises:
        UserError: such as a crop that shrinks to one voxel, which batch norm cannot normalise at batch size 1, or a
            method that needs of the network what it does not have.
    """
    assert facts.batch_size is not None
    b_cfg = networks.config(backbone["name"], {k: v for k, v in backbone.items() if k != "name"})
    m_cfg = methods.config(method["name"], {k: v for k, v in method.items() if k != "name"})
    text = json.dumps(backbone, sort_keys=True)
    if missing := methods.lacking(method["name"], _shapes_only(text, facts.in_channels)):
        able = [name for name in networks.names() if not missing - networks.abilities(name)]
        raise UserError(
            f"method '{method['name']}' needs {' and '.join(sorted(missing))} of its backbone, which "
            f"'{backbone['name']}' does not have; backbones that do: {', '.join(able) or 'none'}"
        )
    for size_vox in methods.sizes(method["name"], m_cfg, facts.size_vox):
        networks.check_size(backbone["name"], b_cfg, size_vox)
        if (why := _cannot_train(text, facts.batch_size, facts.in_channels, size_vox)) is not None:
            size = "x".join(map(str, size_vox))
            raise UserError(
                f"backbone '{backbone['name']}' cannot train on batches of {facts.batch_size} crops of {size} voxels "
                f"({why}); use a larger train.batch_size or crops.size_vox"
            )
    with torch.device("meta"):  # what only the two together can say; a copy, since methods freeze
        methods.build(method["name"], copy.deepcopy(_shapes_only(text, facts.in_channels)), facts, cfg=m_cfg)


@functools.lru_cache(maxsize=64)  # a sweep asks of every trial
def _shapes_only(backbone: str, in_channels: int) -> Any:
    """The network without weights. ``backbone`` as JSON."""
    options = json.loads(backbone)
    with torch.device("meta"):
        return networks.build(options.pop("name"), in_channels=in_channels, num_classes=2, **options).train()


@functools.lru_cache(maxsize=256)
def _cannot_train(backbone: str, batch: int, in_channels: int, size_vox: tuple[int, int, int]) -> str | None:
    """Why not, or None. ``backbone`` as JSON."""
    try:
        with torch.device("meta"):
            _shapes_only(backbone, in_channels).encode(torch.empty(batch, in_channels, *size_vox))
    except (ValueError, RuntimeError) as err:
        return str(err)
    return None


def build_method(backbone: dict[str, Any], method: dict[str, Any], facts: DataSpec) -> nn.Module:
    """The method module of two ``{"name": ..., **options}`` mappings."""
    b, m = dict(backbone), dict(method)
    net = networks.build(
        b.pop("name"), in_channels=facts.in_channels, num_classes=max(facts.num_classes, 2), **b
    )
    return methods.build(m.pop("name"), net, facts, **m)
