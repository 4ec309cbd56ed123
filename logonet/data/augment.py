"""Distortions of a labelled training crop: `draw` chooses them, `apply` applies them; both are pure.

Shapes: C input channels, X Y Z the crop's axes in RAS order (X grows to the patient's right, Z is the slice
axis). Images are float32, nominally in [0, 1] and not clipped afterwards; labels are class indices, 0
background.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
from scipy import ndimage, sparse

from logonet.core import seeding
from logonet.core.config import OMIT_DEFAULT, Fraction, NonNegative, Positive, Section, Share
from logonet.core.errors import UserError

Axis = Literal[0, 1, 2]
Outside = Literal["zero", "mirror"]


def _later(default: Any) -> Any:
    """A key that came later: ids of what leaves it at its default stay as they were."""
    return field(default=default, metadata=OMIT_DEFAULT)


@dataclass(frozen=True)
class Config(Section, key="augment"):
    """The defaults are MONAI's recipe for BTCV: flips, quarter turns, intensity scale and shift. `nnunet` is nnU-Net's.

    Every distortion has a probability of its own, and 0 switches it off.

    Attributes:
        flip_prob: for each of ``flip_axes`` by itself.
        flip_axes: the axes that may be mirrored, out of 0 (X), 1 (Y), 2 (Z). One mirrored axis turns a right
            kidney into a left one in a left kidney's place: the recipe does so nevertheless, but leave axis 0
            out (or set () to mirror nothing) where labels tell left from right. Rotations mirror nothing.
        rotate90_prob: 1 to 3 quarter turns in the plane of ``rotate90_axes``, whose sides must be equal; where
            they are not, there is no turn.
        affine_prob: rotation and zoom about the crop's centre.
        rotate_prob, zoom_prob: of either by itself, where there is not both already.
        outside: what comes from outside is 0 in image and label, or the crop's mirror image. As with flips, mirrored
            organs are on the wrong side.
        rotate_deg: largest angle about X, Y and Z, either way. Angles are those of the voxel grid, so keep them
            small where voxels are far from cubes.
        zoom: lowest and highest magnification.
        rotate90_axes: the plane of the quarter turns.
        gamma: lowest and highest power.
        gamma_prob: the image's own range is mapped to [0, 1], raised to a power out of ``gamma``, mapped back.
        inverted_gamma_prob: the same to the negative.
        gamma_keeps_stats: either gamma leaves the image's mean and standard deviation as they are.
        scale_intensity_prob, shift_intensity_prob, noise_prob: of what the three keys below say.
        scale_intensity: times a factor from 1 - this to 1 + this.
        shift_intensity: plus an offset from -this to this.
        noise_std: plus Gaussian noise whose standard deviation is drawn from 0 to this.
        blur_prob, blur_sigma_vox: Gaussian blur of a width between these.
        contrast_prob, contrast: each channel's distances from its mean times a factor, clipped to its old range.
        low_resolution_prob, low_resolution: the image is shrunk to this share of its sides and enlarged again.
    """

    flip_prob: Share = 0.1
    flip_axes: tuple[Axis, ...] = (0, 1, 2)
    rotate90_prob: Share = 0.1
    rotate90_axes: tuple[Axis, Axis] = (0, 1)
    affine_prob: Share = 0.0
    rotate_deg: tuple[NonNegative, NonNegative, NonNegative] = (15.0, 15.0, 15.0)
    zoom: tuple[Positive, Positive] = (0.85, 1.15)
    gamma_prob: Share = 0.0
    gamma: tuple[Positive, Positive] = (0.7, 1.5)
    scale_intensity_prob: Share = 0.1
    scale_intensity: NonNegative = 0.1
    shift_intensity_prob: Share = 0.5
    shift_intensity: NonNegative = 0.1
    noise_prob: Share = 0.0
    noise_std: NonNegative = 0.05
    rotate_prob: Share = _later(0.0)
    zoom_prob: Share = _later(0.0)
    outside: Outside = _later("zero")
    inverted_gamma_prob: Share = _later(0.0)
    gamma_keeps_stats: bool = _later(False)
    blur_prob: Share = _later(0.0)
    blur_sigma_vox: tuple[Positive, Positive] = _later((0.5, 1.0))
    contrast_prob: Share = _later(0.0)
    contrast: tuple[NonNegative, NonNegative] = _later((0.75, 1.25))
    low_resolution_prob: Share = _later(0.0)
    low_resolution: tuple[Fraction, Fraction] = _later((0.5, 1.0))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("flip_axes", "rotate90_axes"):
            axes = getattr(self, name)
            if len(set(axes)) < len(axes):
                raise UserError(f"augment.{name} is {axes}; name different axes")
        for name in ("zoom", "gamma", "blur_sigma_vox", "contrast", "low_resolution"):
            low, high = getattr(self, name)
            if low > high:
                raise UserError(f"augment.{name} is ({low}, {high}); set (low, high) with low <= high")


def none() -> Config:
    """A config that distorts nothing."""
    off: Any = {f.name: 0.0 for f in fields(Config) if f.name.endswith("_prob")}
    return Config(**off)


def nnunet(*, flat: bool = False) -> Config:
    """What nnU-Net v2 does by default, with its probabilities, to crops in [0, 1] with a standard deviation near 1/3.

    Departures: noise, whose strength nnU-Net relates to the image's standard deviation, comes last and blur before
    rotation; all channels share what is drawn, so that blur and low resolution, which a channel there escapes half the
    time, are half as frequent here; what a rotated crop lacks is mirrored, where nnU-Net cuts a larger one.

    Args:
        flat: crops whose shortest side, Z, is less than a third of the others: rotations within slices, by any angle.
    """
    return Config(
        flip_prob=0.5,
        rotate90_prob=0.0,
        rotate_prob=0.2,
        rotate_deg=(0.0, 0.0, 180.0) if flat else (30.0, 30.0, 30.0),
        zoom_prob=0.2,
        zoom=(1 / 1.4, 1 / 0.7),
        outside="mirror",
        gamma_prob=0.3,
        inverted_gamma_prob=0.1,
        gamma_keeps_stats=True,
        gamma=(0.7, 1.5),
        scale_intensity_prob=0.15,
        scale_intensity=0.25,
        shift_intensity_prob=0.0,
        noise_prob=0.1,
        noise_std=0.1 / 3,
        blur_prob=0.1,
        contrast_prob=0.15,
        low_resolution_prob=0.125,
    )


@dataclass(frozen=True)
class Drawn:
    """What happens to one crop, in this order. The defaults change nothing.

    Attributes:
        blur_sigma_vox: of a Gaussian.
        contrast: factor of the distances from each channel's mean.
        low_resolution: share of the sides to which the image is shrunk.
        inverted_gamma: power of the negative.
        rotate_rad, zoom: see `sampling_matrix`.
        outside: see `Config`.
        flip_axes: axes that are mirrored.
        rotate90: quarter turns in the plane of ``rotate90_axes``, from the first axis towards the second.
        gamma, intensity_factor, intensity_offset: power, factor and summand.
        gamma_keeps_stats: see `Config`.
        noise_std, noise_seed: the noise is drawn from a generator of its own, so that this stays small.
    """

    blur_sigma_vox: float = 0.0
    contrast: float = 1.0
    low_resolution: float = 1.0
    inverted_gamma: float = 1.0
    rotate_rad: tuple[float, float, float] = (0.0, 0.0, 0.0)
    zoom: float = 1.0
    outside: Outside = "zero"
    flip_axes: tuple[int, ...] = ()
    rotate90: int = 0
    rotate90_axes: tuple[int, int] = (0, 1)
    gamma: float = 1.0
    gamma_keeps_stats: bool = False
    intensity_factor: float = 1.0
    intensity_offset: float = 0.0
    noise_std: NonNegative = 0.0
    noise_seed: int = 0


def draw(cfg: Config, size_vox: tuple[int, int, int], rng: np.random.Generator) -> Drawn:
    """What to do to a crop of ``size_vox`` voxels; a function of the arguments alone."""

    def happens(prob: float) -> bool:
        # What is off draws nothing, so the other draws are what they were before there was this distortion.
        return prob > 0 and bool(rng.random() < prob)

    kinds = (
        ("blur_sigma_vox", cfg.blur_prob, cfg.blur_sigma_vox),
        ("contrast", cfg.contrast_prob, cfg.contrast),
        ("low_resolution", cfg.low_resolution_prob, cfg.low_resolution),
        ("inverted_gamma", cfg.inverted_gamma_prob, cfg.gamma),
    )
    what: dict[str, Any] = {name: rng.uniform(*span) for name, prob, span in kinds if happens(prob)}
    what |= {"gamma_keeps_stats": cfg.gamma_keeps_stats, "outside": cfg.outside}
    both = rng.random() < cfg.affine_prob
    if both or happens(cfg.rotate_prob):
        x, y, z = (math.radians(rng.uniform(-deg, deg)) for deg in cfg.rotate_deg)
        what["rotate_rad"] = x, y, z
    if both or happens(cfg.zoom_prob):
        what["zoom"] = rng.uniform(*cfg.zoom)
    what["flip_axes"] = tuple(axis for axis in cfg.flip_axes if rng.random() < cfg.flip_prob)
    first, second = cfg.rotate90_axes
    if rng.random() < cfg.rotate90_prob and size_vox[first] == size_vox[second]:
        what |= {"rotate90": int(rng.integers(1, 4)), "rotate90_axes": cfg.rotate90_axes}
    if rng.random() < cfg.gamma_prob:
        what["gamma"] = rng.uniform(*cfg.gamma)
    if rng.random() < cfg.scale_intensity_prob:
        what["intensity_factor"] = 1 + rng.uniform(-cfg.scale_intensity, cfg.scale_intensity)
    if rng.random() < cfg.shift_intensity_prob:
        what["intensity_offset"] = rng.uniform(-cfg.shift_intensity, cfg.shift_intensity)
    if rng.random() < cfg.noise_prob:
        what |= {"noise_std": rng.uniform(0, cfg.noise_std), "noise_seed": int(rng.integers(2**63))}
    return Drawn(**what)


def apply(image_CXYZ: np.ndarray, labels_XYZ: np.ndarray, drawn: Drawn) -> tuple[np.ndarray, np.ndarray]:
    """The distorted float32 image and labels: contiguous, of the same shapes and types; inputs stay as they are.

    Labels are moved by nearest neighbour, images linearly, and both by the same matrix.
    """
    assert image_CXYZ.dtype == np.float32
    assert image_CXYZ.shape[1:] == labels_XYZ.shape
    image, labels = _filtered(image_CXYZ, drawn), labels_XYZ
    if any(drawn.rotate_rad) or drawn.zoom != 1:
        matrix_33 = sampling_matrix(drawn.rotate_rad, drawn.zoom)
        # grid-constant: "constant" would cut the outermost half voxel off instead of blending it with 0.
        mode = {"zero": "grid-constant", "mirror": "reflect"}[drawn.outside]
        image = np.stack([_resampled(channel_XYZ, matrix_33, 1, mode) for channel_XYZ in image])
        labels = _resampled(labels, matrix_33, 0, mode)
    image = np.flip(image, tuple(axis + 1 for axis in drawn.flip_axes))
    labels = np.flip(labels, drawn.flip_axes)
    if drawn.rotate90:
        first, second = drawn.rotate90_axes
        image = np.rot90(image, drawn.rotate90, (first + 1, second + 1))
        labels = np.rot90(labels, drawn.rotate90, (first, second))
    return np.ascontiguousarray(_intensities(image, drawn)), np.ascontiguousarray(labels)


def sampling_matrix(rotate_rad: tuple[float, float, float], zoom: float) -> np.ndarray:
    """(3, 3): where, seen from the crop's centre, a voxel of the result is read; MONAI's Rx Ry Rz / zoom."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(rotate_rad), np.sin(rotate_rad)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_x @ about_y @ about_z / zoom


