"""Folders of scans without any list: NIfTI files and DICOM series."""

from __future__ import annotations

from collections import defaultdict
from pathlib import PurePosixPath

from logonet.data.importers.bids import BIDS_MAP
from logonet.data.importers.common import (
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
    """The scans of a folder; label maps are known by their folder and name."""
    scans = [u for u in entries if u.lower().endswith(NIFTI_SUFFIXES) and not BIDS_MAP.fullmatch(name_of(u))]
    label_of = {image: label for image in scans if (label := label_beside(image, entries))}
    labels = set(label_of.values())
    found = []
    for uri in scans:
        below = uri[len(root) :]
        folders = {p.lower() for p in PurePosixPath(below).parts[:-1]} | {name_of(root).lower()}
        if uri in labels or folders & LABEL_FOLDERS:
            continue
        split = "test" if "imagests" in folders else "train"
        label = label_of.get(uri, "")
        found.append(Source(uri, (), subject_of(below), name_of(root), split=split, label_uri=label))
    series: dict[str, list[str]] = defaultdict(list)
    for uri in entries:
        if uri.lower().endswith(DICOM_SUFFIX):
            series[folder_of(uri)].append(uri)
    found += [Source(uri, tuple(files), subject_of(uri), name_of(root)) for uri, files in series.items()]
    return found
