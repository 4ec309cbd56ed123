"""From a bucket of scans to pseudo-labels: whatever is missing of manifest and crops, then clusterers and labels."""

from __future__ import annotations

from logonet import cli, pipelines, recipes
from logonet.distributed.executor import RayExecutor


def run(cfg: pipelines.Pretraining, args: cli.JobArgs) -> None:
    pipelines.upstream(cfg, args.data, args.root, RayExecutor(args.resources))


if __name__ == "__main__":
    cli.job("jobs/cluster.py", __doc__, recipes.PRETRAINING, run, pipelines.resolve)
