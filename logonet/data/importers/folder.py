"""Folders of scans without any list."""

from __future__ import annotations

from pathlib import PurePosixPath

from logonet.data.importers.bids import BIDS_MAP
from logonet.data.importers.names import (
    DICOM_SUFFIX,
    LABEL_FOLDERS,
    Entries,
    folder_of,
    label_beside,
    name_of,
    subject_of,
)
from logonet.data.manifest import NIFTI_SUFFIXES, Source


def folder_sources(entries: Entries, root: str) -> list[Source]:
    """Scans told from labels by folder and name."""
    scans = [u for u in entries if u.lower().endswith(NIFTI_SUFFIXES) and not BIDS_MAP.fullmatch(name_of(u))]
    label_of = {image: label for image in scans if (label := label_beside(image, entries))}
    labels = set(label_of.values())
    found = []
    for uri in scans:
        below = uri[len(root) :]
        folders = {p.lower() for p in PurePosixPath(below).parts[:-1]} | {name_of(root).lower()}
        if uri in labels or folders & LABEL_FOLDERS:
            continue
        source = Source(
            uri=uri,
            subject=subject_of(below),
            dataset=name_of(root),
            split="test" if "imagests" in folders else "train",
            label_uri=label_of.get(uri, ""),
        )
        found.append(source)
    series: dict[str, list[str]] = {}
    for uri in entries:
        if uri.lower().endswith(DICOM_SUFFIX):
            series.setdefault(folder_of(uri), []).append(uri)
    for folder, files in series.items():
        found.append(
            Source(uri=folder, files=tuple(files), subject=subject_of(folder), dataset=name_of(root))
        )
    return found
