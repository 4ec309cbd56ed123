"""Folders of scans without any list: files of scans and DICOM series."""

from __future__ import annotations

from pathlib import PurePosixPath

from logonet.data import volume
from logonet.data.importers import common, naming
from logonet.data.importers.bids import BIDS_MAP
from logonet.data.importers.common import Entries
from logonet.data.manifest import Source


def folder_sources(entries: Entries, root: str) -> list[Source]:
    """The scans of a folder; label maps are known by their folder and name."""
    dataset = common.name_of(root)
    files = [u for u in entries if volume.suffix_of(u) and not BIDS_MAP.fullmatch(common.name_of(u))]
    named = {u: naming.is_label(u, root) for u in files}
    images = [u for u in files if not named[u]]
    label_of = naming.labels_of(images, [u for u in files if named[u]])
    found = []
    for uri in images:
        folders = {p.lower() for p in PurePosixPath(uri[len(root) :]).parts[:-1]} | {dataset.lower()}
        split = "test" if "imagests" in folders else "train"
        source = Source(uri, dataset=dataset, split=split, label_uri=label_of.get(uri, ""))
        found.append(common.with_files(source, entries))
    for folder in dict.fromkeys(map(common.folder_of, entries)):
        if slices := common.dicom_files(entries, folder):
            found.append(Source(folder, tuple(slices), dataset=dataset))
    return found
