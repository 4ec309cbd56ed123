"""Methods turn a network and a batch into a loss. One file for each pretext or training objective.

The file's name is the method's registered name; files that start with ``_`` are not registered. A new file is found,
and tested, without being listed anywhere.

Shapes: B samples, C input channels, X Y Z the crop's axes in RAS order (Z is the slice axis), N clusterers,
F features.

**A method's file** defines what `Method` says and, where the default does not suit it:

``WANTS: frozenset[str]``
    What the method needs of its network beyond `networks.Network`, such as {"encode_visible"}.
``LEAST_BATCH: int``
    The fewest samples that a forward pass can hold; default 1.
``gathers(cfg) -> bool``
    True where ``forward`` waits for those of the other ranks: every rank then needs equally many forward passes, and
    the result depends on the number of workers. Default False.
``sizes(cfg, size_vox) -> tuple[tuple[int, int, int], ...]``
    The sizes (X, Y, Z in voxels) of what passes through ``encode``; default the crop's.
``BYPASS_SCORE: str``
    A metric of ``forward`` that the loop also measures with ``encode``'s features at zero, to see whether the pretext
    needs them; for methods whose network has a way around its encoder.
``warning(entry) -> str | None``
    One sentence of advice where an epoch's entry of the history says that training has collapsed.

**The module** that ``build`` returns is a `MethodModule`:

``forward(batch, progress) -> (loss, metrics)``
    ``batch``: what ``prepare`` returned, under the same keys, stacked along a new first axis (integers may have been
    widened on the way). ``progress`` in [0, 1] is the share of the training that is done; every schedule depends on
    it alone, so no method knows the loop. ``loss``: a scalar, a mean over the samples of the batch. ``metrics``: name
    -> detached float64 tensor of shape (2, ...) holding (total, count). The loop adds them up over steps and ranks
    and reports total / count for the epoch, which is exact however the samples were distributed; where the count is
    0 the epoch has no value. One key is special and optional: ``embeddings_BF``, (B, F) pooled features, from which
    the loop detects collapse.
``backbone``
    The network; its weights are what transfers. (The attribute is part of the names of stored weights.)
``exported``
    The network that is validated and whose weights a run stores for use: by default ``backbone``.
``after_step(progress)``, optional
    Runs after each optimizer step (EMA teachers).

A method freezes what it does not use of its network, or is told not to train. Every parameter that requires a
gradient then gets one at every step, and DDP need not search for unused ones.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from logonet.core.config import Component, from_dict, unknown
from logonet.core.errors import UserError

if TYPE_CHECKING:  # importing torch takes longer than cutting a scan, and tasks that cut import this file
    from logonet.methods._parts import MethodModule
    from logonet.networks import Network

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
        ignores: some voxels' labels are `classes.IGNORE`.
        regions: the class indices of each region where regions overlap; ``num_classes`` is then their number, each
            an output of its own, and a network has no output for background.
    """

    size_vox: tuple[int, int, int]
    in_channels: int = 1
    cluster_sizes: tuple[int, ...] = ()
    majority_labels: tuple[int, ...] = ()
    num_classes: int = 0
    batch_size: int | None = None
    ignores: bool = False
    regions: tuple[tuple[int, ...], ...] = ()


