"""The fused labeller against scikit-learn and against float64 brute force.

Shapes: S slices, T pixels of a slice, N clusterers, K codes of one, V codes of all.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.cluster import MiniBatchKMeans

from logonet.clustering import kmeans, pseudo_labels, quality
from logonet.clustering.kmeans import ClustererSet
from logonet.clustering.pseudo_labels import Labeller
from logonet.core.errors import UserError

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from labeller import Counting

SIDE = 40  # T = 1600: more than one block of every kind


def smooth(S: int, seed: int, noise: float = 0.01) -> np.ndarray:
    """Uint16 slices like those of a scan: soft shapes that drift along Z, air around and between, noise."""
    g = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(g.standard_normal((SIDE, SIDE, S)), (5, 5, 6), mode="wrap")
    x_XYS = np.clip(field / field.std() * 0.3 + 0.2, 0, 1)
    body = x_XYS > 0
    x_XYS = np.clip(x_XYS + noise * g.standard_normal(x_XYS.shape) * body, 0, 1)
    x_XYS[:, :, : S // 8] = 0
    return np.round(65535 * x_XYS.reshape(-1, S).T).astype(np.uint16)


def rough(S: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 65536, (S, SIDE * SIDE)).astype(np.uint16)


def unit(x_ST: np.ndarray) -> np.ndarray:
    return x_ST.astype(np.float32) / np.float32(65535)


def stack(codes: list[np.ndarray]) -> ClustererSet:
    return ClustererSet(np.concatenate(codes).astype(np.float32), np.array([len(c) for c in codes]))


def of(fitted: ClustererSet, n: int) -> np.ndarray:
    """Centroids (K, T) of clusterer ``n``."""
    return np.split(fitted.centroids_VT, fitted.sizes_N.cumsum()[:-1])[n]


def distances2(x_ST: np.ndarray, c_KT: np.ndarray) -> np.ndarray:
    """Squared distances by their definition, float64 (S, K)."""
    return np.stack([((x_T.astype(np.float64) - c_KT) ** 2).sum(1) for x_T in x_ST])


def check(fitted: ClustererSet, x_ST: np.ndarray, labels_SN: np.ndarray) -> None:
    """Every label is the float64 argmin; where float64 itself cannot tell, a nearest one."""
    assert labels_SN.dtype == np.int16
    assert labels_SN.shape == (len(x_ST), len(fitted.sizes_N))
    for n in range(len(fitted.sizes_N)):
        d2_SK = distances2(x_ST, of(fitted, n))
        chosen_S = d2_SK[np.arange(len(x_ST)), labels_SN[:, n]]
        best_S = d2_SK.min(1)
        wrong = (labels_SN[:, n] != d2_SK.argmin(1)) & (chosen_S > best_S * (1 + 1e-12))
        assert not wrong.any(), f"clusterer {n}: {wrong.sum()} labels, worst {(chosen_S - best_S).max()}"


@pytest.fixture(scope="module")
def fitted_smooth() -> tuple[ClustererSet, list[MiniBatchKMeans]]:
    return _fit(smooth(600, seed=0))


def _fit(x_ST: np.ndarray) -> tuple[ClustererSet, list[MiniBatchKMeans]]:
    models = []
    for seed, k in enumerate((5, 40, 90, 17)):
        model = MiniBatchKMeans(k, random_state=seed, batch_size=200)
        for part in np.array_split(unit(x_ST), 3):
            model.partial_fit(part)
        models.append(model)
    return stack([m.cluster_centers_ for m in models]), models


def sklearn_labels(models: list[MiniBatchKMeans], x_ST: np.ndarray) -> np.ndarray:
    return np.stack([m.predict(x_ST) for m in models], 1)


@pytest.mark.parametrize("make", [smooth, rough], ids=["smooth", "random"])
def test_labels_are_scikit_learns(make: Callable[..., np.ndarray]):
    fitted, models = _fit(make(600, seed=0))
    x_ST = unit(make(150, seed=1))
    labels_SN = Labeller(fitted)(x_ST)
    check(fitted, x_ST, labels_SN)
    theirs_SN = sklearn_labels(models, x_ST)
    assert (labels_SN == theirs_SN).mean() >= 0.999
    # What differs are ties of scikit-learn's |c|^2 - 2 x.c in float32: gaps below its rounding bound.
    for s, n in np.argwhere(labels_SN != theirs_SN):
        d2_K = distances2(x_ST[s : s + 1], of(fitted, n))[0]
        scale = np.linalg.norm(x_ST[s]) * np.linalg.norm(of(fitted, n)[theirs_SN[s, n]])
        assert (
            d2_K[theirs_SN[s, n]] - d2_K[labels_SN[s, n]] <= 4 * pseudo_labels._gamma(x_ST.shape[1]) * scale
        )


def test_the_screen_saves_work_on_slices_like_the_fitted(fitted_smooth, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pseudo_labels, "RANK", 32)  # few next to V = 152, as 510 are to 23,000
    labeller, S = Counting(fitted_smooth[0]), 96
    labels_SN = labeller(smooth(S, seed=2))
    V, T = labeller.centroids_VT.shape
    assert labeller.products < 0.5 * S * V
    assert labeller.distances < 0.1 * S * V
    screen = S * (T * labeller.rank + V * (labeller.rank + 4))
    assert screen + T * labeller.products + 1.5 * T * labeller.distances < S * V * T
    assert len(np.unique(labels_SN[:, 2])) > 5  # not a trivial clustering


def scaled(g: np.random.Generator, scale: float) -> tuple[list[np.ndarray], np.ndarray]:
    c_KT = scale * g.random((12, 300))
    return [c_KT, c_KT[::2] + scale * 1e-4 * g.standard_normal((6, 300))], scale * g.random((20, 300))


def near_ties(g: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray]:
    """Slices half-way between centroids, and centroids that differ in their last float32 bits."""
    c_KT = g.random((10, 700)).astype(np.float32)
    twins_KT = np.nextafter(c_KT, np.float32(2) * (g.random(c_KT.shape) > 0.5).astype(np.float32))
    x_ST = np.concatenate([(c_KT[:-1] + c_KT[1:]) / 2, (c_KT + twins_KT) / 2, c_KT, twins_KT])
    return [np.concatenate([c_KT, twins_KT]), np.concatenate([twins_KT, c_KT])], x_ST


def duplicates(g: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray]:
    c_KT = g.random((5, 200))
    return [c_KT[[0, 1, 1, 2, 0, 3, 4, 4]], c_KT[[4, 4, 4]], c_KT[[2, 0, 2]]], np.concatenate(
        [c_KT, c_KT * 0.9]
    )


def constants(g: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray]:
    """Air and saturated slices, centroids that are constant, zero among them."""
    levels = np.array([0, 0, 1e-6, 0.5, 0.50001, 1])
    return [levels[:, None] * np.ones((6, 90)), g.random((3, 90))], np.linspace(0, 1, 21)[:, None] * np.ones(
        (21, 90)
    )


def offset(g: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray]:
    """Distances a millionth of the norms: |c|^2 - 2 x.c cancels almost wholly in float32."""
    return [1000 + g.random((30, 400)), 1000 + 0.01 * g.random((30, 400))], 1000 + g.random((25, 400))


def low_rank(g: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray]:
    basis = g.standard_normal((4, 500))
    return [g.standard_normal((60, 4)) @ basis, g.standard_normal((7, 4)) @ basis], g.standard_normal(
        (30, 4)
    ) @ basis


def few_pixels(g: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray]:
    return [g.random((40, 3)), g.random((1, 3))], g.random((50, 3))


def mixed_scales(g: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray]:
    scales = 10.0 ** np.arange(-9, 6)
    return [scales[:, None] * g.random((15, 120)), g.random((4, 120))], scales[:, None] * g.random((15, 120))


FAMILIES: dict[str, Callable[[np.random.Generator], tuple[list[np.ndarray], np.ndarray]]] = {
    "near-ties": near_ties,
    "duplicates": duplicates,
    "constants": constants,
    "offset": offset,
    "low-rank": low_rank,
    "few-pixels": few_pixels,
    "mixed-scales": mixed_scales,
    "huge": lambda g: scaled(g, 1e6),
    "tiny": lambda g: scaled(g, 1e-9),
    "vanishing": lambda g: scaled(g, 1e-25),
    "plain": lambda g: scaled(g, 1.0),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", FAMILIES)
def test_labels_are_the_float64_argmin(family: str, seed: int):
    codes, x_ST = FAMILIES[family](np.random.default_rng(seed))
    fitted, x_ST = stack(codes), x_ST.astype(np.float32)
    check(fitted, x_ST, Labeller(fitted)(x_ST))


def test_of_equal_centroids_the_first_wins():
    codes, _ = duplicates(np.random.default_rng(0))
    fitted = stack(codes)
    labeller = Counting(fitted)
    labels_SN = labeller(of(fitted, 0))
    assert labels_SN[:, 0].tolist() == [0, 1, 1, 3, 0, 5, 6, 6]
    assert (labels_SN[:, 1] == 0).all()
    assert 2 not in labels_SN[:, 2]
    assert labeller.distances == 0  # a repeat is no tie to settle: it never enters


def test_of_equally_near_centroids_the_first_wins():
    """Slices exactly half-way, in binary fractions, between two centroids of three."""
    g = np.random.default_rng(0)
    x_ST = g.integers(64, 192, (6, 50)) / 256
    step_T = g.integers(-32, 33, 50) / 256
    for x_T in x_ST:
        fitted = stack([np.stack([x_T + 2 * step_T, x_T + step_T, x_T - step_T])])
        assert Labeller(fitted)(x_T[None].astype(np.float32)).tolist() == [[1]]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", FAMILIES)
def test_the_bounds_hold_for_every_pair(family: str, seed: int, monkeypatch: pytest.MonkeyPatch):
    """Equation (2): low <= |c|^2 - 2 x.c <= high, also with a basis that leaves large residuals."""
    monkeypatch.setattr(pseudo_labels, "RANK", 3)
    codes, x_ST = FAMILIES[family](np.random.default_rng(seed))
    fitted, x_ST = stack(codes), x_ST.astype(np.float32)
    fused = Labeller(fitted)
    x = torch.from_numpy(x_ST)
    low_VS, high_VS = fused._bounds(x, pseudo_labels._norm2(x))
    c_VT, norm2_S = fitted.centroids_VT.astype(np.float64), (x_ST.astype(np.float64) ** 2).sum(1)
    norm2_V = (c_VT**2).sum(1)[:, None]
    truth_VS = norm2_V - 2 * c_VT @ x_ST.T.astype(np.float64)
    rounding_VS = 1e-14 * (norm2_V + norm2_S) + pseudo_labels.TINY  # of the truth itself
    first_V = ~fused._repeats().numpy()  # a repeated centroid is kept out by a lower bound beyond reach
    assert (low_VS.numpy() <= truth_VS + rounding_VS)[first_V].all()
    assert (high_VS.numpy() >= truth_VS - rounding_VS)[first_V].all()


def test_the_bounds_are_narrow_inside_the_subspace():
    """Where nothing is left outside the basis, what remains is rounding: a bound that holds by being useless
    would pass every other test."""
    g = np.random.default_rng(0)
    codes, x_ST = low_rank(g)
    fitted, x = stack(codes), torch.from_numpy(x_ST.astype(np.float32))
    fused = Labeller(fitted)
    norm2_S = pseudo_labels._norm2(x)
    low_VS, high_VS = fused._bounds(x, norm2_S)
    assert ((high_VS - low_VS) / (fused.norm2_V[:, None] * norm2_S).sqrt()).median() < 0.02


def test_every_form_of_the_same_slices_gives_the_same_labels(fitted_smooth):
    fused = Labeller(fitted_smooth[0])
    x_ST = smooth(200, seed=3)  # more than one pass
    whole = fused(x_ST)
    np.testing.assert_array_equal(whole, fused(unit(x_ST)))
    np.testing.assert_array_equal(whole, fused(torch.from_numpy(unit(x_ST))))
    np.testing.assert_array_equal(whole, fused(np.asfortranarray(x_ST)))
    one_by_one = np.concatenate([fused(x_ST[s : s + 1]) for s in range(185, 200)])
    np.testing.assert_array_equal(whole[185:], one_by_one)
    assert fused(x_ST[:0]).shape == (0, 4)


def test_centroids_are_neither_copied_nor_written():
    fitted, _ = _fit(smooth(300, seed=0))
    fitted.centroids_VT.flags.writeable = False
    before = fitted.centroids_VT.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused = Labeller(fitted)
    fused(smooth(20, seed=1))
    assert fused.centroids_VT.data_ptr() == fitted.centroids_VT.ctypes.data
    np.testing.assert_array_equal(fitted.centroids_VT, before)


@pytest.mark.parametrize("onednn", [True, False])
def test_any_matrix_product_will_do(onednn: bool, fitted_smooth, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    x_ST = smooth(30, seed=4)
    fused = Labeller(fitted_smooth[0])
    assert (fused._rows_VR.layout is torch._mkldnn) == onednn
    check(fitted_smooth[0], unit(x_ST), fused(x_ST))


def test_reduced_precision_of_training_is_set_aside(fitted_smooth):
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        with pseudo_labels._ieee_float32():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        Labeller(fitted_smooth[0])(smooth(4, seed=5))
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_wrong_input_is_a_sentence(fitted_smooth):
    fused = Labeller(fitted_smooth[0])
    with pytest.raises(UserError, match="slices of 1600 pixels"):
        fused(np.zeros((3, 1599), np.float32))
    for bad in (np.nan, np.inf, -np.inf, 1e12):
        x_ST = np.zeros((3, SIDE * SIDE), np.float32)
        x_ST[1, 7] = bad
        with pytest.raises(UserError, match="slices to label are not finite"):
            fused(x_ST)
        centroids = fitted_smooth[0].centroids_VT.copy()
        centroids[3, 3] = bad
        with pytest.raises(UserError, match="centroids that are not finite"):
            Labeller(ClustererSet(centroids, fitted_smooth[0].sizes_N))


def test_fitted_clusterers_label_their_own_slices():
    """fit_one, the set and the labeller agree on what a slice is: uint16 / 65535 in float32."""
    x_ST = smooth(120, seed=6)
    cfg = kmeans.Config(n=3, k_min=4, k_max=20, iterations=5, fraction=0.5)
    fits = [kmeans.fit_one(x_ST, k, i, cfg) for i, k in enumerate(kmeans.cluster_counts(cfg))]
    fitted = ClustererSet.from_bytes(ClustererSet.from_fitted(fits, {}).to_bytes())
    labels_SN = Labeller(fitted)(x_ST)
    check(fitted, unit(x_ST), labels_SN)
    assert (quality.quality(fitted, labels_SN, unit(x_ST).mean(1))["perplexity"] > 2).all()


@pytest.mark.cuda
def test_a_gpu_gives_the_same_labels(fitted_smooth):
    x_ST = smooth(150, seed=7)
    on_cpu, on_gpu = Labeller(fitted_smooth[0])(x_ST), Labeller(fitted_smooth[0], "cuda")(x_ST)
    np.testing.assert_array_equal(on_cpu, on_gpu)
