"""Masks against the paper's words (section 3.3.1), and their rates against exact binomial bounds.

Shapes: X Y Z the crop's axes, Z slices.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from logonet.core.errors import UserError
from logonet.core.seeding import rng
from logonet.methods import _chain_masks, masked_clusters

ALPHA = 1e-9  # chance that a correct draw fails one bound


def assert_rate(hits: int, trials: int, probability: float) -> None:
    low, high = binom.interval(1 - ALPHA, trials, probability)
    assert low <= hits <= high, f"{hits} of {trials}, expected a share of {probability:.4f}"


@pytest.mark.parametrize("num_slices", [5, 12, 40])
@pytest.mark.parametrize("phi1", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("chain_length", [1, 2, 5])
def test_chains_are_chosen_slices_and_their_predecessors(num_slices: int, phi1: float, chain_length: int):
    for draw in range(50):
        drawn_Z = _chain_masks.draw_chains(num_slices, phi1, chain_length, rng(0, "chain", draw))

        same_numbers = rng(0, "chain", draw)
        chosen = [z for z, u in enumerate(same_numbers.random(num_slices)) if u < phi1]
        chosen = chosen or [int(same_numbers.integers(num_slices))]
        expected = {z - back for z in chosen for back in range(chain_length) if z - back >= 0}
        assert set(np.flatnonzero(drawn_Z)) == expected


@pytest.mark.parametrize(("num_slices", "phi1", "chain_length"), [(24, 0.1, 5), (6, 0.05, 3)])
def test_share_of_chain_slices(num_slices: int, phi1: float, chain_length: int):
    trials = 4000
    hits_Z = sum(
        _chain_masks.draw_chains(num_slices, phi1, chain_length, rng(1, draw)).astype(int)
        for draw in range(trials)
    )
    for z in range(num_slices):
        reach = min(chain_length, num_slices - z)  # how many choices would cover slice z
        chosen = 1 - (1 - phi1) ** reach
        none_chosen = (1 - phi1) ** num_slices * reach / num_slices
        assert_rate(hits_Z[z], trials, chosen + none_chosen)


@pytest.mark.parametrize("size_xy", [(16, 16), (20, 14), (7, 33)])
def test_patches_against_a_slow_loop(size_xy: tuple[int, int]):
    sizes, phi2 = (1, 3, 4, 8, 64), 0.6
    for draw in range(20):
        chain_Z = rng(2, "chain", draw).random(9) < 0.5
        hidden_XYZ, patch_size_Z = _chain_masks.draw_patches(size_xy, chain_Z, sizes, phi2, rng(2, draw))

        same_numbers = rng(2, draw)
        fitting = [p for p in sizes if p <= size_xy[0] and p <= size_xy[1]]
        expected_XYZ = np.zeros((*size_xy, 9), dtype=bool)
        for z in range(9):
            if not chain_Z[z]:
                assert patch_size_Z[z] == 0
                continue
            side = fitting[int(same_numbers.integers(len(fitting)))]
            assert patch_size_Z[z] == side
            for x0 in range(0, size_xy[0], side):
                for y0 in range(0, size_xy[1], side):
                    if same_numbers.random() < phi2:
                        for x in range(x0, min(x0 + side, size_xy[0])):
                            for y in range(y0, min(y0 + side, size_xy[1])):
                                expected_XYZ[x, y, z] = True
        np.testing.assert_array_equal(hidden_XYZ, expected_XYZ)


def test_patch_rates():
    chain_Z, sizes, phi2 = np.ones(2000, dtype=bool), (2, 4, 8), 0.7
    hidden_XYZ, patch_size_Z = _chain_masks.draw_patches((8, 8), chain_Z, sizes, phi2, rng(3))
    for side in sizes:
        own_Z = patch_size_Z == side
        assert_rate(int(own_Z.sum()), len(chain_Z), 1 / len(sizes))
        corners = hidden_XYZ[::side, ::side, own_Z]  # one voxel of every patch
        assert_rate(int(corners.sum()), corners.size, phi2)


def test_probability_one_hides_everything():
    chain_Z = _chain_masks.draw_chains(7, 1.0, 3, rng(4))
    hidden_XYZ, _ = _chain_masks.draw_patches((9, 11), chain_Z, (4,), 1.0, rng(4))
    assert chain_Z.all()
    assert hidden_XYZ.all()


def test_draws_depend_on_the_generator_alone():
    def draw(seed: int) -> tuple[np.ndarray, ...]:
        chain_Z = _chain_masks.draw_chains(12, 0.2, 3, rng(seed))
        return (chain_Z, *_chain_masks.draw_patches((8, 8), chain_Z, (1, 2), 0.5, rng(seed)))

    for a, b in zip(draw(5), draw(5)):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(draw(5), draw(6)))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: _chain_masks.draw_chains(4, 0.1, 5, rng(0)), "chain_length is 5.*4 slices"),
        (lambda: _chain_masks.draw_chains(4, 0.1, 0, rng(0)), "chain_length is 0"),
        (lambda: _chain_masks.draw_patches((8, 4), np.ones(3, bool), (5, 8), 0.5, rng(0)), "8x4.*at most 4"),
        (lambda: _chain_masks.draw_patches((8, 4), np.ones(3, bool), (), 0.5, rng(0)), "patch_sizes"),
    ],
)
def test_impossible_settings_are_refused(call, words: str):
    with pytest.raises(UserError, match=words):
        call()


@pytest.mark.parametrize(
    "options", [{"phi1": 0.0}, {"phi1": 1.1}, {"phi2": 0.0}, {"chain_length": 0}, {"patch_sizes": (0, 2)}]
)
def test_settings_out_of_bounds_are_refused(options: dict):
    with pytest.raises(UserError, match=f"method.{next(iter(options))}.*must be"):
        masked_clusters.Config(**options)
