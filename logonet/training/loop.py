"""The one loop: a step, a worker, a fit. Any method with any backbone, on 1 to N Ray Train workers.

A run is a sequence of optimizer steps. What step ``s`` does is a pure function of the run's config, the
data and the state after step ``s - 1``: samples, masks, learning rate and dropout seeds are all computed
from ``s``. So a checkpoint is the state after a step and nothing else, and a run that was killed equals
one that was not, bit for bit on CPU at the same number of workers; at another number, or where workers came and
went in between, to rounding.

Shapes: B batch, P samples of the run, F features.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from logonet import methods
from logonet.core import seeding
from logonet.core.errors import BadScan
from logonet.data import prepared_scans, volume
from logonet.distributed import data_tasks, preemption
from logonet.distributed.cluster import ResourceAllocation
from logonet.inference import sliding_window
from logonet.training import checkpoints, linear_probe, schedule, weight_transfer
from logonet.training.building import build_method, load_weights
from logonet.training.config import Init, Job, accumulation, micro_batches
from logonet.training.schedule import lr_at
from logonet.training.step import Diverged, add_metrics, autocast_of, average_gradients, reduce_metrics, step
from logonet.training.validation import best_step, case_dice, out_of_patience

log = logging.getLogger(__name__)

# What of an epoch's entry is about the machine, not about what was computed.
TIMINGS = ("unix_s", "samples_per_s", "data_wait_share", "peak_memory_mb")


class Left(Exception):
    """The ranks were asked to go: the state after ``step`` is stored; every rank raises it at the same step."""

    def __init__(self, step: int):
        super().__init__(step)
        self.step = step


# ---------------------------------------------------------------------------------------------- worker


class Worker:
    """One rank's state. Ray Train runs ``run`` on every worker."""

    def __init__(
        self, job: Job, feed: Any, share: ResourceAllocation, *, rank: int, world: int, device: torch.device
    ):
        self.job, self.cfg, self.feed, self.share = job, job.train, feed, share
        self.rank, self.world, self.device = rank, world, device
        self.order = data_tasks.opened(feed[0]).order
        accumulation(self.cfg, world)
        self.micro_batches = micro_batches(self.cfg)
        self.own = schedule.shard_micro_batches(self.micro_batches, rank, world)
        self.total_steps = self.cfg.epochs * self.order.steps_per_epoch
        # Every rank builds from the same seed, so all start alike without a broadcast.
        torch.manual_seed(seeding.integer(self.cfg.seed, "init"))
        self.method: Any = build_method(job.backbone, job.method, job.facts).to(device).train()
        self.params = [p for p in self.method.parameters() if p.requires_grad]
        self.names = [n for n, p in self.method.named_parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.params, lr=self.cfg.lr, betas=self.cfg.betas, weight_decay=self.cfg.weight_decay
        )
        self.writer = checkpoints.Writer(job.uri, job.fingerprint, keep=self.cfg.keep_checkpoints)
        self.probe = linear_probe.Probe(job.probe, device) if job.probe is not None and rank == 0 else None
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
        weight_transfer.transfer(
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
        heard: preemption.Notices | None = None,
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
                seeds=[seeding.integer(self.cfg.seed, "torch", self.step, place) for place in self.own],
                autocast=autocast_of(self.cfg, self.device),
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
                preemption.GO_ON
                if heard is None
                else self._due(heard, time.monotonic() - step_started, save_s)
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
            if heard is not None and due == preemption.LEAVE and not self._finished():
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

    def _due(self, heard: preemption.Notices, step_s: float, save_s: float) -> int:
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
        arrays = data_tasks.batches(
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
            "peak_memory_mb": peak_memory_mb(self.device),
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
        feed: Any = data_tasks.opened(self.feed[0])
        if not every or (epoch % every and epoch < self.cfg.epochs):
            return {}
        net, facts = self.method.backbone, self.job.facts
        dice: dict[int, list[float]] = {}
        broken = ""
        self._share_buffers()
        self.method.eval()
        for place in range(self.rank, len(feed.val), self.world):
            image_CXYZ, truth_XYZ = prepared_scans.read_case(feed.table.refs[feed.val[place]])
            try:
                with autocast_of(self.cfg, self.device):
                    found_XYZ = sliding_window.labels(
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


def peak_memory_mb(device: torch.device) -> float:
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
