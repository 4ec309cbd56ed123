"""All problems of a data set before it is used: of each case by itself, then of the cases together.

``check`` reads one case and collects its problems, so many workers can map it; ``problems`` adds those that only show
across cases; ``table`` prints them all. ``manifest.inspect`` accepts a case without errors. Peak memory is that of one
decoded scan and one label map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from logonet.core import tables
from logonet.core.errors import BadScan, plain
from logonet.data import manifest, scan_hash, volume
from logonet.data.manifest import Grid, Source
from logonet.storage import object_store

ERROR, WARNING = "error", "warning"
MAX_ANISOTROPY = 3.0  # longest over shortest voxel edge
MIN_VOXELS = 8  # along each axis
# faults of files that open: a phrase of decoding's sentence -> the check
_CONTENT = {"voxels that are not finite": "finite", "every voxel is": "constant"}


@dataclass(frozen=True)
class Problem:
    """What is wrong with the case of the scan ``uri``; ``severity`` is "error" or "warning"."""

    uri: str
    check: str
    severity: str
    sentence: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "sentence", plain(self.sentence))


@dataclass(frozen=True)
class Checked:
    """One case and its own problems; ``voxel_sha256`` is "" when the scan could not be decoded."""

    source: Source
    problems: tuple[Problem, ...]
    voxel_sha256: str = ""


def check(source: Source) -> Checked:
    """All problems of one case by itself.

    Raises:
        UserError: for what concerns every case: an unreachable store, refused credentials.
    """
    found: list[Problem] = []
    grid, voxel_sha256 = _check_image(source, found)
    if source.label_uri:
        _check_label(source, grid, found)
    return Checked(source, tuple(found), voxel_sha256)


def _check_image(source: Source, found: list[Problem]) -> tuple[Grid | None, str]:
    """The scan's grid, None when not even its header can be read, and its voxels' digest."""
    uri = source.uri
    try:
        blobs, sha256 = manifest.read_scan(source)
    except (BadScan, object_store.NotGiven) as err:
        found.append(Problem(uri, "opens", ERROR, str(err)))
        return None, ""
    if fault := manifest.checksum_fault(source, sha256):
        found.append(Problem(uri, "checksum", ERROR, fault))
    grid, voxel_sha256 = None, ""
    try:
        scan = manifest.decode(source, blobs)
        grid, voxel_sha256 = (scan.shape_xyz, scan.affine), scan_hash.voxel_sha256(scan)
        volume.modality(scan, source.modality, uri)
    except BadScan as err:
        found.append(Problem(uri, "modality" if grid else _why(err), ERROR, str(err)))
        grid = grid or (None if source.files else volume.header_grid(blobs[0], uri))
    if grid:
        found += _check_grid(uri, *grid)
    return grid, voxel_sha256


def _check_grid(uri: str, shape: tuple[int, int, int], affine: np.ndarray) -> Iterator[Problem]:
    spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
    ratio = spacing_mm.max() / spacing_mm.min()
    if spacing_mm.max() > MAX_ANISOTROPY * spacing_mm.min():
        size = " x ".join(f"{s:.3g}" for s in spacing_mm)
        said = f"{uri}: its voxels are {size} mm, {ratio:.1f} times longer than wide; set a spacing to resample to"
        yield Problem(uri, "anisotropy", WARNING, said)
    if min(shape) < MIN_VOXELS:
        size = " x ".join(map(str, shape))
        said = f"{uri}: has only {size} voxels; a crop of it is mostly padding, so leave it out"
        yield Problem(uri, "tiny", WARNING, said)


def _check_label(source: Source, image: Grid | None, found: list[Problem]) -> None:
    def add(check: str, sentence: str) -> None:
        found.append(Problem(source.uri, check, ERROR, sentence))

    held: set[int] = set()
    for uri in source.label_files or (source.label_uri,):
        if (values := _check_label_file(uri, image, add)) is None:
            return
        held |= set(values)
    declared = {v: name for v, name in enumerate(source.classes) if name}
    if declared and (undeclared := [v for v in sorted(held) if v > 0 and v not in declared]):
        odd, names = ", ".join(map(str, undeclared)), ", ".join(f"{v} {n}" for v, n in declared.items())
        add("label set", f"{uri}: holds {odd}, but the dataset declares {names}; correct one of them")
    if held == {0}:
        hint = "segment the case or leave its label out"
        add("label empty", f"{source.label_uri}: holds nothing but background; {hint}")


def _check_label_file(
    uri: str, image: Grid | None, add: Callable[[str, str], None]
) -> tuple[int, ...] | None:
    """The values of a label map's file, -1 for what is no whole number; None where it cannot be read."""
    try:
        data = manifest.read_one(uri)
    except (BadScan, object_store.NotGiven) as err:
        add("label opens", str(err))
        return None
    try:
        label = volume.decode(uri, [(uri, data)], allow_constant=True)
        label = volume.turned(label, image[1]) if image else label
    except BadScan as err:
        label = None
        add(f"label {_why(err)}", str(err))
    grid = volume.header_grid(data, uri) if label is None else (label.shape_xyz, label.affine)
    if grid and image:
        for name, sentence in manifest.grid_faults(uri, grid, image).items():
            add(f"label {name}", sentence)
    if label is None:
        return None
    try:
        labels_XYZ, wrong_values = manifest.to_labels(label, uri)
    except BadScan as err:
        add("label values", str(err))
        return None
    if wrong_values:
        add("label values", wrong_values)
    values = manifest.label_values_of(labels_XYZ)
    return (*values, -1) if wrong_values else values


