"""Decide on a model's validation cases of which classes it keeps the largest connected component alone.

    ray job submit --working-dir . -- python jobs/postprocess.py --model s3://out/finetune/0123456789abcdef --root s3://out/

The result, <root>/postprocess/<id>, is the model with its post-processing: evaluate, predict, register and export it
like a finetuning. --model A,B,C makes it of an ensemble, each of whose members is judged on its own validation cases.
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
    """What jobs/postprocess.py takes.

    Attributes:
        model: a finetuning artifact <root>/finetune/<id>; several, joined by commas, are an ensemble.
        root: folder or s3:// prefix that holds every stage's artifacts.
        data: labelled scans; empty for those that the model was finetuned from.
        infer: windows, mirroring, precision.
        resources: what the job may use; never changes a result.
        experiment: MLflow experiment.
    """

    model: str
    root: str
    data: str = ""
    infer: tyro.conf.OmitArgPrefixes[sliding_window.Config] = field(default_factory=sliding_window.Config)
    resources: tyro.conf.OmitArgPrefixes[Resources] = field(default_factory=Resources)
    experiment: str = "logonet"


def main(args: Args) -> None:
    root = cli.absolute(args.root, "--root")
    data = cli.absolute(args.data, "--data") if args.data else ""
    args.resources.fixed("a post-processing")
    cfg = pipelines.Evaluation(infer=args.infer)
    with cluster.connected(args.resources, tracked=True):
        model, executor = cli.absolute_model(args.model), RayExecutor(args.resources)
        pipelines.postprocess(cfg, model, data, root, executor, args.experiment)


if __name__ == "__main__":
    with cli.sentences():
        main(tyro.cli(Args, prog="jobs/postprocess.py", description=__doc__))
