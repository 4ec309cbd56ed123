"""How many bytes each stage reads and writes: arithmetic on shapes, exact where a file's layout is ours.

Shapes: P crops, N clusterers, V codes of all clusterers, T voxels of a slice, Z slices of a crop.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from logonet import methods, training
from logonet.clustering import kmeans
from logonet.core import config
from logonet.core.errors import BadScan
from logonet.data import cropping, manifest, volume
from logonet.methods import DataSpec
from logonet.pipelines import Pretraining

# In the library's own order, which is that of tensors in a file, the last first.
DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "F32": 4,
    "F64": 8,
    "I64": 8,
}
SHA256 = "0" * 64
INERTIA = 0.1234567890123456  # as long as most numbers in JSON: what of our files' sizes depends on values
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> dtype as safetensors names it, shape


@dataclass(frozen=True)
class Scan:
    """One scan to read: its grid in RAS axes, ``spacing_mm`` (None: unknown), and its stored bytes."""

    scan_id: str
    shape_vox: tuple[int, int, int]
    spacing_mm: tuple[float, float, float] | None
    stored_bytes: float

    @property
    def voxels(self) -> int:
        return math.prod(self.shape_vox)


@dataclass(frozen=True)
class Scans:
    """What there is to read, and where that is known from.

    ``label_bytes`` are read by the import alone; ``imported`` says that it is done.
    """

    scans: tuple[Scan, ...]
    known_from: str
    label_bytes: float = 0.0
    imported: bool = False

    @property
    def stored_bytes(self) -> float:
        return sum(s.stored_bytes for s in self.scans)

    @property
    def voxels(self) -> int:
        return sum(s.voxels for s in self.scans)


STORED_PER_VOXEL = 1.3  # gzipped int16: 1.31 bytes a voxel of a CT and 1.30 of an MR scan (docs/planning.md)


def equal_scans(
    count: int,
    shape_vox: tuple[int, int, int],
    spacing_mm: tuple[float, float, float] | None = None,
    stored_per_voxel: float = STORED_PER_VOXEL,
) -> Scans:
    """``count`` scans of one shape, of which nothing else is known."""
    stored = math.prod(shape_vox) * stored_per_voxel
    # As long as the ids that an import makes of names like hippocampus_001.
    rows = tuple(Scan(f"scan_{i:07d}-{'0' * 10}", shape_vox, spacing_mm, stored) for i in range(count))
    return Scans(rows, f"{count:,} scans of {'x'.join(map(str, shape_vox))} voxels, as told")


def of_manifest(table: manifest.Manifest, known_from: str) -> Scans:
    """The rows of an import."""
    return Scans(tuple(map(of_row, table.scans)), known_from, imported=True)


def of_row(row: manifest.Scan) -> Scan:
    """A manifest's row with its axes in RAS order."""
    place = [
        next(i for i, letter in enumerate(row.orientation) if letter in pair) for pair in ("RL", "AP", "SI")
    ]
    x, y, z = (row.shape[i] for i in place)
    dx, dy, dz = (row.spacing_mm[i] for i in place)
    return Scan(row.scan_id, (x, y, z), (dx, dy, dz), row.size_bytes)


# ----------------------------------------------------------------------------------------------- files


