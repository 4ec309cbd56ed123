"""Each distortion equals MONAI's, given the same numbers; drawing is pure and keeps to the settings.

Shapes: C channels, X Y Z the crop's axes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from logonet.core import config, seeding
from logonet.core.errors import UserError
from logonet.data import augment
from logonet.data.augment import Config, Drawn, apply, draw

SIZE = (12, 12, 10)
EVERY: dict[str, Any] = {f.name: 1.0 for f in dataclasses.fields(augment.Config) if f.name.endswith("_prob")}
ALL = Config(**EVERY)


def crop(size: tuple[int, int, int] = SIZE, num_channels: int = 2) -> tuple[np.ndarray, np.ndarray]:
    generator = seeding.rng(0, "augment")
    image_CXYZ = generator.random((num_channels, *size), np.float32)
    return image_CXYZ, generator.integers(0, 4, size).astype(np.uint8)


def monai_image(transform: Any, image_CXYZ: np.ndarray, *args: Any, **kwargs: Any) -> np.ndarray:
    return np.asarray(transform(image_CXYZ.copy(), *args, **kwargs))


def monai_labels(transform: Any, labels_XYZ: np.ndarray, **kwargs: Any) -> np.ndarray:
    return np.asarray(transform(labels_XYZ[None].astype(np.float32), **kwargs))[0].astype(np.uint8)


# --------------------------------------------------------------------------------- against MONAI


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_flips_are_monais(axes: tuple[int, ...]) -> None:
    from monai.transforms import Flip

    image, labels = crop()
    ours, our_labels = apply(image, labels, Drawn(flip_axes=axes))
    np.testing.assert_array_equal(ours, monai_image(Flip(axes), image))
    np.testing.assert_array_equal(our_labels, monai_labels(Flip(axes), labels))


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("axes", [(0, 1), (0, 2), (2, 1)])
def test_quarter_turns_are_monais(turns: int, axes: tuple[int, int]) -> None:
    from monai.transforms import Rotate90

    image, labels = crop((12, 12, 12))
    ours, our_labels = apply(image, labels, Drawn(rotate90=turns, rotate90_axes=axes))
    theirs = Rotate90(turns, axes)
    np.testing.assert_array_equal(ours, monai_image(theirs, image))
    np.testing.assert_array_equal(our_labels, monai_labels(theirs, labels))


@pytest.mark.parametrize("factor", [-0.1, 0.07])
def test_intensity_scale_and_shift_are_monais(factor: float) -> None:
    from monai.transforms import ScaleIntensity, ShiftIntensity

    image, labels = crop()
    scaled, same = apply(image, labels, Drawn(intensity_factor=1 + factor))
    np.testing.assert_array_equal(scaled, monai_image(ScaleIntensity(None, None, factor), image))
    np.testing.assert_array_equal(same, labels)
    shifted, _ = apply(image, labels, Drawn(intensity_offset=factor))
    np.testing.assert_array_equal(shifted, monai_image(ShiftIntensity(factor), image))


@pytest.mark.parametrize("gamma", [0.7, 1.5])
def test_gamma_is_monais(gamma: float) -> None:
    from monai.transforms import AdjustContrast

    image, labels = crop()
    image = image * 0.6 - 0.2
    ours, same = apply(image, labels, Drawn(gamma=gamma))
    np.testing.assert_allclose(ours, monai_image(AdjustContrast(gamma), image), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(same, labels)


def test_noise_is_added_like_monais() -> None:
    from monai.transforms import RandGaussianNoise

    image, labels = crop()
    ours, same = apply(image, labels, Drawn(noise_std=0.05, noise_seed=7))
    noise = ours - image
    assert noise.std() == pytest.approx(0.05, rel=0.05)
    assert abs(noise.mean()) < 0.005
    theirs = RandGaussianNoise(prob=1.0)
    theirs.randomize(image)
    theirs.noise = 0.05 * seeding.rng(7, "noise").standard_normal(image.shape, np.float32)
    np.testing.assert_allclose(ours, monai_image(theirs, image, randomize=False), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(same, labels)


@pytest.mark.parametrize("size", [SIZE, (9, 12, 15)])
@pytest.mark.parametrize(
    ("degrees", "zoom"), [((17.0, 0, 0), 1.0), ((0, -23.0, 0), 1.0), ((0, 0, 31.0), 1.0), ((5, 7, -9), 1.13)]
)
def test_rotation_and_zoom_are_monais(
    size: tuple[int, int, int], degrees: tuple[float, float, float], zoom: float
) -> None:
    from monai.transforms import Affine

    image, labels = crop(size)
    image = ndimage.gaussian_filter(image, (0, 1, 1, 1))
    x, y, z = (math.radians(d) for d in degrees)
    ours, our_labels = apply(image, labels, Drawn(rotate_rad=(x, y, z), zoom=zoom))
    theirs = Affine(
        rotate_params=(x, y, z),
        scale_params=(1 / zoom,) * 3,
        padding_mode="zeros",
        dtype=np.float64,
        image_only=True,
    )
    np.testing.assert_allclose(ours, monai_image(theirs, image, mode="bilinear"), rtol=0, atol=1e-4)
    np.testing.assert_array_equal(our_labels, monai_labels(theirs, labels, mode="nearest"))
    assert (our_labels != labels).mean() > 0.1


# --------------------------------------------------------------------------------- what must hold


def test_image_and_labels_stay_together() -> None:
    """A blob in the image stays under its label, whatever is drawn."""
    size = (24, 24, 24)
    x, y, z = np.indices(size)
    labels = ((x - 15) ** 2 + (y - 9) ** 2 + (z - 13) ** 2 < 25).astype(np.uint8)
    image = labels[None].astype(np.float32)
    kinds = ("noise", "gamma", "inverted_gamma", "low_resolution", "blur", "contrast")  # move the threshold
    for i in range(20):
        sharp = dataclasses.replace(ALL, **{f"{kind}_prob": 0.0 for kind in kinds})
        drawn = draw(sharp, size, seeding.rng(0, "t", i))
        moved, moved_labels = apply(image, labels, drawn)
        bright = moved[0] > drawn.intensity_offset + 0.5 * drawn.intensity_factor
        overlap = 2 * (bright & (moved_labels == 1)).sum() / (bright.sum() + (moved_labels == 1).sum())
        assert overlap > 0.9, drawn
        assert 0.5 < moved_labels.sum() / labels.sum() < 2


def handedness(labels_XYZ: np.ndarray) -> float:
    """Sign of the volume that blob 4's offsets to the blobs 1, 2 and 3 span: a mirror image changes it."""
    centres = [np.argwhere(labels_XYZ == k).mean(0) for k in (1, 2, 3, 4)]
    return float(np.sign(np.linalg.det(np.stack([c - centres[3] for c in centres[:3]]))))


