"""Two views of one crop for the methods that compare them: `draw` decides, `apply` does; both are pure.

Shapes: C input channels, X Y Z the crop's axes in RAS order (Z is the slice axis). Images are float32,
nominally in [0, 1] and not clipped afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from scipy import fft

from logonet.core.config import Section, SizeVox
from logonet.core.errors import UserError
from logonet.data import augment, volume
from logonet.methods import DataSpec
from logonet.networks import Triple

Views = Literal["nnssl", "texture"]


@dataclass(frozen=True)
class Recipe:
    """What may happen to a view: Gibbs noise, and what ``augment`` can do.

    Attributes:
        gibbs_prob: frequencies are cut off outside a sphere; of its radius a share drawn from [0, 1) is lost.
    """

    augment: augment.Config
    gibbs_prob: float = 0.0


_MOVED = replace(augment.none(), flip_prob=0.5, rotate90_prob=0.75, gamma_prob=0.3, gamma=(0.7, 1.5))
_SHIFTED = replace(augment.none(), shift_intensity_prob=0.1, shift_intensity=0.1)
RECIPES: dict[str, Recipe] = {
    # nnU-Net's distortions as nnssl has them. Its noise, of variance 0 to 0.1 in images of variance 1, is in
    # ours of a window that spans about 3 standard deviations. Quarter turns, 0 to 3, are alike likely.
    "nnssl": Recipe(
        replace(
            _MOVED,
            scale_intensity_prob=0.15,
            scale_intensity=0.25,
            noise_prob=0.1,
            noise_std=0.1,
            blur_prob=0.2,
            contrast_prob=0.15,
            low_resolution_prob=0.1,
            inverted_gamma_prob=0.1,
        ),
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
    augment: augment.Drawn = field(default_factory=augment.Drawn)


def draw(recipe: Recipe, size_vox: Triple, rng: np.random.Generator) -> Drawn:
    """What to do to a view of ``size_vox`` voxels; a function of the arguments alone."""
    gibbs = rng.uniform() if rng.random() < recipe.gibbs_prob else 0.0
    return Drawn(gibbs, augment.draw(recipe.augment, size_vox, rng))


def apply(image_CXYZ: np.ndarray, drawn: Drawn) -> np.ndarray:
    """The distorted float32 image: contiguous, of the same shape; the input stays as it is."""
    image = image_CXYZ if drawn.gibbs == 0 else _without_high_frequencies(image_CXYZ, drawn.gibbs)
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
