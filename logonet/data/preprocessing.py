"""How a scan becomes a network's input: its grid and the intensities that become 0 and 1.

One class for pretraining, finetuning, inference and export: their configs are a `Preprocessing` with more keys, and so
is a model folder's ``config.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

import numpy as np

from logonet.core import config
from logonet.core.config import Percentile, Positive, Section
from logonet.core.errors import BadScan, UserError
from logonet.data import volume
from logonet.data.volume import LowHigh, Volume

Name = Literal[
    "auto", "window", "percentiles", "window_percentiles", "zscore", "zscore_whole", "min_max", "none"
]
Scheme = Name | tuple[float, float]
ZSCORE_SD = 5.0  # standard deviations on either side of the mean that "zscore" keeps


@dataclass(frozen=True, kw_only=True)
class Preprocessing(Section):
    """The grid and the intensities of prepared scans.

    Attributes:
        spacing_mm: resample to this voxel size; None keeps each scan's own.
        window_hu: CT intensities mapped to [0, 1] (paper Table 2).
        mr_percentiles: of the nonzero voxels, mapped to [0, 1], for scans without an absolute scale.
        intensity: how a channel's values become [0, 1], one scheme for all channels or one for each. "window":
            ``window_hu``; "percentiles": ``mr_percentiles``; "window_percentiles": the percentiles of what the window
            leaves; "zscore": five standard deviations on either side of the nonzero mean; "zscore_whole": of all
            voxels'; "min_max"; "none": the values are in [0, 1] already; two numbers: that window. "auto": the window
            for CT, the percentiles for MR, and what nnU-Net's names of channels say ("zscore", "noNorm",
            "rescale_to_0_1").
    """

    spacing_mm: tuple[Positive, Positive, Positive] | None = None
    window_hu: tuple[float, float] = (-1000.0, 1000.0)
    mr_percentiles: tuple[Percentile, Percentile] = (0.5, 99.5)
    intensity: Scheme | tuple[Scheme, ...] = field(default="auto", metadata=config.OMIT_DEFAULT)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("window_hu", "mr_percentiles"):
            low, high = getattr(self, name)
            if not low < high:
                key = f"{self._key}.{name}".lstrip(".")
                raise UserError(f"{key} is ({low}, {high}); set (low, high) with low < high")
        for scheme in self.schemes:
            if not isinstance(scheme, str) and not scheme[0] < scheme[1]:
                key = f"{self._key}.intensity".lstrip(".")
                raise UserError(f"{key} has the window {scheme}; set (low, high) with low < high")

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """``intensity`` as one scheme, or one for each channel."""
        given: Any = self.intensity
        one = isinstance(given, str) or (given and isinstance(given[0], int | float))
        return (given,) if one else given

    @classmethod
    def of(cls, settings: Preprocessing | Mapping[str, Any]) -> Self:
        """The preprocessing of another config, or of a stored config's mapping; their other keys are left out."""
        names = [f.name for f in fields(Preprocessing)]
        if isinstance(settings, Mapping):
            return config.from_dict(cls, {name: settings[name] for name in names if name in settings})
        return cls(**{name: getattr(settings, name) for name in names})

    def to_grid(self, scan: Volume, order: int = 1) -> Volume:
        """``scan`` in RAS axes, at ``spacing_mm`` when that is set; ``order`` 1 is trilinear, 0 nearest (labels)."""
        if self.spacing_mm is None:
            return volume.to_ras(scan)
        return volume.resample(scan, self.spacing_mm, order)

    def intensity_range(self, array_CXYZ: np.ndarray, modality: str, scan_id: str) -> LowHigh:
        """The intensities that become 0 and 1, of one channel or of each.

        Args:
            modality: what `volume.modality` tells of the scan.

        Raises:
            BadScan: where they coincide, so that there is no contrast to scale, or the scan has other channels.
        """
        kinds = modality.split(volume.JOIN)
        schemes = list(self.schemes)
        for what, given in (("modalities", kinds), ("schemes in 'intensity'", schemes)):
            if len(given) not in (1, len(array_CXYZ)):
                raise BadScan(
                    f"{scan_id}: has {len(array_CXYZ)} channels and {len(given)} {what}; give one for each"
                )
        count = len(array_CXYZ)
        each = zip(array_CXYZ, kinds * (count // len(kinds)), schemes * (count // len(schemes)))
        ranges = [self._range(array, kind, scheme, scan_id) for array, kind, scheme in each]
        if count == 1:
            return ranges[0]
        low, high = (np.array(ends, np.float32).reshape(-1, 1, 1, 1) for ends in zip(*ranges))
        return low, high

    def _range(self, array_XYZ: np.ndarray, kind: str, given: Scheme, scan_id: str) -> tuple[float, float]:
        if not isinstance(given, str):
            return given
        scheme: str = given
        if scheme == "auto":
            scheme = {"CT": "window", "MR": "percentiles"}.get(kind) or volume.NORMALISATIONS[kind]
        if scheme == "window":
            return self.window_hu
        if scheme == "none":
            low, high = float(array_XYZ.min()), float(array_XYZ.max())
            if low < 0 or high > 1:
                hint = "choose another 'intensity' for this channel"
                raise BadScan(
                    f"{scan_id}: goes from {low:g} to {high:g}, not from 0 to 1 as intensity 'none' says; {hint}"
                )
            return 0.0, 1.0
        if scheme in ("zscore", "zscore_whole"):
            inside = array_XYZ[array_XYZ != 0] if scheme == "zscore" else array_XYZ
            mean, half = float(inside.mean(dtype=np.float64)), ZSCORE_SD * float(inside.std(dtype=np.float64))
            return volume.contrast(mean - half, mean + half, scan_id)
        if scheme == "min_max":
            return volume.contrast(float(array_XYZ.min()), float(array_XYZ.max()), scan_id)
        if scheme == "window_percentiles":
            array_XYZ = np.clip(array_XYZ, *self.window_hu)
        return volume.percentile_range(array_XYZ, *self.mr_percentiles, scan_id)
