"""The one loop: a step, a worker, a fit. Any method with any backbone, on 1 to N Ray Train workers.

A run is a sequence of optimizer steps. What step ``s`` does is a pure function of the run's config, the
data and the state after step ``s - 1``: samples, masks, learning rate and dropout seeds are all computed
from ``s``. So a checkpoint is the state after a step and nothing else, and a run that was killed equals
one that was not, bit for bit on CPU at the same number of workers; at another number, or where workers came and
went in between, to rounding.

Shapes: B batch, P samples of the run, F features.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from logonet import (
    backbones,
    cases,
    checkpoints,
    data,
    draws,
    infer,
    methods,
    notices,
    probe,
    store,
    transfer,
    volume,
)
from logonet.cluster import Resources, Share, on_loopback, quiet
from logonet.config import unknown
from logonet.errors import BadScan, Stopped, UserError
from logonet.methods import Facts
from logonet.methods._parts import effective_rank

log = logging.getLogger(__name__)

# What of an epoch's entry is about the machine, not about what was computed.
TIMINGS = ("unix_s", "samples_per_s", "data_wait_share", "peak_memory_mb")
PLACE = "placement_group"  # what a watched run reports first, see `fit`
MAX_EMBEDDINGS = 2048  # samples that the effective rank of an epoch is computed on


class Diverged(UserError):
    """Training cannot go on; every rank raises it at the same step."""


class LeaderLost(UserError):
    """The process that leads the workers died, which is no fault of the run's: started again it goes on."""


class Left(Exception):
    """The ranks were asked to go: the state after ``step`` is stored; every rank raises it at the same step."""

    def __init__(self, step: int):
        super().__init__(step)
        self.step = step


@dataclass(frozen=True)
class Config:
    """Training settings; the defaults are the paper's Table 2.

    Attributes:
        epochs: passes over all samples, or as many times ``steps_per_epoch``.
        steps_per_epoch: what counts as an epoch, in optimizer steps; None is one pass over all samples.
        global_batch: samples of one optimizer step, over all workers (the paper: 16 GPUs x 1).
        batch_size: samples a worker puts through the network at once; what batch norm sees. The global_batch /
            batch_size of them that make a step are dealt to the workers, which accumulate gradients over theirs.
        lr: peak learning rate; linear warm-up over ``warmup_epochs``, then cosine to ``min_lr``.
        weight_decay, betas: of AdamW.
        grad_clip: largest gradient norm; None does not clip.
        precision: "bf16" (autocast), "fp32", or "auto": bf16 on CUDA, fp32 on CPU, so that a run that moves from
            one to the other changes its arithmetic. On CPU bf16 is for trying out: torch 2.13's gradient of a
            3x3x3 convolution is then garbage where a feature is exactly 2 voxels long along the first axis.
        compile: torch.compile the network.
        gradient_sync: "ddp", "flat" (one all-reduce of all gradients) or "auto": ddp on CUDA, flat on CPU.
        checkpoint_every_steps: also within an epoch; None: at the end of each.
        keep_checkpoints: newest ones kept.
        validate_every_epochs: measure Dice on the validation cases this often, and at the end; 0 never does.
        patience: stop after this many validations without a better one; None trains to the end.
        seed: of everything drawn.
    """

    epochs: int = 100
    steps_per_epoch: int | None = None
    global_batch: int = 16
    batch_size: int = 1
    lr: float = 1e-4
    min_lr: float = 0.0
    warmup_epochs: float = 10.0
    weight_decay: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    grad_clip: float | None = None
    precision: str = "auto"
    compile: bool = False
    gradient_sync: str = "auto"
    checkpoint_every_steps: int | None = None
    keep_checkpoints: int = 2
    validate_every_epochs: int = 0
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "global_batch", "batch_size", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("checkpoint_every_steps", "steps_per_epoch", "patience"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1, or null")
        if self.validate_every_epochs < 0 or (self.patience is not None and not self.validate_every_epochs):
            raise ValueError("validate_every_epochs must be at least 0, and above 0 for patience")
        if self.lr <= 0 or not 0 <= self.min_lr <= self.lr:
            raise ValueError(
                f"lr is {self.lr} and min_lr {self.min_lr}; they must be 0 <= min_lr <= lr and lr > 0"
            )
        if self.weight_decay < 0 or (self.grad_clip is not None and self.grad_clip <= 0):
            raise ValueError("weight_decay must be at least 0, and grad_clip above 0 or null")
        if self.precision not in (known := ("auto", "bf16", "fp32")):
            raise ValueError(unknown("precision", self.precision, known))
        if self.gradient_sync not in (known := ("auto", "ddp", "flat")):
            raise ValueError(unknown("gradient_sync", self.gradient_sync, known))
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise ValueError(
                f"warmup_epochs is {self.warmup_epochs}; it must lie in 0..epochs ({self.epochs})"
            )


@dataclass(frozen=True)
class Init:
    """Weights to start from: a safetensors file of a backbone, and how much of it must fit (see `transfer`)."""

    uri: str
    sha256: str
    parts: Literal["all", "encoder"] = "all"
    min_encoder_share: float = 0.95


@dataclass(frozen=True)
class Job:
    """Everything a worker needs, beside the feed. Plain data, so that it travels.

    With ``probe`` the entries of the epochs that it is due in say how good the encoder is: ``probe_dice``,
    ``probe_dice_per_class`` and ``probe_dice_floor``, that of the same network at its random initial weights.
    """

    uri: str
    fingerprint: str
    backbone: dict[str, Any]
    method: dict[str, Any]
    train: Config
    facts: Facts
    tracking: dict[str, Any] | None = None
    progress: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    init: Init | None = None
    validation: infer.Config = field(default_factory=infer.Config)
    probe: probe.Task | None = None


def lr_at(step: int, cfg: Config, steps_per_epoch: int) -> float:
    """Learning rate of optimizer step ``step``: linear warm-up to the peak, then cosine (paper Table 2)."""
    total, warmup = cfg.epochs * steps_per_epoch, round(cfg.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    share = (step - warmup) / max(1, total - warmup)
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * share))


