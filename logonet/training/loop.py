"""The training loop: any method on any network, over any source of batches.

A run is a sequence of optimizer steps. What step ``s`` does is a pure function of the run's config, the data and the
state after step ``s - 1``: samples, masks, learning rate and dropout seeds are all computed from ``s``. So a checkpoint
is the state after a step and nothing else, and a run that was killed equals one that was not, bit for bit on CPU at the
same number of workers and threads; at another number, or where workers came and went in between, to rounding.

The loop needs three things from outside: batches, in the order of the schedule; the schedule; and a communicator, which
connects the ranks of a run. `logonet.distributed.trainer` gets them from Ray,
`logonet.training.local` from this process.

Shapes: B batch, P samples of the run, F features, V validation scans, K classes.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from logonet import methods
from logonet.core import seeding
from logonet.core.errors import BadScan
from logonet.data import prepared_scans, volume
from logonet.inference import sliding_window
from logonet.networks import Network
from logonet.training import checkpoints, encoder_use, linear_probe, optimizers
from logonet.training.building import build_method, load_initial
from logonet.training.communicator import Communicator
from logonet.training.config import Job, accumulation, micro_batches
from logonet.training.progress import TELL_S, WATCH_S, Meter, Pace, Reading
from logonet.training.schedule import SampleSchedule, lr_at, shard_micro_batches
from logonet.training.step import MAX_EMBEDDINGS, Diverged, add_metrics, autocast_of, reduce_metrics, step
from logonet.training.validation import best_step, case_dice, out_of_patience

# History keys that depend on the machine; ignored when runs are compared.
TIMINGS = ("unix_s", "samples_per_s", "data_wait_share", "peak_memory_mb")
# What a log shows of an epoch, where its entry has the key.
SHOWN = {
    "epoch": "epoch {epoch}/{epochs}",
    "loss": "loss {loss:.4f}",
    "accuracy": "masked accuracy {accuracy:.3f} (floor {accuracy_floor:.3f})",
    "batch_accuracy": "without encoder {batch_accuracy_without_encoder:.3f} of {batch_accuracy:.3f}",
    "train_dice": "Dice {train_dice:.3f}",
    "val_dice": "validation Dice {val_dice:.4f}",
    "probe_dice": "probe Dice {probe_dice:.3f} (untrained {probe_dice_floor:.3f})",
    "effective_rank": "effective rank {effective_rank:.1f}",
    "lr": "lr {lr:.2e}",
    "samples_per_s": "{samples_per_s:.2f} {unit}/s, {data_wait_share:.0%} waiting for data",
    "peak_memory_mb": "peak {peak_memory_mb:,.0f} MB",
}
AVERAGE = "average/"  # before the names of averaged weights in a checkpoint; no module's name has a slash
# What is due at a step's end: nothing, a checkpoint behind training's back, one that is waited for, or one and the end.
GO_ON, CHECKPOINT, SAVE, LEAVE = range(4)


class Left(Exception):
    """The ranks were asked to leave: the state after ``step`` is stored; every rank raises it at the same step."""

    def __init__(self, step: int):
        super().__init__(step)
        self.step = step


class Interruptions(Protocol):
    """How a run learns that it should save or leave, such as `logonet.distributed.preemption.Notices`."""

    def due(self, step_s: float, save_s: float) -> tuple[int, bool]:
        """What this rank thinks is due at the end of a step, and whether all ranks should call `ask` now."""

    def ask(self) -> None:
        """Look for news; all ranks call it together."""

    def left(self) -> None:
        """The ranks have saved and leave."""


class Loop:
    """One rank of a run: create it, `restore` it, then `run` it on the batches from ``step`` on.

    Args:
        schedule: which samples each step takes.
        validation: labelled scans to measure Dice on, when ``job.train.validate_every_epochs`` says so.
    """

    def __init__(
        self,
        job: Job,
        schedule: SampleSchedule,
        communicator: Communicator | None = None,
        device: torch.device | str = "cpu",
        validation: Sequence[prepared_scans.Ref] = (),
    ):
        self.job, self.cfg, self.schedule, self.validation = job, job.train, schedule, validation
        self.communicator = communicator or Communicator()
        self.rank, self.world = self.communicator.rank, self.communicator.world
        self.device = torch.device(device)
        accumulation(self.cfg, self.world)
        self.micro_batches = micro_batches(self.cfg)
        self.own = shard_micro_batches(self.micro_batches, self.rank, self.world)
        self.total_steps = self.cfg.epochs * schedule.steps_per_epoch
        # Every rank builds from the same seed, so all start alike without a broadcast.
        torch.manual_seed(seeding.integer(self.cfg.seed, "init"))
        self.method: Any = build_method(job.backbone, job.method, job.data_spec).to(self.device).train()
        if self.device.type == "cuda":
            for part in self.method.modules():  # the network, and a teacher that is one
                if isinstance(part, Network) and part.channels_last:
                    part.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # of 5D alone
        self.params = {name: p for name, p in self.method.named_parameters() if p.requires_grad}
        self.fused = self.device.type == "cuda"
        backbone = self.method.backbone
        sizes = methods.sizes(job.method.name, self.method.cfg, job.data_spec.size_vox)
        size_vox = sizes[0] if sizes else job.data_spec.size_vox
        self.optimizer = optimizers.build(self.params, backbone, size_vox, self.cfg, self.fused)
        self.average = optimizers.Average(backbone, self.cfg.ema) if self.cfg.ema else None
        self.writer = checkpoints.Writer(job.uri, job.fingerprint, keep=self.cfg.keep_checkpoints)
        self.probe = (
            linear_probe.Probe(job.probe, self.device) if job.probe is not None and self.rank == 0 else None
        )
        self.probe_floor = math.nan
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.partial: dict[str, Tensor] = {}
        self.first_batch: dict[str, Tensor] | None = None  # this rank's in the step that runs
        self.timing = {"wall_s": 0.0, "wait_s": 0.0, "samples": 0}

    @property
    def network(self) -> Any:
        """The network that is validated and kept: the average of the weights where there is one, else the method's."""
        return self.method.exported if self.average is None else self.average.network

    # -- state

    def state(self) -> checkpoints.State:
        """The state after ``self.step`` steps; every rank must call it (metric sums are gathered)."""
        moments = {
            f"{key}/{name}": value
            for name, p in self.params.items()
            for key, value in self.optimizer.state[p].items()
        }
        model = dict(self.method.state_dict())
        if self.average is not None:
            model |= {f"{AVERAGE}{name}": value for name, value in self.average.state_dict().items()}
        return checkpoints.State(self.step, model, moments, self._sums(), self.history, self.world)

    def _sums(self) -> list[dict[str, Tensor]]:
        """Every rank's sums of the epoch so far."""
        return self.communicator.gather({name: value.cpu() for name, value in self.partial.items()})

    def restore(self) -> None:
        """Continue from the newest sound checkpoint, or start from the job's initial weights.

        Rank 0 reads the checkpoint and the others receive it. The probe measures the random initial weights first, so
        that a resumed run has the same number.
        """
        if self.probe is not None:
            self.probe_floor = self.probe.measure(self.method.backbone)["probe_dice"]
        found = checkpoints.newest(self.job.uri, self.job.fingerprint) if self.rank == 0 else None
        state = self.communicator.broadcast_state(found)
        if state is None:
            if self.job.init is not None:  # every rank reads them itself
                load_initial(self.method.backbone, self.job.init)
            return
        model = {name: value for name, value in state.model.items() if not name.startswith(AVERAGE)}
        self.method.load_state_dict(model, strict=True)
        if self.average is not None:
            of_average = {n.removeprefix(AVERAGE): v for n, v in state.model.items() if n not in model}
            self.average.load_state_dict(of_average)
        for key, value in state.optimizer.items():
            moment, name = key.split("/", 1)
            p = self.params[name]
            # AdamW keeps moments in the parameter's own memory layout, and its step counter, unless fused, on the CPU.
            counter = torch.empty_like(value, device=self.device if self.fused else "cpu")
            own = counter if moment == "step" else torch.empty_like(p)
            self.optimizer.state[p][moment] = own.copy_(value)
        self.step, self.history = state.step, list(state.history)
        self.partial = {}
        if state.world == self.world:
            self.partial = dict(state.partial[self.rank])
        elif self.rank == 0:  # on another number of workers it takes the interrupted epoch's sums of all
            for part in state.partial:
                add_metrics(self.partial, part)
        self.partial = {name: value.to(self.device) for name, value in self.partial.items()}
        if self.rank == 0:
            lr = lr_at(min(self.step, self.total_steps - 1), self.cfg, self.schedule.steps_per_epoch)
            print(
                f"resumed after step {self.step:,} of {self.total_steps:,} "
                f"(epoch {self.step // self.schedule.steps_per_epoch + 1}), lr {lr:.3g}, "
                f"{len(state.model) + len(state.optimizer):,} tensors, {self.world} workers",
                flush=True,
            )

    # -- the loop

    def run(
        self,
        batches: Iterable[dict[str, Tensor]],
        report: Callable[[dict[str, Any]], None] = lambda metrics: None,
        tracker: Any = None,
        interruptions: Interruptions | None = None,
        bar: Any = None,
        watch: Callable[[Reading], None] = lambda reading: None,
    ) -> list[dict[str, Any]]:
        """Train to the end; returns the history (one mapping per epoch).

        Rank 0 prints a line for each epoch, and within one every minute.

        Args:
            batches: this rank's micro-batches from step ``self.step`` on, on ``device``.
            report: called with the scalars of each epoch.
            tracker: a `logonet.tracking.Tracker`, or what else has its ``sync``.
            bar: of progress, as tqdm's.
            watch: called on every rank with a reading every few seconds, and at each epoch's end.

        Raises:
            Diverged: a gradient or a validation's logits are not finite.
            Left: ``interruptions`` says that it is time to leave; the state after the last step is stored.
        """
        if tracker is not None and self.history:
            tracker.sync(self.history)
        if self.finished():
            return self.history
        if self.cfg.compile:
            self.method.backbone.compile_parts()
        module, sync = self.communicator.parallel(self.method, self.cfg)
        steps_per_epoch = self.schedule.steps_per_epoch
        timed = self._timed(iter(batches))
        bar = bar or tqdm(disable=True)
        started = saved = time.monotonic()
        save_s = 0.0
        pace = Pace(self)
        meters = tell, monitor = Meter(self, pace, TELL_S), Meter(self, pace, WATCH_S)
        while not self.finished():
            step_started = time.monotonic()
            optimizers.set_rates(self.optimizer, self.step, self.cfg, steps_per_epoch)

            self.first_batch = None
            totals = step(
                module,
                self.optimizer,
                timed,
                count=len(self.own),
                mean_count=self.micro_batches / self.world,
                progress=self.step / self.total_steps,
                cfg=self.cfg,
                # By position in the step, not by rank: another number of workers draws the same.
                seeds=[seeding.integer(self.cfg.seed, "torch", self.step, place) for place in self.own],
                autocast=autocast_of(self.cfg, self.device),
                sync=sync,
            )
            # All ranks' embeddings meet on each of them once an epoch.
            add_metrics(self.partial, totals, -(-MAX_EMBEDDINGS // self.world))
            self.step += 1
            if self.average is not None:
                self.average.update(self.method.backbone, self.step)
            self.timing["samples"] += self.cfg.global_batch
            bar.update(1)
            epoch_done = self.step % steps_per_epoch == 0
            every, every_s = self.cfg.checkpoint_every_steps, self.cfg.checkpoint_every_s
            save = every is not None and self.step % every == 0
            if epoch_done:
                self.timing["wall_s"] = time.monotonic() - started
                self._end_epoch()
                last = self.history[-1]
                rates = last["samples_per_s"], last["data_wait_share"]
                watch(Reading(self.step, last["loss"], *rates, pace.remaining_s()))
                started = time.monotonic()  # validating and probing are not training
                # Each best has its checkpoint, so that those that are kept never name more bests than are kept.
                save = save or not every_s or self.finished() or best_step(self.history) == self.step
                for meter in meters:
                    meter.restart()
            else:
                if (read := monitor.reading()) is not None:
                    watch(read)
                if self.rank == 0 and (read := tell.reading()) is not None:
                    print(read.line(self.total_steps, unit_of(self.partial)), flush=True)
            overdue = self.rank == 0 and 0 < every_s <= time.monotonic() - saved
            due = self._due(interruptions, time.monotonic() - step_started, save_s, overdue)
            if save or due:
                saved = time.monotonic()
                state = self.state()
                if self.rank == 0:
                    self.writer.save(state)
            if due >= SAVE:
                save_started = time.monotonic()
                self.writer.wait()
                save_s = time.monotonic() - save_started
            if epoch_done and tracker is not None:
                tracker.sync(self.history)
            if interruptions is not None and due == LEAVE and not self.finished():
                # Before the report, in which all ranks wait for a controller that may be waiting for us.
                bar.close()
                interruptions.left()
                raise Left(self.step)
            if epoch_done:
                report({k: v for k, v in self.history[-1].items() if not isinstance(v, list)})
        bar.close()
        self.writer.wait()
        return self.history

    def _timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches; ``timing`` adds up how long they are waited for."""
        while True:
            started = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.timing["wait_s"] += time.monotonic() - started
            self.first_batch = self.first_batch or batch
            yield batch

    def finished(self) -> bool:
        """Whether the last epoch is done, or patience is out at the end of one."""
        at_epochs_end = self.step % self.schedule.steps_per_epoch == 0
        return self.step >= self.total_steps or (at_epochs_end and out_of_patience(self.history, self.cfg))

    def _due(self, interruptions: Interruptions | None, step_s: float, save_s: float, overdue: bool) -> int:
        """The most urgent of what the ranks think is due, the same on every rank.

        Args:
            overdue: whether this rank wants a checkpoint because the last one is old.
        """
        own, own_ask = (GO_ON, False) if interruptions is None else interruptions.due(step_s, save_s)
        due, ask = self.communicator.maximum([max(own, CHECKPOINT if overdue else GO_ON), int(own_ask)])
        if interruptions is not None and ask:
            interruptions.ask()
        return due

    def _end_epoch(self) -> None:
        """Turn the epoch's sums, over all ranks, into one entry of the history."""
        epoch = self.step // self.schedule.steps_per_epoch
        entry: dict[str, Any] = {
            "epoch": epoch,
            "step": self.step,
            "unix_s": time.time(),
            "lr": lr_at(self.step - 1, self.cfg, self.schedule.steps_per_epoch),
            **reduce_metrics(self._sums()),
            **self._validate(epoch),
            **self._measure_probe(epoch),
            **self._measure_encoder_use(),
            "samples_per_s": self.timing["samples"] / max(self.timing["wall_s"], 1e-9),
            "data_wait_share": self.timing["wait_s"] / max(self.timing["wall_s"], 1e-9),
            "peak_memory_mb": peak_memory_mb(self.device),
        }
        self.history.append(entry)
        if self.rank == 0 and best_step(self.history) == self.step:
            # Before the checkpoint that says so, so that a resumed run never looks for a file that is not there.
            checkpoints.save_best(self.job.uri, self.step, self.network, self.cfg.keep_checkpoints)
        self.partial = {}
        self.timing = {"wall_s": 0.0, "wait_s": 0.0, "samples": 0}
        if self.rank == 0:
            print(epoch_line(entry, self.cfg.epochs), flush=True)
            samples = self.schedule.steps_per_epoch * self.cfg.global_batch
            for advice in (methods.warning(self.job.method.name, entry, samples), encoder_use.warning(entry)):
                if advice is not None:
                    print(f"warning: {advice}", flush=True)

    def _validate(self, epoch: int) -> dict[str, Any]:
        """Dice on the validation scans, which the ranks share out; {} when none is due."""
        every = self.cfg.validate_every_epochs
        if not every or (epoch % every and epoch < self.cfg.epochs):
            return {}
        net, data_spec = self.network, self.job.data_spec
        dice: dict[int, list[float]] = {}
        broken = ""
        self.communicator.broadcast_buffers(net)
        for part in (self.method, net):
            part.eval()
        for position in range(self.rank, len(self.validation), self.world):
            image_CXYZ, truth_XYZ = prepared_scans.read_case(self.validation[position])
            unit_CXYZ = volume.from_uint16(image_CXYZ)
            try:
                found_XYZ = sliding_window.labels(
                    net,
                    unit_CXYZ,
                    data_spec.size_vox,
                    replace(self.job.validation, precision=self.cfg.precision),
                    self.device,
                    regions=bool(data_spec.regions),
                )
            except BadScan as err:  # its logits are not finite
                broken = f"validation failed ({err}); lower train.lr or set train.grad_clip=1.0"
                break
            dice[position] = case_dice(found_XYZ, truth_XYZ, data_spec.num_classes, data_spec.regions)
        net.train()
        self.method.train()  # last: where the network is the method's, its encoder may have to stay as in evaluation
        for part, sentence in self.communicator.gather((dice, broken)):
            dice.update(part)
            broken = broken or sentence
        if broken:  # on every rank alike: one that stopped alone would leave the others waiting
            raise Diverged(broken)
        # In the scans' order, so that the mean's last bit does not depend on the number of ranks.
        dice_VK = torch.tensor([dice[i] for i in range(len(self.validation))], dtype=torch.float64)
        per_class = torch.nanmean(dice_VK, 0)
        return {"val_dice": torch.nanmean(per_class).item(), "val_dice_per_class": per_class.tolist()}

    def _measure_probe(self, epoch: int) -> dict[str, Any]:
        """Probe Dice, which rank 0 measures and every rank is told; {} when none is due."""
        task = self.job.probe
        if task is None or (epoch % task.cfg.every_epochs and epoch < self.cfg.epochs):
            return {}
        values: dict[str, Any] = {}
        if self.probe is not None:
            values = {**self.probe.measure(self.network), "probe_dice_floor": self.probe_floor}
        return self.communicator.gather(values)[0]

    def _measure_encoder_use(self) -> dict[str, Any]:
        """What `encoder_use` says of the step's first batch, which rank 0 has at every number of workers."""
        score = methods.bypass_score(self.job.method.name)
        if score is None:
            return {}
        values: dict[str, Any] = {}
        if self.rank == 0 and self.first_batch is not None:
            progress, autocast = (self.step - 1) / self.total_steps, autocast_of(self.cfg, self.device)
            # Passes without gradients would be compiled anew, which takes longer than they do.
            eager = torch.compiler.set_stance("force_eager") if self.cfg.compile else nullcontext()
            with eager:
                values = encoder_use.measure(self.method, score, self.first_batch, progress, autocast)
        return self.communicator.gather(values)[0]


def peak_memory_mb(device: torch.device) -> float:
    """The most memory this process has held so far: of the GPU where it trains on one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    scale = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def unit_of(metrics: Mapping[str, Any]) -> str:
    """What a run with these metrics counts as its samples."""
    return "cases" if "train_dice" in metrics else "crops"


def epoch_line(entry: dict[str, Any], epochs: int) -> str:
    """What a log shows of one epoch."""
    values = {"accuracy_floor": math.nan, **entry, "epochs": epochs, "unit": unit_of(entry)}
    return "  ".join(text.format_map(values) for key, text in SHOWN.items() if key in entry)
