"""The feed of training: one Ray Data stream deals every rank its batches, in order, however slow who is."""

from __future__ import annotations

import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loops import crops_dataset

from logonet.distributed import cluster, feed
from logonet.distributed.cluster import ResourceAllocation
from logonet.training.local import local_batches
from logonet.training.schedule import MicroBatches, SampleSchedule

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from scale import Ranks

ALLOCATION = ResourceAllocation(
    workers=0,
    use_gpu=False,
    cpus_per_worker=0,
    threads_per_worker=1,
    cpus_per_data_task=0.5,
    cpus_per_task=1,
    cpus=4,
)


def slow_samples(own: SampleSchedule) -> Any:
    """Samples that are nothing but their own positions, after a random wait."""

    class SlowSamples:  # here, so that it travels by value: Ray's processes cannot import the tests
        schedule = own
        rows_per_sample = 1
        row_bytes = 1 << 20

        def __getitem__(self, positions: list[tuple[int, int]]) -> dict[str, np.ndarray]:
            time.sleep(random.choice([0.0, 0.0, 0.005, 0.05]))
            return {"at": np.array(positions)}

    return SlowSamples()


def take_all(
    dataset: Any, world: int, batch_size: int, start: int, stop: int, slow: tuple[int, ...] = ()
) -> list[list[dict[str, np.ndarray]]]:
    """What each rank of ``world`` gets; the ``slow`` ones take their time."""
    import ray

    ref, communicator = [ray.put(dataset)], Ranks(world)

    def take(rank: int) -> list[dict[str, np.ndarray]]:
        positions = MicroBatches(dataset.schedule, batch_size, start, stop, rank, world)
        draw, got = random.Random(rank), []
        for batch in feed.batches(ref, positions, ALLOCATION, communicator):
            got.append({key: np.array(value) for key, value in batch.items()})
            time.sleep(draw.random() * (0.06 if rank in slow else 0.005))
        return got

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(take, range(world)))


@pytest.mark.parametrize(
    ("world", "micro_batches", "slow"),
    [
        pytest.param(1, 5, (), marks=pytest.mark.slow),
        (2, 3, (0,)),
        pytest.param(2, 4, (1,), marks=pytest.mark.slow),
        pytest.param(16, 16, (0, 7), marks=pytest.mark.slow),
        pytest.param(16, 24, (15,), marks=pytest.mark.slow),
    ],
)
def test_every_rank_gets_its_own_batches_in_order(
    ray_local: None,
    monkeypatch: pytest.MonkeyPatch,
    world: int,
    micro_batches: int,
    slow: tuple[int, ...],
) -> None:
    """Over several windows, blocks of several batches and deals that are not even."""
    monkeypatch.setattr(feed, "WINDOW_BLOCKS", 7 * world)
    monkeypatch.setattr(feed, "BLOCK_BYTES", 4 << 20)  # two batches of two
    dataset = slow_samples(SampleSchedule(1000, 2 * micro_batches, seed=0))
    ranks = take_all(dataset, world, 2, 3, 12, slow)
    for rank, got in enumerate(ranks):
        positions = MicroBatches(dataset.schedule, 2, 3, 12, rank, world)
        assert [batch["at"].tolist() for batch in got] == [
            [list(p) for p in positions[i]] for i in range(len(positions))
        ]
    dealt = sorted(tuple(p) for got in ranks for batch in got for p in batch["at"].tolist())
    assert dealt == [(step, slot) for step in range(3, 12) for slot in range(2 * micro_batches)]


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_batches_from_ray_are_those_of_a_plain_loader(tmp_path: Path, ray_local: None, world: int) -> None:
    """With no more CPUs free than a data task asks for, as beside workers that have all the others."""
    import ray

    crops = crops_dataset(tmp_path)
    workers = {"CPU": ray.cluster_resources()["CPU"] - ALLOCATION.cpus_per_data_task}
    with cluster.held([workers], "workers", wait_s=60):
        dealt = take_all(crops, world, 1, 1, 4)
    for rank, got in enumerate(dealt):
        here = list(local_batches(crops, MicroBatches(crops.schedule, 1, 1, 4, rank, world)))
        assert len(got) == len(here) > 0
        for a, b in zip(got, here):
            assert a.keys() == b.keys()
            for key in a:
                assert a[key].dtype == b[key].dtype
                assert np.array_equal(a[key], b[key]), key


def test_nothing_is_read_where_all_steps_are_done(tmp_path: Path, ray_local: None) -> None:
    crops = crops_dataset(tmp_path)
    assert take_all(crops, 2, 1, 4, 4) == [[], []]
