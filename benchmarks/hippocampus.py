"""Five networks, two label fractions, the same steps: Dice, HD95 and NSD on 40 hippocampus cases nobody trained on.

    python benchmarks/hippocampus.py --data ../shared/data/Task04_Hippocampus/ --dir hippocampus-run

Runs the jobs one after another, each exactly as a user would; what is done already is not done again. Prints every
command, the table, the paired tests and, as the last line, JSON. Takes about two hours on 2 cores.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import tyro
from _pictures import bars_with_ci

from logonet import networks, pipelines
from logonet.inference import statistics
from logonet.storage import artifacts

# Options that give each network about as many parameters as the recipe's LoGoNet (3.24 M).
NETWORKS: dict[str, dict[str, Any]] = {
    "logonet": {},  # the recipe's own
    "dynunet": {"filters": [12, 24, 48, 80, 96, 96]},
    "swinunetr": {"feature_size": 12, "window_size": 4},
    "unetr": {
        "img_size": [32, 64, 32],
        "feature_size": 12,
        "hidden_size": 96,
        "mlp_dim": 384,
        "num_heads": 6,
    },
}
FRACTIONS = (0.1, 1.0)
# Shorter than the recipe, for ten runs: 500 steps of two crops of each of 2 cases.
SHORT = [
    "crops.per_case=2",
    "train.global_batch=2",
    "train.batch_size=1",
    "train.epochs=10",
    "train.steps_per_epoch=50",
]
SHORT += ["train.lr=1e-3", "train.ema=0", "method.batch_dice=false"]


@dataclass(frozen=True)
class Args:
    """Settings.

    Attributes:
        data: the MSD task's folder.
        dir: keeps artifacts, logs and results.
        workers: training workers.
    """

    data: str
    dir: str = "hippocampus-run"
    workers: int = 2


def job(args: Args, name: str, script: str, *words: str) -> tuple[str, float]:
    """Run one job; its artifact's folder and seconds (0 where it had been done before)."""
    root = Path(args.dir).resolve()
    command = [sys.executable, f"jobs/{script}.py", *words, "--root", str(root / "runs")]
    command += ["--workers", str(args.workers), "--object-store-mb", "500", "--experiment", "hippocampus"]
    print(f"$ python {' '.join(command[1:])}".replace(str(root), args.dir), flush=True)
    env = {"LOGONET_HOME": str(root / "home"), "OMP_NUM_THREADS": "1", **os.environ}
    started = time.monotonic()
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    log = done.stdout + done.stderr
    (root / f"{name}.log").open("a").write(log)
    if done.returncode:
        sys.exit(f"{name} failed:\n{log[-3000:]}")
    found = re.findall(rf"({re.escape(str(root))}/runs/(?:pretrain|finetune|evaluation)/[0-9a-f]{{16}})", log)
    times = root / "times.json"
    known = json.loads(times.read_text()) if times.exists() else {}
    if name not in known:
        known[name] = round(time.monotonic() - started, 1)
        times.write_text(json.dumps(known, indent=1))
    return found[-1], known[name]


def main(args: Args) -> None:
    root = Path(args.dir).resolve()
    root.mkdir(parents=True, exist_ok=True)
    data = str(Path(args.data).resolve()) + "/"
    pretrained, pretrain_s = job(
        args, "pretrain", "pretrain", "--recipe", "hippocampus_logonet", "--data", data
    )
    rows, scores = [], {}
    for fraction in FRACTIONS:
        for label in ("logonet + pretraining", *NETWORKS):
            net = label.split(" ")[0]
            words = ["--recipe", "hippocampus_logonet", "--data", data, *SHORT, f"split.fraction={fraction}"]
            if NETWORKS[net]:
                words += [f"backbone={json.dumps({'name': net, **NETWORKS[net]})}"]
            if "pretraining" in label:
                words += ["--init", pretrained]
            name = f"{label.replace(' + ', '-')}-{fraction:g}"
            finetuned, train_s = job(args, name, "finetune", *words)
            judged, _ = job(args, f"evaluate-{name}", "evaluate", "--model", finetuned)
            scores[label, fraction] = pipelines.scores_of(judged)
            artifact = artifacts.find(finetuned)
            assert artifact is not None
            options = {k: v for k, v in artifact.config["backbone"].items() if k != "name"}
            built = networks.build(net, 1, len(artifact.facts["classes"]), **options)
            summary = statistics.summary(scores[label, fraction])
            mean = summary[summary["class"] == "mean"].set_index("metric")
            rows.append(
                {
                    "name": label,
                    "group": f"{fraction:.0%} of 160 cases",
                    "params_m": sum(p.numel() for p in built.parameters()) / 1e6,
                    "train_s": train_s,
                    **{
                        f"{metric}_{part}": float(mean.loc[metric, part])
                        for metric in ("dice", "hd95_mm", "nsd_1mm", "nsd_2mm")
                        for part in ("mean", "ci_low", "ci_high")
                    },
                }
            )
    table = pd.DataFrame(rows)
    print(f"\npretraining took {pretrain_s:.0f} s\n{markdown(table)}\n")
    tests = []
    for fraction in FRACTIONS:
        for other in [label for label, share in scores if share == fraction and label != "logonet"]:
            compared = statistics.compare(scores["logonet", fraction], scores[other, fraction])
            mean = compared[compared["class"] == "mean"].set_index("metric")
            line = mean.loc["dice"]
            tests.append(
                {
                    "fraction": fraction,
                    "b": other,
                    "dice_difference": float(line["difference"]),
                    "ci_low": float(line["ci_low"]),
                    "ci_high": float(line["ci_high"]),
                    "wilcoxon_p": float(line["p"]),
                }
            )
    print(pd.DataFrame(tests).round(5).to_string(index=False))
    shown = table.rename(columns={"dice_mean": "mean", "dice_ci_low": "ci_low", "dice_ci_high": "ci_high"})
    picture = bars_with_ci(
        shown[["name", "group", "mean", "ci_low", "ci_high"]], "Hippocampus, 40 test cases"
    )
    (root / "hippocampus.png").write_bytes(picture)
    print(json.dumps({"pretrain_s": pretrain_s, "rows": rows, "tests": tests}))


def markdown(table: pd.DataFrame) -> str:
    lines = [
        "| labels | network | M params | Dice | HD95 mm | NSD 1 mm | NSD 2 mm | training s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in table.to_dict("records"):
        cells = [row["group"], row["name"], f"{row['params_m']:.2f}"]
        for metric, digits in (("dice", 3), ("hd95_mm", 2), ("nsd_1mm", 3), ("nsd_2mm", 3)):
            mean, low, high = (
                f"{row[f'{metric}_{part}']:.{digits}f}" for part in ("mean", "ci_low", "ci_high")
            )
            cells.append(f"{mean} ({low} to {high})")
        lines.append("| " + " | ".join([*cells, f"{row['train_s']:.0f}"]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
