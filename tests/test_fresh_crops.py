"""Fresh crops: cut anew at every draw of prepared scans, labelled on the spot, the same for the same draw."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import HERE, quick_backbone, stored_case

from logonet import pipelines, training
from logonet.clustering import kmeans
from logonet.clustering.kmeans import ClustererSet
from logonet.clustering.pseudo_labels import Labeller
from logonet.core import seeding
from logonet.data import classes, cropping, manifest, phantom, prepared_scans, preparing
from logonet.data.crop_shards import slices_of
from logonet.data.manifest import Manifest, Scan
from logonet.pipelines import preparation
from logonet.storage.parquet import Rows
from logonet.training.dataset import FreshCrops
from logonet.training.schedule import SampleSchedule

SIZE = (16, 16, 16)
CROPS = cropping.Config(size_vox=SIZE, per_scan=3, min_foreground=0.2)


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> tuple[Scan, ...]:
    from logonet.data import importers

    folder = tmp_path_factory.mktemp("scans")
    phantom.write_dataset(str(folder), 3, size_vox=(70, 36, 30))  # more than one chunk along X
    return Manifest.of(map(manifest.inspect, importers.sources(str(folder)))).scans


@pytest.fixture(scope="module")
def refs(scans: tuple[Scan, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[prepared_scans.Ref, ...]:
    prepare = preparing.PrepareScan(
        None, prepared_scans.Config.of(CROPS), str(tmp_path_factory.mktemp("store"))
    )
    found = tuple(prepare(scan) for scan in scans)
    assert all(isinstance(ref, prepared_scans.Ref) for ref in found)
    return found  # type: ignore[return-value]


@pytest.fixture(scope="module")
def clusterers() -> ClustererSet:
    rng = np.random.default_rng(0)
    sizes = np.array([3, 5])
    return ClustererSet(rng.random((8, SIZE[0] * SIZE[1]), np.float32), sizes)


def dataset(
    refs: tuple[prepared_scans.Ref, ...], found: ClustererSet | None = None, **changes: Any
) -> FreshCrops:
    crops = replace(CROPS, **changes)
    from logonet import methods

    name = "mae3d" if found is None else "masked_clusters"
    options = {} if found is None else {"phi1": 0.2}
    cfg = methods.config(name, options)
    schedule = SampleSchedule(len(refs) * crops.per_scan, 4, seed=0)
    labeller = Labeller(found) if found else None
    return FreshCrops(name, cfg, schedule, Rows.of(refs, prepared_scans.Ref), crops, labeller)


def whole(scan: Scan) -> np.ndarray:
    """The prepared scan from the definition: RAS, windowed, uint16."""
    return prepared_scans.prepare_image(manifest.load(scan), scan.modality, CROPS, scan.scan_id)


def test_a_crop_is_a_box_of_the_prepared_scan(
    scans: tuple[Scan, ...], refs: tuple[prepared_scans.Ref, ...]
) -> None:
    rng = np.random.default_rng(0)
    for scan, ref in zip(scans, refs):
        image_CXYZ = whole(scan)
        assert ref.shape_cxyz == image_CXYZ.shape
        for _ in range(5):
            corner = prepared_scans.draw_corner(ref, SIZE, 0.2, rng)
            box = tuple(slice(int(a), int(a) + n) for a, n in zip(corner, SIZE))
            got_CXYZ = prepared_scans.read_image(ref, corner.tolist(), SIZE)
            np.testing.assert_array_equal(got_CXYZ, image_CXYZ[(slice(None), *box)])


@pytest.mark.parametrize("shape", [(16, 16, 16), (17, 8, 30), (7, 9, 23)])
def test_coverage_is_the_share_of_each_cell_that_is_not_air(shape: tuple[int, int, int]) -> None:
    image_CXYZ = np.random.default_rng(1).integers(0, 8000, (2, *shape)).astype(np.uint16)
    got_IJK = prepared_scans.coverage(image_CXYZ)
    assert got_IJK.shape == tuple(-(-n // 8) for n in shape)
    for place in np.ndindex(got_IJK.shape):
        cell = image_CXYZ[(slice(None), *(slice(8 * i, 8 * i + 8) for i in place))]
        share = (cell > cropping.FOREGROUND * 65535).any(0).mean()
        assert got_IJK[place] == round(255 * share)


def test_crops_avoid_air_where_that_is_asked(refs: tuple[prepared_scans.Ref, ...]) -> None:
    def air(min_foreground: float) -> float:
        rng = np.random.default_rng(2)
        corners = [prepared_scans.draw_corner(refs[0], (8, 8, 8), min_foreground, rng) for _ in range(60)]
        crops = [prepared_scans.read_image(refs[0], c.tolist(), (8, 8, 8)) for c in corners]
        return float(np.mean([(c > cropping.FOREGROUND * 65535).mean() < 0.2 for c in crops]))

    assert air(0.5) < 0.6 * air(0.0)


def test_a_scan_smaller_than_the_crop_lies_in_its_middle(tmp_path: Path) -> None:
    scan, _ = phantom.phantom(0, (10, 40, 12))
    ref = stored_case(tmp_path, "a", prepared_scans.prepare_image(scan, "CT", CROPS, "a"))
    corner = prepared_scans.draw_corner(ref, SIZE, 0.0, np.random.default_rng(0))
    assert (corner[0], corner[2]) == (-3, -2)
    crop_CXYZ = prepared_scans.read_image(ref, corner.tolist(), SIZE)
    assert not crop_CXYZ[:, :3].any()
    assert crop_CXYZ[:, 3:13].any()


def test_every_draw_is_a_new_crop_and_the_same_draw_the_same(refs: tuple[prepared_scans.Ref, ...]) -> None:
    data = dataset(refs)
    rows = {(repeat, i): data.rows([(repeat, i)])[0]["image"] for repeat in range(3) for i in range(9)}
    assert len({row.tobytes() for row in rows.values()}) == len(rows)
    again = dataset(refs)
    for at, row in rows.items():
        np.testing.assert_array_equal(again.rows([at])[0]["image"], row)


def test_pseudo_labels_are_the_nearest_centroids(
    refs: tuple[prepared_scans.Ref, ...], clusterers: ClustererSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    from logonet import methods

    seen: list[dict[str, np.ndarray]] = []
    monkeypatch.setattr(
        methods, "prepare", lambda name: lambda raw, cfg, rng: seen.append(raw) or {"x": np.zeros(1)}
    )
    dataset(refs, clusterers).rows([(0, i) for i in range(9)])
    for raw in seen:
        slices_ST = slices_of(raw["image_CXYZ"]).astype(np.float64) / 65535
        start = 0
        for n, k in enumerate(clusterers.sizes_N):
            centroids_KT = clusterers.centroids_VT[start : start + k].astype(np.float64)
            distance_SK = ((slices_ST[:, None] - centroids_KT) ** 2).sum(-1)
            np.testing.assert_array_equal(raw["labels_NZ"][n], distance_SK.argmin(1))
            start += k


def test_a_dataset_travels_with_the_labeller_it_was_built_with(
    refs: tuple[prepared_scans.Ref, ...], clusterers: ClustererSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = dataset(refs, clusterers)
    sent = pickle.dumps(fresh)
    (row,) = fresh.rows([(0, 3)])
    with monkeypatch.context() as patch:
        patch.setattr(Labeller, "_basis", lambda self: pytest.fail("its screen is built again"))
        (same,) = pickle.loads(sent).rows([(0, 3)])
    np.testing.assert_equal(same, row)


def pretraining(**data: Any) -> pipelines.Pretraining:
    return pipelines.Pretraining(
        data=classes.Config(**data),
        crops=replace(CROPS, size_vox=(16, 16, 16)),
        clusterers=kmeans.Config(n=2, k_min=3, k_max=4, iterations=3),
        backbone=quick_backbone(),
        method={"name": "masked_clusters", "phi1": 0.2, "final_relu": False},
        train=training.Config(epochs=2, global_batch=3, batch_size=3, lr=3e-3, warmup_epochs=0),
    )


def test_pretraining_cuts_fresh_crops_unless_it_is_told_not_to(tmp_path: Path) -> None:
    phantom.write_dataset(str(tmp_path / "scans"), 3, size_vox=(40, 36, 36))
    made = {}
    for fresh in (True, False):
        cfg = pretraining(fresh_crops=fresh)
        artifact = pipelines.pretrain(cfg, str(tmp_path / "scans"), str(tmp_path / "runs"), HERE, "fresh")
        made[fresh] = artifact
        history = json.loads(artifact.read("history.json"))
        assert [e["step"] for e in history] == [3, 6]  # an epoch: three crops of each of three scans
        assert "masked_chain.png" in artifact.files
    assert made[True].fingerprint != made[False].fingerprint
    assert "prepared" in made[True].parents
    assert "prepared" not in made[False].parents


def test_seeds_of_crops_do_not_touch_each_other() -> None:
    keys = {seeding.integer(0, "fresh", repeat, slot, "a") for repeat in range(4) for slot in range(4)}
    assert len(keys) == 16


def test_pretraining_and_finetuning_share_what_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phantom.write_dataset(str(tmp_path / "scans"), 4, size_vox=(40, 36, 36))
    root = str(tmp_path / "runs")
    table, _ = preparation.import_scans(str(tmp_path / "scans"), root, HERE)
    refs, _ = preparation.make_scans(table, CROPS, root, HERE)
    with monkeypatch.context() as patched:
        patched.setattr(prepared_scans, "prepare_image", lambda *_: pytest.fail("prepared again"))
        cfg = prepared_scans.Config.of(CROPS)
        cases, _ = preparation.make_cases(table, (), cfg, classes.Config(), root, HERE)
    assert len(cases) == len(refs) == 4
    assert [ref.image for ref in refs] == [ref.image for ref in cases.refs]
    assert len(list((tmp_path / "runs" / "scans").glob("*/images/*"))) == 4
    other = replace(cfg, spacing_mm=(2.0, 2.0, 2.0))
    coarse, _ = preparation.make_cases(table, (), other, classes.Config(), root, HERE)
    assert {Path(ref.uri).parent for ref in coarse.refs}.isdisjoint(Path(ref.uri).parent for ref in refs)
