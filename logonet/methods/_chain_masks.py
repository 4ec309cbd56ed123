"""What to hide: chains of neighbouring slices, and in each of their slices patches (paper section 3.3.1).

Pure draws; the method applies them. Shapes: X Y Z the crop's axes, Z the slice axis.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from logonet.core.errors import UserError


def check_chains(num_slices: int, chain_length: int) -> None:
    """Raise UserError unless chains of ``chain_length`` (M) fit in ``num_slices`` (Z)."""
    if not 1 <= chain_length <= num_slices:
        raise UserError(
            f"method.chain_length is {chain_length}; set it between 1 and the crop's {num_slices} slices along Z"
        )


def check_patches(size_xy: tuple[int, int], patch_sizes: Sequence[int]) -> None:
    """Raise UserError unless some patch fits in (X, Y)."""
    if not any(p <= min(size_xy) for p in patch_sizes):
        raise UserError(
            f"method.patch_sizes {tuple(patch_sizes)} hold none that fits a slice of {size_xy[0]}x{size_xy[1]} "
            f"voxels; add one of at most {min(size_xy)}"
        )


def draw_chains(num_slices: int, phi1: float, chain_length: int, rng: np.random.Generator) -> np.ndarray:
    """The slices that belong to a chain, bool (Z,).

    Each slice is chosen with probability ``phi1``; a chosen one brings its ``chain_length`` - 1
    predecessors, as far as the crop has them.

    Raises:
        UserError: ``chain_length`` exceeds ``num_slices``, or ``phi1`` is outside (0, 1].
    """
    check_chains(num_slices, chain_length)
    chosen_Z = rng.random(num_slices) < phi1
    if not chosen_Z.any():
        # The loss runs over masked slices only: a sample without one has no loss. At 96 slices and
        # phi1 = 0.1 this happens once in 25,000 samples, in a shallow crop often.
        chosen_Z[rng.integers(num_slices)] = True
    chain_Z = np.zeros(num_slices, dtype=bool)
    for back in range(chain_length):
        chain_Z[: num_slices - back] |= chosen_Z[back:]
    return chain_Z


def draw_patches(
    size_xy: tuple[int, int],
    chain_Z: np.ndarray,
    patch_sizes: Sequence[int],
    phi2: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """The voxels to hide, bool (X, Y, Z), and each slice's patch side (0 outside chains), int16 (Z,).

    Every slice of a chain draws its patch size from those that fit; a grid of such patches starts at
    voxel (0, 0) and is cut at the far edges; each patch is hidden with probability ``phi2``. So a slice
    of a chain may stay whole, and it still counts as masked: the paper's loss runs over whole chains.

    Raises:
        UserError: no patch size fits, one is below 1, or ``phi2`` is outside (0, 1].
    """
    check_patches(size_xy, patch_sizes)
    num_x, num_y = size_xy
    fitting = [p for p in patch_sizes if p <= min(size_xy)]
    hidden_XYZ = np.zeros((num_x, num_y, len(chain_Z)), dtype=bool)
    patch_size_Z = np.zeros(len(chain_Z), dtype=np.int16)
    for z in np.flatnonzero(chain_Z):
        side = fitting[rng.integers(len(fitting))]
        grid = rng.random((-(-num_x // side), -(-num_y // side))) < phi2
        hidden_XYZ[:, :, z] = grid.repeat(side, axis=0).repeat(side, axis=1)[:num_x, :num_y]
        patch_size_Z[z] = side
    return hidden_XYZ, patch_size_Z
