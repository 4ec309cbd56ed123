"""A plan's hours and money, what it refuses, what it asks of its flags, and the constants that it measures."""

from __future__ import annotations

import itertools
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import logonet

from logonet import networks, pipelines, recipes, training
from logonet.core.errors import UserError
from logonet.data import phantom
from logonet.distributed.cluster import Resources
from logonet.methods._cluster_head import CACHE_BYTES
from logonet.planning import hardware, measuring, memory, planner, request, sizes, speed, table
from logonet.planning.hardware import Cluster, Machine, Pool
from logonet.planning.question import NodeArgs
from logonet.planning.speed import Constants, Placement
from logonet.storage import object_store
from logonet.training.local import LocalExecutor

MIB = 1 << 20
SCANS = sizes.equal_scans(12, (48, 48, 48), (1.0, 1.0, 1.0))
CONSTANTS = Constants(
    machine="a made-up one",
    date="2026-11-25",
    device="cpu",
    flop_s=1e10,
    serial_share=0.5,
    allreduce_bytes_s=1e8,
    store_node_bytes_s=4e8,
    store_write_bytes_s=1e8,
    import_voxels_s=1e7,
    cut_voxels_s=2e7,
    prepare_bytes_s=1e8,
    kmeans_flop_s=1e10,
    label_flop_s=1e11,
    worker_bytes=500.0 * MIB,
    task_bytes=300.0 * MIB,
    start_s=10.0,
)
NODE = Machine(cpus=4, memory_gib=16, latency_s=1e-3)
GPU = replace(NODE, gpus=2, gpu="T4", gpu_tflop_s=1, gpu_memory_gib=0.02)
TRAIN = training.Config(global_batch=8, warmup_epochs=0)
# 1 s for a micro-batch on one core, 80 MB of gradients, crops of 1 MB.
WORK = memory.Work(
    facts=memory.DataSpec(size_vox=(100, 100, 50), batch_size=1),
    network=sizes.Network({}, {"w": (20_000_000,)}, 80_000_000),
    micro=memory.MicroBatch(0, 0, 0, 1e10, "given"),
    sample_bytes=2_000_000,
    precision="fp32",
)


