"""The preprocessing that pretraining, finetuning, inference and export share."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from logonet.core import config
from logonet.core.errors import BadScan, UserError
from logonet.data import cropping, prepared_scans
from logonet.data.preprocessing import Preprocessing
from logonet.inference.model import Spec

VALUES: dict[str, Any] = {
    "spacing_mm": (1.5, 1.5, 2.0),
    "window_hu": (-175.0, 250.0),
    "mr_percentiles": (1.0, 99.0),
}


def test_a_config_of_one_stage_gives_the_preprocessing_of_another() -> None:
    crops = cropping.Config(size_vox=(8, 8, 8), **VALUES)
    assert Preprocessing.of(crops) == Preprocessing(**VALUES)
    assert prepared_scans.Config.of(crops) == prepared_scans.Config(**VALUES)
    spec = Spec({"name": "ulkanet"}, 1, ("background", "liver"), (0, 1), (32, 32, 32), "CT", **VALUES)
    assert Preprocessing.of(spec) == Preprocessing(**VALUES)


@pytest.mark.parametrize("spacing_mm", [None, (1.5, 1.5, 2.0)])
def test_a_stored_config_gives_the_preprocessing_it_was_made_with(spacing_mm: Any) -> None:
    crops = cropping.Config(**(VALUES | {"spacing_mm": spacing_mm}))
    assert Preprocessing.of(config.to_dict(crops)) == Preprocessing.of(crops)


def test_configs_keep_their_flat_keys() -> None:
    for cls in (cropping.Config, prepared_scans.Config, Spec):
        assert {f.name for f in dataclasses.fields(Preprocessing)} <= {
            f.name for f in dataclasses.fields(cls)
        }
    assert config.to_dict(prepared_scans.Config()) == {
        "spacing_mm": None,
        "window_hu": [-1000.0, 1000.0],
        "mr_percentiles": [0.5, 99.5],
        "seed": 0,
    }


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"spacing_mm": (1.0, 0.0, 1.0)}, "spacing_mm"),
        ({"window_hu": (5.0, 5.0)}, "window_hu"),
        ({"mr_percentiles": (60.0, 101.0)}, "mr_percentiles"),
    ],
)
@pytest.mark.parametrize(("cls", "section"), [(cropping.Config, "crops"), (prepared_scans.Config, "cases")])
def test_impossible_values_are_refused_with_their_full_key(
    cls: type, section: str, changes: dict[str, Any], key: str
) -> None:
    with pytest.raises(UserError, match=rf"^{section}\.{key}\b"):
        config.from_dict(cls, changes, section)


# ------------------------------------------------------------------------------------------ intensities


def channel(seed: int = 0) -> np.ndarray:
    """A body of normal intensities in a background of 0, float32 (1, 12, 12, 12)."""
    rng = np.random.default_rng(seed)
    body = rng.normal(300, 120, (1, 12, 12, 12))
    body[:, :5] = 0
    return body.astype(np.float32)


def expected(array: np.ndarray, scheme: Any) -> tuple[float, float]:
    inside = array[array != 0]
    if scheme == "window_percentiles":  # 3D UX-Net, appendix A.1, of what is not background
        clipped = np.clip(array, -175, 250)
        low, high = np.percentile(clipped[clipped != 0], [1, 99])
        return float(low), float(high)
    if scheme in ("zscore", "zscore_whole"):
        of = inside if scheme == "zscore" else array
        return float(of.mean() - 5 * of.std()), float(of.mean() + 5 * of.std())
    return {"window": (-175.0, 250.0), "min_max": (float(array.min()), float(array.max()))}.get(
        scheme, scheme
    )


@pytest.mark.parametrize(
    "scheme", ["window", "window_percentiles", "zscore", "zscore_whole", "min_max", (0.0, 1000.0)]
)
def test_what_becomes_0_and_1(scheme: Any) -> None:
    cfg = Preprocessing(intensity=scheme, window_hu=(-175.0, 250.0), mr_percentiles=(1.0, 99.0))
    array = channel()
    assert cfg.intensity_range(array, "MR", "a") == pytest.approx(expected(array, scheme), rel=1e-5)
    assert Preprocessing.of(config.to_dict(cfg)) == cfg


def test_each_channel_has_its_own_scheme() -> None:
    schemes = ((0.0, 1000.0), "zscore", "window_percentiles")
    cfg = cropping.Config(intensity=schemes, window_hu=(-175.0, 250.0), mr_percentiles=(1.0, 99.0))
    array = np.concatenate([channel(seed) for seed in range(3)])
    low, high = cfg.intensity_range(array, "MR", "a")
    for c, scheme in enumerate(schemes):
        wanted = expected(array[c : c + 1], scheme)
        assert (low[c].item(), high[c].item()) == pytest.approx(wanted, rel=1e-5)
    assert Preprocessing.of(config.to_dict(cfg)) == Preprocessing.of(cfg)
    with pytest.raises(BadScan, match="2 channels and 3 schemes"):
        cfg.intensity_range(array[:2], "MR", "a")


@pytest.mark.parametrize(
    ("intensity", "words"),
    [
        ([5, 5], r"crops\.intensity has the window \(5\.0, 5\.0\)"),
        (["zscore", [9, 1]], r"crops\.intensity has the window \(9\.0, 1\.0\)"),
        ("otsu", r"crops\.intensity"),
        ([1, 2, 3], r"crops\.intensity"),
    ],
)
def test_schemes_that_do_not_exist_are_refused(intensity: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        config.from_dict(cropping.Config, {"intensity": intensity}, "crops")