def micro_batches(cfg: Config) -> int:
    """Forward passes of one optimizer step, over all workers. UserError when the global batch does not divide."""
    count, rest = divmod(cfg.global_batch, cfg.batch_size)
    if rest:
        near = [n * cfg.batch_size for n in (count, count + 1) if n]
        raise UserError(
            f"train.global_batch {cfg.global_batch} is no multiple of train.batch_size {cfg.batch_size}; use --set "
            f"train.global_batch={' or '.join(map(str, near))}"
        )
    return count


def accumulation(cfg: Config, workers: int) -> int:
    """Micro-batches that the busiest worker has in a step. UserError when one would have none."""
    count = micro_batches(cfg)
    if workers > count:
        raise UserError(
            f"train.global_batch {cfg.global_batch} is {count} batches of train.batch_size {cfg.batch_size}, and there "
            f"are {workers} workers; use --workers {count} or fewer, or --set "
            f"train.global_batch={workers * cfg.batch_size} or more"
        )
    return -(-count // workers)


def check_workers(cfg: Config, method: dict[str, Any], resources: Resources) -> None:
    """UserError when a number of workers in ``resources`` cannot share the steps of ``cfg``."""
    accumulation(cfg, resources.most)
    count, options = micro_batches(cfg), {k: v for k, v in method.items() if k != "name"}
    if not methods.gathers(method["name"], methods.config(method["name"], options)):
        return
    if resources.least < resources.most or count % resources.most:
        able = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        raise UserError(
            f"method '{method['name']}' with method.gather compares the crops of all workers, so each of them needs as "
            f"many batches as the others and their number must not change; use --workers with one of {able}, or "
            "--set method.gather=false"
        )


# ------------------------------------------------------------------------------------------------ step


def step(
    method: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Iterator[dict[str, torch.Tensor]],
    *,
    count: int,
    progress: float,
    lr: float,
    cfg: Config,
    seeds: Sequence[int],
    autocast: contextlib.AbstractContextManager[Any],
    sync: Callable[[list[nn.Parameter]], None],
    mean_count: float | None = None,
) -> dict[str, torch.Tensor]:
    """One optimizer step over ``count`` micro-batches; returns the method's metrics, summed.

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
        raise Diverged(
            f"the gradient's norm became {norm.item()} (loss {loss.item():.4g}, learning rate {lr:.3g}); lower "
            "train.lr, set train.grad_clip=1.0 or train.precision=fp32: a changed config starts a new run"
        )
    if cfg.grad_clip is not None:
        torch.nn.utils.clip_grads_with_norm_(params, cfg.grad_clip, norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    after = getattr(unwrap(method), "after_step", None)
    if after is not None:
        after(progress)
    return totals


def add_metrics(totals: dict[str, torch.Tensor], metrics: dict[str, torch.Tensor]) -> None:
    """Add (total, count) pairs in float64; embeddings are collected, up to MAX_EMBEDDINGS."""
    for name, value in metrics.items():
        if name == "embeddings_BF":
            value = value.detach().float().cpu()
            value = torch.cat([totals[name], value]) if name in totals else value
            totals[name] = value[:MAX_EMBEDDINGS]
        else:
            value = value.detach().double().cpu()
            totals[name] = totals[name] + value if name in totals else value


def unwrap(method: nn.Module) -> Any:
    """The method itself, without DDP's wrapper."""
    return getattr(method, "module", method)


# ---------------------------------------------------------------------------------------------- worker


class Worker:
    """One rank's state. Ray Train runs ``run`` on every worker."""

    def __init__(self, job: Job, feed: Any, share: Share, *, rank: int, world: int, device: torch.device):
        self.job, self.cfg, self.feed, self.share = job, job.train, feed, share
        self.rank, self.world, self.device = rank, world, device
        self.order = data.opened(feed[0]).order
        accumulation(self.cfg, world)
        self.micro_batches = micro_batches(self.cfg)
        self.own = data.dealt(self.micro_batches, rank, world)
        self.total_steps = self.cfg.epochs * self.order.steps_per_epoch
        # Every rank builds from the same seed, so all start alike without a broadcast.
        torch.manual_seed(draws.integer(self.cfg.seed, "init"))
        self.method: Any = build_method(job.backbone, job.method, job.facts).to(device).train()
        self.params = [p for p in self.method.parameters() if p.requires_grad]
        self.names = [n for n, p in self.method.named_parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.params, lr=self.cfg.lr, betas=self.cfg.betas, weight_decay=self.cfg.weight_decay
        )
        self.writer = checkpoints.Writer(job.uri, job.fingerprint, keep=self.cfg.keep_checkpoints)
        self.probe = probe.Probe(job.probe, device) if job.probe is not None and rank == 0 else None
        self.probe_floor = math.nan
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.partial: dict[str, torch.Tensor] = {}
        self.timing = {"wall_s": 0.0, "wait_s": 0.0, "samples": 0}

    # -- state

    def state(self) -> checkpoints.State:
        """The state after ``self.step`` steps; every rank must call it (metric sums are gathered)."""
        optimizer = {}
        for name, p in zip(self.names, self.params):
            for key, value in self.optimizer.state[p].items():
                optimizer[f"{key}/{name}"] = value
        return checkpoints.State(
            step=self.step,
            model=dict(self.method.state_dict()),
            optimizer=optimizer,
            partial=self._gather(self.partial),
            history=self.history,
            world=self.world,
        )

    def restore(self) -> None:
        """Go on from the newest sound checkpoint, if there is one. Rank 0 reads, the others receive."""
        found = checkpoints.newest(self.job.uri, self.job.fingerprint) if self.rank == 0 else None
        state = self._broadcast_state(found)
        if state is None:
            self._start_from(self.job.init)
            return
        self.method.load_state_dict(state.model, strict=True)
        params = dict(zip(self.names, self.params))
        for key, value in state.optimizer.items():
            moment, name = key.split("/", 1)
            # AdamW keeps its step counter on the CPU, and its moments in the parameter's own memory layout.
            own = value.clone() if moment == "step" else torch.empty_like(params[name])
            self.optimizer.state[params[name]][moment] = own.copy_(value)
        self.step, self.history = state.step, list(state.history)
        self.partial = _own_partial(state, self.rank, self.world)
        if self.rank == 0:
            tensors = len(state.model) + len(state.optimizer)
            lr = lr_at(min(self.step, self.total_steps - 1), self.cfg, self.order.steps_per_epoch)
            print(
                f"resumed after step {self.step:,} of {self.total_steps:,} "
                f"(epoch {self.step // self.order.steps_per_epoch + 1}), lr {lr:.3g}, {tensors:,} tensors, "
                f"{self.world} workers",
                flush=True,
            )

    def _start_from(self, init: Init | None) -> None:
        """Load initial weights into the backbone; every rank reads them itself."""
        if init is None:
            return
        weights = load_weights(init)
        transfer.transfer(
            self.method.backbone,
            weights,
            source=init.uri,
            parts=init.parts,
            min_encoder_share=init.min_encoder_share,
        )

    def _broadcast_state(self, state: checkpoints.State | None) -> checkpoints.State | None:
        if self.world == 1:
            return state
        import torch.distributed as dist

        # Pickle stays between ranks of one job; nothing unpickled ever came from a store.
        head: list[Any] = [None if state is None else state.describe()]
        dist.broadcast_object_list(head, src=0, device=self.device if self.device.type == "cuda" else None)
        if head[0] is None:
            return None
        state = state or checkpoints.State.blank(head[0])
        for tensor in state.tensors():
            moved = tensor.to(self.device)
            dist.broadcast(moved, src=0)
            tensor.copy_(moved)
        return state

    def _gather(self, own: Any) -> list[Any]:
        """Every rank's ``own``, in the order of the ranks."""
        if self.world == 1:
            return [own]
        import torch.distributed as dist

        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, own)
        return gathered

    # -- the loop

    def run(
        self,
        report: Callable[[dict[str, Any]], None],
        tracker: Any = None,
        heard: notices.Notices | None = None,
    ) -> list[dict[str, Any]]:
        """Train from the newest checkpoint to the end; returns the history (one mapping per epoch).

        Raises:
            Left: ``heard`` says that it is time to go; the state after the last step is stored.
        """
        if self.probe is not None:  # before anything is restored, so that a resumed run has the same number
            self.probe_floor = self.probe.measure(self.method.backbone)["probe_dice"]
        self.restore()
        if tracker is not None and self.history:
            tracker.sync(self.history)
        if self._finished():
            return self.history
        wrapped, sync = self._parallel()
        steps_per_epoch = self.order.steps_per_epoch
        batches = _Timed(self._batches())
        bar = _progress_bar(self.job.progress and self.rank == 0, self.total_steps, self.step)
        started = time.monotonic()
        save_s = 0.0
        while not self._finished():
            step_started = time.monotonic()
            totals = step(
                wrapped,
                self.optimizer,
                batches,
                count=len(self.own),
                mean_count=self.micro_batches / self.world,
                progress=self.step / self.total_steps,
                lr=lr_at(self.step, self.cfg, steps_per_epoch),
                cfg=self.cfg,
                # By place in the step, not by rank: another number of workers draws the same.
                seeds=[draws.integer(self.cfg.seed, "torch", self.step, place) for place in self.own],
                autocast=_autocast(self.cfg, self.device),
                sync=sync,
            )
            add_metrics(self.partial, totals)
            self.step += 1
            self.timing["samples"] += self.cfg.global_batch
            bar.update(1)
            epoch_done = self.step % steps_per_epoch == 0
            every = self.cfg.checkpoint_every_steps
            if epoch_done:
                self.timing["wall_s"], started = time.monotonic() - started, time.monotonic()
                self.timing["wait_s"] = batches.reset()
                self._end_epoch()
                started = time.monotonic()  # validating and probing are not training
            due = (
                notices.GO_ON if heard is None else self._due(heard, time.monotonic() - step_started, save_s)
            )
            if due or epoch_done or (every is not None and self.step % every == 0):
                state = self.state()
                if self.rank == 0:
                    self.writer.save(state)
            if due:
                save_started = time.monotonic()
                self.writer.wait()
                save_s = time.monotonic() - save_started
            if epoch_done and tracker is not None:
                tracker.sync(self.history)
            if heard is not None and due == notices.LEAVE and not self._finished():
                # Before the report, in which all ranks wait for a controller that may be waiting for us.
                bar.close()
                heard.left()
                raise Left(self.step)
            if epoch_done:
                report(_scalars(self.history[-1]))
        bar.close()
        self.writer.wait()
        return self.history

    def _finished(self) -> bool:
        at_epochs_end = self.step % self.order.steps_per_epoch == 0
        return self.step >= self.total_steps or (at_epochs_end and out_of_patience(self.history, self.cfg))

    def _due(self, heard: notices.Notices, step_s: float, save_s: float) -> int:
        """The most urgent of what the ranks think is due, the same on every rank."""
        due, ask = heard.due(step_s, save_s)
        if self.world > 1:
            import torch.distributed as dist

            agreed = torch.tensor([due, int(ask)], device=self.device)
            dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
            due, ask = agreed.tolist()
        if ask:
            heard.ask()
        return due

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        arrays = data.batches(
            self.feed,
            start_step=self.step,
            stop_step=self.total_steps,
            rank=self.rank,
            world=self.world,
            batch_size=self.cfg.batch_size,
            share=self.share,
        )
        return to_tensors(arrays, self.device)

    def _parallel(self) -> tuple[nn.Module, Callable[[list[nn.Parameter]], None]]:
        """The module to call and how gradients are averaged."""
        module: nn.Module = self.method
        if self.cfg.compile:
            # The network alone: the number of masked slices differs from step to step, and would recompile the rest.
            net = self.method.backbone
            net.encode, net.decode_features = torch.compile(net.encode), torch.compile(net.decode_features)
        if self.world == 1:
            return module, lambda params: None
        mode = self.cfg.gradient_sync
        if mode == "ddp" or (mode == "auto" and self.device.type == "cuda"):
            from ray.train.torch import prepare_model

            kwargs = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
            wrapped = prepare_model(module, move_to_device=False, parallel_strategy_kwargs=kwargs)
            return wrapped, lambda params: None
        # DDP rebuilds its buckets after the first step, and gloo's ring adds in an order that depends on the
        # place in the bucket: with 3 or more workers a resumed run would differ in the last bit. One flat
        # all-reduce has one layout, and on CPU there is nothing for DDP to overlap with.
        return module, average_gradients

    def _end_epoch(self) -> None:
        """Turn the epoch's sums, over all ranks, into one entry of the history."""
        gathered = self._gather(self.partial)
        values = reduce_metrics(gathered)
        epoch = self.step // self.order.steps_per_epoch
        entry: dict[str, Any] = {
            "epoch": epoch,
            "step": self.step,
            "unix_s": time.time(),
            "lr": lr_at(self.step - 1, self.cfg, self.order.steps_per_epoch),
            **values,
            **self._validate(epoch),
            **self._measure_probe(epoch),
            "samples_per_s": self.timing["samples"] / max(self.timing["wall_s"], 1e-9),
            "data_wait_share": self.timing["wait_s"] / max(self.timing["wall_s"], 1e-9),
            "peak_memory_mb": _peak_memory_mb(self.device),
        }
        self.history.append(entry)
        if self.rank == 0 and best_step(self.history) == self.step:
            # Before the checkpoint that says so, so that a resumed run never looks for a file that is not there.
            checkpoints.save_best(self.job.uri, self.step, self.method.backbone, self.cfg.keep_checkpoints)
        self.partial = {}
        self.timing = {"wall_s": 0.0, "wait_s": 0.0, "samples": 0}
        if self.rank == 0:
            print(epoch_line(entry, self.cfg.epochs), flush=True)
            samples = self.order.steps_per_epoch * self.cfg.global_batch
            if (advice := methods.warning(self.job.method["name"], entry, samples)) is not None:
                print(f"warning: {advice}", flush=True)

    def _share_buffers(self) -> None:
        """Give every rank the running statistics of rank 0, which are those that are saved."""
        if self.world == 1:
            return
        import torch.distributed as dist

        for buffer in self.method.backbone.buffers():
            dist.broadcast(buffer, src=0)

    def _validate(self, epoch: int) -> dict[str, Any]:
        """Dice on the validation cases, each on the rank that its place gives it; {} when none is due."""
        every = self.cfg.validate_every_epochs
        feed: Any = data.opened(self.feed[0])
        if not every or (epoch % every and epoch < self.cfg.epochs):
            return {}
        net, facts = self.method.backbone, self.job.facts
        dice: dict[int, list[float]] = {}
        broken = ""
        self._share_buffers()
        self.method.eval()
        for place in range(self.rank, len(feed.val), self.world):
            image_CXYZ, truth_XYZ = cases.read_case(feed.table.refs[feed.val[place]])
            try:
                with _autocast(self.cfg, self.device):
                    found_XYZ = infer.labels(
                        net, volume.from_uint16(image_CXYZ), facts.size_vox, self.job.validation, self.device
                    )
            except BadScan as err:  # its logits are not finite
                broken = f"validation failed ({err}); lower train.lr or set train.grad_clip=1.0"
                break
            dice[place] = case_dice(found_XYZ, truth_XYZ, facts.num_classes)
        self.method.train()
        for part, sentence in self._gather((dice, broken)):
            dice.update(part)
            broken = broken or sentence
        if broken:  # on every rank alike: one that stopped alone would leave the others waiting
            raise Diverged(broken)
        # In the cases' order, so that the mean's last bit does not depend on the number of ranks.
        dice_VK = torch.tensor([dice[place] for place in range(len(feed.val))], dtype=torch.float64)
        per_class = torch.nanmean(dice_VK, 0)
        return {"val_dice": torch.nanmean(per_class).item(), "val_dice_per_class": per_class.tolist()}

    def _measure_probe(self, epoch: int) -> dict[str, Any]:
        """Probe Dice, which rank 0 measures and every rank is told; {} when none is due."""
        task = self.job.probe
        if task is None or (epoch % task.cfg.every_epochs and epoch < self.cfg.epochs):
            return {}
        values: dict[str, Any] = {}
        if self.probe is not None:
            values = {**self.probe.measure(self.method.backbone), "probe_dice_floor": self.probe_floor}
        return self._gather(values)[0]


