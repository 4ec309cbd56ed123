"""A run beside another Ray on the same machine, as on a shared workstation."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from logonet.data import phantom
from tools.processes import free_ports

REPO = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_knows_its_own_ray(tmp_path: Path) -> None:
    phantom.write_dataset(str(tmp_path / "scans"), 4, size_vox=(40, 40, 40))
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "LOGONET_HOME": str(tmp_path / "home")}
    port = free_ports()
    command = [f"{BIN}/ray", "start", "--head", "--block", "--num-cpus", "1", "--port", str(port)]
    command += ["--include-dashboard", "false", "--object-store-memory", str(100 << 20)]
    log = tmp_path / "head.log"
    with open(log, "wb") as out:
        head = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        until = time.monotonic() + 90
        while "started" not in log.read_text():
            assert time.monotonic() < until and head.poll() is None, log.read_text()[-3000:]
            time.sleep(1)
        settings = ["clusterers.n=2", "clusterers.iterations=2", "train.epochs=1", "split=null"]
        job = [sys.executable, "jobs/pretrain.py", "--recipe", "demo", "--workers", "2"]
        job += [
            "--object-store-mb",
            "200",
            "--data",
            str(tmp_path / "scans"),
            "--root",
            str(tmp_path / "runs"),
        ]
        job += [word for setting in settings for word in ("--set", setting)]
        done = subprocess.run(job, cwd=REPO, env=env, capture_output=True, text=True)
        said = done.stdout + done.stderr
        assert done.returncode == 0, said[-3000:]
        assert head.poll() is None  # the other goes on
        assert "Traceback" not in said
        assert "multiple active Ray instances" not in said
        assert "constructor arguments" not in said
    finally:
        head.send_signal(signal.SIGTERM)  # with --block it stops what it started
        head.wait(timeout=60)