def _why(err: BadScan) -> str:
    return next((check for phrase, check in _CONTENT.items() if phrase in str(err)), "opens")


# -------------------------------------------------------------------------------------------- together


def problems(checked: Sequence[Checked]) -> list[Problem]:
    """Every problem of every case, those that only show across cases included, in the order of the cases."""
    found = [p for c in checked for p in c.problems]
    found += [*_duplicates(checked), *_subjects(checked), *_unlabelled(checked)]
    order = {c.source.uri: i for i, c in enumerate(checked)}
    return sorted(found, key=lambda p: (order[p.uri], p.severity))


def _duplicates(checked: Sequence[Checked]) -> Iterator[Problem]:
    first: dict[str, str] = {}
    for c in (c for c in checked if c.voxel_sha256):
        if c.voxel_sha256 not in first:
            first[c.voxel_sha256] = c.source.uri
            continue
        uri, other = c.source.uri, first[c.voxel_sha256]
        what = "is listed twice" if other == uri else f"has the same voxels as {other}"
        yield Problem(uri, "duplicate", ERROR, f"{uri}: {what}; keep one of them")


def _subjects(checked: Sequence[Checked]) -> Iterator[Problem]:
    """Scans of one subject on both sides of a split teach a network what it is tested on."""
    first: dict[tuple[str, str, str], Source] = {}
    for source in (c.source for c in checked):
        for what, here, there in (("split", "the split '{}'", "'{}'"), ("fold", "fold {}", "fold {}")):
            if what == "fold" and source.split != "train":
                continue
            other = first.setdefault((what, source.dataset, source.subject), source)
            if getattr(other, what) != getattr(source, what):
                here, there = here.format(getattr(source, what)), there.format(getattr(other, what))
                said = f"{source.uri}: subject {source.subject} is in {here} here and in {there} with {other.uri}"
                yield Problem(source.uri, "subject", ERROR, f"{said}; give a subject one {what}")


def _unlabelled(checked: Sequence[Checked]) -> Iterator[Problem]:
    """Scans without a label in a dataset with labels: an error where the dataset declares classes."""
    labelled = {c.source.dataset for c in checked if c.source.label_uri}
    for source in (c.source for c in checked):
        if source.label_uri or source.split == "test" or source.dataset not in labelled:
            continue
        said = f"{source.uri}: has no label, though others of the dataset '{source.dataset}' have"
        severity = ERROR if source.classes else WARNING
        yield Problem(source.uri, "label missing", severity, f"{said}; add it or move the scan to 'test'")


def failed(found: Iterable[Problem]) -> bool:
    """Whether a problem is an error, so that a job should stop."""
    return any(p.severity == ERROR for p in found)


def table(found: Sequence[Problem], cases: int) -> str:
    """Every offender in a table for people, and a line that says how many of the ``cases`` are fine."""
    root = _common_folder([p.uri for p in found])
    rows = []
    for p in found:
        sentence = p.sentence.removeprefix(f"{p.uri}: ")
        sentence = sentence.replace(root, "") if root else sentence
        rows.append((plain(p.uri.removeprefix(root)), p.check, p.severity, sentence))
    wrong = {p.uri for p in found if p.severity == ERROR}
    warned = {p.uri for p in found} - wrong
    summary = f"{cases - len(wrong) - len(warned)} of {cases} cases are fine"
    if not found:
        return f"{summary}\n"
    columns = ("scan", "check", "severity", "what is wrong")
    text = tables.to_text(columns, rows, title=f"below {root}" if root else "")
    return f"{text}{summary}, {len(wrong)} with errors, {len(warned)} with warnings only\n"


def _common_folder(uris: Sequence[str]) -> str:
    """The folder that all ``uris`` lie in, with its slash; "" where that is less than a bucket."""
    parts = zip(*(u.split("/")[:-1] for u in uris))
    shared = [p[0] for p in takewhile(lambda p: len(set(p)) == 1, parts)]
    return "/".join([*shared, ""]) if len(shared) > 2 else ""
