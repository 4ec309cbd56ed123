"""Scores of a segmentation model: Dice, HD95 and NSD in mm per case and organ, with confidence intervals and pictures.

    ray job submit --working-dir . -- python jobs/evaluate.py --model s3://out/finetune/0123456789abcdef --root s3://out/

On the test cases of the model's own split, on its validation cases (--on val), or on all labelled scans of --data.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import tyro

from logonet import cli, pipelines
from logonet.core import config
from logonet.distributed import cluster
from logonet.distributed.cluster import Resources
from logonet.distributed.executor import RayExecutor


@dataclass(frozen=True)
class Args:
    """What jobs/evaluate.py takes.

    Attributes:
        model: a finetuning artifact <root>/finetune/<id>, models:/NAME@alias, or a model folder; several, joined by
            commas, are judged as an ensemble.
        root: folder or s3:// prefix that holds every stage's artifacts.
        data: labelled scans to judge on; empty for the cases of the model's own split.
        classes: names by which the data call the model's classes, such as '{liver: [hepar], spleen: [milz, lien]}'.
        evaluation: how.
        resources: what the job may use; never changes a result.
        experiment: MLflow experiment.
    """

    model: str
    root: str
    data: str = ""
    classes: str = ""
    evaluation: tyro.conf.OmitArgPrefixes[pipelines.Evaluation] = field(default_factory=pipelines.Evaluation)
    resources: tyro.conf.OmitArgPrefixes[Resources] = field(default_factory=Resources)
    experiment: str = "logonet"


def main(args: Args) -> None:
    root = cli.absolute(args.root, "--root")
    data = cli.absolute(args.data, "--data") if args.data else ""
    args.resources.fixed("an evaluation")
    cfg = args.evaluation
    if args.classes:
        given = {**config.to_dict(cfg), "classes": config.read_yaml(args.classes, "--classes")}
        cfg = config.from_dict(pipelines.Evaluation, given, "evaluation")
    with cluster.connected(args.resources, tracked=True):
        model, executor = cli.absolute_model(args.model), RayExecutor(args.resources)
        pipelines.evaluate_model(cfg, model, data, root, executor, args.experiment)


if __name__ == "__main__":
    with cli.sentences():
        main(tyro.cli(Args, prog="jobs/evaluate.py", description=__doc__))
