"""Which scans a model was trained on, as it may travel with the model: digests and coarse prints, no names.

A registered model goes where its scans must not: file names and subjects can be patients'. What leak checks need
of a scan are its digests and its print; its subject is replaced by a digest that equal subjects share.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace

import pandas as pd

from logonet.data import leakage
from logonet.data.manifest import Scan
from logonet.storage import parquet


@dataclass(frozen=True)
class _Row:
    scan_id: str
    sha256: str
    voxel_sha256: str
    thumbprint: str
    subject: str


COLUMNS = tuple(f.name for f in fields(_Row))
NOBODY = Scan(
    scan_id="",
    uri="",
    files=(),
    sha256="",
    voxel_sha256="",
    thumbprint="",
    size_bytes=0,
    subject="",
    dataset="",
    licence="",
    modality="",
    shape=(0, 0, 0),
    spacing_mm=(0.0, 0.0, 0.0),
    orientation="",
    dtype="",
    intensity_min=0.0,
    intensity_max=0.0,
    split="",
    fold=-1,
    label_uri="",
    label_sha256="",
    label_values=(),
    classes=(),
)


def anonymous(scans: Sequence[Scan]) -> list[Scan]:
    """``scans`` with their own ids and nothing else that names anyone, for `leaks.find` against what was seen."""
    return [
        replace(
            NOBODY,
            scan_id=scan.scan_id,
            sha256=scan.sha256,
            voxel_sha256=scan.voxel_sha256,
            thumbprint=scan.thumbprint,
            subject=_subject(scan),
        )
        for scan in scans
    ]


def _subject(scan: Scan) -> str:
    """A digest that equal subjects share: of the subject alone where that is unique in the world, as in `leaks`."""
    if not scan.subject:
        return ""
    unique = leakage.UNIQUE_SUBJECT.fullmatch(scan.subject)
    name = scan.subject.lower() if unique else f"{scan.dataset}\x1f{scan.subject}"
    return hashlib.sha256(name.encode()).hexdigest()


def to_bytes(scans: Sequence[Scan], role: str) -> bytes:
    """A parquet table of ``scans``; ``role`` is what they were for: "training", "validation", "pretraining"."""
    rows = [replace(scan, scan_id=f"{role}-{scan.sha256[:10]}") for scan in anonymous(scans)]
    return _parquet(pd.DataFrame([{c: getattr(r, c) for c in COLUMNS} for r in rows], columns=list(COLUMNS)))


def join(*tables: bytes) -> bytes:
    """Several such tables as one. A scan of several of them is listed once, in the role it has in the first.

    Once, because `leaks.find` takes many equal prints for a crowd of scans that are alike by nature.
    """
    rows = pd.concat([_frame(t) for t in tables])
    return _parquet(rows.drop_duplicates([c for c in COLUMNS if c != "scan_id"], ignore_index=True))


def from_bytes(table: bytes) -> list[Scan]:
    """The scans of such a table, for `leaks.find`."""
    return [replace(NOBODY, **row) for row in _frame(table).to_dict("records")]  # type: ignore[arg-type]


def _frame(table: bytes) -> pd.DataFrame:
    rows = parquet.from_parquet(table, _Row, "the model's table of seen scans, seen.parquet,")
    return pd.DataFrame([asdict(row) for row in rows], columns=list(COLUMNS))


def _parquet(frame: pd.DataFrame) -> bytes:
    sink = io.BytesIO()
    frame.to_parquet(sink, index=False)
    return sink.getvalue()
