"""The main method's ablations: masking left out (the paper's Table 11), one clusterer (Table 9), other clusterings.

Shapes: B samples, X Y Z the crop's axes, N clusterers, K clusters, S slices, T voxels of a slice.
"""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from helpers import losses_of
from sklearn.cluster import MiniBatchKMeans
from sklearn.metrics import adjusted_rand_score
from test_methods import Stub, assert_step, batch_for, data_spec_for, sample_for, stub_for

from logonet import methods
from logonet.clustering import kmeans
from logonet.clustering.kmeans import ClustererSet, Config
from logonet.clustering.pseudo_labels import Labeller
from logonet.core import config, seeding
from logonet.core.errors import UserError
from logonet.methods import masked_clusters
from logonet.methods.masked_clusters import MaskedClusters

# ----------------------------------------------------------------------------------------------- masking


def prepared(masking: str, index: int = 0) -> dict[str, np.ndarray]:
    cfg = methods.config("masked_clusters", {"masking": masking})
    sample = sample_for(index, data_spec_for(), methods.needs("masked_clusters"))
    return masked_clusters.prepare(sample, cfg, seeding.rng(0, "prepare", index))


def test_masking_is_the_papers_by_default() -> None:
    assert methods.config("masked_clusters").masking == "chains"
    with pytest.raises(UserError, match="masking"):
        methods.config("masked_clusters", {"masking": "some"})


def test_the_same_slices_are_predicted_whatever_is_hidden() -> None:
    masked = 0
    for index in range(40):
        chains, none, mixed = (prepared(m, index) for m in ("chains", "none", "mixed"))
        for other in (none, mixed):
            for key in ("image", "chain", "labels"):
                np.testing.assert_array_equal(other[key], chains[key])
                assert other[key].dtype == chains[key].dtype
        assert not none["hidden"].any()
        assert not none["patch_size"].any()
        like = chains if mixed["hidden"].any() else none
        np.testing.assert_array_equal(mixed["hidden"], like["hidden"])
        np.testing.assert_array_equal(mixed["patch_size"], like["patch_size"])
        masked += like is chains
    assert abs(masked - 20) < 5 * math.sqrt(40 / 4)
    assert masked not in (0, 40)


@pytest.mark.parametrize("masking", ["chains", "none", "mixed"])
def test_every_masking_trains(masking: str) -> None:
    module = stub_for("masked_clusters", data_spec_for(), masking=masking)
    batch = batch_for("masked_clusters", module.cfg, data_spec_for(), [0, 1, 2])
    assert_step(module, batch, 3, channels=8)
    assert module.mask_token.requires_grad == (masking != "none")
    assert bool(batch["hidden"].any()) == (masking != "none")


def test_without_masking_the_network_sees_the_crop_as_it_is() -> None:
    module = stub_for("masked_clusters", data_spec_for(), masking="none").eval()
    assert isinstance(module, MaskedClusters)
    batch = batch_for("masked_clusters", module.cfg, data_spec_for(), [0])
    seen: list[torch.Tensor] = []
    encode = module.backbone.encode
    module.backbone.encode = lambda x: encode(seen.append(x) or x)
    with torch.no_grad():
        module.mask_token.fill_(1e6)
    _, metrics = module(batch, 0.0)
    assert torch.equal(seen[0], batch["image"].float() / 65535)
    assert metrics["masked_share"][0] == 0
    # The loss still runs over the slices of the chains alone (Eq. 4), for all clusterers.
    assert metrics["loss"][1] == 3 * batch["chain"].sum()


def test_loss_falls_without_masking() -> None:
    module = stub_for("masked_clusters", data_spec_for(), masking="none", final_relu=False)
    batch = batch_for("masked_clusters", module.cfg, data_spec_for(), [0, 1])
    losses = losses_of(module, batch, lr=1e-2)
    assert losses[-1] < 0.7 * losses[0], losses