def at(
    workers: int, per_node: int, threads: int = 1, machine: Machine = NODE, gpu: bool = False
) -> Placement:
    nodes = -(-workers // per_node)
    return Placement(machine, workers, nodes, per_node, threads, gpu, nodes * machine.cpus)


@pytest.fixture(scope="module")
def demo() -> pipelines.Pretraining:
    """The demo's recipe with a network that is quickly counted."""
    net = {"name": "dynunet", **networks.tiny("dynunet")}
    return pipelines.resolve(replace(recipes.PRETRAINING["demo"](), split=None, backbone=net))


@pytest.fixture(scope="module")
def work(demo: pipelines.Pretraining) -> memory.Work:
    return planner.work(demo, gpu=False)


@pytest.fixture
def counted(work: memory.Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans need not count the network again."""
    monkeypatch.setattr(planner, "work", lambda cfg, gpu, channels: work)


def plan(
    cfg: pipelines.Pretraining,
    *pools: Pool,
    scans: sizes.Scans = SCANS,
    constants: Constants = CONSTANTS,
    local: bool = False,
    preemptions: float = 0.0,
    **resources: Any,
) -> planner.Plan:
    cluster = Cluster(pools or (Pool("node", NODE),), preemptions_per_node_h=preemptions)
    return planner.make(cfg, scans, cluster, Resources(**resources), constants, root="/runs" if local else "")


def seconds(found: planner.Plan, stage: str) -> float:
    (took,) = [s.seconds for s in found.stages if s.name == stage]
    assert took is not None
    return took


# ---------------------------------------------------------------------------------------------- a step


def test_a_step_of_one_worker_by_hand() -> None:
    found = speed.step(TRAIN, WORK, at(1, 1), CONSTANTS)
    prepare_s = 8 * 0.01 / 4
    assert found.accumulate == 8
    assert found.compute_s == pytest.approx(8.0)
    assert found.allreduce_s == 0.0
    assert found.data_s == pytest.approx(prepare_s)
    assert found.samples_per_s == pytest.approx(1.0)
    assert found.waits_for == "CPU"


def test_data_tasks_that_label_fresh_crops_need_cores_and_read_chunks() -> None:
    fresh = replace(WORK, label_flop=4e9, read_bytes=5_000_000.0)
    pool, own = (speed.step(TRAIN, work, at(1, 1), CONSTANTS) for work in (WORK, fresh))
    assert own.data_s == pytest.approx(pool.data_s + 8 * 4e9 / 1e11 / 4)
    far = replace(CONSTANTS, store_node_bytes_s=1e7)
    assert speed.step(TRAIN, fresh, at(1, 1), far).data_s == pytest.approx(8 * 5e6 / 1e7)


def test_threads_shorten_all_but_the_serial_share() -> None:
    one_s, four_s = (speed.step(TRAIN, WORK, at(1, 1, threads=n), CONSTANTS).compute_s for n in (1, 4))
    assert four_s == pytest.approx(
        one_s * (0.5 + 0.5 / 4) + 8 * 0.01 / 4
    )  # and four threads share with the data


def test_workers_and_data_tasks_share_the_cores() -> None:
    """8 workers on 4 cores take as long as 4 with twice the work each; the ring's hops take turns."""
    four, eight = (speed.step(TRAIN, WORK, at(n, n), CONSTANTS) for n in (4, 8))
    assert four.compute_s == eight.compute_s == pytest.approx(8 * 1.0 / 4 + 8 * 0.01 / 4)
    assert four.allreduce_s == pytest.approx(2 * 3 * (1e-3 + 8e7 / 4 / 1e8))
    assert eight.allreduce_s == pytest.approx(2 * 2 * 7 * (1e-3 + 8e7 / 8 / 1e8))


def test_the_slowest_resource_is_named() -> None:
    gpu = replace(GPU, gpu_tflop_s=4000)
    flat, ddp = (replace(TRAIN, gradient_sync=mode) for mode in ("flat", "ddp"))
    slow = replace(gpu, network_gbit_s=0.08)  # 10 MB/s between nodes
    weak = replace(GPU, gpu_tflop_s=0.01)
    assert speed.step(TRAIN, WORK, at(8, 2, machine=weak, gpu=True), CONSTANTS).waits_for == "GPU"
    assert speed.step(flat, WORK, at(8, 2, machine=slow, gpu=True), CONSTANTS).waits_for == "network"
    # DDP hides the all-reduce behind two thirds of the computation.
    flat_s, ddp_s = (speed.step(t, WORK, at(4, 4), CONSTANTS) for t in (flat, ddp))
    assert flat_s.total_s - ddp_s.total_s == pytest.approx(min(flat_s.allreduce_s, 2 / 3 * flat_s.compute_s))
    few = replace(at(8, 2, machine=gpu, gpu=True), cpus=0.01)
    assert speed.step(TRAIN, WORK, few, CONSTANTS).waits_for == "CPU"
    far = replace(CONSTANTS, store_node_bytes_s=1e4)
    assert speed.step(TRAIN, WORK, at(8, 2, machine=gpu, gpu=True), far).waits_for == "store"


def test_a_gpu_needs_a_rate_and_a_cpu_needs_constants_of_cpus() -> None:
    with pytest.raises(UserError, match=r"GPU 'T4'.*gpu_tflop_s"):
        speed.step(TRAIN, WORK, at(1, 1, machine=replace(GPU, gpu_tflop_s=0), gpu=True), CONSTANTS)
    with pytest.raises(UserError, match=r"A100.*--gpu False"):
        speed.step(TRAIN, WORK, at(1, 1), replace(CONSTANTS, device="A100"))


@settings(max_examples=40, deadline=None)
@given(st.floats(1e6, 1e12), st.floats(1e3, 1e8), st.sampled_from([1, 2, 4, 8]), st.booleans(), st.booleans())
def test_workers_never_help_each_other(
    flop: float, gradients: float, per_node: int, flat: bool, gpu: bool
) -> None:
    """Efficiency never rises with the number of workers, and steps never get shorter."""
    own = replace(
        WORK,
        micro=replace(WORK.micro, flop=flop),
        network=replace(WORK.network, trainable={"w": (int(gradients),)}),
    )
    train = replace(TRAIN, global_batch=per_node, gradient_sync="flat" if flat else "ddp")
    machine = replace(GPU, gpus=per_node) if gpu else NODE
    there = at(per_node, per_node, machine=machine, gpu=gpu)
    rows = speed.scaling(train, own, there, CONSTANTS, [per_node * 2**i for i in range(9)])
    assert all(0 < row.efficiency <= 1 + 1e-9 for row in rows)
    for few, many in itertools.pairwise(rows):
        assert many.efficiency <= few.efficiency + 1e-9
        assert many.total_s >= few.total_s - 1e-12


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1, 2, 4, 8, 64, 1024]),
    st.floats(0.01, 1.0),
    st.sampled_from(["allreduce_bytes_s", "flop_s", "prepare_bytes_s", "store_node_bytes_s"]),
)
def test_a_slower_part_never_makes_a_step_faster(workers: int, factor: float, part: str) -> None:
    train = replace(TRAIN, global_batch=1024)
    slower = replace(CONSTANTS, **{part: getattr(CONSTANTS, part) * factor})
    slow, fast = (speed.step(train, WORK, at(workers, 4), c).total_s for c in (slower, CONSTANTS))
    assert slow >= fast - 1e-9


