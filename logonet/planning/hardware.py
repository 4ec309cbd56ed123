"""Machines, clusters of them, and what they cost."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Annotated, Any

from annotated_types import Len

from logonet.core import config
from logonet.core.config import Count, Natural, NonNegative, Positive
from logonet.core.errors import UserError
from logonet.distributed import cluster as ray_cluster
from logonet.distributed import ray_compat
from logonet.storage import object_store

GIB = 1 << 30
RAY_STORE_OF_MEMORY = 0.3  # Ray's default share of a node's memory for its object store
SHM_OF_STORE = 0.95  # Ray's limit: its object store takes at most this share of /dev/shm


@dataclass(frozen=True)
class Machine:
    """One kind of node.

    Attributes:
        cpus: logical cores.
        memory_gib: RAM.
        gpu_memory_gib: memory of one GPU.
        gpu_tflop_s: a GPU's dense bfloat16 peak from its data sheet; used when no step was measured.
        shm_gib: /dev/shm; None for a third of the memory, as cluster.yaml sets it.
        disk_gib: local disk.
        network_gbit_s: sustained rate to other nodes and to the store.
        latency_s: between two nodes.
        price_per_h: on demand.
        spot_price_per_h: as a spot node; None where it is not known.
    """

    cpus: NonNegative
    memory_gib: Positive
    gpus: Natural = 0
    gpu: str = ""
    gpu_memory_gib: NonNegative = 0.0
    gpu_tflop_s: NonNegative = 0.0
    shm_gib: NonNegative | None = None
    disk_gib: Positive = 100.0
    network_gbit_s: Positive = 10.0
    latency_s: NonNegative = 50e-6
    price_per_h: NonNegative = 0.0
    spot_price_per_h: NonNegative | None = None

    @property
    def memory_bytes(self) -> float:
        return self.memory_gib * GIB

    @property
    def shm_bytes(self) -> float:
        return self.memory_bytes / 3 if self.shm_gib is None else self.shm_gib * GIB

    @property
    def network_bytes_s(self) -> float:
        return self.network_gbit_s * 1e9 / 8

    def store_bytes(self, object_store_mb: int) -> float:
        """Size of Ray's object store on this node: the requested one, else Ray's default."""
        if object_store_mb:
            return object_store_mb * (1 << 20)
        return min(RAY_STORE_OF_MEMORY * self.memory_bytes, SHM_OF_STORE * self.shm_bytes)


@dataclass(frozen=True)
class TrafficPrices:
    """What it costs to move 10^9 bytes: between two zones, in both directions together, and through a NAT gateway."""

    zones_per_gb: NonNegative = 0.0
    nat_per_gb: NonNegative = 0.0


@dataclass(frozen=True)
class Pool:
    """``nodes`` machines of one kind."""

    name: str
    machine: Machine
    nodes: Count = 1
    spot: bool = False

    @property
    def price_per_h(self) -> float:
        each = self.machine.spot_price_per_h if self.spot else self.machine.price_per_h
        if each is None:
            hint = "give spot_price_per_h, or plan it on demand"
            raise UserError(f"{self.name} has no spot price in the price table; {hint}")
        return self.nodes * each


@dataclass(frozen=True)
class Cluster:
    """All nodes of a run.

    Attributes:
        head: runs the driver and no tasks or workers; None when the first pool's first node runs the driver.
        preemptions_per_node_h: how often a spot node is taken away.
        zones: availability zones that the nodes are spread over.
        nat: whether nodes reach the store through a NAT gateway.
    """

    pools: Annotated[tuple[Pool, ...], Len(1)]
    head: Pool | None = None
    currency: str = "USD"
    preemptions_per_node_h: NonNegative = 0.0
    zones: Count = 1
    nat: bool = False
    traffic_prices: TrafficPrices = field(default_factory=TrafficPrices)
    known_from: str = ""

    @property
    def cpus(self) -> float:
        return sum(p.nodes * p.machine.cpus for p in self.pools)

    @property
    def gpus(self) -> int:
        return sum(p.nodes * p.machine.gpus for p in self.pools)

    @property
    def nodes(self) -> int:
        return sum(p.nodes for p in self.pools)

    def money(self, hours: float, training_hours: float) -> float:
        """GPU pools are paid for while they train, all others for the whole time."""
        pools = [*self.pools, self.head] if self.head else self.pools
        return sum(p.price_per_h * (training_hours if p.machine.gpus else hours) for p in pools)


@dataclass(frozen=True)
class Prices:
    """A price table: machines by name, and traffic."""

    currency: str
    dated: str
    note: str = ""
    machines: Mapping[str, Machine] = field(default_factory=dict)
    traffic: TrafficPrices = field(default_factory=TrafficPrices)


def prices(uri: str = "") -> Prices:
    """The price table at ``uri``, or the package's examples."""
    if uri:
        text, source = object_store.read(uri).decode(), uri
    else:
        text = resources.files("logonet.planning").joinpath("prices.yaml").read_text()
        source = "the package's prices.yaml"
    values = config.read_yaml(text, source)
    machines = values.pop("machines", None)
    if not isinstance(machines, dict) or not machines:
        raise UserError(f"{source} has no mapping 'machines' of names to what a node has and costs")
    traffic = config.from_dict(TrafficPrices, values.pop("traffic", {}), f"{source}: traffic")
    table = config.from_dict(Prices, {key: str(value) for key, value in values.items()}, source)
    read = {str(n): config.from_dict(Machine, m or {}, f"{source}: {n}") for n, m in machines.items()}
    return replace(table, machines=read, traffic=traffic)


