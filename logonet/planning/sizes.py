"""Bytes that each stage reads and writes, from shapes alone; exact where the file layout is ours.

Shapes: P crops, C channels, N clusterers, V codes of all clusterers, T = C*X*Y, Z slices of a crop.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from logonet import methods, training
from logonet.clustering import kmeans, pseudo_labels
from logonet.core import config
from logonet.data import classes, cropping, manifest, prepared_scans, volume
from logonet.data.preprocessing import Preprocessing
from logonet.methods import DataSpec
from logonet.pipelines import Finetuning, Pretraining, preparation

# safetensors' dtypes in its own order: it stores the tensors of the last of these first.
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64,
}  # fmt: skip
SHA256 = "0" * 64
INERTIA = 0.1234567890123456  # as long in JSON as most inertias
STORED_PER_VOXEL = 1.3  # gzipped int16: 1.31 bytes per voxel of a CT scan and 1.30 of an MR scan
ROW_BYTES = 250  # of one crop, or of its labels, or of one prepared scan, in an Arrow table: 205 to 280
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> safetensors' dtype, shape
Planned = Pretraining | Finetuning


@dataclass(frozen=True)
class Scan:
    """One scan to read: its grid in RAS axes, ``spacing_mm`` (None: unknown), stored bytes of all its channels.

    ``part`` is what finetuning does with it: "train", "val" or "test" as in a split, "spare" where it is prepared and
    not used, and "" where it is not even that, or the scans are for pretraining.
    """

    scan_id: str
    shape_vox: tuple[int, int, int]
    spacing_mm: tuple[float, float, float] | None
    stored_bytes: float
    channels: int = 1
    part: str = ""

    @property
    def voxels(self) -> int:
        """Of all channels, and of the labels."""
        return (self.channels + bool(self.part)) * math.prod(self.shape_vox)

    @property
    def is_case(self) -> bool:
        """Whether finetuning prepares it."""
        return self.part in ("train", "val", "spare")


@dataclass(frozen=True)
class Scans:
    """All scans to read.

    Attributes:
        known_from: a phrase that says how they are known.
        imported: the import is done.
        labels: the classes of the labels, where they are known from an import.
    """

    scans: tuple[Scan, ...]
    known_from: str
    imported: bool = False
    labels: classes.Config | None = None

    @property
    def stored_bytes(self) -> float:
        return sum(s.stored_bytes for s in self.scans)

    @property
    def voxels(self) -> int:
        return sum(s.voxels for s in self.scans)

    @property
    def channels(self) -> int:
        """Of every scan: a run takes only scans of one number of channels."""
        return self.scans[0].channels if self.scans else 1


def equal_scans(
    count: int,
    shape_vox: tuple[int, int, int],
    spacing_mm: tuple[float, float, float] | None = None,
    channels: int = 1,
) -> Scans:
    """``count`` scans of one shape, of which nothing else is known."""
    stored_bytes = channels * math.prod(shape_vox) * STORED_PER_VOXEL
    # As long as the ids that an import makes of names like hippocampus_001.
    ids = [f"scan_{i:07d}-{'0' * 10}" for i in range(count)]
    rows = tuple(Scan(i, shape_vox, spacing_mm, stored_bytes, channels) for i in ids)
    each = f"{'x'.join(map(str, shape_vox))} voxels" + (f" and {channels} channels" if channels > 1 else "")
    return Scans(rows, f"{count:,} scans of {each}, as given")


def of_manifest(table: manifest.Manifest, known_from: str) -> Scans:
    """The scans of an import."""
    return Scans(tuple(map(of_row, table.scans)), known_from, imported=True)


def of_row(row: manifest.Scan) -> Scan:
    """A manifest's row with its axes in RAS order."""
    axes = [next(i for i, a in enumerate(row.orientation) if a in pair) for pair in ("RL", "AP", "SI")]
    x, y, z = (row.shape[i] for i in axes)
    dx, dy, dz = (row.spacing_mm[i] for i in axes)
    return Scan(row.scan_id, (x, y, z), (dx, dy, dz), row.size_bytes, row.num_channels)


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


