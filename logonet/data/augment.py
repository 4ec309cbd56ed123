"""Distortions of a labelled training crop: `draw` chooses them, `apply` applies them; both are pure.

Shapes: C input channels, X Y Z the crop's axes in RAS order (X grows to the patient's right, Z is the slice
axis). Images are float32, nominally in [0, 1] and not clipped afterwards; labels are class indices, 0
background.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
from scipy import ndimage

from logonet.core import seeding
from logonet.core.config import NonNegative, Positive, Section, Share
from logonet.core.errors import UserError

Axis = Literal[0, 1, 2]


@dataclass(frozen=True)
class Config(Section, key="augment"):
    """The defaults are MONAI's recipe for BTCV: flips, quarter turns, intensity scale and shift.

    Every distortion has a probability of its own, and 0 switches it off.

    Attributes:
        flip_prob: for each of ``flip_axes`` by itself.
        flip_axes: the axes that may be mirrored, out of 0 (X), 1 (Y), 2 (Z). One mirrored axis turns a right
            kidney into a left one in a left kidney's place: the recipe does so nevertheless, but leave axis 0
            out (or set () to mirror nothing) where labels tell left from right. Rotations mirror nothing.
        rotate90_prob: 1 to 3 quarter turns in the plane of ``rotate90_axes``, whose sides must be equal; where
            they are not, there is no turn.
        affine_prob: rotation and zoom about the crop's centre; what comes from outside is 0 in image and label.
        rotate_deg: largest angle about X, Y and Z, either way. Angles are those of the voxel grid, so keep them
            small where voxels are far from cubes.
        zoom: lowest and highest magnification.
        rotate90_axes: the plane of the quarter turns.
        gamma: lowest and highest power.
        gamma_prob: the image's own range is mapped to [0, 1], raised to a power out of ``gamma``, mapped back.
        scale_intensity_prob, shift_intensity_prob, noise_prob: of what the three keys below say.
        scale_intensity: times a factor from 1 - this to 1 + this.
        shift_intensity: plus an offset from -this to this.
        noise_std: plus Gaussian noise whose standard deviation is drawn from 0 to this.
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

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("flip_axes", "rotate90_axes"):
            axes = getattr(self, name)
            if len(set(axes)) < len(axes):
                raise UserError(f"augment.{name} is {axes}; name different axes")
        for name in ("zoom", "gamma"):
            low, high = getattr(self, name)
            if low > high:
                raise UserError(f"augment.{name} is ({low}, {high}); set (low, high) with low <= high")


def none() -> Config:
    """A config that distorts nothing."""
    off: Any = {f.name: 0.0 for f in fields(Config) if f.name.endswith("_prob")}
    return Config(**off)


@dataclass(frozen=True)
class Drawn:
    """What happens to one crop, in this order. The defaults change nothing.

    Attributes:
        rotate_rad, zoom: see `sampling_matrix`.
        flip_axes: axes that are mirrored.
        rotate90: quarter turns in the plane of ``rotate90_axes``, from the first axis towards the second.
        gamma, intensity_factor, intensity_offset: power, factor and summand.
        noise_std, noise_seed: the noise is drawn from a generator of its own, so that this stays small.
    """

    rotate_rad: tuple[float, float, float] = (0.0, 0.0, 0.0)
    zoom: float = 1.0
    flip_axes: tuple[int, ...] = ()
    rotate90: int = 0
    rotate90_axes: tuple[int, int] = (0, 1)
    gamma: float = 1.0
    intensity_factor: float = 1.0
    intensity_offset: float = 0.0
    noise_std: NonNegative = 0.0
    noise_seed: int = 0


def draw(cfg: Config, size_vox: tuple[int, int, int], rng: np.random.Generator) -> Drawn:
    """What to do to a crop of ``size_vox`` voxels; a function of the arguments alone."""
    what: dict[str, Any] = {}
    if rng.random() < cfg.affine_prob:
        x, y, z = (math.radians(rng.uniform(-deg, deg)) for deg in cfg.rotate_deg)
        what |= {"rotate_rad": (x, y, z), "zoom": rng.uniform(*cfg.zoom)}
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
    image, labels = image_CXYZ, labels_XYZ
    if any(drawn.rotate_rad) or drawn.zoom != 1:
        matrix_33 = sampling_matrix(drawn.rotate_rad, drawn.zoom)
        image = np.stack([_resampled(channel_XYZ, matrix_33, order=1) for channel_XYZ in image])
        labels = _resampled(labels, matrix_33, order=0)
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


def _resampled(array_XYZ: np.ndarray, matrix_33: np.ndarray, order: int) -> np.ndarray:
    centre_3 = (np.array(array_XYZ.shape) - 1) / 2
    offset_3 = centre_3 - matrix_33 @ centre_3
    # grid-constant: "constant" would cut the outermost half voxel off instead of blending it with 0.
    options: dict[str, Any] = {"output": array_XYZ.dtype, "order": order, "mode": "grid-constant"}
    return ndimage.affine_transform(array_XYZ, matrix_33, offset_3, **options)


def _intensities(image: np.ndarray, drawn: Drawn) -> np.ndarray:
    if drawn.gamma != 1:
        low = image.min()
        span = image.max() - low
        image = ((image - low) / (span + np.float32(1e-7))) ** drawn.gamma * span + low
    if drawn.intensity_factor != 1:
        image = image * drawn.intensity_factor
    if drawn.intensity_offset != 0:
        image = image + drawn.intensity_offset
    if drawn.noise_std > 0:
        normal = seeding.rng(drawn.noise_seed, "noise").standard_normal(image.shape, np.float32)
        normal *= np.float32(drawn.noise_std)
        image = np.add(image, normal, out=normal)
    return image
