"""Folders of scans without any list: NIfTI files and DICOM series."""

from __future__ import annotations

from collections import defaultdict
from pathlib import PurePosixPath

from logonet.data.importers import common
from logonet.data.importers.bids import BIDS_MAP
from logonet.data.importers.common import Entries
from logonet.data.manifest import NIFTI_SUFFIXES, Source


def folder_sources(entries: Entries, root: str) -> list[Source]:
    """The scans of a folder; label maps are known by their folder and name."""
    dataset = common.name_of(root)
    images = [u for u in entries if u.lower().endswith(NIFTI_SUFFIXES)]
    scans = [u for u in images if not BIDS_MAP.fullmatch(common.name_of(u))]
    label_of = {image: label for image in scans if (label := common.label_beside(image, entries))}
    labels = set(label_of.values())
    found = []
    for uri in scans:
        below = uri[len(root) :]
        folders = {p.lower() for p in PurePosixPath(below).parts[:-1]} | {dataset.lower()}
        if uri in labels or folders & common.LABEL_FOLDERS:
            continue
        split = "test" if "imagests" in folders else "train"
        label = label_of.get(uri, "")
        found.append(Source(uri, (), common.subject_of(below), dataset, split=split, label_uri=label))
    series: dict[str, list[str]] = defaultdict(list)
    for uri in entries:
        if uri.lower().endswith(common.DICOM_SUFFIX):
            series[common.folder_of(uri)].append(uri)
    found += [Source(u, tuple(files), common.subject_of(u), dataset) for u, files in series.items()]
    return found