@pytest.mark.parametrize("axes", [(), (0,), (0, 1), (0, 1, 2)])
def test_only_an_odd_number_of_flips_mirrors(axes: tuple[int, ...]) -> None:
    size = (24, 24, 24)
    labels = np.zeros(size, np.uint8)
    for k, (x, y, z) in enumerate([(16, 9, 9), (9, 16, 9), (9, 9, 16), (9, 9, 9)], start=1):
        labels[x - 2 : x + 2, y - 2 : y + 2, z - 2 : z + 2] = k
    image = labels[None].astype(np.float32)
    for i in range(10):
        drawn = draw(dataclasses.replace(ALL, flip_axes=axes), size, seeding.rng(0, "mirror", i))
        sign = handedness(apply(image, labels, drawn)[1]) / handedness(labels)
        assert sign == (-1) ** len(axes), drawn


@pytest.mark.parametrize("cfg", [Config(), ALL, augment.none(), augment.nnunet()])
def test_draw_and_apply_are_pure(cfg: Config) -> None:
    image, labels = crop()
    before = image.copy(), labels.copy()
    first, second = (draw(cfg, SIZE, seeding.rng(3, "d")) for _ in range(2))
    assert first == second
    for a, b in zip(apply(image, labels, first), apply(image, labels, second)):
        np.testing.assert_array_equal(a, b)
    for a, b in zip((image, labels), before):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("cfg", [Config(), ALL, augment.nnunet()])
