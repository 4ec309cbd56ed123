"""Plans of finetunings: what is prepared, stored and segmented is what a run prepares, stores and segments."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import logonet
from test_plan import CONSTANTS, MIB, NODE, Recording, at

from logonet import networks, pipelines, recipes, training
from logonet.core import seeding
from logonet.core.config import Component
from logonet.core.errors import UserError
from logonet.data import classes, phantom, prepared_scans, splits
from logonet.data.prepared_scans import CropSampling
from logonet.distributed.cluster import Resources
from logonet.inference import sliding_window
from logonet.methods import DataSpec
from logonet.networks import SegOut
from logonet.pipelines.finetuning import Init
from logonet.planning import labelled, measuring, memory, planner, request, sizes, speed, table
from logonet.planning.hardware import Cluster, Pool
from logonet.planning.question import Question
from logonet.training.local import LocalExecutor

TINY = Component("dynunet", networks.tiny("dynunet"))
NET = sizes.Network({"backbone.w": ("F32", (10,))}, {"backbone.w": (10,)}, 40)
# Counted within 2 s; the larger networks take up to a minute.
QUICK = [("finetune", name) for name in ("glmae_brats", "uxnet3d_amos")]
EVERY = [(job, name) for job, known in (("pretrain", recipes.PRETRAINING), ("finetune", recipes.FINETUNING))
         for name in known]  # fmt: skip


def finetuning(**train: Any) -> pipelines.Finetuning:
    """Two crops of 32^3 of each of two cases a step, validated at epochs 2, 4 and 5."""
    cfg = pipelines.Finetuning(
        data=classes.Config(classes=("a", "b")),
        split=splits.Config(test_share=0.2, folds=4, fraction=0.5),
        crops=CropSampling(size_vox=(32, 32, 32)),
        backbone=TINY,
        train=training.Config(
            **{"epochs": 5, "global_batch": 2, "warmup_epochs": 0, "validate_every_epochs": 2, **train}
        ),
        validation=sliding_window.Config(overlap=0.5),
    )
    return pipelines.resolve_finetuning(cfg)


# ----------------------------------------------------------------------------------------------- split


@settings(max_examples=80, deadline=None)
@given(
    st.integers(5, 60),
    st.sampled_from([0.0, 0.05, 0.2]),
    st.integers(2, 5),
    st.sampled_from([None, 0, 1]),
    st.sampled_from([1.0, 0.5, 0.1]),
    st.booleans(),
)
def test_scans_are_dealt_out_in_the_numbers_of_the_split(
    count: int, test_share: float, folds: int, fold: int | None, fraction: float, named: bool
) -> None:
    names = tuple(f"scan_{i:07d}" for i in range(2)) if named else ()
    cfg = splits.Config(test_share, folds, fold, fraction, test_names=names)
    rows: Any = [
        SimpleNamespace(
            label_uri="x", dataset="d", subject="", scan_id=s.scan_id, split="train", fold=-1, sha256=s.scan_id,
            label_sha256="",
        )
        for s in sizes.equal_scans(count, (8, 8, 8)).scans
    ]  # fmt: skip
    try:
        split = splits.make(rows, cfg)
    except UserError:  # more folds than subjects are left
        return
    found = [s.part for s in labelled.parted(sizes.equal_scans(count, (8, 8, 8)), cfg).scans]
    assert [found.count(p) for p in ("train", "val", "test")] == [
        len(split.train), len(split.val), len(split.test)
    ]  # fmt: skip
    assert len(found) == count


def test_a_split_that_leaves_nobody_is_one_sentence() -> None:
    cfg = finetuning()
    twelve = replace(cfg.split, test_names=tuple("abcdefghijkl"))
    with pytest.raises(UserError, match="of 12 scans the split puts 12 into test"):
        labelled.parted(sizes.equal_scans(12, (40, 40, 40)), twelve)
    alone = labelled.parted(sizes.equal_scans(4, (40, 40, 40)), replace(cfg.split, fold=None))
    with pytest.raises(UserError, match="no validation cases"):
        labelled.sizes(cfg, alone, NET, 3)


# ----------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("size_vox", [(40, 36, 50), (130, 64, 65)])
def test_labels_have_at_most_the_size_that_is_planned(size_vox: tuple[int, int, int]) -> None:
    """Exactly that, where every class has as many voxels as positions are kept."""
    rng, name = seeding.rng(0, "test"), "phantom_003-0123456789"
    labels_XYZ = rng.integers(0, 4, size_vox).astype(np.uint8)
    assert labelled.labels_bytes(name, size_vox, 4) == len(prepared_scans.labels_file(name, labels_XYZ))
    labels_XYZ[labels_XYZ == 2] = 0
    assert labelled.labels_bytes(name, size_vox, 4) > len(prepared_scans.labels_file(name, labels_XYZ))


def test_crops_of_a_case_read_what_the_mean_over_all_places_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With chunks of 8 voxels and one crop, all of them anywhere or all on a class."""
    monkeypatch.setattr(prepared_scans, "CHUNK_VOX", 8)
    shape, size_vox, read, of_node = (2, 15, 8, 24), (9, 6, 10), [], prepared_scans.node_cache.read

    def watched(uri: str, **what: Any) -> bytes:
        read.append(what["length"])
        return of_node(uri, **what)

    monkeypatch.setattr(prepared_scans.node_cache, "read", watched)
    rng = seeding.rng(0, "test")
    blobs = (
        prepared_scans.image_file("scan", rng.integers(0, 65536, shape, dtype=np.uint16)),
        # More than POSITIONS voxels of each class.
        prepared_scans.labels_file("scan", (rng.integers(0, 9, shape[1:]) > 3).astype(np.uint8)),
    )
    ref = prepared_scans.ref_of(
        "scan", *(prepared_scans.write(f"{tmp_path}/{i}", blob) for i, blob in enumerate(blobs))
    )
    places = list(itertools.product(*(range(n - m + 1) for n, m in zip(shape[1:], size_vox))))
    for share in (0.0, 1.0):
        read.clear()
        crops = CropSampling(size_vox, per_case=1, foreground_share=share)
        for corner in places:
            prepared_scans._tensor.cache_clear()
            prepared_scans._header.cache_clear()
            prepared_scans.draw_corners(ref, crops, rng)
            prepared_scans.read_crop(ref, corner, size_vox)
        labelled.labels_bytes.cache_clear()
        lengths = len(blobs[0]), len(blobs[1])
        expected = labelled.case_read_bytes(lengths, shape, crops, num_classes=2)
        assert expected == pytest.approx(sum(read) / len(places))


