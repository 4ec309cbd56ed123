"""The table of scans: where each lies, whether it can be used, its voxels' properties and its label.

``importers.sources`` lists the scans at a URI; ``inspect`` reads one of them and gives a row or the reason why there is
none, so many workers can map it; ``Manifest.of`` gathers the answers. ``load`` and ``load_label`` read a row's voxels
back, verified against the row.
"""

from __future__ import annotations

import hashlib
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from logonet.core import config, tables
from logonet.core.errors import BadScan, UserError, plain
from logonet.data import scan_hash, volume
from logonet.data.volume import Volume
from logonet.storage import object_store, parquet
from logonet.storage.parquet import Rows

MAX_LABEL = 2**14 - 1  # FreeSurfer goes to 14,175
LABEL_TOLERANCE = (
    1e-3  # between a label map's value and a whole number: rounding by a program that stores floats
)
FAR_FEWER = 8  # scans of one subject, on average, from which on a person should look
MAX_LABEL_LIKE = 256  # different values of what may be a label map
MIN_FLAT = 0.6  # share of a label map's voxels that equal their neighbour; images have noise
ID_KEYS = ("scan_id", "sha256", "dataset", "subject", "modality", "split", "fold", "label_sha256", "classes")
Grid = tuple[tuple[int, int, int], np.ndarray]  # shape and affine


@dataclass(frozen=True)
class Source:
    """One scan to inspect: a file, a header with its voxels beside it, or the folder of a DICOM series whose slices are
    ``files``. Its further channels are files too, ``channels``; the label map is one file,
    ``label_uri``, or a folder of ``label_files``, a mask for each class of ``classes``.

    ``case`` is the case's name where the file's own does not tell one case from the next, ``modality`` is what the
    dataset says, ``split`` one of "train", "val" and "test", ``fold`` the fold that the dataset puts the scan into
    (-1: none), ``classes[v]`` the declared name of label value v ("" where undeclared, () when nothing is declared),
    ``regions`` unions of values that overlap ("whole tumour:1,2,3"), which are written as ``region_values`` one after
    the other, ``sha256`` the digest that the file must have, if one is given.
    ``version`` changes whenever the scan or its label is replaced, ``size_bytes`` is 0 where it is not known.
    """

    uri: str
    files: tuple[str, ...] = ()
    channels: tuple[str, ...] = ()
    case: str = ""
    subject: str = ""
    dataset: str = ""
    licence: str = ""
    modality: str = ""
    split: str = "train"
    fold: int = -1
    label_uri: str = ""
    label_files: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    regions: tuple[str, ...] = ()
    region_values: tuple[int, ...] = ()
    sha256: str = ""
    size_bytes: int = 0
    version: str = ""


@dataclass(frozen=True)
class Scan:
    """One usable scan.

    ``scan_id`` is the file's stem and the start of its SHA-256: the same wherever the scan is stored.
    ``modality`` is "CT" for Hounsfield units, "MR" for intensities without an absolute scale, of several channels one
    for each (see ``volume.modality``). ``shape``, ``spacing_mm`` and ``orientation`` are the file's, not yet RAS.
    ``sha256`` is that of the file, or of the sorted SHA-256s of a DICOM series' slices; ``voxel_sha256`` and
    ``thumbprint`` (its perceptual hash) are those of ``scan_hash``. ``fold`` and ``classes`` are the source's;
    ``label_values`` are the values in the label, background 0 included. ``note`` says what of the files was not used,
    ``grid`` names shape and affine, ``label_like`` is the number of different values of a scan that looks like a label
    map (0: it does not).
    """

    scan_id: str
    uri: str
    files: tuple[str, ...]
    sha256: str
    voxel_sha256: str
    thumbprint: str
    size_bytes: int
    subject: str
    dataset: str
    licence: str
    modality: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    orientation: str
    dtype: str
    intensity_min: float
    intensity_max: float
    split: str
    fold: int
    label_uri: str
    label_sha256: str
    label_values: tuple[int, ...]
    classes: tuple[str, ...]
    note: str = ""
    grid: str = ""
    label_like: int = 0
    channels: tuple[str, ...] = ()
    label_files: tuple[str, ...] = ()
    regions: tuple[str, ...] = ()
    region_values: tuple[int, ...] = ()

    @property
    def num_channels(self) -> int:
        return len(self.modality.split(volume.JOIN))


