"""The memory and the arithmetic of one micro-batch, from its shapes alone: nothing is computed and nothing allocated.

The very module that would be trained runs forward and backward on tensors that have shapes and no numbers (torch's
fake tensors), once. Every storage that comes to life is counted until it is freed again, as autograd would hold and
free it, recomputed chunks and all; torch's counter adds up the multiplications on the way.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from logonet import methods, training
from logonet.methods import DataSpec

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass of a worker takes.

    Attributes:
        forward_bytes: alive when the forward pass is done: what the backward pass needs.
        peak_bytes: alive at the worst moment, gradients included; weights, moments and the batch are not.
        batch_bytes: of its input.
        flop: floating point operations, two a multiply-accumulate.
        known_from: how it is known.
    """

    forward_bytes: int
    peak_bytes: int
    batch_bytes: int
    flop: float
    known_from: str


def prepared(facts: DataSpec, method: Mapping[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One sample as the method's own ``prepare`` makes it, of a smooth random crop with random labels."""
    options = {k: v for k, v in method.items() if k != "name"}
    coarse_CXYZ = rng.random((facts.in_channels, *(-(-n // 8) for n in facts.size_vox)), dtype=np.float32)
    crop_CXYZ = coarse_CXYZ
    for axis in (1, 2, 3):
        crop_CXYZ = np.repeat(crop_CXYZ, 8, axis)
    x, y, z = facts.size_vox
    raw: dict[str, np.ndarray] = {"image_CXYZ": (crop_CXYZ[:, :x, :y, :z] * 65535).astype(np.uint16)}
    if facts.cluster_sizes:
        raw["labels_NZ"] = np.stack([rng.integers(0, k, z) for k in facts.cluster_sizes]).astype(np.int16)
    name = method["name"]
    return methods.prepare(name)(raw, methods.config(name, options), rng)


def micro_batch(
    backbone: Mapping[str, Any], method: Mapping[str, Any], facts: DataSpec, *, bf16: bool, sample: Arrays
) -> MicroBatch:
    """Count one pass over ``facts.batch_size`` samples like ``sample``.

    Where the method looks at numbers to decide on shapes, the network alone is counted: ``known_from`` says so.
    """
    assert facts.batch_size is not None
    with torch.device("meta"):
        module = training.build_method(dict(backbone), dict(method), facts).train()
    try:
        return _counted(module, facts.batch_size, sample, bf16, network_alone=False)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as err:
        if not _needs_numbers(err):
            raise
    with torch.device("meta"):  # anew, for a pass that broke off has left its traces
        module = training.build_method(dict(backbone), dict(method), facts).train()
    return _counted(module, facts.batch_size, sample, bf16, network_alone=True)


def _counted(module: Any, batch_size: int, sample: Arrays, bf16: bool, network_alone: bool) -> MicroBatch:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    live, flops = _Live(), FlopCounterMode(display=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _to_fake(module)
        batch = {
            k: torch.empty((batch_size, *v.shape), dtype=torch.from_numpy(np.array(v)).dtype)
            for k, v in sample.items()
        }
        with live, flops, torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            if network_alone:
                largest = max((t for t in batch.values() if t.ndim == 5), key=lambda t: t.numel())
                x_BCXYZ = torch.empty(largest.shape)
                features_BFXYZ = module.backbone.decode_features(x_BCXYZ, module.backbone.encode(x_BCXYZ))
                loss = features_BFXYZ.float().mean()
            else:
                loss, _ = module(batch, 0.0)
            forward = live.live_bytes
            loss.backward()
    how = "counted on shapes" + (", bfloat16 as autocast for CPUs has it" if bf16 else "")
    return MicroBatch(
        forward_bytes=forward,
        peak_bytes=live.peak_bytes,
        batch_bytes=sum(t.numel() * t.element_size() for t in batch.values()),
        flop=float(flops.get_total_flops()),
        known_from=f"{how}, of the network alone, without what the method adds" if network_alone else how,
    )


def _needs_numbers(err: BaseException) -> bool:
    """Whether a step on shapes stopped because it needs a value, not because it is wrong."""
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedFakeTensorException,
    )

    kinds = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)
    return isinstance(err, kinds) or "no data" in str(err) or "meta" in str(err)


def _to_fake(module: nn.Module) -> None:
    """Fake CPU tensors for the module's of the meta device, in place; what was shared stays shared."""
    made: dict[int, Any] = {}
    for part in module.modules():
        for own in (part._parameters, part._buffers):
            for name, tensor in own.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake: Any = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = (fake, tensor)
                own[name] = made[id(tensor)][0]  # type: ignore[index]


class _Live(TorchDispatchMode):
    """Counts the bytes of storages that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes, self.peak_bytes = 0, 0
        self._known: dict[int, weakref.finalize[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        writes = (aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
        if func is aten.index.Tensor:
            args = _without_masks(*args)
        elif func in writes and any(i is not None and i.dtype == torch.bool and _is_fake(i) for i in args[1]):
            # Which places are written changes no shape.
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


def _is_fake(tensor: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def _without_masks(source: Tensor, indices: Any) -> tuple[Tensor, list[Any]]:
    """Arguments of an indexing that has as many rows as if every mask were all True, which is the most there can be."""
    out = []
    for axis, index in enumerate(indices):
        if index is not None and index.dtype == torch.bool and _is_fake(index):
            source = source.flatten(axis, axis + index.ndim - 1)
            index = torch.empty(index.numel(), dtype=torch.long, device=index.device)
        out.append(index)
    return source, out


# -------------------------------------------------------------------------------------------- a worker


@dataclass(frozen=True)
class WorkerMemory:
    """Peak memory of one training worker, in bytes, by what holds it. On a GPU ``process`` is its host's."""

    process: float
    weights: float
    gradients: float
    moments: float
    activations: float
    batches: float
    sync: float
    checkpoint: float
    known_from: str

    @property
    def device_bytes(self) -> float:
        """What lies where the network does."""
        return self.weights + self.moments + self.gradients + self.activations + self.batches + self.sync

    @property
    def cpu_bytes(self) -> float:
        """Of a worker that trains on the CPU: all of it, on the rank that writes checkpoints."""
        return self.process + self.device_bytes + self.checkpoint


def worker(
    *,
    weights: float,
    gradients: float,
    state_bytes: float,
    largest_file: float,
    pass_: MicroBatch,
    accumulate: int,
    workers: int,
    flat_sync: bool,
    process: float,
    prefetched: float,
) -> WorkerMemory:
    """The parts of a worker's peak.

    A pass's own peak has its gradients in it; with more than one micro-batch those of the ones before stand beside
    the whole of the next. The flat all-reduce holds a copy of all gradients when the activations are gone, so it
    counts where it is the larger.

    Args:
        state_bytes: of a checkpoint, which is copied so that training goes on while it is written.
        largest_file: of its files: safetensors makes the bytes of the tensors and then those of the file.
    """
    during = pass_.peak_bytes - gradients if accumulate == 1 else pass_.peak_bytes
    during = max(during, 0.0)
    flat = gradients if flat_sync and workers > 1 else 0.0
    return WorkerMemory(
        process=process,
        weights=weights,
        gradients=gradients,
        moments=2 * gradients,
        activations=during,
        batches=pass_.batch_bytes + prefetched,
        sync=max(0.0, flat - during),
        checkpoint=state_bytes + 2 * largest_file,
        known_from=pass_.known_from,
    )
