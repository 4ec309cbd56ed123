"""The whole of it on one machine, in minutes: phantoms in a real S3 server -> pretraining on 2 workers -> finetuning ->
evaluation -> model registry -> label maps of a bucket -> one HTML page. ``make demo`` runs it; again, it returns
at once.
"""

from __future__ import annotations

import html
import io
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import tyro

from logonet import cli, reporting
from logonet.core.errors import UserError
from logonet.data import phantom
from logonet.storage import artifacts, object_store
from logonet.storage.artifacts import Artifact
from tools.s3server import S3Server

BUCKET = "s3://demo"
NEW_SCANS = 4


@dataclass(frozen=True)
class Args:
    """Settings of the demo.

    Attributes:
        dir: keeps the S3 server's data, the MLflow database and the page.
        scans: synthetic scans to learn from.
        workers: training workers.
    """

    dir: str = "demo-run"
    scans: int = 18
    workers: int = 2


@dataclass
class Shell:
    """Runs the commands a user would type, and remembers them."""

    env: dict[str, str]
    typed: list[str] = field(default_factory=list)

    def run(self, *words: str) -> None:
        shown = " ".join(["python", *words]) if words[0].endswith(".py") else " ".join(words)
        self.typed.append(shown)
        print(f"\n$ {shown}", flush=True)
        program = [sys.executable] if words[0].endswith(".py") else []
        tool = [] if program else [os.path.join(os.path.dirname(sys.executable), words[0])]
        subprocess.run(
            [*program, *tool, *(words if program else words[1:])], check=True, env=self.env, cwd=repository()
        )


def repository() -> str:
    return os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def main(args: Args) -> None:
    started = time.monotonic()
    folder = os.path.abspath(args.dir)
    os.makedirs(folder, exist_ok=True)
    with S3Server(os.path.join(folder, "s3")) as server:
        os.environ.update(server.env())
        # Its own MLflow, unless the user has one.
        home = os.environ.get("LOGONET_HOME", folder)
        object_store.create_bucket(BUCKET)
        for place, count, seed in (("scans", args.scans, 0), ("new", NEW_SCANS, 1)):
            if not object_store.exists(f"{BUCKET}/{place}/dataset.json"):
                # Liver and spleen: telling right kidney from left takes more steps than a demo has.
                phantom.write_dataset(f"{BUCKET}/{place}", count, seed=seed, size_vox=(48, 48, 48), classes=3)
        print(f"S3 server   {server.endpoint} with {args.scans} synthetic CTs in {BUCKET}/scans", flush=True)
        shell = Shell({**os.environ, "LOGONET_HOME": home})
        made = stages(shell, args.workers)
        history = object_store.read_json(made["pretrain"].uri_of("history.json"))
        page = the_page(made, shell.typed)
        local = os.path.join(folder, "index.html")
        object_store.write(local, page.encode())
        for name in ("history.json", "masked_chain.png", "clusters.png", "curves.png"):
            object_store.write(os.path.join(folder, name), made["pretrain"].read(name))
        for name in ("organs.png", "cases.png"):
            object_store.write(os.path.join(folder, name), made["evaluation"].read(name))
    first, last, scores = history[0], history[-1], made["evaluation"].facts
    print(f"\npretraining loss {first['loss']:.3f} -> {last['loss']:.3f} over {len(history)} epochs; masked accuracy "
          f"{last['accuracy']:.3f}, of which a majority guess gets {last['accuracy_floor']:.3f}")  # fmt: skip
    print(
        f"test Dice   {scores['dice']:.3f} on {scores['cases']} cases that neither training nor pretraining saw"
    )
    print(f"page        {local}")
    mlflow = os.path.join(os.path.dirname(sys.executable), "mlflow")
    print(f"MLflow      {mlflow} ui --backend-store-uri sqlite:///{home}/mlflow.db")
    print(f"S3 data     logonet s3 serve --dir {os.path.join(folder, 's3')}")
    for artifact in made.values():
        print(f"            {artifact.uri}")
    print(f"            {BUCKET}/segmented/predictions.csv")
    print(f"took        {time.monotonic() - started:.0f} s")
    if not (
        last["loss"] < first["loss"] and last["accuracy"] > last["accuracy_floor"] and scores["dice"] > 0.5
    ):
        raise UserError(
            "the demo's loss did not fall, its accuracy stayed at the floor or its Dice below 0.5; please report this"
        )


def stages(shell: Shell, workers: int) -> dict[str, Artifact]:
    """Every stage from scans to label maps; the artifacts by stage."""
    common = ["--root", f"{BUCKET}/runs", "--workers", str(workers), "--object-store-mb", "500"]
    recipe = ["--recipe", "demo", "--data", f"{BUCKET}/scans/"]
    made = {}
    shell.run("jobs/pretrain.py", *recipe, *common)
    made["pretrain"] = newest("pretrain")
    shell.run("jobs/finetune.py", *recipe, *common, "--init", made["pretrain"].uri)
    made["finetune"] = newest("finetune")
    shell.run("jobs/evaluate.py", "--model", made["finetune"].uri, *common)
    made["evaluation"] = newest("evaluation")
    shell.run("logonet", "register", made["evaluation"].uri, "--task", "phantom", "--alias", "champion")
    shell.run(
        "jobs/predict.py",
        *["--model", "models:/logonet-seg-phantom@champion", "--input", f"{BUCKET}/new/imagesTr/"],
        *["--output", f"{BUCKET}/segmented/", "--workers", str(workers), "--object-store-mb", "500"],
    )
    return made


def newest(stage: str) -> Artifact:
    """The artifact of ``stage`` that was finished last."""
    prefix = f"{BUCKET}/runs/{stage}"
    folders = {
        f"{prefix}/{object_store.relative(e.uri, prefix).split('/')[0]}" for e in object_store.listing(prefix)
    }
    found = [artifact for uri in folders if (artifact := artifacts.find(uri)) is not None]
    return max(found, key=lambda artifact: artifact.created_at)


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
        main(tyro.cli(Args, prog="tools/demo.py", description=__doc__))
