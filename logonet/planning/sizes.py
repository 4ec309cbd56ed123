"""Bytes that each stage reads and writes, from shapes alone; exact where the file layout is ours.

Shapes: P crops, N clusterers, V codes of all clusterers, T voxels of a slice, Z slices of a crop.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from logonet import methods
from logonet.clustering import kmeans
from logonet.core import config
from logonet.data import cropping, manifest, volume
from logonet.methods import DataSpec
from logonet.pipelines import Pretraining

# safetensors' dtypes in its own order: it stores the tensors of the last of these first.
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64,
}  # fmt: skip
SHA256 = "0" * 64
INERTIA = 0.1234567890123456  # as long in JSON as most inertias
STORED_PER_VOXEL = 1.3  # gzipped int16: 1.31 bytes per voxel of a CT scan and 1.30 of an MR scan
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> safetensors' dtype, shape


@dataclass(frozen=True)
class Scan:
    """One scan to read: its grid in RAS axes, ``spacing_mm`` (None: unknown) and its stored bytes."""

    scan_id: str
    shape_vox: tuple[int, int, int]
    spacing_mm: tuple[float, float, float] | None
    stored_bytes: float

    @property
    def voxels(self) -> int:
        return math.prod(self.shape_vox)


@dataclass(frozen=True)
class Scans:
    """All scans to read.

    Attributes:
        known_from: a phrase that says how they are known.
        imported: the import is done.
    """

    scans: tuple[Scan, ...]
    known_from: str
    imported: bool = False

    @property
    def stored_bytes(self) -> float:
        return sum(s.stored_bytes for s in self.scans)

    @property
    def voxels(self) -> int:
        return sum(s.voxels for s in self.scans)


def equal_scans(
    count: int, shape_vox: tuple[int, int, int], spacing_mm: tuple[float, float, float] | None = None
) -> Scans:
    """``count`` scans of one shape, of which nothing else is known."""
    # As long as the ids that an import makes of names like hippocampus_001.
    stored_bytes = math.prod(shape_vox) * STORED_PER_VOXEL
    rows = tuple(Scan(f"scan_{i:07d}-{'0' * 10}", shape_vox, spacing_mm, stored_bytes) for i in range(count))
    return Scans(rows, f"{count:,} scans of {'x'.join(map(str, shape_vox))} voxels, as given")


def of_manifest(table: manifest.Manifest, known_from: str) -> Scans:
    """The scans of an import."""
    return Scans(tuple(map(of_row, table.scans)), known_from, imported=True)


def of_row(row: manifest.Scan) -> Scan:
    """A manifest's row with its axes in RAS order."""
    axes = [next(i for i, a in enumerate(row.orientation) if a in pair) for pair in ("RL", "AP", "SI")]
    x, y, z = (row.shape[i] for i in axes)
    dx, dy, dz = (row.spacing_mm[i] for i in axes)
    return Scan(row.scan_id, (x, y, z), (dx, dy, dz), row.size_bytes)


# ----------------------------------------------------------------------------------------------- files