def test_workers_are_placed_as_a_job_places_them() -> None:
    """A Ray of our own has room for every worker; a cluster keeps some CPUs for the data tasks."""
    own = Cluster((Pool("here", Machine(cpus=2, memory_gib=24)),))
    placed = [speed.place(own, Resources(workers=n)) for n in (1, 2, 16)]
    assert [(p.nodes, p.per_node, p.threads) for p in placed] == [(1, 1, 2), (1, 2, 1), (1, 16, 1)]
    cpus = Cluster((Pool("node", Machine(cpus=16, memory_gib=64), nodes=4),), head=Pool("head", NODE))
    far = speed.place(cpus, Resources(workers=8))
    assert (far.nodes, far.per_node, far.threads, far.gpu) == (4, 2, 6, False)
    gpus = Cluster((
        Pool("gpu", Machine(cpus=8, memory_gib=32, gpus=1, gpu_tflop_s=70), nodes=16),
        Pool("cpu", Machine(cpus=16, memory_gib=64), nodes=4),
    ), head=Pool("head", NODE))  # fmt: skip
    spread = speed.place(gpus, Resources(workers=16))
    assert (spread.nodes, spread.per_node, spread.gpu) == (16, 1, True)
    assert spread.cpus == 16 * 8 + 4 * 16 - 16


# --------------------------------------------------------------------------------------- hours and money


def test_a_stage_takes_as_long_as_its_slowest_resource(demo: pipelines.Pretraining, counted: None) -> None:
    found = plan(demo, Pool("node", NODE, nodes=2), workers=2)
    assert seconds(found, "import") == pytest.approx(12 * 48**3 / 1e7 / 8)
    slow = replace(CONSTANTS, store_node_bytes_s=1e3)
    (stage,) = [s for s in plan(demo, workers=2, constants=slow).stages if s.name == "import"]
    assert stage.seconds == pytest.approx(SCANS.stored_bytes / 1e3)
    assert stage.waits_for == "store"
    assert found.step is not None
    assert seconds(found, "pretrain") == pytest.approx(10 + 240 * found.step.total_s)


def test_checkpoints_that_take_longer_than_their_interval_delay_training(
    demo: pipelines.Pretraining, counted: None
) -> None:
    slow = replace(CONSTANTS, store_write_bytes_s=1e4)
    each = replace(demo, train=replace(demo.train, checkpoint_every_s=0))
    found = plan(each, workers=2, constants=slow)
    assert seconds(found, "pretrain") == pytest.approx(10 + 20 * found.bytes["checkpoint"] / 1e4)
    assert found.stages[-1].waits_for == "checkpoints"
    assert found.step and found.checkpoints
    assert found.checkpoints.waited_s == pytest.approx(
        seconds(found, "pretrain") - 10 - 240 * found.step.total_s
    )
    # A checkpoint by the clock, and one at the end.
    clock = replace(demo, train=replace(demo.train, checkpoint_every_s=100 * found.step.total_s))
    seldom = plan(clock, workers=2, constants=slow)
    assert seldom.checkpoints and seldom.checkpoints.times == 3
    assert found.stages[-1].written - seldom.stages[-1].written == 17 * found.bytes["checkpoint"]
    assert f"checkpoints 3, one every {table.duration(seldom.checkpoints.interval_s)}" in table.text(seldom)


@pytest.mark.parametrize(
    ("settings", "overdue", "steps"),
    [
        ({"checkpoint_every_s": 0}, math.inf, [3, 6, 9, 12]),
        ({}, math.inf, [12]),
        ({}, 4.2, [5, 10, 12]),
        ({"checkpoint_every_steps": 5}, 2.0, [2, 4, 5, 7, 9, 10, 12]),
        ({"validate_every_epochs": 2}, 5.0, [5, 6, 11, 12]),
    ],
)
def test_checkpoints_come_as_the_loop_writes_them(
    settings: dict[str, Any], overdue: float, steps: list[int]
) -> None:
    train = training.Config(epochs=4, warmup_epochs=0, **settings)
    assert sizes.checkpoint_steps(train, 3, overdue) == steps


def test_more_cores_never_cost_time(demo: pipelines.Pretraining, counted: None) -> None:
    hours = [plan(demo, Pool("node", replace(NODE, cpus=n)), workers=2).hours for n in (2, 4, 16, 64)]
    assert all(more <= fewer for fewer, more in itertools.pairwise(hours))  # type: ignore[operator]


def test_other_algorithms_than_kmeans_have_no_hours(demo: pipelines.Pretraining, counted: None) -> None:
    other = replace(demo, clusterers=replace(demo.clusterers, algorithm="spectral"))
    found = plan(other, workers=2)
    assert (found.hours, found.money) == (None, None)
    assert [s.name for s in found.stages if s.seconds is None] == ["clusterers"]
    assert "not known" in table.text(found)


