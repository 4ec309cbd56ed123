"""Every Ray graph over data: scans -> manifest rows -> crops -> sample of slices -> pseudo-labels -> batches,
and for labelled scans -> cases -> batches.

References travel, not voxels: a task that is handed a scan's row reads, cuts and stores by itself and
returns a few numbers per crop. Only the crops a training step is about to use go through Ray's object
store. Every graph is deterministic: what a row yields depends on the row, never on who maps it when.

Shapes: R crops of a scan, C channels, X Y Z voxels (RAS), S slices, T = C*X*Y, N clusterers, B batch.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from logonet.clustering import kmeans
from logonet.core import seeding
from logonet.core.errors import BadScan, UserError
from logonet.data import cropping, manifest, prepared_scans, validate
from logonet.data.crop_shards import (
    CropRef,
    CropTable,
    _parse_shard_header,
    _shard_bytes,
    _shard_index,
    slices_of,
)
from logonet.distributed.cluster import ResourceAllocation, quiet
from logonet.storage import object_store
from logonet.training.dataset import LabelledDataset, TrainingDataset
from logonet.training.schedule import shard_micro_batches

log = logging.getLogger(__name__)

BLOCK_BYTES = 32 << 20  # of one Ray Data block: enough to amortise a task, few enough to stream
TASK_BYTES = 8 << 20  # prepared samples of one task that feeds training
TASKS_AHEAD = 3  # such tasks a rank keeps going before it needs them
CROPS_PER_ACTOR = 64  # labelling this many takes longer than starting the actor does
CROPS_AT_ONCE = 4  # read together where each is worked on alone
MAX_UNREAD = 32  # scans that a store may withhold before it has given one
MAX_TASKS = 2000  # blocks of a graph over scans: enough to balance, few enough to schedule


# ------------------------------------------------------------------------------------------- manifest


def inspect_scans(
    sources: list[manifest.Source], share: ResourceAllocation, known: int = 0
) -> list[manifest.Scan | manifest.Quarantined]:
    """Read and check every scan, in parallel; the answers are in the order of ``sources``.

    ``known`` is how many others of the same import have been read before.

    Raises:
        UserError: for what concerns every scan, such as a store that withholds the first MAX_UNREAD of them.
    """
    read, unread = known, 0

    def note(answer: manifest.Scan | manifest.Quarantined) -> None:
        nonlocal read, unread
        if not isinstance(answer, manifest.Unread):
            read += 1
            return
        unread += 1
        if not read and unread == min(MAX_UNREAD, len(sources)):
            raise UserError(f"none of the first {unread} scans can be read; the last: {answer.reason}")

    return _map_in_order(sources, manifest.inspect, share, note)


def check_sources(sources: list[manifest.Source], share: ResourceAllocation) -> list[validate.Checked]:
    """Verify every case, in parallel; the answers are in the order of ``sources``."""
    return _map_in_order(sources, validate.check, share)


@dataclass(frozen=True)
class _CutScan:
    """Cuts one scan into crops and stores them as one shard. Runs on Ray's workers.

    ``stored`` has the sizes of the shards that are there, by name: one listing of a thousand is less work for the store
    than to be asked for each.
    """

    cfg: cropping.Config
    uri: str
    stored: Mapping[str, int]

    def __call__(self, scan: manifest.Scan) -> list[CropRef] | manifest.Quarantined:
        name = f"shards/{scan.scan_id}.safetensors"
        uri = object_store.join(self.uri, name)
        size_bytes = self.stored.get(uri.rsplit("/", 1)[1], 0)
        if not (refs := _shard_index(uri, name, size_bytes)):
            try:
                crops_RCXYZ = cropping.crops_of(
                    manifest.load(scan), modality=scan.modality, cfg=self.cfg, scan_id=scan.scan_id
                )
            except BadScan as err:
                return manifest.Quarantined(scan.uri, str(err))
            blob = _shard_bytes(scan.scan_id, crops_RCXYZ)
            object_store.write(uri, blob)
            refs = _parse_shard_header(name, blob[8 : 8 + int.from_bytes(blob[:8], "little")])
        return refs


def cut_scans(
    scans: list[manifest.Scan], cfg: cropping.Config, uri: str, share: ResourceAllocation
) -> tuple[list[CropRef], list[manifest.Quarantined]]:
    """Cut every scan; shards already stored by an interrupted run are kept (they were written atomically)."""
    refs: list[CropRef] = []
    bad: list[manifest.Quarantined] = []
    shards = object_store.listing(object_store.join(uri, "shards"))
    stored = {entry.uri.rsplit("/", 1)[1]: entry.size_bytes for entry in shards}
    for answer in _map_in_order(scans, _CutScan(cfg, uri, stored), share):
        if isinstance(answer, manifest.Quarantined):
            bad.append(answer)
        else:
            refs.extend(answer)
    return refs, bad


# ---------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class _PrepareCase:
    """Prepares one labelled scan and stores it as one file of bricks. Runs on Ray's workers."""

    label_values: tuple[int, ...]
    cfg: prepared_scans.Config
    uri: str

    def __call__(self, scan: manifest.Scan) -> prepared_scans.Ref | manifest.Quarantined:
        uri = object_store.join(self.uri, "cases", f"{scan.scan_id}.safetensors")
        entry = object_store.stat(uri)
        if entry is not None and (ref := prepared_scans.stored(uri, entry.size_bytes)) is not None:
            return ref
        try:
            image = manifest.load(scan)
            labels_XYZ = manifest.load_label(scan, image)
            prepared = prepared_scans.prepare(
                image, labels_XYZ, scan.modality, self.label_values, self.cfg, scan.scan_id
            )
        except BadScan as err:
            return manifest.Quarantined(scan.uri, str(err))
        blob = prepared_scans.to_bytes(scan.scan_id, *prepared, self.cfg.seed)
        object_store.write(uri, blob)
        return prepared_scans.ref_of(uri, blob)


