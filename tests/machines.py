"""Several machines on this one: each has a network, processes and a /tmp of its own, as a container has. Wants root."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from tools.processes import kill

REPO = Path(__file__).parents[1]
NET = "10.77.5"
HERE = f"{NET}.1"  # the address of this machine for the others


class Machine:
    """Commands run in it as root, with the environment ``env`` and little else."""

    def __init__(
        self, name: str, keeper: subprocess.Popen[bytes], address: str, env: Mapping[str, str]
    ) -> None:
        self.name, self.keeper, self.address, self.env = name, keeper, address, dict(env)
        until = time.monotonic() + 20
        while not (inside := psutil.Process(keeper.pid).children()):
            assert time.monotonic() < until, "unshare has started nothing"
            time.sleep(0.05)
        self.pid = inside[0].pid

    def words(self, *command: str) -> list[str]:
        return ["nsenter", "--target", str(self.pid), "--net", "--mount", "--uts", "--pid", "--", *command]

    def run(self, *command: str, limit_s: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
        """A command to its end; stdout and stderr are in ``stdout``."""
        streams: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.run(
            self.words(*command), env=self.env | env, cwd=REPO, timeout=limit_s, check=False, **streams
        )

    def start(self, log: Path, *command: str) -> None:
        """A command that goes on until the machine goes."""
        with open(log, "ab") as out:
            subprocess.Popen(self.words(*command), env=self.env, cwd=REPO, stdout=out, stderr=out)


@contextlib.contextmanager
def machines(count: int, env: Mapping[str, str]) -> Iterator[list[Machine]]:
    """Machines with the addresses NET.10, NET.11..., which reach each other and `HERE`, and nothing else."""
    if os.geteuid() != 0:
        pytest.skip("machines of their own want root, for network namespaces")
    names = [f"lgn{i}" for i in range(count)]

    def ip(*words: str, check: bool = True) -> None:
        subprocess.run(["ip", *words], check=check, capture_output=not check)

    def clear() -> None:
        for name in names:
            ip("netns", "delete", name, check=False)
        ip("link", "delete", "lgnbr", check=False)

    made: list[Machine] = []
    clear()  # of a test that was killed
    try:
        ip("link", "add", "lgnbr", "type", "bridge")
        ip("address", "add", f"{HERE}/24", "dev", "lgnbr")
        ip("link", "set", "lgnbr", "up")
        for i, name in enumerate(names):
            address = f"{NET}.{10 + i}"
            ip("netns", "add", name)
            ip("link", "add", f"{name}v", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"{name}v", "master", "lgnbr", "up")
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
            words = ["ip", "netns", "exec", name, "unshare", "--mount", "--uts", "--pid", "--fork"]
            words += ["--mount-proc", "--kill-child", "sh", "-c"]
            words += [f"hostname {name} && mount -t tmpfs tmpfs /tmp && exec sleep infinity"]
            made.append(Machine(name, subprocess.Popen(words), address, env))
        yield made
    finally:
        for machine in made:
            kill(machine.keeper, patience_s=2)  # and with its first process all others of it
        clear()