@dataclass(frozen=True)
class Quarantined:
    """A scan that is left out, and the sentence that says why."""

    uri: str
    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", plain(self.reason))


@dataclass(frozen=True)
class Unread(Quarantined):
    """A scan that the store did not give. That is no fault of the scan, so the next import asks for it again."""


# -------------------------------------------------------------------------------------------- inspect


def inspect(source: Source) -> Scan | Quarantined:
    """Read, hash, decode and check one scan and its label.

    Whatever is wrong with the scan itself, a missing file included, comes back as ``Quarantined``; a scan that the
    store refuses, or gives differently each time, as ``Unread``.

    Raises:
        UserError: for what concerns every scan: an unreachable store, refused credentials.
    """
    try:
        return _inspect(source)
    except BadScan as err:
        return Quarantined(source.uri.encode(errors="backslashreplace").decode(), str(err))
    except object_store.NotGiven as err:
        return Unread(source.uri, str(err))


def _inspect(source: Source) -> Scan:
    blobs, sha256 = read_scan(source)
    if fault := checksum_fault(source, sha256):
        raise BadScan(fault)
    scan = decode(source, blobs)
    modality = volume.modality(scan, source.modality, source.uri)
    label_sha256 = ""
    label_values: tuple[int, ...] = ()
    notes = [scan.note] if scan.note else []
    if source.label_uri:
        blobs_of_label = read_label(source)
        label_sha256 = _sha256_of_label(source, blobs_of_label)
        labels_XYZ, note = decode_label(source, blobs_of_label, scan)
        label_values = label_values_of(labels_XYZ)
        notes += [note] if note else []
    told = ["uri", "files", "channels", "subject", "dataset", "licence", "split", "fold"]
    told += ["label_uri", "label_files", "classes", "regions", "region_values"]
    from_source: dict[str, Any] = {name: getattr(source, name) for name in told}
    return Scan(
        **from_source,
        # only characters that may stand in file names and object keys everywhere
        scan_id=f"{re.sub(r'[^A-Za-z0-9._-]+', '_', source.case or stem(source.uri))}-{sha256[:10]}",
        sha256=sha256,
        voxel_sha256=scan_hash.voxel_sha256(scan),
        thumbprint=scan_hash.perceptual_hash(scan),
        size_bytes=sum(map(len, blobs)),
        modality=modality,
        shape=scan.shape_xyz,
        spacing_mm=scan.spacing_mm,
        orientation=scan.orientation,
        dtype=scan.stored_dtype,
        intensity_min=float(scan.array_CXYZ.min()),
        intensity_max=float(scan.array_CXYZ.max()),
        label_sha256=label_sha256,
        label_values=label_values,
        note="; ".join(notes),
        grid=config.fingerprint(scan.shape_xyz, np.round(scan.affine, 3).tolist()),
        # A dataset that tells the modality has said that this is an image.
        label_like=0 if source.label_uri or source.modality else label_like(scan.array_CXYZ),
    )


def label_like(array_CXYZ: np.ndarray) -> int:
    """The number of different values where the voxels look like a label map's, else 0.

    A label map has few whole values from 0 on, and most of its voxels equal their neighbour.
    """
    if array_CXYZ.min() != 0 or array_CXYZ.max() >= 2**16:
        return 0
    labels_CXYZ = array_CXYZ.astype(np.uint16)
    values = int(np.count_nonzero(np.bincount(labels_CXYZ.ravel(order="K"))))
    if values > MAX_LABEL_LIKE or (labels_CXYZ != array_CXYZ).any():
        return 0
    inside_CXYZ = labels_CXYZ[:, :-1] > 0
    flat = np.count_nonzero(inside_CXYZ & (labels_CXYZ[:, :-1] == labels_CXYZ[:, 1:]))
    return values if flat >= MIN_FLAT * np.count_nonzero(inside_CXYZ) else 0


