"""Every pretext on the same scans under one budget: the LoGoNet paper's Table 7 in our units.

    python benchmarks/pretexts.py --data ../shared/data/Task04_Hippocampus/ --dir pretexts-run

Each method pretrains the same small backbone for the same number of samples; then the same probe of the frozen encoder
and the same finetuning on a tenth of the labels, judged on the same 40 test cases. What is done already is not done
again. Prints the table and, as the last line, JSON; draws pretexts.png. About an hour on 2 cores.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import tyro
from _pictures import bars_with_ci

from logonet import pipelines, recipes, training
from logonet.data import cropping, prepared_scans, splits
from logonet.distributed import cluster
from logonet.distributed.cluster import Resources
from logonet.distributed.executor import RayExecutor
from logonet.inference import sliding_window, statistics
from logonet.pipelines.finetuning import Init
from logonet.storage.artifacts import Artifact
from logonet.training import linear_probe

SIZE_VOX = (32, 32, 32)  # cubes, since two of the pretexts turn crops in the slice plane
# Both about 3.2 M parameters; tokens of 16 voxels leave the transformer 8 of them.
BACKBONES: dict[str, dict[str, Any]] = {
    "logonet": recipes.general.SMALL_LOGONET,
    "unetr": {
        "name": "unetr",
        "img_size": list(SIZE_VOX),
        "feature_size": 12,
        "hidden_size": 96,
        "mlp_dim": 384,
        "num_heads": 6,
    },
}
SCRATCH = "from scratch"
# What a method watches itself by, beside the effective rank: the first of these that it reports.
OWN_MEASURES = (
    "position_collapse",
    "teacher_cosine",
    "spread",
    "prediction_spread",
    "restored_error",
    "agreement",
    "accuracy",
)


@dataclass(frozen=True)
class Run:
    """One line of the table; no ``method`` is no pretraining. ``objective`` is what it finetunes with."""

    label: str
    backbone: str
    method: dict[str, Any] | None = None
    objective: dict[str, Any] = field(default_factory=lambda: {"name": "supervised"})


CLUSTERS = {"name": "masked_clusters", "final_relu": False}
RUNS = (
    Run(SCRATCH, "logonet"),
    Run("masked clusters (LoGoNet)", "logonet", CLUSTERS),
    Run("the same without masking", "logonet", {**CLUSTERS, "masking": "none"}),
    Run("SimMIM", "logonet", {"name": "simmim", "unit_vox": [8, 8, 8]}),
    Run("Rubik's Cube++", "logonet", {"name": "rubik", "cubie_vox": 8}),
    Run("SimCLR", "logonet", {"name": "simclr"}),
    Run("BYOL", "logonet", {"name": "byol"}),
    Run("RCR", "logonet", {"name": "rcr"}),
    Run("SimPROT-W (SimTROT)", "logonet", {"name": "simtrot"}),
    Run("MedContext (joint)", "logonet", None, {"name": "medcontext", "unit_vox": 8}),
    Run(SCRATCH, "unetr"),
    Run("masked clusters (LoGoNet)", "unetr", CLUSTERS),
    Run("SimMIM", "unetr", {"name": "simmim"}),
    Run("MAE3D", "unetr", {"name": "mae3d"}),
    Run("GL-MAE", "unetr", {"name": "glmae"}),
    Run("MedContext (joint)", "unetr", None, {"name": "medcontext"}),
)


@dataclass(frozen=True)
class Args:
    """Settings.

    Attributes:
        data: the MSD task's folder.
        dir: keeps artifacts, logs and results.
        workers: training workers.
        epochs: of pretraining, 16 steps of 16 crops each.
        steps: of finetuning, 2 crops of each of 2 cases each.
        only: labels of the runs wanted; empty for all.
    """

    data: str
    dir: str = "pretexts-run"
    workers: int = 2
    epochs: int = 8
    steps: int = 150
    only: tuple[str, ...] = ()


def pretrained(args: Args, run: Run, root: str) -> Artifact | None:
    """The run's pretraining. Every one is probed at its end."""
    if run.method is None:
        return None
    base = recipes.PRETRAINING["hippocampus_logonet"]()
    cfg = replace(
        base,
        split=split(1.0),
        crops=cropping.Config(size_vox=SIZE_VOX, per_scan=2),
        backbone=BACKBONES[run.backbone],
        method=run.method,
        train=replace(base.train, epochs=args.epochs, batch_size=8, lr=1e-3),
        probe=linear_probe.Config(every_epochs=args.epochs),
    )
    return pipelines.pretrain(cfg, args.data, root, RayExecutor(resources(args)), "pretexts")


def finetuned(args: Args, run: Run, root: str, init: Artifact | None) -> Artifact:
    base = recipes.FINETUNING["hippocampus_logonet"]()
    method = {**base.method, **run.objective}
    cfg = replace(
        base,
        split=split(0.1),
        crops=prepared_scans.CropSampling(size_vox=SIZE_VOX),
        backbone=BACKBONES[run.backbone],
        method=method,
        train=training.Config(
            epochs=1, steps_per_epoch=args.steps, global_batch=2, lr=1e-3, warmup_epochs=0.1, grad_clip=1.0
        ),
        init=Init(init.uri if init else ""),
        validation=sliding_window.Config(overlap=0.25),
    )
    return pipelines.finetune(cfg, args.data, root, RayExecutor(resources(args)), "pretexts")


