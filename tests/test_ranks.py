"""Several ranks: gradients, validation and probe over real collectives."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import HERE, tiny_backbone
from loops import (
    CLASSES,
    FACTS,
    LARGER,
    a_job,
    a_probe,
    crops_dataset,
    labelled_dataset,
    labelled_job,
)

from logonet import training
from logonet.core.errors import UserError
from logonet.data import prepared_scans
from logonet.distributed import trainer
from logonet.distributed.cluster import ResourceAllocation, Resources
from logonet.methods import DataSpec
from logonet.training import linear_probe
from logonet.training.communicator import Communicator, ProcessGroup
from logonet.training.dataset import LabelledDataset, TrainingDataset
from logonet.training.loop import CHECKPOINT, GO_ON, LEAVE, Loop
from logonet.training.schedule import shard_micro_batches

ALLOCATION = ResourceAllocation(
    workers=1,
    use_gpu=False,
    cpus_per_worker=1,
    threads_per_worker=1,
    cpus_per_data_task=1,
    cpus_per_task=1,
    cpus=3,
)
PROBED = ("probe_dice", "probe_dice_per_class", "probe_dice_floor")


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> TrainingDataset:
    return crops_dataset(tmp_path_factory.mktemp("crops"))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> LabelledDataset:
    return labelled_dataset(tmp_path_factory.mktemp("cases"))


@pytest.fixture(scope="module")
def probe_task(labelled: LabelledDataset) -> linear_probe.Task:
    return a_probe(labelled)


@pytest.mark.parametrize(("mode", "compression"), [("flat", "none"), ("ddp", "none"), ("ddp", "bf16")])
def test_three_ranks_average_the_gradients_of_four_batches(
    mode: Any, compression: Any, ray_local: None, tmp_path: Path
) -> None:
    """Through real collectives: one rank has two of them. And what one rank hears, all do."""
    import ray

    @ray.remote(num_cpus=1)
    def take(rank: int, world: int) -> tuple[list[np.ndarray], tuple[int, int], float]:
        from datetime import timedelta
        from types import SimpleNamespace

        import torch.distributed as dist

        torch.set_num_threads(1)
        if world > 1:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{tmp_path}/meet",
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=120),
            )
        try:
            torch.manual_seed(0)
            net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
            module: Any = torch.nn.Module()
            module.net = net
            module.forward = lambda batch, progress: (net(batch["x"]).square().mean(), {})
            x_MBF = torch.randn(4, 2, 6, generator=torch.Generator().manual_seed(1))
            group = ProcessGroup(torch.device("cpu")) if world > 1 else Communicator()
            cfg = training.Config(gradient_sync=mode, gradient_compression=compression)
            module, sync = group.parallel(module, cfg)
            own = shard_micro_batches(4, rank, world)
            for _ in range(2):  # DDP lays its buckets out anew after the first
                training.step(
                    module,
                    torch.optim.SGD(net.parameters(), lr=0.1),
                    ({"x": x_MBF[i]} for i in own),
                    count=len(own),
                    mean_count=4 / world,
                    progress=0.0,
                    cfg=cfg,
                    seeds=list(own),
                    autocast=torch.autocast("cpu", enabled=False),
                    sync=sync,
                )
            me: Any = SimpleNamespace(communicator=group)
            heard: Any = SimpleNamespace(due=lambda *_: (LEAVE if rank == 1 else GO_ON, False))
            due = Loop._due(me, heard, 0.0, 0.0, overdue=False)
            late = Loop._due(me, None, 0.0, 0.0, overdue=rank == 0)
            largest = max(float(p.grad.abs().max()) for p in net.parameters())
            return [p.detach().numpy() for p in net.parameters()], (due, late), largest
        finally:
            # DDP holds the group: if it went last, the group's threads would be joined while the interpreter is locked.
            module = sync = None
            if world > 1:
                dist.destroy_process_group()

    alone, _, largest = ray.get(take.remote(0, 1))
    ranks = ray.get([take.remote(rank, 3) for rank in range(3)])
    # Compressed, a gradient is off by half of its last of 8 bits, and each of three ranks adds its own.
    atol = 2 * 0.1 * 3 * 2**-9 * largest if compression == "bf16" else 1e-7
    differences = []
    for weights, due, _ in ranks:
        assert due == (LEAVE, CHECKPOINT)
        for a, b in zip(weights, alone):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol)
            differences.append(np.abs(a - b).max())
    assert (max(differences) > 1e-6) == (compression == "bf16")


def test_one_rank_probes_and_all_are_told(
    labelled: LabelledDataset, tmp_path: Path, probe_task: linear_probe.Task
) -> None:
    import ray

    job = dataclasses.replace(labelled_job(str(tmp_path)), backbone=tiny_backbone(), probe=probe_task)

    @ray.remote(num_cpus=1)
    def measure(rank: int) -> tuple[bool, dict[str, Any], dict[str, Any]]:
        from datetime import timedelta

        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{job.uri}-meet",
            rank=rank,
            world_size=2,
            timeout=timedelta(seconds=120),
        )
        try:
            worker = Loop(
                job, labelled.schedule, ProcessGroup(torch.device("cpu")), "cpu", labelled.validation
            )
            return worker.probe is not None, worker._measure_probe(1), worker._measure_probe(2)
        finally:
            dist.destroy_process_group()

    first, second = ray.get([measure.remote(rank) for rank in range(2)])
    assert (first[0], second[0]) == (True, False)
    assert first[1] == second[1] == {}
    assert first[2]["probe_dice"] > 0
    assert first[2].keys() == second[2].keys() == set(PROBED)
    assert first[2]["probe_dice"] == second[2]["probe_dice"]
    assert first[2]["probe_dice_per_class"] == second[2]["probe_dice_per_class"]


def test_two_ranks_share_the_validation_cases_and_measure_what_one_does(
    labelled: LabelledDataset, tmp_path: Path
) -> None:
    """With batch norm, whose running statistics differ between ranks: those of rank 0 are the ones that are saved."""
    import ray

    big = DataSpec(size_vox=LARGER, num_classes=len(CLASSES))
    job = dataclasses.replace(labelled_job(str(tmp_path)), backbone=tiny_backbone(), data_spec=big)

    @ray.remote(num_cpus=1)
    def validate(rank: int, world: int) -> tuple[list[str], dict[str, Any], list[torch.Tensor]]:
        from datetime import timedelta

        import torch.distributed as dist

        read: list[str] = []
        real_read = prepared_scans.read_case
        torch.set_num_threads(1)
        if world > 1:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{job.uri}-meet",
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=120),
            )
        try:
            prepared_scans.read_case = lambda ref: read.append(ref.scan_id) or real_read(ref)  # type: ignore[assignment,func-returns-value]
            group = ProcessGroup(torch.device("cpu")) if world > 1 else None
            worker = Loop(job, labelled.schedule, group, "cpu", labelled.validation)
            draw = torch.Generator().manual_seed(rank)
            for buffer in worker.method.backbone.buffers():
                if buffer.is_floating_point():
                    buffer.add_(torch.rand(buffer.shape, generator=draw))
            return read, worker._validate(1), [b.clone() for b in worker.method.backbone.buffers()]
        finally:
            prepared_scans.read_case = real_read
            if world > 1:
                dist.destroy_process_group()

    alone = ray.get(validate.remote(0, 1))
    both = ray.get([validate.remote(rank, 2) for rank in range(2)])
    assert alone[0] == ["case2", "case5", "case6"]
    assert [b[0] for b in both] == [["case2", "case6"], ["case5"]]
    assert both[0][1] == both[1][1] == alone[1]
    assert alone[1]["val_dice"] > 0
    for a, b, c in zip(alone[2], both[0][2], both[1][2]):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_validation_without_labelled_scans_is_refused_before_any_worker_starts(
    crops: TrainingDataset, labelled: LabelledDataset, tmp_path: Path
) -> None:
    unlabelled = a_job(str(tmp_path), validate_every_epochs=1)
    for job, dataset in (
        (unlabelled, crops),
        (labelled_job(str(tmp_path)), dataclasses.replace(labelled, val=())),
    ):
        with pytest.raises(UserError, match=r"train\.validate_every_epochs=0"):
            trainer.fit(job, dataset, Resources(workers=1), ALLOCATION)


def test_the_death_of_the_process_that_leads_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    import ray.train.torch
    from ray.exceptions import ActorDiedError

    class Dies:
        def __init__(self, *_: Any, **settings: Any) -> None: ...

        def fit(self) -> None:
            raise ActorDiedError

    monkeypatch.setattr(ray.train.torch, "TorchTrainer", Dies)
    monkeypatch.setattr(ray, "put", lambda value: value)
    job = training.Job("/nowhere", "0" * 16, {}, {"name": "masked_clusters"}, training.Config(), FACTS)
    with pytest.raises(trainer.LeaderLost, match="the same command goes on from the newest checkpoint"):
        trainer.fit(job, SimpleNamespace(validation=()), Resources(workers=1), ALLOCATION)  # type: ignore[arg-type]


def test_ranks_on_one_machine_meet_on_its_loopback_interface(ray_local: None) -> None:
    import ray

    @ray.remote
    def interfaces() -> list[str]:
        import os

        return [os.environ[f"{backend}_SOCKET_IFNAME"] for backend in ("GLOO", "NCCL")]

    gloo, nccl = ray.get(interfaces.remote())
    assert gloo == nccl
    assert gloo.startswith("lo")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_gpu_that_is_too_small_ends_the_run_with_a_sentence(
    workers: int, crops: TrainingDataset, ray_local: None, tmp_path: Path
) -> None:
    """On the last rank alone: any other waits for its gradients, and nobody is started again."""
    from ray.train.v2._internal.execution.callback import WorkerCallback

    class Full(WorkerCallback):
        def after_init_train_context(self) -> None:
            import ray.train

            from logonet.training import loop

            rank, real_step = ray.train.get_context().get_world_rank(), loop.step
            (tmp_path / f"{rank}-{time.time_ns()}").touch()

            def step(*args: Any, **kwargs: Any) -> Any:
                if rank == workers - 1 and kwargs["progress"] > 0:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has")
                return real_step(*args, **kwargs)

            loop.step = step

    allocation = dataclasses.replace(ALLOCATION, workers=workers)
    with pytest.raises(training.OutOfMemory, match=r"^CUDA out of memory; lower train\.batch_size") as raised:
        trainer.fit(a_job(f"{tmp_path}/run"), crops, Resources(workers=workers), allocation, [Full()])
    assert raised.value.__cause__ is None
    assert len(list(tmp_path.glob("*-*"))) == workers


def test_a_gpu_that_is_too_small_is_a_sentence_in_this_process_too(
    crops: TrainingDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has")

    monkeypatch.setattr("logonet.training.loop.step", step)
    with pytest.raises(training.OutOfMemory, match=r"^CUDA out of memory; lower train\.batch_size"):
        HERE.train(a_job(str(tmp_path)), crops)
