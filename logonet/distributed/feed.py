"""A rank's batches, from one Ray Data stream that all ranks of a run share.

The ranks read a stream in which block b is for rank b % world. In order and with one row a block, Ray Data's splitter
deals blocks round, whichever rank asks first: each goes to the rank with the fewest rows so far. That is how Ray 2.60
does it and not a promise; `tests/test_feed.py` holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from logonet.distributed import cluster, gauges, ray_compat
from logonet.distributed.cluster import ResourceAllocation
from logonet.training.communicator import Communicator
from logonet.training.dataset import Dataset
from logonet.training.schedule import MicroBatches

BLOCK_BYTES = 32 << 20  # prepared samples of one block, which one task makes
BLOCKS_AHEAD = 2  # blocks that a rank has fetched or on their way before it needs them
WINDOW_BLOCKS = 2000  # of one stream: Ray holds the numbers of all blocks before the first is made


def batches(
    dataset_ref: Any,
    positions: MicroBatches,
    allocation: ResourceAllocation,
    communicator: Communicator,
    ready: Callable[[Iterator[dict[str, np.ndarray]]], Iterator[Any]] = iter,
    queued: Callable[[int], None] = lambda size_bytes: None,
) -> Iterator[Any]:
    """The prepared batches at ``positions``, in order; skipped steps are never read.

    A batch holds ``batch_size`` samples, which are more rows where a sample gives several crops. The ranks of a run
    must take their batches in step: at the end of each window they meet, and rank 0 makes the next stream.

    Args:
        dataset_ref: [reference to the dataset in Ray's object store].
        ready: what the batches go through, such as `to_tensors`, a window at a time: it may run ahead of the steps, and
            the ranks could not meet at the end of a window if some were further ahead.
        queued: told, as a batch is taken, the bytes of those that wait behind it.
    """
    cluster.quiet()
    dataset = opened(dataset_ref[0])
    rows = positions.batch_size * dataset.rows_per_sample
    for window in _windows(positions, dataset.row_bytes * rows):
        own = _streams(dataset_ref, window, allocation) if positions.rank == 0 else None
        streams = communicator.broadcast(own)
        yield from ready(_split(streams[positions.rank], rows, queued))


def _split(stream: Any, rows: int, queued: Callable[[int], None]) -> Iterator[dict[str, np.ndarray]]:
    for block in stream.iter_batches(batch_size=None, prefetch_batches=BLOCKS_AHEAD, batch_format="numpy"):
        group = {key: value[0] for key, value in block.items()}  # a block is one row
        length, size_bytes = len(next(iter(group.values()))), sum(value.nbytes for value in group.values())
        for begin in range(0, length, rows):
            rest = max(0, length - begin - rows) / length
            queued(ray_compat.prefetched_bytes(stream) + int(rest * size_bytes))
            yield {key: value[begin : begin + rows] for key, value in group.items()}


@dataclass(frozen=True)
class _Window:
    """What one stream holds.

    Attributes:
        positions: of rank 0; the others' differ by the rank alone.
        count: blocks of each rank.
    """

    positions: MicroBatches
    count: int

    def block(self, number: int) -> list[tuple[int, int]]:
        """Positions of all samples of a block. A rank's blocks are of equal length but for one unit."""
        place, rank = divmod(number, self.positions.world)
        own = replace(self.positions, rank=rank)
        unit = _unit(own)
        units = len(own) // unit
        begin, end = (unit * (i * units // self.count) for i in (place, place + 1))
        return [position for i in range(begin, end) for position in own[i]]


def _unit(positions: MicroBatches) -> int:
    """Micro-batches that stay in one block: one, or a rank's part of a step where the ranks' parts are not equal."""
    even = positions.schedule.global_batch // positions.batch_size % positions.world == 0
    return 1 if even else len(positions.own)


def _windows(positions: MicroBatches, batch_bytes: int) -> Iterator[_Window]:
    """Whole steps of all ranks, one stream after the other."""
    largest = replace(positions, rank=positions.world - 1)  # no rank has more to do
    unit = _unit(largest)
    units_per_step = len(largest.own) // unit
    per_block = max(1, BLOCK_BYTES // (batch_bytes * unit))
    most = max(1, WINDOW_BLOCKS // positions.world) * per_block // units_per_step
    start = positions.start_step
    while start < positions.stop_step:
        stop = min(start + max(1, most), positions.stop_step)
        units = (stop - start) * units_per_step
        # Four blocks at least, so that short runs are prepared side by side too.
        count = -(-units // min(per_block, -(-units // 4)))
        yield _Window(replace(positions, rank=0, start_step=start, stop_step=stop), count)
        start = stop


def _streams(dataset_ref: Any, window: _Window, allocation: ResourceAllocation) -> list[Any]:
    """An iterator for each rank over one stream."""
    import ray

    def prepare(row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        samples = opened(dataset_ref[0])[window.block(int(row["id"][0]))]
        gauges.cache()
        return {key: value[None] for key, value in samples.items()}

    world = window.positions.world
    count = window.count * world
    # Not ray.data.range: its read tasks want a whole CPU each, which may never be free beside the workers.
    numbers = ray.data.from_items([{"id": number} for number in range(count)], override_num_blocks=count)
    stream = numbers.map_batches(prepare, batch_size=None, num_cpus=allocation.cpus_per_data_task)
    stream.context.execution_options.preserve_order = True
    return stream.streaming_split(world, equal=False)


_OPENED: dict[str, Dataset] = {}


def opened(ref: Any) -> Dataset:
    """The dataset, unpickled once a process: a big run's takes longer to unpickle than a sample to prepare."""
    import ray

    if ref.hex() not in _OPENED:
        _OPENED.clear()
        _OPENED[ref.hex()] = ray.get(ref)
    return _OPENED[ref.hex()]
