"""A plan: sizes to the byte, memory on shapes, the model of steps and stages by hand, and what will not fit."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import logonet

from logonet import networks, pipelines, recipes, training
from logonet.clustering import kmeans
from logonet.core import seeding
from logonet.core.errors import UserError
from logonet.data import crop_shards, cropping, volume
from logonet.distributed.cluster import Resources
from logonet.planning import hardware, measuring, memory, planner, request, sizes, speed, table
from logonet.planning.constants import Constants, StepTimes, step_fingerprint
from logonet.planning.hardware import Cluster, Machine, Pool
from logonet.planning.memory import MicroBatch
from logonet.planning.speed import Load, Place
from logonet.storage import object_store
from logonet.training import checkpoints

MIB = 1 << 20
DEMO_SCANS = sizes.equal_scans(12, (48, 48, 48), (1.0, 1.0, 1.0))
CONSTANTS = Constants(
    machine="a made-up one",
    date="2026-11-25",
    device="cpu",
    cores=4,
    flop_s=1e10,
    serial_share=0.5,
    busy_slowdown=1.5,
    spread=0.0,
    optimizer_bytes_s=1e9,
    store_read_bytes_s=1e8,
    store_write_bytes_s=1e8,
    store_node_bytes_s=4e8,
    request_s=0.01,
    import_voxels_s=1e7,
    cut_voxels_s=2e7,
    prepare_bytes_s=1e8,
    task_s=0.001,
    allreduce_latency_s=1e-3,
    allreduce_bytes_s=1e8,
    copy_bytes_s=1e9,
    disk_bytes_s=1e8,
    kmeans_flop_s=1e10,
    kmeans_init_flop_s=1e9,
    label_flop_s=1e11,
    worker_bytes=500 * MIB,
    task_bytes=300 * MIB,
    start_s=10.0,
    start_core_s=4.0,
    epoch_s=0.5,
)
LOAD = Load(
    global_batch=8, batch_size=1, flop=1e10, gradient_bytes=8e7, flat=True, crop_bytes=1e6, row_bytes=2e6
)
NODE = Machine(cpus=4, memory_gib=16)
GPU = replace(NODE, gpus=2, gpu="T4", gpu_tflop_s=1, gpu_memory_gib=0.02)


def at(workers: int, per_node: int, threads: int = 1, machine: Machine = NODE, **more: Any) -> Place:
    nodes = -(-workers // per_node)
    settings: dict[str, Any] = {"gpu": False, "data_cores": 1e9, "shared": False} | more
    return Place(
        machine=machine, workers=workers, nodes=nodes, per_node=per_node, threads=threads, **settings
    )


@pytest.fixture(scope="module")
def demo() -> pipelines.Pretraining:
    """The recipe of that name, on a network that is quickly counted."""
    net = {"name": "dynunet", **networks.tiny("dynunet")}
    return pipelines.resolve(replace(recipes.demo(), split=None, backbone=net))


@pytest.fixture(scope="module")
def work(demo: pipelines.Pretraining) -> planner.Work:
    return planner.work(demo, gpu=False)


# ----------------------------------------------------------------------------------------------- bytes

NAMES = {"F32": np.float32, "I64": np.int64, "U16": np.uint16, "I16": np.int16, "U8": np.uint8}


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text("abcdefgh./_0123456789", min_size=1, max_size=12),
        st.tuples(st.sampled_from(sorted(NAMES)), st.lists(st.integers(0, 5), max_size=3).map(tuple)),
        max_size=12,
    ),
    st.none() | st.dictionaries(st.text("abc", min_size=1), st.text('ab"\\ü{}', max_size=20), max_size=1),
)
def test_a_safetensors_file_is_as_long_as_the_library_makes_it(
    tensors: dict[str, Any], meta: dict[str, str] | None
) -> None:
    from safetensors.numpy import save

    real = save({n: np.zeros(shape, NAMES[dtype]) for n, (dtype, shape) in tensors.items()}, metadata=meta)
    assert sizes.safetensors_bytes(tensors, meta) == len(real)


def test_shards_labels_and_clusterers_have_the_bytes_that_are_written() -> None:
    rng = seeding.rng(0, "test")
    crops_RCXYZ = rng.integers(0, 9, (3, 1, 8, 8, 4), dtype=np.uint16)
    scan_id = "hippocampus_001-0123456789"
    assert sizes.shard_bytes(scan_id, 3, (1, 8, 8, 4)) == len(crop_shards.shard_bytes(scan_id, crops_RCXYZ))
    cfg = kmeans.Config(n=3, k_min=3, k_max=5, iterations=2)
    counts = kmeans.cluster_counts(cfg)
    slices_ST = rng.integers(0, 65536, (60, 64), dtype=np.uint16)
    meta = {"config": {"n": 3}, "crops": "0" * 16}
    fits = [kmeans.fit_one(slices_ST, k, i, cfg) for i, k in enumerate(counts)]
    real = kmeans.ClustererSet.from_fitted(fits, meta).to_bytes()
    # An inertia has a digit or two more or less, and a header is filled up to a multiple of 8.
    assert abs(sizes.clusterers_bytes(counts, 64, meta) - len(real)) <= 3 * len(counts) + 8
    from safetensors.numpy import save

    assert sizes.labels_bytes(5, 3, 7) == len(save({"labels_PNZ": np.zeros((5, 3, 7), np.int16)}))


def test_a_checkpoint_and_the_final_weights_have_the_bytes_that_are_written(
    work: planner.Work, demo: pipelines.Pretraining, tmp_path: Path
) -> None:
    method = training.build_method(demo.backbone, demo.method, work.facts)
    params = {n: p for n, p in method.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(params.values())
    for p in params.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    state = {f"{k}/{n}": v for n, p in params.items() for k, v in optimizer.state[p].items()}
    uri = str(tmp_path / "step-1")
    checkpoints.save_state(uri, "0" * 16, checkpoints.State(1, dict(method.state_dict()), state, [{}]))
    written = {e.uri.rsplit("/", 1)[1]: e.size_bytes for e in object_store.listing(uri)}
    net = work.network
    assert net.model_file == written["model.safetensors"]
    assert net.optimizer_file == written["optimizer.safetensors"]
    tensors = sum(written[f"{name}.safetensors"] for name in checkpoints.TENSOR_FILES)
    assert net.checkpoint_bytes == tensors
    final = checkpoints.save_final(str(tmp_path), method, [])
    assert net.backbone_file == final["backbone.safetensors"].size_bytes
    assert net.model_file == final["method.safetensors"].size_bytes
    assert net.gradient_bytes == sum(4 * p.numel() for p in params.values())


def test_stages_move_what_a_slow_count_says() -> None:
    """Three scans, one of them too small: 2 crops of 32^3 of each of two, 3 clusterers, 5 steps of 2 in 2 epochs."""
    cfg = pipelines.Pretraining(
        crops=cropping.Config(size_vox=(32, 32, 32), per_scan=2),
        clusterers=kmeans.Config(n=3, k_min=4, k_max=4, max_slices=64),
        train=training.Config(epochs=2, global_batch=2, warmup_epochs=0, keep_checkpoints=1),
    )
    rows = [sizes.Scan("a", shape, None, 1000.0) for shape in ((40, 40, 40), (32, 32, 99), (8, 8, 8))]
    net = sizes.Network({"backbone.w": ("F32", (10,))}, {"backbone.w": (10,)}, 10, 0, 4)
    found = sizes.sizes(cfg, sizes.Scans(tuple(rows), "told"), net)
    crop = 2 * 32**3
    assert (found.num_crops, found.too_small, found.crop_bytes, found.steps) == (4, 1, crop, 4)
    assert found.sampled_crops == 2  # 64 slices
    by_name = {s.name: s for s in found.stages}
    assert list(by_name) == ["import", "crops", "clusterers", "labels", "pretrain"]
    assert by_name["import"].read == by_name["crops"].read == 3000
    assert 4 * crop < by_name["crops"].written < 4 * crop + 2000
    centroids = 4 * 12 * 32 * 32
    assert by_name["clusterers"].read == 2 * crop + centroids
    assert by_name["clusterers"].node_shared == 2 * crop
    assert by_name["labels"].read == found.clusterers_bytes + 4 * crop
    assert by_name["labels"].node_shared == centroids
    assert by_name["pretrain"].read == 4 * 2 * crop
    assert by_name["pretrain"].written == 2 * net.checkpoint_bytes + net.backbone_file + net.model_file
    assert by_name["pretrain"].kept == net.checkpoint_bytes + net.backbone_file + net.model_file


def test_what_is_resampled_is_judged_by_its_new_size() -> None:
    scan = sizes.Scan("a", (64, 64, 20), (1.0, 1.0, 5.0), 0.0)
    fine = cropping.Config(size_vox=(64, 64, 64), min_image_share=0.5)
    assert not sizes.yields_crops(scan, fine)
    assert sizes.yields_crops(scan, replace(fine, spacing_mm=(1.0, 1.0, 1.0)))  # 96 slices of 1 mm
    assert volume.resampled_shape((64, 64, 20), (1, 1, 5), (1, 1, 1)) == (64, 64, 96)


# ---------------------------------------------------------------------------------------------- memory


def test_counting_on_shapes_equals_counting_a_real_step(
    work: planner.Work, demo: pipelines.Pretraining, one_thread: None
) -> None:
    """The same module on real tensors: every storage that lives, and when."""
    rng = seeding.rng(0, "test")
    rows = [memory.prepared(work.facts, demo.method, rng) for _ in range(2)]
    batch = {k: torch.from_numpy(np.stack([r[k] for r in rows])) for k in rows[0]}
    module = training.build_method(demo.backbone, demo.method, work.facts).train()
    live = memory._Live()
    with live:
        loss, _ = module(batch, 0.0)
        held = live.live_bytes
        loss.backward()
    # Masked rows are counted as if all were masked, so a plan is a little above.
    assert live.peak_bytes <= work.micro.peak_bytes <= 1.1 * live.peak_bytes
    assert held <= work.micro.forward_bytes <= 1.1 * held
    assert work.micro.batch_bytes == sum(t.numel() * t.element_size() for t in batch.values())


def test_bfloat16_halves_what_is_held_and_no_arithmetic(
    work: planner.Work, demo: pipelines.Pretraining
) -> None:
    sample = memory.prepared(work.facts, demo.method, seeding.rng(0, "test"))
    half = memory.micro_batch(demo.backbone, demo.method, work.facts, bf16=True, sample=sample)
    assert 0.4 * work.micro.forward_bytes < half.forward_bytes < 0.9 * work.micro.forward_bytes
    assert half.flop == work.micro.flop > 1e8


@pytest.mark.slow
def test_a_method_that_looks_at_numbers_is_counted_without_itself_and_says_so() -> None:
    options = {"name": "swinunetr", **networks.tiny("swinunetr")}
    facts = planner.DataSpec(size_vox=(64, 64, 64), batch_size=2)
    sample = memory.prepared(facts, {"name": "simtrot"}, seeding.rng(0, "test"))
    found = memory.micro_batch(options, {"name": "simtrot"}, facts, bf16=False, sample=sample)
    assert "network alone" in found.known_from
    assert found.peak_bytes > found.forward_bytes > 0


def test_a_workers_memory_by_hand() -> None:
    """100 B of gradients within a pass of 1000; a second micro-batch stands beside them."""
    one = MicroBatch(forward_bytes=900, peak_bytes=1000, batch_bytes=10, flop=1.0, known_from="told")
    common: dict[str, Any] = {"weights": 120, "gradients": 100, "state_bytes": 320, "largest_file": 200}
    common |= {"pass_": one, "workers": 2, "flat_sync": True, "process": 5000, "prefetched": 7}
    alone = memory.worker(**common, accumulate=1)
    assert alone.activations == 900
    assert alone.device_bytes == 120 + 100 + 200 + 900 + 17
    assert alone.cpu_bytes == alone.device_bytes + 5000 + 320 + 400
    assert memory.worker(**common, accumulate=2).activations == 1000
    small = replace(one, forward_bytes=0, peak_bytes=130)
    # Two copies of the gradients, when the activations are gone, are more than the pass was.
    assert memory.worker(**{**common, "pass_": small}, accumulate=1).sync == 70
    assert memory.worker(**{**common, "pass_": small, "workers": 1}, accumulate=1).sync == 0


# ---------------------------------------------------------------------------------------------- a step


def test_the_largest_of_two_lognormal_times_has_a_closed_form() -> None:
    for spread in (0.05, 0.3, 1.0):
        expected = 2 * 0.5 * (1 + math.erf(spread / 2))  # 2 Phi(spread / sqrt 2)
        assert speed.expected_max(2, spread) == pytest.approx(expected, rel=1e-5)
    assert speed.expected_max(1, 0.4) == pytest.approx(1.0, rel=1e-6)


def test_the_largest_of_many_is_that_of_draws() -> None:
    times_TN = np.exp(0.2 * seeding.rng(0, "test").standard_normal((20_000, 64)) - 0.02)
    assert speed.expected_max(64, 0.2) == pytest.approx(times_TN.max(1).mean(), rel=0.01)
    assert speed.summed_spread(0.2, 1) == pytest.approx(0.2)
    assert speed.summed_spread(0.01, 100) == pytest.approx(0.001, rel=1e-3)


def test_a_step_of_one_worker_by_hand() -> None:
    """8 micro-batches of 1 s and 0.08 s of AdamW; no one to wait for."""
    found = speed.step(LOAD, at(1, 1), CONSTANTS)
    assert found.accumulate == 8
    assert found.compute_s == pytest.approx(8.08)
    assert (found.stragglers_s, found.allreduce_s) == (0.0, 0.0)
    assert found.samples_per_s == pytest.approx(8 / 8.08)


def test_threads_shorten_what_they_can() -> None:
    assert speed.micro_batch_s(LOAD, at(1, 1, threads=4), CONSTANTS) == pytest.approx(0.5 + 0.5 / 4)
    times = StepTimes("x", 1e10, {"1": 2.0, "2": 1.2}, 2.4, 0.1, 0.0, 9, 1.0, 0.01)
    measured = replace(LOAD, times=times)
    assert speed.micro_batch_s(measured, at(1, 1, threads=2), CONSTANTS) == 1.2
    # 1.2 = 2 (s + (1 - s) / 2): a fifth cannot be shared.
    assert speed.micro_batch_s(measured, at(1, 1, threads=4), CONSTANTS) == pytest.approx(2 * (0.2 + 0.8 / 4))


def test_workers_on_as_many_cores_pay_for_each_other() -> None:
    """4 on 4 cores: 2 micro-batches of 1.5 s each, AdamW, the flat copy of 80 MB twice at 1 GB/s; then the ring."""
    found = speed.step(LOAD, at(4, 4), CONSTANTS)
    assert found.compute_s == pytest.approx(2 * 1.5 + 0.08 + 0.16)
    assert found.allreduce_s == pytest.approx(2 * 3 * 1e-3 + 2 * 3 / 4 * 8e7 / 1e8)


def test_workers_that_share_cores_take_turns() -> None:
    """8 on 4 cores do the same work as 4, and each has a copy of the rest to do: the cores' sum counts."""
    found = speed.step(LOAD, at(8, 8), CONSTANTS)
    assert found.compute_s == pytest.approx(8 * (1.5 + 0.08 + 0.16) / 4)
    assert found.allreduce_s == pytest.approx(2 * (2 * 7 * 1e-3 + 2 * 7 / 8 * 8e7 / 1e8))


