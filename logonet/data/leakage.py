"""Test scans that a network may have seen: between any manifests, by bytes, voxels, likeness and subject.

Shape suffixes: N scans, M others, P cells of a print.
"""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np

from logonet.data import scan_hash
from logonet.data.manifest import Scan

KINDS = ("file", "voxels", "fingerprint", "subject")  # strongest first
BLOCK = 128  # test scans per matrix product
CROWD = 3  # this many scans like a test scan: being alike is the rule here, so more is asked for
COPY = 0.985  # so alike that it is a copy, and says nothing about how alike different scans are
# DICOM UIDs, UUIDs and digests name one patient in the world; "case_001" and "sub-01" only one in their dataset
UNIQUE_SUBJECT = re.compile(r"(?=.{20})[0-9]+(\.[0-9]+){4,}|(?=.{16})[0-9a-fA-F]+(-[0-9a-fA-F]+)*")


@dataclass(frozen=True)
class Leak:
    """The test scan ``scan_id`` is, or is of the same subject as, ``other_id``; ``detail`` says what was seen."""

    scan_id: str
    other_id: str
    kind: str
    detail: str


def find(test: Sequence[Scan], others: Sequence[Scan]) -> list[Leak]:
    """Every pair of a test scan and another scan that are one scan or one subject, strongest kind first.

    - "file": equal bytes. The same row in ``test`` and in ``others`` is such a pair.
    - "voxels": equal voxels in RAS axes, in another file (``fingerprints.voxel_sha256``).
    - "fingerprint": prints more alike than ``fingerprints.SAME``. Where at least ``CROWD`` scans are that much
      like the test scan (phantoms, brains registered to one atlas) a print mostly shows what they share, so
      what is left after taking their mean away must be more alike than ``SAME`` too. Of 100 phantoms of one
      modality (64^3 voxels; pairs alike by 0.64 to 0.99), 1 test scan in 2000 then has a false alarm; what is
      left of a copy at 1.5 times the spacing is alike by 0.88 or more, of one with noise of 0.05 standard
      deviations by 0.95. Scans of few voxels (32^3) in a crowd are recognised with noise, not resampled.
    - "subject": equal dataset and subject. Between datasets a subject's name counts only if it is unique by its
      form (a DICOM UID, a UUID, a digest): two datasets with a "case_001" are no leak.

    A pair is reported once, by its strongest kind. If both arguments hold the same rows, duplicates within one
    manifest are looked for: a scan is not compared with itself, and (a, b) is not reported again as (b, a).

    Raises:
        UserError: for prints of different versions.
    """
    within = sorted(s.scan_id for s in test) == sorted(s.scan_id for s in others)
    found: dict[tuple[str, str], Leak] = {}
    searches = (_equal(_file), _equal(_voxels), _alike, _equal(_subject))
    for kind, search in zip(KINDS, searches):
        for scan, other, detail in search(test, others):
            pair = (scan.scan_id, other.scan_id)
            if within and (pair[0] == pair[1] or pair[::-1] in found):
                continue
            found.setdefault(pair, Leak(*pair, kind, detail))
    return sorted(found.values(), key=lambda k: (KINDS.index(k.kind), k.scan_id, k.other_id))


def table(leaks: Sequence[Leak]) -> str:
    """A table for people, one row per leak; one sentence when there is none."""
    from rich.console import Console
    from rich.table import Table

    if not leaks:
        return "no leaks found\n"
    rows = Table()
    for head in ("kind", "test scan", "other scan", "why"):
        rows.add_column(head, overflow="fold")
    for leak in leaks:
        rows.add_row(leak.kind, leak.scan_id, leak.other_id, leak.detail)
    text = io.StringIO()
    # wide: a pipe has no width, and a cut table hides what it was printed for
    Console(file=text, width=160, highlight=False, markup=False).print(rows)
    return text.getvalue()


