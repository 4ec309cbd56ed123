"""A range of workers: how it is written, placed, dealt its batches, and how it hears that it must go. Without Ray."""

from __future__ import annotations

import itertools
import math
import os
import random
import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import tyro
from torch import nn

from logonet import cli, methods, training
from logonet.core.config import Component
from logonet.core.errors import Stopped, UserError
from logonet.distributed import cluster, preemption, ray_compat, trainer
from logonet.distributed.cluster import Resources, Workers
from logonet.training import schedule
from logonet.training.loop import GO_ON, LEAVE, SAVE

# ------------------------------------------------------------------------------------------ how it is written


def parsed(*args: str) -> Resources:
    return tyro.cli(Resources, args=list(args))


def test_a_number_or_a_range_of_workers() -> None:
    assert parsed().workers == 1
    assert parsed("--workers", "4") == Resources(workers=4)
    assert parsed("--workers", "4:16") == Resources(workers=Workers(4, 16))
    assert parsed("--workers", "4:4") == Resources(workers=4)
    assert (parsed("--workers", "4").least, parsed("--workers", "4").most) == (4, 4)
    assert (parsed("--workers", "4:16").least, parsed("--workers", "4:16").most) == (4, 16)


@pytest.mark.parametrize(
    "text", ["0", "0:4", "4:2", "-1", "4:", ":4", "4-16", "4:8:16", "x", "4.0", " 4", "", "٤", "1e3"]
)
def test_what_is_neither_is_one_sentence(text: str) -> None:
    with pytest.raises(UserError, match=r"^--workers .* neither a number such as 4 nor a range such as 4:16"):
        parsed(f"--workers={text}")


@pytest.mark.parametrize("what", [lambda r: cluster.room(r), lambda r: cluster.allocate_trials(r, most=3)])
def test_a_sweep_takes_no_range(what: Callable[[Resources], Any]) -> None:
    with pytest.raises(UserError, match=r"--workers 2:4 is a range, .* a sweep does not; give one number"):
        what(Resources(workers=Workers(2, 4)))


# --------------------------------------------------------------------------------------------- how it is placed