def read_cluster(uri: str, table: Prices) -> Cluster:
    """A cluster's YAML file: ``pools``, ``head``, and keys of `Cluster` (see docs/planning.md)."""
    values = config.read_yaml(object_store.read(uri).decode(), uri)
    entries = values.get("pools", [])
    if not isinstance(entries, list):
        raise UserError(f"{uri} has no list 'pools' of {{machine: NAME, nodes: N}}")
    pools = [pool_of(entry, table, f"{uri}: pools[{i}]") for i, entry in enumerate(entries)]
    values["pools"] = list(map(config.to_dict, pools))
    if values.get("head"):
        values["head"] = config.to_dict(pool_of(values["head"], table, f"{uri}: head"))
    return replace(config.from_dict(Cluster, values, uri), currency=table.currency, known_from=uri)


def pool_of(entry: Any, table: Prices, where: str) -> Pool:
    """A pool from {machine, nodes, spot} and keys of `Machine`, which replace those of the price table."""
    if not isinstance(entry, dict):
        raise UserError(f"{where} must be a mapping such as {{machine: NAME, nodes: 4}}, not {entry!r}")
    own = dict(entry)
    name = str(own.pop("machine", ""))
    pool = {"name": name or "own machine"} | {k: own.pop(k) for k in ("nodes", "spot") if k in own}
    if name and name not in table.machines:
        what = config.unknown("machine", name, table.machines)
        raise UserError(f"{where}: {what}; --prices FILE can have others")
    base = config.to_dict(table.machines[name]) if name else {}
    return config.from_dict(Pool, {**pool, "machine": {**base, **own}}, where)


def this_machine(currency: str = "USD") -> Cluster:
    """The machine that runs this process, free of charge."""
    memory = ray_compat.memory_bytes()
    shm = shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else memory / 3
    machine = Machine(
        cpus=os.cpu_count() or 1,
        memory_gib=round(memory / GIB, 1),
        shm_gib=round(shm / GIB, 1),
        disk_gib=max(0.1, round(shutil.disk_usage(tempfile.gettempdir()).free / GIB, 1)),
    )
    return Cluster((Pool("this machine", machine),), currency=currency, known_from="this machine")


def connected_cluster(currency: str = "USD") -> Cluster:
    """The Ray cluster that this process is connected to, free of charge; nodes of equal resources form a pool."""
    machines: Counter[Machine] = Counter()
    # A head without CPUs runs no tasks.
    for node in (n for n in ray_cluster.node_resources() if n.get("CPU")):
        shared_gib = node.get("object_store_memory", 0.0) / GIB
        machine = Machine(
            # A Ray of our own has more logical CPUs than the machine has cores.
            cpus=node["CPU"] if ray_cluster.address() else min(node["CPU"], os.cpu_count() or 1),
            # Ray's "memory" is what tasks may use, without its object store.
            memory_gib=round(node.get("memory", 0.0) / GIB + shared_gib, 1),
            gpus=int(node.get("GPU", 0)),
            gpu=next((key.partition(":")[2] for key in node if key.startswith("accelerator_type:")), ""),
            shm_gib=round(shared_gib / SHM_OF_STORE, 2),
        )
        machines[machine] += 1
    pools = tuple(Pool(f"node with {m.cpus:g} CPUs", m, count) for m, count in machines.items())
    return Cluster(pools, currency=currency, known_from="the connected Ray cluster")
