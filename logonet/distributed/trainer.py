"""Training on 1 to N Ray Train workers."""

from __future__ import annotations

import functools
import logging
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from logonet import methods
from logonet.core import sigterm
from logonet.core.config import Component
from logonet.core.errors import Stopped, UserError
from logonet.core.redaction import redact
from logonet.distributed import feed, gauges, preemption, ray_compat
from logonet.distributed.cluster import (
    ResourceAllocation,
    Resources,
    describe,
    held,
    on_loopback,
    quiet,
    worker_bundle,
)
from logonet.training.batches import to_tensors
from logonet.training.communicator import Communicator, ProcessGroup
from logonet.training.config import Config, Job, accumulation, micro_batches
from logonet.training.dataset import Dataset
from logonet.training.local import finish
from logonet.training.loop import Left, Loop
from logonet.training.schedule import MicroBatches
from logonet.training.step import Diverged, OutOfMemory, memory_watched


class LeaderLost(UserError):
    """The process that leads the workers died, which is no fault of the run's: started again it goes on."""


def check_workers(cfg: Config, method: Component, resources: Resources) -> None:
    """UserError when a number of workers in ``resources`` cannot share the steps of ``cfg``."""
    accumulation(cfg, resources.most)
    count, method = micro_batches(cfg), method.resolve(methods.config, "method")
    if not methods.gathers(method.name, method.config):
        return
    if resources.least < resources.most or count % resources.most:
        able = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        raise UserError(
            f"method '{method.name}' with method.gather compares the crops of all workers, so each of them needs as "
            f"many batches as the others and their number must not change; use --workers with one of {able}, or "
            "--set method.gather=false"
        )


def fit(
    job: Job,
    dataset: Dataset,
    resources: Resources,
    allocation: ResourceAllocation,
    callbacks: Sequence[Any] = (),
) -> dict[str, Any]:
    """Train ``job`` with Ray Train; returns {"history", "files", "tracked"}. Run again, it resumes.

    Args:
        dataset: what the data tasks prepare samples from.
        callbacks: Ray Train callbacks, such as Tune's TuneReportCallback. They get the scalars of each epoch.

    Raises:
        UserError: settings that cannot work.
        Diverged, LeaderLost, OutOfMemory, Stopped: as they say.
    """
    import ray
    import ray.exceptions
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    check_workers(job.train, job.method, resources)
    if job.train.validate_every_epochs and not dataset.validation:
        raise UserError("there are no labelled cases to validate on; set train.validate_every_epochs=0")
    # References in lists: Ray would otherwise put the values themselves into every worker's arguments, and keep them as
    # text. The dashboard's /api/train/v2/runs/v1 shows this mapping, hence the texts.
    config = {"job": [ray.put(job)], "dataset": [ray.put(dataset)], "allocation": allocation}
    config |= {"artifact": redact(job.uri), "network": job.backbone.name, "method": job.method.name}
    config["train"] = asdict(job.train)
    config["progress"] = sys.stdout.isatty()
    elastic = resources.least < resources.most
    num_workers: Any = (resources.least, resources.most) if elastic else allocation.workers
    per_worker = worker_bundle(allocation.cpus_per_worker, allocation.use_gpu)
    what = describe(resources.workers, allocation.cpus_per_worker, allocation.use_gpu)
    # Ray Train itself would wait for ever, and say nothing. It makes a group of its own: this one only finds the room.
    with held([per_worker] * resources.least, what, resources.wait_s):
        print(what, flush=True)
    stop = threading.Event()
    while True:
        run = f"{job.fingerprint}-{time.time_ns():x}"

        def told(run: str = run) -> None:
            stop.set()
            ray_compat.tell(run)

        watchers = [ray_compat.end_with("alone"), ray_compat.quiet_controller()]
        watchers += [ray_compat.leave_before_resizing(run)] if elastic else []
        trainer = TorchTrainer(
            train_worker,  # type: ignore[arg-type]  # it may return a value; Ray's annotation forgets that
            train_loop_config={**config, "run": run},
            torch_config=(
                ray_compat.local_torch_config() if on_loopback() else ray_compat.cluster_torch_config()
            ),
            scaling_config=ScalingConfig(  # type: ignore[call-arg]  # Ray's stub is of its older ScalingConfig
                num_workers=num_workers,
                elastic_resize_monitor_interval_s=resources.resize_every_s,
                use_gpu=allocation.use_gpu,
                resources_per_worker=per_worker,
            ),
            run_config=RunConfig(  # type: ignore[call-arg]  # and of its older RunConfig
                # Checkpoints are ours (verified on load, a torn one falls back); Ray's own records are only of this
                # attempt, so a run killed while Ray wrote them cannot hinder the next.
                name=run,
                storage_path=f"{tempfile.gettempdir()}/logonet-ray-train",
                failure_config=FailureConfig(max_failures=resources.max_failures),
                callbacks=[*callbacks, *watchers],
                logging_config=LoggingConfig(log_level="WARNING"),
            ),
        )
        try:
            with sigterm.listening(told):
                result: Any = trainer.fit()  # Ray's stub lacks return_value, what rank 0 returned
        except ray.exceptions.RayActorError as err:  # a worker's death never comes here
            raise LeaderLost(
                "the process that leads the training died: it was killed, there was no memory left, or its machine "
                "went; the same command goes on from the newest checkpoint"
            ) from err
        ray_compat.forget(run)
        assert result.return_value is not None
        if "alone" in result.return_value and job.tracking is not None:
            from logonet.tracking import Tracker

            Tracker(**job.tracking).close("FAILED", timeout_s=15)  # rank 0 may have had no chance to
        if "failed" in result.return_value:
            raise result.return_value["failed"]
        if "left" not in result.return_value:
            return result.return_value
        step = result.return_value["left"]
        if stop.is_set():
            raise Stopped(
                f"stopped after step {step:,}, which is stored; the same command goes on from there"
            )
        print(f"workers were asked to go: step {step:,} is stored, training goes on from there", flush=True)


