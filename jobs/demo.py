"""The whole of it on one machine, in minutes: phantoms in a real S3 server -> manifest -> crops -> clusterers ->
pretraining on 2 workers -> where to look. ``make demo`` runs it; running it again returns at once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass

import tyro

from logonet import cli, phantom, store
from logonet.errors import UserError
from logonet.s3server import S3Server


@dataclass(frozen=True)
class Args:
    """Settings of the demo.

    Attributes:
        dir: keeps the S3 server's data, the MLflow database and the log.
        scans: synthetic scans to make.
        workers: training workers.
    """

    dir: str = "demo-run"
    scans: int = 12
    workers: int = 2


def main(args: Args) -> None:
    started = time.monotonic()
    folder = os.path.abspath(args.dir)
    os.makedirs(folder, exist_ok=True)
    with S3Server(os.path.join(folder, "s3")) as server:
        env = server.env()
        os.environ.update(env)
        bucket = "s3://demo"
        store.create_bucket(bucket)
        if not store.exists(f"{bucket}/scans/dataset.json"):
            phantom.write_dataset(f"{bucket}/scans", args.scans, size_vox=(48, 48, 48))
        print(f"S3 server   {server.endpoint} with {args.scans} synthetic CTs in {bucket}/scans", flush=True)
        command = [sys.executable, "jobs/pretrain.py", "--recipe", "demo", "--workers", str(args.workers)]
        command += ["--data", f"{bucket}/scans/", "--root", f"{bucket}/runs", "--object-store-mb", "500"]
        print(f"$ {' '.join(['python', *command[1:]])}", flush=True)
        # Its own MLflow, unless the user has one.
        inner = {**os.environ, "LOGONET_HOME": os.environ.get("LOGONET_HOME", folder)}
        subprocess.run(
            command, check=True, env=inner, cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        )
        run = newest_run(f"{bucket}/runs/pretrain")
        history = store.read_json(f"{run}/history.json")
        local = os.path.join(folder, "report.html")
        for name in ("report.html", "history.json", "masked_chain.png", "clusters.png", "curves.png"):
            store.read_to_file(f"{run}/{name}", os.path.join(folder, name))
    first, last = history[0], history[-1]
    print(f"\nloss {first['loss']:.3f} -> {last['loss']:.3f} over {len(history)} epochs")
    print(
        f"masked accuracy {last['accuracy']:.3f}, of which a majority guess gets {last['accuracy_floor']:.3f}"
    )
    print(f"report      {local}")
    home = inner["LOGONET_HOME"]
    print(
        f"MLflow      {os.path.dirname(sys.executable)}/mlflow ui --backend-store-uri sqlite:///{home}/mlflow.db"
    )
    print(f"S3 data     logonet s3 serve --dir {os.path.join(folder, 's3')}   (then {run})")
    print(f"took        {time.monotonic() - started:.0f} s")
    if not (last["loss"] < first["loss"] and last["accuracy"] > last["accuracy_floor"]):
        raise UserError(
            "the demo's loss did not fall or its accuracy stayed at the floor; please report this"
        )


def newest_run(prefix: str) -> str:
    """The pretraining run whose manifest is newest."""
    runs = {e.uri.rsplit("/", 1)[0]: e for e in store.listing(prefix) if e.uri.endswith("/manifest.json")}
    runs = {uri: e for uri, e in runs.items() if "/checkpoints/" not in uri}
    return max(runs, key=lambda uri: store.read_json(f"{uri}/manifest.json")["created_at"])


if __name__ == "__main__":
    with cli.sentences():
        main(tyro.cli(Args, prog="jobs/demo.py", description=__doc__))
