"""How a scan becomes a network's input: its grid and the intensities that become 0 and 1.

One class for pretraining, finetuning, inference and export: their configs are a `Preprocessing` with more keys, and so
is a model folder's ``config.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np

from logonet.core import config
from logonet.core.config import Percentile, Positive, Section
from logonet.core.errors import UserError
from logonet.data import volume
from logonet.data.volume import Volume


@dataclass(frozen=True, kw_only=True)
class Preprocessing(Section):
    """The grid and the intensities of prepared scans.

    Attributes:
        spacing_mm: resample to this voxel size; None keeps each scan's own.
        window_hu: CT intensities mapped to [0, 1] (paper Table 2).
        mr_percentiles: of the nonzero voxels, mapped to [0, 1], for scans without an absolute scale.
    """

    spacing_mm: tuple[Positive, Positive, Positive] | None = None
    window_hu: tuple[float, float] = (-1000.0, 1000.0)
    mr_percentiles: tuple[Percentile, Percentile] = (0.5, 99.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("window_hu", "mr_percentiles"):
            low, high = getattr(self, name)
            if not low < high:
                key = f"{self._key}.{name}".lstrip(".")
                raise UserError(f"{key} is ({low}, {high}); set (low, high) with low < high")

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
