"""What Prometheus can fetch of a run, beside Ray's own metrics; `deploy/monitoring` draws it.

Ray exports them with ``ray_logonet_`` before their names, from a cluster of ``ray start``; a Ray of our own has no
agent that would.
"""

from __future__ import annotations

import functools
import threading
import time
from typing import TYPE_CHECKING, Any

from logonet.storage import node_cache

if TYPE_CHECKING:
    from logonet.training.progress import Reading  # data tasks read this file and do without torch

REPEAT_S = 10.0  # Ray forgets a gauge that was not set for 20 s

# name -> what it says, and its labels; counters only go up, and Prometheus adds "_total" to their names.
GAUGES = {
    "step": ("optimizer steps done of the whole run", ("run",)),
    "loss": (
        "mean loss of rank 0's samples over the last seconds; of all samples at an epoch's end",
        ("run",),
    ),
    "samples_per_second": ("samples trained on, by all ranks", ("run",)),
    "remaining_seconds": ("to the end of the last epoch", ("run",)),
    "data_wait_share": ("share of the time that a rank waited for data", ("run", "rank")),
    "queued_bytes": ("prepared samples that wait for a rank", ("run", "rank")),
    "quarantined_scans": ("scans that a stage cannot use", ("stage",)),
}
COUNTERS = {
    "cache_reads": (
        "reads by the data tasks of what the node keeps: a hit or a miss",
        ("result",),
    )
}


@functools.cache
def _metric(name: str) -> Any:
    from ray.util import metrics

    kind, known = (metrics.Gauge, GAUGES) if name in GAUGES else (metrics.Counter, COUNTERS)
    return kind(f"logonet_{name}", *known[name])


_standing: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}  # of this process


def put(name: str, value: float, **labels: str) -> None:
    """Set a gauge, for as long as this process is connected to its Ray."""
    _standing[name, tuple(labels.items())] = value
    _metric(name).set(value, labels)
    _repeating()


@functools.cache
def _repeating() -> None:
    """Repeat all gauges: an epoch's end may take longer than Ray remembers them."""

    def repeat() -> None:
        while True:
            time.sleep(REPEAT_S)
            if ray.is_initialized():
                for (name, labels), value in list(_standing.items()):
                    _metric(name).set(value, dict(labels))

    import ray

    threading.Thread(target=repeat, name="gauges", daemon=True).start()


def training(run: str, rank: int, read: Reading) -> None:
    """Show how training goes."""
    if rank == 0:
        put("step", read.step, run=run)
        put("loss", read.loss, run=run)
        put("samples_per_second", read.samples_per_s, run=run)
        put("remaining_seconds", read.remaining_s, run=run)
    put("data_wait_share", read.data_wait_share, run=run, rank=str(rank))


_told = {"hit": 0, "miss": 0}  # of this process


def cache() -> None:
    """Add what this process has read since the last call."""
    for result, count in node_cache.reads().items():
        if new := count - _told[result]:
            _metric("cache_reads").inc(new, {"result": result})
            _told[result] = count