def test_data_tasks_on_the_same_cores_are_paid_for_there() -> None:
    """8 samples of 1 MB at 100 MB/s and a task's millisecond for every four: 0.082 core seconds a step."""
    apart, together = (speed.step(LOAD, at(4, 4, shared=shared), CONSTANTS) for shared in (False, True))
    prepare = 8 * (0.01 + 0.001 / speed.rows_per_task(LOAD))
    assert together.compute_s - apart.compute_s == pytest.approx(prepare / 4)


def test_training_waits_where_data_tasks_are_too_few() -> None:
    found = speed.step(LOAD, at(8, 1, data_cores=0.01), CONSTANTS)
    assert (
        found.total_s == found.data_s == pytest.approx(8 * (0.01 + 0.001 / speed.rows_per_task(LOAD)) / 0.01)
    )


def test_a_network_between_nodes_sets_the_rings_rate() -> None:
    slow = replace(NODE, network_gbit_s=0.08, latency_s=0.01)  # 10 MB/s
    found = speed.step(LOAD, at(8, 4, machine=slow), CONSTANTS)
    assert found.allreduce_s == pytest.approx(2 * 7 * 0.01 + 2 * 7 / 8 * 8e7 / 1e7)


def test_ddp_hides_what_the_backward_pass_is_long_enough_for() -> None:
    ddp = replace(LOAD, flat=False)
    ring = speed.step(LOAD, at(4, 4), CONSTANTS).allreduce_s
    exposed = speed.step(ddp, at(4, 4), CONSTANTS).allreduce_s
    assert exposed == pytest.approx(max(0.1 * ring, ring - 0.5 * 2 / 3 * 1.5))


