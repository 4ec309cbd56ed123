"""Test scans that a network may have been trained on: between any manifests, by bytes, voxels, likeness and subject.

Shape suffixes: N scans, M others, P cells of a perceptual hash.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from typing import ClassVar, Literal

import numpy as np

from logonet.core import tables
from logonet.core.errors import UserError
from logonet.data import scan_hash
from logonet.data.manifest import Scan

KINDS = ("file", "voxels", "fingerprint", "subject")  # strongest first
BLOCK = 128  # test scans per matrix product
CROWD = 3  # where so many scans are similar to a test scan, similarity is the rule, so more is asked for
COPY = 0.985  # so similar that it is a copy, and says nothing about how similar different scans are
# DICOM UIDs, UUIDs and digests name one patient in the world; "case_001" and "sub-01" only one in their dataset
UNIQUE_SUBJECT = re.compile(r"(?=.{20})[0-9]+(\.[0-9]+){4,}|(?=.{16})[0-9a-fA-F]+(-[0-9a-fA-F]+)*")


LeakRule = Literal["refuse", "exclude", "allow"]  # what to do with test cases that training knows


@dataclass(frozen=True)
class Trace:
    """What leaks are found by, of a scan that must not be named; ``subject`` is a digest (see `provenance`)."""

    dataset: ClassVar[str] = ""

    scan_id: str
    sha256: str
    voxel_sha256: str
    thumbprint: str
    subject: str


AnyScan = Scan | Trace


@dataclass(frozen=True)
class Leak:
    """The test scan ``scan_id`` is, or is of the same subject as, ``other_id``; ``detail`` says what was seen."""

    scan_id: str
    other_id: str
    kind: str
    detail: str


def find(test: Sequence[AnyScan], others: Sequence[AnyScan]) -> list[Leak]:
    """Every pair of a test scan and another scan that are one scan or one subject, strongest kind first.

    - "file": equal bytes. The same row in ``test`` and in ``others`` is such a pair.
    - "voxels": equal voxels in RAS axes, in another file (``scan_hash.voxel_sha256``).
    - "fingerprint": perceptual hashes more similar than ``scan_hash.SAME``. Where at least ``CROWD`` scans are that
      similar to the test scan (phantoms, brains registered to one atlas) a hash mostly shows what they share, so
      what is left after taking their mean away must be more similar than ``SAME`` too. Of 100 phantoms of one
      modality (64^3 voxels; similarities of pairs from 0.64 to 0.99), 1 test scan in 2000 then has a false alarm; what
      is left of a copy at 1.5 times the spacing has a similarity of 0.88 or more, of one with noise of 0.05 standard
      deviations of 0.95. Scans of few voxels (32^3) in a crowd are recognised with noise, not resampled.
    - "subject": equal dataset and subject. Between datasets a subject's name counts only if it is unique by its
      form (a DICOM UID, a UUID, a digest): two datasets with a "case_001" are no leak.

    A pair is reported once, by its strongest kind. If both arguments hold the same rows, duplicates within one
    manifest are looked for: a scan is not compared with itself, and (a, b) is not reported again as (b, a).

    Raises:
        UserError: for perceptual hashes of different versions.
    """
    within = sorted(s.scan_id for s in test) == sorted(s.scan_id for s in others)
    found: dict[tuple[str, str], Leak] = {}
    for kind in KINDS:
        pairs = _alike(test, others) if kind == "fingerprint" else _equal(KEYS[kind], test, others)
        for scan, other, detail in pairs:
            pair = (scan.scan_id, other.scan_id)
            if within and (pair[0] == pair[1] or pair[::-1] in found):
                continue
            found.setdefault(pair, Leak(*pair, kind, detail))
    return sorted(found.values(), key=lambda k: (KINDS.index(k.kind), k.scan_id, k.other_id))


def table(leaks: Sequence[Leak]) -> str:
    """A table for people, one row per leak; one sentence when there is none."""
    rows = [(leak.kind, leak.scan_id, leak.other_id, leak.detail) for leak in leaks]
    return tables.to_text(("kind", "test scan", "other scan", "why"), rows) if rows else "no leaks found\n"


def to_csv(leaks: Sequence[Leak]) -> bytes:
    return tables.to_csv([f.name for f in fields(Leak)], map(astuple, leaks))


# --------------------------------------------------------------------------------------------- searches

Pairs = Iterator[tuple[AnyScan, AnyScan, str]]  # a test scan, another one, what they have in common
Key = Callable[[AnyScan], tuple[str, str]]  # the key ("" for a scan without one) and how to show it


def file_key(scan: AnyScan) -> tuple[str, str]:
    return scan.sha256, f"same bytes, SHA-256 {scan.sha256[:10]}"


def voxels_key(scan: AnyScan) -> tuple[str, str]:
    return scan.voxel_sha256, f"same voxels, SHA-256 {scan.voxel_sha256[:10]}"


def subject_key(scan: AnyScan) -> tuple[str, str]:
    if UNIQUE_SUBJECT.fullmatch(scan.subject):
        return scan.subject.lower(), f"subject {scan.subject}"
    if not scan.subject:
        return "", ""
    return f"{scan.dataset}\x1f{scan.subject}", f"subject {scan.subject} of dataset {scan.dataset}"


KEYS: dict[str, Key] = {"file": file_key, "voxels": voxels_key, "subject": subject_key}


def _equal(key: Key, test: Sequence[AnyScan], others: Sequence[AnyScan]) -> Pairs:
    by_key: dict[str, list[AnyScan]] = defaultdict(list)
    for other in others:
        by_key[key(other)[0]].append(other)
    for scan in test:
        value, detail = key(scan)
        for other in by_key[value] if value else []:
            yield scan, other, detail


def _alike(test: Sequence[AnyScan], others: Sequence[AnyScan]) -> Pairs:
    """Pairs of scans whose perceptual hashes are similar."""
    scans = list({s.scan_id: s for s in (*others, *test) if s.thumbprint}.values())
    position = {s.scan_id: i for i, s in enumerate(scans)}
    is_other_M = np.zeros(len(scans), bool)
    is_other_M[[position[s.scan_id] for s in others if s.thumbprint]] = True
    wanted = [position[s.scan_id] for s in test if s.thumbprint]
    if not wanted or not is_other_M.any():
        return
    rows_MP = scan_hash.unit_rows([s.thumbprint for s in scans])
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


def refused(
    found: Sequence[Leak], num_cases: int, rule: LeakRule, hint: str = "", *, cases: str = "test cases"
) -> list[str]:
    """Ids of the cases to be judged on that leak, in order.

    Args:
        hint: where to look further, for the error.
        cases: what the error calls them.

    Raises:
        UserError: there are some, and ``rule`` is "refuse".
    """
    leaking = sorted({leak.scan_id for leak in found})
    if leaking and rule == "refuse":
        known = f"{len(leaking)} of {num_cases} {cases} are known to training or pretraining, such as {leaking[0]}"
        ways = f"set leaks=exclude to leave them out or leaks=allow to keep them{hint}"
        raise UserError(f"{known} ({found[0].kind}: {found[0].detail}); {ways}")
    return leaking
