"""The paper's Table 14 on phantoms: a 3 x 3 sweep of M and phi1, stopped early by ASHA, killed in the middle, resumed.

    python tools/demo_sweep.py --dir sweep-run

Types what a user would type, kills that with SIGKILL when a third of the trials has ended, types it again. Checks that
what had ended was not touched, and that no trial is missing.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass

import tyro

from logonet import cli
from logonet.core.errors import UserError
from logonet.data import phantom
from logonet.storage import object_store
from logonet.sweep import outcome, records
from logonet.sweep.records import Trial
from tools.chaos import kill

SPACE = "jobs/spaces/phantoms.yaml"
NAME = "phantoms"
ENDED = ("done", "stopped", "failed")


@dataclass(frozen=True)
class Args:
    """What tools/demo_sweep.py takes.

    Attributes:
        dir: keeps the phantoms, the runs and MLflow's database.
        kill_after: trials that have ended when the first attempt is killed.
        limit_s: for either attempt.
    """

    dir: str = "sweep-run"
    kill_after: int = 3
    limit_s: float = 1200.0


def main(args: Args) -> None:
    folder = os.path.abspath(args.dir)
    root, began = os.path.join(folder, "runs"), time.monotonic()
    sweep = object_store.join(root, "sweep", NAME)
    if object_store.exists(object_store.join(sweep, records.SPEC)):
        raise UserError(f"{sweep} is there already; give another --dir, or delete {args.dir}")
    scans = phantom.write_dataset(os.path.join(folder, "scans"), 18, size_vox=(40, 40, 40))
    command = ["jobs/sweep.py", "--recipe", "demo", "--set", "train.epochs=4"]
    command += ["--space", SPACE, "--data", scans, "--root", root, "--object-store-mb", "300"]
    env = {"OMP_NUM_THREADS": "1", **os.environ, "LOGONET_HOME": os.path.join(folder, "home")}
    print(f"$ python {shlex.join(command)}".replace(folder, args.dir), flush=True)
    first = subprocess.Popen([sys.executable, *command], env=env, start_new_session=True)
    before = wait_for(sweep, args.kill_after, first, args.limit_s)
    kill(first)
    print(f"\n[SIGKILL after {time.monotonic() - began:.0f} s; {len(before)} trials had ended]\n", flush=True)
    print("$ the same again", flush=True)
    subprocess.run([sys.executable, *command], env=env, check=True, timeout=args.limit_s)
    after = {t.index: t for t in records.read_all(sweep)}
    for trial in before:
        assert after[trial.index] == trial, f"trial {trial.index} had ended and was done again"
    assert len(after) == 9, f"{len(after)} trials instead of 9"
    assert all(t.status in ENDED for t in after.values()), outcome.summary(sweep)
    print(f"\n{time.monotonic() - began:.0f} s in all; the pictures are in {args.dir}/runs/sweep/{NAME}")


def ended(sweep: str) -> list[Trial]:
    if not object_store.exists(object_store.join(sweep, records.SPEC)):
        return []
    return [t for t in records.read_all(sweep) if t.status in ENDED]


def wait_for(sweep: str, count: int, process: subprocess.Popen[bytes], limit_s: float) -> list[Trial]:
    """The trials that have ended, as soon as there are ``count``."""
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        if len(found := ended(sweep)) >= count:
            return found
        if process.poll() is not None:
            raise UserError("the sweep ended before it could be killed; its words are above")
        time.sleep(0.2)
    kill(process)
    raise UserError(f"fewer than {count} trials ended within {limit_s:g} s")


if __name__ == "__main__":
    with cli.sentences():
        main(tyro.cli(Args, prog="tools/demo_sweep.py", description=__doc__))
