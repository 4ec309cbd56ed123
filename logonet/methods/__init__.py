"""Methods: what turns a backbone and a batch into a loss. One file per pretext or training objective.

The file's name is the method's registered name; files that start with ``_`` are not registered. A new
file is found, and tested, by existing.

Shapes: B samples, C input channels, X Y Z the crop's axes in RAS order (Z is the slice axis),
N clusterers, F features.

**A method file has**

``Config``
    A frozen dataclass of its settings, every field with a default.
``NEEDS: frozenset[str]``
    What it wants of a sample, out of ``{"crops", "pseudo_labels", "labels"}``.
``check(cfg, facts) -> None``
    Raises UserError for settings that cannot work on this data. Runs before anything is launched.
``prepare(sample, cfg, rng) -> dict[str, np.ndarray]``
    Runs on the CPU data workers, in NumPy, and draws from ``rng`` alone: the same sample and the same
    ``rng`` give the same bits. ``sample`` is one crop and holds what NEEDS names: ``image_CXYZ`` uint16
    (round(65535 * intensity)) for crops; ``labels_NZ`` int16 for pseudo_labels; for labels ``image_CXYZ`` as
    above and ``labels_XYZ`` uint8, class indices below ``DataSpec.num_classes`` (not the values in the label
    file), 0 background. Every array it returns has the same shape and dtype for every sample.
``build(cfg, backbone, facts) -> nn.Module``
    The module below.
``WANTS: frozenset[str]``, optional
    What it needs of its backbone beyond the contract, such as {"encode_visible"}.
``LEAST_BATCH: int``, optional
    Samples that a forward pass must hold at least; 1 where the file does not say.
``SEES_BATCH: bool``, optional
    True where a sample's loss depends on the others of its forward pass, and what is learnt on
    ``train.batch_size``. Samples of one pass are the same whatever the number of workers.
``gathers(cfg) -> bool``, optional
    True where ``forward`` waits for the other ranks': every rank then needs equally many forward passes, and what is
    learnt depends on the number of workers.
``sizes(cfg, size_vox) -> tuple[tuple[int, int, int], ...]``, optional
    The sizes (X, Y, Z in voxels) of what it puts through ``encode``; the crop's where the file does not say.
``warning(entry) -> str | None``, optional
    One sentence with advice where an epoch's entry of the history says that training has collapsed.

**The module has**

``forward(batch, progress) -> (loss, metrics)``
    ``batch``: what ``prepare`` returned, under the same keys, stacked along a new first axis (integers
    may have been widened on the way). ``progress`` in [0, 1] is the share of the training that is done;
    it drives every schedule, so no method knows the loop. ``loss``: a scalar, a mean over the samples of
    the batch. ``metrics``: name -> detached float64 tensor of shape (2, ...) holding (total, count); the
    loop adds them up over steps and ranks and the epoch's value is total / count, exact however the
    counted things were spread; where the count is 0 the epoch has no value. One key is special and
    optional: ``embeddings_BF`` is (B, F) pooled features, from which the loop watches for collapse.
``backbone``
    The backbone; its weights are what transfers.
``after_step(progress)``, optional
    Runs after each optimizer step (EMA teachers).

What a method does not use of its backbone, or is told to leave as it is, it freezes, so every parameter
that requires a gradient gets one at every step and DDP never searches for unused ones.

**Of a backbone** a method may use ``channels``, ``strides``, ``feature_channels``, ``encoder_prefixes``,
``head_prefixes`` (parameters that only the classifier uses), ``encode(x_BCXYZ) -> feats`` (fine to
coarse), ``decode_features(x_BCXYZ, feats) -> f_BFXYZ`` (full resolution), ``decode(x_BCXYZ, feats)``, and
of one that has them what ``backbones`` says of tokens.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from logonet.core.config import Component, from_dict, unknown
from logonet.core.errors import UserError

if TYPE_CHECKING:  # torch takes longer to import than a scan to cut, and tasks that cut import this file
    from torch import nn

COLLAPSED_RANK = 1.5  # of features whose directions healthy training counts in tens
ENOUGH_TO_RANK = 16


@dataclass(frozen=True)
class DataSpec:
    """What a method may know of the data before training.

    Attributes:
        size_vox: a crop's (X, Y, Z).
        in_channels: a crop's C.
        cluster_sizes: for each of the N clusterers its number of clusters.
        majority_labels: for each of the N clusterers its most frequent pseudo-label; () when unknown.
        num_classes: classes of the labels, background included; 0 without labels.
        batch_size: samples of one forward pass; None when unknown.
    """

    size_vox: tuple[int, int, int]
    in_channels: int = 1
    cluster_sizes: tuple[int, ...] = ()
    majority_labels: tuple[int, ...] = ()
    num_classes: int = 0
    batch_size: int | None = None


def names() -> list[str]:
    """The registered methods, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def config(name: str, options: Mapping[str, Any] | None = None) -> Any:
    """The method's ``Config`` with ``options`` laid on its defaults.

    Raises:
        UserError: unknown method, unknown option or wrong type.
    """
    return from_dict(_file(name).Config, options or {}, "method")