def _resampled(array_XYZ: np.ndarray, matrix_33: np.ndarray, order: int, mode: str) -> np.ndarray:
    centre_3 = (np.array(array_XYZ.shape) - 1) / 2
    offset_3 = centre_3 - matrix_33 @ centre_3
    options: dict[str, Any] = {"output": array_XYZ.dtype, "order": order, "mode": mode}
    return ndimage.affine_transform(array_XYZ, matrix_33, offset_3, **options)


def _filtered(image: np.ndarray, drawn: Drawn) -> np.ndarray:
    if drawn.blur_sigma_vox > 0:
        image = along_axes(image, [_blur(side, drawn.blur_sigma_vox) for side in image.shape[1:]])
    if drawn.contrast != 1:
        mean, low, high = (f(image, axis=(1, 2, 3), keepdims=True) for f in (np.mean, np.min, np.max))
        image = np.clip((image - mean) * np.float32(drawn.contrast) + mean, low, high)
    if drawn.low_resolution != 1:
        image = along_axes(image, [_coarsening(side, drawn.low_resolution) for side in image.shape[1:]])
    if drawn.inverted_gamma != 1:
        image = -_powered(-image, drawn.inverted_gamma, drawn.gamma_keeps_stats)
    return image


def along_axes(image_CXYZ: np.ndarray, matrices: Sequence[sparse.csr_array]) -> np.ndarray:
    """The image multiplied by one matrix along X, one along Y and one along Z; its sides become theirs.

    Sparse products run on one thread in a fixed order, so the bits depend on neither BLAS nor its threads.
    """
    image = image_CXYZ
    for axis, matrix in reversed([*enumerate(matrices, 1)]):  # X last leaves the result in order
        lines = np.moveaxis(image, axis, 0)
        product = matrix @ lines.reshape(len(lines), -1)
        image = np.moveaxis(product.reshape(-1, *lines.shape[1:]), 0, axis)
    return image


