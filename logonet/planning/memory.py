"""Memory and arithmetic of one micro-batch, from shapes alone: nothing is computed and nothing is allocated.

The module that would be trained runs forward and backward once on tensors that have shapes and no data (torch's fake
tensors). Every storage counts from its creation until it is freed, as autograd would hold and free it, with
checkpointed activations too; torch's counter adds up the arithmetic.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from logonet import methods, networks, training
from logonet.core.config import Component
from logonet.methods import DataSpec
from logonet.planning.sizes import Network

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward pass of a worker.

    Attributes:
        forward_bytes: held for the backward pass when the forward pass is done.
        peak_bytes: the most at any time, with gradients, without weights, moments and the batch.
        batch_bytes: of its input.
        flop: floating point operations; a multiply-accumulate is two.
        known_from: a phrase that says how they are known.
    """

    forward_bytes: int
    peak_bytes: int
    batch_bytes: int
    flop: float
    known_from: str


@dataclass(frozen=True)
class Windows:
    """The network on windows of a scan, without gradients.

    Attributes:
        peak_bytes: of as many as it sees at once, with them and without the weights.
        flop: of one.
    """

    peak_bytes: int
    flop: float


@dataclass(frozen=True)
class Work:
    """What a recipe needs, whatever it runs on.

    Attributes:
        sample_bytes: one prepared sample.
        read_bytes: from the store for one sample; None for those of its crops.
        label_flop: operations of a brute-force search, where data tasks label the sample.
        rows: crops of one sample.
        windows: where it validates.
        validation_bytes: the most that validation holds beside weights, gradients and moments.
    """

    facts: DataSpec
    network: Network
    micro: MicroBatch
    sample_bytes: int
    precision: str
    read_bytes: float | None = None
    label_flop: float = 0.0
    rows: int = 1
    windows: Windows | None = None
    validation_bytes: int = 0

    @property
    def crop_bytes(self) -> int:
        """Of the stored crops of a sample, and of their labels."""
        each = 2 * self.facts.in_channels + (self.facts.num_classes > 0)
        return self.rows * each * math.prod(self.facts.size_vox)

    @property
    def row_bytes(self) -> int:
        """What data tasks take a sample's prepared rows for; see `training.dataset`."""
        each = 5 if self.facts.num_classes else 4
        return self.rows * each * self.facts.in_channels * math.prod(self.facts.size_vox)


