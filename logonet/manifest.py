"""One table of scans: what there is, whether it can be used, and what is in it.

``sources`` looks at a URI and says what is to be inspected; ``inspect`` reads one of them and answers with
a row or with the reason why there is none, so it can be mapped by many workers; ``Manifest.of`` gathers the
answers. ``load`` and ``load_label`` read a row's voxels back, verified against the row.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from logonet import config, store, volume
from logonet.errors import BadScan, UserError
from logonet.store import Entry
from logonet.volume import Volume

NIFTI_SUFFIXES = (".nii.gz", ".nii")
DICOM_SUFFIX = ".dcm"
DATASET_FILE = "dataset.json"
LABEL_FOLDERS = {"labelstr", "labelsts", "labels"}
LABEL_ENDINGS = ("_labels", "_label", "_seg", "_mask")
SPLITS = {"training": "train", "validation": "val", "test": "test"}
MAX_LABEL = 255
GRID_TOLERANCE_VOX = 0.1  # between the corners of an image and of its label: rounding, not misplacement


@dataclass(frozen=True)
class Source:
    """One scan to inspect: a NIfTI file, or the folder of a DICOM series whose slices are ``files``.

    ``modality`` is what a dataset.json says, ``version`` changes whenever the scan or its label is replaced,
    ``size_bytes`` is 0 where it is not known.
    """

    uri: str
    files: tuple[str, ...] = ()
    subject: str = ""
    dataset: str = ""
    licence: str = ""
    modality: str = ""
    split: str = "train"
    label_uri: str = ""
    size_bytes: int = 0
    version: str = ""


@dataclass(frozen=True)
class Scan:
    """One usable scan.

    ``scan_id`` is the file's stem and the start of its SHA-256: the same wherever the scan is stored.
    ``modality`` is "CT" for Hounsfield units, "MR" for intensities without an absolute scale (see
    ``volume.modality``). ``shape``, ``spacing_mm`` and ``orientation`` are those of the file, not yet RAS.
    ``sha256`` is that of the file, or of the sorted SHA-256s of a DICOM series' slices. ``label_values`` are
    the values in the label, background 0 included.
    """

    scan_id: str
    uri: str
    files: tuple[str, ...]
    sha256: str
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
    label_uri: str
    label_sha256: str
    label_values: tuple[int, ...]


@dataclass(frozen=True)
class Quarantined:
    """A scan that is left out, and the sentence that says why."""

    uri: str
    reason: str


# -------------------------------------------------------------------------------------------- sources


def sources(uri: str) -> list[Source]:
    """What is to be inspected at ``uri``: a file, a dataset.json, or everything below a folder or prefix.

    Below a prefix: every .nii and .nii.gz, every folder of .dcm files as one series, and every Medical
    Segmentation Decathlon dataset.json in place of the files around it. Hidden files (macOS leaves
    ``._x.nii.gz``) and label maps (in labelsTr/, or named like an image with "_labels", "_seg", ... behind)
    are no scans; the latter become their image's ``label_uri``.

    Raises:
        UserError: when nothing is found, or a dataset.json cannot be understood.
    """
    if uri.lower().endswith(".json"):
        found = _decathlon(uri, {e.uri: e for e in store.listing(uri.rpartition("/")[0] or ".")})
        if not found:
            raise UserError(
                f"{uri} has no 'training', 'validation' or 'test' list of scans; is it a dataset.json?"
            )
        return found
    if uri.lower().endswith(NIFTI_SUFFIXES):
        entry = store.stat(uri)
        if entry is None:
            raise UserError(f"{uri}: no such scan; correct the path")
        return _plain([entry], uri.rpartition("/")[0])
    entries = [e for e in store.listing(uri) if not PurePosixPath(e.uri).name.startswith(".")]
    by_uri = {e.uri: e for e in entries}
    found, described = [], []
    for entry in entries:
        folder, _, name = entry.uri.rpartition("/")
        if name == DATASET_FILE and (listed := _decathlon(entry.uri, by_uri)):
            found += listed
            described.append(folder + "/")
    rest = [e for e in entries if not e.uri.startswith(tuple(described))]
    found += _plain(rest, uri)
    if not found:
        raise UserError(
            f"{uri}: no scans found ({len(entries)} files; looked for .nii.gz, .nii, .dcm and dataset.json); "
            "correct the URI"
        )
    return found


def _decathlon(uri: str, by_uri: Mapping[str, Entry]) -> list[Source]:
    """The scans of an MSD dataset.json; none when it has no lists of scans (nnU-Net's has not)."""
    try:
        description = json.loads(store.read(uri))
    except ValueError as err:
        raise UserError(f"{uri} is not valid JSON ({err}); mend it") from None
    if not isinstance(description, dict):
        raise UserError(f"{uri} must hold a mapping with 'training' and 'test', as in the Decathlon")
    folder = uri.rpartition("/")[0] or "."
    modalities = description.get("modality") or {}
    common: dict[str, Any] = {
        "dataset": str(description.get("name") or _name(folder)),
        "licence": str(description.get("licence") or description.get("license") or ""),
        "modality": str(modalities.get("0", "")) if isinstance(modalities, dict) else str(modalities),
    }
    found = []
    for key, split in SPLITS.items():
        items = description.get(key) or []
        if not isinstance(items, list):
            raise UserError(f"{uri}: '{key}' must be a list of scans, not {items!r}")
        for item in items:
            # the Decathlon lists its test scans as strings, others as mappings
            pair = {"image": item} if isinstance(item, str) else item
            if not isinstance(pair, dict) or not isinstance(pair.get("image"), str):
                raise UserError(
                    f"{uri}: an item of '{key}' names no single image: {item!r}; write {{image, label}}"
                )
            image = _resolve(folder, pair["image"])
            label = _resolve(folder, str(pair["label"])) if pair.get("label") else ""
            source = Source(
                uri=image, subject=_subject(pair["image"]), split=split, label_uri=label, **common
            )
            found.append(_versioned(source, by_uri))
    return found


def _resolve(folder: str, path: str) -> str:
    if "://" in path or path.startswith("/"):
        return path
    return store.join(folder, *PurePosixPath(path).parts)  # drops the Decathlon's "./"


def _plain(entries: Sequence[Entry], root: str) -> list[Source]:
    """Scans told from labels by folder and name."""
    by_uri = {e.uri: e for e in entries}
    scans = [e.uri for e in entries if e.uri.lower().endswith(NIFTI_SUFFIXES)]
    label_of = {image: label for image in scans if (label := _label_beside(image, by_uri))}
    labels = set(label_of.values())
    found = []
    for uri in scans:
        folders = {p.lower() for p in PurePosixPath(uri[len(root) :]).parts[:-1]} | {_name(root).lower()}
        if uri in labels or folders & LABEL_FOLDERS:
            continue
        source = Source(
            uri=uri,
            subject=_subject(uri[len(root) :]),
            dataset=_name(root),
            split="test" if "imagests" in folders else "train",
            label_uri=label_of.get(uri, ""),
        )
        found.append(_versioned(source, by_uri))
    series: dict[str, list[str]] = {}
    for entry in entries:
        if entry.uri.lower().endswith(DICOM_SUFFIX):
            series.setdefault(entry.uri.rpartition("/")[0], []).append(entry.uri)
    for folder, files in series.items():
        source = Source(uri=folder, files=tuple(files), subject=_subject(folder), dataset=_name(root))
        found.append(_versioned(source, by_uri))
    return found


def _label_beside(image: str, by_uri: Mapping[str, Entry]) -> str:
    """The label map that goes by ``image``'s name: labelsTr/x for imagesTr/x, or x_seg beside x."""
    folder, _, name = image.rpartition("/")
    stem = _stem(name)
    suffix = name[len(stem) :]
    if _name(folder) in ("imagesTr", "imagesTs"):
        labels = folder[: -len("imagesTr")] + _name(folder).replace("images", "labels")
        beside = [
            f"{labels}/{name}",
            f"{labels}/{re.sub(r'_[0-9]{4}$', '', stem)}{suffix}",
        ]  # nnU-Net's channel
    else:
        beside = [f"{folder}/{stem}{ending}{suffix}" for ending in LABEL_ENDINGS]
    return next((uri for uri in beside if uri in by_uri), "")


def _versioned(source: Source, by_uri: Mapping[str, Entry]) -> Source:
    """``source`` with its size and version, as far as the listing shows it."""
    scan = [by_uri[u] for u in source.files or (source.uri,) if u in by_uri]
    label = [by_uri[source.label_uri]] if source.label_uri in by_uri else []
    version = config.fingerprint([[e.uri, e.size_bytes, e.version] for e in scan + label])
    return replace(source, size_bytes=sum(e.size_bytes for e in scan), version=version)


def _name(uri: str) -> str:
    return PurePosixPath(uri).name


def _stem(uri: str) -> str:
    name = _name(uri)
    suffix = next((s for s in NIFTI_SUFFIXES if name.lower().endswith(s)), "")
    return name[: len(name) - len(suffix)]


def _plain_name(text: str) -> str:
    """``text`` as it may stand in file names and object keys everywhere."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text)


def _subject(path: str) -> str:
    """The BIDS subject in the path, else the file's stem without nnU-Net's channel number."""
    bids = re.search(r"(?:^|/)(sub-[A-Za-z0-9]+)", path)
    return bids[1] if bids else re.sub(r"_[0-9]{4}$", "", _stem(path))


# -------------------------------------------------------------------------------------------- inspect


def inspect(source: Source) -> Scan | Quarantined:
    """Read, hash, decode and check one scan and its label.

    Whatever is wrong with the scan itself, a missing file included, comes back as ``Quarantined``.

    Raises:
        UserError: for what concerns every scan: an unreachable store, refused credentials.
    """
    try:
        return _inspect(source)
    except BadScan as err:
        return Quarantined(source.uri, str(err))


def _inspect(source: Source) -> Scan:
    if source.size_bytes > volume.MAX_BYTES:
        raise BadScan(
            f"{source.uri}: has {source.size_bytes / 2**30:.1f} GiB, more than can be decoded; split it"
        )
    blobs = [_read(uri) for uri in source.files or (source.uri,)]
    scan = _decode(source.uri, source.files, blobs)
    modality = volume.modality(scan, source.modality, source.uri)
    sha256 = _sha256(blobs)
    label_sha256 = ""
    label_values: tuple[int, ...] = ()
    if source.label_uri:
        label = _read(source.label_uri)
        label_sha256 = _sha256([label])
        label_values = _label_values(_decode_label(label, source.label_uri, scan))
    return Scan(
        scan_id=f"{_plain_name(_stem(source.uri))}-{sha256[:10]}",
        uri=source.uri,
        files=source.files,
        sha256=sha256,
        size_bytes=sum(map(len, blobs)),
        subject=source.subject,
        dataset=source.dataset,
        licence=source.licence,
        modality=modality,
        shape=scan.shape_xyz,
        spacing_mm=scan.spacing_mm,
        orientation=scan.orientation,
        dtype=scan.stored_dtype,
        intensity_min=float(scan.array_CXYZ.min()),
        intensity_max=float(scan.array_CXYZ.max()),
        split=source.split,
        label_uri=source.label_uri,
        label_sha256=label_sha256,
        label_values=label_values,
    )


def _read(uri: str) -> bytes:
    """The bytes of one object; what is wrong with this object alone is a BadScan."""
    try:
        return store.read(uri)
    except store.IntegrityError as err:
        raise BadScan(str(err)) from None
    except UserError:
        if store.exists(uri):  # raises by itself when the store as a whole is out of reach
            raise
        raise BadScan(f"{uri}: no such file; copy it there or drop it from the list") from None


def _decode(uri: str, files: Sequence[str], blobs: Sequence[bytes]) -> Volume:
    return volume.decode_dicom(list(zip(files, blobs))) if files else volume.decode_nifti(blobs[0], uri)


def _sha256(blobs: Sequence[bytes]) -> str:
    digests = sorted(hashlib.sha256(b).hexdigest() for b in blobs)
    # a series has no order and its slices no lasting names
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _decode_label(data: bytes, uri: str, image: Volume) -> np.ndarray:
    """labels_XYZ uint8 on the image's own grid.

    Raises:
        BadScan: for another shape or place than the image's, or values that are not integers in 0..255.
    """
    label = volume.decode_nifti(data, uri, allow_constant=True)
    if label.shape_xyz != image.shape_xyz:
        raise BadScan(
            f"{uri}: the label has shape {label.shape_xyz}, its image {image.shape_xyz}; resample it"
        )
    corners_3N = np.indices((2, 2, 2)).reshape(3, 8) * (np.array(label.shape_xyz) - 1)[:, None]
    apart = label.affine - image.affine
    shift_mm = apart[:3, :3] @ corners_3N + apart[:3, 3:]
    worst_mm = float(np.linalg.norm(shift_mm, axis=0).max())
    if worst_mm > GRID_TOLERANCE_VOX * min(image.spacing_mm):
        raise BadScan(f"{uri}: the label lies {worst_mm:.1f} mm away from its image; give both one affine")
    values_XYZ = label.array_CXYZ[0]
    with np.errstate(invalid="ignore"):  # what does not fit is refused in the next line
        labels_XYZ = values_XYZ.astype(np.uint8)
    if not np.array_equal(labels_XYZ, values_XYZ):
        raise BadScan(f"{uri}: a label map holds integers from 0 to {MAX_LABEL}; this one has other values")
    return labels_XYZ


def _label_values(labels_XYZ: np.ndarray) -> tuple[int, ...]:
    return tuple(int(v) for v in np.flatnonzero(np.bincount(labels_XYZ.ravel(order="K"), minlength=1)))


def load(scan: Scan) -> Volume:
    """The voxels of a row, from bytes that are the row's.

    Raises:
        UserError: when they are not, or not there: the manifest no longer holds, so the run must stop.
    """
    if not scan.files:
        return volume.decode_nifti(
            store.read(scan.uri, size_bytes=scan.size_bytes, sha256=scan.sha256), scan.uri
        )
    blobs = [store.read(uri) for uri in scan.files]
    if _sha256(blobs) != scan.sha256:
        raise store.IntegrityError(f"{scan.uri}: the series is not the one in the manifest; import it again")
    return volume.decode_dicom(list(zip(scan.files, blobs)))


def load_label(scan: Scan, image: Volume) -> np.ndarray:
    """labels_XYZ uint8 of a labelled row, on the grid of ``image = load(scan)``."""
    assert scan.label_uri, scan.uri
    return _decode_label(store.read(scan.label_uri, sha256=scan.label_sha256), scan.label_uri, image)


# ------------------------------------------------------------------------------------------- manifest


@dataclass(frozen=True)
class Manifest:
    """The usable scans, in the order of their ids, and those that are left out."""

    scans: tuple[Scan, ...]
    quarantined: tuple[Quarantined, ...]

    @classmethod
    def of(cls, answers: Iterable[Scan | Quarantined]) -> Manifest:
        """Gather what ``inspect`` gave; of scans with equal bytes one is kept, if possible a labelled one."""
        kept: dict[str, Scan] = {}
        bad = []
        answers = list(answers)
        for scan in sorted(
            (a for a in answers if isinstance(a, Scan)), key=lambda s: (not s.label_uri, s.uri)
        ):
            first = kept.setdefault(scan.sha256, scan)
            if first is not scan:
                bad.append(Quarantined(scan.uri, f"{scan.uri}: duplicate of {first.uri} (same bytes)"))
        bad += [a for a in answers if isinstance(a, Quarantined)]
        return cls(
            tuple(sorted(kept.values(), key=lambda s: s.scan_id)), tuple(sorted(bad, key=lambda q: q.uri))
        )

    @property
    def id(self) -> str:
        """16 hex digits of the content: equal for the same scans and labels in another bucket or folder."""
        return config.fingerprint(
            [[s.scan_id, s.sha256, s.subject, s.modality, s.split, s.label_sha256] for s in self.scans]
        )

    def scans_parquet(self) -> bytes:
        return _to_parquet([asdict(s) for s in self.scans], Scan)

    def quarantine_parquet(self) -> bytes:
        return _to_parquet([asdict(q) for q in self.quarantined], Quarantined)

    @classmethod
    def from_parquet(cls, scans: bytes, quarantine: bytes) -> Manifest:
        rows: list[dict[str, Any]] = [
            {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
            for row in _from_parquet(scans)
        ]
        return cls(
            tuple(Scan(**row) for row in rows), tuple(Quarantined(**row) for row in _from_parquet(quarantine))
        )

    def quarantine_csv(self) -> bytes:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["uri", "reason"])
        writer.writerows([q.uri, q.reason] for q in self.quarantined)
        return text.getvalue().encode()

    def summary(self) -> str:
        """One line for a log."""
        modalities = Counter(s.modality for s in self.scans)
        parts = [f"{len(self.scans)} scans", *(f"{n} {m}" for m, n in sorted(modalities.items()))]
        parts.append(f"{sum(bool(s.label_uri) for s in self.scans)} labelled")
        parts.append(f"{len({s.subject for s in self.scans})} subjects")
        parts.append(f"{sum(s.size_bytes for s in self.scans) / 2**20:.1f} MiB")
        return ", ".join([*parts, f"{len(self.quarantined)} quarantined"])

    def describe(self) -> str:
        """A table for people: what is in each dataset, and why scans were left out."""
        from rich.console import Console
        from rich.table import Table

        groups: dict[tuple[str, str, str], list[Scan]] = {}
        for scan in self.scans:
            groups.setdefault((scan.dataset, scan.modality, scan.split), []).append(scan)
        table = Table()
        heads = (
            "dataset",
            "modality",
            "split",
            "scans",
            "labelled",
            "subjects",
            "median shape",
            "median mm",
            "MiB",
        )
        for head in heads:
            table.add_column(head, justify="left" if head in heads[:3] else "right", no_wrap=True)
        for key, scans in sorted(groups.items()):
            table.add_row(
                *key,
                str(len(scans)),
                str(sum(bool(s.label_uri) for s in scans)),
                str(len({s.subject for s in scans})),
                "x".join(f"{statistics.median(s.shape[i] for s in scans):g}" for i in range(3)),
                "x".join(f"{statistics.median(s.spacing_mm[i] for s in scans):.3g}" for i in range(3)),
                f"{sum(s.size_bytes for s in scans) / 2**20:.1f}",
            )
        text = io.StringIO()
        # wide and soft: a pipe has no width, and a cut table hides what it was printed for
        console = Console(file=text, width=160, highlight=False)
        console.print(table)
        for bad in self.quarantined:
            console.print(f"quarantined: {bad.reason}", soft_wrap=True, markup=False)
        return text.getvalue()


def _to_parquet(rows: list[dict[str, Any]], row_type: type) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {
        "str": pa.string(),
        "int": pa.int64(),
        "float": pa.float64(),
        "tuple[int, int, int]": pa.list_(pa.int64()),
        "tuple[int, ...]": pa.list_(pa.int64()),
        "tuple[float, float, float]": pa.list_(pa.float64()),
        "tuple[str, ...]": pa.list_(pa.string()),
    }
    schema = pa.schema([(f.name, types[str(f.type)]) for f in fields(row_type)])
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink)
    return sink.getvalue()


def _from_parquet(data: bytes) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    return pq.read_table(io.BytesIO(data)).to_pylist()