workers_st = st.sampled_from([1, 2, 4, 8, 16, 64, 256, 1024])


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.0, 0.6),
    st.floats(1e6, 1e12),
    st.floats(1e4, 1e9),
    st.sampled_from([1, 2, 4, 8, 32]),
    st.booleans(),
)
def test_more_workers_never_help_each_other(
    spread: float, flop: float, gradient_bytes: float, per_node: int, flat: bool
) -> None:
    """Efficiency falls from 1 with the number of workers, samples/s of whole nodes never do."""
    load = replace(LOAD, flop=flop, gradient_bytes=gradient_bytes, flat=flat, global_batch=per_node)
    known = replace(CONSTANTS, spread=spread)
    rows = speed.scaling(load, at(per_node, per_node), known, [per_node * 2**i for i in range(9)])
    efficiency = [row.efficiency for row in rows]
    assert all(0 < e <= 1 + 1e-9 for e in efficiency)
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(efficiency))
    each = [row.step.busy_s for row in rows]
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(each))


@settings(max_examples=60, deadline=None)
@given(workers_st, st.floats(0.01, 1.0), st.sampled_from(["allreduce_bytes_s", "copy_bytes_s", "flop_s"]))
def test_a_slower_part_never_makes_a_faster_step(n: int, factor: float, part: str) -> None:
    load = replace(LOAD, global_batch=1024)
    slower = replace(CONSTANTS, **{part: getattr(CONSTANTS, part) * factor})
    assert speed.step(load, at(n, 4), slower).total_s >= speed.step(load, at(n, 4), CONSTANTS).total_s - 1e-9


