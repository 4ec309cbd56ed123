"""Commands that look after machines: check them, plan for them, and kill what runs on them."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Annotated

import tyro

from logonet.cli.jobs import ConfigArgs, absolute, job_config
from logonet.core.errors import UserError
from logonet.distributed import cluster
from logonet.distributed.cluster import Resources


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


@dataclass(frozen=True)
class NodeArgs:
    """One kind of node by hand: laid on --machine, or all of it.

    Attributes:
        cpus: logical cores.
        memory_gib: RAM.
        gpus: of a node.
        gpu_memory_gib: of one GPU.
        gpu_tflop_s: a GPU's dense bfloat16 peak.
        shm_gib: /dev/shm.
        disk_gib: local disk.
        network_gbit_s: to other nodes and the store.
        price_per_h: on demand.
        spot_price_per_h: as a spot node.
    """

    cpus: float | None = None
    memory_gib: float | None = None
    gpus: int | None = None
    gpu_memory_gib: float | None = None
    gpu_tflop_s: float | None = None
    shm_gib: float | None = None
    disk_gib: float | None = None
    network_gbit_s: float | None = None
    price_per_h: float | None = None
    spot_price_per_h: float | None = None


@dataclass(frozen=True)
class PlanArgs(ConfigArgs):
    """What is planned: on which scans, with which recipe, where.

    Attributes:
        data: the scans, as for a job, or a finished import ROOT/manifest/<id>; they are listed, and three of them read.
        scans: plan with so many scans instead, of --shape.
        shape: voxels of every scan, such as 512x512x400; with --data nothing is read then.
        spacing: its mm, such as 0.8x0.8x1; what crops.spacing_mm resamples from.
        import_scans: read and check every scan of --data first, as the job would; ROOT keeps the table.
        root: where the run would keep its artifacts; --probe and --import-scans write there.
        resources: what the run may use.
        cluster: YAML of pools of machines (docs/planning.md); empty for --machine, else RAY_ADDRESS, else this machine.
        machine: a name of the price table, --nodes of them.
        node: what a node has, by hand.
        nodes: how many.
        spot: at the spot price.
        prices: YAML of machines and prices; empty for the package's examples.
        constants: measured numbers, as --probe stores them; where it goes with --probe.
        probe: measure them first, on the cluster at RAY_ADDRESS or on this machine, in about so many seconds.
        json: print JSON instead of tables.
    """

    data: str = ""
    scans: int = 0
    shape: str = ""
    spacing: str = ""
    import_scans: tyro.conf.FlagCreatePairsOff[bool] = False
    root: str = ""
    resources: tyro.conf.OmitArgPrefixes[Resources] = field(default_factory=Resources)
    cluster: str = ""
    machine: str = ""
    node: tyro.conf.OmitArgPrefixes[NodeArgs] = field(default_factory=NodeArgs)
    nodes: int = 1
    spot: tyro.conf.FlagCreatePairsOff[bool] = False
    prices: str = ""
    constants: str = ""
    probe: float = 0.0
    json: tyro.conf.FlagCreatePairsOff[bool] = False


def plan(args: tyro.conf.OmitArgPrefixes[PlanArgs]) -> None:
    """Say what a pretraining will read, keep, take and cost; exit status 1 when something will not fit.

    Args:
        args: what is planned.
    """
    from logonet import pipelines, recipes
    from logonet.planning import request, table

    # Stages say what they do on the way; what this prints is the plan.
    with contextlib.redirect_stdout(sys.stderr):
        found = request.plan(
            pipelines.resolve(job_config(args, recipes.PRETRAINING)),
            request.Question(
                data=absolute(args.data, "--data") if args.data else "",
                scans=args.scans,
                shape_vox=request.triple(args.shape, "--shape", int),
                spacing_mm=request.triple(args.spacing, "--spacing", float),
                import_scans=args.import_scans,
                root=absolute(args.root, "--root") if args.root else "",
                resources=args.resources,
                cluster=args.cluster,
                machine=args.machine,
                node={k: v for k, v in vars(args.node).items() if v is not None},
                nodes=args.nodes,
                spot=args.spot,
                prices=args.prices,
                constants=args.constants,
                probe_s=args.probe,
            ),
        )
    print(json.dumps(found.to_dict(), indent=1) if args.json else table.text(found).rstrip("\n"))
    if found.refusals:
        sys.exit(1)


def chaos(
    dir: str = "chaos-run",
    stages: tuple[str, ...] = ("pretrain", "cluster", "finetune", "predict", "sweep"),
    kills: int = 20,
    seed: int = 0,
    data: str = "",
    recipe: str = "",
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="A.B=C")] = (),
    finetune_set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="A.B=C")] = (),
    workers: int = 2,
    nodes: int = 2,
    limit_s: float = 600.0,
) -> None:
    """Kill every stage at random moments and compare with the undisturbed run; exit status 1 on a difference.

    Args:
        dir: keeps runs, results and the log of kills; the same command goes on with what is left.
        stages: "cluster" is crops, clusterers and pseudo-labels.
        kills: of each stage: workers, drivers, raylets, the MLflow server, the newest checkpoint, the disk, on a Ray
            cluster of its own on this machine.
        seed: of kinds, moments and victims.
        data: labelled scans; empty for phantoms.
        recipe: of the jobs; empty for the demo's made smaller.
        set: section.key=value for pretraining, clustering and sweeping; may be repeated.
        finetune_set: the same for finetuning.
        workers: training workers.
        nodes: raylets beside the head's.
        limit_s: a command that wrote nothing for so long has hung.
    """
    killing = developers_tool("chaos")
    where = absolute(data, "--data") if data else ""
    cfg = killing.Config(dir, stages, kills, seed, where, recipe, set, finetune_set, workers, nodes, limit_s)
    results = killing.run(cfg)
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