def checked_bytes(scan_id: str, tensors: Tensors, **about: str) -> int:
    """Size of a safetensors file of a scan that also holds the checksum of each tensor."""
    sums = json.dumps(dict.fromkeys(tensors, SHA256))
    return safetensors_bytes(tensors, {"scan_id": scan_id, **about, "sha256": sums})


def shard_bytes(scan_id: str, per_scan: int, shape: Sequence[int]) -> int:
    """Size of one scan's shard of crops (C, X, Y, Z), or of their labels (N, Z)."""
    return checked_bytes(scan_id, {f"{i:05d}": ("U16", tuple(shape)) for i in range(per_scan)})


@functools.lru_cache(maxsize=4096)
def prepared_bytes(scan_id: str, shape_cxyz: tuple[int, int, int, int]) -> int:
    """Size of a prepared scan's file: chunks and the map of what is not air."""
    channels, *shape = shape_cxyz
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        f"image/{name}": ("U16", (channels, *(b.stop - b.start for b in box)))
        for name, box in prepared_scans.chunks(shape)
    }
    tensors["coverage"] = ("U8", tuple(-(-n // prepared_scans.CELL_VOX) for n in shape))
    return checked_bytes(scan_id, tensors, shape=json.dumps(shape_cxyz))


def touched_vox(length: int, crop: int) -> float:
    """Voxels along one axis of the chunks that a crop touches, the mean over all places where it fits."""
    room, touched = max(0, length - crop), 0
    for begin in range(0, length, prepared_scans.CHUNK_VOX):
        end = min(begin + prepared_scans.CHUNK_VOX, length)
        places = min(end - 1, room) - max(begin - crop + 1, 0) + 1
        touched += (end - begin) * max(0, places)
    return touched / (room + 1)


def crop_read_bytes(file_bytes: int, shape_cxyz: tuple[int, int, int, int], size_vox: Sequence[int]) -> float:
    """What is read of a prepared scan for one crop: the header, the map of what is not air, and some chunks."""
    channels, *shape = shape_cxyz
    chunks = 2 * channels * math.prod(map(touched_vox, shape, size_vox))
    return file_bytes - 8 - 2 * math.prod(shape_cxyz) + chunks


def clusterers_bytes(sizes: Sequence[int], length: int, meta: Mapping[str, Any]) -> int:
    """Size of a clusterer set with ``meta`` data, up to the digits of its inertias."""
    import sklearn

    meta = {**meta, "inertia": [INERTIA] * len(sizes), "sklearn": sklearn.__version__}
    about = {"format": kmeans.SET_FORMAT, "sha256": SHA256, "meta": meta}
    arrays = {"centroids_VT": ("F32", (sum(sizes), length)), "sizes_N": ("I64", (len(sizes),))}
    return safetensors_bytes(arrays, {"logonet": json.dumps(about, sort_keys=True, separators=(",", ":"))})


def screen_bytes(num_codes: int, length: int) -> int:
    """Of a labeller's arrays beside its centroids (V, T)."""
    rank = min(pseudo_labels.RANK, num_codes, length)
    return 4 * num_codes * (rank + 2) + 4 * length * rank + 16 * num_codes


# --------------------------------------------------------------------------------------------- network


@dataclass(frozen=True)
class Network:
    """What training a method with its network keeps and saves.

    Attributes:
        state: the method's state dict; names of the network's tensors begin with "backbone.".
        trainable: shapes of the parameters that get a gradient.
        weight_bytes: of all parameters and buffers.
        train: decides the optimizer's state, and whether weights are averaged.
    """

    state: Tensors
    trainable: Mapping[str, tuple[int, ...]]
    weight_bytes: int
    train: training.Config = field(default_factory=training.Config)

    @property
    def moments(self) -> tuple[str, ...]:
        """What the optimizer keeps of each parameter, in the parameter's size."""
        if self.train.optimizer == "adamw":
            return "exp_avg", "exp_avg_sq"
        return ("momentum_buffer",) if self.train.momentum else ()

    @property
    def gradient_bytes(self) -> int:
        """Of one worker, always float32."""
        return 4 * sum(map(math.prod, self.trainable.values()))

    @property
    def sent_bytes(self) -> int:
        """Of a worker's gradients as they are sent."""
        return self.gradient_bytes // (2 if self.train.gradient_compression == "bf16" else 1)

    @property
    def model_file(self) -> int:
        """The final method.safetensors."""
        return safetensors_bytes(self.state)

    @property
    def checkpoint_model_file(self) -> int:
        """A checkpoint's model.safetensors."""
        averages: dict[str, tuple[str, tuple[int, ...]]] = {}
        if self.train.ema:
            averages = {f"average/module.{name}": tensor for name, tensor in self._backbone.items()}
            averages["average/n_averaged"] = ("I64", ())
        return safetensors_bytes({**self.state, **averages})

    @property
    def optimizer_file(self) -> int:
        """A checkpoint's optimizer.safetensors."""
        tensors = {
            f"{m}/{name}": ("F32", shape) for name, shape in self.trainable.items() for m in self.moments
        }
        if self.train.optimizer == "adamw":
            tensors |= {f"step/{name}": ("F32", ()) for name in self.trainable}
        return safetensors_bytes(tensors)

    @property
    def backbone_file(self) -> int:
        """The final backbone.safetensors."""
        return safetensors_bytes(self._backbone)

    @property
    def _backbone(self) -> Tensors:
        stem = "backbone."
        return {n.removeprefix(stem): t for n, t in self.state.items() if n.startswith(stem)}

    @property
    def checkpoint_bytes(self) -> int:
        """All tensors of a checkpoint at the end of an epoch."""
        return self.checkpoint_model_file + self.optimizer_file + safetensors_bytes({})


def network(method: torch.nn.Module, train: training.Config | None = None) -> Network:
    """Describe a method module, which may be on the meta device, as ``train`` (None: the default) trains it."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    return Network(
        state={n: (names[t.dtype], tuple(t.shape)) for n, t in method.state_dict().items()},
        trainable={n: tuple(p.shape) for n, p in method.named_parameters() if p.requires_grad},
        weight_bytes=4 * sum(t.numel() for t in [*method.parameters(), *method.buffers()]),
        train=train or training.Config(),
    )


def facts_of(cfg: Planned, channels: int = 1) -> DataSpec:
    """What the method will know of the data; every clusterer counts with as many clusters as were drawn for it, and
    labels that nothing is said of have one class beside background.
    """
    size_vox, batch_size = cfg.crops.size_vox, cfg.train.batch_size
    if isinstance(cfg, Finetuning):
        names = class_names(cfg.data)
        regions = tuple(tuple(map(names.index, members)) for members in cfg.data.regions.values())
        outputs, rows = len(regions) or len(names), batch_size * cfg.crops.per_case
        return DataSpec(size_vox, channels, num_classes=outputs, batch_size=rows, regions=regions)
    pseudo = "pseudo_labels" in methods.needs(cfg.method.name)
    counts = tuple(kmeans.cluster_counts(cfg.clusterers)) if pseudo else ()
    return DataSpec(size_vox, channels, counts, majority_labels=(0,) * len(counts), batch_size=batch_size)


def class_names(cfg: classes.Config) -> list[str]:
    """The classes that ``cfg`` names, background first."""
    in_regions = dict.fromkeys(name for members in cfg.regions.values() for name in members)
    return [classes.BACKGROUND, *(cfg.members or in_regions or ["class 1"])]


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
    """Everything that is counted, not timed; ``files`` are the sizes of all that is stored. The last of ``stages``
    trains.

    Attributes:
        num_crops: of an epoch, and of the fixed pool.
        read_bytes: from the store for one sample of training, on average.
        training_bytes: all that training reads, once.
        labelled_scans: those of the pool whose crops are labelled.
        labelled_crops: their crops.
        label_flop: operations of a brute-force search of the labels of one crop.
        screen_bytes: of a labeller's arrays that each data process copies.
        validations: how often finetuning validates.
        windows: of each validation scan.
        validation_bytes: read by one validation.
        segmenting_bytes: memory for the scan and the sums of logits, where the largest one is segmented.
    """

    scans: Scans
    too_small: int
    num_crops: int
    read_bytes: float
    training_bytes: int
    steps: int
    steps_per_epoch: int
    network: Network
    files: dict[str, int]
    stages: tuple[Stage, ...]
    labelled_scans: int = 0
    labelled_crops: int = 0
    cluster_sizes: tuple[int, ...] = ()
    label_flop: float = 0.0
    sample_bytes: int = 0
    centroid_bytes: int = 0
    screen_bytes: int = 0
    validations: int = 0
    windows: tuple[int, ...] = ()
    validation_bytes: int = 0
    segmenting_bytes: int = 0


def prepared_shape(scan: Scan, cfg: Preprocessing) -> tuple[int, int, int, int]:
    """(C, X, Y, Z) of a prepared scan."""
    shape = scan.shape_vox
    if cfg.spacing_mm is not None and scan.spacing_mm is not None:
        shape = volume.resampled_shape(shape, scan.spacing_mm, cfg.spacing_mm)
    return scan.channels, *shape


def yields_crops(scan: Scan, cfg: cropping.Config) -> bool:
    """Whether a scan is large enough for a crop."""
    return cropping.image_share(prepared_shape(scan, cfg)[1:], cfg) >= cfg.min_image_share


def sizes(cfg: Pretraining, scans: Scans, net: Network) -> Sizes:
    """What pretraining with ``cfg`` (resolved) moves and keeps.

    Damaged scans and scans without contrast are known only after they are read; here every scan counts that is large
    enough.
    """
    (x, y, depth), per_scan, channels = cfg.crops.size_vox, cfg.crops.per_scan, scans.channels
    crop, length, fresh = 2 * channels * x * y * depth, channels * x * y, cfg.data.fresh_crops
    counts = facts_of(cfg).cluster_sizes
    good = [s for s in scans.scans if yields_crops(s, cfg.crops)]
    num_crops = len(good) * per_scan
    cache = _shards_bytes(good, per_scan, (channels, x, y, depth))
    sample = crop * min(num_crops, max(1, cfg.clusterers.max_slices // depth)) if counts else 0
    meta = {"config": config.to_dict(cfg.clusterers), "crops": "0" * 16}
    fitted = clusterers_bytes(counts, length, meta) if counts else 0
    centroids, screen = 4 * sum(counts) * length, screen_bytes(sum(counts), length)
    chosen = preparation.labelled_scans(len(good), num_crops) if fresh and good else range(len(good))
    labelled = [good[i] for i in chosen] if counts else []
    labels, label = _shards_bytes(labelled, per_scan, (len(counts), depth)), 2 * len(counts) * depth
    prepared, read = 0, float(crop + label)
    if fresh:
        shapes = [prepared_shape(s, cfg.crops) for s in good]
        # A file's size depends on the scan only through its shape and the length of its id.
        files_bytes = [prepared_bytes("0" * len(s.scan_id), shape) for s, shape in zip(good, shapes)]
        reads = [crop_read_bytes(*file, cfg.crops.size_vox) for file in zip(files_bytes, shapes)]
        prepared, read = sum(files_bytes), sum(reads) / max(1, len(good))
    trained = training_counts(cfg.train, num_crops, net)
    final = net.backbone_file + net.model_file
    in_driver = sample + 2 * centroids + fitted
    pool_table, labels_table = ROW_BYTES * num_crops, ROW_BYTES * len(labelled) * per_scan
    # While its screen is built, a labeller's centroids are there in float64 too; it is sent from plain copies.
    labelling = 3 * (centroids + screen) + labels_table + 8 * len(counts) * max(counts, default=0)
    labeller, copies = centroids + screen, centroids + 3 * screen
    dataset = ROW_BYTES * len(good) + labeller if fresh else pool_table + labels_table
    in_training = pool_table + labels_table + (ROW_BYTES * len(good) + copies if fresh else 0)
    batches = trained.steps * cfg.train.global_batch * read
    skipped = {"import"} if scans.imported else set()
    skipped |= set() if fresh else {"prepared"}
    skipped |= set() if counts else {"clusterers", "labels"}
    moved = [
        # name, read, written, kept, in Ray's object store of a node, in the driver's memory
        Stage("import", scans.stored_bytes),
        Stage("crops", scans.stored_bytes, cache, cache, 0, pool_table),
        Stage("prepared", sum(s.stored_bytes for s in good), prepared, prepared, 0, pool_table),
        # Every fit is stored, read again and stored once more in the set.
        Stage("clusterers", sample + centroids, centroids + fitted, fitted, sample, in_driver),
        Stage("labels", fitted + len(labelled) * per_scan * crop, labels, labels, labeller, labelling),
        Stage("pretrain", batches, trained.written + final, trained.kept + final, dataset, in_training),
    ]
    files = {
        "crop": crop,
        "crops_cache": cache,
        "prepared": prepared,
        "clusterers": fitted,
        "labels": labels,
        **trained.files,
    }
    return Sizes(
        scans=scans,
        too_small=len(scans.scans) - len(good),
        num_crops=num_crops,
        labelled_scans=len(labelled),
        labelled_crops=len(labelled) * per_scan,
        cluster_sizes=counts,
        label_flop=2.0 * depth * sum(counts) * length,
        sample_bytes=sample,
        read_bytes=read,
        training_bytes=prepared if fresh else num_crops * (crop + label),
        centroid_bytes=centroids,
        screen_bytes=screen,
        steps=trained.steps,
        steps_per_epoch=trained.steps_per_epoch,
        network=net,
        files=files,
        stages=tuple(s for s in moved if s.name not in skipped),
    )


@dataclass(frozen=True)
class TrainingCounts:
    """Steps, and bytes of all checkpoints: ``written``, and ``kept`` at the end. ``files`` are of one."""

    steps_per_epoch: int
    steps: int
    written: int
    kept: int
    files: dict[str, int]


def training_counts(train: training.Config, num_samples: int, net: Network) -> TrainingCounts:
    """What any training on ``num_samples`` samples does and keeps."""
    per_epoch = train.steps_per_epoch or -(-num_samples // train.global_batch)
    steps = per_epoch * train.epochs
    saves, checkpoint = len(checkpoint_steps(train, per_epoch)), net.checkpoint_bytes
    files = {
        "checkpoint": checkpoint,
        "checkpoint_model": net.checkpoint_model_file,
        "checkpoint_optimizer": net.optimizer_file,
        "final_backbone": net.backbone_file,
        "final_method": net.model_file,
        "gradients": net.gradient_bytes,
    }
    most = steps if train.checkpoint_every_s else saves  # a clock may add some
    kept = min(most, train.keep_checkpoints) * checkpoint
    return TrainingCounts(per_epoch, steps, saves * checkpoint, kept, files)


def checkpoint_steps(train: training.Config, per_epoch: int, overdue_steps: float = math.inf) -> list[int]:
    """The steps after which the loop writes a checkpoint, if each validation is better than those before.

    Args:
        per_epoch: steps of an epoch.
        overdue_steps: steps in which a checkpoint becomes ``train.checkpoint_every_s`` old.
    """
    steps, every, validate = (
        per_epoch * train.epochs,
        train.checkpoint_every_steps,
        train.validate_every_epochs,
    )
    found = {steps} | set(range(every, steps, every) if every else ())
    epochs = 1 if not train.checkpoint_every_s else validate
    found |= set(range(epochs * per_epoch, steps, epochs * per_epoch) if epochs else ())
    if train.checkpoint_every_s and overdue_steps < steps:
        each = math.ceil(overdue_steps)
        for before, after in itertools.pairwise([0, *sorted(found)]):
            found |= set(range(before + each, after, each))
    return sorted(found)


def _shards_bytes(scans: Sequence[Scan], per_scan: int, shape: Sequence[int]) -> int:
    """Of a shard for each scan; its size depends on the scan only through the length of its id."""
    lengths = Counter(len(s.scan_id) for s in scans)
    return sum(count * shard_bytes("0" * n, per_scan, shape) for n, count in lengths.items())