def case_dice(found_XYZ: np.ndarray, truth_XYZ: np.ndarray, num_classes: int) -> list[float]:
    """Dice of each class but background; NaN where neither has it, so that it is left out of means."""
    both = np.bincount(truth_XYZ[found_XYZ == truth_XYZ].ravel(), minlength=num_classes)[1:]
    sizes = (np.bincount(a.ravel(), minlength=num_classes)[1:] for a in (found_XYZ, truth_XYZ))
    total = np.add(*sizes)
    return np.where(total > 0, 2 * both / np.maximum(total, 1), np.nan).tolist()


def best_step(history: Sequence[dict[str, Any]]) -> int | None:
    """The step of the first entry with the highest validation Dice; None when nothing was validated."""
    measured = [e for e in history if math.isfinite(e.get("val_dice", math.nan))]
    return max(measured, key=lambda e: (e["val_dice"], -e["step"]))["step"] if measured else None


def out_of_patience(history: Sequence[dict[str, Any]], cfg: Config) -> bool:
    """Whether the last ``cfg.patience`` validations brought nothing better."""
    best = best_step(history)
    if cfg.patience is None or best is None:
        return False
    return sum("val_dice" in e and e["step"] > best for e in history) >= cfg.patience


def load_weights(init: Init) -> dict[str, torch.Tensor]:
    """The tensors of ``init``'s file, which must be the very file that was meant."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(store.read(init.uri, sha256=init.sha256))
    except SafetensorError as err:
        raise UserError(f"{init.uri} is no safetensors file ({err}); give weights saved by logonet") from None


def dry_run(backbone: dict[str, Any], method: dict[str, Any], facts: Facts) -> None:
    """Build the pair and run the encoder on shapes alone: what cannot train says so before anything is read.

    Args:
        backbone: {"name": ..., **options}; ``method`` alike.
        facts: with the batch size.

    Raises:
        UserError: such as a crop that shrinks to one voxel, which batch norm cannot normalise at batch size 1, or a
            method that needs of the network what it does not have.
    """
    assert facts.batch_size is not None
    b_cfg = backbones.config(backbone["name"], {k: v for k, v in backbone.items() if k != "name"})
    m_cfg = methods.config(method["name"], {k: v for k, v in method.items() if k != "name"})
    text = json.dumps(backbone, sort_keys=True)
    if missing := methods.lacking(method["name"], _shapes_only(text, facts.in_channels)):
        able = [name for name in backbones.names() if not missing - backbones.abilities(name)]
        raise UserError(
            f"method '{method['name']}' needs {' and '.join(sorted(missing))} of its backbone, which "
            f"'{backbone['name']}' does not have; backbones that do: {', '.join(able) or 'none'}"
        )
    for size_vox in methods.sizes(method["name"], m_cfg, facts.size_vox):
        backbones.check_size(backbone["name"], b_cfg, size_vox)
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
        return backbones.build(options.pop("name"), in_channels=in_channels, num_classes=2, **options).train()


@functools.lru_cache(maxsize=256)
def _cannot_train(backbone: str, batch: int, in_channels: int, size_vox: tuple[int, int, int]) -> str | None:
    """Why not, or None. ``backbone`` as JSON."""
    try:
        with torch.device("meta"):
            _shapes_only(backbone, in_channels).encode(torch.empty(batch, in_channels, *size_vox))
    except (ValueError, RuntimeError) as err:
        return str(err)
    return None


def build_method(backbone: dict[str, Any], method: dict[str, Any], facts: Facts) -> nn.Module:
    """The method module of two ``{"name": ..., **options}`` mappings."""
    b, m = dict(backbone), dict(method)
    net = backbones.build(
        b.pop("name"), in_channels=facts.in_channels, num_classes=max(facts.num_classes, 2), **b
    )
    return methods.build(m.pop("name"), net, facts, **m)


def average_gradients(params: list[nn.Parameter]) -> None:
    """Average all gradients over the ranks in one all-reduce with a fixed layout."""
    import torch.distributed as dist

    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in params]
    flat = torch.cat([g.reshape(-1) for g in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    offset = 0
    for p, g in zip(params, grads):
        p.grad = flat[offset : offset + g.numel()].view_as(g)
        offset += g.numel()


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


def to_tensors(
    arrays: Iterator[dict[str, np.ndarray]], device: torch.device
) -> Iterator[dict[str, torch.Tensor]]:
    """NumPy batches as tensors on ``device``; pinned and copied asynchronously for CUDA."""
    for batch in arrays:
        # Ray's arrays are read-only views of shared memory: copied here, because torch has no read-only tensors.
        tensors = {k: torch.from_numpy(np.array(v)) for k, v in batch.items()}
        if device.type == "cuda":
            tensors = {k: v.pin_memory().to(device, non_blocking=True) for k, v in tensors.items()}
        yield tensors


class _Timed:
    """An iterator that adds up the time its consumer waits."""

    def __init__(self, inner: Iterator[Any]):
        self.inner, self.wait_s = inner, 0.0

    def __iter__(self) -> _Timed:
        return self

    def __next__(self) -> Any:
        started = time.monotonic()
        try:
            return next(self.inner)
        finally:
            self.wait_s += time.monotonic() - started

    def reset(self) -> float:
        wait_s, self.wait_s = self.wait_s, 0.0
        return wait_s


def _own_partial(state: checkpoints.State, rank: int, world: int) -> dict[str, torch.Tensor]:
    """A rank's own part of the interrupted epoch's sums; on another number of workers rank 0 takes all."""
    if state.world == world:
        return dict(state.partial[rank])
    merged: dict[str, torch.Tensor] = {}
    if rank == 0:
        for part in state.partial:
            add_metrics(merged, part)
    return merged


def _autocast(cfg: Config, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)


def _peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    scale = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def _scalars(entry: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in entry.items() if not isinstance(v, list)}


def epoch_line(entry: dict[str, Any], epochs: int) -> str:
    """What a log shows of one epoch."""
    parts = [f"epoch {entry['epoch']}/{epochs}", f"loss {entry['loss']:.4f}"]
    if "accuracy" in entry:
        parts.append(
            f"masked accuracy {entry['accuracy']:.3f} (floor {entry.get('accuracy_floor', math.nan):.3f})"
        )
    if "train_dice" in entry:
        parts.append(f"Dice {entry['train_dice']:.3f}")
    if "val_dice" in entry:
        parts.append(f"validation Dice {entry['val_dice']:.4f}")
    if "probe_dice" in entry:
        parts.append(f"probe Dice {entry['probe_dice']:.3f} (untrained {entry['probe_dice_floor']:.3f})")
    if "effective_rank" in entry:
        parts.append(f"effective rank {entry['effective_rank']:.1f}")
    parts.append(f"lr {entry['lr']:.2e}")
    unit = "cases" if "train_dice" in entry else "crops"
    parts.append(f"{entry['samples_per_s']:.2f} {unit}/s, {entry['data_wait_share']:.0%} waiting for data")
    parts.append(f"peak {entry['peak_memory_mb']:,.0f} MB")
    return "  ".join(parts)


def _progress_bar(wanted: bool, total: int, done: int) -> Any:
    """A bar with an ETA at the driver's terminal, drawn through Ray; silent otherwise."""
    if not wanted:
        return _NoBar()
    from ray.experimental.tqdm_ray import tqdm

    bar = tqdm(desc="training", total=total, unit="step")
    bar.update(done)
    return bar