def _sparse(matrix: np.ndarray) -> sparse.csr_array:
    """In float32, without entries that rounding would lose."""
    return sparse.csr_array(np.where(np.abs(matrix) < 1e-8, 0, matrix).astype(np.float32))


@functools.cache
def resizing(side: int, new_side: int, order: int) -> sparse.csr_array:
    """The matrix of ``ndimage.zoom`` along one axis, a spline of ``order``.

    Half a voxel at each end belongs to the image, as in interpolation without aligned corners.
    """
    zoom = new_side / side, 1
    return _sparse(ndimage.zoom(np.eye(side), zoom, order=order, mode="nearest", grid_mode=True))


def _coarsening(side: int, share: float) -> sparse.csr_array:
    """Nearest neighbour down, cubic up, as nnU-Net has it."""
    small = max(1, round(side * share))
    return resizing(small, side, order=3) @ resizing(side, small, order=0)


def _blur(side: int, sigma_vox: float) -> sparse.csr_array:
    return _sparse(ndimage.gaussian_filter1d(np.eye(side), sigma_vox, axis=0))


def _powered(image: np.ndarray, gamma: float, keeps_stats: bool) -> np.ndarray:
    low = image.min()
    span = image.max() - low
    powered = ((image - low) / (span + np.float32(1e-7))) ** gamma * span + low
    if keeps_stats:
        factor = image.std() / np.maximum(powered.std(), np.float32(1e-7))
        powered = (powered - powered.mean()) * factor + image.mean()
    return powered


def _intensities(image: np.ndarray, drawn: Drawn) -> np.ndarray:
    if drawn.gamma != 1:
        image = _powered(image, drawn.gamma, drawn.gamma_keeps_stats)
    if drawn.intensity_factor != 1:
        image = image * drawn.intensity_factor
    if drawn.intensity_offset != 0:
        image = image + drawn.intensity_offset
    if drawn.noise_std > 0:
        normal = seeding.rng(drawn.noise_seed, "noise").standard_normal(image.shape, np.float32)
        normal *= np.float32(drawn.noise_std)
        image = np.add(image, normal, out=normal)
    return image
