"""Intensities: the modality of a scan, windows, percentiles and the stored uint16."""

from __future__ import annotations

from typing import Any

import numpy as np

from logonet.core.errors import BadScan
from logonet.data.volume.volume import Volume

# The intensities that become 0 and 1: two numbers, or for several channels two arrays (C, 1, 1, 1).
LowHigh = tuple[Any, Any]
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
# nnU-Net's names of normalisations, where others name a modality -> the scheme of `Preprocessing.intensity`.
NORMALISATIONS = {"zscore": "zscore", "nonorm": "none", "rescale_to_0_1": "min_max", "rgb_to_0_1": "min_max"}
JOIN = "+"  # between the modalities of channels
AIR_HU = -200.0  # below fat (-100 HU) and above air (-1000 HU)
AIR_SHARE = 0.005


def modality(volume: Volume, hint: str | None, name: str) -> str:
    """How the intensities are to be read: "CT" (Hounsfield units), "MR" (no absolute scale), or a normalisation that
    the dataset names, see NORMALISATIONS. Of several channels one for each, "MR+MR+CT".

    ``hint`` is what a dataset.json says, one for all channels or one for each, else what the file says. A CT by its
    dataset.json whose values never fall below zero has been rescaled (to uint8, or without its intercept): air and fat
    are negative in Hounsfield units, so it is read as "MR". A DICOM file's own tag is believed. Without a hint a scan
    is "CT" when more than 0.5 % of its voxels are air.

    Raises:
        BadScan: for a hint that is neither CT nor some MR contrast, or one for another number of channels.
    """
    hints = (hint or volume.modality or "").lower().split(JOIN)
    if len(hints) not in (1, len(volume.array_CXYZ)):
        told = f"channels are {', '.join(hints)}"
        raise BadScan(f"{name}: has {len(volume.array_CXYZ)} channels, but the dataset's {told}")
    hints *= len(volume.array_CXYZ) // len(hints)
    own = volume.modality == "CT"
    return JOIN.join(_modality(array, one.strip(), own, name) for array, one in zip(volume.array_CXYZ, hints))


def _modality(array_XYZ: np.ndarray, hint: str, by_tag: bool, name: str) -> str:
    if hint in NORMALISATIONS:
        return hint
    if hint.startswith(CT_NAMES):
        return "CT" if by_tag or float(array_XYZ.min()) < 0 else "MR"
    if hint.startswith(MR_NAMES):
        return "MR"
    if hint:
        raise BadScan(f"{name}: its modality '{hint}' is neither CT nor MR")
    air = np.count_nonzero(array_XYZ < AIR_HU)
    return "CT" if air > AIR_SHARE * array_XYZ.size else "MR"


def window(array: np.ndarray, low_high: LowHigh) -> np.ndarray:
    """Intensities mapped linearly from ``low_high``, of all or of each channel, to [0, 1] and clipped, float32.

    Paper, Table 2: MONAI's ScaleIntensityRange with a_min=-1000, a_max=1000, b_min=0, b_max=1, clip.
    """
    low, high = (np.asarray(end, np.float64) for end in low_high)
    out = (array - low.astype(np.float32)).astype(np.float32, copy=False)
    out /= (high - low).astype(np.float32)
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


def contrast(low: float, high: float, name: str) -> tuple[float, float]:
    """``low`` and ``high``.

    Raises:
        BadScan: when they coincide.
    """
    if not low < high:
        raise BadScan(f"{name}: its voxels are all {low:g}: no contrast to scale")
    return low, high


def to_uint16(unit: np.ndarray) -> np.ndarray:
    """[0, 1] -> 0..65535, rounded; how crops are stored."""
    return np.rint(np.asarray(unit, np.float32) * np.float32(UINT16_MAX)).astype(np.uint16)


def from_uint16(stored: np.ndarray) -> np.ndarray:
    """0..65535 -> float32 in [0, 1]; ``to_uint16`` of it gives ``stored`` back."""
    return np.divide(stored, np.float32(UINT16_MAX), dtype=np.float32)
