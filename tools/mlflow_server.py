"""A real MLflow server on SQLite, for the drills and the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from tools.processes import free_ports, kill, launch


class MLflowServer:
    """A server whose database, artifacts and log lie in ``folder``; as a context it is started, and killed at the end.

    Args:
        host: the address that it listens at, and the only one that it may be asked by.
    """

    process: subprocess.Popen[bytes]

    def __init__(self, folder: str, host: str = "127.0.0.1") -> None:
        port = free_ports(host)
        self.uri, self.log = f"http://{host}:{port}", os.path.join(folder, "mlflow.log")
        self.command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port)]
        self.command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
        self.command += ["--artifacts-destination", os.path.join(folder, "mlflow-artifacts")]
        self.command += ["--allowed-hosts", f"{host}:{port}"]

    def start(self) -> None:
        """Without waiting: tracking must bear that."""
        # Its own worker processes, for jobs that nobody gives it, cost a gigabyte.
        env = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        self.process = launch(self.command, self.log, env={**os.environ, **env})

    def kill(self) -> int:
        """SIGKILL; its pid."""
        kill(self.process, patience_s=0)  # its own processes never end by themselves
        return self.process.pid

    def __enter__(self) -> MLflowServer:
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.kill()