def read_scan(source: Source) -> tuple[list[bytes], str]:
    """The bytes of the scan's file or slices, and their SHA-256.

    Raises:
        BadScan: for a file that is too large or missing, or whose description no table can hold.
        NotGiven: where the store withholds it.
    """
    names = (source.uri, source.label_uri, source.subject, source.dataset, *source.classes)
    names += (*source.files, *source.channels, *source.label_files)
    for value in names:
        # half a UTF-8 letter: file systems allow it in names, JSON as "\\ud800"
        if value != value.encode(errors="ignore").decode():
            raise BadScan(f"{source.uri}: '{value}' is not UTF-8 text; rename it")
    if source.size_bytes > volume.MAX_BYTES:
        raise BadScan(f"{source.uri}: has {source.size_bytes / 2**30:.1f} GiB, too much to decode; split it")
    blobs = [read_one(uri) for uri in _files(source)]
    return blobs, _sha256_of_scan(source, blobs)


def _files(source: Source | Scan) -> tuple[str, ...]:
    """Every file of the scan, those of the first channel first."""
    return (*(source.files or (source.uri,)), *source.channels)


def checksum_fault(source: Source, sha256: str) -> str:
    """A sentence when the source gives another digest than that of what was read, else ""."""
    if source.sha256 in ("", sha256):
        return ""
    odd = f"{source.uri}: its SHA-256 begins {sha256[:10]}, not {source.sha256[:10]} as listed"
    return f"{odd}; copy the file again or correct the list"


def read_one(uri: str) -> bytes:
    """The bytes of one object, with the voxels that lie beside a header; that it is missing is a BadScan."""
    data = _read_file(uri)
    if candidates := volume.voxel_files(uri):
        beside = next((u for u in candidates if object_store.exists(u)), None)
        if beside is None:
            some = " or ".join(dict.fromkeys(PurePosixPath(u).name for u in candidates[:2]))
            raise BadScan(f"{uri}: the file with its voxels, {some}, is not beside it; copy it there")
        return volume.with_voxels(uri, data, PurePosixPath(beside).name, _read_file(beside))
    return data


def _read_file(uri: str) -> bytes:
    try:
        return object_store.read(uri)
    except object_store.NotGiven:
        raise
    except UserError:
        if object_store.exists(uri):  # raises by itself when the store as a whole is out of reach
            raise
        raise BadScan(f"{uri}: no such file; copy it there or drop it from the list") from None


def decode(source: Source | Scan, blobs: Sequence[bytes]) -> Volume:
    """The voxels of a scan from the bytes of its file, or of its slices."""
    of_first = len(blobs) - len(source.channels)
    files = list(zip(_files(source), blobs))
    first = volume.decode(source.uri, files[:of_first])
    if not source.channels:
        return first
    others = [volume.decode(uri, [(uri, data)]) for uri, data in files[of_first:]]
    try:
        return volume.stacked([first, *others])
    except BadScan as err:
        raise BadScan(f"{source.uri}: {err}") from None


def _sha256(blobs: Sequence[bytes]) -> str:
    digests = sorted(hashlib.sha256(b).hexdigest() for b in blobs)
    # a series has no order and its slices no lasting names
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _sha256_of_scan(source: Source | Scan, blobs: Sequence[bytes]) -> str:
    """The digest of a scan's one file; of several channels, which have an order, of their digests."""
    of_first = len(blobs) - len(source.channels)
    first = _sha256(blobs[:of_first])
    if not source.channels:
        return first
    return _joined([first, *(_sha256([data]) for data in blobs[of_first:])])


def _joined(digests: Iterable[str]) -> str:
    return hashlib.sha256("+".join(digests).encode()).hexdigest()


def read_label(source: Source | Scan) -> list[bytes]:
    """The bytes of the label map's file or of its masks. Raises as `read_one` does."""
    return [read_one(uri) for uri in source.label_files or (source.label_uri,)]