def test_shape_type_and_layout_stay(cfg: Config) -> None:
    image, labels = crop((8, 12, 10), num_channels=1)
    for i in range(20):
        out, out_labels = apply(image, labels, draw(cfg, (8, 12, 10), seeding.rng(0, "s", i)))
        assert (out.shape, out.dtype, out.flags.c_contiguous) == (image.shape, np.float32, True)
        assert (out_labels.shape, out_labels.dtype) == (labels.shape, np.uint8)
        assert out_labels.flags.c_contiguous
        assert np.isfinite(out).all()


@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
def test_constant_images_stay_finite(value: float) -> None:
    image, labels = np.full((1, *SIZE), value, np.float32), np.zeros(SIZE, np.uint8)
    out, out_labels = apply(image, labels, draw(ALL, SIZE, seeding.rng(0, "constant")))
    assert np.isfinite(out).all()
    assert not out_labels.any()


def test_none_changes_nothing() -> None:
    image, labels = crop()
    for i in range(10):
        drawn = draw(augment.none(), SIZE, seeding.rng(0, "none", i))
        assert drawn == Drawn()
        out, out_labels = apply(image, labels, drawn)
        np.testing.assert_array_equal(out, image)
        np.testing.assert_array_equal(out_labels, labels)


def test_what_comes_from_outside_can_be_the_mirror_image() -> None:
    """Zoomed out by two, an even crop lies in the middle of four of its mirror images along each axis."""
    image, labels = crop((8, 8, 8), 1)
    out, out_labels = apply(image, labels, Drawn(zoom=0.5, outside="mirror"))
    far = np.pad(labels, 4, mode="symmetric")
    pairs = np.stack([far[i::2, j::2, k::2] for i, j, k in np.ndindex(2, 2, 2)])
    assert (pairs == out_labels).any(0).all()  # halfway between two voxels, either is nearest
    wide = np.pad(image[0], 4, mode="symmetric")
    means = np.mean([wide[i::2, j::2, k::2] for i, j, k in np.ndindex(2, 2, 2)], axis=0)
    np.testing.assert_allclose(out[0], means, atol=1e-6)
    assert (apply(image, labels, Drawn(zoom=0.5))[0][:, 0] == 0).all()


def test_filters_of_a_labelled_crop_leave_its_labels_alone() -> None:
    image, labels = crop()
    out, same = apply(image, labels, Drawn(blur_sigma_vox=0.7, contrast=1.2, low_resolution=0.6))
    blurred = ndimage.gaussian_filter(image, (0, 0.7, 0.7, 0.7))
    np.testing.assert_allclose(apply(image, labels, Drawn(blur_sigma_vox=0.7))[0], blurred, atol=2e-6)
    assert np.abs(out - image).max() > 0.05
    np.testing.assert_array_equal(same, labels)


def fields_drawn(cfg: Config, size: tuple[int, int, int] = SIZE) -> set[str]:
    nothing, found = Drawn(), set()
    for i in range(40):
        drawn = draw(cfg, size, seeding.rng(0, "switch", i))
        found |= {
            f.name for f in dataclasses.fields(Drawn) if getattr(drawn, f.name) != getattr(nothing, f.name)
        }
    return found


