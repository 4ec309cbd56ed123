"""From the command's flags to scans, a cluster and constants, and from those to a plan."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from logonet import pipelines
from logonet.core.errors import UserError
from logonet.data import classes, importers, manifest
from logonet.distributed import cluster
from logonet.distributed.executor import RayExecutor
from logonet.pipelines import Finetuning
from logonet.pipelines.pretraining import training_part
from logonet.pipelines.weights import find_weights
from logonet.planning import hardware, labelled, planner, sizes, speed
from logonet.planning.hardware import Cluster
from logonet.planning.question import Question
from logonet.planning.sizes import Planned, Scan, Scans
from logonet.planning.speed import Constants
from logonet.storage import artifacts, object_store


def resolve(cfg: Planned) -> Planned:
    """``cfg`` as its job resolves it; a finetuning may take the backbone of the artifact that it begins from.

    Raises:
        UserError: as the job, or the weights are no artifact and no backbone is named.
    """
    if not isinstance(cfg, Finetuning):
        return pipelines.resolve(cfg)
    weights = cfg.init.weights
    if cfg.backbone.name or not weights:
        return pipelines.resolve_finetuning(cfg)
    if weights.startswith("models:/") or weights.endswith(".safetensors"):
        raise UserError(f"a plan does not fetch {weights}; set backbone.name and the options of its network")
    return pipelines.resolve_finetuning(cfg, find_weights(weights, ""))


def plan(cfg: Planned, asked: Question) -> planner.Plan:
    """The plan of ``cfg`` (resolved).

    Raises:
        UserError: what is asked cannot be planned.
    """
    with contextlib.ExitStack() as stack:
        if asked.probe or asked.import_scans:
            stack.enter_context(cluster.connected(asked.resources))
        scans = find_scans(cfg, asked)
        if isinstance(cfg, Finetuning):
            cfg = replace(cfg, data=scans.labels or _numbered(cfg.data, asked.classes))
        found = find_cluster(asked)
        known = _probe(cfg, asked, scans.channels) if asked.probe else speed.constants(asked.constants)
    return planner.make(cfg, scans, found, asked.resources, known, root=asked.root)


def _numbered(cfg: classes.Config, count: int) -> classes.Config:
    """``cfg``, with classes where it names none."""
    if count < 2:
        raise UserError(f"--classes {count} leaves nothing beside background; give 2 or more")
    named = cfg.classes or cfg.regions
    return cfg if named else replace(cfg, classes=tuple(f"class {k}" for k in range(1, count)))


def _probe(cfg: Planned, asked: Question, channels: int) -> Constants:
    """Measure the constants of the connected cluster and store them."""
    from logonet.planning import measuring

    executor = RayExecutor(replace(asked.resources, workers=asked.resources.most))
    at = speed.place(hardware.connected_cluster(), executor.resources)
    listed = asked.data and not _is_import(asked.data)
    some = _some(importers.sources(asked.data, cfg.data.channels)) if listed else []
    with tempfile.TemporaryDirectory(prefix="logonet-plan-") as folder:
        work, root = planner.work(cfg, at.gpu, channels), asked.root or folder
        known = measuring.measure(cfg, work, root, executor, at, asked.probe, some)
    default = "plan-constants.json"
    where = asked.constants or (object_store.join(asked.root, default) if asked.root else default)
    object_store.write(where, known.to_json())
    print(f"constants   {where}", flush=True)
    return known


def triple(text: str, flag: str, number: Callable[[str], Any]) -> Any:
    """``512x512x400`` as three numbers; None for ""."""
    if not text:
        return None
    try:
        values = tuple(number(part) for part in text.lower().split("x"))
    except ValueError:
        values = ()
    if len(values) != 3 or min(values) <= 0:
        raise UserError(f"{flag} is '{text}'; give three numbers above 0, such as 512x512x400")
    return values


# ---------------------------------------------------------------------------------------------- scans


def find_scans(cfg: Planned, asked: Question) -> Scans:
    """The scans: as described by flags, imported, or listed.

    Raises:
        UserError: the flags say nothing about scans, or there are none.
    """
    shape, spacing = triple(asked.shape, "--shape", int), triple(asked.spacing, "--spacing", float)
    if not asked.scans and not asked.data:
        raise UserError("there are no scans to plan for; give --data, or --scans with --shape")
    if asked.scans and shape is None:
        raise UserError(f"--scans {asked.scans} gives no size; add --shape, such as 512x512x400")
    if asked.import_scans and not asked.root:
        raise UserError("--import-scans keeps what it finds under --root, which is missing")
    if not asked.scans and (asked.import_scans or _is_import(asked.data)):
        uri = asked.data
        if asked.import_scans:
            executor = RayExecutor(asked.resources)
            uri = pipelines.import_scans(uri, asked.root, executor, cfg.data.channels)[1].uri
        table, where = pipelines.open_manifest(uri), f"the import at {uri}"
        if isinstance(cfg, Finetuning):
            return labelled.of_split(table, cfg, where)
        return sizes.of_manifest(training_part(table, cfg.split), where)
    if asked.scans:
        found = sizes.equal_scans(asked.scans, shape, spacing, len(cfg.data.channels) or asked.channels)
    else:
        found = _listed(asked.data, shape, spacing, cfg.data.channels, isinstance(cfg, Finetuning))
    if isinstance(cfg, Finetuning):
        return labelled.parted(found, cfg.split)
    if cfg.split is None:
        return found
    # Only an import tells which scans are held out.
    return replace(found, known_from=f"{found.known_from} (with the split's test and validation scans)")


def _is_import(uri: str) -> bool:
    found = artifacts.find(uri)
    return found is not None and found.stage == "manifest"


def _listed(data: str, shape: Any, spacing: Any, names: Sequence[str], with_labels: bool) -> Scans:
    """Listed scans with channels of these ``names``, all or those with labels: the size of each, one shape for all."""
    found = [s for s in importers.sources(data, names) if s.label_uri or not with_labels]
    if not found:
        raise UserError(f"no scan listed at {data} has a label; 'logonet data check' says what is found")
    how, stored = "with the --shape given", 0.0
    channels = len(names) or 1
    if shape is None:
        rows = [r for r in map(manifest.inspect, _some(found)) if isinstance(r, manifest.Scan)]
        if not rows:
            raise UserError(f"none of the scans read in {data} is good; 'logonet data check' says why")
        middle = sorted(map(sizes.of_row, rows), key=lambda s: s.voxels)[len(rows) // 2]
        shape, spacing, stored = middle.shape_vox, middle.spacing_mm, middle.stored_bytes
        channels = middle.channels
        how = f"with the shape of the middle one of {len(rows)} that were read"
    usual = stored or sizes.equal_scans(1, shape, channels=channels).stored_bytes
    # As long as an import's ids, which end in 10 digits of a hash.
    ids = [f"{s.case or manifest.stem(s.uri)}-{'0' * 10}" for s in found]
    scans = tuple(Scan(i, shape, spacing, s.size_bytes or usual, channels) for i, s in zip(ids, found))
    return Scans(scans, f"{len(found):,} listed at {data}, {how}")


def _some(found: list[manifest.Source]) -> list[manifest.Source]:
    """The smallest, the middle and the largest file, to read their shapes."""
    by_size = sorted(found, key=lambda s: s.size_bytes)
    return [by_size[i] for i in sorted({0, len(by_size) // 2, len(by_size) - 1})]


# -------------------------------------------------------------------------------------------- cluster


def find_cluster(asked: Question) -> Cluster:
    """The cluster in a file, nodes of one kind by flags, the Ray cluster at RAY_ADDRESS, or this machine."""
    table = hardware.prices(asked.prices)
    found = _find_cluster(asked, table)
    zones, nat = asked.zones or found.zones, asked.nat or found.nat
    return replace(found, zones=zones, nat=nat, traffic_prices=table.traffic)


def _find_cluster(asked: Question, table: hardware.Prices) -> Cluster:
    if asked.cluster:
        return hardware.read_cluster(asked.cluster, table)
    node = {name: value for name, value in vars(asked.node).items() if value is not None}
    if asked.machine or node:
        entry = {"nodes": asked.nodes, "spot": asked.spot, "machine": asked.machine, **node}
        pool = hardware.pool_of(entry, table, "flags")
        source = f"{table.note} ({table.dated})" if asked.machine else "flags"
        known = f"{asked.nodes} x {pool.name}, {source}"
        return Cluster((pool,), currency=table.currency, known_from=known)
    if cluster.address() is not None:
        with cluster.connected(asked.resources):
            return hardware.connected_cluster(table.currency)
    return hardware.this_machine(table.currency)
