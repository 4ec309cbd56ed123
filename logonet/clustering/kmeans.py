"""Clusterers of slices: fitting one, and keeping many as a set.

The pseudo-labels of Masked LoGoNet (KDD 2024, sections 3.3.2 and 4.1): N scikit-learn MiniBatchKMeans,
each with its own K, each updated 350 times on random tenths of the unlabelled slices.

The paper says that other clusterings, "such as hierarchical or spectral methods, can be utilized". Here these
(`Config.algorithm`) cluster one bounded random sample, and every clusterer is kept as the means of its clusters: each
slice gets the label of the nearest mean. So a clusterer is one matrix, the labeller and the stored file do not depend
on the algorithm, and a slice's label does not depend on whether the clusterer was fitted on it. The price: labels are
not always the algorithm's own. A spectral cluster that bends around another is cut straight, and a mixture's posterior
also weighs how wide and how likely its components are. Spectral and hierarchical clusterings have no rule for
unseen slices at all; the alternative, the label of the nearest slice of the sample, would need every clusterer's whole
sample (184 MB each at the defaults) and be out of the fused labeller's reach.

Shape legend: P crops, S slices, T voxels of a slice (C*X*Y), N clusterers, K codes of one clusterer, V codes of
all clusterers together, Z slices of a crop. Slices are uint16, 65535 x intensity, as crops are stored.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Le

from logonet.core import seeding
from logonet.core.config import Count, Fraction, Section
from logonet.core.errors import UserError
from logonet.data.volume import from_uint16
from logonet.storage import safetensors_io

log = logging.getLogger(__name__)

SET_FORMAT = "logonet-clusterers-1"
FITTED_FORMAT = "logonet-clusterer-1"


@dataclass(frozen=True)
class Config(Section, key="clusterers"):
    """The pretraining settings of section 4.1.

    Attributes:
        n: number of clusterers.
        k_min: smallest number of clusters of a clusterer.
        k_max: largest, inclusive.
        iterations: partial_fit updates of every clusterer; of a Gaussian mixture, EM's at most.
        fraction: share of the sampled slices that one update, or another algorithm than K-means, sees.
        max_slices: cap of the sample held in memory; 100,000 slices of 96 x 96 voxels are 1.8 GB of uint16
            and still 10,000 fresh slices per update.
        seed: of K, of the sampled slices and of K-means.
        algorithm: "kmeans", the paper's; "gaussian_mixture" (spherical components), "spectral" (a graph of 10
            nearest neighbours) or "hierarchical" (Ward's linkage). The last two take time and memory that grow
            with the square of the slices they see.
        max_fit_slices: cap of the slices that one clusterer other than K-means sees. Below it and where there are
            that many, it sees at least 10 for each of its clusters.
    """

    n: Count = 80
    k_min: Count = 80
    k_max: Annotated[int, Ge(1), Le(2**15 - 1)] = 500  # labels are int16
    iterations: Count = 350
    fraction: Fraction = 0.1
    max_slices: Count = 100_000
    seed: int = 0
    algorithm: Literal["kmeans", "gaussian_mixture", "spectral", "hierarchical"] = "kmeans"
    max_fit_slices: int = 5000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k_min > self.k_max:
            must = f"at most clusterers.k_max ({self.k_max})"
            raise UserError(f"clusterers.k_min is {self.k_min}; it must be {must}")
        if self.algorithm != "kmeans" and self.max_fit_slices < 2 * self.k_max:
            least = f"at least two slices for each of up to {self.k_max} clusters"
            need = f"{self.algorithm} clustering needs {least}"
            raise UserError(f"clusterers.max_fit_slices is {self.max_fit_slices}; {need}")


def cluster_counts(cfg: Config) -> list[int]:
    """K of every clusterer, drawn uniformly from k_min..k_max (section 4.1)."""
    return seeding.rng(cfg.seed, "cluster_counts").integers(cfg.k_min, cfg.k_max + 1, cfg.n).tolist()


# ------------------------------------------------------------------------------------------------ fitting


@dataclass(frozen=True, eq=False)
class Fitted:
    """One clusterer: its number in the set, centroids float32 (K, T), and mean squared distance per slice
    to the nearest centroid over the last update's slices."""

    index: int
    centroids_KT: np.ndarray
    inertia: float

    def to_bytes(self) -> bytes:
        facts = {"index": self.index, "inertia": self.inertia}
        return _pack(FITTED_FORMAT, {"centroids_KT": self.centroids_KT}, facts)

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "the fitted clusterer") -> Fitted:
        """Raises UserError when ``data`` is damaged or something else; ``source`` names it."""
        arrays, meta = _unpack(FITTED_FORMAT, data, source)
        return cls(meta["index"], arrays["centroids_KT"], meta["inertia"])