class _NoBar:
    def update(self, n: int) -> None: ...

    def close(self) -> None: ...


# ------------------------------------------------------------------------------------------------- fit


def fit(
    job: Job,
    feed: data.Feed | data.LabelledFeed,
    resources: Resources,
    share: Share,
    callbacks: Sequence[Any] = (),
) -> dict[str, Any]:
    """Train ``job`` with Ray Train; returns {"history", "files"}. Run again, it resumes.

    Args:
        feed: what the data tasks prepare samples from.
        callbacks: Ray Train callbacks, such as Tune's TuneReportCallback. They get the id of the workers' placement
            group under PLACE first, then the scalars of each epoch.

    Raises:
        UserError: settings that cannot work.
        Diverged, LeaderLost, Stopped: as they say.
    """
    import ray
    import ray.exceptions
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from logonet.rendezvous import LocalTorchConfig

    check_workers(job.train, job.method, resources)
    if job.train.validate_every_epochs and not getattr(feed, "val", ()):
        raise UserError("there are no labelled cases to validate on; set train.validate_every_epochs=0")
    # References in lists: Ray would otherwise put the values themselves into every worker's arguments.
    config = {"job": job, "feed": [ray.put(feed)], "share": share, "watched": bool(callbacks)}
    elastic = resources.least < resources.most
    num_workers: Any = (resources.least, resources.most) if elastic else share.workers
    stop = threading.Event()
    while True:
        run = f"{job.fingerprint}-{time.time_ns():x}"

        def told(run: str = run) -> None:
            stop.set()
            notices.tell(run)

        watchers = list(callbacks)
        if elastic:
            watchers.append(notices.leave_before_resizing(run))
        trainer = TorchTrainer(
            train_worker,  # type: ignore[arg-type]  # it may return a value; Ray's annotation forgets that
            train_loop_config={**config, "run": run},
            torch_config=LocalTorchConfig() if on_loopback() else TorchConfig(),
            scaling_config=ScalingConfig(  # type: ignore[call-arg]  # Ray's stub is of its older ScalingConfig
                num_workers=num_workers,
                elastic_resize_monitor_interval_s=resources.resize_every_s,
                use_gpu=share.use_gpu,
                resources_per_worker={"CPU": share.cpus_per_worker, **({"GPU": 1} if share.use_gpu else {})},
            ),
            run_config=RunConfig(  # type: ignore[call-arg]  # and of its older RunConfig
                # Checkpoints are ours (verified on load, a torn one falls back); Ray's own records are only of this
                # attempt, so a run killed while Ray wrote them cannot hinder the next.
                name=run,
                storage_path=_scratch(),
                failure_config=FailureConfig(max_failures=resources.max_failures),
                callbacks=watchers,
                logging_config=LoggingConfig(log_level="WARNING"),
            ),
        )
        try:
            with notices.sigterm(told):
                result: Any = trainer.fit()  # Ray's stub lacks return_value, what rank 0 returned
        except ray.exceptions.RayActorError as err:  # a worker's death never comes here
            raise LeaderLost(
                "the process that leads the training died: it was killed, there was no memory left, or its machine "
                "went; the same command goes on from the newest checkpoint"
            ) from err
        notices.forget(run)
        assert result.return_value is not None
        if "diverged" in result.return_value:
            raise Diverged(result.return_value["diverged"])
        if "left" not in result.return_value:
            return result.return_value
        step = result.return_value["left"]
        if stop.is_set():
            raise Stopped(
                f"stopped after step {step:,}, which is stored; the same command goes on from there"
            )
        print(f"workers were asked to go: step {step:,} is stored, training goes on from there", flush=True)


