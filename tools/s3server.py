"""A real S3 server on loopback, for the demo and the tests: OpenStack Swift in an environment of its own.

Swift is pip-installable, needs no root, survives ``kill -9`` without losing an acknowledged object, and
works with boto3, pyarrow and Ray with no client setting changed. It is not for production: one copy of
everything, no TLS.

What it takes to run it on one machine, each point found the hard way:

- The object updater must run, and the container's timeout be generous: otherwise an object that was
  acknowledged while the container server was busy or killed stays readable but unlisted.
- The updater ignores ``swift_dir``; ``set_swift_dir`` must come first.
- A ring holds its servers' ports, so it is rebuilt at every start; where an object lies depends only on
  the hash prefix and suffix and the part power, which never change.
- Its Python must not see other packages (an old OpenSSL binding breaks eventlet), hence ``python -I``.
"""

from __future__ import annotations

import contextlib
import getpass
import http.client
import os
import random
import re
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType

from logonet.core.errors import UserError

HOST = "127.0.0.1"
REGION = "us-east-1"
BACKENDS = ("object", "container", "account")  # on the three ports after the proxy's
# Below the kernel's ephemeral range (32768 up), so that no outgoing connection takes a port meanwhile.
PORTS = range(20000, 32000, 1 + len(BACKENDS))
PORT_TRIES = 100
START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 10

# Runs first in every child. The kernel kills the child when the thread that started it ends, however that
# comes about; the parent may already be gone by then, hence the second line.
_DIE_WITH_PARENT = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
parent, *sys.argv[1:] = sys.argv[1:]
if os.getppid() != int(parent): sys.exit(1)
"""
_SERVER = """
sys.argv[0] = "swift-{name}-server"
from swift.{package}.server import main
main()
"""
_UPDATER = """
sys.argv[0] = "swift-object-updater"
from swift.common.utils import set_swift_dir
set_swift_dir(os.path.dirname(sys.argv[1]))
from swift.obj.updater import main
main()
"""
_RINGS = """
from swift.common.ring import RingBuilder
folder, ip, *servers = sys.argv[1:]
for server in servers:
    name, port = server.split("=")
    builder = RingBuilder(part_power=4, replicas=1, min_part_hours=1)
    builder.add_dev(dict(id=0, region=1, zone=1, ip=ip, port=int(port), replication_ip=ip,
                         replication_port=int(port), device="d1", weight=1.0, meta=""))
    builder.rebalance()
    builder.get_ring().save(os.path.join(folder, name + ".ring.gz"))
"""

_SWIFT_CONF = """\
[swift-hash]
swift_hash_path_prefix = logonet
swift_hash_path_suffix = logonet
[storage-policy:0]
name = one
default = yes
"""
_COMMON = """\
[DEFAULT]
bind_ip = {host}
bind_port = {port}
swift_dir = {etc}
user = {os_user}
workers = 0
log_level = WARNING
"""
_BACKEND_CONF = (
    _COMMON
    + """\
