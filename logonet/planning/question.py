"""What ``logonet plan`` is asked: its flags. Light to import, so that its help is printed at once."""

from __future__ import annotations

from dataclasses import dataclass, field

import tyro

from logonet.distributed.cluster import Resources


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
class Question:
    """What is planned: on which scans, where, from which constants.

    Attributes:
        data: the scans, as for a job, or a finished import ROOT/manifest/<id>; they are listed, and three of them read.
        scans: plan with so many scans instead, of --shape, with as many channels as data.channels names or else
            --channels.
        shape: voxels of every scan, such as 512x512x400; with --data nothing is read then.
        channels: of the scans of --scans.
        classes: of the labels, background included, where data.classes names none and no import tells.
        spacing: its mm, such as 0.8x0.8x1; what crops.spacing_mm resamples from.
        import_scans: read and check every scan of --data first, as the job would; ROOT keeps the table.
        root: where the run would keep its artifacts; --probe and --import-scans write there.
        resources: what the run may use.
        cluster: YAML of pools of machines (docs/planning.md); empty for --machine, else RAY_ADDRESS, else this machine.
        machine: a name of the price table, --nodes of them.
        node: what a node has, by hand.
        nodes: how many.
        spot: at the spot price.
        zones: availability zones that the nodes are spread over; 0 for what --cluster says, else 1.
        nat: nodes reach the store through a NAT gateway.
        prices: YAML of machines and prices; empty for the package's examples.
        constants: measured numbers, as --probe stores them; where it goes with --probe.
        probe: measure them first, on the cluster at RAY_ADDRESS or on this machine, in about so many seconds.
    """

    data: str = ""
    scans: int = 0
    shape: str = ""
    channels: int = 1
    classes: int = 2
    spacing: str = ""
    import_scans: tyro.conf.FlagCreatePairsOff[bool] = False
    root: str = ""
    resources: tyro.conf.OmitArgPrefixes[Resources] = field(default_factory=Resources)
    cluster: str = ""
    machine: str = ""
    node: tyro.conf.OmitArgPrefixes[NodeArgs] = field(default_factory=NodeArgs)
    nodes: int = 1
    spot: tyro.conf.FlagCreatePairsOff[bool] = False
    zones: int = 0
    nat: tyro.conf.FlagCreatePairsOff[bool] = False
    prices: str = ""
    constants: str = ""
    probe: float = 0.0