def test_the_stages_of_a_finetuning_by_hand() -> None:
    """Of 10 scans 2 test, 2 validate and half of the other 6 train."""
    cfg = finetuning(keep_checkpoints=1)
    scans = labelled.parted(sizes.equal_scans(10, (40, 40, 20)), cfg.split)
    found = labelled.sizes(cfg, scans, NET, 3)
    import_, cases, finetune = found.stages
    name, shape = scans.scans[0].scan_id, (1, 40, 40, 20)
    image, labels = sizes.prepared_bytes(name, shape), labelled.labels_bytes(name, shape[1:], 3)
    assert import_.read == 10 * 1.3 * 40 * 40 * 20
    assert cases.read == 8 * 1.3 * 40 * 40 * 20
    assert cases.kept == 8 * (image + labels)
    assert (found.steps_per_epoch, found.steps, found.num_crops, found.validations) == (2, 10, 6, 3)
    # Windows begin at 0 and 8 along two axes; along the third the scan is shorter than one.
    assert found.windows == (4, 4)
    crops = labelled.case_read_bytes((image, labels), shape, cfg.crops, 3)
    assert finetune.read == pytest.approx(10 * 2 * crops + 3 * 2 * (image + labels))
    assert found.training_bytes == 5 * (image + labels)
    final = 3 * NET.backbone_file + NET.model_file
    assert finetune.written == 3 * NET.checkpoint_bytes + 3 * NET.backbone_file + final
    assert finetune.kept == NET.checkpoint_bytes + 3 * NET.backbone_file + final
    assert found.segmenting_bytes == 8 * 40 * 40 * 20 + 4 * 4 * 32 * 40 * 32
    never = labelled.sizes(finetuning(validate_every_epochs=0), scans, NET, 3)
    assert (never.validations, never.windows, never.validation_bytes) == (0, (), 0)
    assert never.training_bytes == 3 * (image + labels)
    assert never.stages[-1].kept == 2 * NET.checkpoint_bytes + 2 * NET.backbone_file + NET.model_file


class Counting(torch.nn.Module):
    """Counts the windows that it sees."""

    seen = 0

    def forward(self, x_BCXYZ: torch.Tensor) -> SegOut:
        self.seen += len(x_BCXYZ)
        return SegOut(x_BCXYZ.repeat(1, 2, 1, 1, 1), [], None)


