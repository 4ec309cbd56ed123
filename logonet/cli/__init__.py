"""The command line: ``logonet <what>`` for looking after data and runs, and what every job script shares.

Every command ends in one of four ways: status 0; one sentence for the user and status 2; a word on what was kept
when it was asked to stop, and status 130 or 143; or a traceback and status 1, which is our mistake.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Annotated, Any, Literal

import tyro

from logonet.core import config, redaction
from logonet.core.errors import Stopped, UserError, user_sentence
from logonet.core.execution import run_all
from logonet.distributed import cluster
from logonet.distributed.cluster import Resources
from logonet.distributed.executor import RayExecutor
from logonet.storage import object_store


@dataclass(frozen=True)
class ConfigArgs:
    """How a config is chosen.

    Attributes:
        recipe: a named full config (a job's --list-recipes shows them).
        config: a YAML file laid on the recipe.
        set: section.key=value laid on both; may be repeated.
    """

    recipe: str = "paper"
    config: str | None = None
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="A.B=C")] = ()


@dataclass(frozen=True)
class JobArgs(ConfigArgs):
    """What every job script takes.

    Attributes:
        data: the scans: a folder or s3:// prefix, an MSD dataset.json, or a DICOM series folder.
        root: folder or s3:// prefix that holds every stage's artifacts; the same root resumes.
        resources: what the run may use; never changes a result.
        experiment: MLflow experiment.
        show_config: print the resolved config as YAML and stop.
        list_recipes: print the recipes with their data, hardware, hours and results, and stop.
    """

    data: str = ""
    root: str = ""
    resources: tyro.conf.OmitArgPrefixes[Resources] = field(default_factory=Resources)
    experiment: str = "logonet"
    show_config: tyro.conf.FlagCreatePairsOff[bool] = False
    list_recipes: tyro.conf.FlagCreatePairsOff[bool] = False


def job(
    name: str,
    description: str,
    recipes: Mapping[str, Callable[[], Any]],
    run: Callable[[Any, Any], None],
    check: Callable[[Any], Any],
    args_type: type[JobArgs] = JobArgs,
    configure: Callable[[Any, Any], Any] = lambda cfg, args: cfg,
    room: Callable[[Any], Resources] = lambda args: args.resources,
    logs: bool = True,
) -> None:
    """A job script's main: parse, resolve the config, join the cluster, run; errors become sentences.

    Args:
        check: checks a config and writes its defaults out, without a cluster.
        args_type, configure: for a job with flags of its own, and what they do to the config.
        room: what a Ray that the job starts itself should have room for.
        logs: show what workers print.
    """
    with sentences():
        args = tyro.cli(args_type, prog=name, description=description, config=(tyro.conf.AvoidSubcommands,))
        if args.list_recipes:
            for recipe, make in recipes.items():
                print(f"{recipe}\n    {' '.join((make.__doc__ or '').split())}\n")
            return
        cfg = check(configure(job_config(args, recipes), args))
        if args.show_config:
            print(config.to_yaml(cfg), end="")
            return
        for flag in ("data", "root"):
            if not getattr(args, flag):
                raise UserError(f"--{flag} is missing; see {name} --help")
        args = replace(args, data=absolute(args.data, "--data"), root=absolute(args.root, "--root"))
        with cluster.connected(room(args), logs):
            run(cfg, args)


def absolute(uri: str, flag: str) -> str:
    """Local paths made absolute: Ray's workers run in other folders than the command."""
    if object_store.is_s3(uri) or os.path.isabs(object_store.local_path(uri)):
        return uri
    if cluster.submitted():
        raise UserError(
            f"{flag} {uri} is relative, and a submitted job's folder is thrown away; give an absolute path or s3://"
        )
    return os.path.abspath(object_store.local_path(uri))


def absolute_model(uri: str, flag: str = "--model") -> str:
    """The same for where a model is: a folder, an artifact, or models:/NAME@alias."""
    return uri if uri.startswith("models:/") else absolute(uri, flag)


def job_config(args: ConfigArgs, recipes: Mapping[str, Callable[[], Any]]) -> Any:
    """Recipe, then file, then --set: each laid on what came before, strictly."""
    if args.recipe not in recipes:
        raise UserError(config.unknown("recipe", args.recipe, recipes))
    base = recipes[args.recipe]()
    values = config.to_dict(base)
    if args.config is not None:
        values = config.merge(values, config.read_yaml(object_store.read_text(args.config), args.config))
    return config.from_dict(type(base), config.override(values, args.set))


@contextlib.contextmanager
def sentences() -> Iterator[None]:
    """Turn UserError, also one from a Ray task or worker, into one sentence and exit status 2."""
    to_stderr = logging.StreamHandler()
    to_stderr.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[to_stderr])
    sys.excepthook = _traceback
    try:
        yield
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        sys.exit(130)
    except Stopped as err:
        print(err, file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except Exception as err:
        sentence = user_sentence(err)
        if sentence is None:
            raise
        print(f"error: {_shown(sentence)}", file=sys.stderr)
        sys.exit(2)


def _shown(text: str) -> str:
    """What may be printed of ``text``."""
    return redaction.without_names(redaction.without_secrets(text))


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _shown(super().format(record))


def _traceback(kind: type[BaseException], err: BaseException, trace: TracebackType | None) -> None:
    """A library's error may repeat an address with its password."""
    print(_shown("".join(traceback.format_exception(kind, err, trace))), end="", file=sys.stderr)


# ------------------------------------------------------------------------------------------- commands

app = tyro.extras.SubcommandApp()


@app.command(name="data import")
def data_import(
    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")],
    /,
    root: str,
    workers: int = 1,
) -> None:
    """Read and check every scan at SOURCE and store one table of them under ROOT/manifest.

    Args:
        source: a folder or s3:// prefix, an MSD dataset.json, or a DICOM series folder.
        root: where the artifact goes.
        workers: parallelism hint where the command starts its own Ray.
    """
    from logonet import pipelines

    resources = Resources(workers=workers)
    with cluster.connected(resources):
        executor = RayExecutor(resources)
        table, artifact = pipelines.import_scans(
            absolute(source, "SOURCE"), absolute(root, "--root"), executor
        )
    print(_shown(table.describe()))
    print(f"id {table.id}\n{artifact.uri}")


@app.command(name="data check")
def data_check(
    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")], /, workers: int = 1
) -> None:
    """Verify every case at SOURCE and print every offender; exit status 1 when there is one.

    Args:
        source: as for data import.
        workers: parallelism hint where the command starts its own Ray.
    """
    from logonet.data import importers, validate

    resources = Resources(workers=workers)
    with cluster.connected(resources):
        found = importers.sources(absolute(source, "SOURCE"))
        checked = run_all(RayExecutor(resources), validate.check, found)
    problems = validate.problems(checked)
    print(_shown(validate.table(problems, cases=len(checked))))
    if validate.failed(problems):
        sys.exit(1)


@app.command(name="data leakcheck")
def data_leakcheck(
    manifests: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MANIFEST...")],
    /,
    out: str = "",
) -> None:
    """Look for scans of the first manifest in the others; exit status 1 when there is one.

    Args:
        manifests: manifest artifacts (ROOT/manifest/<id>), that of the test scans first; one alone is searched for
            duplicates.
        out: also write the table as CSV here.
    """
    from logonet import pipelines
    from logonet.data import leakage

    tables = [pipelines.open_manifest(absolute(uri, "MANIFEST")) for uri in manifests]
    if not tables:
        raise UserError("no manifest is given; 'logonet data import' makes one")
    others = [s for t in tables[1:] or tables for s in t.scans]
    found = leakage.find(tables[0].scans, others)
    print(leakage.table(found))
    if out:
        object_store.write(absolute(out, "--out"), leakage.to_csv(found))
    if found:
        sys.exit(1)


@app.command
def compare(
    run_a: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_A")],
    run_b: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_B")],
    /,
    out: str = "",
    common: bool = False,
) -> None:
    """Is B better than A? Paired Wilcoxon test and bootstrap interval on the same cases.

    Args:
        run_a: an evaluation artifact (ROOT/evaluation/<id>) or its cases.csv.
        run_b: another.
        out: folder or s3:// prefix for compare.csv and compare.png.
        common: compare on the cases both have, where they differ.
    """
    from logonet import pipelines, reporting
    from logonet.inference import statistics

    a, b = (pipelines.scores_of(absolute(uri, "RUN")) for uri in (run_a, run_b))
    compared = statistics.compare(a, b, common=common)
    print(statistics.compare_table(compared))
    if out:
        where = absolute(out, "--out")
        object_store.write(object_store.join(where, "compare.csv"), compared.to_csv(index=False).encode())
        object_store.write(object_store.join(where, "compare.png"), reporting.compare_picture(compared))
        print(f"{where}/compare.csv")


@app.command
def register(
    artifact: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ARTIFACT")],
    /,
    task: str = "",
    alias: tuple[str, ...] = ("candidate",),
) -> None:
    """Put what a run has made, and what it was made from, into the MLflow model registry.

    Args:
        artifact: ROOT/evaluation/<id>, ROOT/finetune/<id> or ROOT/pretrain/<id>.
        task: names the segmentation model, logonet-seg-<task>.
        alias: such as candidate or champion.
    """
    from logonet import pipelines

    for uri in pipelines.register(absolute(artifact, "ARTIFACT"), task, alias):
        print(uri)


@app.command
def alias(
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")],
    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ALIAS")],
    /,
) -> None:
    """Point an alias, such as champion, at a registered model.

    Args:
        model: models:/NAME/VERSION or models:/NAME@ALIAS.
        name: the alias.
    """
    from logonet import tracking

    print(f"{tracking.set_alias(model, name)} is now @{name}")


@app.command
def export(
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")],
    /,
    out: str,
    format: Literal["bundle", "onnx"] = "bundle",
) -> None:
    """Write a model for others to run: a MONAI bundle, or ONNX of the network with a parity check.

    Args:
        model: models:/NAME@alias, a finetuning artifact ROOT/finetune/<id>, or a model folder.
        out: a local folder for the bundle, or a file for ONNX.
        format: which.
    """

    from logonet.inference import export as exporting
    from logonet.inference.load import load_model

    with tempfile.TemporaryDirectory(prefix="logonet-export-") as folder:
        for name, blob in load_model(absolute_model(model)).folder.items():
            object_store.write(os.path.join(folder, name), blob)
        print(exporting.write(folder, absolute(out, "--out"), format))


@app.command(name="sweep-report")
def sweep_report(
    sweep: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SWEEP")], /, out: str = ""
) -> None:
    """Say what a sweep has found, also while it runs: heat map, all trials, what each key decides, CSV.

    Args:
        sweep: ROOT/sweep/<name>.
        out: folder or s3:// prefix for report.html, its pictures and trials.csv; empty for the sweep's own.
    """
    from logonet.sweep import outcome

    uri = absolute(sweep, "SWEEP")
    where = absolute(out, "--out") if out else uri
    outcome.report(uri, where)
    print(outcome.summary(uri))
    print(f"{where}/report.html")


@app.command
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


@app.command
def plan(args: tyro.conf.OmitArgPrefixes[PlanArgs]) -> None:
    """Say what a pretraining will read, keep, take and cost; exit status 1 when something will not fit.

    Args:
        args: what is planned.
    """
    import json

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
    print(
        json.dumps(found.to_dict(), indent=1) if args.json else table.text(found),
        end="\n" if args.json else "",
    )
    if found.refusals:
        sys.exit(1)


@app.command(name="clusters report")
def clusters_report(
    clusterers: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CLUSTERERS")],
    /,
    out: str,
    slices: int = 4096,
    stability: int = 4,
) -> None:
    """Say how good a clusterer set is, before any GPU hour is spent on it.

    Args:
        clusterers: a clusterers artifact, ROOT/clusterers/<fingerprint>.
        out: folder or s3:// prefix for report.html, quality.csv and the contact sheets.
        slices: how many slices to judge on.
        stability: refit this many clusterers with another seed and compare; 0 skips it.
    """
    from logonet.pipelines import clusterer_report

    resources = Resources()
    with cluster.connected(resources):
        where, out = absolute(clusterers, "CLUSTERERS"), absolute(out, "--out")
        quality = clusterer_report.write(where, out, slices, stability, RayExecutor(resources))
    print(quality.describe().round(3).to_string())
    print(f"{out.rstrip('/')}/report.html")


@app.command
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
    from tools import chaos as killing

    where = absolute(data, "--data") if data else ""
    cfg = killing.Config(dir, stages, kills, seed, where, recipe, set, finetune_set, workers, nodes, limit_s)
    results = killing.run(cfg)
    killing.print_table(results)
    if not all(result.equal for result in results):
        sys.exit(1)


@app.command(name="s3 serve")
def s3_serve(dir: str, port: int = 9100) -> None:
    """Run a real S3 server (OpenStack Swift) on loopback, for trying things out; Ctrl-C stops it.

    Args:
        dir: where it keeps its data.
        port: first of four ports it takes.
    """
    from tools import s3server

    s3server.serve(dir, port)


@app.command
def phantoms(
    root: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ROOT")],
    /,
    n: int = 8,
    size: int = 64,
    seed: int = 0,
) -> None:
    """Write N synthetic CT scans with labels to ROOT, in the MSD layout.

    Args:
        root: folder or s3:// prefix.
        n: number of scans.
        size: voxels along each side.
        seed: of everything drawn.
    """
    from logonet.data import phantom

    print(phantom.write_dataset(root, n, size_vox=(size, size, size), seed=seed))


TWO_WORDS = ("data import", "data check", "data leakcheck", "clusters report", "s3 serve")


def main() -> None:
    args = sys.argv[1:]
    # tyro knows a command by one name; people type two words.
    if " ".join(args[:2]) in TWO_WORDS:
        args = [" ".join(args[:2]), *args[2:]]
    with sentences():
        app.cli(
            prog="logonet",
            description="Look after the data, the models and the results of pretraining and finetuning.",
            args=args,
        )
