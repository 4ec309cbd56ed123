"""What the ranks of a run tell each other. The loop knows this interface, and neither Ray nor process groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from logonet.training import checkpoints
from logonet.training.config import Config
from logonet.training.step import average_gradients

T = TypeVar("T")
Sync = Callable[[list[nn.Parameter]], None]


class Communicator:
    """A run of one process, which has nobody to talk to."""

    rank = 0
    world = 1

    def gather(self, own: T) -> list[T]:
        """Every rank's ``own``, in the order of the ranks."""
        return [own]

    def maximum(self, values: list[int]) -> list[int]:
        """The largest of all ranks' values, place by place."""
        return values

    def broadcast(self, value: T | None) -> T:
        """Rank 0's value, which is small, on every rank."""
        assert value is not None
        return value

    def broadcast_state(self, state: checkpoints.State | None) -> checkpoints.State | None:
        """Rank 0's state on every rank."""
        return state

    def broadcast_buffers(self, module: nn.Module) -> None:
        """Give every rank the buffers of rank 0 (running statistics), which are those that are saved."""

    def parallel(self, module: nn.Module, cfg: Config) -> tuple[nn.Module, Sync]:
        """The module to call, and how its gradients are averaged over the ranks after the backward pass."""
        return module, _nothing_to_do


class ProcessGroup(Communicator):
    """The ranks of torch's default process group, which must have been set up.

    Args:
        device: where this rank trains; collectives of NCCL want their tensors there.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def gather(self, own: T) -> list[T]:
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, own)
        return gathered

    def maximum(self, values: list[int]) -> list[int]:
        # Filled in there: to copy them would wait for all work that is queued, and once is enough.
        agreed = torch.stack([torch.full((), value, device=self.device) for value in values])
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        return agreed.tolist()

    def broadcast(self, value: T | None) -> T:
        # Pickle stays between the ranks of one job; nothing unpickled ever came from a store.
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, device=self.device if self.device.type == "cuda" else None)
        return box[0]

    def broadcast_state(self, state: checkpoints.State | None) -> checkpoints.State | None:
        head: Any = self.broadcast(None if state is None else state.mapped(lambda t: t.to("meta")))
        if head is None:
            return None
        state = state or head.mapped(lambda t: torch.empty_like(t, device="cpu"))
        assert state is not None
        for tensor in state.tensors():
            moved = tensor.to(self.device)
            dist.broadcast(moved, src=0)
            tensor.copy_(moved)
        return state

    def broadcast_buffers(self, module: nn.Module) -> None:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)

    def parallel(self, module: nn.Module, cfg: Config) -> tuple[nn.Module, Sync]:
        cuda = self.device.type == "cuda"
        if cfg.gradient_sync == "ddp" or (cfg.gradient_sync == "auto" and cuda):
            devices = [self.device] if cuda else None
            wrapped = nn.parallel.DistributedDataParallel(
                module, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )
            if cfg.gradient_compression == "bf16":
                # By another name: DDP refuses torch's own where there is no NCCL, though gloo can do it too.
                hook: Any = default_hooks.bf16_compress_hook
                wrapped.register_comm_hook(None, lambda group, bucket: hook(group, bucket))
            return wrapped, _nothing_to_do
        # DDP rebuilds its buckets after the first step, and gloo's ring adds in an order that depends on the place in
        # the bucket: with 3 or more workers a resumed run would differ in the last bit. One flat all-reduce has one
        # layout, and on CPU there is nothing for DDP to overlap with.
        return module, average_gradients


def _nothing_to_do(params: list[nn.Parameter]) -> None:
    """Gradients are averaged already, or there is nobody to average with."""