def test_one_clusterer_is_enough() -> None:
    """Table 9's first row."""
    data_spec = methods.DataSpec((16, 8, 12), 1, cluster_sizes=(5,), majority_labels=(1,))
    module = methods.build("masked_clusters", Stub(), data_spec)
    batch = batch_for("masked_clusters", module.cfg, data_spec, [0, 1])
    assert batch["labels"].shape == (2, 1, 12)
    assert_step(module, batch, 2, channels=8)


# ------------------------------------------------------------------------------------- other clusterings

OTHERS = ["gaussian_mixture", "spectral", "hierarchical"]


def blobs(S: int = 240, num: int = 6, T: int = 36, air: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Slices uint16 (S, T) around ``num`` distant centres, and whose they are; the first ``air`` are equal."""
    generator = seeding.rng(0, "blobs")
    centres = generator.integers(5000, 60000, (num, T))
    whose_S = generator.integers(1, num, S)
    whose_S[:air] = 0
    noise = generator.normal(0, 1500, (S, T)) * (whose_S > 0)[:, None]
    return np.clip(centres[whose_S] + noise, 0, 65535).astype(np.uint16), whose_S


def config_of(algorithm: str, **options: object) -> Config:
    return config.from_dict(
        Config, {"n": 2, "k_min": 2, "k_max": 30, "iterations": 30, "algorithm": algorithm, **options}
    )


def test_the_default_is_the_papers_k_means_to_the_last_bit() -> None:
    slices_ST, _ = blobs()
    cfg = Config(iterations=5, fraction=0.25, seed=7)
    assert cfg.algorithm == "kmeans"
    plain = MiniBatchKMeans(9, random_state=seeding.integer(7, "fit", 2), batch_size=60)
    for iteration in range(5):
        chosen = np.sort(seeding.rng(7, "fit", 2, iteration).choice(240, 60, replace=False))
        plain.partial_fit(slices_ST[chosen].astype(np.float32) / np.float32(65535))
    fitted = kmeans.fit_one(slices_ST, 9, 2, cfg)
    np.testing.assert_array_equal(fitted.centroids_KT, plain.cluster_centers_)


@pytest.mark.parametrize("algorithm", OTHERS)
def test_an_algorithm_finds_what_is_there_and_the_labeller_repeats_it(algorithm: str) -> None:
    slices_ST, whose_S = blobs()
    cfg = config_of(algorithm, fraction=0.5)
    fits = [kmeans.fit_one(slices_ST, k, i, cfg) for i, k in enumerate((6, 11))]
    assert len(fits[0].centroids_KT) == 6
    assert fits[0].centroids_KT.dtype == np.float32
    made = ClustererSet.from_bytes(ClustererSet.from_fitted(fits, {"config": config.to_dict(cfg)}).to_bytes())
    labels_SN = Labeller(made)(slices_ST)  # half of them were never seen
    assert adjusted_rand_score(whose_S, labels_SN[:, 0]) > 0.99
    assert len(set(labels_SN[:, 1])) > 6
    x_ST = slices_ST.astype(np.float64) / 65535
    for n, fitted in enumerate(fits):
        distance_SK = np.square(x_ST[:, None] - fitted.centroids_KT.astype(np.float64)).sum(2)
        np.testing.assert_array_equal(labels_SN[:, n], distance_SK.argmin(1))


@pytest.mark.parametrize("algorithm", OTHERS)
def test_a_clusterer_is_the_means_of_the_algorithms_clusters(algorithm: str) -> None:
    slices_ST, _ = blobs()
    cfg = config_of(algorithm, fraction=0.5)
    fitted = kmeans.fit_one(slices_ST, 11, 1, cfg)
    chosen = np.sort(seeding.rng(0, "fit", 1).choice(240, 120, replace=False))
    x_ST = slices_ST[chosen].astype(np.float32) / np.float32(65535)
    own_S = kmeans._cluster(x_ST, 11, 1, cfg)
    means = [x_ST[own_S == label].astype(np.float64).mean(0) for label in sorted(set(own_S))]
    np.testing.assert_allclose(fitted.centroids_KT, means, atol=1e-5)
    nearest_S = np.square(x_ST[:, None] - fitted.centroids_KT).sum(2, dtype=np.float64).min(1)
    assert fitted.inertia == pytest.approx(nearest_S.mean(), rel=1e-4)


def test_hierarchical_is_wards_linkage() -> None:
    from scipy.cluster import hierarchy

    x_ST = blobs()[0].astype(np.float32) / np.float32(65535)
    tree = hierarchy.fcluster(hierarchy.ward(x_ST.astype(np.float64)), 9, "maxclust")
    own_S = kmeans._cluster(x_ST, 9, 0, config_of("hierarchical"))
    assert adjusted_rand_score(tree, own_S) == 1


@pytest.mark.parametrize("algorithm", OTHERS)
def test_another_algorithm_is_pure_too(algorithm: str) -> None:
    slices_ST, _ = blobs()
    slices_ST.flags.writeable = False
    cfg = config_of(algorithm, fraction=0.5)
    one, again = (kmeans.fit_one(slices_ST, 8, 0, cfg) for _ in range(2))
    np.testing.assert_array_equal(one.centroids_KT, again.centroids_KT)
    assert one.inertia == again.inertia
    other = kmeans.fit_one(slices_ST, 8, 1, cfg)
    seeded = kmeans.fit_one(slices_ST, 8, 0, config_of(algorithm, fraction=0.5, seed=1))
    assert not np.array_equal(one.centroids_KT, other.centroids_KT)
    assert not np.array_equal(one.centroids_KT, seeded.centroids_KT)


@pytest.mark.parametrize(
    ("fraction", "k", "cap", "seen"),
    [(0.5, 4, 200, 120), (0.05, 4, 200, 40), (1.0, 4, 60, 60), (0.1, 30, 400, 240)],
)
def test_another_algorithm_sees_a_bounded_sample(
    fraction: float, k: int, cap: int, seen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    cluster = kmeans._cluster

    def noted(x_ST: np.ndarray, k: int, index: int, cfg: Config) -> np.ndarray:
        asked.append(len(x_ST))
        return cluster(x_ST, k, index, cfg)

    monkeypatch.setattr(kmeans, "_cluster", noted)
    kmeans.fit_one(blobs()[0], k, 0, config_of("hierarchical", fraction=fraction, max_fit_slices=cap))
    assert asked == [seen]


@pytest.mark.parametrize("algorithm", OTHERS)
@pytest.mark.parametrize("k", [1, 5, 9])
def test_few_distinct_slices_make_few_clusters(
    algorithm: str, k: int, caplog: pytest.LogCaptureFixture
) -> None:
    slices_ST = np.repeat(blobs(air=0)[0][:5], 8, axis=0)
    with caplog.at_level(logging.WARNING, "logonet.clustering.kmeans"):
        fitted = kmeans.fit_one(slices_ST, k, 3, config_of(algorithm))
    assert len(fitted.centroids_KT) == min(k, 5)
    assert np.isfinite(fitted.centroids_KT).all()
    assert ("only 5 distinct slices for 9 clusters" in caplog.text) == (k == 9)
    if k >= 5:
        assert fitted.inertia == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("algorithm", OTHERS)
def test_all_air_and_one_slice_are_one_cluster(algorithm: str) -> None:
    for num in (1, 20):
        fitted = kmeans.fit_one(np.zeros((num, 9), np.uint16), 5, 0, config_of(algorithm))
        np.testing.assert_array_equal(fitted.centroids_KT, np.zeros((1, 9)))


def test_algorithms_that_cannot_work_are_refused() -> None:
    with pytest.raises(UserError, match="algorithm"):
        config_of("dbscan")
    with pytest.raises(UserError, match=r"max_fit_slices is 59.*hierarchical.*30 clusters"):
        config_of("hierarchical", max_fit_slices=59)
    config_of("kmeans", max_fit_slices=59)