# --------------------------------------------------------------------------------------------- placing


def test_workers_are_placed_as_a_job_places_them() -> None:
    """A Ray of our own gives every worker a place; a cluster gives whole CPUs, and leaves some to the data tasks."""
    own = Cluster((Pool("here", Machine(cpus=2, memory_gib=24)),))
    placed = [speed.place(own, n) for n in (1, 2, 16)]
    assert [(p.per_node, p.threads) for p in placed] == [(1, 2), (2, 1), (16, 1)]
    assert [p.oversold for p in placed] == [1, 1, 8]
    cpus = Cluster((Pool("node", Machine(cpus=16, memory_gib=64), nodes=4),), head=Pool("head", NODE))
    far = speed.place(cpus, 8)
    assert (far.nodes, far.per_node, far.threads, far.gpu) == (4, 2, 6, False)
    gpus = Cluster((
        Pool("gpu", Machine(cpus=8, memory_gib=32, gpus=1, gpu_tflop_s=70), nodes=16),
        Pool("cpu", Machine(cpus=16, memory_gib=64), nodes=4),
    ), head=Pool("head", NODE))  # fmt: skip
    spread = speed.place(gpus, 16)
    assert (spread.nodes, spread.per_node, spread.gpu, spread.shared) == (16, 1, True, False)
    assert spread.data_cores == 16 * 8 + 4 * 16 - 16