@pytest.mark.parametrize("shape", [(20, 9, 16), (8, 8, 8), (5, 33, 17)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
def test_windows_are_as_many_as_the_network_sees(shape: tuple[int, int, int], overlap: float) -> None:
    net = Counting().eval()
    sliding_window.labels(
        net, np.zeros((1, *shape), np.float32), (8, 8, 8), sliding_window.Config(overlap=overlap), "cpu"
    )
    assert sliding_window.num_windows(shape, (8, 8, 8), overlap) == net.seen


# ---------------------------------------------------------------------------------------- memory and time


def test_windows_take_what_a_real_pass_takes(one_thread: None) -> None:
    spec = DataSpec(size_vox=(32, 32, 32), num_classes=3, batch_size=2)
    found = memory.windows(TINY, spec, 2, bf16=False)
    net = networks.from_component(TINY, 1, 3).eval()
    live = memory._Live()
    with torch.no_grad(), live:
        net(torch.zeros(2, 1, 32, 32, 32))
    assert found.peak_bytes == live.peak_bytes
    assert found.flop == memory.windows(TINY, spec, 1, bf16=False).flop > 1e6


def test_a_sample_counts_with_all_its_crops_and_their_labels() -> None:
    cfg = finetuning(batch_size=2)
    one = replace(cfg, crops=replace(cfg.crops, per_case=1))
    two_crops, one_crop = (planner.work(c, gpu=False, channels=3) for c in (cfg, one))
    assert two_crops.facts == DataSpec((32, 32, 32), 3, num_classes=3, batch_size=4)
    assert two_crops.crop_bytes == 2 * one_crop.crop_bytes == 2 * 7 * 32**3
    assert two_crops.sample_bytes == 2 * one_crop.sample_bytes == 2 * (4 * 3 + 1) * 32**3
    assert two_crops.row_bytes == 2 * 15 * 32**3
    assert two_crops.micro.flop == pytest.approx(2 * one_crop.micro.flop)
    assert two_crops.micro.known_from == "counted on shapes"
    of_regions = replace(cfg.data, regions={"both": ("a", "b"), "one": ("b",)})
    assert sizes.facts_of(replace(cfg, data=of_regions)).regions == ((1, 2), (2,))
    assert sizes.facts_of(replace(cfg, data=classes.Config())).num_classes == 2


def test_a_validation_by_hand() -> None:
    """Windows of 2 s on one core: 7 and 5 for the two workers that have scans, and each reads its own."""
    cfg = finetuning()
    scans = labelled.parted(sizes.equal_scans(10, (40, 40, 20)), cfg.split)
    of = replace(labelled.sizes(cfg, scans, NET, 3), windows=(4, 5, 3), validation_bytes=8 * 10**8)
    work: Any = SimpleNamespace(windows=memory.Windows(1000, 2e10))
    found = speed.validation(cfg, of, work, at(2, 2), CONSTANTS)
    assert found == speed.Validation(3, 3, 12, pytest.approx(7 * 2 + 8e8 / 4e8))
    # Eight workers of a thread each share four cores, but only three have anything to do.
    alone = speed.validation(cfg, of, work, at(8, 8), CONSTANTS)
    assert alone is not None
    assert alone.seconds == pytest.approx(5 * 2 + 2)
    mirrored = replace(cfg, validation=replace(cfg.validation, mirror=True))
    eight = speed.validation(mirrored, of, work, at(2, 2), CONSTANTS)
    assert eight is not None
    assert eight.seconds == pytest.approx(8 * 14 + 2)
    assert speed.validation(cfg, of, SimpleNamespace(windows=None), at(2, 2), CONSTANTS) is None  # type: ignore[arg-type]


def test_validation_stops_training_and_may_need_the_most_memory() -> None:
    cfg = finetuning()
    cluster = Cluster((Pool("node", replace(NODE, price_per_h=2.0)),))
    scans = labelled.parted(sizes.equal_scans(10, (40, 40, 20), (1.0, 1.0, 1.0)), cfg.split)
    found = planner.make(cfg, scans, cluster, Resources(workers=2), CONSTANTS)
    assert found.refusals == ()
    assert [s.name for s in found.stages] == ["import", "cases", "finetune"]
    assert found.step and found.validation
    expected_s = 10 + 10 * found.step.total_s + 3 * found.validation.seconds
    assert found.stages[-1].seconds == pytest.approx(expected_s)
    # Images and labels of 10 and of 8 scans.
    assert found.stages[0].seconds == pytest.approx(10 * 2 * 32000 / 1e7 / 4)
    assert found.stages[1].seconds == pytest.approx(8 * 2 * 32000 / 2e7 / 4)
    assert found.hours == pytest.approx(sum(s.seconds or 0 for s in found.stages) / 3600)
    assert found.money == pytest.approx(2 * found.hours)
    assert "8 windows of 2 scans, 3 times" in table.text(found)
    large = labelled.parted(sizes.equal_scans(10, (400, 400, 200), (1.0, 1.0, 1.0)), cfg.split)
    more = planner.make(cfg, large, cluster, Resources(workers=2), CONSTANTS)
    # Sums of logits of a layer of 32 voxels, and the scan.
    held = 8 * 400 * 400 * 200 + 4 * 4 * 400 * 200 * 32
    assert more.worker_bytes.activations >= held > found.worker_bytes.activations
    slow = planner.make(cfg, large, cluster, Resources(workers=2), replace(CONSTANTS, flop_s=1e7))
    assert slow.stages[-1].waits_for == "validation"


def test_the_probe_measures_a_finetuning(tmp_path: Path, one_thread: None) -> None:
    phantom.write_dataset(str(tmp_path / "scans"), 1, size_vox=(48, 48, 48))
    scans = measuring.importers.sources(str(tmp_path / "scans" / "imagesTr"))
    cfg = finetuning()
    work, executor = planner.work(cfg, gpu=False), Recording(device="cpu")
    found = measuring.measure(cfg, work, str(tmp_path), executor, at(1, 1), 0.3, scans)
    assert found.measured(cfg, work, gpu=False)
    assert found.worker_peak_bytes == executor.epoch["peak_memory_mb"] * MIB
    assert math.isfinite(executor.epoch["train_dice"])
    assert found.prepare_bytes_s > 1e4


# ------------------------------------------------------------------------------------------- the command


def test_the_command_plans_the_recipe_of_either_job(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    small = f"backbone={json.dumps({'name': 'dynunet', **TINY.config})}"
    ask = ["plan", "--recipe", "demo", "--job", "finetune", "--scans", "12", "--shape", "48x48x48", "--json"]
    ask += ["--machine", "m6i.4xlarge", "--workers", "2", "--set", small]
    assert logonet(monkeypatch, *ask, "--classes", "4", "--channels", "2") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 350
    assert list(found["config"]["data"]["classes"]) == ["class 1", "class 2", "class 3"]
    assert found["validation"]["times"] == 2
    assert found["bytes"]["crop"] == 2 * 2 * 32**3
    assert logonet(monkeypatch, *ask, "--classes", "1") == 2
    assert "--classes 1 leaves nothing beside background" in capsys.readouterr().err
    unknown = replace(finetuning(), backbone=Component(""), init=Init("models:/liver@best"))
    with pytest.raises(UserError, match=r"models:/liver@best; set backbone\.name"):
        request.resolve(unknown)


def test_labelled_scans_that_are_listed_count(tmp_path: Path) -> None:
    phantom.write_dataset(str(tmp_path), 8, size_vox=(40, 32, 24))
    found = request.find_scans(finetuning(), Question(data=str(tmp_path / "dataset.json")))
    assert sorted(s.part for s in found.scans) == sorted(
        ["test"] * 2 + ["val"] + ["train"] * 2 + ["spare"] * 3
    )
    cfg = replace(finetuning(), data=classes.Config())
    _, made = pipelines.import_scans(str(tmp_path / "dataset.json"), str(tmp_path / "root"), LocalExecutor())
    imported = request.find_scans(cfg, Question(data=made.uri))
    assert imported.imported and imported.labels is not None
    assert [s.part for s in imported.scans].count("val") == 1
    assert len(imported.labels.members) > 1  # those that the dataset names
    with pytest.raises(UserError, match="has a label"):
        request.find_scans(finetuning(), Question(data=str(tmp_path / "imagesTr")))


@pytest.mark.parametrize(
    ("job", "name"),
    [pytest.param(*each, marks=() if each in QUICK else pytest.mark.slow) for each in EVERY],
)
def test_every_recipe_is_planned(job: str, name: str) -> None:
    known: Any = {"pretrain": recipes.PRETRAINING, "finetune": recipes.FINETUNING}[job]
    channels = 4 if "brats" in name else 1
    asked = Question(
        scans=30, shape="512x512x150", channels=channels, machine="p5.48xlarge", nodes=2,
        resources=Resources(workers=16),
    )  # fmt: skip
    found = request.plan(request.resolve(known[name]()), asked)
    *_, last = found.stages
    assert last.name == job
    assert last.kept >= found.bytes["checkpoint"] + found.bytes["final_backbone"] > 0
    assert found.worker_bytes.device_bytes > found.worker_bytes.weights > 0
    assert found.micro_batch.flop > 1e8
    # Recipes for a single GPU have no work for 16 workers, and say so.
    assert (found.hours or 0) > 0 or "train.global_batch" in found.refusals[0]
    validates = found.config.train.validate_every_epochs > 0 and job == "finetune"
    assert (found.validation is not None) == (validates and found.step is not None)