def train_worker(config: dict[Any, Any]) -> dict[str, Any]:
    """What Ray Train runs on every worker."""
    try:
        with memory_watched():
            return _train(config)
    except Left as err:
        return {"left": err.step}  # Ray would count an exception as a failure; `fit` starts the ranks again
    except Diverged as err:
        return {"failed": err}  # as a value too: started again, the ranks would fail again
    except OutOfMemory as err:
        return {"failed": err, "alone": True}  # the other ranks may be waiting for this one


def _train(config: dict[Any, Any]) -> dict[str, Any]:
    import ray
    import ray.train
    from ray.train.torch import get_device

    quiet()
    # Ray reports every metric through the root logger, which it sets to INFO in its workers.
    logging.getLogger().setLevel(logging.WARNING)
    job: Job = ray.get(config["job"][0])
    allocation: ResourceAllocation = config["allocation"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(allocation.threads_per_worker)
    tracker = None
    if rank == 0 and job.tracking is not None:
        from logonet.tracking import Tracker

        tracker = Tracker(**job.tracking)
        tracker.log_files(job.files)
    name = job.tracking["run_name"] if job.tracking else job.fingerprint[:8]
    device = get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # collectives of Python objects go through the current device
    dataset = feed.opened(config["dataset"][0])
    communicator = ProcessGroup(device) if world > 1 else Communicator()
    loop = Loop(job, dataset.schedule, communicator, device, dataset.validation)
    loop.restore()
    positions = MicroBatches(dataset.schedule, job.train.batch_size, loop.step, loop.total_steps, rank, world)
    batches = feed.batches(
        config["dataset"],
        positions,
        allocation,
        communicator,
        lambda arrays: to_tensors(arrays, device),
        lambda size_bytes: gauges.put("queued_bytes", size_bytes, run=name, rank=str(rank)),
    )
    bar = ray_compat.progress_bar(loop.total_steps, loop.step) if config["progress"] and rank == 0 else None
    watch = functools.partial(gauges.training, name, rank)
    notices = preemption.Notices(config["run"], rank, ray.train.get_preemption_info)
    try:
        with notices.listening():
            history = loop.run(batches, ray.train.report, tracker, notices, bar, watch)
    except (Diverged, torch.OutOfMemoryError):
        if tracker is not None:
            tracker.close("FAILED", timeout_s=15)
        raise
    if rank:
        return {}
    made = finish(job, loop, history, tracked=True)
    if tracker is not None:
        made["tracked"] = tracker.close(timeout_s=15)  # the driver tries again, for longer
    return made