def test_money_is_price_times_hours_and_gpus_are_paid_for_while_they_train() -> None:
    gpu = Pool("gpu", replace(GPU, price_per_h=4.0, spot_price_per_h=1.0), nodes=3, spot=True)
    cpu = Pool("cpu", replace(NODE, price_per_h=0.5), nodes=2)
    cluster = Cluster((gpu, cpu), head=Pool("head", replace(NODE, price_per_h=0.1)))
    assert cluster.money(2.5, training_hours=2) == pytest.approx(2 * 3 * 1.0 + 2.5 * (2 * 0.5 + 0.1))
    with pytest.raises(UserError, match="cpu has no spot price"):
        replace(cluster, pools=(gpu, replace(cpu, spot=True))).money(2.5, 2)


def test_hours_and_money_add_up(demo: pipelines.Pretraining, counted: None) -> None:
    found = plan(demo, Pool("node", replace(NODE, price_per_h=3.0), nodes=2), workers=2)
    assert found.hours is not None
    assert found.hours == pytest.approx(sum(s.seconds or 0 for s in found.stages) / 3600)
    assert found.money == pytest.approx(found.hours * 6.0)


def test_traffic_by_hand() -> None:
    """A ring of eight workers on four nodes, and samples of which one in five is made where it is used."""
    prices = hardware.TrafficPrices(zones_per_gb=0.02, nat_per_gb=0.045)
    cluster = Cluster((Pool("node", NODE, 4), Pool("cpu", NODE)), traffic_prices=prices)
    stage = sizes.Stage("pretrain", read=3e12, written=1e12)
    four, one = at(8, 2), at(8, 8)

    def moved(place: Placement, **changes: Any) -> speed.Traffic:
        return speed.traffic(TRAIN, [stage], 1000, WORK, place, replace(cluster, **changes))

    found = moved(four)
    ring, samples = 4 * 2 * 7 / 8 * 80e6, 8 * 2e6 * 4 / 5
    assert found.nodes_bytes == pytest.approx(1000 * (ring + samples))
    assert (found.zones_bytes, found.store_bytes, found.money) == (0, 4e12, 0)
    assert found.zones_money == pytest.approx(found.nodes_bytes * 2 / 3 * 0.02 / 1e9)
    assert found.nat_money == pytest.approx(4000 * 0.045)
    assert moved(four, zones=3, nat=True).money == pytest.approx(found.zones_money + found.nat_money)
    assert moved(one).nodes_bytes == pytest.approx(1000 * samples)
    half = replace(WORK.network, train=training.Config(gradient_sync="ddp", gradient_compression="bf16"))
    sent = speed.traffic(TRAIN, [stage], 1000, replace(WORK, network=half), four, cluster)
    assert sent.nodes_bytes == pytest.approx(1000 * (ring / 2 + samples))


def test_traffic_is_paid_for(demo: pipelines.Pretraining, counted: None) -> None:
    prices = hardware.TrafficPrices(zones_per_gb=100.0, nat_per_gb=1000.0)
    pools = (Pool("node", replace(NODE, price_per_h=3.0), nodes=2),)
    for zones, nat in ((1, False), (2, True)):
        cluster = Cluster(pools, zones=zones, nat=nat, traffic_prices=prices)
        found = planner.make(demo, SCANS, cluster, Resources(workers=2), CONSTANTS)
        assert found.traffic and found.hours
        assert (found.traffic.money > 0) == nat
        assert found.money == pytest.approx(found.hours * 6.0 + found.traffic.money)
        assert f"costs {found.traffic.money:,.2f} USD" in table.text(found)


def test_lost_spot_nodes_cost_a_start_and_half_an_interval(
    demo: pipelines.Pretraining, counted: None
) -> None:
    spot = Pool("node", replace(NODE, spot_price_per_h=1.0), nodes=2, spot=True)
    calm, rough = (plan(demo, spot, workers=2, preemptions=rate) for rate in (0.0, 6.0))
    assert calm.step is not None
    training_s = seconds(calm, "pretrain") - 10
    losses = training_s * 12 / 3600
    lost_s = losses * (10 + 240 * calm.step.total_s / 2)  # one checkpoint, at the end
    assert seconds(rough, "pretrain") - seconds(calm, "pretrain") == pytest.approx(lost_s)


# ------------------------------------------------------------------------------------- the nodes' own copies


