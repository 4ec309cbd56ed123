"""How a scan becomes a network's input: its grid and the intensities that become 0 and 1.

One class for pretraining, finetuning, inference and export: their configs are a `Preprocessing` with more keys, and so
is a model folder's ``config.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import numpy as np

from logonet.core import config
from logonet.core.errors import UserError
from logonet.data import volume
from logonet.data.volume import Volume


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """The grid and the intensities of prepared scans.

    Attributes:
        spacing_mm: resample to this voxel size; None keeps each scan's own.
        window_hu: CT intensities mapped to [0, 1] (paper Table 2).
        mr_percentiles: of the nonzero voxels, mapped to [0, 1], for scans without an absolute scale.
    """

    SECTION: ClassVar[str] = ""  # of a config file that holds these keys, for messages

    spacing_mm: tuple[float, float, float] | None = None
    window_hu: tuple[float, float] = (-1000.0, 1000.0)
    mr_percentiles: tuple[float, float] = (0.5, 99.5)

    def __post_init__(self) -> None:
        if self.spacing_mm is not None and min(self.spacing_mm) <= 0:
            raise UserError(
                f"{self.SECTION}spacing_mm must be positive, in mm, or null to keep each scan's own"
            )
        if not self.window_hu[0] < self.window_hu[1]:
            raise UserError(f"{self.SECTION}window_hu must be [low, high] with low < high")
        if not 0 <= self.mr_percentiles[0] < self.mr_percentiles[1] <= 100:
            raise UserError(f"{self.SECTION}mr_percentiles must be [low, high] with 0 <= low < high <= 100")

    @classmethod
    def of(cls, settings: Preprocessing | Mapping[str, Any]) -> Self:
        """The preprocessing of another config, or of a stored config's mapping; their other keys are left out."""
        names = [f.name for f in fields(Preprocessing)]
        if isinstance(settings, Mapping):
            return config.from_dict(cls, {name: settings[name] for name in names})
        return cls(**{name: getattr(settings, name) for name in names})

    def to_grid(self, scan: Volume, order: int = 1) -> Volume:
        """``scan`` in RAS axes, at ``spacing_mm`` when that is set; ``order`` 1 is trilinear, 0 nearest (labels)."""
        if self.spacing_mm is None:
            return volume.to_ras(scan)
        return volume.resample(scan, self.spacing_mm, order)

    def intensity_range(self, array_CXYZ: np.ndarray, modality: str, scan_id: str) -> tuple[float, float]:
        """The intensities that become 0 and 1: the HU window for "CT", the scan's own percentiles for "MR".

        Raises:
            BadScan: when the percentiles coincide, so that there is no contrast to scale.
        """
        if modality == "CT":
            return self.window_hu
        return volume.percentile_range(array_CXYZ, *self.mr_percentiles, scan_id)
