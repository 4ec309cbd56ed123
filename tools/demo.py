"""The whole pipeline on one machine, in minutes.

Phantoms in a real S3 server -> pretraining on 2 workers -> finetuning -> evaluation -> model registry -> label maps of
a bucket -> one HTML page. ``make demo`` runs it; run again, it returns at once. All commands run in this process and
share one local Ray, so that Ray starts and everything is imported only once.
"""

from __future__ import annotations

import html
import io
import os
import runpy
import shlex
import sys
import time
from typing import Any

import pandas as pd
import tyro

from logonet import cli, reporting
from logonet.core.errors import UserError
from logonet.data import phantom
from logonet.distributed import cluster
from logonet.distributed.cluster import Resources
from logonet.storage import artifacts, object_store
from logonet.storage.artifacts import Artifact
from tools.s3server import S3Server

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUCKET = "s3://demo"
OBJECT_STORE_MB = 500
NEW_SCANS = 4


class Shell:
    """Runs the commands a user would type, in this process, and remembers them."""

    def __init__(self) -> None:
        self.typed: list[str] = []

    def run(self, line: str) -> None:
        self.typed.append(line)
        print(f"\n$ {line}", flush=True)
        sys.argv = shlex.split(line.removeprefix("python "))
        if line.startswith("python "):
            runpy.run_path(os.path.join(REPOSITORY, sys.argv[0]), run_name="__main__")
        else:
            cli.main()


def main(dir: str = "demo-run", scans: int = 18, workers: int = 2) -> None:
    """Run the whole pipeline, from phantoms to label maps, on this machine.

    Args:
        dir: keeps the S3 server's data, the MLflow database and the page.
        scans: synthetic scans to learn from.
        workers: training workers.
    """
    started = time.monotonic()
    folder = os.path.abspath(dir)
    os.makedirs(folder, exist_ok=True)
    with S3Server(os.path.join(folder, "s3")) as server:
        os.environ.update(server.env())
        # MLflow's database; the user's own if there is one.
        home = os.environ.setdefault("LOGONET_HOME", folder)
        object_store.create_bucket(BUCKET)
        for place, count, seed in (("scans", scans, 0), ("new", NEW_SCANS, 1)):
            if not object_store.exists(f"{BUCKET}/{place}/dataset.json"):
                # Liver and spleen: telling right kidney from left takes more steps than a demo has.
                phantom.write_dataset(f"{BUCKET}/{place}", count, seed=seed, size_vox=(48, 48, 48), classes=3)
        print(f"S3 server   {server.endpoint} with {scans} synthetic CTs in {BUCKET}/scans", flush=True)
        shell = Shell()
        with cluster.connected(Resources(workers=workers, object_store_mb=OBJECT_STORE_MB)):
            made = stages(shell, workers)
        history = object_store.read_json(made["pretrain"].uri_of("history.json"))
        local = os.path.join(folder, "index.html")
        object_store.write(local, the_page(made, shell.typed).encode())
        for name in ("history.json", "masked_chain.png", "clusters.png", "curves.png"):
            object_store.write(os.path.join(folder, name), made["pretrain"].read(name))
        for name in ("organs.png", "cases.png"):
            object_store.write(os.path.join(folder, name), made["evaluation"].read(name))
    first, last, scores = history[0], history[-1], made["evaluation"].facts
    mlflow = os.path.join(os.path.dirname(sys.executable), "mlflow")
    print(f"""
pretraining loss {first["loss"]:.3f} -> {last["loss"]:.3f} over {len(history)} epochs
masked accuracy  {last["accuracy"]:.3f}; always guessing the most frequent label scores {last["accuracy_floor"]:.3f}
test Dice        {scores["dice"]:.3f} on {scores["cases"]} cases that neither training nor pretraining saw
page        {local}
MLflow      {mlflow} ui --backend-store-uri sqlite:///{home}/mlflow.db
S3 data     logonet s3 serve --dir {os.path.join(folder, "s3")}""")
    for uri in (*(artifact.uri for artifact in made.values()), f"{BUCKET}/segmented/predictions.csv"):
        print(f"            {uri}")
    print(f"took        {time.monotonic() - started:.0f} s")
    if last["loss"] >= first["loss"] or last["accuracy"] <= last["accuracy_floor"] or scores["dice"] <= 0.5:
        raise UserError(
            "the demo's loss did not fall, its accuracy stayed at the floor or its Dice below 0.5; please report this"
        )


def stages(shell: Shell, workers: int) -> dict[str, Artifact]:
    """Every stage from scans to label maps; the artifacts by stage."""
    resources = f"--workers {workers} --object-store-mb {OBJECT_STORE_MB}"
    recipe = f"--recipe demo --data {BUCKET}/scans/ --root {BUCKET}/runs {resources}"
    shell.run(f"python jobs/pretrain.py {recipe}")
    made = {"pretrain": newest("pretrain")}
    shell.run(f"python jobs/finetune.py {recipe} --init {made['pretrain'].uri}")
    made["finetune"] = newest("finetune")
    shell.run(f"python jobs/evaluate.py --model {made['finetune'].uri} --root {BUCKET}/runs {resources}")
    made["evaluation"] = newest("evaluation")
    shell.run(f"logonet register {made['evaluation'].uri} --task phantom --alias champion")
    scans = f"--input {BUCKET}/new/imagesTr/ --output {BUCKET}/segmented/"
    shell.run(f"python jobs/predict.py --model models:/logonet-seg-phantom@champion {scans} {resources}")
    return made


def newest(stage: str) -> Artifact:
    """The artifact of ``stage`` that was finished last."""
    uris = [entry.uri for entry in object_store.listing(f"{BUCKET}/runs/{stage}")]
    found = [artifacts.find(os.path.dirname(uri)) for uri in uris if uri.endswith(artifacts.MANIFEST)]
    return max((a for a in found if a and a.stage == stage), key=lambda artifact: artifact.created_at)


def the_page(made: dict[str, Artifact], typed: list[str]) -> str:
    """Everything on one page."""
    predictions = pd.read_csv(io.BytesIO(object_store.read(f"{BUCKET}/segmented/predictions.csv")))
    places = "".join(f"<p><b>{stage}</b> <code>{html.escape(a.uri)}</code></p>" for stage, a in made.items())
    sections: list[tuple[str, Any]] = [
        ("What was typed", f"<pre>{html.escape(chr(10).join(typed))}</pre>"),
        ("Pretraining: masked chains of slices", made["pretrain"].read("masked_chain.png")),
        ("Pretraining: curves", made["pretrain"].read("curves.png")),
        ("Finetuning: curves", made["finetune"].read("curves.png")),
        ("Test cases: per organ", made["evaluation"].read("organs.png")),
        ("Test cases: worst, median and best", made["evaluation"].read("cases.png")),
        ("New scans, segmented", predictions.drop(columns=["uri", "sha256", "reason", "output"])),
        ("Where everything is", places),
    ]
    return reporting.run_page("logonet: from a bucket of scans to label maps", sections)


if __name__ == "__main__":
    with cli.sentences():
        tyro.cli(main, prog="tools/demo.py")