def test_a_node_is_told_to_keep_what_training_reads(demo: pipelines.Pretraining, counted: None) -> None:
    scans = sizes.equal_scans(2000, (96, 96, 96))
    for cfg in (demo, replace(demo, data=replace(demo.data, fresh_crops=False))):
        found = plan(cfg, scans=scans, workers=2)
        everything = (
            found.bytes["prepared"] if cfg.data.fresh_crops else 8000 * (found.bytes["crop"] + 2 * 8 * 32)
        )
        assert found.cache_gb == math.ceil(everything / 0.9 / 1e9)
        assert any(f"set LOGONET_CACHE_GB={found.cache_gb} on every node" in note for note in found.notes)
        assert found.to_dict()["cache_gb"] == found.cache_gb
        # One node fetches a little less than everything, how many epochs there may be.
        assert found.stages[-1].read == pytest.approx(everything, rel=1e-3)
        on_disk = plan(cfg, scans=scans, workers=2, local=True)
        assert (on_disk.cache_gb, "LOGONET_CACHE_GB" in table.text(on_disk)) == (0, False)
        assert on_disk.stages[-1].read > 5 * everything


def test_what_a_disk_has_no_room_for_is_fetched_again(demo: pipelines.Pretraining, counted: None) -> None:
    scans = sizes.equal_scans(2000, (96, 96, 96))
    small = Pool("node", replace(NODE, disk_gib=2))
    found, roomy = plan(demo, small, scans=scans, workers=2), plan(demo, scans=scans, workers=2)
    assert found.cache_gb == 1  # of 1.7 GB, 80 % of the disk
    assert any("keeps 25% of the 3.3 GiB" in note for note in found.notes)
    assert roomy.stages[-1].read < found.stages[-1].read


@given(st.integers(1, 64), st.floats(0, 1), st.floats(0, 1))
def test_keeping_more_never_fetches_more(nodes: int, kept: float, more: float) -> None:
    of = sizes.sizes(recipes.PRETRAINING["demo"](), SCANS, WORK.network)
    shares = [planner.fetched_share(of, nodes, k) for k in sorted((0.0, kept, more, 1.0))]
    assert shares[0] == pytest.approx(1.0)
    assert all(0 < few <= many + 1e-9 for many, few in itertools.pairwise(shares))


# ------------------------------------------------------------------------------------- what will not fit


def test_a_plan_that_fits_refuses_nothing(demo: pipelines.Pretraining, counted: None) -> None:
    assert plan(demo, workers=2).refusals == ()


@pytest.mark.parametrize(
    ("machine", "more", "about", "hint"),
    [
        (replace(GPU, gpu_memory_gib=8), {"workers": 4}, "2 GPUs for 4 workers", "--workers 2"),
        (NODE, {"workers": 2, "gpu": True}, "0 GPUs for 2 workers", "--gpu False"),
        (GPU, {"workers": 2}, "GPU memory", "train.batch_size"),
        (NODE, {"workers": 2, "cpus_per_worker": 4.0}, "2 workers x 4 CPUs", "--cpus-per-worker 1.5"),
        (replace(NODE, memory_gib=2.3), {"workers": 2}, "2 training workers", "put 1 on a node"),
        (replace(NODE, memory_gib=0.5), {"workers": 2}, "2 training workers", "more memory"),
        (NODE, {"workers": 3}, "train.global_batch", "train.global_batch=6"),
        (replace(NODE, shm_gib=0.002), {"workers": 2}, "'clusterers'", "clusterers.max_slices"),
        (replace(NODE, shm_gib=0.5), {"workers": 2, "object_store_mb": 2000}, "/dev/shm", "--shm-size=2g"),
        (replace(NODE, cpus=64, memory_gib=0.3), {"workers": 2}, "labelling actors", "clusterers.n"),
        (replace(NODE, memory_gib=0.3), {"workers": 2}, "the driver's node", "larger head"),
        (replace(NODE, disk_gib=0.001), {"workers": 2, "local": True}, "local disk", "s3:// --root"),
    ],
)
def test_what_will_not_fit_is_refused_with_a_hint(
    machine: Machine,
    more: dict[str, Any],
    about: str,
    hint: str,
    demo: pipelines.Pretraining,
    counted: None,
) -> None:
    found = plan(demo, Pool("node", machine), **more)
    assert any(about in sentence and hint in sentence for sentence in found.refusals), found.refusals
    assert found.to_dict()["fits"] is False


def test_the_head_keeps_its_map_only_where_it_fits(demo: pipelines.Pretraining) -> None:
    many = replace(demo, clusterers=replace(demo.clusterers, n=32, k_min=64, k_max=64))
    roomy = Machine(cpus=4, memory_gib=16, gpus=1, gpu="T4", gpu_tflop_s=1, gpu_memory_gib=8)
    kept = plan(many, Pool("node", roomy), workers=1)
    assert kept.config.method.config.head_keep and not kept.refusals
    tight = replace(roomy, gpu_memory_gib=(kept.worker_bytes.device_bytes - 1) / 2**30)
    found = plan(many, Pool("node", tight), workers=1)
    assert not found.config.method.config.head_keep and not found.refusals
    assert any("method.head_keep=false" in note for note in found.notes)
    map_bytes = 2 * 32 * 64 * 32 * 32  # bfloat16 on a GPU; N K X Z
    saved = kept.worker_bytes.device_bytes - found.worker_bytes.device_bytes
    assert saved == pytest.approx(map_bytes, abs=2 * CACHE_BYTES)  # and what a slab needs beside it