# ------------------------------------------------------------------------------------------ hours, money


def test_stages_take_what_their_slowest_part_takes(demo: pipelines.Pretraining, work: planner.Work) -> None:
    found = sizes.sizes(demo, DEMO_SCANS, work.network)
    cluster = Cluster((Pool("node", NODE, nodes=2),), head=Pool("head", NODE))
    step = speed.step(replace(LOAD, global_batch=4), at(2, 1), CONSTANTS)
    took = {d.name: d for d in speed.durations(demo, found, cluster, step, CONSTANTS)}
    voxels = 12 * 48**3
    assert took["import"].seconds == pytest.approx(voxels / (8 * 1e7) + 12 * 3 * 0.01 / 8)
    assert took["import"].bound == "decoding"
    labelling = 2 * 48 * 32 * sum(found.cluster_sizes) * 1024 / (1e11 * 7)
    stored = (found.clusterers_bytes + 48 * 2 * 32**3) / (2 * 4e8) + found.labels_bytes / (2 * 4e8)
    assert took["labels"].seconds == pytest.approx(max(labelling, stored))
    training = 240 * step.total_s + 20 * (0.5 + work.network.checkpoint_bytes / 1e9)
    assert found.steps == 240
    assert took["pretrain"].seconds == pytest.approx(10 + 2 * 4 / 8 + training)