def fit_one(slices_ST: np.ndarray, k: int, index: int, cfg: Config) -> Fitted:
    """Fit clusterer ``index`` with ``k`` clusters; K-means: k-means++, then ``cfg.iterations`` updates.

    Pure in its arguments: neither other clusterers nor the number of threads change a bit.

    Args:
        slices_ST: uint16 slices; may be a read-only view of shared memory. Only the rows of one update are
            converted to float32 at a time.
        k: lowered, with a warning, to the number of distinct slices where there are fewer. Another algorithm may
            leave a cluster empty, which is then none.

    Raises:
        UserError: there are no slices.
    """
    from threadpoolctl import threadpool_limits

    S = len(slices_ST)
    if S == 0:
        raise UserError("there are no slices to fit clusterers on; the crop stage must give crops")
    # BLAS sums in an order that depends on its threads.
    with threadpool_limits(1):
        if cfg.algorithm == "kmeans":
            centroids_KT, inertia = _kmeans(slices_ST, _at_most_distinct(slices_ST, k, index), index, cfg)
        else:
            # Ten slices a cluster: the means of fewer say little, and a tenth of a small sample is fewer.
            rows = min(max(round(cfg.fraction * S), 10 * k), cfg.max_fit_slices, S)
            chosen = seeding.rng(cfg.seed, "fit", index).choice(S, rows, replace=False)
            sample_ST = slices_ST[np.sort(chosen)]
            k = _at_most_distinct(sample_ST, k, index)
            centroids_KT, inertia = _means(from_uint16(sample_ST), k, index, cfg)
    return Fitted(index, centroids_KT.astype(np.float32, copy=False), float(inertia))


def _at_most_distinct(slices_ST: np.ndarray, k: int, index: int) -> int:
    """``k``, or the number of different rows, with a warning, where that is lower."""
    seen: set[bytes] = set()
    for x_T in slices_ST:
        seen.add(x_T.tobytes())
        if len(seen) == k:
            return k
    log.warning("clusterer %d: only %d distinct slices for %d clusters, so K is lower", index, len(seen), k)
    return len(seen)


def _kmeans(slices_ST: np.ndarray, k: int, index: int, cfg: Config) -> tuple[np.ndarray, float]:
    """Section 4.1: centroids (K, T), and the mean squared distance to them over the last update's slices."""
    from sklearn.cluster import MiniBatchKMeans

    S = len(slices_ST)
    size = max(1, round(cfg.fraction * S))
    kmeans = MiniBatchKMeans(
        k,
        init="k-means++",
        random_state=seeding.integer(cfg.seed, "fit", index),
        # partial_fit takes whatever it is given, but counts this many rows when it decides whether to move
        # starved centroids.
        batch_size=size,
        # Or every update would label its slices a second time, for an attribute nobody reads.
        compute_labels=False,
    )
    # fit() may stop early, and its max_iter counts epochs; partial_fit is exactly one update.
    for iteration in range(cfg.iterations):
        # k-means++ starts from k different rows: where a tenth is fewer, the first update alone gets k.
        rows = max(size, k) if iteration == 0 else size
        chosen = seeding.rng(cfg.seed, "fit", index, iteration).choice(S, rows, replace=False)
        x_BT = from_uint16(slices_ST[np.sort(chosen)])
        kmeans.partial_fit(x_BT)
    return kmeans.cluster_centers_, -kmeans.score(x_BT) / len(x_BT)


def _means(x_ST: np.ndarray, k: int, index: int, cfg: Config) -> tuple[np.ndarray, float]:
    """The means (K, T) of ``cfg.algorithm``'s clusters of all of ``x_ST``, and the mean squared distance of these
    slices to the nearest. ``k`` is at most the number of different rows."""
    from sklearn.metrics import pairwise_distances_argmin_min

    labels_S = np.zeros(len(x_ST), int) if k == 1 else _cluster(x_ST, k, index, cfg)
    means_KT = np.stack([x_ST[labels_S == label].mean(0) for label in np.unique(labels_S)])
    _, distance_S = pairwise_distances_argmin_min(x_ST, means_KT)
    return means_KT, np.square(distance_S, dtype=np.float64).mean()