def test_scans_of_several_numbers_of_channels_are_refused(demo: pipelines.Pretraining, counted: None) -> None:
    mixed = replace(SCANS, scans=(*SCANS.scans, replace(SCANS.scans[0], channels=2)))
    assert any("1 and 2 channels" in sentence for sentence in plan(demo, scans=mixed, workers=2).refusals)


def test_scans_that_are_too_small_for_a_crop_are_refused(demo: pipelines.Pretraining, counted: None) -> None:
    found = plan(demo, scans=sizes.equal_scans(3, (8, 8, 8)), workers=2)
    assert any("3 scans" in sentence and "crops.size_vox" in sentence for sentence in found.refusals)
    assert found.hours is None


# ----------------------------------------------------------------------------------------------- flags


def test_the_price_table_gives_currency_date_and_that_it_is_an_example() -> None:
    found = hardware.prices()
    assert found.currency == "USD"
    assert found.dated
    assert "example" in found.note
    assert found.traffic.zones_per_gb > 0 and found.traffic.nat_per_gb > 0
    for name, m in found.machines.items():
        assert 0 < (m.spot_price_per_h or 0) < m.price_per_h, name
        assert bool(m.gpus) == bool(m.gpu_tflop_s and m.gpu_memory_gib and m.gpu), name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("currency: EUR\ndated: '2026'", "machines"),
        ("dated: '2026'\nmachines: {a: {cpus: 1, memory_gib: 1}}", "currency"),
        ("currency: EUR\ndated: '2026'\nmachines: {a: {cpus: 1}}", "memory_gib"),
        (
            "currency: EUR\ndated: '2026'\ntraffic: {nat: 1}\nmachines: {a: {cpus: 1, memory_gib: 1}}",
            "nat_per_gb",
        ),
    ],
)
def test_an_incomplete_price_table_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as err:
        hardware.prices(str(tmp_path / "p.yaml"))
    assert "p.yaml" in str(err.value)