def test_other_clusterings_than_kmeans_have_no_hours(demo: pipelines.Pretraining, work: planner.Work) -> None:
    cfg = replace(demo, clusterers=replace(demo.clusterers, algorithm="spectral"))
    found = sizes.sizes(cfg, DEMO_SCANS, work.network)
    step = speed.step(replace(LOAD, global_batch=4), at(1, 1), CONSTANTS)
    took = speed.durations(cfg, found, Cluster((Pool("node", NODE),)), step, CONSTANTS)
    assert [d.seconds is None for d in took] == [False, False, True, False, False]
    assert planner._cost(took, Cluster((Pool("node", NODE),))) == (None, None)


def test_gpus_are_paid_for_while_they_train_and_spot_costs_its_own_price() -> None:
    gpu = Pool("gpu", replace(NODE, gpus=1, price_per_h=4.0, spot_price_per_h=1.0), nodes=3, spot=True)
    cpu = Pool("cpu", replace(NODE, price_per_h=0.5), nodes=2)
    cluster = Cluster((gpu, cpu), head=Pool("head", replace(NODE, price_per_h=0.1)))
    took = [speed.Duration("crops", 1800.0, ""), speed.Duration("pretrain", 7200.0, "")]
    assert planner._cost(took, cluster) == (2.5, pytest.approx(2 * 3 * 1.0 + 2.5 * (2 * 0.5 + 0.1)))
    with pytest.raises(UserError, match="cpu has no spot price"):
        planner._cost(took, replace(cluster, pools=(gpu, replace(cpu, spot=True))))


def test_nodes_that_are_taken_away_cost_time(demo: pipelines.Pretraining, work: planner.Work) -> None:
    found = sizes.sizes(demo, DEMO_SCANS, work.network)
    step = speed.step(replace(LOAD, global_batch=4), at(2, 1), CONSTANTS)
    spot = Cluster(
        (Pool("node", replace(NODE, spot_price_per_h=1.0), nodes=2, spot=True),), preemptions_per_node_h=6
    )
    calm = replace(spot, preemptions_per_node_h=0.0)
    lost, none = (speed.durations(demo, found, c, step, CONSTANTS)[-1].seconds or 0.0 for c in (spot, calm))
    start = 10 + 2 * 4 / 8
    assert lost - none == pytest.approx((none - start) * 12 / 3600 * (start + 12 * step.total_s / 2))


# ------------------------------------------------------------------------------------- what will not fit


def refusals(
    cfg: pipelines.Pretraining,
    work: planner.Work,
    monkeypatch: pytest.MonkeyPatch,
    machine: Machine = NODE,
    scans: sizes.Scans = DEMO_SCANS,
    nodes: int = 1,
    local: bool = False,
    **resources: Any,
) -> str:
    monkeypatch.setattr(planner, "work", lambda cfg, gpu: work)
    cluster = Cluster((Pool("node", machine, nodes),))
    found = planner.make(cfg, scans, cluster, Resources(**resources), CONSTANTS, local_root=local)
    assert all(one.count(". ") == 0 and ";" in one for one in found.refusals), "one sentence with a mend"
    return " | ".join(found.refusals)


