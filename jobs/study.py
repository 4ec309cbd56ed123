"""Compare networks and pretexts: the product of networks, pretexts, label shares, folds and seeds in one command.

    ray job submit --working-dir . -- python jobs/study.py --study jobs/studies/hippocampus.yaml \\
        --data s3://in/ --root s3://out/

Every run is an ordinary pretraining, finetuning and evaluation; the same command again goes on with what was
interrupted or failed. The report is <root>/study/<id>/report.html.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from logonet import cli, pipelines, recipes
from logonet.core import config
from logonet.core.errors import UserError
from logonet.distributed import cluster
from logonet.distributed.cluster import Resources
from logonet.distributed.executor import RayExecutor
from logonet.pipelines.study import Base
from logonet.storage import object_store
from logonet.training.local import LocalExecutor


@dataclass(frozen=True)
class Args:
    """What jobs/study.py takes.

    Attributes:
        study: YAML of what to compare (jobs/studies has some).
        data: labelled scans.
        root: folder or s3:// prefix that holds every stage's artifacts; the same root goes on.
        unlabelled: scans to pretrain on; empty for the training cases of --data.
        set: keys of the study, such as seeds=[0,1,2]; may be repeated.
        only: a network or pretext of the study to run, without the others of its kind; may be repeated.
        resources: what a single run may use; never changes a result.
        concurrent: runs side by side; 0 takes as many as the cluster has room for.
        local: train in --concurrent processes of this machine, without Ray, which is quicker where runs are short; set
            OMP_NUM_THREADS to the cores of each.
        experiment: MLflow experiment.
        list_runs: print the runs and stop.
    """

    study: str
    data: str
    root: str
    unlabelled: str = ""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE")] = ()
    only: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME")] = ()
    resources: tyro.conf.OmitArgPrefixes[Resources] = field(default_factory=Resources)
    concurrent: Annotated[int, tyro.conf.arg(aliases=["--concurrency"])] = 0
    local: tyro.conf.FlagCreatePairsOff[bool] = False
    experiment: str = "logonet"
    list_runs: tyro.conf.FlagCreatePairsOff[bool] = False


def read(text: str, source: str, settings: tuple[str, ...] = ()) -> pipelines.Study:
    """The study of a YAML file; ``source`` names it in errors."""
    return config.from_dict(
        pipelines.Study, config.override(config.read_yaml(text, source), settings), "study"
    )


def planned(study: pipelines.Study, *, apart: bool = False) -> list[pipelines.StudyRun]:
    """The runs of ``study``; see `logonet.pipelines.plan_study`."""
    first, tuned = _base(study.pretraining, recipes.PRETRAINING), _base(study.finetuning, recipes.FINETUNING)
    return pipelines.plan_study(study, first, tuned, apart=apart)


def _base(base: Base, known: Mapping[str, Callable[[], Any]]) -> Any:
    return cli.job_config(cli.ConfigArgs(recipe=base.recipe, set=base.set), known)


def main(args: Args) -> None:
    study = read(object_store.read_text(args.study), args.study, args.set).only(args.only)
    runs = planned(study, apart=bool(args.unlabelled))
    if args.list_runs:
        print("\n".join(run.name for run in runs))
        return
    root, data = cli.absolute(args.root, "--root"), cli.absolute(args.data, "--data")
    unlabelled = cli.absolute(args.unlabelled, "--unlabelled") if args.unlabelled else ""
    args.resources.fixed("a study")
    name = os.path.splitext(os.path.basename(args.study))[0]
    # Without logs: of many runs at once nobody could read them.
    room = cluster.room(args.resources, args.concurrent)
    with contextlib.nullcontext() if args.local else cluster.connected(room, logs=False, tracked=True):
        executor = LocalExecutor() if args.local else RayExecutor(args.resources)
        where = data, root, executor, args.experiment
        done = pipelines.run_study(
            study, runs, *where, name=name, unlabelled=unlabelled, at_once=args.concurrent
        )
    print(f"{done.uri}/report.html")
    if failed := done.facts["failed"]:
        first = next(iter(failed.items()))
        raise UserError(
            f"{len(failed)} of {len(runs)} runs failed, such as {first[0]} ({first[1]}); the same command tries again"
        )


if __name__ == "__main__":
    with cli.sentences():
        main(tyro.cli(Args, prog="jobs/study.py", description=__doc__, config=(tyro.conf.AvoidSubcommands,)))
