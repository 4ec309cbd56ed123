"""The labels stage: a shard of pseudo-labels for each scan, nothing of it in the driver but counts and a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loops import SIZE, SIZES, crops_dataset

from logonet.clustering import fitting, quality
from logonet.clustering.kmeans import ClustererSet
from logonet.clustering.pseudo_labels import Labeller
from logonet.core.execution import InProcess
from logonet.data.crop_shards import CropTable, slices_of
from logonet.pipelines import preparation

HERE = InProcess()


@pytest.fixture
def crops(tmp_path: Path) -> CropTable:
    return crops_dataset(tmp_path / "crops").table


@pytest.fixture
def labeller() -> Labeller:
    rng = np.random.default_rng(0)
    return Labeller(ClustererSet(rng.random((sum(SIZES), SIZE[0] * SIZE[1]), np.float32), np.array(SIZES)))


def test_every_label_is_stored_and_counted(crops: CropTable, labeller: Labeller, tmp_path: Path) -> None:
    labels, counts_NK = fitting.label_crops(crops, labeller, f"{tmp_path}/labels", HERE)
    expected_PNZ = np.stack([labeller(slices_of(crops.read(i))).T for i in range(len(crops))])
    stored_PNZ = np.stack(labels.read_all(range(len(labels))))
    assert stored_PNZ.dtype == np.int16
    np.testing.assert_array_equal(stored_PNZ, expected_PNZ)
    assert labels.refs.column("crop_id") == crops.refs.column("crop_id")
    for n, k in enumerate(SIZES):
        np.testing.assert_array_equal(counts_NK[n, :k], np.bincount(expected_PNZ[:, n].ravel(), minlength=k))
        assert not counts_NK[n, k:].any()
    majority_N, share_N = quality.majority(counts_NK)
    for n in range(len(SIZES)):
        assert share_N[n] == (expected_PNZ[:, n] == majority_N[n]).mean()


def test_an_interrupted_labelling_goes_on(
    crops: CropTable, labeller: Labeller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = f"{tmp_path}/labels"
    labels, counts_NK = fitting.label_crops(crops, labeller, root, HERE)
    shards = sorted((tmp_path / "labels" / "shards").iterdir())
    whole = [shard.read_bytes() for shard in shards]
    shards[0].unlink()
    shards[1].write_bytes(whole[1][:-1])  # torn
    read: list[str] = []
    cut = CropTable.read

    def watched(self: CropTable, index: int) -> np.ndarray:
        read.append(self.refs[index].scan_id)
        return cut(self, index)

    monkeypatch.setattr(CropTable, "read", watched)
    again, same_NK = fitting.label_crops(crops, labeller, root, HERE)
    assert set(read) == {"scan0", "scan1"}
    assert [shard.read_bytes() for shard in shards] == whole
    assert again == labels
    np.testing.assert_array_equal(same_NK, counts_NK)


def test_of_a_large_pool_whole_scans_are_labelled(crops: CropTable, monkeypatch: pytest.MonkeyPatch) -> None:
    assert preparation.some_crops(crops) is crops
    monkeypatch.setattr(preparation, "LABELLED_CROPS", 4)
    some: Any = preparation.some_crops(crops)
    assert some.refs.column("scan_id") == ["scan0", "scan0", "scan2", "scan2"]
    np.testing.assert_array_equal(some.read(3), crops.read(5))