def _scratch() -> str:
    import tempfile

    return f"{tempfile.gettempdir()}/logonet-ray-train"


def train_worker(config: dict[Any, Any]) -> dict[str, Any]:
    """What Ray Train runs on every worker."""
    import ray.train
    import ray.util
    from ray.train.torch import get_device

    quiet()
    # Ray reports every metric through the root logger, which it sets to INFO in its workers.
    logging.getLogger().setLevel(logging.WARNING)
    job: Job = config["job"]
    share: Share = config["share"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    if config["watched"]:
        # Whoever stops this run from outside has to free its place: Ray's own cleaner is not to be relied on.
        place: Any = ray.util.get_current_placement_group()
        ray.train.report({PLACE: place.id.hex()})
    torch.set_num_threads(share.threads_per_worker)
    tracker = _tracker(job) if rank == 0 else None
    device = get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # collectives of Python objects go through the current device
    worker = Worker(job, config["feed"], share, rank=rank, world=world, device=device)
    heard = notices.Notices(config["run"], rank, ray.train.get_preemption_info)
    try:
        with heard.listening():
            history = worker.run(ray.train.report, tracker, heard)
    except Left as err:
        return {"left": err.step}  # Ray would count an exception as a failure; `fit` starts the ranks again
    except Diverged as err:
        # A value and not an exception, which Ray would answer by starting all workers again.
        if tracker is not None:
            tracker.close("FAILED", timeout_s=15)
        return {"diverged": str(err)}
    if rank:
        return {}
    files = checkpoints.save_final(job.uri, worker.method, history, best_step(history))
    delivered = True
    if tracker is not None:
        delivered = tracker.close(timeout_s=15)  # the driver tries again, for longer
    return {"history": history, "files": {k: asdict(v) for k, v in files.items()}, "tracked": delivered}


def _tracker(job: Job) -> Any:
    if job.tracking is None:
        return None
    from logonet.registry import Tracker

    tracker = Tracker(**job.tracking)
    tracker.log_files(job.files)
    return tracker
