"""Fitting clusterers, keeping them, and the numbers that say how good they are.

Shapes: P crops, S slices, T voxels of a slice, N clusterers, K codes, V codes of all clusterers, Z slices.
"""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
from safetensors.numpy import save
from sklearn.cluster import MiniBatchKMeans

from logonet.clustering import kmeans, quality
from logonet.clustering.kmeans import ClustererSet, Config, Fitted
from logonet.core import config, seeding
from logonet.core.errors import UserError

SMALL = Config(n=3, k_min=2, k_max=6, iterations=4, fraction=0.25, seed=3)


def slices(S: int = 80, T: int = 36, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 65536, (S, T)).astype(np.uint16)


def fitted_set(cfg: Config = SMALL) -> ClustererSet:
    counts = kmeans.cluster_counts(cfg)
    fits = [kmeans.fit_one(slices(), k, i, cfg) for i, k in enumerate(counts)]
    return ClustererSet.from_fitted(fits, {"config": config.to_dict(cfg), "crops": "abc"})


# ------------------------------------------------------------------------------------------------ counts


def test_counts_are_uniform_over_the_whole_range():
    counts = kmeans.cluster_counts(Config(n=4000, k_min=3, k_max=6))
    seen = np.bincount(counts)[3:]
    assert len(seen) == 4
    assert abs(seen - 1000).max() < 5 * math.sqrt(4000 * 0.25 * 0.75)
    assert counts == kmeans.cluster_counts(Config(n=4000, k_min=3, k_max=6))
    assert counts != kmeans.cluster_counts(Config(n=4000, k_min=3, k_max=6, seed=1))


def test_the_paper_is_the_default():
    cfg = Config()
    assert (cfg.n, cfg.k_min, cfg.k_max, cfg.iterations, cfg.fraction) == (80, 80, 500, 350, 0.1)


@pytest.mark.parametrize(
    "bad",
    [
        {"n": 0},
        {"k_min": 9, "k_max": 8},
        {"k_max": 40000},
        {"fraction": 0.0},
        {"fraction": 1.5},
        {"iterations": 0},
    ],
)
def test_impossible_configs_are_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        config.from_dict(Config, bad, "clusterers")


# --------------------------------------------------------------------------------------------------- fit


@pytest.mark.parametrize(
    ("k", "fraction"), [(5, 0.25), (40, 0.25), (80, 0.1)], ids=["tenth", "first-larger", "all"]
)
def test_fit_is_plain_minibatch_kmeans(k, fraction):
    """Section 4.1 word for word: k-means++, then one partial_fit per random subset."""
    cfg = Config(iterations=6, fraction=fraction, seed=7)
    x_ST = slices()
    plain = MiniBatchKMeans(k, random_state=seeding.integer(7, "fit", 2), batch_size=round(fraction * 80))
    for iteration in range(6):
        rows = max(k, round(fraction * 80)) if iteration == 0 else round(fraction * 80)
        chosen = np.sort(seeding.rng(7, "fit", 2, iteration).choice(80, rows, replace=False))
        plain.partial_fit(x_ST[chosen].astype(np.float32) / np.float32(65535))
    fitted = kmeans.fit_one(x_ST, k, 2, cfg)
    assert fitted.centroids_KT.dtype == np.float32
    np.testing.assert_array_equal(fitted.centroids_KT, plain.cluster_centers_)
    assert plain.n_steps_ == 6
    assert fitted.inertia == pytest.approx(plain.inertia_ / rows, rel=1e-4)


def test_a_clusterer_depends_on_its_own_index_alone():
    counts = kmeans.cluster_counts(SMALL)
    forward = [kmeans.fit_one(slices(), k, i, SMALL) for i, k in enumerate(counts)]
    backward = [kmeans.fit_one(slices(), k, i, SMALL) for i, k in reversed(list(enumerate(counts)))]
    for a, b in zip(forward, reversed(backward)):
        np.testing.assert_array_equal(a.centroids_KT, b.centroids_KT)
    one, two = (kmeans.fit_one(slices(), 5, i, SMALL) for i in (0, 1))
    assert not np.array_equal(one.centroids_KT, two.centroids_KT)
    assert ClustererSet.from_fitted(forward, {}).id == ClustererSet.from_fitted(backward, {}).id


