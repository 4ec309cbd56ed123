"""The preprocessing that pretraining, finetuning, inference and export share."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from logonet.core import config
from logonet.core.errors import UserError
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
