"""A plan's sizes are exact, and its memory is what a real step takes."""

from __future__ import annotations

import itertools
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import SIZE, SIZES, crops_dataset

from logonet import networks, pipelines, recipes, training
from logonet.clustering import fitting, kmeans
from logonet.clustering.pseudo_labels import Labeller
from logonet.core import seeding
from logonet.core.config import Component
from logonet.core.execution import InProcess
from logonet.data import classes, crop_shards, cropping, phantom, prepared_scans
from logonet.methods import DataSpec
from logonet.pipelines import preparation
from logonet.planning import memory, planner, sizes, speed
from logonet.storage import object_store
from logonet.training import checkpoints

SCANS = sizes.equal_scans(12, (48, 48, 48), (1.0, 1.0, 1.0))


@pytest.fixture(scope="module")
def demo() -> pipelines.Pretraining:
    """The demo's recipe with a network that is quickly counted."""
    net = {"name": "dynunet", **networks.tiny("dynunet")}
    return pipelines.resolve(replace(recipes.PRETRAINING["demo"](), split=None, backbone=net))


@pytest.fixture(scope="module")
def work(demo: pipelines.Pretraining) -> memory.Work:
    return planner.work(demo, gpu=False)


# ----------------------------------------------------------------------------------------------- bytes

NAMES = {"F32": np.float32, "I64": np.int64, "U16": np.uint16, "I16": np.int16, "U8": np.uint8}


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text("abcdefgh./_0123456789", min_size=1, max_size=12),
        st.tuples(st.sampled_from(sorted(NAMES)), st.lists(st.integers(0, 5), max_size=3).map(tuple)),
        max_size=12,
    ),
    st.none() | st.dictionaries(st.text("abc", min_size=1), st.text('ab"\\ü{}', max_size=20), max_size=1),
)
def test_a_safetensors_file_has_the_size_that_the_library_writes(
    tensors: dict[str, Any], meta: dict[str, str] | None
) -> None:
    from safetensors.numpy import save

    real = save({n: np.zeros(shape, NAMES[dtype]) for n, (dtype, shape) in tensors.items()}, metadata=meta)
    assert sizes.safetensors_bytes(tensors, meta) == len(real)


def test_shards_labels_and_clusterers_have_the_sizes_that_are_written() -> None:
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
    # The number of an inertia's digits varies, and a header is padded to a multiple of 8.
    assert abs(sizes.clusterers_bytes(counts, 64, meta) - len(real)) <= 3 * len(counts) + 8


@pytest.mark.parametrize(
    ("size_vox", "spacing_mm", "channels"),
    [
        ((40, 36, 50), (1.5, 1.5, 2.0), 1),
        ((130, 64, 65), (1.5, 1.5, 1.5), 1),
        ((60, 50, 20), (1.0, 1.1, 5.0), 2),
        ((70, 40, 33), (0.8, 0.9, 3.3), 3),
    ],
)
def test_a_prepared_scan_has_the_size_that_is_written(
    size_vox: tuple[int, int, int], spacing_mm: tuple[float, float, float], channels: int
) -> None:
    scan, scan_id = phantom.phantom(3, size_vox, spacing_mm)[0], "phantom_003-0123456789"
    scan = replace(scan, array_CXYZ=np.repeat(scan.array_CXYZ, channels, 0))
    row = sizes.Scan(scan_id, size_vox, spacing_mm, 0.0, channels)
    for cfg in (cropping.Config(), cropping.Config(spacing_mm=(1.5, 1.5, 2.0))):
        image_CXYZ = prepared_scans.prepare_image(scan, "CT", cfg, scan_id)
        shape = sizes.prepared_shape(row, cfg)
        assert shape == image_CXYZ.shape
        assert sizes.prepared_bytes(scan_id, shape) == len(prepared_scans.image_file(scan_id, image_CXYZ))


