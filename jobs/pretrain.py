"""From a bucket of unlabelled scans to a pretrained network.

    ray job submit --working-dir . -- python jobs/pretrain.py --recipe demo --data s3://in/ --root s3://out/

Imports the scans, cuts crops, fits clusterers, labels, pretrains; tracked in MLflow. Every stage is an
artifact under --root: the same command again resumes, or returns at once when all is done.
"""

from __future__ import annotations

from logonet import cli, pipelines, recipes
from logonet.distributed.executor import RayExecutor


def run(cfg: pipelines.Pretraining, args: cli.JobArgs) -> None:
    pipelines.pretrain(cfg, args.data, args.root, RayExecutor(args.resources), args.experiment)


if __name__ == "__main__":
    cli.job("jobs/pretrain.py", __doc__, recipes.PRETRAINING, run, pipelines.resolve)
