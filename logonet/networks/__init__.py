"""Backbones: networks that turn a crop into features and logits. One file each; the file name is the name.

Letters: B batch, C input channels, F features, K classes, XYZ the crop's axes (Z is the slice axis).

**The contract.** A backbone is a module of this package whose name does not begin with ``_``. Nothing
is typed into a list: `names` looks into the package's ``__path__``. The file defines

- ``Config``: a frozen dataclass of options, every one with a default;
- ``build(cfg, in_channels, num_classes) -> nn.Module``;
- ``size_multiple(cfg) -> (int, int, int)``: each side of a crop must be a multiple of these (voxels);
- ``check_size(cfg, size_vox) -> None``, optional: raises UserError for what else a crop's size can lack.
  A net that takes one size alone has it in ``Config.img_size``;
- ``TINY``: options that make the smallest sensible net, for tests and demos.

The module it builds has

- ``channels``, ``strides``: tuples of int, of the features `encode` returns, fine to coarse; a stride is
  three ints where the axes differ;
- ``feature_channels``: the F of `decode_features`;
- ``encoder_prefixes``, ``head_prefixes``: tuples of str, prefixes of parameter names. The first cover
  what ``encode`` uses, the second the final classifier, which pretraining leaves out;
- ``encode(x_BCXYZ) -> list[Tensor]``: features, fine to coarse;
- ``decode_features(x_BCXYZ, feats) -> f_BFXYZ``: dense features at full resolution, before the
  classifier. Pretraining heads stand on it;
- ``decode(x_BCXYZ, feats) -> SegOut``;
- ``forward(x) = decode(x, encode(x))``.

A network that cuts the crop into tokens can have more, for methods that mask tokens:

- ``embed_stride``: three ints, the side of a token in voxels, and ``embed_channels``, the E of its vector;
- ``encode_hidden(x_BCXYZ, hidden_Bxyz, token_E) -> list[Tensor]``: ``encode``, where the vectors of the
  tokens that are hidden (bool, one for each token) are replaced by ``token_E`` before positions are added;
- ``encode_visible(x_BCXYZ, keep_BV, prefix_B1E) -> tokens_BVE``: the last layer's normalised vectors of
  the V tokens with the indices ``keep_BV`` (of the tokens in C order) from these alone. A prefix, unless
  None, is one more vector, without a position, put before them, and the first of what comes back (V + 1).
  The crop may be of any size that divides into tokens: positions are interpolated.

A backbone knows nothing of methods, and tests parametrise over `names`: a new file is tested by existing.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from logonet.core.config import Component, from_dict, unknown
from logonet.core.errors import UserError

OPTIONAL = ("encode_hidden", "encode_visible")


class SegOut(NamedTuple):
    """What a backbone's ``decode`` returns."""

    logits: Tensor  # (B, K, X, Y, Z)
    deep: list[Tensor]  # logits of auxiliary heads for deep supervision, fine to coarse; may be empty
    aux_loss: Tensor | None  # a scalar the network wants added to the loss, e.g. a VAE term


def names() -> list[str]:
    """The registered backbones, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def config(name: str, options: Mapping[str, Any] | None = None) -> Any:
    """The backbone's ``Config`` with ``options`` laid on its defaults.

    Raises:
        UserError: for an unknown backbone, an unknown option or a value of the wrong type.
    """
    return from_dict(_load(name).Config, options or {}, where="backbone")


def parse(values: Mapping[str, Any] | Component) -> Component:
    """The network that ``{"name": ..., **options}`` describes, with its whole ``Config``.

    Raises:
        UserError: there is no name, no such network, an unknown option or a value of the wrong type.
    """
    return Component.of(values, "backbone").resolve(config, "backbone")


def build(
    name: str, in_channels: int = 1, num_classes: int = 14, cfg: Any = None, **options: Any
) -> nn.Module:
    """A fresh network, initialised from torch's global random state.

    Args:
        name: one of `names`.
        in_channels: C of the crops.
        num_classes: K, background included.
        cfg: the backbone's ``Config``; or else give its fields as ``options``.

    Raises:
        UserError: for an unknown backbone or a bad option.
    """
    assert cfg is None or not options, "give either cfg or options"
    return _load(name).build(cfg if cfg is not None else config(name, options), in_channels, num_classes)


def check_size(name: str, cfg: Any, size_vox: Sequence[int]) -> None:
    """Refuse a crop size (X, Y, Z in voxels) that the network cannot take.

    Raises:
        UserError: naming the nearest sizes that it can.
    """
    file = _load(name)
    multiple = file.size_multiple(cfg)
    if len(size_vox) != 3:
        raise UserError(f"crop size {tuple(size_vox)} must be three numbers of voxels (X, Y, Z)")
    if hasattr(file, "check_size"):
        file.check_size(cfg, size_vox)
    if all(side > 0 and side % m == 0 for side, m in zip(size_vox, multiple)):
        return
    below = tuple(max(side // m, 1) * m for side, m in zip(size_vox, multiple))
    above = tuple(max(-(-side // m), 1) * m for side, m in zip(size_vox, multiple))
    near = " or ".join(str(size) for size in dict.fromkeys((below, above)))
    raise UserError(
        f"crop size {tuple(size_vox)} does not fit backbone '{name}', whose sides must be multiples of "
        f"{multiple}; use {near}"
    )


@functools.cache
def abilities(name: str) -> frozenset[str]:
    """Which of the parts of the contract that a network need not have the backbone has."""
    with torch.device("meta"):
        net = build(name, **tiny(name))
    return frozenset(part for part in OPTIONAL if hasattr(net, part))


def tiny(name: str) -> dict[str, Any]:
    """Options that make the smallest sensible net, for tests and demos."""
    return dict(_load(name).TINY)


def _load(name: str) -> ModuleType:
    if name not in names():
        raise UserError(unknown("backbone", name, names()))
    return importlib.import_module(f"{__name__}.{name}")
