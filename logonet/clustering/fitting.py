"""Fitting clusterers and labelling crops over an executor.

Shapes: P crops, C channels, X Y Z voxels, S slices, T = C*X*Y, N clusterers, V codes of all clusterers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from logonet.clustering import kmeans
from logonet.core import seeding
from logonet.core.errors import UserError
from logonet.core.execution import Executor, run_all
from logonet.data.crop_shards import CropTable, slices_of
from logonet.storage import object_store

log = logging.getLogger(__name__)

SLICE_BYTES = 32 << 20  # of slices that one task reads: enough to amortise it, few enough to stream
CROPS_AT_ONCE = 4  # read together where each is worked on alone


def sample_slices(table: CropTable, max_slices: int, seed: int, executor: Executor) -> np.ndarray:
    """Slices of randomly drawn whole crops, (S, T) uint16, S <= max_slices.

    The draw and the order of the rows depend on ``seed`` alone.
    """
    depth = table.size_vox[2]
    num_crops = min(len(table), max(1, max_slices // depth))
    chosen = np.sort(seeding.rng(seed, "sample").permutation(len(table))[:num_crops])
    length = table.in_channels * table.size_vox[0] * table.size_vox[1]
    slices_ST = np.empty((num_crops * depth, length), np.uint16)
    group = max(1, min(SLICE_BYTES // (2 * depth * length), -(-num_crops // 4)))
    groups = [chosen[begin : begin + group] for begin in range(0, num_crops, group)]
    for i, rows_ST in executor.stream(partial(_read_slices, table), groups):
        slices_ST[i * group * depth :][: len(rows_ST)] = rows_ST
    return slices_ST


def _read_slices(table: CropTable, indices: np.ndarray) -> np.ndarray:
    return np.concatenate([slices_of(crop) for crop in table.read_all(map(int, indices))])


def fit_clusterers(
    slices_ST: np.ndarray, cfg: kmeans.Config, uri: str, executor: Executor, note: Callable[[int, int], None]
) -> list[kmeans.Fitted]:
    """Fit every clusterer as one task; all tasks read one copy of the sample.

    A fitted clusterer is stored at once under ``<uri>/fits/``, so an interrupted fit continues where it stopped.
    ``note(done, total)`` is called as tasks end.
    """
    counts = kmeans.cluster_counts(cfg)
    done = {i: f for i in range(len(counts)) if (f := _stored_fit(_fit_uri(uri, i))) is not None}
    waiting = [(i, k) for i, k in enumerate(counts) if i not in done]
    for position, _ in executor.stream(partial(_fit_one, cfg, uri), waiting, shared=(slices_ST,)):
        index = waiting[position][0]
        done[index] = kmeans.Fitted.from_bytes(object_store.read(_fit_uri(uri, index)))
        note(len(done), len(counts))
    return [done[i] for i in range(len(counts))]


def _fit_one(cfg: kmeans.Config, uri: str, which: tuple[int, int], slices_ST: np.ndarray) -> None:
    index, k = which
    object_store.write(_fit_uri(uri, index), kmeans.fit_one(slices_ST, k, index, cfg).to_bytes())


def _fit_uri(uri: str, index: int) -> str:
    return object_store.join(uri, "fits", f"{index:05d}.safetensors")


def _stored_fit(uri: str) -> kmeans.Fitted | None:
    if not object_store.exists(uri):
        return None
    try:
        return kmeans.Fitted.from_bytes(object_store.read(uri))
    except UserError as err:
        log.warning("%s; it is fitted again", err)
        return None


def label_crops(table: CropTable, fitted: kmeans.ClustererSet, executor: Executor) -> np.ndarray:
    """Every clusterer's label of every slice of every crop, int16 (P, N, Z)."""
    groups = [range(i, min(i + CROPS_AT_ONCE, len(table))) for i in range(0, len(table), CROPS_AT_ONCE)]
    labelling = _LabelCrops(table, fitted.sizes_N)
    labels = run_all(executor, labelling, groups, shared=(fitted.centroids_VT,), workers="data actors")
    return np.concatenate(labels)


@dataclass
class _LabelCrops:
    """Builds the fused labeller at the first call, on the one shared copy of the centroids."""

    table: CropTable
    sizes_N: np.ndarray
    labeller: Any = field(default=None, init=False)

    def __call__(self, indices: Sequence[int], centroids_VT: np.ndarray) -> np.ndarray:
        if self.labeller is None:
            from logonet.clustering.pseudo_labels import Labeller

            self.labeller = Labeller(kmeans.ClustererSet(centroids_VT, self.sizes_N))
        crops = self.table.read_all(indices)
        return np.stack([self.labeller(slices_of(crop_CXYZ)).T for crop_CXYZ in crops]).astype(np.int16)
