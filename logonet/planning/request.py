"""From what a user says of scans, cluster and constants to a plan."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from logonet import pipelines
from logonet.core.errors import UserError
from logonet.data import importers, manifest
from logonet.distributed import cluster
from logonet.distributed.cluster import Resources
from logonet.distributed.executor import RayExecutor
from logonet.pipelines import Pretraining
from logonet.pipelines.pretraining import training_part
from logonet.planning import constants, hardware, planner, sizes
from logonet.planning.constants import Constants
from logonet.planning.hardware import Cluster
from logonet.planning.sizes import Scan, Scans
from logonet.storage import artifacts, object_store

LOOKED_AT = (
    3  # scans of a listing that are read for their shape: the smallest, the middle and the largest file
)
STATTED = 32  # labels whose size is asked for


@dataclass(frozen=True)
class Question:
    """What ``logonet plan`` is given (`cli.PlanArgs`)."""

    data: str = ""
    scans: int = 0
    shape_vox: tuple[int, int, int] | None = None
    spacing_mm: tuple[float, float, float] | None = None
    import_scans: bool = False
    root: str = ""
    resources: Resources = field(default_factory=Resources)
    cluster: str = ""
    machine: str = ""
    node: dict[str, Any] = field(default_factory=dict)
    nodes: int = 1
    spot: bool = False
    prices: str = ""
    constants: str = ""
    probe_s: float = 0.0


def plan(cfg: Pretraining, asked: Question) -> planner.Plan:
    """The plan of ``cfg`` (resolved)."""
    with contextlib.ExitStack() as stack:
        if asked.probe_s or asked.import_scans:
            stack.enter_context(cluster.connected(asked.resources))
        scans = find_scans(cfg, asked)
        found = find_cluster(asked)
        if asked.probe_s:
            known = _measured(cfg, asked)
        else:
            known = constants.read(asked.constants) if asked.constants else constants.defaults()
        local = bool(asked.root) and not object_store.is_s3(asked.root) and found.nodes == 1
        return planner.make(cfg, scans, found, asked.resources, known, local_root=local)


def _measured(cfg: Pretraining, asked: Question) -> Constants:
    from logonet.planning import measuring

    use_gpu = cluster.allocate(asked.resources).use_gpu
    some = _some(importers.sources(asked.data)) if asked.data and not _is_artifact(asked.data) else []
    with _somewhere(asked.root) as root:
        known = measuring.measure(cfg, planner.work(cfg, use_gpu), root, asked.resources, asked.probe_s, some)
    where = asked.constants or (
        object_store.join(asked.root, "plan-constants.json") if asked.root else "plan-constants.json"
    )
    object_store.write(where, known.to_json())
    print(f"constants   {where}", flush=True)
    return known


@contextlib.contextmanager
def _somewhere(root: str) -> Iterator[str]:
    """``root``, or a folder that goes again."""
    if root:
        yield root
        return
    with tempfile.TemporaryDirectory(prefix="logonet-plan-") as folder:
        yield folder


def triple(text: str, flag: str, number: Callable[[str], Any]) -> Any:
    """``512x512x400`` as three numbers; None of ""."""
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


def find_scans(cfg: Pretraining, asked: Question) -> Scans:
    """What there is to read: told, imported, or listed.

    Raises:
        UserError: nothing is said of the scans, or nothing is there.
    """
    if asked.scans:
        if asked.shape_vox is None:
            raise UserError(
                f"--scans {asked.scans} says nothing of how large they are; give --shape, such as 512x512x400"
            )
        return _split_unknown(cfg, sizes.equal_scans(asked.scans, asked.shape_vox, asked.spacing_mm))
    if not asked.data:
        raise UserError("there are no scans to plan for; give --data, or --scans with --shape")
    if asked.import_scans:
        if not asked.root:
            raise UserError("--import-scans keeps what it finds under --root, which is missing")
        table, made = pipelines.import_scans(asked.data, asked.root, RayExecutor(asked.resources))
        return sizes.of_manifest(training_part(table, cfg.split), f"the import at {made.uri}")
    if _is_artifact(asked.data):
        table = pipelines.open_manifest(asked.data)
        return sizes.of_manifest(training_part(table, cfg.split), f"the import at {asked.data}")
    return _split_unknown(cfg, _listed(asked))


def _is_artifact(uri: str) -> bool:
    found = artifacts.find(uri)
    return found is not None and found.stage == "manifest"


def _split_unknown(cfg: Pretraining, scans: Scans) -> Scans:
    """Who is held out is known of an import alone; until then all scans count, so that the plan errs upwards."""
    if cfg.split is None:
        return scans
    return replace(scans, known_from=f"{scans.known_from} (with the split's test and validation scans)")


def _listed(asked: Question) -> Scans:
    """Scans of a listing: their sizes, and one shape for all."""
    found = importers.sources(asked.data)
    if not found:
        raise UserError(f"there are no scans at {asked.data}")
    shape, spacing, per_file = asked.shape_vox, asked.spacing_mm, 0.0
    how = "with the --shape given"
    if shape is None:
        rows = [r for r in map(manifest.inspect, _some(found)) if isinstance(r, manifest.Scan)]
        if not rows:
            raise UserError(
                f"none of the scans looked at in {asked.data} can be read; 'logonet data check' says why"
            )
        middle = sorted(map(sizes.of_row, rows), key=lambda s: s.voxels)[len(rows) // 2]
        shape, spacing, per_file = middle.shape_vox, middle.spacing_mm, middle.stored_bytes
        how = f"with the shape of the middle one of {len(rows)} that were read"
    known = [s.size_bytes for s in found if s.size_bytes]
    usual = statistics.mean(known) if known else per_file or sizes.equal_scans(1, shape).stored_bytes
    rows_of = tuple(
        Scan(f"{manifest.stem(s.uri)}-{'0' * 10}", shape, spacing, s.size_bytes or usual) for s in found
    )
    return Scans(rows_of, f"{len(found):,} listed at {asked.data}, {how}", _label_bytes(found))


def _some(found: list[manifest.Source]) -> list[manifest.Source]:
    by_size = sorted(found, key=lambda s: s.size_bytes)
    places = {0, len(by_size) // 2, len(by_size) - 1}
    return [by_size[i] for i in sorted(places)][:LOOKED_AT]


def _label_bytes(found: list[manifest.Source]) -> float:
    """Of all labels, from some of them."""
    labels = [s.label_uri for s in found if s.label_uri]
    some = [
        e.size_bytes
        for uri in labels[:: max(1, len(labels) // STATTED)]
        if (e := object_store.stat(uri)) is not None
    ]
    return statistics.mean(some) * len(labels) if some else 0.0


# -------------------------------------------------------------------------------------------- cluster


def find_cluster(asked: Question) -> Cluster:
    """The cluster that is asked about: a file's, so many of one machine, the one that is connected, or this machine."""
    table = hardware.prices(asked.prices)
    if asked.cluster:
        return hardware.read_cluster(asked.cluster, table)
    if asked.machine or asked.node:
        name = {"machine": asked.machine} if asked.machine else {}
        pool = hardware.pool_of(
            {**name, "nodes": asked.nodes, "spot": asked.spot, **asked.node}, table, "flags"
        )
        rests = f"{table.note} ({table.dated})" if asked.machine else "flags"
        known = f"{asked.nodes} x {pool.name}, {rests}"
        return Cluster((pool,), currency=table.currency, known_from=known)
    if cluster.address() is not None:
        with cluster.connected(asked.resources):
            return hardware.connected_cluster(table.currency)
    return hardware.this_machine(table.currency)
