"""From a bucket of scans to pseudo-labels: whatever is missing of manifest and crops, then clusterers and labels."""

from __future__ import annotations

from jobs import recipes
from logonet import cli, cluster, stages


def run(cfg: stages.Pretraining, args: cli.JobArgs) -> None:
    stages.upstream(cfg, args.data, args.root, cluster.share(args.resources))


if __name__ == "__main__":
    cli.job("jobs/cluster.py", __doc__, recipes.PRETRAINING, run, stages.resolve)
