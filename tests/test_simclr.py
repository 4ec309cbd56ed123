"""SimCLR against its closed forms, and the views that it shares with BYOL and SimTROT.

Shapes: B samples, C input channels, X Y Z the crop's axes, N rows, D columns.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from test_methods import Stub
from test_selfsup import LEARNERS, assert_learns_two_phantoms, phantom_batch, phantom_crop, plain_nt_xent

from logonet import methods
from logonet.core import config, seeding
from logonet.core.errors import UserError
from logonet.data import augment
from logonet.methods import _views
from logonet.methods._selfsup import joined, nt_xent, pooled


@pytest.mark.parametrize(
    ("count", "collapsed", "ideal"),
    [(2, 1.0986, 0.2395), (4, 1.9459, 0.5944), (8, 2.7081, 1.0629), (32, 4.1431, 2.2397)],
)
def test_closed_forms(count: int, collapsed: float, ideal: float):
    same = torch.ones(count, 40)
    assert nt_xent(same, same, 0.5).item() == pytest.approx(collapsed, abs=5e-5)
    assert nt_xent(same, same, 0.5).item() == pytest.approx(math.log(2 * count - 1))
    apart = torch.eye(40)[:count]
    assert nt_xent(apart, 3 * apart, 0.5).item() == pytest.approx(ideal, abs=5e-5)
    assert nt_xent(apart, apart, 0.5).item() == pytest.approx(-2 + math.log(math.exp(2) + 2 * count - 2))


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    return phantom_batch("simclr", methods.config("simclr"), (0, 1, 2))


def build(**options: Any) -> Any:
    torch.manual_seed(0)
    return methods.build("simclr", Stub(), size_vox=(32, 32, 32), **options)


def test_the_loss_is_equation_1_of_the_projections(batch: dict[str, torch.Tensor]):
    module = build()
    loss, metrics = module(batch, 0.0)
    a, b = (
        module.projector(pooled(joined(module.backbone.encode(batch[key]), module.levels)))
        for key in ("first", "second")
    )
    torch.testing.assert_close(loss, plain_nt_xent(a, b, 0.5))
    torch.testing.assert_close(metrics["loss"], torch.tensor([3 * loss.item(), 3], dtype=torch.float64))
    alignment = torch.nn.functional.cosine_similarity(a, b).sum()
    assert metrics["alignment"][0].item() == pytest.approx(alignment.item(), rel=1e-5)
    swapped, _ = module({"first": batch["second"], "second": batch["first"]}, 0.0)
    torch.testing.assert_close(swapped, loss)


def test_projector_widths(batch: dict[str, torch.Tensor]):
    def widths(**options: Any) -> list[int]:
        return [m.out_features for m in build(**options).projector if isinstance(m, torch.nn.Linear)]

    assert widths() == [8, 128]
    assert widths(projector=(2048, 2048, 2048)) == [2048] * 3
    assert methods.config("simclr", {"projector": [16, 4], "view_vox": [8, 8, 4]}).projector == (16, 4)


@pytest.mark.parametrize("backbone", LEARNERS)
def test_it_learns(backbone: str):
    assert_learns_two_phantoms("simclr", backbone)


def test_settings_that_cannot_work():
    for options, words in [
        ({"view_vox": (16, 33, 16)}, "cannot be larger than its crop"),
        ({"view_vox": (16, 0, 16)}, "view_vox"),
        ({"temperature": 0.0}, "temperature"),
        ({"projector": ()}, "projector"),
        ({"projector": (4, 0)}, "projector"),
    ]:
        with pytest.raises(UserError, match=words):
            build(**options)
    with pytest.raises(UserError, match=r"train\.batch_size is 1; set it to 2"):
        build(batch_size=1)


# ------------------------------------------------------------------------------------------------ views


def test_views_of_their_own_size_overlap_and_the_network_is_told():
    cfg = methods.config("simclr", {"view_vox": [16, 8, 12]})
    assert methods.sizes("simclr", cfg, (32, 32, 32)) == ((16, 8, 12),)
    assert methods.sizes("simclr", methods.config("simclr"), (32, 32, 32)) == ((32, 32, 32),)
    ready = methods.prepare("simclr")({"image_CXYZ": phantom_crop(0)}, cfg, seeding.rng(0, "v"))
    assert [ready[key].shape for key in ("first", "second")] == [(1, 16, 8, 12)] * 2


def test_the_second_view_lies_at_most_half_a_view_from_the_first():
    generator, size, view = seeding.rng(0, "starts"), (20, 9, 8), (8, 5, 8)
    both = np.array([_views.starts(size, view, generator) for _ in range(2000)])
    assert (both >= 0).all()
    assert (both <= np.array(size) - view).all()
    first, second = both[:, 0], both[:, 1]
    assert np.abs(first - second).max(0).tolist() == [4, 2, 0]
    assert set(first[:, 0]) == set(range(13)) == set(second[:, 0])


def test_whole_crops_are_views_without_a_shift():
    """With every distortion drawn away what is left is the crop."""
    generator = seeding.rng(0, "whole")
    drawn = [_views.draw(_views.Recipe(augment.none()), (8, 8, 8), generator) for _ in range(20)]
    image = phantom_crop(0).astype(np.float32) / 65535
    assert all(np.array_equal(_views.apply(image, d), image) for d in drawn)
    assert _views.starts((8, 8, 8), (8, 8, 8), generator) == [(0, 0, 0), (0, 0, 0)]


def drawn_as(gibbs: float = 0.0, **change: float) -> _views.Drawn:
    return _views.Drawn(gibbs, augment.Drawn(**change))


CHANCES = {
    "nnssl": {
        "augment.blur_sigma_vox": (0.2, 0.5, 1.0),
        "augment.contrast": (0.15, 0.75, 1.25),
        "augment.low_resolution": (0.1, 0.5, 1.0),
        "augment.inverted_gamma": (0.1, 0.7, 1.5),
        "gibbs": (0.0, 0.0, 0.0),
        "augment.gamma": (0.3, 0.7, 1.5),
        "augment.intensity_factor": (0.15, 0.75, 1.25),
        "augment.intensity_offset": (0.0, 0.0, 0.0),
        "augment.noise_std": (0.1, 0.0, 0.1),
        "augment.rotate90": (0.75, 1, 3),
    },
    "texture": {
        "gibbs": (0.5, 0.0, 1.0),
        "augment.noise_std": (0.5, 0.0, 0.1),
        "augment.intensity_factor": (0.1, 0.9, 1.1),
        "augment.intensity_offset": (0.1, -0.1, 0.1),
        "augment.blur_sigma_vox": (0.0, 0.0, 0.0),
        "augment.rotate90": (0.0, 0, 0),
        "augment.gamma": (0.0, 1.0, 1.0),
    },
}


@pytest.mark.parametrize("views", CHANCES)
def test_how_often_and_how_strongly_views_are_distorted(views: Any):
    generator, count = seeding.rng(0, "often"), 4000
    drawn = [_views.draw(_views.RECIPES[views], (8, 8, 6), generator) for _ in range(count)]
    assert {d.augment.rotate_rad for d in drawn} == {(0.0, 0.0, 0.0)}
    neutral = _views.Drawn()
    for key, (chance, low, high) in CHANCES[views].items():
        *inside, name = key.split(".")
        parts = [d.augment if inside else d for d in (neutral, *drawn)]
        off, *values = (getattr(part, name) for part in parts)
        changed = [value for value in values if value != off]
        assert abs(len(changed) / count - chance) < 4 * math.sqrt(chance * (1 - chance) / count) + 1e-9, key
        if changed:
            assert low <= min(changed) <= max(changed) <= high, key
            assert max(changed) - min(changed) > 0.9 * (high - low), key
    for axis in range(3):
        share = np.mean([axis in d.augment.flip_axes for d in drawn])
        assert abs(share - (0.5 if views == "nnssl" else 0)) < 0.04


@pytest.mark.parametrize(
    "change",
    [
        {"gibbs": 0.4},
        {"gibbs": 0.999},
        {"blur_sigma_vox": 0.8},
        {"contrast": 1.25},
        {"contrast": 0.75},
        {"low_resolution": 0.5},
        {"low_resolution": 0.93},
        {"inverted_gamma": 0.7},
    ],
)
def test_each_distortion_changes_what_it_should(change: dict[str, float]):
    image = (
        np.concatenate([phantom_crop(0, (20, 20, 20)), phantom_crop(1, (20, 20, 20))]).astype(np.float32)[
            :, :, :13, :7
        ]
        / 65535
    )
    before = image.copy()
    out = _views.apply(image, drawn_as(**change))
    assert np.array_equal(image, before)
    assert out.dtype == np.float32
    assert out.shape == image.shape
    assert out.flags.c_contiguous
    assert np.abs(out - image).max() > 1e-3
    if "gibbs" not in change and "low_resolution" not in change:
        assert out.min() >= image.min() - 1e-6
        assert out.max() <= image.max() + 1e-6
    for constant in (0.0, 0.4):
        flat = np.full_like(image, constant)
        assert np.isfinite(_views.apply(flat, drawn_as(**change))).all()
        if "gibbs" not in change:
            np.testing.assert_allclose(_views.apply(flat, drawn_as(**change)), flat, atol=1e-5)


def gibbs_noise(image_CXYZ: np.ndarray, share: float) -> np.ndarray:
    from monai.transforms import GibbsNoise

    return np.asarray(GibbsNoise(share)(image_CXYZ))


def coarsened(image_CXYZ: np.ndarray, share: float) -> np.ndarray:
    down = np.array([1, *(max(1, round(side * share)) / side for side in image_CXYZ.shape[1:])])
    coarse = ndimage.zoom(image_CXYZ, down, order=0, mode="nearest", grid_mode=True)
    return ndimage.zoom(coarse, 1 / down, order=3, mode="nearest", grid_mode=True)


@pytest.mark.parametrize("size", [(24, 24, 24), (9, 12, 15), (10, 7, 5)])
@pytest.mark.parametrize(
    ("name", "low", "high", "plain"),
    [
        ("gibbs", 0.01, 0.999, gibbs_noise),
        (
            "blur_sigma_vox",
            0.5,
            1.0,
            lambda image, sigma: ndimage.gaussian_filter(image, (0, sigma, sigma, sigma)),
        ),
        ("low_resolution", 0.5, 0.99, coarsened),
    ],
)
def test_distortions_equal_plain_ones(
    name: str, low: float, high: float, plain: Any, size: tuple[int, int, int]
):
    image = seeding.rng(0, "plain").random((2, *size), np.float32)
    for value in np.linspace(low, high, 12).tolist():
        out = _views.apply(image, drawn_as(**{name: value}))
        np.testing.assert_allclose(out, plain(image, value), rtol=0, atol=2e-6)


def test_distortions_are_what_they_are_called():
    noise = seeding.rng(0, "noise").random((1, 24, 24, 24), np.float32)
    sharp, soft, coarse = (
        _views.apply(noise, drawn_as(**change))
        for change in ({}, {"blur_sigma_vox": 1.0}, {"low_resolution": 0.5})
    )

    def edges(x: np.ndarray) -> float:
        return float(np.mean([np.abs(np.diff(x, axis=axis)).mean() for axis in (1, 2, 3)]))

    assert edges(soft) < 0.5 * edges(sharp)
    assert edges(coarse) < 0.8 * edges(sharp)
    image = phantom_crop(0).astype(np.float32) / 65535
    dark = _views.apply(image, drawn_as(inverted_gamma=0.7))
    # A power below 1 brightens an image, so of its negative it darkens.
    high = image.max()
    assert image.min() == 0
    np.testing.assert_allclose(dark, high - high * (1 - image / high) ** 0.7, atol=1e-5)
    strong = _views.apply(image, drawn_as(contrast=1.2))
    inside = (strong > image.min()) & (strong < image.max())
    np.testing.assert_allclose(
        strong[inside], ((image - image.mean()) * 1.2 + image.mean())[inside], atol=1e-5
    )


def test_views_survive_a_config_file():
    cfg = methods.config("simclr", {"views": "texture", "view_vox": [16, 16, 16]})
    assert methods.config("simclr", config.to_dict(cfg)) == cfg
    with pytest.raises(UserError, match="views"):
        methods.config("simclr", {"views": "other"})
