"""What training reads: any sample of a run, prepared by its method.

Shapes: C channels, X Y Z voxels (RAS), N clusterers, Z slices of a crop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from logonet import methods
from logonet.core import seeding
from logonet.data import cropping, prepared_scans
from logonet.data.crop_shards import CropTable, LabelTable, slices_of
from logonet.storage.parquet import Rows
from logonet.training.schedule import SampleSchedule

if TYPE_CHECKING:
    from logonet.clustering.pseudo_labels import Labeller


@dataclass(frozen=True)
class _Dataset:
    """What both kinds of samples share. Plain data, so that it travels to data tasks.

    Attributes:
        method: prepares the samples with ``method_config``.
        schedule: of the run; also the seed of all that is drawn.
    """

    method: str
    method_config: Any
    schedule: SampleSchedule

    rows_per_sample = 1

    @property
    def validation(self) -> tuple[prepared_scans.Ref, ...]:
        """Labelled scans to validate on."""
        return ()

    def rows(self, samples: Sequence[tuple[int, int]]) -> list[dict[str, np.ndarray]]:
        """The prepared rows of several (repeat, sample); see `SampleSchedule.at`."""
        raise NotImplementedError

    def __getitem__(self, positions: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
        """The samples at some (step, slot) of the schedule, stacked."""
        rows = self.rows([self.schedule.at(*position) for position in positions])
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


@dataclass(frozen=True)
class TrainingDataset(_Dataset):
    """Unlabelled crops, and their pseudo-labels where the method wants them."""

    table: CropTable
    labels: LabelTable | None = None

    @property
    def row_bytes(self) -> int:
        """About how much memory a prepared row takes."""
        return 4 * int(np.prod(self.table.size_vox)) * self.table.in_channels

    def rows(self, samples: Sequence[tuple[int, int]]) -> list[dict[str, np.ndarray]]:
        indices, rows = [index for _, index in samples], []
        labels = None if self.labels is None else self.labels.read_all(indices)
        for i, ((repeat, index), crop_CXYZ) in enumerate(zip(samples, self.table.read_all(indices))):
            raw: dict[str, Any] = {"image_CXYZ": crop_CXYZ}
            if labels is not None:
                raw["labels_NZ"] = labels[i]
            rng = seeding.rng(self.schedule.seed, "prepare", repeat, self.table.refs[index].crop_id)
            rows.append(methods.prepare(self.method)(raw, self.method_config, rng))
        return rows


@dataclass(frozen=True)
class FreshCrops(_Dataset):
    """Unlabelled scans, of which every draw cuts a new crop; pseudo-labels are computed on the spot.

    Attributes:
        scans: prepared; sample ``i`` is crop ``i % per_scan`` of scan ``i // per_scan``.
        crops: their size, how many an epoch takes of a scan, and how much of them must not be air.
        labeller: of crops, or None; in a cluster its arrays lie once a node in shared memory.
    """

    scans: Rows[prepared_scans.Ref]
    crops: cropping.Config
    labeller: Labeller | None = None

    @property
    def row_bytes(self) -> int:
        return 4 * int(np.prod(self.crops.size_vox)) * self.scans[0].shape_cxyz[0]

    def rows(self, samples: Sequence[tuple[int, int]]) -> list[dict[str, np.ndarray]]:
        return [self._row(repeat, index) for repeat, index in samples]

    def _row(self, repeat: int, index: int) -> dict[str, np.ndarray]:
        ref, rng, corner = self._drawn(repeat, index)
        crop_CXYZ = prepared_scans.read_image(ref, corner.tolist(), self.crops.size_vox)
        raw: dict[str, Any] = {"image_CXYZ": crop_CXYZ}
        if self.labeller is not None:
            raw["labels_NZ"] = self.labeller(slices_of(crop_CXYZ)).T
        return methods.prepare(self.method)(raw, self.method_config, rng)

    def corner(self, repeat: int, index: int) -> np.ndarray:
        """The lower corner of the crop of (repeat, sample) in its prepared scan, int64 (3,)."""
        return self._drawn(repeat, index)[2]

    def _drawn(self, repeat: int, index: int) -> tuple[prepared_scans.Ref, np.random.Generator, np.ndarray]:
        number, slot = divmod(index, self.crops.per_scan)
        ref = self.scans[number]
        rng = seeding.rng(self.schedule.seed, "fresh", repeat, slot, ref.scan_id)
        corner = prepared_scans.draw_corner(ref, self.crops.size_vox, self.crops.min_foreground, rng)
        return ref, rng, corner


@dataclass(frozen=True)
class LabelledDataset(_Dataset):
    """Labelled scans, each of which gives ``crops.per_case`` freshly cut rows.

    Attributes:
        train, val: positions in the table.
    """

    table: prepared_scans.Table
    train: tuple[int, ...]
    val: tuple[int, ...]
    crops: prepared_scans.CropSampling

    @property
    def rows_per_sample(self) -> int:  # type: ignore[override]
        return self.crops.per_case

    @property
    def row_bytes(self) -> int:
        return 5 * int(np.prod(self.crops.size_vox)) * self.table.in_channels

    @property
    def validation(self) -> tuple[prepared_scans.Ref, ...]:
        return tuple(self.table.refs[i] for i in self.val)

    def rows(self, samples: Sequence[tuple[int, int]]) -> list[dict[str, np.ndarray]]:
        return [row for repeat, index in samples for row in self._crops(repeat, index)]

    def _crops(self, repeat: int, index: int) -> Iterator[dict[str, np.ndarray]]:
        ref = self.table.refs[self.train[index]]
        rng = seeding.rng(self.schedule.seed, "crops", repeat, ref.scan_id)
        for start in prepared_scans.draw_corners(ref, self.crops, rng):
            image_CXYZ, labels_XYZ = prepared_scans.read_crop(ref, start, self.crops.size_vox)
            raw = {"image_CXYZ": image_CXYZ, "labels_XYZ": labels_XYZ}
            yield methods.prepare(self.method)(raw, self.method_config, rng)


Dataset = TrainingDataset | FreshCrops | LabelledDataset