def split(fraction: float) -> splits.Config:
    """40 of 200 test, 32 validate, 128 train, or a part of these."""
    return replace(recipes.general.HIPPOCAMPUS_SPLIT, fold=0, fraction=fraction)


def resources(args: Args) -> Resources:
    return Resources(workers=args.workers, object_store_mb=500)


def one(args: Args, run: Run, root: str, log: io.TextIOBase) -> tuple[dict[str, Any], pd.DataFrame]:
    """The run's line of the table and its scores, case by case."""
    with contextlib.redirect_stdout(log):  # type: ignore[type-var]
        first = pretrained(args, run, root)
        second = finetuned(args, run, root, first)
        judged = pipelines.evaluate_model(
            pipelines.Evaluation(), second.uri, args.data, root, RayExecutor(resources(args)), "pretexts"
        )
    scores = pipelines.scores_of(judged.uri)
    summary = statistics.summary(scores)
    dice = summary[(summary["class"] == "mean") & (summary["metric"] == "dice")].iloc[0]
    entry = json.loads((first or second).read("history.json"))[-1]
    batch = (first or second).config["train"]["global_batch"]
    known = {"epoch", "step", "unix_s", "lr", "loss", "samples_per_s", "data_wait_share", "peak_memory_mb"}
    line = {
        "label": run.label,
        "backbone": run.backbone,
        "samples": entry["step"] * batch if first else 0,
        "probe_dice": entry.get("probe_dice"),
        "probe_dice_floor": entry.get("probe_dice_floor"),
        "dice": float(dice["mean"]),
        "ci_low": float(dice["ci_low"]),
        "ci_high": float(dice["ci_high"]),
        "effective_rank": entry.get("effective_rank"),
        "step_s": batch / entry["samples_per_s"],
        "peak_mb": entry["peak_memory_mb"],
        "metrics": {k: v for k, v in entry.items() if k not in known and isinstance(v, float)},
    }
    return line, scores


def main(args: Args) -> None:
    home = Path(args.dir).resolve()
    home.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("LOGONET_HOME", str(home / "home"))
    args = replace(args, data=str(Path(args.data).resolve()) + "/")
    lines, scores = [], {}
    wanted = [run for run in RUNS if not args.only or run.label in args.only]
    with open(home / "log.txt", "a") as log, cluster.connected(resources(args), logs=False):
        for run in wanted:
            line, scores[run.label, run.backbone] = one(args, run, str(home / "runs"), log)
            lines.append(line)
            print(f"{run.backbone:8} {run.label:28} Dice {line['dice']:.4f}", flush=True)
    for line in lines:
        scratch = scores.get((SCRATCH, line["backbone"]))
        if line["label"] == SCRATCH or scratch is None:
            continue
        compared = statistics.compare(scratch, scores[line["label"], line["backbone"]])
        mean = compared[(compared["class"] == "mean") & (compared["metric"] == "dice")].iloc[0]
        line |= {
            "difference": float(mean["difference"]),
            "difference_ci": [float(mean["ci_low"]), float(mean["ci_high"])],
            "p": float(mean["p"]),
        }
    print(f"\n{markdown(lines)}\n")
    shown = pd.DataFrame(lines).rename(columns={"label": "name", "backbone": "group", "dice": "mean"})
    picture = bars_with_ci(
        shown[["name", "group", "mean", "ci_low", "ci_high"]],
        "Pretexts, hippocampus, 13 training and 40 test cases",
    )
    (home / "pretexts.png").write_bytes(picture)
    print(json.dumps({"epochs": args.epochs, "steps": args.steps, "rows": lines}))


def markdown(lines: list[dict[str, Any]]) -> str:
    out = [
        "| network | pretext | probe Dice (untrained) | Dice | to scratch | p | rank | own measure | s/step | MB |",
        "|" + "---|" * 10,
    ]
    for line in lines:
        probed = f"{line['probe_dice']:.3f} ({line['probe_dice_floor']:.3f})" if line["probe_dice"] else ""
        against = p = ""
        if "p" in line:
            low, high = line["difference_ci"]
            against, p = f"{line['difference']:+.4f} ({low:+.4f} to {high:+.4f})", f"{line['p']:.4f}"
        rank = f"{line['effective_rank']:.1f}" if line["effective_rank"] is not None else ""
        dice = f"{line['dice']:.3f} ({line['ci_low']:.3f} to {line['ci_high']:.3f})"
        own = next((k for k in OWN_MEASURES if k in line["metrics"]), None)
        measure = f"{own.replace('_', ' ')} {line['metrics'][own]:.3f}" if own else ""
        cells = [line["backbone"], line["label"], probed, dice, against, p, rank, measure]
        out.append("| " + " | ".join([*cells, f"{line['step_s']:.2f}", f"{line['peak_mb']:,.0f}"]) + " |")
    return "\n".join(out)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