@pytest.mark.parametrize(
    ("switch", "fields"),
    [
        ("flip_prob", {"flip_axes"}),
        ("rotate90_prob", {"rotate90"}),
        ("affine_prob", {"rotate_rad", "zoom"}),
        ("gamma_prob", {"gamma"}),
        ("scale_intensity_prob", {"intensity_factor"}),
        ("shift_intensity_prob", {"intensity_offset"}),
        ("noise_prob", {"noise_std", "noise_seed"}),
        ("rotate_prob", {"rotate_rad"}),
        ("zoom_prob", {"zoom"}),
        ("blur_prob", {"blur_sigma_vox"}),
        ("contrast_prob", {"contrast"}),
        ("low_resolution_prob", {"low_resolution"}),
        ("inverted_gamma_prob", {"inverted_gamma"}),
    ],
)
def test_each_switch_is_its_own(switch: str, fields: set[str]) -> None:
    on: dict[str, Any] = {switch: 0.5}
    assert fields_drawn(dataclasses.replace(augment.none(), **on)) == fields


def test_no_quarter_turn_where_sides_differ() -> None:
    cfg = dataclasses.replace(augment.none(), rotate90_prob=1.0)
    assert fields_drawn(cfg, (12, 10, 12)) == set()
    assert "rotate90" in fields_drawn(dataclasses.replace(cfg, rotate90_axes=(0, 2)), (12, 10, 12))


def test_only_the_named_axes_are_flipped() -> None:
    cfg = dataclasses.replace(ALL, flip_prob=0.5, flip_axes=(1, 2))
    drawn = [draw(cfg, SIZE, seeding.rng(0, "axes", i)).flip_axes for i in range(60)]
    assert set(drawn) == {(), (1,), (2,), (1, 2)}


@pytest.mark.parametrize(
    ("within", "low", "high"),
    [
        (lambda d: math.degrees(d.rotate_rad[0]), -15, 15),
        (lambda d: math.degrees(d.rotate_rad[2]), -15, 15),
        (lambda d: d.zoom, 0.85, 1.15),
        (lambda d: d.gamma, 0.7, 1.5),
        (lambda d: d.intensity_factor, 0.9, 1.1),
        (lambda d: d.intensity_offset, -0.1, 0.1),
        (lambda d: d.noise_std, 0, 0.05),
        (lambda d: d.rotate90, 1, 3),
        (lambda d: d.blur_sigma_vox, 0.5, 1),
        (lambda d: d.contrast, 0.75, 1.25),
        (lambda d: d.low_resolution, 0.5, 1),
    ],
)
def test_draws_fill_their_range(within: Callable[[Drawn], float], low: float, high: float) -> None:
    values = [within(draw(ALL, SIZE, seeding.rng(0, "range", i))) for i in range(300)]
    span = high - low
    assert low <= min(values) < low + 0.1 * span
    assert high - 0.1 * span < max(values) <= high


def test_default_shares_are_those_of_the_recipe() -> None:
    drawn = [draw(Config(), SIZE, seeding.rng(0, "share", i)) for i in range(2000)]
    for share, has in [
        (0.1, lambda d: 0 in d.flip_axes),
        (0.1, lambda d: 2 in d.flip_axes),
        (0.1, lambda d: d.rotate90 > 0),
        (0.1, lambda d: d.intensity_factor != 1),
        (0.5, lambda d: d.intensity_offset != 0),
    ]:
        assert sum(map(has, drawn)) / len(drawn) == pytest.approx(share, abs=0.04)


def test_later_distortions_leave_earlier_draws_and_ids_as_they_were() -> None:
    """What is off neither draws nor is named."""
    drawn = draw(Config(), SIZE, seeding.rng(0, "share", 3))
    rng = seeding.rng(0, "share", 3)
    rng.random()  # of a rotation with a zoom
    assert drawn.flip_axes == tuple(axis for axis in range(3) if rng.random() < 0.1)
    later = {"blur_prob", "rotate_prob", "zoom_prob", "contrast_prob", "gamma_keeps_stats", "low_resolution"}
    assert not later & config.to_dict(Config()).keys()


