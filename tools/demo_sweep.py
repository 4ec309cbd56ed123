"""The paper's Table 14 on phantoms: a 3 x 3 sweep of M and phi1, stopped early by ASHA, killed in the middle, resumed.

    python -m tools.demo_sweep --dir sweep-run

Types what a user would type, kills that with SIGKILL when a third of the trials has ended, types it again. Checks that
what had ended was not touched, and that no trial is missing.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time

import tyro

from logonet import cli
from logonet.core.errors import UserError
from logonet.data import phantom
from logonet.storage import object_store
from logonet.sweep import outcome, records
from logonet.sweep.records import Trial
from tools.processes import kill

SPACE = "jobs/spaces/phantoms.yaml"
NAME = "phantoms"
ENDED = ("done", "stopped", "failed")


def main(dir: str = "sweep-run", kill_after: int = 3, limit_s: float = 1200.0) -> None:
    """Run a 3 x 3 sweep on phantoms, kill it in the middle with SIGKILL, and resume it.

    Args:
        dir: keeps the phantoms, the runs and MLflow's database.
        kill_after: trials that have ended when the first attempt is killed.
        limit_s: for either attempt.
    """
    folder = os.path.abspath(dir)
    root, began = os.path.join(folder, "runs"), time.monotonic()
    sweep = object_store.join(root, "sweep", NAME)
    spec = object_store.join(sweep, records.SPEC)
    if object_store.exists(spec):
        raise UserError(f"{sweep} is there already; give another --dir, or delete {dir}")
    scans = phantom.write_dataset(os.path.join(folder, "scans"), 18, size_vox=(40, 40, 40))
    command = ["jobs/sweep.py", "--recipe", "demo", "--set", "train.epochs=4"]
    command += ["--space", SPACE, "--data", scans, "--root", root, "--object-store-mb", "300"]
    env = {"OMP_NUM_THREADS": "1", **os.environ, "LOGONET_HOME": os.path.join(folder, "home")}
    print(f"$ python {shlex.join(command)}".replace(folder, dir), flush=True)

    before: list[Trial] = []
    first = subprocess.Popen([sys.executable, *command], env=env, start_new_session=True)
    try:
        while len(before) < kill_after:
            if first.poll() is not None or time.monotonic() > began + limit_s:
                raise UserError(f"{kill_after} trials were to end within {limit_s:g} s; {len(before)} did")
            time.sleep(0.05)
            if object_store.exists(spec):
                before = [t for t in records.read_all(sweep) if t.status in ENDED]
    finally:
        kill(first)
    print(f"\n[SIGKILL after {time.monotonic() - began:.0f} s; {len(before)} trials had ended]\n", flush=True)
    print("$ the same again", flush=True)
    subprocess.run([sys.executable, *command], env=env, check=True, timeout=limit_s)
    after = {t.index: t for t in records.read_all(sweep)}
    for trial in before:
        assert after[trial.index] == trial, f"trial {trial.index} had ended and was done again"
    assert len(after) == 9, f"{len(after)} trials instead of 9"
    assert all(t.status in ENDED for t in after.values()), outcome.summary(sweep)
    print(f"\n{time.monotonic() - began:.0f} s in all; the pictures are in {dir}/runs/sweep/{NAME}")


if __name__ == "__main__":
    with cli.sentences():
        tyro.cli(main, prog="tools/demo_sweep.py")
