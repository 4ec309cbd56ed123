"""Bytes that the stages of a finetuning read and write, from shapes alone, and the windows that it validates on.

Shapes: C channels, K classes (0 is background), X Y Z voxels of the prepared grid.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from logonet.core.errors import UserError
from logonet.data import classes, manifest, prepared_scans, splits
from logonet.data.prepared_scans import CropSampling
from logonet.inference import sliding_window
from logonet.pipelines import Finetuning
from logonet.planning.sizes import (
    ROW_BYTES,
    Network,
    Scan,
    Scans,
    Sizes,
    Stage,
    checked_bytes,
    class_names,
    of_row,
    prepared_bytes,
    prepared_shape,
    touched_vox,
    training_counts,
)

POSITIONS_BYTES = 3 * 2 * prepared_scans.POSITIONS  # int16 coordinates, of a class with voxels enough


# ---------------------------------------------------------------------------------------------- the split


def parted(scans: Scans, cfg: splits.Config) -> Scans:
    """``scans``, all labelled and of a subject each, dealt out in the numbers that `splits.make` deals them in.

    Each pattern of ``cfg`` counts as one scan, since the names that it would match are not known.

    Raises:
        UserError: none is left to train on, or fewer than ``split.shots``.
    """
    count = len(scans.scans)
    share = max(1, round(cfg.test_share * count)) if cfg.test_share else 0
    left = count - (test := len(cfg.test_names) or share)
    val = 0
    if cfg.fold is not None:
        val = len(cfg.val_names) or left * (cfg.fold + 1) // cfg.folds - left * cfg.fold // cfg.folds
    pool = left - val
    train = cfg.shots or max(1, round(cfg.fraction * pool))
    if train > pool:
        wanted = f"of {count} scans the split puts {test} into test and {val} into validation"
        raise UserError(f"{wanted}, and {train} have to train; give more scans, or another split")
    parts = ["test"] * test + ["val"] * val + ["train"] * train + ["spare"] * (pool - train)
    return replace(scans, scans=tuple(replace(s, part=p) for s, p in zip(scans.scans, parts, strict=True)))


def of_split(table: manifest.Manifest, cfg: Finetuning, known_from: str) -> Scans:
    """The scans of an import as ``cfg.split`` deals them out, and their classes."""
    split = splits.make(table.scans, cfg.split)
    part_of = {i: part for part in ("train", "val", "test") for i in getattr(split, part)}
    part_of |= dict.fromkeys(split.excluded, "")
    rows = tuple(
        replace(of_row(row), part=part_of.get(row.scan_id, "spare") if row.label_uri else "")
        for row in table.scans
    )
    known = classes.union([row for row in table.scans if row.label_uri], cfg.data)
    chosen = cfg.data.members or {name: (name,) for name in known.names[1:]}
    regions = {name: tuple(known.names[i] for i in members) for name, members in known.regions.items()}
    labels = replace(cfg.data, classes=chosen, regions=regions, region_values=known.region_values)
    return Scans(rows, known_from, imported=True, labels=labels)


# --------------------------------------------------------------------------------------------------- files


@functools.lru_cache(maxsize=4096)
def labels_bytes(scan_id: str, shape_xyz: tuple[int, int, int], num_classes: int) -> int:
    """Size of a case's labels, at most: where every class has as many voxels as positions are kept."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        f"labels/{name}": ("U8", tuple(b.stop - b.start for b in box))
        for name, box in prepared_scans.chunks(shape_xyz)
    }
    tensors |= {f"places/{k}": ("I16", (prepared_scans.POSITIONS, 3)) for k in range(1, num_classes)}
    return checked_bytes(scan_id, tensors, shape=json.dumps((1, *shape_xyz)))


