"""The numbers that shapes do not tell: how fast this store, these processors and this network are.

``logonet plan --probe`` measures them where the run will be; ``defaults`` are those of the machine the project is
developed on, which says of every plan made with them that they are somebody else's.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from importlib import resources
from typing import Any

from logonet.core import config
from logonet.storage import object_store


@dataclass(frozen=True)
class StepTimes:
    """Real steps of one backbone, method, crop size and micro-batch.

    Attributes:
        of: fingerprint of those (`step_fingerprint`).
        flop: of one micro-batch, counted.
        alone_s: seconds of a micro-batch, forward and backward, on an otherwise idle machine, by number of threads.
        busy_s: the same on one thread when every core runs one.
        optimizer_s: of the optimizer's step.
        spread: standard deviation of the logarithm of a micro-batch's seconds.
        steps: how many were timed.
        peak_bytes: largest resident memory of a worker; on a GPU, allocated on it.
        prepare_s: core seconds to read and prepare one sample in a data task.
    """

    of: str
    flop: float
    alone_s: dict[str, float]
    busy_s: float
    optimizer_s: float
    spread: float
    steps: int
    peak_bytes: float
    prepare_s: float


@dataclass(frozen=True)
class Constants:
    """What a plan takes as given. Times in seconds, rates in bytes or floating point operations a second.

    Attributes:
        machine, date: where and when they were measured.
        device: "cpu" or the GPU's name.
        cores: of a node there.
        step: of real steps there; None scales by ``flop_s``.
        flop_s: floating point operations a second of one core, or of one GPU, in real training steps.
        serial_share: of a step's time on one thread, what more threads do not shorten.
        busy_slowdown: by how much a step of one thread takes longer when all cores are busy.
        spread: of a micro-batch's logarithm, where ``step`` does not know it.
        optimizer_bytes_s: trainable float32 bytes that AdamW updates.
        store_read_bytes_s, store_write_bytes_s: of one stream; ``store_node_bytes_s`` of all streams of a node.
        request_s: one small read.
        import_voxels_s: of one core: decompress, check, hash and fingerprint a scan.
        cut_voxels_s: of one core: decompress a scan and cut its crops.
        prepare_bytes_s: of one core: crop bytes read from a warm store, checked and prepared.
        task_s: of a data task, beside its work.
        allreduce_latency_s, allreduce_bytes_s: one hop of a ring, and the rate of a worker's link.
        copy_bytes_s: memory to memory.
        disk_bytes_s: written to local disk.
        kmeans_flop_s, kmeans_init_flop_s: of one core: an update's and k-means++'s distances.
        label_flop_s: of one core: brute force's operations that the labeller saves or does in a second.
        worker_bytes: of a training worker's process before it has a network.
        task_bytes: of an idle data task's process.
        start_s: from asking Ray Train for workers to the first one's first line, and ``start_core_s`` of a core's time
            for each worker.
        epoch_s: of an epoch's end: metrics, the report, the copy of a small state.
    """

    machine: str
    date: str
    device: str
    cores: int
    flop_s: float
    serial_share: float
    busy_slowdown: float
    spread: float
    optimizer_bytes_s: float
    store_read_bytes_s: float
    store_write_bytes_s: float
    store_node_bytes_s: float
    request_s: float
    import_voxels_s: float
    cut_voxels_s: float
    prepare_bytes_s: float
    task_s: float
    allreduce_latency_s: float
    allreduce_bytes_s: float
    copy_bytes_s: float
    disk_bytes_s: float
    kmeans_flop_s: float
    kmeans_init_flop_s: float
    label_flop_s: float
    worker_bytes: float
    task_bytes: float
    start_s: float
    start_core_s: float
    epoch_s: float
    step: StepTimes | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, float) and not value > 0 and name not in ("spread", "serial_share"):
                raise ValueError(f"{name} is {value}; it must be above 0")

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()


def step_fingerprint(
    backbone: dict[str, Any],
    method: dict[str, Any],
    size_vox: tuple[int, ...],
    batch_size: int,
    precision: str,
) -> str:
    """Names what a step's time depends on, beside the machine."""
    return config.fingerprint(
        {
            "backbone": backbone,
            "method": method,
            "size": list(size_vox),
            "batch": batch_size,
            "precision": precision,
        }
    )


def defaults() -> Constants:
    """Those of the machine that the project is developed on."""
    text = resources.files("logonet.planning").joinpath("constants.json").read_text()
    return replace(config.from_dict(Constants, json.loads(text), "constants.json"), step=None)


def read(uri: str) -> Constants:
    """What ``--probe`` has stored at ``uri``."""
    return config.from_dict(Constants, object_store.read_json(uri), uri)
