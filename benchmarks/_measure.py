"""What the benchmarks share: on which machine, how many processor seconds, and how much memory."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import threading
import time
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn

from logonet import training

if TYPE_CHECKING:
    from logonet.data import crop_shards, cropping

# For a benchmark that starts Ray and the embedded S3 server. Ray makes its workers yield to all else (niceness 15):
# beside other work, what is compared with them would win. Idle workers are kept, for a run that goes on has no pauses
# in which Ray would end them.
SETTINGS = {
    "RAY_worker_niceness": "0",
    "RAY_num_workers_soft_limit": "8",
    "RAY_idle_worker_killing_time_threshold_ms": "600000",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "NO_PROXY": "127.0.0.1",
    "OMP_NUM_THREADS": "1",  # of tasks; where more are wanted they are set
}


def machine(device: str = "cpu") -> dict[str, Any]:
    """Where and when a benchmark ran."""
    name = platform.processor()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as cpuinfo:
        name = next(
            (line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")), name
        )
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "load": round(os.getloadavg()[0], 2),
    }


def sentence(about: dict[str, Any]) -> str:
    where = "" if about["device"] == "CPU" else f"{about['device']}, "
    return (
        f"{where}{about['cpu']}, {about['threads']} threads of {about['cores']} cores, torch {about['torch']}, "
        f"{about['date']}, load average {about['load']} at the start"
    )


def phantom_crops(
    uri: str, cfg: cropping.Config, scans: int, size_vox: tuple[int, int, int]
) -> crop_shards.CropTable:
    """Crops of a few phantoms, cut in this process and stored under ``uri``."""
    from logonet.data import crop_shards, manifest, phantom, preparing
    from logonet.storage import object_store
    from logonet.storage.parquet import Rows

    phantom.write_dataset(f"{uri}/scans", scans, size_vox=size_vox)
    refs: list[crop_shards.CropRef] = []
    for entry in object_store.listing(f"{uri}/scans/imagesTr"):
        row = manifest.inspect(manifest.Source(entry.uri))
        assert isinstance(row, manifest.Scan), row
        answer = preparing.CutScan(cfg, f"{uri}/crops")((row, 0))
        assert isinstance(answer, list), answer
        refs += answer
    return crop_shards.CropTable(f"{uri}/crops", Rows.of(refs, crop_shards.CropRef), cfg.size_vox, 1)


def adamw(module: nn.Module, fused: bool | None = None) -> torch.optim.AdamW:
    """With a run's default settings."""
    params, cfg = [p for p in module.parameters() if p.requires_grad], training.Config()
    return torch.optim.AdamW(params, lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay, fused=fused)


def one_step(
    method: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, torch.Tensor],
    number: int,
    autocast: Any,
) -> float:
    """A step of one micro-batch with a run's default settings; its loss."""
    cfg = training.Config()
    totals = training.step(
        method,
        optimizer,
        iter([batch]),
        count=1,
        progress=0.0,
        cfg=cfg,
        seeds=[number],
        autocast=autocast,
        sync=lambda params: None,
    )
    total, count = totals["loss"].tolist()
    return total / count


def resident_bytes() -> int:
    return _status("VmRSS")


def peak_bytes() -> int:
    """This process's peak resident memory. Not ru_maxrss: on Linux that starts at what the parent's peak was,
    and it cannot be reset."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Makes `peak_bytes` start again; where the system forbids it, the peak so far stays."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as clear_refs:
        clear_refs.write("5")


def _status(key: str) -> int:
    with open("/proc/self/status") as status:
        (line,) = (line for line in status if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


class OwnMemory:
    """While it is open, samples this process's memory without pages that it shares: ``peak_bytes``."""

    def __init__(self, every_s: float = 0.05) -> None:
        self.every_s, self.peak_bytes = every_s, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> OwnMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, _status("RssAnon"))
            if self._ended.wait(self.every_s):
                return


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table, its first column to the left and the others to the right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class Cores:
    """While it is open, core seconds of this process's children by time, looked at twice a second.

    Processes that ended keep what they were last seen with: Ray's idle workers end at any time.
    """

    def __init__(self) -> None:
        self.seen: dict[psutil.Process, float] = {}
        self.rows: list[tuple[float, float]] = []
        self._looking = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Cores:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(0.5):
            self._look()

    def _look(self) -> None:
        with self._looking:
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):  # it has ended; what it had used is known
                    times = child.cpu_times()
                    self.seen[child] = times.user + times.system
            self.rows.append((time.time(), sum(self.seen.values())))

    def seconds(self, pids: Collection[int] = ()) -> float:
        """Processor seconds so far of this process and all below it (Ray, the S3 server), or of ``pids``."""
        self._look()
        own = psutil.Process().cpu_times()
        seen = [(p.pid, s) for p, s in self.seen.items()] + [(os.getpid(), own.user + own.system)]
        return sum(s for pid, s in seen if not pids or pid in pids)

    def between(self, begin_s: float, end_s: float) -> float:
        """How many cores the children kept busy on average."""
        inside = [row for row in self.rows if begin_s <= row[0] <= end_s]
        (first_s, first), (last_s, last) = inside[0], inside[-1]
        return (last - first) / (last_s - first_s)


class StoreWatch:
    """While it is open, samples how full Ray's object stores are: ``peak_bytes``, ``spilled_bytes``, ``samples``."""

    def __init__(self, every_s: float = 0.5) -> None:
        self.every_s, self.peak_bytes, self.spilled_bytes, self.samples = every_s, 0, 0, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> StoreWatch:
        self._before = self._spilled()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.spilled_bytes = self._spilled() - self._before

    def _watch(self) -> None:
        while not self._ended.wait(self.every_s):
            used = sum(stats.object_store_bytes_used for stats in store_stats())
            self.peak_bytes, self.samples = max(self.peak_bytes, used), self.samples + 1

    @staticmethod
    def _spilled() -> int:
        return sum(stats.spilled_bytes_total for stats in store_stats())


def store_stats() -> list[Any]:
    """What every raylet says of its object store; ``ray memory --stats-only`` prints the same."""
    import ray
    from ray._private.internal_api import node_stats

    nodes = [(n["NodeManagerAddress"], n["NodeManagerPort"]) for n in ray.nodes() if n["Alive"]]
    return [node_stats(host, port, include_memory_info=False).store_stats for host, port in nodes]
