"""Segment everything in a bucket.

    ray job submit --working-dir . -- python jobs/predict.py --model models:/logonet-seg-liver@champion \\
        --input s3://in/ --output s3://out/ --workers 16

Every case is committed by itself: the same command again goes on with those that are missing. A scan that cannot be
used is set aside with its reason, in OUTPUT/predictions.csv, and never stops the run.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import tyro

from logonet import cli, pipelines
from logonet.distributed import cluster
from logonet.distributed.cluster import Resources
from logonet.distributed.executor import RayExecutor
from logonet.inference import sliding_window


@dataclass(frozen=True)
class Args:
    """What jobs/predict.py takes.

    Attributes:
        model: models:/NAME@alias, a finetuning artifact <root>/finetune/<id>, or a model folder; several, joined by
            commas, are an ensemble.
        input: scans: a folder or s3:// prefix, a list (JSON or CSV), or a DICOM series folder.
        output: folder or s3:// prefix for label maps and predictions.csv.
        infer: windows, mirroring, precision.
        retry_quarantined: try again what an earlier run has set aside.
        resources: --workers is how many copies of the model run side by side.
    """

    model: str
    input: str
    output: str
    infer: tyro.conf.OmitArgPrefixes[sliding_window.Config] = field(default_factory=sliding_window.Config)
    retry_quarantined: tyro.conf.FlagCreatePairsOff[bool] = False
    resources: tyro.conf.OmitArgPrefixes[Resources] = field(default_factory=Resources)


def main(args: Args) -> None:
    source, output = cli.absolute(args.input, "--input"), cli.absolute(args.output, "--output")
    args.resources.fixed("a prediction")
    with cluster.connected(args.resources):
        model, executor = cli.absolute_model(args.model), RayExecutor(args.resources)
        pipelines.predict_bucket(args.infer, model, source, output, executor, args.retry_quarantined)


if __name__ == "__main__":
    with cli.sentences():
        main(tyro.cli(Args, prog="jobs/predict.py", description=__doc__))
