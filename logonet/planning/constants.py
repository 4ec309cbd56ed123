"""Measured rates and times that a plan rests on: how fast these processors, this store and this network are.

``logonet plan --probe`` measures them on the cluster that will train. `defaults` were measured on the machine that the
project is developed on.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib import resources

from logonet.core import config
from logonet.core.errors import UserError
from logonet.pipelines import Pretraining
from logonet.storage import object_store


@dataclass(frozen=True)
class Constants:
    """Times are in seconds; rates are bytes, voxels or floating point operations per second.

    Attributes:
        machine, date: where and when they were measured.
        device: "cpu" or the GPU's name.
        flop_s: training steps on one core while all cores are busy, or on one GPU.
        serial_share: share of a step's time on one core that more threads do not shorten.
        optimizer_bytes_s: trainable float32 bytes that AdamW updates.
        store_node_bytes_s: reading with all cores of a node.
        store_write_bytes_s: writing in one stream.
        import_voxels_s: one core decompresses, checks and hashes a scan.
        cut_voxels_s: one core decompresses a scan and cuts its crops.
        prepare_bytes_s: one core reads crops, checks them and prepares samples.
        allreduce_latency_s, allreduce_bytes_s: one hop of a ring of workers, and the rate of a worker's link.
        copy_bytes_s: memory to memory.
        kmeans_flop_s: one core fits K-means.
        label_flop_s: one core labels; counted in operations of a brute-force search.
        worker_bytes: memory of a training worker's process before it has a network.
        task_bytes: memory of an idle data task's process.
        start_s: from starting the training workers to their first line of code.
        step_fingerprint: identifies the network, method and batch that ``flop_s`` was measured with.
        worker_peak_bytes: the largest memory of a worker in those steps; on a GPU, of the GPU.
    """

    machine: str
    date: str
    device: str
    flop_s: float
    serial_share: float
    optimizer_bytes_s: float
    store_node_bytes_s: float
    store_write_bytes_s: float
    import_voxels_s: float
    cut_voxels_s: float
    prepare_bytes_s: float
    allreduce_latency_s: float
    allreduce_bytes_s: float
    copy_bytes_s: float
    kmeans_flop_s: float
    label_flop_s: float
    worker_bytes: float
    task_bytes: float
    start_s: float
    step_fingerprint: str = ""
    worker_peak_bytes: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            may_be_0 = name in ("serial_share", "worker_peak_bytes")
            if isinstance(value, float) and (value < 0 or (value == 0 and not may_be_0)):
                raise ValueError(f"{name} is {value}; it must be above 0")

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()


def step_fingerprint(cfg: Pretraining, precision: str) -> str:
    """Identifies everything that a step's time depends on, except the machine."""
    return config.fingerprint(
        {
            "backbone": cfg.backbone,
            "method": cfg.method,
            "size": list(cfg.crops.size_vox),
            "batch": cfg.train.batch_size,
            "precision": precision,
        }
    )


def defaults() -> Constants:
    """Constants of the machine that the project is developed on."""
    text = resources.files("logonet.planning").joinpath("constants.json").read_text()
    return config.from_dict(Constants, json.loads(text), "constants.json")


def read(uri: str) -> Constants:
    """The constants that ``--probe`` stored at ``uri``."""
    try:
        return config.from_dict(Constants, object_store.read_json(uri), uri)
    except UserError as err:
        raise UserError(f"{err}; 'logonet plan --probe 60 --constants {uri}' measures them again") from None