def parse(values: Mapping[str, Any] | Component) -> Component:
    """The method that ``{"name": ..., **options}`` describes, with its whole ``Config``.

    Raises:
        UserError: there is no name, no such method, an unknown option or a value of the wrong type.
    """
    return Component.of(values, "method").resolve(config, "method")


def needs(name: str) -> frozenset[str]:
    """What the method wants of a sample, out of {"crops", "pseudo_labels", "labels"}."""
    return _file(name).NEEDS


def sees_batch(name: str) -> bool:
    """Whether a sample's loss depends on the others of its forward pass."""
    return getattr(_file(name), "SEES_BATCH", False)


def gathers(name: str, cfg: Any) -> bool:
    """Whether a forward pass waits for those of the other ranks."""
    of = getattr(_file(name), "gathers", None)
    return of is not None and of(cfg)


def least_batch(name: str) -> int:
    """Samples that a forward pass must hold at least."""
    return getattr(_file(name), "LEAST_BATCH", 1)


def sizes(name: str, cfg: Any, size_vox: tuple[int, int, int]) -> tuple[tuple[int, int, int], ...]:
    """The sizes of what the method puts through ``encode`` where crops have ``size_vox`` voxels."""
    of = getattr(_file(name), "sizes", None)
    return (size_vox,) if of is None else of(cfg, size_vox)


def check(name: str, cfg: Any, facts: DataSpec) -> None:
    """Raise UserError when ``cfg`` cannot work on this data."""
    least = least_batch(name)
    if facts.batch_size is not None and facts.batch_size < least:
        raise UserError(
            f"method '{name}' compares the crops of a batch and train.batch_size is {facts.batch_size}; set it to "
            f"{least} or more"
        )
    _file(name).check(cfg, facts)


def wants(name: str) -> frozenset[str]:
    """What the method needs of its network beyond the contract."""
    return getattr(_file(name), "WANTS", frozenset())


def lacking(name: str, backbone: nn.Module) -> set[str]:
    """What the method needs of its backbone and this one does not have."""
    return {part for part in wants(name) if not hasattr(backbone, part)}


def warning(name: str, entry: Mapping[str, Any], num_samples: int = ENOUGH_TO_RANK) -> str | None:
    """One sentence with advice where an epoch's ``entry`` of the history says that training has collapsed.

    Args:
        num_samples: of the epoch. The effective rank of a few embeddings is low whatever they are.
    """
    own = getattr(_file(name), "warning", None)
    if own is not None and (sentence := own(entry)) is not None:
        return sentence
    rank = entry.get("effective_rank", math.inf)
    if rank >= COLLAPSED_RANK or num_samples < ENOUGH_TO_RANK:
        return None
    return (
        f"the encoder gives every crop nearly the same features (effective rank {rank:.2f}): lower train.lr, raise "
        "train.batch_size or choose another method"
    )


def prepare(name: str) -> Callable[[Mapping[str, Any], Any, np.random.Generator], dict[str, np.ndarray]]:
    """The method's ``prepare(sample, cfg, rng)``."""
    return _file(name).prepare


def build(
    name: str, backbone: nn.Module, facts: DataSpec | None = None, *, cfg: Any = None, **options: Any
) -> nn.Module:
    """The method's module on ``backbone``.

    Args:
        facts: what is known of the data; its fields may be given (or replaced) as keywords instead.
        cfg: the method's ``Config``; or give its fields as keywords.

    Raises:
        UserError: unknown method or option, or settings that cannot work on this data.
    """
    fields = {f.name for f in dataclasses.fields(DataSpec)}
    known = {k: options.pop(k) for k in sorted(fields & options.keys())}
    facts = dataclasses.replace(facts, **known) if facts is not None else DataSpec(**known)
    assert cfg is None or not options, "give cfg or its fields, not both"
    cfg = config(name, options) if cfg is None else cfg
    check(name, cfg, facts)
    if missing := lacking(name, backbone):
        raise UserError(
            f"method '{name}' needs {' and '.join(sorted(missing))} of its backbone, which "
            f"{type(backbone).__name__} does not have; choose another backbone or method"
        )
    return _file(name).build(cfg, backbone, facts)


def _file(name: str) -> ModuleType:
    if name not in names():
        raise UserError(unknown("method", name, names()))
    return importlib.import_module(f"{__name__}.{name}")
