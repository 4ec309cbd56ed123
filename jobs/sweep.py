"""Find M, phi1, phi2, K or any other key of a pretraining's config, on a cheap proxy, with early stopping.

    ray job submit --working-dir . -- python jobs/sweep.py --space jobs/spaces/paper.yaml --recipe small \\
        --data s3://in/ --root s3://out/ --budget.trials 60 --budget.hours 24

Every trial is a pretraining run; trials share crops, clusterers and pseudo-labels. The same command again goes on with
what was interrupted or failed, and a larger budget with the search. The report is <root>/sweep/<name>/report.html.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from logonet import cli, pipelines, recipes
from logonet.core import config
from logonet.core.errors import UserError
from logonet.distributed import cluster
from logonet.storage import object_store
from logonet.sweep import space as spaces
from logonet.sweep.run import run as search
from logonet.sweep.settings import Budget, Config, Sweep


@dataclass(frozen=True)
class Args(cli.JobArgs):
    """What jobs/sweep.py takes.

    Attributes:
        space: YAML of what to search (jobs/spaces has some).
        name: of the sweep below <root>/sweep; empty for that of the space's file.
        labelled: labelled scans for the probe and the finetuning; empty for those of --data.
        search: how to search and whom to believe.
        budget: what it may cost.
        concurrent: trials side by side; 0 takes as many as the cluster has room for.
        confirm: finetune so many of the trials that ran to the end, the best first.
        register: finetune the winner too and register it as logonet-seg-<this>.
        finetune_recipe: a named config of jobs/finetune.py; empty for the one called like --recipe.
        finetune_set: section.key=value laid on it; may be repeated.
    """

    space: str = ""
    name: str = ""
    labelled: str = ""
    search: tyro.conf.OmitArgPrefixes[Config] = field(default_factory=Config)
    budget: Budget = field(default_factory=Budget)
    concurrent: int = 0
    confirm: int = 0
    register: str = ""
    finetune_recipe: str = ""
    finetune_set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="A.B=C")] = ()


def room(args: Args) -> cluster.Resources:
    return cluster.room(args.resources, args.concurrent)


def run(cfg: pipelines.Pretraining, args: Args) -> None:
    search(sweep_of(cfg, args), args.resources, args.budget, at_once=args.concurrent)


def sweep_of(cfg: pipelines.Pretraining, args: Args) -> Sweep:
    if not args.space:
        raise UserError("--space is missing; see jobs/spaces")
    recipe = args.finetune_recipe or (args.recipe if args.recipe in recipes.FINETUNING else "small")
    if recipe not in recipes.FINETUNING:
        raise UserError(config.unknown("finetuning recipe", recipe, recipes.FINETUNING))
    tuned = config.override(config.to_dict(recipes.FINETUNING[recipe]()), args.finetune_set)
    return Sweep(
        name=args.name or os.path.splitext(os.path.basename(args.space))[0],
        space=spaces.read(object_store.read_text(args.space), args.space),
        base=cfg,
        finetuning=config.from_dict(pipelines.Finetuning, tuned),
        source=args.data,
        root=args.root,
        experiment=args.experiment,
        config=args.search,
        labelled=cli.absolute(args.labelled, "--labelled") if args.labelled else "",
        confirm=args.confirm,
        register=args.register,
    )


if __name__ == "__main__":
    # Without logs: of many trials at once nobody could read them.
    cli.job(
        "jobs/sweep.py", __doc__, recipes.PRETRAINING, run, pipelines.resolve, Args, room=room, logs=False
    )