def prepare_cases(
    scans: list[manifest.Scan],
    label_values: tuple[int, ...],
    cfg: prepared_scans.Config,
    uri: str,
    share: ResourceAllocation,
) -> tuple[list[prepared_scans.Ref], list[manifest.Quarantined]]:
    """Prepare every labelled scan; files already stored by an interrupted run are kept."""
    refs: list[prepared_scans.Ref] = []
    bad: list[manifest.Quarantined] = []
    for answer in _map_in_order(scans, _PrepareCase(label_values, cfg, uri), share):
        if isinstance(answer, manifest.Quarantined):
            bad.append(answer)
        else:
            refs.append(answer)
    return refs, bad


def sample_slices(table: CropTable, max_slices: int, seed: int, share: ResourceAllocation) -> np.ndarray:
    """Slices of randomly drawn whole crops, (S, T) uint16, S <= max_slices, streamed by Ray Data.

    The draw and the row order depend on ``seed`` alone.
    """
    depth = table.size_vox[2]
    num_crops = min(len(table), max(1, max_slices // depth))
    chosen = np.sort(seeding.rng(seed, "sample").permutation(len(table))[:num_crops])
    length = table.in_channels * table.size_vox[0] * table.size_vox[1]
    slices_ST = np.empty((num_crops * depth, length), np.uint16)

    def read(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows = [slices_of(crop_CXYZ) for crop_CXYZ in table.read_all(int(chosen[i]) for i in batch["id"])]
        return {"id": batch["id"], "slices": np.stack(rows)}

    stream = _stream(num_crops, read, row_bytes=depth * length * 2, share=share)
    for batch in stream.iter_batches(batch_size=1, batch_format="numpy"):
        i = int(batch["id"][0])
        slices_ST[i * depth : (i + 1) * depth] = batch["slices"][0]
    return slices_ST


def fit_clusterers(
    slices_ST: np.ndarray,
    cfg: kmeans.Config,
    uri: str,
    share: ResourceAllocation,
    note: Callable[[int, int], None],
) -> list[kmeans.Fitted]:
    """Fit every clusterer as one Ray task; all tasks read one copy of the sample in shared memory.

    A fitted clusterer is stored at once under ``<uri>/fits/``, so an interrupted fit goes on where it
    stopped. ``note(done, total)`` is called as tasks end.
    """
    import ray

    counts = kmeans.cluster_counts(cfg)
    sample = ray.put(slices_ST)

    @ray.remote(num_cpus=share.cpus_per_task, max_retries=3)
    def fit(slices_ST: np.ndarray, index: int) -> int:
        fitted = kmeans.fit_one(slices_ST, counts[index], index, cfg)
        object_store.write(_fit_uri(uri, index), fitted.to_bytes())
        return index

    done = {i: f for i in range(len(counts)) if (f := _stored_fit(_fit_uri(uri, i))) is not None}
    waiting = [fit.remote(sample, i) for i in range(len(counts)) if i not in done]
    while waiting:
        ready, waiting = ray.wait(waiting, num_returns=1)
        index = ray.get(ready[0])
        stored = _stored_fit(_fit_uri(uri, index))
        assert stored is not None, f"clusterer {index} was stored and cannot be read back"
        done[index] = stored
        note(len(done), len(counts))
    return [done[i] for i in range(len(counts))]


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


class _LabelCrops:
    """A Ray Data actor: builds the fused labeller once, on the one shared copy of the centroids."""

    def __init__(self, table: CropTable, centroids_VT: Any, sizes_N: np.ndarray):
        import ray

        from logonet.clustering.pseudo_labels import Labeller

        self.table = table
        self.labeller = Labeller(kmeans.ClustererSet.view(ray.get(centroids_VT[0]), sizes_N))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        crops = self.table.read_all(int(i) for i in batch["id"])
        labels = [self.labeller(slices_of(crop_CXYZ)).T for crop_CXYZ in crops]
        return {"id": batch["id"], "labels_NZ": np.stack(labels).astype(np.int16)}


def label_crops(table: CropTable, fitted: kmeans.ClustererSet, share: ResourceAllocation) -> np.ndarray:
    """Every clusterer's label of every slice of every crop, int16 (crops, N, Z)."""
    import ray

    centroids = ray.put(fitted.centroids_VT)
    # No training runs yet, so all CPUs but one may label; actors on every CPU would starve the tasks that feed them.
    room = int((share.cpus - 1) / share.cpus_per_task)
    actors = max(1, min(-(-len(table) // CROPS_PER_ACTOR), room))
    stream = ray.data.range(len(table), override_num_blocks=min(len(table), 8 * actors)).map_batches(
        _LabelCrops,
        batch_size=CROPS_AT_ONCE,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=share.cpus_per_task,
        # In a list, so that Ray hands the reference on and does not copy the centroids into the call.
        fn_constructor_args=(table, [centroids], fitted.sizes_N),
    )
    labels_PNZ = np.empty((len(table), len(fitted.sizes_N), table.size_vox[2]), np.int16)
    for batch in stream.iter_batches(batch_size=16, batch_format="numpy"):
        labels_PNZ[batch["id"]] = batch["labels_NZ"]
    return labels_PNZ


def batches(
    feed_ref: Any,
    *,
    start_step: int,
    stop_step: int,
    rank: int,
    world: int,
    batch_size: int,
    share: ResourceAllocation,
) -> Iterator[dict[str, np.ndarray]]:
    """This rank's prepared batches from ``start_step`` on, in order; skipped steps are never read.

    A batch holds ``batch_size`` samples, which are more rows where a sample gives several crops.

    Plain Ray tasks, a few ahead, and not a Ray Data stream: ``streaming_split`` hands a block to whichever
    rank asks first, so a sample's rank and step would depend on timing; and with a stream of its own for
    each rank, 16 ranks stopped for ever, each stream holding its share of the CPUs until its rank, which waited for
    the other ranks' gradients, took what it had ready.
    """
    import ray

    feed = opened(feed_ref[0])
    own = shard_micro_batches(feed.order.global_batch // batch_size, rank, world)
    per_rank = len(own) * batch_size
    rows = (stop_step - start_step) * per_rank
    sample_bytes = feed.row_bytes * feed.rows_per_sample
    group = batch_size * max(1, min(TASK_BYTES // (sample_bytes * batch_size), -(-rows // (4 * batch_size))))
    # In a sweep's trial Ray would keep the tasks within the worker's own reserved CPUs, which the worker holds: the
    # named strategy lets them run anywhere.
    prepare = ray.remote(_prepare).options(num_cpus=share.cpus_per_data_task, scheduling_strategy="DEFAULT")
    ahead: collections.deque[Any] = collections.deque()
    for begin in range(0, rows, group):
        places = []
        for row in range(begin, min(begin + group, rows)):
            step, slot = start_step + row // per_rank, own.start * batch_size + row % per_rank
            places.append((step, slot))
        ahead.append(prepare.remote(feed_ref, places))
        if len(ahead) > TASKS_AHEAD:
            yield from _split(ray.get(ahead.popleft()), batch_size * feed.rows_per_sample)
    while ahead:
        yield from _split(ray.get(ahead.popleft()), batch_size * feed.rows_per_sample)


def _prepare(feed_ref: Any, places: list[tuple[int, int]]) -> dict[str, np.ndarray]:
    """The samples at (step, slot) ``places``, stacked. Runs as a Ray task."""
    feed = opened(feed_ref[0])
    samples = feed.rows([feed.order.at(step, slot) for step, slot in places])
    return {key: np.stack([s[key] for s in samples]) for key in samples[0]}


_FEEDS: dict[str, TrainingDataset | LabelledDataset] = {}


def opened(ref: Any) -> TrainingDataset | LabelledDataset:
    """The feed, unpickled once a process: a big run's references take longer to unpickle than a sample to prepare."""
    import ray

    if ref.hex() not in _FEEDS:
        _FEEDS.clear()
        _FEEDS[ref.hex()] = ray.get(ref)
    return _FEEDS[ref.hex()]


def _split(group: dict[str, np.ndarray], batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    for begin in range(0, len(next(iter(group.values()))), batch_size):
        yield {key: value[begin : begin + batch_size] for key, value in group.items()}


# --------------------------------------------------------------------------------------------- shared


def _stream(rows: int, fn: Callable[..., Any], *, row_bytes: int, share: ResourceAllocation) -> Any:
    """``fn`` over row numbers 0 .. rows - 1, streamed in order."""
    import ray

    quiet()
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    per_block = max(1, min(BLOCK_BYTES // max(1, row_bytes), -(-rows // 4)))
    return ray.data.range(rows, override_num_blocks=-(-rows // per_block)).map_batches(
        fn, batch_size=per_block, num_cpus=share.cpus_per_task
    )


def _map_in_order(
    items: Iterable[Any],
    fn: Callable[[Any], Any],
    share: ResourceAllocation,
    note: Callable[[Any], None] = lambda answer: None,
) -> list[Any]:
    """``fn`` over ``items`` on Ray Data's workers; answers in order, as Python objects.

    ``note`` is called with each as it comes.
    """
    import pickle

    import ray

    items = list(items)

    def call(batch: dict[str, np.ndarray]) -> dict[str, Any]:
        # Answers are small mixed objects; pickled by us they need no Arrow schema. They never leave Ray.
        return {"id": batch["id"], "answer": [pickle.dumps(fn(items[int(i)])) for i in batch["id"]]}

    stream = ray.data.range(len(items), override_num_blocks=min(len(items), MAX_TASKS)).map_batches(
        call, batch_size=None, num_cpus=share.cpus_per_task
    )
    answers: dict[int, Any] = {}
    for batch in stream.iter_batches(batch_size=None, batch_format="numpy"):
        for i, blob in zip(batch["id"], batch["answer"]):
            answers[int(i)] = pickle.loads(blob)
            note(answers[int(i)])
    return [answers[i] for i in range(len(items))]
