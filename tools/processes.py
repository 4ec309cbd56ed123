"""Processes and ports of the servers that the demo, the drills and the tests start."""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
from collections.abc import Sequence
from typing import Any

import psutil

from logonet.core.errors import UserError

BLOCK = 4  # an S3 server takes so many
# Below the kernel's ephemeral range (32768 up), so that no outgoing connection takes a port meanwhile.
PORTS = range(20000, 32000, BLOCK)
PORT_TRIES = 100


def launch(command: Sequence[str], log: str, **options: Any) -> subprocess.Popen[bytes]:
    """A process in a group of its own, so that a Ctrl-C is ours to handle; its output is appended to ``log``."""
    with open(log, "ab") as out:
        options |= {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out, "start_new_session": True}
        return subprocess.Popen(command, **options)


def kill(process: subprocess.Popen[bytes], patience_s: float = 20.0) -> None:
    """SIGKILL the process, then, by pid, whatever of its own outlives it by ``patience_s``."""
    children: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=patience_s)
    for child in alive:
        child.kill()
    psutil.wait_procs(alive, timeout=20)


def free_ports(host: str = "127.0.0.1") -> int:
    """The first port of a block of four that are free on ``host``.

    Raises:
        UserError: when none is found.
    """
    # The system's randomness, not the project's: two servers started with one seed must not collide.
    for port in random.SystemRandom().sample(PORTS, PORT_TRIES):
        if are_free(host, port):
            return port
    raise UserError(f"no four free ports between {PORTS.start} and {PORTS.stop}; name one with --port")


def are_free(host: str, port: int) -> bool:
    """Whether a server may listen at each port of the block from ``port`` on."""
    try:
        for offset in range(BLOCK):
            socket.create_server((host, port + offset)).close()  # past TIME_WAIT, as the servers do
    except OSError:
        return False
    return True
