"""Two views of one crop for the methods that compare them: `draw` decides, `apply` does; both are pure.

Shapes: C input channels, X Y Z the crop's axes in RAS order (Z is the slice axis). Images are float32,
nominally in [0, 1] and not clipped afterwards.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from scipy import fft, ndimage, sparse

from logonet.core.config import Section, SizeVox
from logonet.core.errors import UserError
from logonet.data import augment, volume
from logonet.methods import DataSpec
from logonet.networks import Triple

Views = Literal["nnssl", "texture"]


@dataclass(frozen=True)
class Recipe:
    """What may happen to a view beyond what ``augment`` can do, and that.

    Attributes:
        blur_prob, blur_sigma_vox: Gaussian blur.
        contrast_prob, contrast: each channel's distances from its mean times a factor, clipped to its old range.
        low_resolution_prob, low_resolution: the view is shrunk to this share of its sides and enlarged again.
        inverted_gamma_prob: gamma, with ``augment``'s range of powers, of the negative.
        gibbs_prob: frequencies are cut off outside a sphere; of its radius a share drawn from [0, 1) is lost.
    """

    augment: augment.Config
    blur_prob: float = 0.0
    blur_sigma_vox: tuple[float, float] = (0.5, 1.0)
    contrast_prob: float = 0.0
    contrast: tuple[float, float] = (0.75, 1.25)
    low_resolution_prob: float = 0.0
    low_resolution: tuple[float, float] = (0.5, 1.0)
    inverted_gamma_prob: float = 0.0
    gibbs_prob: float = 0.0


_MOVED = replace(augment.none(), flip_prob=0.5, rotate90_prob=0.75, gamma_prob=0.3, gamma=(0.7, 1.5))
_SHIFTED = replace(augment.none(), shift_intensity_prob=0.1, shift_intensity=0.1)
RECIPES: dict[str, Recipe] = {
    # nnU-Net's distortions as nnssl has them. Its noise, of variance 0 to 0.1 in images of variance 1, is in
    # ours of a window that spans about 3 standard deviations. Quarter turns, 0 to 3, are alike likely.
    "nnssl": Recipe(
        replace(_MOVED, scale_intensity_prob=0.15, scale_intensity=0.25, noise_prob=0.1, noise_std=0.1),
        blur_prob=0.2,
        contrast_prob=0.15,
        low_resolution_prob=0.1,
        inverted_gamma_prob=0.1,
    ),
    # SimTROT, section 3.2: nothing moves. Strengths are those of the released code.
    "texture": Recipe(
        replace(_SHIFTED, scale_intensity_prob=0.1, scale_intensity=0.1, noise_prob=0.5, noise_std=0.1),
        gibbs_prob=0.5,
    ),
}


@dataclass(frozen=True)
class Drawn:
    """What happens to one view, in this order; the defaults change nothing."""

    gibbs: float = 0.0
    blur_sigma_vox: float = 0.0
    contrast: float = 1.0
    low_resolution: float = 1.0
    inverted_gamma: float = 1.0
    augment: augment.Drawn = field(default_factory=augment.Drawn)


def draw(recipe: Recipe, size_vox: Triple, rng: np.random.Generator) -> Drawn:
    """What to do to a view of ``size_vox`` voxels; a function of the arguments alone."""
    kinds = (
        ("gibbs", recipe.gibbs_prob, (0.0, 1.0)),
        ("blur_sigma_vox", recipe.blur_prob, recipe.blur_sigma_vox),
        ("contrast", recipe.contrast_prob, recipe.contrast),
        ("low_resolution", recipe.low_resolution_prob, recipe.low_resolution),
        ("inverted_gamma", recipe.inverted_gamma_prob, recipe.augment.gamma),
    )
    what = {name: rng.uniform(*span) for name, prob, span in kinds if rng.random() < prob}
    return Drawn(**what, augment=augment.draw(recipe.augment, size_vox, rng))


def apply(image_CXYZ: np.ndarray, drawn: Drawn) -> np.ndarray:
    """The distorted float32 image: contiguous, of the same shape; the input stays as it is."""
    image = image_CXYZ
    if drawn.gibbs > 0:
        image = _without_high_frequencies(image, drawn.gibbs)
    if drawn.blur_sigma_vox > 0:
        image = along_axes(image, [_blur(side, drawn.blur_sigma_vox) for side in image.shape[1:]])
    if drawn.contrast != 1:
        mean, low, high = (f(image, axis=(1, 2, 3), keepdims=True) for f in (np.mean, np.min, np.max))
        image = np.clip((image - mean) * np.float32(drawn.contrast) + mean, low, high)
    if drawn.low_resolution != 1:
        image = along_axes(image, [_coarsening(side, drawn.low_resolution) for side in image.shape[1:]])
    if drawn.inverted_gamma != 1:
        image = -augmented(-image, augment.Drawn(gamma=drawn.inverted_gamma))
    return augmented(image, drawn.augment)


def _without_high_frequencies(image_CXYZ: np.ndarray, share: float) -> np.ndarray:
    """MONAI's GibbsNoise by real transforms, without computing along Z what is cut.

    MONAI's sphere lies half a frequency beside zero where sides are even, and MONAI drops the imaginary part that this
    gives. That is the same as cutting with the mean of the sphere and its mirror image.
    """
    shape = image_CXYZ.shape[1:]
    radius = (1 - share) * max(shape) * math.sqrt(2) / 2
    kept = min(shape[2] // 2, math.ceil(radius)) + 1  # frequencies along Z
    at = [fft.ifftshift(np.arange(side, dtype=np.float32) - (side - 1) / 2) for side in shape]
    spheres = []
    for x, y, z in (at, [np.roll(axis[::-1], 1) for axis in at]):
        spheres.append(x[:, None, None] ** 2 + y[:, None] ** 2 + z[:kept] ** 2 <= radius**2)
    spectrum = fft.fft2(fft.rfft(image_CXYZ)[..., :kept], axes=(1, 2))
    spectrum *= np.add(*spheres, dtype=np.float32) / 2
    return fft.irfft(fft.ifft2(spectrum, axes=(1, 2), overwrite_x=True), shape[2])


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


def augmented(image_CXYZ: np.ndarray, drawn: augment.Drawn) -> np.ndarray:
    """``augment.apply`` without labels."""
    no_labels_XYZ = np.broadcast_to(np.uint8(0), image_CXYZ.shape[1:])
    return augment.apply(image_CXYZ, no_labels_XYZ, drawn)[0]


def view(image_CXYZ: np.ndarray, views: Views, rng: np.random.Generator) -> np.ndarray:
    """One view of an image, float32 of the same shape."""
    size_vox: Any = image_CXYZ.shape[1:]
    return apply(image_CXYZ, draw(RECIPES[views], size_vox, rng))


def starts(size_vox: Triple, view_vox: Triple, rng: np.random.Generator) -> list[tuple[int, ...]]:
    """The first voxels of two views of a crop: the first anywhere, the second at most half a view from it."""
    pairs = []
    for side, view_side in zip(size_vox, view_vox):
        last, half = side - view_side, view_side // 2
        first = int(rng.integers(last + 1))
        second = int(rng.integers(max(0, first - half), min(last, first + half) + 1))
        pairs.append((first, second))
    return list(zip(*pairs))


@dataclass(frozen=True)
class Config(Section, key="method"):
    """Settings of methods that compare two views.

    Attributes:
        views: "nnssl" has noise, blur, brightness, contrast, low resolution, gamma, mirroring and quarter turns;
            "texture", of SimTROT, has noise, Gibbs noise, intensity scale and shift, and moves nothing.
        view_vox: None makes both views of the whole crop; else they have this size (X, Y, Z in voxels) and the
            second lies at most half of it from the first along each axis.
    """

    views: Views = "nnssl"
    view_vox: SizeVox | None = None


def prepare(sample: Mapping[str, Any], cfg: Config, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Make two views.

    Returns:
        ``first`` and ``second``, float32 (C, X, Y, Z), nominally in [0, 1], of ``view_vox`` voxels or the crop's.
    """
    image_CXYZ = volume.from_uint16(sample["image_CXYZ"])
    size_vox = cfg.view_vox or image_CXYZ.shape[1:]
    boxes = [
        tuple(slice(a, a + n) for a, n in zip(start, size_vox))
        for start in starts(image_CXYZ.shape[1:], size_vox, rng)
    ]
    first, second = (view(image_CXYZ[:, *box], cfg.views, rng) for box in boxes)
    return {"first": first, "second": second}


def sizes(cfg: Config, size_vox: Triple) -> tuple[Triple, ...]:
    """The size of a view."""
    return (cfg.view_vox or size_vox,)


def check(cfg: Config, data_spec: DataSpec) -> None:
    """Raise UserError unless views fit into the crops."""
    size_vox = data_spec.size_vox
    if cfg.view_vox is not None and any(v > side for v, side in zip(cfg.view_vox, size_vox)):
        raise UserError(
            f"method.view_vox is {cfg.view_vox} and the crops have {size_vox} voxels; a view cannot be larger than its "
            "crop"
        )
