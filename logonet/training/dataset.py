"""What training reads: any sample of a run, prepared by its method.

Shapes: P samples, C channels, X Y Z voxels (RAS), N clusterers, Z slices of a crop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from logonet import methods
from logonet.core import seeding
from logonet.data import prepared_scans
from logonet.data.crop_shards import CropTable
from logonet.training.schedule import SampleSchedule


@dataclass(frozen=True)
class TrainingDataset:
    """What a data task needs to prepare any sample of a run; stored once in Ray's shared memory."""

    table: CropTable
    labels_PNZ: np.ndarray | None
    method: str
    method_config: Any
    order: SampleSchedule
    rows_per_sample = 1

    @property
    def row_bytes(self) -> int:
        return 4 * int(np.prod(self.table.size_vox)) * self.table.in_channels

    def rows(self, places: list[tuple[int, int]]) -> list[dict[str, np.ndarray]]:
        """The rows of several (draw, sample), whose crops are read at once."""
        crops = self.table.read_all(index for _, index in places)
        return [self._prepared(draw, index, crop) for (draw, index), crop in zip(places, crops)]

    def sample(self, draw: int, index: int) -> dict[str, np.ndarray]:
        """Sample ``index`` as the method's ``prepare`` makes it for ``draw`` (see `SampleSchedule.at`)."""
        return self._prepared(draw, index, self.table.read(index))

    def _prepared(self, draw: int, index: int, crop_CXYZ: np.ndarray) -> dict[str, np.ndarray]:
        raw: dict[str, Any] = {"image_CXYZ": crop_CXYZ}
        if self.labels_PNZ is not None:
            raw["labels_NZ"] = self.labels_PNZ[index]
        rng = seeding.rng(self.order.seed, "prepare", draw, self.table.refs[index].crop_id)
        return methods.prepare(self.method)(raw, self.method_config, rng)


@dataclass(frozen=True)
class LabelledDataset:
    """The same for a labelled method: a sample is a case, and gives ``crops.per_case`` rows.

    ``train`` and ``val`` are positions in the table.
    """

    table: prepared_scans.Table
    train: tuple[int, ...]
    val: tuple[int, ...]
    crops: prepared_scans.Crops
    method: str
    method_config: Any
    order: SampleSchedule

    @property
    def rows_per_sample(self) -> int:
        return self.crops.per_case

    def rows(self, places: list[tuple[int, int]]) -> list[dict[str, np.ndarray]]:
        return [row for draw, index in places for row in self.samples(draw, index)]

    @property
    def row_bytes(self) -> int:
        return 5 * int(np.prod(self.crops.size_vox)) * self.table.in_channels

    def samples(self, draw: int, index: int) -> list[dict[str, np.ndarray]]:
        """The crops of training case ``index`` as ``prepare`` makes them for ``draw`` (`SampleSchedule.at`)."""
        ref = self.table.refs[self.train[index]]
        rng = seeding.rng(self.order.seed, "crops", draw, ref.scan_id)
        rows = []
        for start in prepared_scans.starts(ref, self.crops, rng):
            image_CXYZ, labels_XYZ = prepared_scans.read_crop(ref, start, self.crops.size_vox)
            raw = {"image_CXYZ": image_CXYZ, "labels_XYZ": labels_XYZ}
            rows.append(methods.prepare(self.method)(raw, self.method_config, rng))
        return rows