def test_a_cluster_file_overrides_the_price_table(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "pools:\n- {machine: g5.2xlarge, nodes: 16, spot: true, shm_gib: 11}\n- {cpus: 32, memory_gib: 128}\n"
        "head: {machine: m6i.xlarge}\npreemptions_per_node_h: 0.05\nzones: 3\n"
    )
    found = hardware.read_cluster(str(file), hardware.prices())
    assert (found.gpus, found.cpus, found.nodes) == (16, 160, 17)
    assert [p.spot for p in found.pools] == [True, False]
    assert found.pools[0].machine.shm_bytes == 11 * 2**30
    assert found.money(1.0, 1.0) == pytest.approx(16 * 0.404 + 0.192)
    assert found.preemptions_per_node_h == 0.05
    asked = request.Question(cluster=str(file), nat=True)
    assert replace(found, nat=True, traffic_prices=hardware.prices().traffic) == request.find_cluster(asked)
    assert (found.zones, request.find_cluster(replace(asked, zones=1)).zones) == (3, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pools: [{machine: g5.2xlarg}]", "did you mean 'g5.2xlarge'"),
        ("pools: [{machine: g5.2xlarge, nods: 3}]", "nods"),
        ("pools: [{cpus: 4, memory_gib: 0}]", "memory_gib is 0"),
        ("pools: [{machine: g5.2xlarge, nodes: 0}]", "at least 1"),
        ("pools: [{machine: g5.2xlarge, spot: maybe}]", "spot"),
        ("pools: [{machine: g5.2xlarge}]\npreemptions_per_node_h: -1", "preemptions_per_node_h"),
        ("pool: []", "did you mean '.*pools'"),
        ("pools: []", "pools"),
        ("pools: 3", "no list 'pools'"),
        ("pools: [3]", "must be a mapping"),
    ],
)
def test_a_wrong_cluster_file_is_refused_with_its_name(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as err:
        hardware.read_cluster(str(tmp_path / "c.yaml"), hardware.prices())
    assert "c.yaml" in str(err.value)


def test_flags_describe_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    own = {"cpus": 8.0, "memory_gib": 32.0, "price_per_h": 0.5}
    found = request.find_cluster(request.Question(node=NodeArgs(**own), nodes=3))
    assert (found.cpus, found.money(1.0, 1.0)) == (24, 1.5)
    changed = request.find_cluster(request.Question(machine="g5.2xlarge", node=NodeArgs(shm_gib=11.0)))
    assert (changed.gpus, changed.pools[0].machine.shm_gib) == (1, 11.0)
    with pytest.raises(UserError, match="memory_gib"):
        request.find_cluster(request.Question(node=NodeArgs(cpus=8.0)))
    here = request.find_cluster(request.Question())
    assert here.known_from == "this machine"
    assert here.cpus == os.cpu_count()


def test_nodes_of_a_ray_cluster_with_equal_resources_form_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = float(2**30)
    gpu_node = {"CPU": 8.0, "GPU": 1.0, "memory": 20 * gib, "object_store_memory": 9.5 * gib}
    nodes = [gpu_node | {"accelerator_type:A10G": 1.0}] * 2 + [{"memory": gib}]
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(hardware.ray_cluster, "node_resources", lambda: nodes)
    (pool,) = hardware.connected_cluster().pools
    assert (pool.nodes, pool.machine.cpus, pool.machine.gpus, pool.machine.gpu) == (2, 8, 1, "A10G")
    assert pool.machine.memory_gib == 29.5
    assert pool.machine.store_bytes(0) == pytest.approx(0.3 * 29.5 * gib)


@pytest.mark.parametrize("text", ["512x512", "512x512x0", "axbxc", "512x512x400x2"])
def test_a_shape_is_three_numbers(text: str) -> None:
    with pytest.raises(UserError, match="--shape"):
        request.triple(text, "--shape", int)
    assert request.triple("", "--shape", int) is None
    assert request.triple("0.8X0.8x1", "--spacing", float) == (0.8, 0.8, 1.0)


def test_listed_scans_are_counted_and_some_are_read(demo: pipelines.Pretraining, tmp_path: Path) -> None:
    phantom.write_dataset(str(tmp_path / "scans"), 4, size_vox=(40, 32, 24))
    found = request.find_scans(demo, request.Question(data=str(tmp_path / "scans" / "dataset.json")))
    assert len(found.scans) == 4
    files = (tmp_path / "scans" / "imagesTr").iterdir()
    assert found.stored_bytes == sum(f.stat().st_size for f in files)
    assert {s.shape_vox for s in found.scans} == {(40, 32, 24)}
    given = request.find_scans(demo, request.Question(data=str(tmp_path / "scans"), shape="9x9x9"))
    assert {s.shape_vox for s in given.scans} == {(9, 9, 9)}
    both = replace(demo, data=replace(demo.data, channels=("ct", "pet")))
    assert request.find_scans(both, request.Question(scans=3, shape="9x9x9")).channels == 2
    with pytest.raises(UserError, match="--shape"):
        request.find_scans(demo, request.Question(scans=3))
    with pytest.raises(UserError, match="no scans"):
        request.find_scans(demo, request.Question(data=str(tmp_path / "scans" / "imagesTs")))


def test_an_import_is_known_exactly(demo: pipelines.Pretraining, tmp_path: Path) -> None:
    phantom.write_dataset(str(tmp_path / "scans"), 2, size_vox=(40, 32, 24))
    table, made = pipelines.import_scans(str(tmp_path / "scans"), str(tmp_path / "root"), LocalExecutor())
    found = request.find_scans(demo, request.Question(data=made.uri))
    assert found.imported
    assert [s.scan_id for s in found.scans] == [s.scan_id for s in table.scans]
    with pytest.raises(UserError, match="--root"):
        request.find_scans(demo, request.Question(data=str(tmp_path / "scans"), import_scans=True))


# ------------------------------------------------------------------------------------------- constants


def test_constants_are_read_as_they_were_stored(tmp_path: Path) -> None:
    stored = str(tmp_path / "c.json")
    object_store.write(stored, CONSTANTS.to_json())
    assert speed.constants(stored) == CONSTANTS
    (tmp_path / "old.json").write_text(json.dumps({**json.loads(CONSTANTS.to_json()), "spread": 0.1}))
    with pytest.raises(UserError, match=r"spread.*--probe 60 --constants .*old\.json"):
        speed.constants(str(tmp_path / "old.json"))
    object_store.write(stored, replace(CONSTANTS, flop_s=0.0).to_json())
    with pytest.raises(UserError, match=r"flop_s is 0\.0; it must be above 0"):
        speed.constants(stored)
    shipped = speed.constants()
    assert shipped.step_fingerprint == ""
    assert shipped.date in Path(__file__).parents[1].joinpath("docs/planning.md").read_text()


def test_measured_memory_counts_for_the_same_work_only(
    demo: pipelines.Pretraining, work: memory.Work
) -> None:
    peak = 2000.0 * MIB
    known = replace(CONSTANTS, step_fingerprint=speed.step_fingerprint(demo, work), worker_peak_bytes=peak)
    found = planner.worker_memory(demo, work, 2, gpu=False, c=known)
    counted = planner.worker_memory(demo, work, 2, gpu=False, c=CONSTANTS)
    prefetched = counted.batches - work.micro.batch_bytes
    assert found.process + found.device_bytes == pytest.approx(peak + prefetched)
    other = replace(demo, train=replace(demo.train, batch_size=1))
    for cfg, gpu in ((other, False), (demo, True)):
        assert not known.measured(cfg, work, gpu)
    assert not known.measured(demo, replace(work, facts=replace(work.facts, in_channels=2)), gpu=False)


class Recording(LocalExecutor):
    """Keeps the last epoch of what it trains."""

    def train(self, job: Any, dataset: Any) -> dict[str, Any]:
        result = super().train(job, dataset)
        self.epoch = result["history"][-1]
        return result


def test_the_probe_measures_constants_that_predict_the_measured_step(
    demo: pipelines.Pretraining, work: memory.Work, tmp_path: Path, one_thread: None
) -> None:
    """With the loop in this process; a cluster is measured by the same code."""
    phantom.write_dataset(str(tmp_path / "scans"), 1, size_vox=(48, 48, 48))
    scans = measuring.importers.sources(str(tmp_path / "scans" / "imagesTr"))
    executor, where = Recording(device="cpu"), at(1, 1)
    found = measuring.measure(demo, work, str(tmp_path), executor, where, 0.3, scans)
    assert found.measured(demo, work, gpu=False)
    assert found.worker_peak_bytes == executor.epoch["peak_memory_mb"] * MIB
    assert 1e4 < found.cut_voxels_s < 1e9  # 110,000 voxels take from a thousandth of a second to ten
    predicted = speed.step(replace(demo.train, global_batch=demo.train.batch_size), work, where, found)
    busy_share = 1 - executor.epoch["data_wait_share"]
    measured_s = busy_share * demo.train.batch_size / executor.epoch["samples_per_s"]
    assert predicted.compute_s == pytest.approx(measured_s, rel=0.1)
    assert not [name for name in os.listdir(tmp_path) if "plan" in name], "what the probe wrote is deleted"


# ---------------------------------------------------------------------------------------------- command


def test_the_command_tells_what_fits_and_fails_when_something_does_not(
    counted: None, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ask = ["plan", "--recipe", "demo", "--scans", "12", "--shape", "48x48x48", "--machine", "m6i.4xlarge"]
    assert logonet(monkeypatch, *ask, "--workers", "2", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"]
    assert found["steps"] == 240
    assert found["bytes"]["crops"] == 48
    assert found["money"] == pytest.approx(found["hours"] * 0.768)
    assert [row["workers"] for row in found["scaling"]] == list(planner.WORKERS)
    assert logonet(monkeypatch, *ask, "--workers", "5") == 1
    assert "WILL NOT FIT  train.global_batch" in capsys.readouterr().out
    assert logonet(monkeypatch, *ask, "--workers", "2", "--set", "crops.size_vox=[32,32,20]") == 2
    assert "does not fit backbone" in capsys.readouterr().err
    assert logonet(monkeypatch, "plan", "--recipe", "demo") == 2
    assert "--scans with --shape" in capsys.readouterr().err


def test_the_json_and_the_tables_are_complete(demo: pipelines.Pretraining, counted: None) -> None:
    found = plan(demo, Pool("node", replace(NODE, price_per_h=1e4), 2), workers=2)
    values = json.loads(json.dumps(found.to_dict()))
    keys = (
        "fits refusals notes config cluster constants scans bytes stages worker_bytes labeller_bytes "
        "data_task_bytes micro_batch cache_gb steps step scaling checkpoints traffic validation hours money currency"
    )
    assert set(values) == set(keys.split())
    stages = ["import", "crops", "prepared", "clusterers", "labels", "pretrain"]
    assert [s["name"] for s in values["stages"]] == stages
    said = table.text(found)
    for part in (*values["bytes"], *values["worker_bytes"], "1024", "efficiency", "USD", CONSTANTS.machine):
        assert part in said or part in ("crops", "known_from"), part
    assert said.endswith("fits\n")


@pytest.mark.slow
def test_the_command_probes_a_ray_cluster_and_stores_the_constants(
    ray_local: None, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    net = networks.tiny("dynunet")
    ask = [
        "plan",
        "--recipe",
        "demo",
        "--scans",
        "12",
        "--shape",
        "48x48x48",
        "--workers",
        "2",
        "--probe",
        "4",
    ]
    ask += ["--set", f"backbone={json.dumps({'name': 'dynunet', **net})}", "--json"]
    stored = str(tmp_path / "measured.json")
    assert logonet(monkeypatch, *ask, "--constants", stored) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["constants"]["step_fingerprint"]
    assert found["constants"] == json.loads(Path(stored).read_text())
    assert any("real steps" in note for note in found["notes"])