@pytest.mark.parametrize("shape", [(1, 20, 17, 5), (2, 8, 15, 31)])
def test_a_crop_reads_what_the_mean_over_all_places_says(
    shape: tuple[int, int, int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With chunks of 8 voxels; along one axis of each scan the crop is longer than the scan."""
    monkeypatch.setattr(prepared_scans, "CHUNK_VOX", 8)
    size_vox, read, of_node = (9, 6, 10), [], prepared_scans.node_cache.read

    def watched(uri: str, **what: Any) -> bytes:
        read.append(what["length"])
        return of_node(uri, **what)

    monkeypatch.setattr(prepared_scans.node_cache, "read", watched)
    image_CXYZ = seeding.rng(0, "test").integers(0, 65536, shape, dtype=np.uint16)
    blob = prepared_scans.image_file("scan", image_CXYZ)
    ref = prepared_scans.ref_of("scan", prepared_scans.write(f"{tmp_path}/scan.safetensors", blob))
    room = [max(0, n - m) for n, m in zip(shape[1:], size_vox)]
    places = list(itertools.product(*(range(r + 1) for r in room)))
    for place in places:
        prepared_scans._tensor.cache_clear()
        prepared_scans._header.cache_clear()
        prepared_scans._tensor(ref.image, "coverage")
        corner = [a if n >= m else (n - m) // 2 for a, n, m in zip(place, shape[1:], size_vox)]
        prepared_scans.read_image(ref, corner, size_vox)
    expected = sizes.crop_read_bytes(len(blob), shape, size_vox)
    assert expected == pytest.approx(sum(read) / len(places))


@pytest.mark.parametrize("fresh", [False, True])
def test_labels_have_the_size_that_is_written(
    fresh: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: memory.Work
) -> None:
    monkeypatch.setattr(preparation, "LABELLED_CROPS", 4)
    rng, table = np.random.default_rng(0), crops_dataset(tmp_path / "crops").table
    n, per_scan = len(SIZES), len(table.by_scan()[0])
    cfg = pipelines.Pretraining(
        data=classes.Config(fresh_crops=fresh),
        crops=cropping.Config(size_vox=SIZE, per_scan=per_scan),
        clusterers=kmeans.Config(n=n, k_min=4, k_max=4),
    )
    ids = dict.fromkeys(table.refs.column("scan_id"))
    scans = sizes.Scans(tuple(sizes.Scan(i, SIZE, None, 0.0) for i in ids), "given")
    found = sizes.sizes(cfg, scans, work.network)
    centroids_VT = rng.random((sum(SIZES), SIZE[0] * SIZE[1]), np.float32)
    labeller = Labeller(kmeans.ClustererSet(centroids_VT, np.array(SIZES)))
    some = preparation.some_crops(table) if fresh else table
    fitting.label_crops(some, labeller, f"{tmp_path}/labels", InProcess())
    shards = object_store.listing(f"{tmp_path}/labels/shards")
    assert found.labelled_crops == len(some)
    assert found.files["labels"] == sum(e.size_bytes for e in shards)


@pytest.mark.parametrize(("codes", "length"), [(40, 30), (30, 64), (600, 520)])
def test_a_labeller_has_the_size_that_is_sent(codes: int, length: int) -> None:
    centroids_VT = seeding.rng(0, "test").random((codes, length), np.float32)
    labeller = Labeller(kmeans.ClustererSet(centroids_VT, np.array([codes - 10, 10])))
    buffers: list[pickle.PickleBuffer] = []
    pickle.dumps(labeller, protocol=5, buffer_callback=buffers.append)
    sent = sum(buffer.raw().nbytes for buffer in buffers)
    assert sent == centroids_VT.nbytes + sizes.screen_bytes(codes, length)


def test_a_checkpoint_and_the_final_weights_have_the_sizes_that_are_written(
    work: memory.Work, demo: pipelines.Pretraining, tmp_path: Path
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
    final = checkpoints.save_final(str(tmp_path), method, method.backbone, [])
    assert net.backbone_file == final["backbone.safetensors"].size_bytes
    assert net.model_file == final["method.safetensors"].size_bytes
    assert net.gradient_bytes == sum(4 * p.numel() for p in params.values())


def test_the_stages_move_what_is_counted_by_hand() -> None:
    """Three scans, one of them too small: 2 crops of 32^3 from each of two, 3 clusterers, 2 epochs of 2 steps of 2."""
    cfg = pipelines.Pretraining(
        data=classes.Config(fresh_crops=False),
        crops=cropping.Config(size_vox=(32, 32, 32), per_scan=2),
        clusterers=kmeans.Config(n=3, k_min=4, k_max=4, max_slices=64),
        train=training.Config(
            epochs=2, global_batch=2, warmup_epochs=0, keep_checkpoints=1, checkpoint_every_s=0
        ),
    )
    rows = [sizes.Scan("a", shape, None, 1000.0) for shape in ((40, 40, 40), (32, 32, 99), (8, 8, 8))]
    net = sizes.Network({"backbone.w": ("F32", (10,))}, {"backbone.w": (10,)}, 40)
    found = sizes.sizes(cfg, sizes.Scans(tuple(rows), "given"), net)
    crop = 2 * 32**3
    assert (found.num_crops, found.too_small, found.steps) == (4, 1, 4)
    assert found.sample_bytes == 2 * crop  # 64 slices
    import_, crops, clusterers, labels, pretrain = found.stages
    assert import_.read == crops.read == 3000
    assert 4 * crop < crops.written < 4 * crop + 2000
    centroids = 4 * 12 * 32 * 32
    assert clusterers.read == 2 * crop + centroids
    assert clusterers.node_shared == 2 * crop
    assert labels.read == found.files["clusterers"] + 4 * crop
    screen = 4 * 12 * (12 + 2) + 4 * 1024 * 12 + 16 * 12
    assert labels.node_shared == centroids + screen
    final = net.backbone_file + net.model_file
    assert pretrain.read == 4 * 2 * (crop + 2 * 3 * 32)
    assert found.training_bytes == 4 * (crop + 2 * 3 * 32)
    assert pretrain.written == 2 * net.checkpoint_bytes + final
    assert pretrain.kept == net.checkpoint_bytes + final
    often = replace(cfg, train=replace(cfg.train, checkpoint_every_steps=1))
    pretrain = sizes.sizes(often, sizes.Scans(tuple(rows), "given"), net).stages[-1]
    assert pretrain.written == 4 * net.checkpoint_bytes + final
    fresh = replace(cfg, data=classes.Config())
    found = sizes.sizes(fresh, sizes.Scans(tuple(rows), "given"), net)
    stages = {s.name: s for s in found.stages}
    prepared = [sizes.prepared_bytes("a", (1, *s.shape_vox)) for s in rows[:2]]
    assert (stages["prepared"].read, stages["prepared"].kept) == (2000, sum(prepared))
    assert found.training_bytes == found.files["prepared"] == sum(prepared)
    # All of the first file; of the second, a crop at 0 to 32 of 67 places touches one of the chunks of 64 and 35 alone.
    chunks = 2 * 32 * 32 * (33 * 64 + 31 * 99 + 4 * 35) / 68
    read = prepared[0] - 8 + prepared[1] - 8 - 2 * 32 * 32 * 99 + chunks
    assert stages["pretrain"].read == pytest.approx(4 * 2 * read / 2)
    assert stages["pretrain"].node_shared == 2 * sizes.ROW_BYTES + centroids + screen


def test_channels_count_in_crops_prepared_scans_and_slices(
    demo: pipelines.Pretraining, work: memory.Work
) -> None:
    one, two = (sizes.sizes(demo, sizes.equal_scans(12, (48, 48, 48), None, c), work.network) for c in (1, 2))
    assert two.files["crop"] == 2 * one.files["crop"]
    assert two.centroid_bytes == 2 * one.centroid_bytes
    assert two.label_flop == 2 * one.label_flop
    assert two.scans.stored_bytes == 2 * one.scans.stored_bytes
    assert two.files["prepared"] == 12 * sizes.prepared_bytes(two.scans.scans[0].scan_id, (2, 48, 48, 48))
    assert two.files["labels"] == one.files["labels"]
    assert planner.work(demo, gpu=False, channels=2).facts.in_channels == 2


def test_an_import_that_is_done_and_a_method_without_clusters_have_fewer_stages(
    demo: pipelines.Pretraining, work: memory.Work
) -> None:
    plain = replace(demo, method={"name": "mae3d"})
    done = replace(SCANS, imported=True)
    assert [s.name for s in sizes.sizes(plain, done, work.network).stages] == [
        "crops",
        "prepared",
        "pretrain",
    ]


def test_a_scan_is_judged_by_its_size_after_resampling() -> None:
    scan = sizes.Scan("a", (64, 64, 20), (1.0, 1.0, 5.0), 0.0)
    fine = cropping.Config(size_vox=(64, 64, 64), min_image_share=0.5)
    assert not sizes.yields_crops(scan, fine)
    assert sizes.yields_crops(scan, replace(fine, spacing_mm=(1.0, 1.0, 1.0)))  # 96 slices of 1 mm


# ---------------------------------------------------------------------------------------------- memory


def test_a_count_on_shapes_equals_a_count_of_a_real_step(
    work: memory.Work, demo: pipelines.Pretraining, one_thread: None
) -> None:
    """The same module on real tensors."""
    rng = seeding.rng(0, "test")
    rows = [memory.prepared(work.facts, demo.method, rng) for _ in range(2)]
    batch = {k: torch.from_numpy(np.stack([r[k] for r in rows])) for k in rows[0]}
    module = training.build_method(demo.backbone, demo.method, work.facts).train()
    live = memory._Live()
    with live:
        loss, _ = module(batch, 0.0)
        held = live.live_bytes
        loss.backward()
    # Masked rows count as if all were masked, so the plan is slightly above.
    assert live.peak_bytes <= work.micro.peak_bytes <= 1.1 * live.peak_bytes
    assert held <= work.micro.forward_bytes <= 1.1 * held
    assert work.micro.batch_bytes == sum(t.numel() * t.element_size() for t in batch.values())


def test_bfloat16_halves_memory_but_not_arithmetic(work: memory.Work, demo: pipelines.Pretraining) -> None:
    sample = memory.prepared(work.facts, demo.method, seeding.rng(0, "test"))
    half = memory.micro_batch(demo.backbone, demo.method, work.facts, bf16=True, sample=sample)
    assert 0.4 * work.micro.forward_bytes < half.forward_bytes < 0.9 * work.micro.forward_bytes
    assert half.flop == work.micro.flop > 1e8


@pytest.mark.slow
def test_a_method_whose_shapes_depend_on_data_is_not_counted_and_the_plan_says_so() -> None:
    backbone, method = Component("swinunetr", networks.tiny("swinunetr")), Component("simtrot")
    facts = DataSpec(size_vox=(64, 64, 64), batch_size=2)
    sample = memory.prepared(facts, method, seeding.rng(0, "test"))
    found = memory.micro_batch(backbone, method, facts, bf16=False, sample=sample)
    assert "without its method" in found.known_from
    assert found.peak_bytes > found.forward_bytes > 0


def test_a_workers_memory_by_hand(demo: pipelines.Pretraining, work: memory.Work) -> None:
    """100 B of gradients in a pass of 1000 B; from the second pass on both are held."""
    net = sizes.Network({"w": ("F32", (25,))}, {"w": (25,)}, 120)
    own = replace(work, network=net, micro=memory.MicroBatch(900, 1000, 10, 1.0, "given"), sample_bytes=1)
    two = replace(demo, train=replace(demo.train, global_batch=2 * demo.train.batch_size))
    defaults = speed.constants()
    alone = planner.worker_memory(two, own, workers=2, gpu=True, c=defaults)
    assert (alone.gradients, alone.moments, alone.activations) == (100, 200, 900)
    assert alone.device_bytes == 120 + 100 + 200 + 900 + 10
    assert alone.checkpoint == net.checkpoint_bytes + 2 * max(net.optimizer_file, net.model_file)
    assert planner.worker_memory(two, own, workers=1, gpu=True, c=defaults).activations == 1000
    # A flat all-reduce copies the gradients, which are more than this pass holds.
    small = replace(own, micro=replace(own.micro, peak_bytes=130))
    assert planner.worker_memory(two, small, workers=2, gpu=False, c=defaults).activations == 100
    assert planner.worker_memory(two, small, workers=2, gpu=True, c=defaults).activations == 30
