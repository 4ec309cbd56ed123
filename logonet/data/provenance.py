"""The scans a model was trained on, as a table that may travel with the model: hashes and no names.

A registered model goes where its scans must not: file names and subjects can be patients'. Leak checks need a scan's
digests and its perceptual hash alone; its subject is replaced by a digest that equal subjects share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, fields, replace

import pandas as pd

from logonet.data.leakage import Trace, subject_key
from logonet.data.manifest import Scan
from logonet.storage import parquet

VALIDATION = "validation"


def anonymous(scans: Sequence[Scan]) -> list[Trace]:
    """``scans`` with their own ids and nothing else that names anyone, for `leakage.find` against a model's table."""
    traces = []
    for scan in scans:
        # What names the subject in `leakage`: alone where it is unique in the world, else in its dataset.
        name, _ = subject_key(scan)
        subject = hashlib.sha256(name.encode()).hexdigest() if name else ""
        traces.append(Trace(scan.scan_id, scan.sha256, scan.voxel_sha256, scan.thumbprint, subject))
    return traces


def to_bytes(scans: Sequence[Scan], role: str) -> bytes:
    """A Parquet table of ``scans``; ``role`` is their use: "training", "validation", "pretraining"."""
    return _to_parquet([replace(t, scan_id=f"{role}-{t.sha256[:10]}") for t in anonymous(scans)])


def join(*tables: bytes) -> bytes:
    """Several such tables as one. A scan of several of them is listed once, in the role it has in the first.

    Once, because `leakage.find` takes many equal hashes for a crowd of scans that are similar by nature. "validation"
    gives way to any other role: a validation case that pretraining has seen must not pass for one that chose the
    checkpoint alone.
    """
    first: dict[Trace, Trace] = {}
    for trace in (t for table in tables for t in from_bytes(table)):
        known = first.setdefault(replace(trace, scan_id=""), trace)
        if role(known) == VALIDATION:
            first[replace(trace, scan_id="")] = trace
    return _to_parquet(list(first.values()))


def role(trace: Trace) -> str:
    """What the scan was used for: the ``role`` that `to_bytes` was given."""
    return trace.scan_id.rpartition("-")[0]


def from_bytes(table: bytes) -> list[Trace]:
    """The scans of such a table, for `leakage.find`."""
    return list(parquet.from_parquet(table, Trace, "the model's table of seen scans, seen.parquet,"))


def _to_parquet(traces: Sequence[Trace]) -> bytes:
    # By pandas, whose bytes stand in the ids of splits.
    frame = pd.DataFrame([asdict(t) for t in traces], columns=[f.name for f in fields(Trace)])
    return frame.to_parquet(index=False)