def case_read_bytes(
    files_bytes: tuple[int, int], shape_cxyz: tuple[int, int, int, int], crops: CropSampling, num_classes: int
) -> float:
    """What is read of a case for its crops of one iteration: both headers, and of each crop the chunks that it touches
    and, where it is centred on a class, the positions of that one.

    Args:
        files_bytes: of the image and of the labels.
    """
    channels, *shape = shape_cxyz
    voxels = math.prod(shape)
    cells = math.prod(-(-n // prepared_scans.CELL_VOX) for n in shape)
    data = (2 * channels + 1) * voxels + cells + POSITIONS_BYTES * (num_classes - 1)
    chunks = (2 * channels + 1) * math.prod(map(touched_vox, shape, crops.size_vox))
    each = chunks + crops.foreground_share * POSITIONS_BYTES
    return sum(files_bytes) - 16 - data + crops.per_case * each


def segmenting_bytes(shape_cxyz: Sequence[int], size_vox: Sequence[int], outputs: int) -> int:
    """Memory of segmenting a prepared scan in windows of ``size_vox``: the scan as it is stored and as float32, truth
    and answer, and the sums of one layer's logits and weights.
    """
    channels, *shape = shape_cxyz
    axis = sliding_window.stream_axis(shape, size_vox)
    sides = [size_vox[d] if d == axis else max(shape[d], size_vox[d]) for d in range(3)]
    return (6 * channels + 2) * math.prod(shape) + 4 * (outputs + 1) * math.prod(sides)


# -------------------------------------------------------------------------------------------------- stages


def sizes(cfg: Finetuning, scans: Scans, net: Network, outputs: int) -> Sizes:
    """What finetuning with ``cfg`` (resolved) moves and keeps; every scan counts as good, and training as going on to
    its last epoch, however long nothing has become better.

    Args:
        outputs: K of the logits.

    Raises:
        UserError: there is nobody to validate on.
    """
    train, per_case, num_classes = cfg.train, cfg.crops.per_case, len(class_names(cfg.data))
    shapes = {s.scan_id: prepared_shape(s, cfg.cases) for s in scans.scans if s.is_case}

    def files_of(scan: Scan) -> tuple[int, int]:
        shape, name = shapes[scan.scan_id], "0" * len(scan.scan_id)
        return prepared_bytes(name, shape), labels_bytes(name, shape[1:], num_classes)

    cases = [s for s in scans.scans if s.is_case]
    learners, judges = ([s for s in cases if s.part == part] for part in ("train", "val"))
    if train.validate_every_epochs and not judges:
        raise UserError(
            "the split has no validation cases; set train.validate_every_epochs=0, or split.fold to a fold"
        )
    images, labels = (sum(files) for files in zip(*map(files_of, cases)))
    reads = [case_read_bytes(files_of(s), shapes[s.scan_id], cfg.crops, num_classes) for s in learners]
    read, validated = sum(reads) / len(reads), sum(sum(files_of(s)) for s in judges)
    trained = training_counts(train, len(learners), net)
    every = train.validate_every_epochs
    validations = -(-train.epochs // every) if every else 0
    # The best weights so far are stored when there are better ones; those that checkpoints may name are kept.
    best, bests = net.backbone_file, min(validations, train.keep_checkpoints + 2)
    # The last weights, those of the method, the best ones and the model's, which are one or the other.
    final = (2 + bool(validations)) * net.backbone_file + net.model_file
    written, kept = trained.written + validations * best + final, trained.kept + bests * best + final
    batches = trained.steps * train.global_batch * read
    table = ROW_BYTES * len(cases)
    import_ = Stage("import", scans.stored_bytes)
    moved = [
        Stage("cases", sum(s.stored_bytes for s in cases), images + labels, images + labels, 0, table),
        # The driver reads the chosen weights, and makes the model's file of them.
        Stage("finetune", batches + validations * validated, written, kept, table, table + 3 * best),
    ]
    windows: dict[str, Any] = {}
    if validations:
        size, overlap = cfg.crops.size_vox, cfg.validation.overlap
        judged = [shapes[s.scan_id] for s in judges]
        windows = {
            "windows": tuple(sliding_window.num_windows(shape[1:], size, overlap) for shape in judged),
            "segmenting_bytes": max(segmenting_bytes(shape, size, outputs) for shape in judged),
            "validation_bytes": validated,
        }
    voxels = math.prod(cfg.crops.size_vox)
    crop = {"crop": 2 * scans.channels * voxels, "crop_labels": voxels}
    return Sizes(
        scans=scans,
        too_small=0,
        num_crops=len(learners) * per_case,
        read_bytes=read,
        training_bytes=sum(sum(files_of(s)) for s in learners) + bool(validations) * validated,
        steps=trained.steps,
        steps_per_epoch=trained.steps_per_epoch,
        network=net,
        files={**crop, "prepared": images, "prepared_labels": labels, **trained.files},
        stages=tuple(moved if scans.imported else [import_, *moved]),
        validations=validations,
        **windows,
    )