def to_csv(leaks: Sequence[Leak]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([f.name for f in fields(Leak)])
    writer.writerows(astuple(leak) for leak in leaks)
    return text.getvalue().encode()


# --------------------------------------------------------------------------------------------- searches

Found = Iterator[tuple[Scan, Scan, str]]


def _equal(key: Callable[[Scan], tuple[str, str]]) -> Callable[[Sequence[Scan], Sequence[Scan]], Found]:
    """A search for pairs with the same key; ``key`` gives it with the detail, and "" for a scan without one."""

    def search(test: Sequence[Scan], others: Sequence[Scan]) -> Found:
        by_key: dict[str, list[Scan]] = defaultdict(list)
        for other in others:
            by_key[key(other)[0]].append(other)
        for scan in test:
            value, detail = key(scan)
            for other in by_key.get(value, []) if value else []:
                yield scan, other, detail

    return search


def _file(scan: Scan) -> tuple[str, str]:
    return scan.sha256, f"same bytes, SHA-256 {scan.sha256[:10]}"


def _voxels(scan: Scan) -> tuple[str, str]:
    return scan.voxel_sha256, f"same voxels, SHA-256 {scan.voxel_sha256[:10]}"


def _subject(scan: Scan) -> tuple[str, str]:
    if UNIQUE_SUBJECT.fullmatch(scan.subject):
        return scan.subject.lower(), f"subject {scan.subject}"
    if not scan.subject:
        return "", ""
    return f"{scan.dataset}\x1f{scan.subject}", f"subject {scan.subject} of dataset {scan.dataset}"


def _alike(test: Sequence[Scan], others: Sequence[Scan]) -> Found:
    pool = {s.scan_id: s for s in (*others, *test) if s.thumbprint}
    position = {scan_id: i for i, scan_id in enumerate(pool)}
    scans = list(pool.values())
    is_other_M = np.zeros(len(scans), bool)
    is_other_M[[position[s.scan_id] for s in others if s.thumbprint]] = True
    wanted = [position[s.scan_id] for s in test if s.thumbprint]
    if not wanted or not is_other_M.any():
        return
    rows_MP = scan_hash.rows([s.thumbprint for s in scans])
    for start in range(0, len(wanted), BLOCK):
        block = wanted[start : start + BLOCK]
        alike_NM = rows_MP[block] @ rows_MP.T
        alike_NM[np.arange(len(block)), block] = 0.0  # a scan with itself
        same_NM = (alike_NM >= scan_hash.SAME) & is_other_M & _apart(rows_MP, block, alike_NM)
        for n, m in zip(*np.nonzero(same_NM)):
            yield scans[block[n]], scans[m], f"similarity {alike_NM[n, m]:.3f}"


def _apart(rows_MP: np.ndarray, block: Sequence[int], alike_NM: np.ndarray) -> np.ndarray:
    """bool_NM: without a crowd, or alike even after the mean of the crowd is taken away from both prints."""
    crowd_NM = ((alike_NM >= scan_hash.SAME) & (alike_NM < COPY)).astype(np.float32)
    size_N1 = crowd_NM.sum(1, keepdims=True)
    mean_NP = crowd_NM @ rows_MP / np.maximum(size_N1, 1)
    # (a - mean) . (b - mean) and the lengths of both from products alone: no (N, M, P) array of differences
    mean_dot_NM = mean_NP @ rows_MP.T
    mean_dot_N1 = mean_dot_NM[np.arange(len(block)), block][:, None]
    square_N1 = np.einsum("np,np->n", mean_NP, mean_NP)[:, None]
    left_NM = alike_NM - mean_dot_NM - mean_dot_N1 + square_N1
    scale_NM = (1 - 2 * mean_dot_N1 + square_N1) * (1 - 2 * mean_dot_NM + square_N1)
    return (size_N1 < CROWD) | (left_NM >= scan_hash.SAME * np.sqrt(np.maximum(scale_NM, 1e-12)))
