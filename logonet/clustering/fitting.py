"""Fitting clusterers and labelling crops over an executor.

Shapes: P crops, C channels, X Y Z voxels, S slices, T = C*X*Y, N clusterers, V codes of all clusterers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from logonet.clustering import kmeans
from logonet.core import seeding
from logonet.core.errors import UserError
from logonet.core.execution import Executor
from logonet.data import crop_shards
from logonet.data.crop_shards import CropRef, CropTable, LabelTable, slices_of
from logonet.storage import object_store
from logonet.storage.parquet import Rows

log = logging.getLogger(__name__)

SLICE_BYTES = 32 << 20  # of slices that one task reads: enough to amortise it, few enough to stream
CROPS_AT_ONCE = 4  # read together where each is worked on alone
LABEL_TASKS = 2000  # at most: each answers with counts of all labels


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
    for i, rows_ST in executor.stream(_read_slices, [table.take(indices.tolist()) for indices in groups]):
        slices_ST[i * group * depth :][: len(rows_ST)] = rows_ST
    return slices_ST


def _read_slices(crops: CropTable) -> np.ndarray:
    return np.concatenate([slices_of(crop) for crop in crops.read_all(range(len(crops)))])


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


def label_crops(
    table: CropTable, labeller: Any, uri: str, executor: Executor
) -> tuple[LabelTable, np.ndarray]:
    """Store every clusterer's label of every slice of every crop below ``uri``, a shard for each scan.

    Shards already stored by an interrupted run are kept (they were written atomically).

    Args:
        labeller: a `pseudo_labels.Labeller`.

    Returns:
        the table of the labels, and how many slices have each, int64 (N, K) with the largest K.
    """
    scans = table.by_scan()
    at_once = -(-len(scans) // LABEL_TASKS)
    firsts = [scans[i][0] for i in range(0, len(scans), at_once)]
    groups = [range(a, b) for a, b in zip(firsts, [*firsts[1:], len(table)])]
    items = _LabelTasks(table, uri, crop_shards.stored_shards(uri), groups)
    refs: list[Any] = [None] * len(items)
    counts_NK = np.zeros((len(labeller.sizes), max(labeller.sizes)), np.int64)
    for i, (found, count_NK) in executor.stream(_label, items, shared=(labeller,), workers="data actors"):
        refs[i] = found
        counts_NK += count_NK
    return LabelTable(uri, Rows.joined(refs), len(labeller.sizes), table.size_vox[2]), counts_NK


@dataclass(frozen=True)
class _LabelTask:
    """Crops of whole scans to label below ``uri``, and the bytes of shards that are stored."""

    crops: CropTable
    uri: str
    stored: dict[str, int]


@dataclass(frozen=True)
class _LabelTasks(Sequence[_LabelTask]):
    """A task for each of ``groups``, made when it is asked for: all of them would be a second table."""

    table: CropTable
    uri: str
    stored: dict[str, int]
    groups: list[range]

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, i: int) -> _LabelTask:  # type: ignore[override]
        crops = self.table.take(self.groups[i])
        names = set(map(crop_shards.shard_name, crops.refs.column("scan_id")))
        return _LabelTask(crops, self.uri, {n: self.stored[n] for n in names if n in self.stored})


def _label(task: _LabelTask, labeller: Any) -> tuple[Rows[CropRef], np.ndarray]:
    """Where the labels lie, and how many slices have each."""
    most, refs = max(labeller.sizes), list[CropRef]()
    counts_NK = np.zeros((len(labeller.sizes), most), np.int64)
    for scan in task.crops.by_scan():
        found, labels_RNZ = _label_scan(task, scan, labeller)
        refs += found
        counts_NK += [np.bincount(labels_RNZ[:, n].ravel(), minlength=most) for n in range(len(counts_NK))]
    return Rows.of(refs, CropRef), counts_NK


def _label_scan(task: _LabelTask, scan: range, labeller: Any) -> tuple[list[CropRef], np.ndarray]:
    """Where the labels of one scan's crops lie, and the labels (R, N, Z)."""
    crops, scan_id = task.crops, task.crops.refs[scan[0]].scan_id
    name = crop_shards.shard_name(scan_id)
    shape = len(labeller.sizes), crops.size_vox[2]
    refs = crop_shards.shard_index(object_store.join(task.uri, name), name, task.stored.get(name, 0))
    if [ref.num_bytes for ref in refs] == [2 * math.prod(shape)] * len(scan):
        stored = LabelTable(task.uri, Rows.of(refs, CropRef), *shape)
        return refs, np.stack(stored.read_all(range(len(refs))))
    labels_RNZ = np.empty((len(scan), *shape), np.int16)
    for begin in range(0, len(scan), CROPS_AT_ONCE):
        for r, crop_CXYZ in enumerate(crops.read_all(scan[begin : begin + CROPS_AT_ONCE]), begin):
            labels_RNZ[r] = labeller(slices_of(crop_CXYZ)).T
    return crop_shards.write_shard(task.uri, scan_id, labels_RNZ.view(np.uint16)), labels_RNZ
