"""A rank's batches, prepared by Ray tasks a few steps ahead."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

import numpy as np

from logonet.distributed.cluster import ResourceAllocation
from logonet.training.dataset import Dataset
from logonet.training.schedule import MicroBatches

TASK_BYTES = 8 << 20  # prepared samples of one task
TASKS_AHEAD = 3  # tasks that a rank keeps going before it needs them


def batches(
    dataset_ref: Any, positions: MicroBatches, allocation: ResourceAllocation
) -> Iterator[dict[str, np.ndarray]]:
    """The prepared batches at ``positions``, in order; skipped steps are never read.

    A batch holds ``batch_size`` samples, which are more rows where a sample gives several crops.

    Plain Ray tasks, a few ahead, and not a Ray Data stream: ``streaming_split`` hands a block to whichever rank asks
    first, so a sample's rank and step would depend on timing; and with a stream of its own for each rank, 16 ranks
    stopped for ever, each stream holding its share of the CPUs until its rank, which waited for the other ranks'
    gradients, took what it had ready.

    Args:
        dataset_ref: [reference to the dataset in Ray's object store].
    """
    import ray

    dataset = opened(dataset_ref[0])
    rows = positions.batch_size * dataset.rows_per_sample
    # A quarter of the batches at most, so that short runs are prepared side by side too.
    group = max(1, min(TASK_BYTES // (dataset.row_bytes * rows), -(-len(positions) // 4)))
    # In a sweep's trial Ray would keep the tasks within the worker's own reserved CPUs, which the worker holds: the
    # named strategy lets them run anywhere.
    prepare = ray.remote(_prepare).options(
        num_cpus=allocation.cpus_per_data_task, scheduling_strategy="DEFAULT"
    )
    ahead: collections.deque[Any] = collections.deque()
    for begin in range(0, len(positions), group):
        of_task = [p for i in range(begin, min(begin + group, len(positions))) for p in positions[i]]
        ahead.append(prepare.remote(dataset_ref, of_task))
        if len(ahead) > TASKS_AHEAD:
            yield from _split(ray.get(ahead.popleft()), rows)
    while ahead:
        yield from _split(ray.get(ahead.popleft()), rows)


def _prepare(dataset_ref: Any, positions: list[tuple[int, int]]) -> dict[str, np.ndarray]:
    """Runs as a Ray task."""
    return opened(dataset_ref[0])[positions]


_OPENED: dict[str, Dataset] = {}


def opened(ref: Any) -> Dataset:
    """The dataset, unpickled once a process: a big run's takes longer to unpickle than a sample to prepare."""
    import ray

    if ref.hex() not in _OPENED:
        _OPENED.clear()
        _OPENED[ref.hex()] = ray.get(ref)
    return _OPENED[ref.hex()]


def _split(group: dict[str, np.ndarray], rows: int) -> Iterator[dict[str, np.ndarray]]:
    for begin in range(0, len(next(iter(group.values()))), rows):
        yield {key: value[begin : begin + rows] for key, value in group.items()}
