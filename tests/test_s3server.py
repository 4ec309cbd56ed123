"""The embedded S3 server keeps what it acknowledged, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from logonet.core.errors import UserError
from logonet.storage import object_store
from tools import s3server
from tools.s3server import S3Server


@pytest.fixture
def own_server(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """A server to be mistreated; not started. (``s3_server`` skips where the environment is missing.)"""
    return S3Server(tmp_path / "data")


def use(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.env().items():
        monkeypatch.setenv(name, value)


@pytest.mark.slow
def test_it_survives_kill_9_with_all_it_acknowledged(
    own_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with own_server as server:
        use(server, monkeypatch)
        before, pids = server.env(), set(server.pids.values())
        object_store.create_bucket("s3://kept")
        names = [f"s3://kept/{n:02d}" for n in range(20)]
        stored = [object_store.write(name, name.encode() * 1000) for name in names]
        server.kill()
        assert not any(psutil.pid_exists(pid) for pid in pids)
        server.start()
        assert server.env() == before
        for name, want in zip(names, stored):
            assert (
                object_store.read(name, size_bytes=want.size_bytes, sha256=want.sha256)
                == name.encode() * 1000
            )


@pytest.mark.slow
def test_a_directory_may_move_to_other_ports(own_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with own_server as server:
        use(server, monkeypatch)
        object_store.create_bucket("s3://kept")
        object_store.write("s3://kept/x", b"data")
        old = server.port
    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        squatter.bind(("127.0.0.1", old + 2))
        squatter.listen()
        with S3Server(own_server.directory) as moved:
            use(moved, monkeypatch)
            assert moved.port != old
            assert object_store.read("s3://kept/x") == b"data"
            assert [e.uri for e in object_store.listing("s3://kept")] == ["s3://kept/x"]


def test_stopping_ends_every_process(own_server: S3Server) -> None:
    with own_server as server:
        pids = server.pids
        assert set(pids) == {"object", "container", "account", "proxy", "updater"}
        assert all(psutil.pid_exists(pid) for pid in pids.values())
        assert server.failed() is None
        listening = {
            c.laddr
            for pid in pids.values()
            for c in psutil.Process(pid).net_connections("tcp")
            if c.status == "LISTEN"
        }
        assert listening == {("127.0.0.1", server.port + n) for n in range(4)}
        assert server.port + 3 < 32768
        os.kill(pids["proxy"], signal.SIGKILL)
        psutil.wait_procs([psutil.Process(pids["proxy"])])
        assert server.failed() == "proxy"
    assert server.pids == {}
    assert not any(psutil.pid_exists(pid) for pid in pids.values())


def _serve(directory: Path) -> tuple[subprocess.Popen[str], dict[str, str], list[psutil.Process]]:
    # A shell that runs the tests in the background has them, and what they start, ignore Ctrl-C.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from tools import s3server; s3server.serve(sys.argv[1])"
    words = [sys.executable, "-c", code, str(directory)]
    parent = subprocess.Popen(words, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    printed = {}
    while (line := parent.stdout.readline()).startswith("export "):
        name, _, value = line.removeprefix("export ").strip().partition("=")
        printed[name] = value
    return parent, printed, psutil.Process(parent.pid).children(recursive=True)


@pytest.mark.parametrize(
    "how",
    [signal.SIGKILL, *(pytest.param(how, marks=pytest.mark.slow) for how in (signal.SIGTERM, signal.SIGINT))],
)
def test_no_process_outlives_the_one_that_serves(
    own_server: S3Server, monkeypatch: pytest.MonkeyPatch, how: signal.Signals
) -> None:
    parent, printed, children = _serve(own_server.directory)
    try:
        for name, value in printed.items():
            monkeypatch.setenv(name, value)
        object_store.create_bucket("s3://made-by-print")
        assert len(psutil.Process(parent.pid).children()) == 5  # the updater's passing fork is not among them
    finally:
        parent.send_signal(how)
        try:
            status = parent.wait(timeout=60)
        finally:
            parent.kill()
            assert parent.stdout is not None
            parent.stdout.close()
    assert status == (-signal.SIGKILL if how == signal.SIGKILL else 0)
    _, alive = psutil.wait_procs(children, timeout=30)
    for orphan in alive:
        orphan.kill()
    assert alive == []


def test_secrets_are_random_kept_and_private(s3_server: S3Server) -> None:
    secret = s3_server.env()["AWS_SECRET_ACCESS_KEY"]
    etc = s3_server.directory / "etc"
    assert etc.stat().st_mode & 0o077 == 0
    assert (etc / "secret").stat().st_mode & 0o077 == 0
    shown = [" ".join(psutil.Process(pid).cmdline()) for pid in s3_server.pids.values()]
    assert not any(secret in line for line in shown)
    assert len(secret) >= 24


def test_a_taken_port_is_a_sentence(s3_server: S3Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"ports {s3_server.port} to .* are not all free"):
        S3Server(tmp_path, port=s3_server.port).start()


def test_a_process_that_fails_is_named_with_its_log(
    own_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "process.py"
    broken.write_text("raise OSError('no such luck')")
    monkeypatch.setattr(s3server, "PROCESS", broken)
    with pytest.raises(UserError, match=r"rings process failed \(OSError: no such luck\); see .*rings\.log"):
        own_server.start()
    assert own_server.pids == {}


def test_a_missing_environment_says_make_setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGONET_STORE_PYTHON", str(tmp_path / "none"))
    with pytest.raises(UserError, match="make setup"):
        S3Server(tmp_path).start()
    monkeypatch.delenv("LOGONET_STORE_PYTHON")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(s3server, "__file__", str(tmp_path / "a" / "b.py"))
    with pytest.raises(UserError, match="make setup"):
        S3Server(tmp_path).start()