def _sha256_of_label(source: Source | Scan, blobs: Sequence[bytes]) -> str:
    if not source.label_files:
        return _sha256(blobs)
    names = [f"{stem(uri)}:{_sha256([data])}" for uri, data in zip(source.label_files, blobs)]
    return _joined(names)


def stem(uri: str) -> str:
    """The file's name without .nii.gz, .nrrd..."""
    name = PurePosixPath(uri).name
    return name[: len(name) - len(volume.suffix_of(name))]


def decode_label(source: Source | Scan, blobs: Sequence[bytes], image: Volume) -> tuple[np.ndarray, str]:
    """labels_XYZ uint8, or uint16 where it holds more than 255, on the image's own grid, and "" or a note; axes that
    were flipped or permuted are turned back.

    Of several masks each is the class of its name; where they overlap the first one counts, and the note says so.

    Raises:
        BadScan: for another shape or place than the image's, or values that are not integers in 0..16383.
    """
    if not source.label_files:
        return _one_label(source.label_uri, blobs[0], image), ""
    labels_XYZ, twice = np.zeros(image.shape_xyz, np.uint8), 0
    for uri, data in zip(source.label_files, blobs):
        inside_XYZ = _one_label(uri, data, image) > 0
        twice += int(np.count_nonzero(inside_XYZ & (labels_XYZ > 0)))
        labels_XYZ[inside_XYZ & (labels_XYZ == 0)] = source.classes.index(stem(uri))
    return labels_XYZ, f"{twice} voxels are in several masks; the first by name counts" if twice else ""


def _one_label(uri: str, data: bytes, image: Volume) -> np.ndarray:
    label = volume.turned(volume.decode(uri, [(uri, data)], allow_constant=True), image.affine)
    labels_XYZ, wrong_values = to_labels(label, uri)
    apart = grid_faults(uri, (label.shape_xyz, label.affine), (image.shape_xyz, image.affine))
    for sentence in filter(None, [*apart.values(), wrong_values]):
        raise BadScan(sentence)
    return labels_XYZ


def grid_faults(uri: str, label: Grid, image: Grid) -> dict[str, str]:
    """How a label's grid differs from its image's: "shape" and "affine" -> a sentence, only where it does."""
    (label_shape, label_affine), (shape, affine) = label, image
    faults = {}
    if label_shape != shape:
        faults["shape"] = f"{uri}: the label has shape {label_shape}, its image {shape}; resample it"
    worst_mm = volume.worst_shift_mm(shape, affine, label_affine)
    if worst_mm > volume.GRID_TOLERANCE_VOX * np.linalg.norm(affine[:3, :3], axis=0).min():
        faults["affine"] = (
            f"{uri}: the label lies {worst_mm:.1f} mm off its image; resample it onto the image's grid, or correct the "
            "affine that is wrong"
        )
    return faults


def to_labels(label: Volume, uri: str) -> tuple[np.ndarray, str]:
    """labels_XYZ uint8 or uint16, and "" or a sentence that says which values are no integers in 0..16383.

    Such values become 0.
    """
    if len(label.array_CXYZ) > 1:
        raise BadScan(
            f"{uri}: a label map has one channel, this one {len(label.array_CXYZ)}; save it as one map"
        )
    values_XYZ = label.array_CXYZ[0]
    with np.errstate(invalid="ignore"):  # what does not fit is found in the next line
        labels_XYZ = np.rint(values_XYZ).astype(np.uint8 if np.nanmax(values_XYZ) < 255.5 else np.uint16)
    wrong_XYZ = (np.abs(values_XYZ - labels_XYZ) > LABEL_TOLERANCE) | (labels_XYZ > MAX_LABEL)
    if not wrong_XYZ.any():
        return labels_XYZ, ""
    wrong = np.unique(values_XYZ[wrong_XYZ])
    labels_XYZ[wrong_XYZ] = 0
    some = ", ".join(f"{v:g}" for v in wrong[:3]) + (", ..." if len(wrong) > 3 else "")
    why = f"{uri}: a label map holds integers from 0 to {MAX_LABEL}, this one also {some}; correct it"
    return labels_XYZ, why