def test_nnunets_shares_and_strengths() -> None:
    """nnUNetTrainer.get_training_transforms; blur and low resolution are half as frequent for one channel."""
    count, nothing = 4000, Drawn()
    drawn = [draw(augment.nnunet(), SIZE, seeding.rng(0, "nnunet", i)) for i in range(count)]
    for name, chance, low, high in [
        ("rotate_rad", 0.2, None, None),
        ("zoom", 0.2, 1 / 1.4, 1 / 0.7),
        ("noise_std", 0.1, 0, 0.1 / 3),
        ("blur_sigma_vox", 0.1, 0.5, 1),
        ("intensity_factor", 0.15, 0.75, 1.25),
        ("contrast", 0.15, 0.75, 1.25),
        ("low_resolution", 0.125, 0.5, 1),
        ("inverted_gamma", 0.1, 0.7, 1.5),
        ("gamma", 0.3, 0.7, 1.5),
        ("intensity_offset", 0, None, None),
        ("rotate90", 0, None, None),
    ]:
        values = [getattr(d, name) for d in drawn if getattr(d, name) != getattr(nothing, name)]
        deviation = math.sqrt(chance * (1 - chance) / count)
        assert len(values) / count == pytest.approx(chance, abs=4 * deviation + 1e-9), name
        if low is not None:
            assert low <= min(values) <= max(values) <= high, name
    for axis in range(3):
        assert sum(axis in d.flip_axes for d in drawn) / count == pytest.approx(0.5, abs=0.04)
        angles = [abs(math.degrees(d.rotate_rad[axis])) for d in drawn]
        assert 28 < max(angles) <= 30
    flat = [draw(augment.nnunet(flat=True), SIZE, seeding.rng(0, "flat", i)).rotate_rad for i in range(200)]
    assert {turn[:2] for turn in flat} == {(0.0, 0.0)}
    assert max(abs(turn[2]) for turn in flat) > math.radians(150)


@pytest.mark.parametrize("change", [{"gamma": 0.7}, {"gamma": 1.5}, {"inverted_gamma": 1.5}])
def test_gamma_that_keeps_mean_and_deviation(change: dict[str, float]) -> None:
    """Against nnU-Net's steps, one after the other."""
    image, labels = crop()
    image = image * 0.6 - 0.2
    (name, gamma), sign = next(iter(change.items())), -1 if "inverted_gamma" in change else 1
    x = sign * image.astype(np.float64)
    powered = ((x - x.min()) / np.ptp(x)) ** gamma * np.ptp(x) + x.min()
    expected = sign * ((powered - powered.mean()) / powered.std() * x.std() + x.mean())
    ours, _ = apply(image, labels, Drawn(**{name: gamma}, gamma_keeps_stats=True))
    np.testing.assert_allclose(ours, expected, atol=2e-6)
    assert ours.std() == pytest.approx(image.std(), rel=1e-4)


def test_a_config_file_gives_the_same_config() -> None:
    assert config.from_dict(Config, config.to_dict(ALL)) == ALL
    assert config.from_dict(Config, config.to_dict(augment.nnunet())) == augment.nnunet()
    assert config.from_dict(Config, {"flip_axes": []}).flip_axes == ()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"flip_prob": 1.5}, r"augment\.flip_prob is 1\.5"),
        ({"flip_axes": (0, 3)}, r"augment\.flip_axes"),
        ({"rotate90_axes": (1, 1)}, r"augment\.rotate90_axes"),
        ({"zoom": (1.2, 0.8)}, r"augment\.zoom"),
        ({"gamma": (0.0, 1.0)}, r"augment\.gamma"),
        ({"noise_std": -0.1}, r"augment\.noise_std"),
        ({"blur_sigma_vox": (0.0, 1.0)}, r"augment\.blur_sigma_vox"),
        ({"low_resolution": (0.5, 1.5)}, r"augment\.low_resolution"),
        ({"contrast": (1.2, 0.8)}, r"augment\.contrast"),
        ({"rotate_deg": (-1.0, 0.0, 0.0)}, r"augment\.rotate_deg"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Config(**options)
