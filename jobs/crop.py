"""From a bucket of scans to crops: the manifest of --data, then random crops, both under --root."""

from __future__ import annotations

from logonet import cli, pipelines, recipes
from logonet.distributed.executor import RayExecutor


def run(cfg: pipelines.Pretraining, args: cli.JobArgs) -> None:
    executor = RayExecutor(args.resources)
    table, _ = pipelines.import_scans(args.data, args.root, executor, cfg.data.channels)
    pipelines.make_crops(table, cfg.crops, args.root, executor)


if __name__ == "__main__":
    cli.job("jobs/crop.py", __doc__, recipes.PRETRAINING, run, pipelines.resolve)