def label_values_of(labels_XYZ: np.ndarray) -> tuple[int, ...]:
    return tuple(int(v) for v in np.flatnonzero(np.bincount(labels_XYZ.ravel(order="K"), minlength=1)))


def read_row(scan: Scan) -> list[bytes]:
    """The bytes of a row's files, known to be the row's.

    Raises:
        UserError: when they are not, or not there: the manifest no longer holds, so the run must stop.
    """
    if not scan.files and not scan.channels and not volume.voxel_files(scan.uri):
        return [object_store.read(scan.uri, size_bytes=scan.size_bytes, sha256=scan.sha256)]
    blobs = [read_one(uri) for uri in _files(scan)]
    if _sha256_of_scan(scan, blobs) != scan.sha256:
        raise object_store.IntegrityError(f"{scan.uri}: its files are not the manifest's; import it again")
    return blobs


def load(scan: Scan) -> Volume:
    """The voxels of a manifest's row; raises as `read_row` does."""
    return decode(scan, read_row(scan))


def load_label(scan: Scan, image: Volume) -> np.ndarray:
    """labels_XYZ uint8 of a labelled row, on the grid of ``image = load(scan)``."""
    assert scan.label_uri, scan.uri
    if not scan.label_files and not volume.voxel_files(scan.label_uri):
        return decode_label(scan, [object_store.read(scan.label_uri, sha256=scan.label_sha256)], image)[0]
    blobs = read_label(scan)
    if _sha256_of_label(scan, blobs) != scan.label_sha256:
        raise object_store.IntegrityError(
            f"{scan.label_uri}: its masks are not the manifest's; import it again"
        )
    return decode_label(scan, blobs, image)[0]


# ------------------------------------------------------------------------------------------- manifest


def _suspicion(scan: Scan, image: Scan) -> str:
    hint = "list the two in a CSV with the columns image,label; if it is an image, list it with its modality"
    return (
        f"{scan.uri}: looks like a label map ({scan.label_like} different whole values, on the grid of {image.uri}); "
        f"if it is one, {hint}"
    )


def _other_channels(scans: Sequence[Scan]) -> Iterator[tuple[Scan, int]]:
    """The scans with another number of channels than most of their dataset have, and that number."""
    for dataset in {s.dataset for s in scans}:
        own = [s for s in scans if s.dataset == dataset]
        counts = Counter(s.num_channels for s in own)
        usual = min(counts, key=lambda n: (-counts[n], n))
        yield from ((s, usual) for s in own if s.num_channels != usual)


def subjects_doubt(subjects: Sequence[str]) -> str:
    """A sentence where so many scans are of one subject that names were likely misread, else ""."""
    (subject, most), *_ = Counter(subjects).most_common(1) or [("", 0)]
    count = len(set(subjects))
    if most < 3 or len(subjects) < FAR_FEWER * count:
        return ""
    return (
        f"{len(subjects)} scans are of {count} subject{'s' * (count != 1)} only ({most} of '{subject}'), and a subject "
        "is never split; if that is wrong, list the scans in a CSV with the columns image,label,subject"
    )


