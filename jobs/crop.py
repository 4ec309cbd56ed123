"""From a bucket of scans to crops: the manifest of --data, then random crops, both under --root."""

from __future__ import annotations

from jobs import recipes
from logonet import cli, cluster, stages


def run(cfg: stages.Pretraining, args: cli.JobArgs) -> None:
    share = cluster.share(args.resources)
    table, _ = stages.import_scans(args.data, args.root, share)
    stages.make_crops(table, cfg.crops, args.root, share)


if __name__ == "__main__":
    cli.job("jobs/crop.py", __doc__, recipes.PRETRAINING, run, stages.resolve)
