"""`logonet clusters report`: is a clusterer set worth predicting? Asked before a GPU hour is spent on it.

Shapes: P crops, N clusterers, S slices, T pixels of a slice, Z slices of a crop.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from logonet import reporting
from logonet.clustering import fitting, kmeans, quality
from logonet.clustering.pseudo_labels import Labeller
from logonet.core.execution import Executor
from logonet.data import crop_shards
from logonet.data.volume import UINT16_MAX, from_uint16
from logonet.pipelines.stage import open_stage
from logonet.storage import object_store

SHEETS = 4  # contact sheets: clusterers with the fewest, the most and in-between numbers of codes


def write(uri: str, out: str, max_slices: int, stability: int, executor: Executor) -> pd.DataFrame:
    """Judge the clusterers artifact at ``uri`` on up to ``max_slices`` slices of the crops it was fitted on.

    Writes ``report.html``, ``quality.csv`` and contact sheets under ``out``.

    Args:
        stability: so many clusterers are fitted again with another seed and compared; 0 skips it.

    Returns:
        The scores table, one row a clusterer (see clusterers.quality), with ``nmi_two_seeds`` and
        ``ari_two_seeds`` where measured.

    Raises:
        UserError: ``uri`` is no clusterers artifact, or its crops are gone.
    """
    artifact = open_stage(uri.rstrip("/"), "clusterers")
    crops_uri = object_store.join(artifact.uri.rsplit("/", 2)[0], "crops", artifact.parents["crops"])
    table = crop_shards.CropTable.open(open_stage(crops_uri, "crops"))
    fitted = kmeans.ClustererSet.from_bytes(artifact.read("clusterers.safetensors"), uri)
    # Another seed than the fit's: half of the point is slices that it may not have seen.
    slices_ST = fitting.sample_slices(table, max_slices, seed=artifact.config["seed"] + 1, executor=executor)
    labels_SN = Labeller(fitted)(slices_ST)
    mean_S = slices_ST.mean(axis=1) / UINT16_MAX
    scores = quality.quality(fitted, labels_SN, mean_S)
    scores.insert(0, "clusterer", np.arange(len(scores)))
    if stability:
        last = len(fitted.sizes_N) - 1
        chosen_M = np.unique(np.linspace(0, last, min(last + 1, stability)).round().astype(int))
        again = _refit(table, kmeans.Config(**artifact.config), fitted.sizes_N[chosen_M], executor)
        pair = quality.stability(labels_SN[:, chosen_M], Labeller(again)(slices_ST))
        pair = pair.set_index(pd.Index(chosen_M)).rename(columns=lambda c: f"{c}_two_seeds")
        scores = scores.join(pair)
    nmi_NN = quality.agreement(labels_SN)
    files: dict[str, bytes] = {"quality.csv": scores.to_csv(index=False).encode()}
    files["clusters.png"] = reporting.clusters_picture(scores, nmi_NN)
    sections: list[tuple[str, str | bytes | pd.DataFrame]] = [
        ("Summary", _summary(scores, nmi_NN, len(slices_ST))),
        ("Codes in use, majority floors, agreement", files["clusters.png"]),
    ]
    by_size = np.argsort(fitted.sizes_N, kind="stable")
    for n in by_size[np.unique(np.linspace(0, len(by_size) - 1, SHEETS).astype(int))].tolist():
        name = f"sheet_{n:03d}.png"
        files[name] = _sheet(table, slices_ST, labels_SN[:, n], int(fitted.sizes_N[n]), n)
        sections.append((f"Clusterer {n}", files[name]))
    sections.append(("Every clusterer", scores))
    files["report.html"] = reporting.run_page(f"Clusterers {fitted.id}", sections).encode()
    for file, content in files.items():
        object_store.write(object_store.join(out, file), content)
    return scores


def _refit(
    table: crop_shards.CropTable, cfg: kmeans.Config, sizes_M: np.ndarray, executor: Executor
) -> kmeans.ClustererSet:
    """Clusterers of ``sizes_M`` codes, fitted to the sample of ``cfg`` from another seed."""
    sample_ST = fitting.sample_slices(table, cfg.max_slices, cfg.seed, executor)
    other = replace(cfg, seed=cfg.seed + 1)
    refits = [kmeans.fit_one(sample_ST, int(k), m, other) for m, k in enumerate(sizes_M)]
    return kmeans.ClustererSet.from_fitted(refits, meta={})


def _sheet(
    table: crop_shards.CropTable, slices_ST: np.ndarray, labels_S: np.ndarray, k: int, n: int
) -> bytes:
    num_x, num_y, _ = table.size_vox
    exemplars = quality.exemplars(labels_S, per_code=8, seed=0)
    slices_SXY = slices_ST.reshape(len(slices_ST), table.in_channels, num_x, num_y)[:, 0]
    title = f"Clusterer {n} (K = {k}): slices that share a pseudo-label"
    return reporting.contact_sheet(from_uint16(slices_SXY), labels_S, k, exemplars, title)


def _summary(scores: pd.DataFrame, nmi_NN: np.ndarray, num_slices: int) -> pd.DataFrame:
    off = nmi_NN[~np.eye(len(nmi_NN), dtype=bool)]
    rows = {
        "clusterers": len(scores),
        "slices judged on": num_slices,
        "codes, all clusterers": int(scores["k"].sum()),
        "median perplexity over K": (scores["perplexity"] / scores["k"]).median(),
        "dead codes, share": scores["dead_codes"].sum() / scores["k"].sum(),
        "slices in codes of mostly air, share": scores["air_share"].mean(),
        "majority-class floor, mean": scores["majority_share"].mean(),
        "agreement between clusterers (NMI), mean": off.mean() if len(off) else np.nan,
    }
    if "nmi_two_seeds" in scores:
        rows["stability over two seeds (NMI), mean"] = scores["nmi_two_seeds"].mean()
    return pd.DataFrame({"": rows.keys(), "value": [f"{v:.4g}" for v in rows.values()]})