devices = {devices}
mount_check = false
disable_fallocate = true
recon_cache_path = {cache}
[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
container_update_timeout = 30
[object-updater]
interval = 10
node_timeout = 30
"""
)
_FILTERS = (
    "catch_errors gatekeeper healthcheck listing_formats bulk s3api tempauth "
    "copy slo versioned_writes symlink"
)
_FILTER_OPTIONS = {
    "s3api": "location = {region}\nallow_multipart_uploads = true\n",
    "tempauth": "user_{account}_{name} = {secret} .admin\n",
    "versioned_writes": "allow_object_versioning = true\n",
}
_PROXY_CONF = (
    _COMMON
    + f"[pipeline:main]\npipeline = {_FILTERS} proxy-server\n"
    + "[app:proxy-server]\nuse = egg:swift#proxy\naccount_autocreate = true\nnode_timeout = 30\n"
    + "".join(f"[filter:{f}]\nuse = egg:swift#{f}\n{_FILTER_OPTIONS.get(f, '')}" for f in _FILTERS.split())
)


class S3Server:
    """One S3 server whose data, configuration and logs lie in ``directory``.

    A directory may be served again later: objects, secret and (while it is free) port stay the same.
    ``start`` must be called from a thread that outlives the server, for the server dies with it.

    Args:
        directory: needs a file system with user extended attributes (ext4, xfs, tmpfs).
        port: the first of four consecutive ports; None finds free ones.
        user: the access key, ``account:name``, letters and digits.
        secret: the secret key; None makes a random one and keeps it in ``directory``.

    Raises:
        UserError: from ``start``, when the server's environment is missing or a server does not come up.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        port: int | None = None,
        user: str = "logonet:admin",
        secret: str | None = None,
    ) -> None:
        self.directory = Path(directory).absolute()
        self.user = user
        self._port, self._secret = port, secret
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        if not re.fullmatch(r"[A-Za-z0-9]+:[A-Za-z0-9]+", user):
            raise UserError(f"the S3 user '{user}' must be account:name in letters and digits")
        if secret is not None and not re.fullmatch(r"[\w-]+", secret):
            raise UserError("the S3 secret must consist of letters, digits, '-' and '_'")

    def __enter__(self) -> S3Server:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def port(self) -> int:
        assert self._port is not None, "not started"
        return self._port

    @property
    def endpoint(self) -> str:
        return f"http://{HOST}:{self.port}"

    def env(self) -> dict[str, str]:
        """What a client needs in its environment."""
        assert self._secret is not None, "not started"
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.user,
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
        (self.directory / "etc").chmod(0o700)  # it holds the secret
        _need_xattrs(self.directory)
        self._secret = self._secret or self._kept("secret", lambda: secrets.token_urlsafe(24))
        if self._port is None:
            self._port = int(self._kept("port", lambda: str(free_ports())))
            if not _is_free(self._port):
                self._port = free_ports()
        if not _is_free(
            self._port
        ):  # Swift would wait, and the health check would meet someone else's server
            raise UserError(
                f"ports {self._port} to {self._port + len(BACKENDS)} are not all free; name others"
            )
        (self.directory / "etc" / "port").write_text(str(self._port))
        try:
            self._configure(python)
            etc = self.directory / "etc"
            for name in (*BACKENDS, "proxy"):
                code = _SERVER.format(name=name, package="obj" if name == "object" else name)
                self._spawn(python, name, code, str(etc / f"{name}-server.conf"))
            self._spawn(python, "updater", _UPDATER, str(etc / "object-server.conf"))
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

    def _kept(self, name: str, make: Callable[[], str]) -> str:
        """A value that stays the same from start to start, in a file only its owner reads."""
        path = self.directory / "etc" / name
        if not path.exists():
            path.touch(mode=0o600)
            path.write_text(make())
        return path.read_text().strip()

    def _configure(self, python: str) -> None:
        etc = self.directory / "etc"
        common = {"host": HOST, "etc": etc, "os_user": getpass.getuser()}
        ports = {name: self.port + 1 + i for i, name in enumerate(BACKENDS)}
        (etc / "swift.conf").write_text(_SWIFT_CONF)
        for name, port in ports.items():
            text = _BACKEND_CONF.format(
                **common, name=name, port=port, devices=self.directory / "srv", cache=self.directory / "cache"
            )
            (etc / f"{name}-server.conf").write_text(text)
        account, user = self.user.split(":")
        text = _PROXY_CONF.format(
            **common, port=self.port, region=REGION, account=account, name=user, secret=self._secret
        )
        (etc / "proxy-server.conf").write_text(text)
        rings = self._spawn(python, "rings", _RINGS, str(etc), HOST, *(f"{n}={p}" for n, p in ports.items()))
        if rings.wait(START_TIMEOUT_S):
            raise self._broken("rings")
        del self._children["rings"]

    def _spawn(self, python: str, name: str, code: str, *args: str) -> subprocess.Popen[bytes]:
        with open(self._log(name), "ab") as out:
            self._children[name] = subprocess.Popen(
                [python, "-I", "-c", _DIE_WITH_PARENT + code, str(os.getpid()), *args],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is ours to handle
            )
        return self._children[name]

    def _await_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (all(_answers(self.port + 1 + i) for i in range(len(BACKENDS))) and self._healthy()):
            if name := self.failed():
                raise self._broken(name)
            if time.monotonic() > deadline:
                raise self._broken("proxy")
            time.sleep(0.05)

    def _healthy(self) -> bool:
        # http.client, unlike urllib, never asks an HTTP proxy from the environment
        connection = http.client.HTTPConnection(HOST, self.port, timeout=5)
        try:
            connection.request("GET", "/healthcheck")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def _log(self, name: str) -> Path:
        return self.directory / "log" / f"{name}.log"

    def _broken(self, name: str) -> UserError:
        lines = self._log(name).read_text(errors="replace").strip().splitlines()
        last = lines[-1][:200] if lines else "it said nothing"
        return UserError(f"the S3 server's {name} process failed ({last}); see {self._log(name)}")


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


def free_ports() -> int:
    """The first port of a free block of four.

    Raises:
        UserError: when none is found.
    """
    # The system's randomness, not the project's: two servers started with one seed must not collide.
    for port in random.SystemRandom().sample(PORTS, PORT_TRIES):
        if _is_free(port):
            return port
    raise UserError(f"no four free ports between {PORTS.start} and {PORTS.stop}; name one with --port")


def _is_free(port: int) -> bool:
    for offset in range(1 + len(BACKENDS)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do, past TIME_WAIT
            try:
                probe.bind((HOST, port + offset))
            except OSError:
                return False
    return True


def _answers(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), timeout=5).close()
    except OSError:
        return False
    return True


def _need_xattrs(folder: Path) -> None:
    probe = folder / "xattr-probe"
    probe.touch()
    try:
        os.setxattr(probe, "user.logonet", b"1")
    except OSError:
        raise UserError(
            f"{folder} is on a file system without extended attributes; choose one on ext4, xfs or tmpfs"
        ) from None
    finally:
        probe.unlink()


def serve(
    directory: str, port: int | None = None, user: str = "logonet:admin", secret: str | None = None
) -> None:
    """Run an S3 server in the foreground until Ctrl-C or SIGTERM, printing what clients must export.

    Raises:
        UserError: when it does not start, or one of its processes ends by itself.
    """

    def end(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    with contextlib.suppress(KeyboardInterrupt), S3Server(directory, port, user, secret) as server:
        for name, value in server.env().items():
            print(f"export {name}={value}")
        print(f"# serving {server.directory}; Ctrl-C ends it", flush=True)
        while not (name := server.failed() or ""):
            time.sleep(0.5)
        raise server._broken(name)