def safetensors_bytes(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> int:
    """The size of a safetensors file: 8 bytes, a JSON header filled up to a multiple of 8, the tensors."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    place = list(DTYPE_BYTES).index
    # Offsets have digits, so order has a length.
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (-place(item[1][0]), item[0])):
        begin, end = end, end + DTYPE_BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + end


def shard_bytes(scan_id: str, per_scan: int, shape_CXYZ: Sequence[int]) -> int:
    """A scan's shard of crops (`data.cut_scans`)."""
    names = [f"{i:05d}" for i in range(per_scan)]
    meta = {"scan_id": scan_id, "sha256": json.dumps(dict.fromkeys(names, SHA256))}
    return safetensors_bytes({n: ("U16", tuple(shape_CXYZ)) for n in names}, meta)


def clusterers_bytes(sizes: Sequence[int], length: int, meta: Mapping[str, Any]) -> int:
    """A clusterer set (`clusterers.ClustererSet.to_bytes`), to within the digits of its inertias.

    Args:
        meta: what a set says of itself, without what fitting adds.
    """
    import sklearn

    meta = {**meta, "inertia": [INERTIA] * len(sizes), "sklearn": sklearn.__version__}
    about = {"format": kmeans.SET_FORMAT, "sha256": SHA256, "meta": meta}
    arrays = {"centroids_VT": ("F32", (sum(sizes), length)), "sizes_N": ("I64", (len(sizes),))}
    return safetensors_bytes(arrays, {"logonet": json.dumps(about, sort_keys=True, separators=(",", ":"))})


def labels_bytes(num_crops: int, num_clusterers: int, depth: int) -> int:
    """The pseudo-labels (`stages.make_labels`)."""
    return safetensors_bytes({"labels_PNZ": ("I16", (num_crops, num_clusterers, depth))})


# --------------------------------------------------------------------------------------------- network


@dataclass(frozen=True)
class Network:
    """What training a pair of backbone and method keeps and saves.

    Attributes:
        state: the method's state dict, as it is saved; the backbone's begin with "backbone.".
        trainable: shapes of the parameters that get a gradient.
        parameters: numbers of all parameters; ``buffers`` of what else the modules hold.
        embedding: F of the pooled features that a checkpoint within an epoch keeps.
    """

    state: Tensors
    trainable: Mapping[str, tuple[int, ...]]
    parameters: int
    buffers: int
    embedding: int

    @property
    def weight_bytes(self) -> int:
        return 4 * (self.parameters + self.buffers)

    @property
    def gradient_bytes(self) -> int:
        """Of one worker, what an all-reduce moves: float32 whatever autocast does."""
        return 4 * sum(map(math.prod, self.trainable.values()))

    @property
    def moment_bytes(self) -> int:
        """AdamW's two."""
        return 2 * self.gradient_bytes

    @property
    def model_file(self) -> int:
        """model.safetensors of a checkpoint, and the finished run's method.safetensors."""
        return safetensors_bytes(self.state)

    @property
    def optimizer_file(self) -> int:
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, shape in self.trainable.items():
            tensors[f"step/{name}"] = ("F32", ())
            tensors |= {f"{moment}/{name}": ("F32", shape) for moment in ("exp_avg", "exp_avg_sq")}
        return safetensors_bytes(tensors)

    @property
    def backbone_file(self) -> int:
        stem = "backbone."
        return safetensors_bytes(
            {n.removeprefix(stem): t for n, t in self.state.items() if n.startswith(stem)}
        )

    @property
    def checkpoint_bytes(self) -> int:
        """The tensors of a checkpoint at an epoch's end, when no epoch is under way."""
        return self.model_file + self.optimizer_file + safetensors_bytes({})

    def partial_bytes(self, workers: int, samples_per_worker: int) -> int:
        """What a checkpoint within an epoch adds at most: the pooled features of every rank's samples so far."""
        return 4 * self.embedding * workers * min(samples_per_worker, training.MAX_EMBEDDINGS)


_NAMES = {
    "torch.float32": "F32",
    "torch.float64": "F64",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}


def network(method: Any) -> Network:
    """The facts of a method module (`train.build_method`), which may stand on the meta device."""
    return Network(
        state={n: (_NAMES[str(t.dtype)], tuple(t.shape)) for n, t in method.state_dict().items()},
        trainable={n: tuple(p.shape) for n, p in method.named_parameters() if p.requires_grad},
        parameters=sum(p.numel() for p in method.parameters()),
        buffers=sum(b.numel() for b in method.buffers()),
        embedding=int(method.backbone.channels[-1]),
    )


def facts_of(cfg: Pretraining) -> DataSpec:
    """What the method will know: as many clusters as are drawn, which fewer distinct slices alone can lower."""
    pseudo = "pseudo_labels" in methods.needs(cfg.method["name"])
    counts = tuple(kmeans.cluster_counts(cfg.clusterers)) if pseudo else ()
    return DataSpec(
        size_vox=cfg.crops.size_vox,
        cluster_sizes=counts,
        majority_labels=(0,) * len(counts),
        batch_size=cfg.train.batch_size,
    )


# ---------------------------------------------------------------------------------------------- stages


@dataclass(frozen=True)
class Stage:
    """What one stage moves, in bytes.

    Attributes:
        read: from the store, by all nodes together.
        written: to the store.
        kept: of it, what stays.
        node_shared: of Ray's shared memory on every node that works on the stage.
        driver: of the driver's own memory.
    """

    name: str
    read: float = 0.0
    written: float = 0.0
    kept: float = 0.0
    node_shared: float = 0.0
    driver: float = 0.0


@dataclass(frozen=True)
class Sizes:
    """Everything that is counted, not timed."""

    scans: Scans
    num_crops: int
    crop_bytes: int
    too_small: int
    cache_bytes: int
    sampled_crops: int
    slice_voxels: int
    cluster_sizes: tuple[int, ...]
    clusterers_bytes: int
    labels_bytes: int
    network: Network
    steps: int
    steps_per_epoch: int
    stages: tuple[Stage, ...] = ()

    @property
    def centroid_bytes(self) -> int:
        return 4 * sum(self.cluster_sizes) * self.slice_voxels

    @property
    def sample_bytes(self) -> int:
        """The slices that clusterers are fitted on."""
        return self.sampled_crops * self.crop_bytes

    @property
    def kept_bytes(self) -> float:
        return sum(s.kept for s in self.stages)


def yields_crops(scan: Scan, cfg: cropping.Config) -> bool:
    """Whether a scan is large enough to be cut."""
    shape = scan.shape_vox
    if cfg.spacing_mm is not None and scan.spacing_mm is not None:
        shape = volume.resampled_shape(shape, scan.spacing_mm, cfg.spacing_mm)
    try:
        cropping.candidates(shape, cfg, scan.scan_id)
    except BadScan:
        return False
    return True


def sizes(cfg: Pretraining, scans: Scans, net: Network) -> Sizes:
    """What pretraining with ``cfg`` (resolved, see `stages.resolve`) moves and keeps.

    Scans may turn out to be damaged or without contrast, which nobody knows before they are read: all that
    are large enough count.
    """
    size = cfg.crops.size_vox
    shape_CXYZ = (1, *size)
    crop_bytes = 2 * math.prod(shape_CXYZ)
    good = [s for s in scans.scans if yields_crops(s, cfg.crops)]
    num_crops = len(good) * cfg.crops.per_scan
    # A header's length depends on the id's, and of a million scans few lengths differ.
    lengths: dict[int, int] = {}
    for s in good:
        if len(s.scan_id) not in lengths:
            lengths[len(s.scan_id)] = shard_bytes(s.scan_id, cfg.crops.per_scan, shape_CXYZ)
    cache = sum(lengths[len(s.scan_id)] for s in good)
    counts = facts_of(cfg).cluster_sizes
    length = size[0] * size[1]
    sampled = min(num_crops, max(1, cfg.clusterers.max_slices // size[2])) if counts else 0
    meta = {"config": config.to_dict(cfg.clusterers), "crops": "0" * 16}
    set_bytes = clusterers_bytes(counts, length, meta) if counts else 0
    label_bytes = labels_bytes(num_crops, len(counts), size[2]) if counts else 0
    per_epoch = cfg.train.steps_per_epoch or -(-num_crops // cfg.train.global_batch)
    out = Sizes(
        scans=scans,
        num_crops=num_crops,
        crop_bytes=crop_bytes,
        too_small=len(scans.scans) - len(good),
        cache_bytes=cache,
        sampled_crops=sampled,
        slice_voxels=length,
        cluster_sizes=counts,
        clusterers_bytes=set_bytes,
        labels_bytes=label_bytes,
        network=net,
        steps=per_epoch * cfg.train.epochs,
        steps_per_epoch=per_epoch,
    )
    return replace(out, stages=_stages(cfg, out))


def _stages(cfg: Pretraining, of: Sizes) -> tuple[Stage, ...]:
    net, stored = of.network, of.scans.stored_bytes
    out = [] if of.scans.imported else [Stage("import", read=stored + of.scans.label_bytes)]
    out.append(Stage("crops", read=stored, written=of.cache_bytes, kept=of.cache_bytes))
    if of.cluster_sizes:
        fits, sample = of.centroid_bytes, of.sample_bytes
        out.append(
            Stage(
                "clusterers",
                read=sample
                + fits,  # every fit is stored, read back and, when all are there, stored once more
                written=fits + of.clusterers_bytes,
                kept=of.clusterers_bytes,
                node_shared=sample,
                driver=sample + 2 * fits + of.clusterers_bytes,
            )
        )
        out.append(
            Stage(
                "labels",
                read=of.clusterers_bytes + of.num_crops * of.crop_bytes,
                written=of.labels_bytes,
                kept=of.labels_bytes,
                node_shared=fits,
                driver=2 * of.clusterers_bytes + 2 * of.labels_bytes,
            )
        )
    every, epochs = cfg.train.checkpoint_every_steps, cfg.train.epochs
    saves = epochs + (
        0
        if every is None
        else of.steps // every - sum(e * of.steps_per_epoch % every == 0 for e in range(1, epochs + 1))
    )
    final = net.backbone_file + net.model_file
    out.append(
        Stage(
            "pretrain",
            read=of.steps * cfg.train.global_batch * of.crop_bytes,
            written=saves * net.checkpoint_bytes + final,
            kept=min(saves, cfg.train.keep_checkpoints) * net.checkpoint_bytes + final,
            node_shared=2 * math.prod((of.num_crops, len(of.cluster_sizes), cfg.crops.size_vox[2]))
            + 400 * of.num_crops,
            driver=3 * of.labels_bytes,
        )
    )
    return tuple(out)