def test_what_fits_is_not_refused(
    demo: pipelines.Pretraining, work: planner.Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refusals(demo, work, monkeypatch, workers=2) == ""


@pytest.mark.parametrize(
    ("why", "machine", "more", "sentence"),
    [
        ("gpus", replace(GPU, gpu_memory_gib=8), {"workers": 4}, "2 GPUs for 4 workers; plan --workers 2"),
        ("gpu memory", GPU, {"workers": 2}, "T4 has 20.5 MiB; lower train.batch_size"),
        ("cpus", NODE, {"workers": 2, "cpus_per_worker": 4.0}, "--cpus-per-worker 1.5 or less"),
        (
            "memory",
            replace(NODE, memory_gib=1.2),
            {"workers": 2},
            "cleared by Ray at 95% of it; put 1 on a node",
        ),
        ("batch", NODE, {"workers": 3}, "train.global_batch=6"),
        (
            "store",
            replace(NODE, shm_gib=0.002),
            {"workers": 2},
            "'clusterers' puts 3.0 MiB into Ray's object store",
        ),
        ("shm", replace(NODE, shm_gib=0.5), {"workers": 2, "object_store_mb": 2000}, "--shm-size=2g"),
        ("labellers", replace(NODE, cpus=64, memory_gib=0.3), {"workers": 2}, "labelling actors of up to"),
        ("driver", replace(NODE, memory_gib=0.3), {"workers": 2}, "the driver holds"),
        (
            "disk",
            replace(NODE, disk_gib=0.001),
            {"workers": 2, "local": True},
            "GiB free; give an s3:// --root",
        ),
    ],
)
def test_what_will_not_fit_is_said_with_the_mend(
    why: str,
    machine: Machine,
    more: dict[str, Any],
    sentence: str,
    demo: pipelines.Pretraining,
    work: planner.Work,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert sentence in refusals(demo, work, monkeypatch, machine, **more)


def test_scans_too_small_for_a_crop_are_refused_before_they_are_read(
    demo: pipelines.Pretraining, work: planner.Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = sizes.equal_scans(3, (8, 8, 8))
    assert "none of the 3 scans is large enough" in refusals(demo, work, monkeypatch, scans=tiny)


# --------------------------------------------------------------------------------------------- asking


def test_the_price_table_says_its_currency_date_and_that_it_is_an_example() -> None:
    found = hardware.prices()
    assert found.currency == "USD"
    assert found.dated
    assert "example" in found.note
    for name, machine in found.machines.items():
        assert 0 < (machine.spot_price_per_h or 0) < machine.price_per_h, name
        assert bool(machine.gpus) == bool(machine.gpu_tflop_s and machine.gpu_memory_gib and machine.gpu), (
            name
        )


def test_a_clusters_file_lays_its_own_keys_on_the_table(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "pools:\n- {machine: g5.2xlarge, nodes: 16, spot: true, shm_gib: 11}\n- {cpus: 32, memory_gib: 128}\n"
        "head: {machine: m6i.xlarge}\npreemptions_per_node_h: 0.05\n"
    )
    found = hardware.read_cluster(str(file), hardware.prices())
    assert (found.gpus, found.cpus, found.nodes) == (16, 160, 17)
    assert found.pools[0].machine.shm_bytes == 11 * 2**30
    assert found.price_per_h == pytest.approx(16 * 0.404 + 0.192)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("pools: [{machine: g5.2xlarg}]", "did you mean 'g5.2xlarge'"),
        ("pools: [{machine: g5.2xlarge, nods: 3}]", "did you mean '.*nodes|unknown config key"),
        ("pools: [{cpus: 4, memory_gib: 0}]", "memory_gib is 0"),
        ("pools: [{machine: g5.2xlarge, nodes: 0}]", "at least 1"),
        ("pool: []", "did you mean 'pools'"),
        ("pools: 3", "no list 'pools'"),
    ],
)
def test_a_clusters_file_that_is_wrong_says_where(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=sentence):
        hardware.read_cluster(str(tmp_path / "c.yaml"), hardware.prices())


def test_a_node_may_be_told_by_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    own = {"cpus": 8.0, "memory_gib": 32.0, "price_per_h": 0.5}
    found = request.find_cluster(request.Question(node=own, nodes=3))
    assert (found.cpus, found.price_per_h) == (24, 1.5)
    laid = request.find_cluster(request.Question(machine="g5.2xlarge", node={"shm_gib": 11.0}))
    assert (laid.gpus, laid.pools[0].machine.shm_gib) == (1, 11.0)
    with pytest.raises(UserError, match="memory_gib"):
        request.find_cluster(request.Question(node={"cpus": 8.0}))
    here = request.find_cluster(request.Question())
    assert here.known_from == "this machine"
    assert here.cpus >= 1


@pytest.mark.parametrize("text", ["512x512", "512x512x0", "axbxc", "512x512x400x2"])
def test_a_shape_is_three_numbers(text: str) -> None:
    with pytest.raises(UserError, match="three numbers"):
        request.triple(text, "--shape", int)
    assert request.triple("", "--shape", int) is None
    assert request.triple("0.8X0.8x1", "--spacing", float) == (0.8, 0.8, 1.0)


def test_scans_that_are_listed_are_counted_and_three_of_them_read(
    demo: pipelines.Pretraining, tmp_path: Path
) -> None:
    from logonet.data import phantom

    phantom.write_dataset(str(tmp_path / "scans"), 4, size_vox=(40, 32, 24))
    found = request.find_scans(demo, request.Question(data=str(tmp_path / "scans" / "dataset.json")))
    files = sorted((tmp_path / "scans" / "imagesTr").iterdir())
    assert len(found.scans) == 4
    assert found.stored_bytes == sum(f.stat().st_size for f in files)
    assert {s.shape_vox for s in found.scans} == {(40, 32, 24)}
    labels = sum(f.stat().st_size for f in (tmp_path / "scans" / "labelsTr").iterdir())
    assert found.label_bytes == pytest.approx(labels)
    told = request.find_scans(demo, request.Question(data=str(tmp_path / "scans"), shape_vox=(9, 9, 9)))
    assert {s.shape_vox for s in told.scans} == {(9, 9, 9)}


def test_constants_come_back_as_they_were_stored(tmp_path: Path) -> None:
    from logonet.planning import constants

    times = StepTimes("x", 1e9, {"1": 2.0}, 2.4, 0.1, 0.05, 9, 1e9, 0.01)
    whole_ = replace(CONSTANTS, step=times)
    object_store.write(str(tmp_path / "c.json"), whole_.to_json())
    assert constants.read(str(tmp_path / "c.json")) == whole_
    shipped = constants.defaults()
    assert shipped.step is None
    assert shipped.date in Path(__file__).parents[1].joinpath("docs/planning.md").read_text()


def test_measured_steps_count_for_the_very_same_work_only(
    demo: pipelines.Pretraining, work: planner.Work
) -> None:
    found = sizes.sizes(demo, DEMO_SCANS, work.network)
    name = step_fingerprint(demo.backbone, demo.method, (32, 32, 32), 2, "fp32")
    known = replace(CONSTANTS, step=StepTimes(name, 1e9, {"1": 2.0}, 2.4, 0.1, 0.05, 9, 1e9, 0.01))
    assert planner.load_of(demo, found, work, False, known).times is known.step
    assert planner.load_of(demo, found, work, True, known).times is None
    other = replace(demo, train=replace(demo.train, batch_size=1))
    assert planner.load_of(other, found, work, False, known).times is None


def test_timing_spends_its_budget_and_leaves_the_first_out() -> None:
    calls: list[int] = []
    assert len(measuring.timed(calls.append, 0.0, least=4)) == 3
    assert calls == [0, 1, 2, 3]


def test_the_command_says_what_fits_and_fails_when_something_does_not(
    work: planner.Work, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr(planner, "work", lambda cfg, gpu: work)
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
    said = capsys.readouterr().out
    assert re.search(r"WILL NOT FIT  train\.global_batch 4 is \d batches .* there are 5 workers", said)
    assert logonet(monkeypatch, *ask, "--workers", "2", "--set", "crops.size_vox=[32,32,20]") == 2
    assert "does not fit backbone" in capsys.readouterr().err
    assert logonet(monkeypatch, "plan", "--recipe", "demo") == 2
    assert "--scans with --shape" in capsys.readouterr().err


def test_the_table_says_everything_that_json_says(
    demo: pipelines.Pretraining, work: planner.Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "work", lambda cfg, gpu: work)
    cluster = Cluster((Pool("node", replace(NODE, price_per_h=1.0), 2),), known_from="a test")
    found = planner.make(demo, DEMO_SCANS, cluster, Resources(workers=2), CONSTANTS)
    said = table.text(found)
    for part in (
        "import",
        "clusterers",
        "pseudo-labels",
        "AdamW's moments",
        "1024",
        "efficiency",
        "USD",
        "a test",
    ):
        assert part in said, part
    assert said.rstrip().endswith("fits")
