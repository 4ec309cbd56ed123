"""The quality of pseudo-labels, and the slices that show a cluster.

Shapes: S slices, N clusterers, K codes of one clusterer.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from logonet.clustering.kmeans import ClustererSet
from logonet.core import seeding

# Slices with a lower mean count as air. In the window -1000..1000 HU soft tissue is 0.5, so less than a tenth of such a
# slice is body.
AIR_BELOW = 0.05


def majority(counts_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every clusterer's most frequent label (lowest on ties) and the share of slices that have it.

    The share is the accuracy of always answering that label: the floor pretraining must beat.

    Args:
        counts_NK: how many slices have each label.
    """
    return counts_NK.argmax(1), counts_NK.max(1) / counts_NK.sum(1)


def quality(fitted: ClustererSet, labels_SN: np.ndarray, mean_S: np.ndarray) -> pd.DataFrame:
    """How much there is to learn from each clusterer's labels, one row a clusterer.

    Args:
        mean_S: mean intensity of each slice, in [0, 1].

    Columns:
        k: number of codes.
        inertia: mean squared distance of a slice to its centroid, when fitted (NaN where unknown).
        perplexity: exp of the entropy of the labels: the effective number of codes in use, 1..k.
        dead_codes: codes no slice has.
        air_codes: codes in use most of whose slices are air.
        air_share: share of slices in such a code.
        majority_share: share of the most frequent label; what always answering it would score.
    """
    inertia = fitted.meta.get("inertia", [np.nan] * len(fitted.sizes_N))
    rows = []
    for n, k in enumerate(fitted.sizes_N):
        counts_K = np.bincount(labels_SN[:, n], minlength=k)
        share_K = counts_K[counts_K > 0] / counts_K.sum()
        air_K = np.bincount(labels_SN[mean_S < AIR_BELOW, n], minlength=k)
        is_air_K = 2 * air_K > counts_K
        row = {
            "k": int(k),
            "inertia": inertia[n],
            "perplexity": float(np.exp(-(share_K * np.log(share_K)).sum())),
            "dead_codes": int((counts_K == 0).sum()),
            "air_codes": int(is_air_K.sum()),
            "air_share": counts_K[is_air_K].sum() / counts_K.sum(),
            "majority_share": float(share_K.max()),
        }
        rows.append(row)
    return pd.DataFrame(rows)


def agreement(labels_SN: np.ndarray) -> np.ndarray:
    """Normalised mutual information between clusterers, (N, N) symmetric, 1 on the diagonal.

    Near 1 the clusterers say the same and N could be smaller; near 0 they share no structure.
    """
    from sklearn.metrics import normalized_mutual_info_score

    nmi_NN = np.eye(labels_SN.shape[1])
    for i, j in zip(*np.tril_indices(len(nmi_NN), -1)):
        nmi_NN[i, j] = nmi_NN[j, i] = normalized_mutual_info_score(labels_SN[:, i], labels_SN[:, j])
    return nmi_NN


def stability(labels_a_SN: np.ndarray, labels_b_SN: np.ndarray) -> pd.DataFrame:
    """Do two fits of the same clusterers, from two seeds, say the same of the same slices?

    Columns ``nmi`` and ``ari`` (adjusted Rand index), one row a clusterer: 1 when they agree up to the
    names of codes; ``ari`` is 0 in expectation when they agree by chance.
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    assert labels_a_SN.shape == labels_b_SN.shape
    scores = {"nmi": normalized_mutual_info_score, "ari": adjusted_rand_score}
    pairs = list(zip(labels_a_SN.T, labels_b_SN.T))
    return pd.DataFrame({name: [score(a_S, b_S) for a_S, b_S in pairs] for name, score in scores.items()})


def exemplars(labels_S: np.ndarray, per_code: int, seed: int) -> dict[int, list[int]]:
    """Up to ``per_code`` random slices of every code in use, ascending, for a contact sheet."""
    out = {}
    for code in np.unique(labels_S).tolist():
        members = np.flatnonzero(labels_S == code)
        order = seeding.rng(seed, "exemplars", code).permutation(len(members))[:per_code]
        out[code] = np.sort(members[order]).tolist()
    return out
