"""A real S3 server on loopback, for the demo and the tests: OpenStack Swift in an environment of its own.

Swift is pip-installable, needs no root, survives ``kill -9`` without losing an acknowledged object, and works with
boto3, pyarrow and Ray without any client setting. It is not for production: one copy of everything, no TLS.

What it takes to run it on one machine (``tools/swift/`` has the configuration and the processes):

- The object updater must run, and the container's timeout must be generous: otherwise an object that was acknowledged
  while the container server was busy or killed stays readable but unlisted.
- A ring holds its servers' ports, so it is rebuilt at every start. Where an object lies depends only on the hash prefix
  and suffix and the part power, which never change.
- Its Python must not see other packages (an old OpenSSL binding breaks eventlet), hence ``python -I``.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from logonet.core.errors import UserError
from tools.processes import are_free, free_ports, launch

HOST = "127.0.0.1"
REGION = "us-east-1"
ACCOUNT, USER = "logonet", "admin"  # together the access key
BACKENDS = ("object", "container", "account")  # on the three ports after the proxy's
START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 10
SWIFT = Path(__file__).with_name("swift")
PROCESS = SWIFT / "process.py"


class S3Server:
    """One S3 server whose data, configuration and logs lie in ``directory``.

    A directory may be served again later: objects, secret and (while it is free) port stay the same. ``start`` must be
    called from a thread that outlives the server, because the server dies with it.

    Args:
        directory: needs a file system with user extended attributes (ext4, xfs, tmpfs).
        port: the first of four consecutive ports; None finds free ones.

    Raises:
        UserError: from ``start``, when the server's environment is missing or a server does not come up.
    """

    def __init__(self, directory: str | os.PathLike[str], port: int | None = None) -> None:
        self.directory = Path(directory).absolute()
        self.port, self._secret = port or 0, ""
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> S3Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        return f"http://{HOST}:{self.port}"

    def env(self) -> dict[str, str]:
        """What a client needs in its environment."""
        assert self._secret, "not started"
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": f"{ACCOUNT}:{USER}",
            "AWS_SECRET_ACCESS_KEY": self._secret,
            "AWS_DEFAULT_REGION": REGION,
        }

    @property
    def pids(self) -> dict[str, int]:
        """The processes of this server by their role."""
        return {name: child.pid for name, child in self._children.items()}

    def start(self) -> None:
        assert not self._children, "already started"
        python = store_python()
        for name in ("etc", "srv/d1", "cache", "log"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        etc = self.directory / "etc"
        etc.chmod(0o700)  # it holds the secret
        try:
            os.setxattr(self.directory, "user.logonet", b"1")
        except OSError:
            raise UserError(
                f"{self.directory} is on a file system without extended attributes; choose ext4, xfs or tmpfs"
            ) from None
        self._secret = self._kept("secret", lambda: secrets.token_urlsafe(24))
        if not self.port:
            self.port = int(self._kept("port", lambda: str(free_ports(HOST))))
            if not are_free(HOST, self.port):
                self.port = free_ports(HOST)
        # Swift would wait, and the check of its health would meet another server.
        if not are_free(HOST, self.port):
            last = self.port + len(BACKENDS)
            raise UserError(f"ports {self.port} to {last} are not all free; name others")
        (etc / "port").write_text(str(self.port))
        try:
            self._configure(python)
            for name in (*BACKENDS, "proxy"):
                self._spawn(python, name, str(etc / f"{name}-server.conf"))
            self._spawn(python, "updater", str(etc / "object-server.conf"))
            self._await_ready()
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """End the server in order; what was acknowledged is on disk."""
        for child in self._children.values():
            child.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for child in self._children.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """End the server as a power cut would: SIGKILL to every process. It may be started again."""
        for child in self._children.values():
            child.kill()
        for child in self._children.values():
            child.wait()
        self._children.clear()

    def failed(self) -> str | None:
        """The name of a process that has ended by itself, or None while all is well."""
        return next((name for name, child in self._children.items() if child.poll() is not None), None)

    def broken(self, name: str) -> UserError:
        log = self.directory / "log" / f"{name}.log"
        last = (log.read_text(errors="replace").strip() or "it said nothing").splitlines()[-1]
        return UserError(f"the S3 server's {name} process failed ({last[:200]}); see {log}")

    def _kept(self, name: str, make: Callable[[], str]) -> str:
        """A value that stays the same from start to start, in a file that only its owner reads."""
        path = self.directory / "etc" / name
        if not path.exists():
            path.touch(mode=0o600)
            path.write_text(make())
        return path.read_text().strip()

    def _configure(self, python: str) -> None:
        ports = {name: self.port + 1 + i for i, name in enumerate(BACKENDS)}
        self._write("swift.conf", "swift.conf")
        for name, port in ports.items():
            folders = {"devices": self.directory / "srv", "cache": self.directory / "cache"}
            self._write("backend.conf", f"{name}-server.conf", name=name, port=port, **folders)
        user = {"region": REGION, "account": ACCOUNT, "user": USER, "secret": self._secret}
        self._write("proxy.conf", "proxy-server.conf", port=self.port, **user)
        etc, servers = str(self.directory / "etc"), (f"{name}={port}" for name, port in ports.items())
        if self._spawn(python, "rings", etc, HOST, *servers).wait(START_TIMEOUT_S):
            raise self.broken("rings")
        del self._children["rings"]

    def _write(self, template: str, to: str, **values: Any) -> None:
        etc = self.directory / "etc"
        text = (SWIFT / template).read_text().format(host=HOST, etc=etc, os_user=getpass.getuser(), **values)
        (etc / to).write_text(text)

    def _spawn(self, python: str, name: str, *args: str) -> subprocess.Popen[bytes]:
        words = [python, "-I", str(PROCESS), str(os.getpid()), name, *args]
        self._children[name] = child = launch(words, str(self.directory / "log" / f"{name}.log"))
        return child

    def _await_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._ready():
            if (name := self.failed()) or time.monotonic() > deadline:
                raise self.broken(name or "proxy")
            time.sleep(0.05)

    def _ready(self) -> bool:
        no_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            for offset in range(1, 1 + len(BACKENDS)):
                socket.create_connection((HOST, self.port + offset), timeout=5).close()
            with no_proxy.open(f"{self.endpoint}/healthcheck", timeout=5) as reply:
                return reply.status == 200
        except OSError:
            return False


def store_python() -> str:
    """The interpreter of the environment that Swift is installed in.

    Raises:
        UserError: when there is none.
    """
    if named := os.environ.get("LOGONET_STORE_PYTHON"):
        if os.access(named, os.X_OK):
            return named
        raise UserError(
            f"LOGONET_STORE_PYTHON names {named}, which cannot be run; correct it or run 'make setup'"
        )
    for folder in (Path.cwd(), Path(__file__).parents[1]):
        python = folder / ".venv-store" / "bin" / "python"
        if python.exists():
            return str(python)
    raise UserError(
        "the S3 server is not installed in .venv-store; run 'make setup' or set LOGONET_STORE_PYTHON"
    )


def serve(directory: str, port: int | None = None) -> None:
    """Run an S3 server in the foreground until Ctrl-C or SIGTERM, and print what clients must export.

    Raises:
        UserError: when it does not start, or one of its processes ends by itself.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), S3Server(directory, port) as server:
        for name, value in server.env().items():
            print(f"export {name}={value}")
        print(f"# serving {server.directory}; Ctrl-C ends it", flush=True)
        while not (failed := server.failed()):
            time.sleep(0.5)
        raise server.broken(failed)
