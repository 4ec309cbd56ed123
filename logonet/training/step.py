"""One optimizer step, and the sums of metrics over steps and ranks.

Shapes: B batch, P samples, F features.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from logonet import networks
from logonet.core.errors import UserError
from logonet.methods._parts import effective_rank
from logonet.training.config import Config

MAX_EMBEDDINGS = 2048  # samples that the effective rank of an epoch is computed on


class Diverged(UserError):
    """Training cannot go on; every rank raises it at the same step."""


class OutOfMemory(UserError):
    """The GPU has not enough memory for the run; a single rank may raise it."""


@contextlib.contextmanager
def memory_watched() -> Iterator[None]:
    """Where CUDA runs out of memory in this block, say so in a sentence."""
    try:
        yield
    except torch.OutOfMemoryError as err:
        raise OutOfMemory(
            f"{str(err).split('. ')[0]}; lower train.batch_size (train.global_batch may stay), set "
            "backbone.checkpointing=true or lower method.head_chunk_mib, where there are such keys, or use a GPU with "
            "more memory: a changed config starts a new run"
        ) from err


def step(
    method: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Iterator[dict[str, torch.Tensor]],
    *,
    count: int,
    progress: float,
    cfg: Config,
    seeds: Sequence[int],
    autocast: contextlib.AbstractContextManager[Any],
    sync: Callable[[list[nn.Parameter]], None],
    mean_count: float | None = None,
) -> dict[str, torch.Tensor]:
    """One optimizer step over ``count`` micro-batches, at the optimizer's learning rates; returns the method's metrics,
    summed.

    Args:
        seeds: one per micro-batch, for whatever the network draws (dropout, drop path).
        sync: averages the gradients over the workers.
        mean_count: ``count`` on average over the workers, where they have unequally many: divided by it, the average
            of the workers' gradients is that of all micro-batches. None where all have ``count``.
    """
    mean_count = count if mean_count is None else mean_count
    totals: dict[str, torch.Tensor] = {}
    ddp = method if isinstance(method, nn.parallel.DistributedDataParallel) else None
    optimizer.zero_grad(set_to_none=True)
    for i in range(count):
        batch = next(micro_batches)
        last = i == count - 1
        torch.manual_seed(seeds[i])  # this process is ours: seeding per step is what makes resuming exact
        with contextlib.nullcontext() if last or ddp is None else ddp.no_sync():
            with autocast:
                loss, metrics = method(batch, progress)
            (loss / mean_count).backward()
        add_metrics(totals, metrics)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    sync(params)
    norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    if not torch.isfinite(norm):
        # After the average all ranks see the same norm, so all stop here together, before a weight is spoilt.
        lr = max(group["lr"] for group in optimizer.param_groups)
        raise Diverged(
            f"the gradient's norm became {norm.item()} (loss {loss.item():.4g}, learning rate {lr:.3g}); lower "
            "train.lr, set train.grad_clip=1.0 or train.precision=fp32: a changed config starts a new run"
        )
    if cfg.grad_clip is not None:
        torch.nn.utils.clip_grads_with_norm_(params, cfg.grad_clip, norm)
    optimizer.step()
    own: Any = method if ddp is None else ddp.module
    if hasattr(own, "after_step"):
        own.after_step(progress)
    return totals


def add_metrics(
    totals: dict[str, torch.Tensor], metrics: dict[str, torch.Tensor], most: int = MAX_EMBEDDINGS
) -> None:
    """Add (total, count) pairs in float64; embeddings are collected, up to ``most``. All stays on its device."""
    for name, value in metrics.items():
        if name == "embeddings_BF":
            known = [totals[name]] if name in totals else []
            totals[name] = torch.cat([*known, value.detach().float()])[:most]
        else:
            value = value.detach().double()
            totals[name] = totals[name] + value if name in totals else value


def average_gradients(params: list[nn.Parameter]) -> None:
    """Average all gradients over the ranks in one all-reduce with a fixed layout."""
    import torch.distributed as dist

    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    grads: list[Any] = [p.grad for p in params]
    flat = torch.cat([g.reshape(-1) for g in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    # Into the gradients, which lie in memory as their parameters do: a fused optimizer takes no others.
    for grad, part in zip(grads, flat.split([g.numel() for g in grads])):
        grad.copy_(part.view_as(grad))


def reduce_metrics(gathered: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """total / count over all ranks, and the effective rank of the embeddings."""
    values: dict[str, Any] = {}
    for name in gathered[0]:
        if name == "embeddings_BF":
            embeddings_PF = torch.cat([g[name] for g in gathered])[:MAX_EMBEDDINGS]
            values["effective_rank"] = effective_rank(embeddings_PF)
            continue
        total, count = torch.stack([g[name] for g in gathered]).sum(0)
        value = torch.where(count > 0, total / count.clamp(min=1e-300), torch.nan)
        values[name] = value.item() if value.ndim == 0 else value.tolist()
    return values


def autocast_of(cfg: Config, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return networks.autocast(cfg.precision, device)
