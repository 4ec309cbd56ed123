"""What the benchmarks of whole networks share: on which machine, and how much memory."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
from typing import Any

import torch


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


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table, its first column to the left and the others to the right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