class Method(Protocol):
    """What a method's file defines.

    Attributes:
        Config: a frozen dataclass of settings, every field with a default.
        NEEDS: what the method needs of a sample, out of {"crops", "pseudo_labels", "labels"}.
    """

    Config: type
    NEEDS: frozenset[str]

    def check(self, cfg: Any, data_spec: DataSpec) -> None:
        """Raise UserError for settings that cannot work on this data. Runs before anything is launched."""

    def prepare(
        self, sample: Mapping[str, np.ndarray], cfg: Any, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Arrays for ``forward``, each of the same shape and dtype for every sample.

        Runs in NumPy on the CPU data workers and draws from ``rng`` alone: the same sample and the same ``rng`` give
        the same bits.

        Args:
            sample: one crop, with what NEEDS names. For crops ``image_CXYZ`` uint16 (round(65535 * intensity)); for
                pseudo_labels also ``labels_NZ`` int16; for labels ``image_CXYZ`` and ``labels_XYZ`` uint8, class
                indices below ``DataSpec.num_classes`` (not the values in the label file), 0 background.
        """

    def build(self, cfg: Any, network: Network, data_spec: DataSpec) -> MethodModule:
        """The module that is trained: most often the class itself."""


def names() -> list[str]:
    """The registered methods, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def config(name: str, options: Mapping[str, Any] | None = None) -> Any:
    """The method's ``Config`` with ``options`` over its defaults.

    Raises:
        UserError: unknown method, unknown option or wrong type.
    """
    return from_dict(_file(name).Config, options or {}, "method")


def needs(name: str) -> frozenset[str]:
    """What the method needs of a sample, out of {"crops", "pseudo_labels", "labels"}."""
    return _file(name).NEEDS


def gathers(name: str, cfg: Any) -> bool:
    """Whether a forward pass waits for those of the other ranks."""
    file = _file(name)
    return hasattr(file, "gathers") and file.gathers(cfg)


def least_batch(name: str) -> int:
    """Samples that a forward pass must hold at least."""
    return getattr(_file(name), "LEAST_BATCH", 1)


def bypass_score(name: str) -> str | None:
    """The metric that tells whether the method needs the encoder; None where nothing else could serve."""
    return getattr(_file(name), "BYPASS_SCORE", None)


def sizes(name: str, cfg: Any, size_vox: tuple[int, int, int]) -> tuple[tuple[int, int, int], ...]:
    """The sizes of what the method puts through ``encode`` where crops have ``size_vox`` voxels."""
    file = _file(name)
    return file.sizes(cfg, size_vox) if hasattr(file, "sizes") else (size_vox,)


def check(name: str, cfg: Any, data_spec: DataSpec) -> None:
    """Raise UserError when ``cfg`` cannot work on this data."""
    least = least_batch(name)
    if data_spec.batch_size is not None and data_spec.batch_size < least:
        raise UserError(
            f"method '{name}' compares the crops of a batch and train.batch_size is {data_spec.batch_size}; set it "
            f"to {least} or more"
        )
    _file(name).check(cfg, data_spec)


def lacking(name: str, network: Network) -> set[str]:
    """What the method needs of its network beyond the contract, and this one does not have."""
    return {part for part in getattr(_file(name), "WANTS", ()) if not hasattr(network, part)}


def warning(name: str, entry: Mapping[str, Any], num_samples: int = ENOUGH_TO_RANK) -> str | None:
    """One sentence with advice where an epoch's ``entry`` of the history says that training has collapsed.

    Args:
        num_samples: of the epoch. The effective rank of a few embeddings is low whatever they are.
    """
    file = _file(name)
    if hasattr(file, "warning") and (sentence := file.warning(entry)) is not None:
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
    name: str, network: Network, data_spec: DataSpec | None = None, *, cfg: Any = None, **options: Any
) -> MethodModule:
    """The method's module on ``network``.

    Args:
        data_spec: what is known of the data; its fields may be given (or replaced) as keywords instead.
        cfg: the method's ``Config``; or give its fields as keywords.

    Raises:
        UserError: unknown method or option, or settings that cannot work on this data.
    """
    fields = {f.name for f in dataclasses.fields(DataSpec)}
    known = {k: options.pop(k) for k in sorted(fields & options.keys())}
    data_spec = dataclasses.replace(data_spec, **known) if data_spec is not None else DataSpec(**known)
    assert cfg is None or not options, "give cfg or its fields, not both"
    cfg = config(name, options) if cfg is None else cfg
    check(name, cfg, data_spec)
    if missing := lacking(name, network):
        raise UserError(
            f"method '{name}' needs {' and '.join(sorted(missing))} of its backbone, which "
            f"{type(network).__name__} does not have; choose another backbone or method"
        )
    return _file(name).build(cfg, network, data_spec)


def from_component(component: Component, network: Network, data_spec: DataSpec) -> MethodModule:
    """The module of a method that a config describes, on ``network``; see `build`."""
    component = component.resolve(config, "method")
    return build(component.name, network, data_spec, cfg=component.config)


def _file(name: str) -> Method:
    if name not in names():
        raise UserError(unknown("method", name, names()))
    file: Any = importlib.import_module(f"{__name__}.{name}")
    return file