def test_a_read_only_view_is_enough_and_stays_as_it_is():
    x_ST = slices()
    x_ST.flags.writeable = False
    before = x_ST.copy()
    kmeans.fit_one(x_ST, 4, 0, SMALL)
    np.testing.assert_array_equal(x_ST, before)


def test_other_seed_other_clusterer():
    a, b = (kmeans.fit_one(slices(), 5, 0, Config(iterations=3, fraction=0.5, seed=s)) for s in (0, 1))
    assert not np.array_equal(a.centroids_KT, b.centroids_KT)


@pytest.mark.parametrize(("S", "repeat"), [(6, 1), (24, 4)], ids=["few-slices", "few-distinct"])
def test_k_is_lowered_to_the_distinct_slices_and_said(S, repeat, caplog):
    x_ST = np.repeat(slices(S // repeat), repeat, axis=0)
    with caplog.at_level(logging.WARNING, "logonet.clustering.kmeans"):
        fitted = kmeans.fit_one(x_ST, 10, 4, SMALL)
    assert len(fitted.centroids_KT) == 6
    assert "clusterer 4: only 6 distinct slices for 10 clusters" in caplog.text
    caplog.clear()
    kmeans.fit_one(x_ST, 6, 4, SMALL)
    assert not caplog.records


def test_all_air_gives_one_cluster():
    fitted = kmeans.fit_one(np.zeros((20, 9), np.uint16), 5, 0, SMALL)
    assert len(fitted.centroids_KT) == 1
    np.testing.assert_array_equal(fitted.centroids_KT, 0)


def test_no_slices_is_a_sentence():
    with pytest.raises(UserError, match="no slices"):
        kmeans.fit_one(slices(0), 5, 0, SMALL)


# --------------------------------------------------------------------------------------------- the file


def test_set_comes_back_whole():
    made = fitted_set()
    back = ClustererSet.from_bytes(made.to_bytes())
    np.testing.assert_array_equal(back.centroids_VT, made.centroids_VT)
    np.testing.assert_array_equal(back.sizes_N, made.sizes_N)
    assert back.sizes_N.tolist() == kmeans.cluster_counts(SMALL)
    assert back.meta == made.meta
    assert back.id == made.id
    assert back.meta["config"]["k_max"] == 6
    assert len(back.meta["inertia"]) == 3
    assert made.to_bytes() == back.to_bytes()


def test_id_names_centroids_sizes_and_meta():
    made = fitted_set()
    moved = made.centroids_VT.copy()
    moved[0, 0] += 1e-6
    others = [
        ClustererSet(moved, made.sizes_N, made.meta),
        ClustererSet(made.centroids_VT, made.sizes_N[::-1].copy(), made.meta),
        ClustererSet(made.centroids_VT, made.sizes_N, {**made.meta, "crops": "abd"}),
    ]
    assert len({s.id for s in [made, *others]}) == (4 if made.sizes_N[0] != made.sizes_N[-1] else 3)


def test_a_clusterers_own_centroids():
    fits = [Fitted(i, np.full((i + 1, 4), i, np.float32), 0.5) for i in range(3)]
    made = ClustererSet.from_fitted(fits, {})
    for f, centroids_KT in zip(fits, np.split(made.centroids_VT, made.sizes_N.cumsum()[:-1]), strict=True):
        np.testing.assert_array_equal(centroids_KT, f.centroids_KT)
    assert made.summary()["codes"] == 6
    assert made.summary()["inertia"] == [0.5, 0.5, 0.5]


def test_a_missing_clusterer_is_our_mistake():
    with pytest.raises(AssertionError):
        ClustererSet.from_fitted([Fitted(1, np.zeros((2, 4), np.float32), 0.0)], {})


def test_one_fitted_comes_back_whole():
    fitted = kmeans.fit_one(slices(), 5, 2, SMALL)
    back = Fitted.from_bytes(fitted.to_bytes())
    assert (back.index, len(back.centroids_KT), back.inertia) == (2, 5, fitted.inertia)
    np.testing.assert_array_equal(back.centroids_KT, fitted.centroids_KT)


def test_damaged_and_foreign_files_are_sentences():
    data = fitted_set().to_bytes()
    flipped = bytearray(data)
    flipped[-40] ^= 1
    for bad, words in [
        (data[:-10], "not a whole safetensors file"),
        (b"", "not a whole safetensors file"),
        (b"\x80\x04pickle me" * 9, "not a whole safetensors file"),
        (bytes(flipped), "does not match its checksum"),
        (save({"x": np.zeros(3, np.float32)}), "but not logonet-clusterers-1"),
        (Fitted(0, np.zeros((2, 4), np.float32), 0.0).to_bytes(), "but not logonet-clusterers-1"),
    ]:
        with pytest.raises(UserError, match=words) as caught:
            ClustererSet.from_bytes(bad, "s3://bucket/clusterers.safetensors")
        assert str(caught.value).startswith("s3://bucket/clusterers.safetensors ")


# --------------------------------------------------------------------------------------------- quality

# Clusterer 0 of 4 codes: 0 0 0 1 1 2 - code 3 dead; clusterer 1 of 2 codes: an even split.
LABELS_SN = np.array([[0, 0], [0, 0], [0, 0], [1, 1], [1, 1], [2, 1]], np.int16)
MEAN_S = np.array([0.0, 0.01, 0.4, 0.01, 0.5, 0.5])


def hand_set() -> ClustererSet:
    return ClustererSet(np.zeros((6, 4), np.float32), np.array([4, 2]), {"inertia": [1.5, 2.5]})


def test_quality_by_hand():
    table = quality.quality(hand_set(), LABELS_SN, MEAN_S)
    entropy = -(3 / 6 * math.log(3 / 6) + 2 / 6 * math.log(2 / 6) + 1 / 6 * math.log(1 / 6))
    assert table["k"].tolist() == [4, 2]
    assert table["inertia"].tolist() == [1.5, 2.5]
    assert table["perplexity"].tolist() == pytest.approx([math.exp(entropy), 2.0])
    assert table["dead_codes"].tolist() == [1, 0]
    # Code 0 holds two air slices of three; code 1 one of two, which is not most.
    assert table["air_codes"].tolist() == [1, 1]
    assert table["air_share"].tolist() == [0.5, 0.5]
    assert table["majority_share"].tolist() == [0.5, 0.5]


def test_quality_without_meta():
    bare = ClustererSet(np.zeros((6, 4), np.float32), np.array([4, 2]))
    table = quality.quality(bare, LABELS_SN, MEAN_S)
    assert table["inertia"].isna().all()
    assert table["dead_codes"].tolist() == [1, 0]


def test_majority_by_hand():
    counts_NK = np.stack([np.bincount(labels_S, minlength=4) for labels_S in LABELS_SN.T])
    label_N, share_N = quality.majority(counts_NK)
    assert label_N.tolist() == [0, 0]
    assert share_N.tolist() == [0.5, 0.5]


def test_agreement_is_mutual_information_over_entropy():
    a, b = LABELS_SN[:, 0], LABELS_SN[:, 1]
    joint = np.array([[3, 0], [0, 2], [0, 1]]) / 6
    pa, pb = joint.sum(1), joint.sum(0)
    mutual = sum(p * math.log(p / (pa[i] * pb[j])) for (i, j), p in np.ndenumerate(joint) if p)
    entropies = [-(p * np.log(p)).sum() for p in (pa, pb)]
    nmi = quality.agreement(np.stack([a, b], 1))
    assert nmi[0, 1] == nmi[1, 0] == pytest.approx(mutual / np.mean(entropies))
    assert nmi.diagonal().tolist() == [1, 1]


def test_stability_ignores_the_names_of_codes():
    g = np.random.default_rng(0)
    a = g.integers(0, 5, (3000, 2))
    renamed = np.stack([(a[:, 0] + 2) % 5, g.integers(0, 5, 3000)], 1)
    table = quality.stability(a, renamed)
    assert table["nmi"][0] == pytest.approx(1)
    assert table["ari"][0] == pytest.approx(1)
    assert abs(table["ari"][1]) < 0.01
    assert table["nmi"][1] < 0.02


def test_exemplars_are_a_pure_draw_of_each_codes_slices():
    labels_S = np.random.default_rng(0).integers(0, 4, 200)
    labels_S[labels_S == 2] = 3
    found = quality.exemplars(labels_S, per_code=7, seed=1)
    assert sorted(found) == [0, 1, 3]
    for code, members in found.items():
        assert len(set(members)) == 7
        assert (labels_S[members] == code).all()
    assert found == quality.exemplars(labels_S, per_code=7, seed=1)
    assert found != quality.exemplars(labels_S, per_code=7, seed=2)
    assert quality.exemplars(np.array([0, 1, 1]), per_code=7, seed=0) == {0: [0], 1: [1, 2]}