@dataclass(frozen=True)
class Manifest:
    """The usable scans, in the order of their ids, and those that are left out."""

    scans: tuple[Scan, ...]
    quarantined: tuple[Quarantined, ...]

    @classmethod
    def of(cls, answers: Iterable[Scan | Quarantined]) -> Manifest:
        """Gather what ``inspect`` gave; of scans with equal bytes one is kept, if possible a labelled one."""
        answers, bad = list(answers), []
        kept: dict[str, Scan] = {}
        usable = [a for a in answers if isinstance(a, Scan)]
        for scan in sorted(usable, key=lambda s: (not s.label_uri, s.uri)):  # labelled ones first
            first = kept.setdefault(scan.sha256, scan)
            if first is not scan:
                bad.append(Quarantined(scan.uri, f"{scan.uri}: duplicate of {first.uri} (same bytes)"))
        bad += [a for a in answers if isinstance(a, Quarantined)]
        images = {(s.dataset, s.grid): s for s in kept.values() if not s.label_like}
        for scan in [s for s in kept.values() if s.label_like and (s.dataset, s.grid) in images]:
            del kept[scan.sha256]
            bad.append(Quarantined(scan.uri, _suspicion(scan, images[scan.dataset, scan.grid])))
        for scan, usual in _other_channels(list(kept.values())):
            del kept[scan.sha256]
            odd = f"{scan.uri}: has {scan.num_channels} channels, most scans of {scan.dataset} have {usual}"
            bad.append(Quarantined(scan.uri, f"{odd}; leave it out, or list the channels that all have"))
        scans = sorted(kept.values(), key=lambda s: s.scan_id)
        return cls(tuple(scans), tuple(sorted(bad, key=lambda q: q.uri)))

    def remarks(self) -> list[str]:
        """What people should look at though nothing is refused."""
        notes = [f"{s.uri}: {s.note}" for s in self.scans if s.note]
        doubt = subjects_doubt([f"{s.dataset}/{s.subject}" for s in self.scans])
        return [*notes, doubt] if doubt else notes

    @property
    def id(self) -> str:
        """16 hex digits of the content: equal for the same scans and labels in another bucket or folder."""
        return config.fingerprint([[getattr(scan, key) for key in ID_KEYS] for scan in self.scans])

    def scans_parquet(self) -> bytes:
        return Rows.of(self.scans, Scan).to_parquet()

    def quarantine_parquet(self) -> bytes:
        return Rows.of(self.quarantined, Quarantined).to_parquet()

    @classmethod
    def from_parquet(cls, scans: bytes, quarantine: bytes, where: str = "the manifest") -> Manifest:
        """What `scans_parquet` and `quarantine_parquet` gave.

        Raises:
            UserError: naming ``where``, for anything else.
        """
        return cls(
            tuple(parquet.from_parquet(scans, Scan, f"{where}/scans.parquet")),
            tuple(parquet.from_parquet(quarantine, Quarantined, f"{where}/quarantine.parquet")),
        )

    def quarantine_csv(self) -> bytes:
        return tables.to_csv(("uri", "reason"), [(q.uri, q.reason) for q in self.quarantined])

    def summary(self) -> str:
        """One line for a log."""
        modalities = Counter(s.modality for s in self.scans)
        parts = [f"{len(self.scans)} scans", *(f"{n} {m}" for m, n in sorted(modalities.items()))]
        parts.append(f"{sum(bool(s.label_uri) for s in self.scans)} labelled")
        parts.append(f"{len({s.subject for s in self.scans})} subjects")
        parts.append(f"{sum(s.size_bytes for s in self.scans) / 2**20:.1f} MiB")
        return ", ".join([*parts, f"{len(self.quarantined)} quarantined"])

    def describe(self) -> str:
        """A table for people: what is in each dataset."""
        groups: dict[tuple[str, str, str], list[Scan]] = defaultdict(list)
        for scan in self.scans:
            groups[scan.dataset, scan.modality, scan.split].append(scan)
        numbers = (">scans", ">labelled", ">subjects", ">median shape", ">median mm", ">MiB")
        rows = []
        for key, scans in sorted(groups.items()):
            shape = "x".join(f"{statistics.median(s.shape[i] for s in scans):g}" for i in range(3))
            spacing = "x".join(f"{statistics.median(s.spacing_mm[i] for s in scans):.3g}" for i in range(3))
            labelled, subjects = sum(bool(s.label_uri) for s in scans), len({s.subject for s in scans})
            size = f"{sum(s.size_bytes for s in scans) / 2**20:.1f}"
            rows.append((*key, len(scans), labelled, subjects, shape, spacing, size))
        return tables.to_text(("dataset", "modality", "split", *numbers), rows)