def safetensors_bytes(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> int:
    """Size of a safetensors file: 8 bytes, a JSON header padded to a multiple of 8, the tensors."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    rank = list(DTYPES).index
    # The header holds offsets, so the order of the tensors changes the number of its digits.
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (-rank(item[1][0]), item[0])):
        begin, end = end, end + DTYPES[dtype].itemsize * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + end


def shard_bytes(scan_id: str, per_scan: int, shape_CXYZ: Sequence[int]) -> int:
    """Size of one scan's shard of crops."""
    names = [f"{i:05d}" for i in range(per_scan)]
    meta = {"scan_id": scan_id, "sha256": json.dumps(dict.fromkeys(names, SHA256))}
    return safetensors_bytes({n: ("U16", tuple(shape_CXYZ)) for n in names}, meta)


def clusterers_bytes(sizes: Sequence[int], length: int, meta: Mapping[str, Any]) -> int:
    """Size of a clusterer set with ``meta`` data, up to the digits of its inertias."""
    import sklearn

    meta = {**meta, "inertia": [INERTIA] * len(sizes), "sklearn": sklearn.__version__}
    about = {"format": kmeans.SET_FORMAT, "sha256": SHA256, "meta": meta}
    arrays = {"centroids_VT": ("F32", (sum(sizes), length)), "sizes_N": ("I64", (len(sizes),))}
    return safetensors_bytes(arrays, {"logonet": json.dumps(about, sort_keys=True, separators=(",", ":"))})


# --------------------------------------------------------------------------------------------- network


@dataclass(frozen=True)
class Network:
    """What training a method with its network keeps and saves.

    Attributes:
        state: the method's state dict; names of the network's tensors begin with "backbone.".
        trainable: shapes of the parameters that get a gradient.
        weight_bytes: of all parameters and buffers.
    """

    state: Tensors
    trainable: Mapping[str, tuple[int, ...]]
    weight_bytes: int

    @property
    def gradient_bytes(self) -> int:
        """Of one worker, always float32; what an all-reduce moves."""
        return 4 * sum(map(math.prod, self.trainable.values()))

    @property
    def model_file(self) -> int:
        """A checkpoint's model.safetensors and the final method.safetensors."""
        return safetensors_bytes(self.state)

    @property
    def optimizer_file(self) -> int:
        """A checkpoint's optimizer.safetensors."""
        moments = ("exp_avg", "exp_avg_sq")
        tensors = {f"{m}/{name}": ("F32", shape) for name, shape in self.trainable.items() for m in moments}
        return safetensors_bytes(tensors | {f"step/{name}": ("F32", ()) for name in self.trainable})

    @property
    def backbone_file(self) -> int:
        """The final backbone.safetensors."""
        stem = "backbone."
        own = {n.removeprefix(stem): t for n, t in self.state.items() if n.startswith(stem)}
        return safetensors_bytes(own)

    @property
    def checkpoint_bytes(self) -> int:
        """All tensors of a checkpoint at the end of an epoch."""
        return self.model_file + self.optimizer_file + safetensors_bytes({})


def network(method: torch.nn.Module) -> Network:
    """Describe a method module, which may be on the meta device."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    return Network(
        state={n: (names[t.dtype], tuple(t.shape)) for n, t in method.state_dict().items()},
        trainable={n: tuple(p.shape) for n, p in method.named_parameters() if p.requires_grad},
        weight_bytes=4 * sum(t.numel() for t in [*method.parameters(), *method.buffers()]),
    )


def facts_of(cfg: Pretraining) -> DataSpec:
    """What the method will know of the data; every clusterer counts with as many clusters as were drawn for it."""
    pseudo = "pseudo_labels" in methods.needs(cfg.method.name)
    counts = tuple(kmeans.cluster_counts(cfg.clusterers)) if pseudo else ()
    size_vox, batch_size = cfg.crops.size_vox, cfg.train.batch_size
    return DataSpec(size_vox, 1, counts, majority_labels=(0,) * len(counts), batch_size=batch_size)


# ---------------------------------------------------------------------------------------------- stages


@dataclass(frozen=True)
class Stage:
    """What one stage moves, in bytes, and how long that takes.

    Attributes:
        read: from the store, by all nodes together.
        written: to the store.
        kept: the part of it that stays.
        node_shared: in Ray's object store on every node that works on the stage.
        driver: in the driver's own memory.
        seconds: None where it is not known.
        waits_for: the slowest resource.
    """

    name: str
    read: float = 0.0
    written: float = 0.0
    kept: float = 0.0
    node_shared: float = 0.0
    driver: float = 0.0
    seconds: float | None = None
    waits_for: str = ""


@dataclass(frozen=True)
class Sizes:
    """Everything that is counted, not timed; ``files`` are the sizes of all that is stored."""

    scans: Scans
    too_small: int
    num_crops: int
    cluster_sizes: tuple[int, ...]
    sample_bytes: int
    centroid_bytes: int
    steps: int
    steps_per_epoch: int
    network: Network
    files: dict[str, int]
    stages: tuple[Stage, ...]


def yields_crops(scan: Scan, cfg: cropping.Config) -> bool:
    """Whether a scan is large enough for a crop."""
    shape = scan.shape_vox
    if cfg.spacing_mm is not None and scan.spacing_mm is not None:
        shape = volume.resampled_shape(shape, scan.spacing_mm, cfg.spacing_mm)
    return cropping.image_share(shape, cfg) >= cfg.min_image_share


def sizes(cfg: Pretraining, scans: Scans, net: Network) -> Sizes:
    """What pretraining with ``cfg`` (resolved) moves and keeps.

    Damaged scans and scans without contrast are known only after they are read; here every scan counts that is large
    enough.
    """
    x, y, depth = cfg.crops.size_vox
    crop, counts = 2 * x * y * depth, facts_of(cfg).cluster_sizes
    good = [s for s in scans.scans if yields_crops(s, cfg.crops)]
    num_crops = len(good) * cfg.crops.per_scan
    # A shard's size depends on the scan only through the length of its id.
    ids = {len(s.scan_id): s.scan_id for s in good}
    shards = {n: shard_bytes(i, cfg.crops.per_scan, (1, x, y, depth)) for n, i in ids.items()}
    cache = sum(shards[len(s.scan_id)] for s in good)
    sample = crop * min(num_crops, max(1, cfg.clusterers.max_slices // depth)) if counts else 0
    meta = {"config": config.to_dict(cfg.clusterers), "crops": "0" * 16}
    fitted = clusterers_bytes(counts, x * y, meta) if counts else 0
    centroids = 4 * sum(counts) * x * y
    labels = safetensors_bytes({"labels_PNZ": ("I16", (num_crops, len(counts), depth))}) if counts else 0
    per_epoch = cfg.train.steps_per_epoch or -(-num_crops // cfg.train.global_batch)
    steps = per_epoch * cfg.train.epochs
    # A checkpoint at the end of every epoch, and at every so many steps in between.
    ends, every = {per_epoch * (e + 1) for e in range(cfg.train.epochs)}, cfg.train.checkpoint_every_steps
    saves = len(ends | set(range(every, steps + 1, every) if every else ()))
    checkpoint, final = net.checkpoint_bytes, net.backbone_file + net.model_file
    kept = min(saves, cfg.train.keep_checkpoints) * checkpoint + final
    in_driver = sample + 2 * centroids + fitted
    batches, table = steps * cfg.train.global_batch * crop, num_crops * (2 * len(counts) * depth + 400)
    skipped = {"import"} if scans.imported else set()
    skipped |= set() if counts else {"clusterers", "labels"}
    moved = [
        # name, read, written, kept, in Ray's object store of a node, in the driver's memory
        Stage("import", scans.stored_bytes),
        Stage("crops", scans.stored_bytes, cache, cache),
        # Every fit is stored, read again and stored once more in the set.
        Stage("clusterers", sample + centroids, centroids + fitted, fitted, sample, in_driver),
        Stage("labels", fitted + num_crops * crop, labels, labels, centroids, 2 * fitted + 2 * labels),
        Stage("pretrain", batches, saves * checkpoint + final, kept, table, 3 * labels),
    ]
    stages = tuple(s for s in moved if s.name not in skipped)
    files = {
        "crop": crop,
        "crops_cache": cache,
        "clusterers": fitted,
        "labels": labels,
        "checkpoint": checkpoint,
        "checkpoint_model": net.model_file,
        "checkpoint_optimizer": net.optimizer_file,
        "final_backbone": net.backbone_file,
        "final_method": net.model_file,
        "gradients": net.gradient_bytes,
    }
    too_small = len(scans.scans) - len(good)
    return Sizes(scans, too_small, num_crops, counts, sample, centroids, steps, per_epoch, net, files, stages)
