"""Intensities: the modality of a scan, windows, percentiles and the stored uint16."""

from __future__ import annotations

import numpy as np

from logonet.core.errors import BadScan
from logonet.data.volume.volume import Volume

UINT16_MAX = 65535  # stored crops: 0..65535 for intensities 0..1
# How datasets begin the names of a modality: CTA, CT angiography, MRI, T1ce, FLAIR...
CT_NAMES = ("ct", "cect", "ncct", "cbct", "computed")
MR_NAMES = (
    "mr",
    "magnetic",
    "t1",
    "t2",
    "flair",
    "adc",
    "dwi",
    "pd",
    "swi",
    "tof",
    "dce",
    "bold",
    "cine",
    "hbv",
)
AIR_HU = -200.0  # below fat (-100 HU) and above air (-1000 HU)
AIR_SHARE = 0.005


def modality(volume: Volume, hint: str | None, name: str) -> str:
    """How the intensities are to be read: "CT" (Hounsfield units) or "MR" (no absolute scale).

    ``hint`` is what a dataset.json says, else what the file says. A CT by its dataset.json whose values never fall
    below zero has been rescaled (to uint8, or without its intercept): air and fat are negative in Hounsfield units, so
    it is read as "MR". A DICOM file's own tag is believed. Without a hint a scan is "CT" when more than 0.5 % of its
    voxels are air.

    Raises:
        BadScan: for a hint that is neither CT nor some MR contrast.
    """
    hint = (hint or volume.modality or "").strip().lower()
    if hint.startswith(CT_NAMES):
        return "CT" if volume.modality == "CT" or float(volume.array_CXYZ.min()) < 0 else "MR"
    if hint.startswith(MR_NAMES):
        return "MR"
    if hint:
        raise BadScan(f"{name}: its modality '{hint}' is neither CT nor MR")
    air = np.count_nonzero(volume.array_CXYZ < AIR_HU)
    return "CT" if air > AIR_SHARE * volume.array_CXYZ.size else "MR"


def window(array: np.ndarray, window_hu: tuple[float, float]) -> np.ndarray:
    """Intensities mapped linearly from ``window_hu`` to [0, 1] and clipped, float32.

    Paper, Table 2: MONAI's ScaleIntensityRange with a_min=-1000, a_max=1000, b_min=0, b_max=1, clip.
    """
    low, high = window_hu
    out = (array - np.float32(low)).astype(np.float32, copy=False)
    out /= np.float32(high - low)
    return np.clip(out, 0.0, 1.0, out=out)


def percentile_range(array: np.ndarray, low: float, high: float, name: str) -> tuple[float, float]:
    """The ``low`` and ``high`` percentiles (0..100) of the nonzero voxels: MR background is stored as zero.

    Raises:
        BadScan: when they coincide, so that the scan has no contrast to scale.
    """
    a, b = np.percentile(array[array != 0], [low, high])
    if not a < b:
        raise BadScan(f"{name}: {high - low:g} % of its nonzero voxels are {a:g}: no contrast to scale")
    return float(a), float(b)


def to_uint16(unit: np.ndarray) -> np.ndarray:
    """[0, 1] -> 0..65535, rounded; how crops are stored."""
    return np.rint(np.asarray(unit, np.float32) * np.float32(UINT16_MAX)).astype(np.uint16)


def from_uint16(stored: np.ndarray) -> np.ndarray:
    """0..65535 -> float32 in [0, 1]; ``to_uint16`` of it gives ``stored`` back."""
    return stored.astype(np.float32) / np.float32(UINT16_MAX)
