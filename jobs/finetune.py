"""From labelled scans, and pretrained weights if there are any, to a segmentation model.

    ray job submit --working-dir . -- python jobs/finetune.py --recipe small --data s3://in/ --root s3://out/ \\
        --init s3://out/pretrain/0123456789abcdef

Imports the scans, splits them by subject, prepares the cases, trains with the labelled method; tracked in MLflow. Every
stage is an artifact under --root: the same command again resumes, or returns at once when all is done.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from logonet import cli, pipelines, recipes
from logonet.distributed.executor import RayExecutor


@dataclass(frozen=True)
class Args(cli.JobArgs):
    """What jobs/finetune.py takes.

    Attributes:
        init: pretrained weights: a pretraining artifact <root>/pretrain/<id>, models:/NAME@alias or a .safetensors
            file; short for --set init.weights=...
    """

    init: str = ""


def configure(cfg: pipelines.Finetuning, args: Args) -> pipelines.Finetuning:
    if not args.init:
        return cfg
    return replace(cfg, init=replace(cfg.init, weights=cli.absolute_model(args.init, "--init")))


def run(cfg: pipelines.Finetuning, args: Args) -> None:
    pipelines.finetune(cfg, args.data, args.root, RayExecutor(args.resources), args.experiment)


if __name__ == "__main__":
    cli.job(
        "jobs/finetune.py", __doc__, recipes.FINETUNING, run, pipelines.resolve_finetuning, Args, configure
    )