def _cluster(x_ST: np.ndarray, k: int, index: int, cfg: Config) -> np.ndarray:
    """The algorithm's own labels (S,) of ``x_ST``."""
    from sklearn.cluster import AgglomerativeClustering, SpectralClustering
    from sklearn.mixture import GaussianMixture

    if cfg.algorithm == "hierarchical":
        return AgglomerativeClustering(k, linkage="ward").fit_predict(x_ST)
    options: dict[str, Any] = {"random_state": seeding.integer(cfg.seed, "fit", index)}
    if cfg.algorithm == "gaussian_mixture":
        # Spherical: a full covariance of slices of 96 x 96 voxels has 85 million numbers, and K of them.
        options |= {"covariance_type": "spherical", "init_params": "k-means++", "max_iter": cfg.iterations}
        return GaussianMixture(k, **options).fit_predict(x_ST)
    # Of neighbours: an RBF of distances between thousands of voxels is 0 for nearly all pairs.
    options |= {"affinity": "nearest_neighbors", "n_neighbors": min(10, len(x_ST) - 1)}
    with warnings.catch_warnings():
        # Air is many equal slices, which only know one another. Parts without a way between them are clusters.
        warnings.filterwarnings("ignore", message="Graph is not fully connected")
        return SpectralClustering(k, assign_labels="cluster_qr", **options).fit_predict(x_ST)


# ---------------------------------------------------------------------------------------------- the set


@dataclass(frozen=True, eq=False)
class ClustererSet:
    """Fitted clusterers, stacked: centroids float32 (V, T), number of codes int64 (N,), and what made them."""

    centroids_VT: np.ndarray
    sizes_N: np.ndarray
    meta: dict[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def id(self) -> str:
        """16 hex digits that name centroids, sizes and meta by content."""
        return _digest({"centroids_VT": self.centroids_VT, "sizes_N": self.sizes_N}, self.meta)[:16]

    @classmethod
    def from_fitted(cls, fitted: Sequence[Fitted], meta: Mapping[str, Any]) -> ClustererSet:
        """Stack clusterers 0..N-1, in any order of arrival, and note their inertia and scikit-learn's version."""
        import sklearn

        fitted = sorted(fitted, key=lambda f: f.index)
        assert [f.index for f in fitted] == list(range(len(fitted))), "a clusterer is missing or there twice"
        facts = {"inertia": [f.inertia for f in fitted], "sklearn": sklearn.__version__}
        sizes_N = np.array([len(f.centroids_KT) for f in fitted], np.int64)
        return cls(np.concatenate([f.centroids_KT for f in fitted]), sizes_N, {**meta, **facts})

    def summary(self) -> dict[str, Any]:
        """Facts for an artifact's manifest, JSON-able."""
        facts = {"codes": len(self.centroids_VT), "cluster_sizes": self.sizes_N.tolist()}
        return facts | {key: self.meta.get(key) for key in ("inertia", "sklearn")}

    def to_bytes(self) -> bytes:
        """One safetensors file; ``meta`` is JSON in its header."""
        return _pack(SET_FORMAT, {"centroids_VT": self.centroids_VT, "sizes_N": self.sizes_N}, self.meta)

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "the clusterer set") -> ClustererSet:
        """Read ``to_bytes``; the content is checked against its checksum.

        Raises:
            UserError: ``data`` is damaged or something else; ``source`` names it.
        """
        arrays, meta = _unpack(SET_FORMAT, data, source)
        return cls(arrays["centroids_VT"], arrays["sizes_N"], meta)


def _pack(file_format: str, arrays: dict[str, np.ndarray], meta: Mapping[str, Any]) -> bytes:
    arrays = {name: np.ascontiguousarray(a) for name, a in arrays.items()}
    about = {"format": file_format, "sha256": _digest(arrays, meta), "meta": meta}
    return safetensors_io.to_bytes(arrays, {"logonet": _json(about)})


def _unpack(file_format: str, data: bytes, source: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(data)
    except (SafetensorError, KeyError, ValueError) as err:
        raise UserError(f"{source} is not a whole safetensors file ({err}); fit them again") from None
    # safetensors reads metadata from files only. load() has just checked this header.
    header = json.loads(safetensors_io.header_of(data)).get("__metadata__") or {}
    about = json.loads(header.get("logonet", "{}"))
    if about.get("format") != file_format:
        raise UserError(f"{source} is a safetensors file, but not {file_format}; name the right file")
    if about["sha256"] != _digest(arrays, about["meta"]):
        raise UserError(f"{source} does not match its checksum; fetch it or fit the clusterers again")
    return arrays, about["meta"]


def _digest(arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> str:
    sha = hashlib.sha256(_json(meta).encode())
    for name in sorted(arrays):
        a = np.ascontiguousarray(arrays[name])
        sha.update(f"{name}{a.dtype.str}{a.shape}".encode())
        sha.update(a.data)
    return sha.hexdigest()


def _json(meta: Mapping[str, Any]) -> str:
    return json.dumps(meta, sort_keys=True, separators=(",", ":"))
