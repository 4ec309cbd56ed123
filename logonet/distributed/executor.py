"""Work on many items, and training, on a Ray cluster.

References travel, not voxels: a task that is handed a scan's row reads, cuts and stores by itself and returns a few
numbers for each crop. Only the crops that a training step is about to use go through Ray's object store.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from logonet.core.config import Component
from logonet.core.execution import Workers, attempt
from logonet.distributed import cluster, gauges, ray_compat
from logonet.distributed.cluster import ResourceAllocation, Resources

if TYPE_CHECKING:  # these import torch, which data tasks do without
    from logonet.training.config import Config, Job
    from logonet.training.dataset import Dataset

MAX_TASKS = 400  # blocks of a graph over items: enough to balance, few enough to schedule
LOST_RUNS = 3  # how often a run is started anew when its machine, or the process that leads it, is lost
LOOK_FOR_ORPHANS_S = 2.0
ITEMS_PER_ACTOR = 16  # a data actor with fewer would take longer to start than to work


class RayExecutor:
    """Runs on the connected cluster.

    Args:
        resources: what the run may use.
        allocation: the part of the cluster it gets; None divides the cluster when work begins.
        callbacks: Ray Train callbacks, such as Tune's TuneReportCallback.
    """

    def __init__(
        self,
        resources: Resources,
        allocation: ResourceAllocation | None = None,
        callbacks: Sequence[Any] = (),
    ):
        self.resources, self.callbacks = resources, callbacks
        self._given = allocation

    @functools.cached_property
    def allocation(self) -> ResourceAllocation:
        """What training gets."""
        return self._given or cluster.allocate(self.resources)

    @functools.cached_property
    def model_allocation(self) -> ResourceAllocation:
        """What actors with a model get: they begin when there is room for one."""
        some = cluster.Workers(1, self.resources.most)
        return self._given or cluster.allocate(replace(self.resources, workers=some), pool=True)

    @property
    def device(self) -> str:
        return "cuda" if self.model_allocation.use_gpu else "cpu"

    def stream(
        self,
        fn: Callable[..., Any],
        items: Sequence[Any],
        *,
        shared: Sequence[Any] = (),
        workers: Workers = "tasks",
    ) -> Iterator[tuple[int, Any]]:
        """As `logonet.core.execution.Executor.stream`, on Ray Data."""
        import ray
        from ray import cloudpickle

        cluster.quiet()
        if not items:
            return
        # In a list, so that Ray hands references on and does not copy the values into every call.
        constructor = (fn, [ray.put(value) for value in shared])
        # Items travel as rows: each task would have to unpickle all of them if its function knew them.
        # Pickled by us they need no Arrow schema. (Ray looks at tables in a task each, and starts nodes for those.)
        rows = ray.data.from_items(
            [{"id": i, "item": cloudpickle.dumps(item)} for i, item in enumerate(items)],
            override_num_blocks=min(len(items), MAX_TASKS),
        )
        if workers != "tasks":
            ray_compat.quiet_actor_pools()
        if workers == "model actors":
            given = self.model_allocation
            answers = rows.map_batches(
                _Call,
                batch_size=1,
                compute=_pool(given.workers, self.resources.most, len(items)),
                num_cpus=given.cpus_per_worker,
                num_gpus=1 if given.use_gpu else None,
                fn_constructor_args=(*constructor, given.threads_per_worker),
            )
        else:
            rows.context.execution_options.label_selector = cluster.NO_GPU_NODES
            task_cpus, cpus = self._stage_cpus()
            if workers == "tasks":
                answers = rows.map_batches(
                    lambda batch: _Call(*constructor)(batch),
                    batch_size=None,
                    num_cpus=task_cpus,
                )
            else:
                # While crops are labelled no training runs yet: all CPUs but one may work. Actors on every CPU would
                # starve the tasks that feed them.
                most = -(-len(items) // ITEMS_PER_ACTOR)
                now = min(most, int((cpus - 1) / task_cpus))
                if self._given or not ray_compat.grows():
                    most = now
                answers = rows.map_batches(
                    _Call,
                    batch_size=1,
                    compute=_pool(now, most, len(items)),
                    num_cpus=task_cpus,
                    fn_constructor_args=constructor,
                )
        for batch in answers.iter_batches(batch_size=None, batch_format="numpy"):
            for i, blob in zip(batch["id"], batch["answer"]):
                yield int(i), pickle.loads(blob)

    def _stage_cpus(self) -> tuple[float, float]:
        given = self._given
        return (given.cpus_per_task, given.cpus) if given else cluster.stage_cpus(self.resources)

    def quarantined(self, stage: str, scans: int) -> None:
        """A gauge for Prometheus."""
        gauges.put("quarantined_scans", scans, stage=stage)

    def side_by_side(
        self, fn: Callable[[RayExecutor, Any], Any], items: Sequence[Any], at_once: int = 0
    ) -> Iterator[tuple[int, Any]]:
        """(position, answer or exception) of ``fn(executor, item)`` for every item, as they end.

        Each call has a process of its own, which only waits, and an executor with its part of the cluster.

        Args:
            at_once: so many calls, and not as many as fit.
        """
        import ray

        if not items:
            return
        runs, share = cluster.allocate_trials(self.resources, len(items), at_once)
        executor = RayExecutor(self.resources, share, self.callbacks)
        call = ray.remote(num_cpus=cluster.DRIVER_CPUS, max_retries=LOST_RUNS)(_in_own_process)
        waiting = list(range(len(items)))[::-1]
        running: dict[Any, int] = {}
        while waiting or running:
            while waiting and len(running) < runs:
                i = waiting.pop()
                running[call.remote(fn, executor, items[i])] = i
            for done in ray.wait(list(running), timeout=LOOK_FOR_ORPHANS_S)[0]:
                yield running.pop(done), attempt(ray.get, done)
            ray_compat.free_placement_groups(orphans=True)  # or the next run would wait for their CPUs

    def check(self, cfg: Config, method: Component) -> None:
        """UserError when the workers cannot share the steps of ``cfg``."""
        from logonet.distributed import trainer

        trainer.check_workers(cfg, method, self.resources)

    def train(self, job: Job, dataset: Dataset) -> dict[str, Any]:
        """As `logonet.distributed.trainer.fit`."""
        from logonet.distributed import trainer

        return trainer.fit(job, dataset, self.resources, self.allocation, self.callbacks)


def _in_own_process(fn: Callable[[RayExecutor, Any], Any], executor: RayExecutor, item: Any) -> Any:
    from logonet.distributed.trainer import LeaderLost

    for left in range(LOST_RUNS, -1, -1):
        try:
            return fn(executor, item)
        except LeaderLost:  # a machine's failure, not the run's: it goes on from its newest checkpoint
            if not left:
                raise


def _pool(now: int, most: int, items: int) -> Any:
    """Actors that begin as ``now`` there is room for, and become ``most`` where nodes come."""
    from ray.data import ActorPoolStrategy

    most, now = (max(1, min(size, items)) for size in (most, now))
    return ActorPoolStrategy(min_size=1, initial_size=min(now, most), max_size=most)


class _Call:
    """Calls a function on the items in a batch of rows."""

    def __init__(self, fn: Callable[..., Any], refs: list[Any], threads: int | None = None) -> None:
        import ray

        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        self.fn = fn
        self.shared = [ray.get(ref) for ref in refs]

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        # Answers are small mixed objects; pickled by us they need no Arrow schema. They never leave Ray.
        answers = [pickle.dumps(self.fn(pickle.loads(item), *self.shared)) for item in batch["item"]]
        return {"id": batch["id"], "answer": answers}