def ray_would_place(cpus: float, gpus: float, per_worker: float, most: int) -> int:
    """What Ray Train's elastic policy counts on one node: it adds its bundles up, and divides."""
    reserved, count = 0.0, 0
    while reserved + per_worker <= cpus and count < min(gpus, most):
        reserved, count = reserved + per_worker, count + 1
    return int(reserved // per_worker)


@pytest.mark.parametrize(
    ("nodes", "wanted", "workers", "per_worker"),
    [
        ([(4, math.inf)] * 2, (2, 4), 4, 1.5),
        ([(8, math.inf)] * 2, (2, 4), 4, 3.0),
        ([(64, math.inf)], (2, 4), 4, 12.0),
        ([(48, 4)] * 3 + [(32, 0)], (4, 16), 12, 9.0),  # nodes with 4 GPUs, and one that only prepares
        ([(0, math.inf), (4, math.inf)], (1, 2), 2, 1.5),  # a head without CPUs
        ([(2, math.inf)] * 3, (2, 8), 3, 1.5),
    ],
)
def test_a_range_finds_the_most_that_fit(
    nodes: list[tuple[float, float]], wanted: tuple[int, int], workers: int, per_worker: float
) -> None:
    assert cluster.range_that_fits(nodes, Workers(*wanted))[:2] == (workers, per_worker)


def test_whichever_nodes_are_left_data_tasks_find_room() -> None:
    """On every node by itself, since all others may go: what Ray would fill leaves some CPUs free."""
    rng, refused = random.Random(0), 0
    for _ in range(200):
        nodes = [
            (float(rng.choice([1, 2, 3, 4, 8, 16, 96])), rng.choice([1, 4, math.inf]))
            for _ in range(rng.randint(1, 4))
        ]
        wanted = Workers(least := rng.randint(1, 4), least + rng.randint(1, 12))
        try:
            workers, per_worker, free = cluster.range_that_fits(nodes, wanted)
        except UserError:
            refused += 1
            continue
        placed = [ray_would_place(cpus, gpus, per_worker, wanted.most) for cpus, gpus in nodes]
        assert wanted.least <= workers == min(sum(placed), wanted.most)
        for (cpus, _), count in zip(nodes, placed):
            assert count == 0 or cpus - count * per_worker >= max(free, min(0.5, cpus / 4))
    assert refused < 100


def test_what_the_user_gives_a_worker_must_leave_something() -> None:
    assert cluster.range_that_fits([(4, math.inf)], Workers(1, 3), given=1.1) == (3, 1.125, 0.625)
    with pytest.raises(UserError, match=r"2 workers x 2 CPUs do not fit on nodes with 4 .*--cpus-per-worker"):
        cluster.range_that_fits([(4, math.inf)], Workers(2, 3), given=2.0)
    assert cluster.range_that_fits([(4, 1)], Workers(1, 3), given=2.0) == (1, 2.0, 2.0)


@pytest.mark.parametrize(
    ("cpus", "gpus", "most", "given", "workers", "per_worker"),
    [
        ([2, 2, 1], 0, 2, 1.0, 2, 1.0),  # a node may be full: no data tasks feed the actors
        ([2], 0, 2, 1.0, 1, 1.0),  # as many as find room
        ([8, 8], 0, 16, 4.0, 3, 4.0),
        ([8, 8], 0, 3, 0.0, 3, 4.0),
        ([8, 8], 1, 4, 0.0, 2, 6.0),
    ],
)
def test_a_pool_of_actors_takes_the_room_that_there_is(
    cpus: list[int], gpus: int, most: int, given: float, workers: int, per_worker: float
) -> None:
    nodes = [{"CPU": float(n), "GPU": float(gpus)} for n in cpus]
    found = cluster.divide(nodes, Resources(Workers(1, most), cpus_per_worker=given), pool=True)
    assert (found.workers, found.cpus_per_worker, found.use_gpu) == (workers, per_worker, gpus > 0)


def test_a_pool_of_actors_without_room_for_one_is_refused() -> None:
    with pytest.raises(UserError, match="1 worker x 8 CPUs do not fit on nodes with 4, 4 CPUs"):
        cluster.divide([{"CPU": 4.0}] * 2, Resources(Workers(1, 4), cpus_per_worker=8.0), pool=True)


# ------------------------------------------------------------------------------------------------ how it deals


@pytest.mark.parametrize("world", range(1, 17))
def test_every_batch_of_a_step_is_dealt_once_and_in_order(world: int) -> None:
    for count in range(world, 33):
        parts = [schedule.shard_micro_batches(count, rank, world) for rank in range(world)]
        assert list(itertools.chain(*parts)) == list(range(count))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        if count % world == 0:
            assert [p.start for p in parts] == [rank * (count // world) for rank in range(world)]
        cfg = training.Config(global_batch=2 * count, batch_size=2)
        assert training.accumulation(cfg, world) == max(map(len, parts))


class Squares(nn.Module):
    """A method whose loss is one layer's mean square, with dropout, so that the seeds of the passes matter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 1))

    def forward(
        self, batch: dict[str, torch.Tensor], progress: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        error_B = (self.layers(batch["x"])[:, 0] - batch["y"]).square()
        total = torch.stack([error_B.sum(), torch.tensor(float(len(error_B)))])
        return error_B.mean(), {"loss": total.detach().double()}


def gradients(count: int, rank: int, world: int) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """One rank's gradients of a step as `train.step` makes them, before ranks are averaged; and its metrics."""
    gen = torch.Generator().manual_seed(1)
    xs, ys = torch.randn(count, 2, 6, generator=gen), torch.randn(count, 2, generator=gen)
    method = Squares()
    own = schedule.shard_micro_batches(count, rank, world)
    seen: list[torch.Tensor] = []
    totals = training.step(
        method,
        torch.optim.AdamW(method.parameters()),
        ({"x": xs[i], "y": ys[i]} for i in own),
        count=len(own),
        mean_count=count / world,
        progress=0.0,
        cfg=training.Config(),
        seeds=list(own),
        autocast=torch.autocast("cpu", enabled=False),
        sync=lambda params: seen.extend(p.grad.clone() for p in params if p.grad is not None),
    )
    return seen, totals


@pytest.mark.parametrize("world", [2, 3, 4, 5, 6, 7])
def test_gradients_and_losses_of_any_world_are_those_of_one_rank(world: int, one_thread: None) -> None:
    expected, all_totals = gradients(7, 0, 1)
    ranks = [gradients(7, rank, world) for rank in range(world)]
    for i, grad in enumerate(expected):
        mean = sum(seen[i] for seen, _ in ranks) / world
        torch.testing.assert_close(mean, grad, rtol=1e-5, atol=1e-7)
        assert grad.abs().max() > 1e-3
    torch.testing.assert_close(sum(totals["loss"] for _, totals in ranks), all_totals["loss"])


def test_equal_parts_are_weighted_as_they_always_were(one_thread: None) -> None:
    """To the last bit: the loss of each of n passes over n."""
    (seen, _), method = gradients(6, 1, 2), Squares()
    gen = torch.Generator().manual_seed(1)
    xs, ys = torch.randn(6, 2, 6, generator=gen), torch.randn(6, 2, generator=gen)
    for i in (3, 4, 5):
        torch.manual_seed(i)
        (method({"x": xs[i], "y": ys[i]}, 0.0)[0] / 3).backward()
    for p, grad in zip(method.parameters(), seen):
        assert p.grad is not None
        assert torch.equal(p.grad, grad)


@pytest.mark.parametrize("name", ["simclr", "rcr"])
def test_a_method_that_sees_all_ranks_wants_equal_parts(name: str) -> None:
    cfg, method = training.Config(global_batch=8, batch_size=2), Component(name, {"gather": True})
    for workers in (1, 2, 4):
        trainer.check_workers(cfg, method, Resources(workers=workers))
    for refused in (3, Workers(1, 2), Workers(2, 4)):
        with pytest.raises(UserError, match=r"one of 1, 2, 4, or --set method.gather=false"):
            trainer.check_workers(cfg, method, Resources(workers=refused))
        trainer.check_workers(cfg, Component(name), Resources(workers=refused))


def test_only_methods_that_say_so_gather() -> None:
    for name in methods.names():
        assert not methods.gathers(name, methods.config(name)), f"{name} could not run on a range of workers"


# ------------------------------------------------------------------------------------------------- what it hears


class Table(dict[str, bytes]):
    """Ray's table, as far as notices use it."""

    def _internal_kv_put(self, key: str, value: bytes, overwrite: bool = False) -> None:
        self[key] = value

    def _internal_kv_get(self, key: str) -> bytes | None:
        return self.get(key)

    def _internal_kv_del(self, key: str) -> None:
        self.pop(key, None)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Unix time and the monotonic one, both where the test puts them; and an empty table."""
    now = [1000.0]
    fake = SimpleNamespace(time=lambda: now[0], monotonic=lambda: now[0])
    monkeypatch.setattr(preemption, "time", fake)
    monkeypatch.setattr(ray_compat, "time", fake)
    table = Table()
    monkeypatch.setattr(ray_compat, "_kv", lambda: table)
    return now


def test_a_notice_saves_at_once_and_leaves_before_the_end(clock: list[float]) -> None:
    info: list[Any] = [None]
    heard = preemption.Notices("run", 0, lambda: info[0])
    assert heard.due(1.0, 0.0) == (GO_ON, True)
    heard.ask()
    assert heard.due(1.0, 0.0) == (GO_ON, False), "asked again within a second"
    clock[0] += 1
    info[0] = SimpleNamespace(deadline_ms=1120_000)
    assert heard.due(1.0, 0.0) == (GO_ON, True)
    heard.ask()
    assert heard.due(1.0, 0.0)[0] == SAVE
    for clock[0] in range(1002, 1109):
        assert heard.due(1.0, 2.0)[0] == GO_ON, clock[0]
    clock[0] = 1110  # 5 s, and twice the step and the save, are 11
    assert heard.due(1.0, 2.0)[0] == LEAVE


@pytest.mark.parametrize("deadline_ms", [None, 1003_000])
def test_a_notice_without_time_leaves_at_once(clock: list[float], deadline_ms: int | None) -> None:
    heard = preemption.Notices("run", 0, lambda: SimpleNamespace(deadline_ms=deadline_ms))
    heard.ask()
    assert heard.due(0.1, 0.0)[0] == LEAVE


def test_a_notice_that_comes_earlier_than_the_one_before_is_saved_for_again(clock: list[float]) -> None:
    deadline = [1300_000]
    heard = preemption.Notices("run", 0, lambda: SimpleNamespace(deadline_ms=deadline[0]))
    heard.ask()
    assert [heard.due(1, 1)[0] for _ in range(2)] == [SAVE, GO_ON]
    deadline[0] = 1100_000
    heard.ask()
    assert [heard.due(1, 1)[0] for _ in range(2)] == [SAVE, GO_ON]


def test_word_is_left_for_rank_0_of_this_run_alone(clock: list[float]) -> None:
    first, other, second = (
        preemption.Notices(run, rank, lambda: None) for run, rank in (("a", 0), ("b", 0), ("a", 1))
    )
    ray_compat.tell("a")
    assert first.due(1, 1) == (LEAVE, False)
    assert other.due(1, 1) == (GO_ON, True)
    assert second.due(1, 1) == (GO_ON, False)
    first.left()
    assert ray_compat._kv() == {"logonet/a": ray_compat.LEFT}
    ray_compat.forget("a")
    assert preemption.Notices("a", 0, lambda: None).due(1, 1) == (GO_ON, True)


def test_every_rank_hears_its_own_sigterm_once_and_the_second_as_before(clock: list[float]) -> None:
    others: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: others.append(number))
    try:
        heard = preemption.Notices("run", 3, lambda: None)
        with heard.listening():
            assert heard.due(1, 1) == (GO_ON, False)
            os.kill(os.getpid(), signal.SIGTERM)
            assert heard.due(1, 1) == (LEAVE, False)
            assert others == []
            os.kill(os.getpid(), signal.SIGTERM)
            assert others == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGTERM)
        assert others == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_controllers_callback_waits_until_the_ranks_have_left(clock: list[float]) -> None:
    from ray.train.v2._internal.execution.controller.state import ResizingState, RunningState

    callback = ray_compat.leave_before_resizing("run")
    steps: list[float] = []

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        steps.append(seconds)
        if len(steps) == 4:
            ray_compat._kv()["logonet/run"] = ray_compat.LEFT

    ray_compat.time.sleep = sleep  # type: ignore[assignment]
    callback.after_controller_state_update(None, RunningState())
    assert ray_compat._kv() == {}
    callback.after_controller_state_update(None, ResizingState(scaling_decision=None))
    assert len(steps) == 4
    assert ray_compat._kv() == {}
    steps[:] = [0.0] * 4  # nobody answers: it gives up
    callback.after_controller_state_update(None, ResizingState(scaling_decision=None))
    assert clock[0] >= 1000 + ray_compat.RESIZE_WAIT_S


def test_a_command_that_was_asked_to_stop_says_what_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, cli.sentences():
        raise Stopped("stopped after step 7, which is stored; the same command goes on from there")
    assert end.value.code == 143
    assert (
        capsys.readouterr().err
        == "stopped after step 7, which is stored; the same command goes on from there\n"
    )
