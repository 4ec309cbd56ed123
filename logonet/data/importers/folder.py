"""Folders of scans without any list: files of scans and DICOM series."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from logonet.core.errors import UserError
from logonet.data import volume
from logonet.data.classes import IGNORE
from logonet.data.importers import common, naming
from logonet.data.importers.bids import BIDS_MAP
from logonet.data.importers.common import Entries
from logonet.data.manifest import Source, stem


def folder_sources(entries: Entries, root: str) -> list[Source]:
    """The scans of a folder; label maps are known by their folder and name."""
    dataset = common.name_of(root)
    files = [u for u in entries if volume.suffix_of(u) and not BIDS_MAP.fullmatch(common.name_of(u))]
    named = {u: naming.is_label(u, root) for u in files}
    images = [u for u in files if not named[u]]
    label_of = naming.labels_of(images, [u for u in files if named[u]])
    masks = _mask_folders(images, label_of, [u for u in files if named[u]])
    masks = {image: tuple(m for m in own if stem(m).lower() != "background") for image, own in masks.items()}
    names = ("background", *sorted({stem(m) for folder in masks.values() for m in folder}))
    if len(names) > IGNORE:
        few = f"more than the {IGNORE - 1} classes that a network learns"
        raise UserError(
            f"{root}: its folders of masks hold {len(names) - 1} different names, {few}; name them alike"
        )
    found = []
    for uri in images:
        folders = {p.lower() for p in PurePosixPath(uri[len(root) :]).parts[:-1]} | {dataset.lower()}
        split = "test" if "imagests" in folders else "train"
        source = Source(uri, dataset=dataset, split=split, label_uri=label_of.get(uri, ""))
        if uri in masks:
            folder = common.folder_of(masks[uri][0])
            source = replace(source, label_uri=folder, label_files=masks[uri], classes=names)
        found.append(source)
    found = naming.grouped(found)
    of_folder: dict[str, list[str]] = defaultdict(list)
    for uri in entries:
        of_folder[common.folder_of(uri)].append(uri)
    for folder, files in of_folder.items():
        if slices := common.dicom_files({u: entries[u] for u in files}, folder):
            found.append(Source(folder, tuple(slices), dataset=dataset))
    return found


def _mask_folders(
    images: Sequence[str], label_of: Mapping[str, str], labels: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Masks by image, in TotalSegmentator's layout: one image in a folder, beside a folder of a mask for each class."""
    of_folder: dict[str, list[str]] = defaultdict(list)
    for uri in labels:
        of_folder[common.folder_of(uri)].append(uri)
    beside: dict[str, list[str]] = defaultdict(list)  # case folder -> folders of masks
    for folder in of_folder:
        if naming.MASK_FOLDER.fullmatch(common.name_of(folder).lower()):
            beside[common.folder_of(folder)].append(folder)
    alone = Counter(map(common.folder_of, images))
    found = {}
    for uri in images:
        folder = common.folder_of(uri)
        if uri not in label_of and alone[folder] == 1 and len(beside[folder]) == 1:
            found[uri] = tuple(sorted(of_folder[beside[folder][0]]))
    return found
