"""Commands that look after machines: check them, plan for them, and kill what runs on them."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import tyro

from logonet.cli.jobs import ConfigArgs, absolute, job_config
from logonet.core.errors import UserError
from logonet.distributed import cluster, spot_notice
from logonet.distributed.cluster import Resources
from logonet.planning.question import Question
from logonet.storage import node_cache


def doctor(root: str = "/tmp/logonet-doctor", nodes: bool = True) -> None:
    """Check that this machine, or every node of the cluster at RAY_ADDRESS, can run logonet with ROOT.

    Args:
        root: folder or s3:// prefix in which one object is written, read, listed and deleted.
        nodes: check every node of the Ray cluster too.
    """
    from logonet import tracking
    from logonet.distributed import doctor as checks

    with cluster.connected(Resources()) if nodes and cluster.address() else contextlib.nullcontext():
        rows = checks.preflight(root, nodes=nodes, tracking=tracking.check)
    checks.print_table(rows)
    if any(row.status == "fail" for row in rows):
        sys.exit(1)


def spot_watch(metadata: str = spot_notice.METADATA, node_id: str = "") -> None:
    """Pass a spot machine's notice (AWS, GCP) on to the Ray cluster that it is in, which then saves and leaves.

    Args:
        metadata: the cloud's metadata service.
        node_id: of the Ray node that goes; empty for all on this machine.
    """
    from logonet.distributed import ray_compat

    def drain(until_s: float) -> None:
        left_s = until_s - time.time()
        print(
            f"this machine goes in {left_s:.0f} s; told of {', '.join(ray_compat.drain(until_s, node_id))}",
            flush=True,
        )

    deadline = spot_notice.cloud(metadata)
    print(f"watching {metadata} for the notice of a spot machine", flush=True)
    spot_notice.watch(deadline, drain)


@dataclass(frozen=True)
class PlanArgs(Question, ConfigArgs):
    """What is planned, and with which recipe.

    Attributes:
        job: whose recipe it is; None for pretraining, or for finetuning where only that has a recipe of this name.
        json: print JSON instead of tables.
    """

    job: Literal["pretrain", "finetune"] | None = None
    json: tyro.conf.FlagCreatePairsOff[bool] = False


def plan(args: tyro.conf.OmitArgPrefixes[PlanArgs]) -> None:
    """Say what a run will read, keep, take and cost; exit status 1 when something will not fit.

    Args:
        args: what is planned.
    """
    from logonet import recipes
    from logonet.planning import request, table

    places = {flag: absolute(uri, f"--{flag}") for flag in ("data", "root") if (uri := getattr(args, flag))}
    asked = replace(args, **places)  # type: ignore[arg-type]
    jobs: dict[str | None, Any] = {"pretrain": recipes.PRETRAINING, "finetune": recipes.FINETUNING}
    known = jobs.get(args.job, recipes.FINETUNING | recipes.PRETRAINING)
    # Stages say what they do on the way; what this prints is the plan.
    with contextlib.redirect_stdout(sys.stderr):
        found = request.plan(request.resolve(job_config(args, known)), asked)
    print(json.dumps(found.to_dict(), indent=1) if args.json else table.text(found).rstrip("\n"))
    if found.refusals:
        sys.exit(1)


@dataclass(frozen=True)
class ChaosArgs:
    """What is killed, how often, and on what.

    Attributes:
        dir: keeps runs, results and the log of kills; the same command goes on with what is left.
        stages: done in the order of the default; "cluster" is crops, clusterers and pseudo-labels.
        kills: of each stage: workers, drivers, raylets, the MLflow server, the newest checkpoint, the disk, on a Ray
            cluster of its own on this machine.
        seed: of kinds, moments and victims.
        data: labelled scans; empty for phantoms.
        recipe: of the jobs; empty for the demo's made smaller.
        set: section.key=value for pretraining, clustering and sweeping; may be repeated.
        finetune_set: the same for finetuning.
        workers: training workers; at a fixed number results are equal bit for bit.
        nodes: raylets beside the head's, 2 CPUs each; one at a time is killed.
        limit_s: a command that wrote nothing for so long has hung, and its stage fails.
    """

    dir: str = "chaos-run"
    stages: tuple[str, ...] = ("pretrain", "cluster", "finetune", "predict", "sweep")
    kills: int = 20
    seed: int = 0
    data: str = ""
    recipe: str = ""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="A.B=C")] = ()
    finetune_set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="A.B=C")] = ()
    workers: int = 2
    nodes: int = 2
    limit_s: float = 600.0


def chaos(args: tyro.conf.OmitArgPrefixes[ChaosArgs]) -> None:
    """Kill every stage at random moments and compare with the undisturbed run; exit status 1 on a difference.

    Args:
        args: what is killed.
    """
    killing = developers_tool("chaos")
    results = killing.run(replace(args, data=absolute(args.data, "--data") if args.data else ""))
    killing.print_table(results)
    if not all(result.equal for result in results):
        sys.exit(1)


def s3_serve(dir: str, port: int = 9100) -> None:
    """Run a real S3 server (OpenStack Swift) on loopback, for trying things out; Ctrl-C stops it.

    Args:
        dir: where it keeps its data.
        port: first of four ports it takes.
    """
    developers_tool("s3server").serve(dir, port)


def developers_tool(name: str) -> ModuleType:
    """The module tools/<name>.py of the checkout that holds this package."""
    checkout = Path(__file__).parents[2]
    if not (checkout / "tools" / f"{name}.py").exists():
        raise UserError(
            f"this command needs tools/{name}.py, which an installed wheel does not have; run it from a checkout of "
            "the repository"
        )
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    return importlib.import_module(f"tools.{name}")


def cache_clear() -> None:
    """Delete what this machine keeps of buckets (LOGONET_CACHE_DIR); later epochs fetch it again."""
    print(f"{node_cache.clear() / 1e9:.2f} GB deleted in {node_cache.folder()}")