def raw_sample(spec: DataSpec, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A smooth random crop with random labels, as a method's ``prepare`` takes it."""
    x, y, z = spec.size_vox
    coarse_CXYZ = rng.random((spec.in_channels, *(-(-n // 8) for n in spec.size_vox)), dtype=np.float32)
    crop_CXYZ = np.kron(coarse_CXYZ, np.ones((1, 8, 8, 8), np.float32))
    raw: dict[str, np.ndarray] = {"image_CXYZ": (crop_CXYZ[:, :x, :y, :z] * 65535).astype(np.uint16)}
    if spec.cluster_sizes:
        raw["labels_NZ"] = np.stack([rng.integers(0, k, z) for k in spec.cluster_sizes]).astype(np.int16)
    if spec.num_classes:
        raw["labels_XYZ"] = rng.integers(0, spec.num_classes, spec.size_vox, dtype=np.uint8)
    return raw


def prepared(spec: DataSpec, method: Component, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One sample from the method's own ``prepare``."""
    method = method.resolve(methods.config, "method")
    return methods.prepare(method.name)(raw_sample(spec, rng), method.config, rng)


def micro_batch(
    backbone: Component, method: Component, spec: DataSpec, *, bf16: bool, sample: Arrays
) -> MicroBatch:
    """Count one pass over ``spec.batch_size`` samples like ``sample``.

    Where the method's shapes depend on data, only the network is counted, and ``known_from`` says so.
    """

    needs_data = (
        fake_tensor.DataDependentOutputException,
        fake_tensor.DynamicOutputShapeException,
        fake_tensor.UnsupportedFakeTensorException,
    )
    try:
        return _count(backbone, method, spec, sample, bf16, network_only=False)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as err:
        if not (isinstance(err, needs_data) or "no data" in str(err) or "meta" in str(err)):
            raise
    return _count(backbone, method, spec, sample, bf16, network_only=True)


def windows(backbone: Component, spec: DataSpec, at_once: int, *, bf16: bool) -> Windows:
    """Count the network on ``at_once`` windows as large as its crops."""
    live, flops = _Live(), FlopCounterMode(display=False)
    with torch.device("meta"):
        net = networks.from_component(backbone, spec.in_channels, max(spec.num_classes, 2)).eval()
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        net.to_empty(device="cpu")
        with torch.no_grad(), live, flops, torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            net(torch.empty((at_once, spec.in_channels, *spec.size_vox)))
    return Windows(live.peak_bytes, flops.get_total_flops() / at_once)


def _count(
    backbone: Component, method: Component, spec: DataSpec, sample: Arrays, bf16: bool, network_only: bool
) -> MicroBatch:
    live, flops, batch_size = _Live(), FlopCounterMode(display=False), spec.batch_size or 1
    with torch.device("meta"):
        module: Any = training.build_method(backbone, method, spec).train()
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        module.to_empty(device="cpu")
        tensors = {k: torch.from_numpy(np.array(v)) for k, v in sample.items()}
        batch = {k: torch.empty((batch_size, *t.shape), dtype=t.dtype) for k, t in tensors.items()}
        with live, flops, torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            if network_only:
                largest = max((t for t in batch.values() if t.ndim == 5), key=lambda t: t.numel())
                x_BCXYZ = torch.empty(largest.shape)
                features_BFXYZ = module.backbone.decode_features(x_BCXYZ, module.backbone.encode(x_BCXYZ))
                loss = features_BFXYZ.float().mean()
            else:
                loss, _ = module(batch, 0.0)
            forward_bytes = live.live_bytes
            loss.backward()
    how = "counted on shapes" + (", bfloat16 as in autocast for CPUs" if bf16 else "")
    return MicroBatch(
        forward_bytes=forward_bytes,
        peak_bytes=live.peak_bytes,
        batch_bytes=sum(t.numel() * t.element_size() for t in batch.values()),
        flop=float(flops.get_total_flops()),
        known_from=f"{how}, the network without its method" if network_only else how,
    )


class _Live(TorchDispatchMode):
    """Counts the bytes of live storages."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes, self.peak_bytes = 0, 0
        self._known: dict[int, weakref.finalize[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        writes = (aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
        if func is aten.index.Tensor:
            args = _without_masks(*args)
        elif func in writes and any(map(_is_fake_mask, args[1])):
            # The result's shape does not depend on which elements are written.
            return self._note(torch.empty_like(args[0]) if func is aten.index_put.default else args[0])
        return self._note(func(*args, **(kwargs or {})))

    def _note(self, out: Any) -> Any:
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._known:
                    self._known[key] = weakref.finalize(storage, self._freed, key, size)
                    self.live_bytes += size
                    self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return out

    def _freed(self, key: int, size: int) -> None:
        del self._known[key]
        self.live_bytes -= size


def _is_fake_mask(index: Any) -> bool:
    return isinstance(index, fake_tensor.FakeTensor) and index.dtype == torch.bool


def _without_masks(source: Tensor, indices: Any) -> tuple[Tensor, list[Any]]:
    """Arguments of an indexing with every mask all True, which is the largest result there can be."""
    out = []
    for axis, index in enumerate(indices):
        if _is_fake_mask(index):
            source = source.flatten(axis, axis + index.ndim - 1)
            index = torch.empty(index.numel(), dtype=torch.long, device=index.device)
        out.append(index)
    return source, out


# -------------------------------------------------------------------------------------------- a worker


@dataclass(frozen=True)
class WorkerMemory:
    """Peak memory of one training worker in bytes. With a GPU, ``process`` and ``checkpoint`` are on its host."""

    process: float
    weights: float
    gradients: float
    moments: float
    activations: float
    batches: float
    checkpoint: float
    known_from: str

    @property
    def device_bytes(self) -> float:
        """Memory where the network is."""
        return self.weights + self.gradients + self.moments + self.activations + self.batches
