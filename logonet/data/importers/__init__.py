"""The scans at a URI, whatever the layout of scans, labels and splits.

``survey`` is the entrance, and ``sources`` where only the scans are wanted. The layouts: Medical Segmentation Decathlon
and MONAI lists (JSON), nnU-Net v2 raw folders, BIDS with derivatives, CSV tables, DICOM series, and plain folders of
scans. Importers go by the names of files and open no scan; only where files have no ending they look whether one is
DICOM. Everything may lie in a local folder or in a bucket.

Lists travel with the data they describe, so a JSON list may name files below the folder it was found in, and below
those that the user allows in ``LOGONET_DATA_ROOTS``. A CSV is the user's own and may name any place; from a bucket it
may not name this machine's files.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from logonet.core import redaction
from logonet.core.errors import UserError, plain
from logonet.data import volume
from logonet.data.importers import naming
from logonet.data.importers.bids import bids_roots, bids_sources
from logonet.data.importers.common import (
    DATA_ROOTS,
    Entries,
    Unused,
    folder_of,
    hidden,
    label_files,
    list_files,
    name_of,
    scan_files,
    versioned,
)
from logonet.data.importers.csv import csv_sources
from logonet.data.importers.folder import folder_sources
from logonet.data.importers.msd import DATASET_FILE, msd_sources, read_description
from logonet.data.importers.nnunet import is_nnunet, nnunet_sources
from logonet.data.manifest import Source
from logonet.storage import object_store
from logonet.storage.object_store import Entry

__all__ = ["DATA_ROOTS", "Survey", "sources", "survey"]

# Endings of files that hold scans once something else has unpacked them.
PACKED = re.compile(r"\.(bz2|zst|xz|7z|zip|tar|tgz|rar)$", re.IGNORECASE)
TOLD = 6  # reasons for files that were not used


@dataclass(frozen=True)
class Survey:
    """What is at a URI.

    Attributes:
        sources: the scans.
        unused: why files were not used -> those files.
    """

    sources: list[Source]
    unused: Unused = field(default_factory=dict)

    def told(self) -> str:
        """How many files were not used and why, in one line; "" where all were."""
        if not self.unused:
            return ""
        frequent = Counter({why: len(files) for why, files in self.unused.items()}).most_common()
        parts = [f"{count} {why} ({plain(name_of(self.unused[why][0]))})" for why, count in frequent[:TOLD]]
        parts += [f"{sum(c for _, c in frequent[TOLD:])} for other reasons"] * (len(frequent) > TOLD)
        return f"{sum(count for _, count in frequent)} files are not used: {', '.join(parts)}"


def sources(uri: str, channels: Sequence[str] = ()) -> list[Source]:
    """The scans at ``uri``; see `survey`."""
    return survey(uri, channels).sources


def survey(uri: str, channels: Sequence[str] = ()) -> Survey:
    """The scans at ``uri``: one scan, those of a list (JSON or CSV), or all below a folder or prefix.

    Below a folder: each Decathlon or nnU-Net dataset.json, each BIDS tree and each folder of DICOM slices is
    read by its own rules, and every other file that can hold a scan is one. Hidden files (macOS leaves
    ``._x.nii.gz``) and label maps (in labelsTr/, or named like an image with "_labels", "_seg", ... behind)
    are not scans; the latter become their image's ``label_uri``.

    Args:
        channels: contrasts by the last word of their files' names, such as ("flair", "t1ce"): the files of a case
            become one scan with these channels, in this order, and other scans are not used.

    Raises:
        UserError: when nothing is found, or a list, table or dataset.json cannot be understood.
    """
    known: dict[str, Entry] = {}
    unused: Unused = defaultdict(list)
    root = ""
    if uri.lower().endswith(".json"):
        description = read_description(uri)
        if is_nnunet(description):
            known = list_files(folder_of(uri))
            found = nnunet_sources(uri, description, known, folder_of(uri))
            nothing = f"no images of this nnU-Net dataset in {folder_of(uri)}/imagesTr; copy them there"
        else:
            found = msd_sources(uri, description, folder_of(uri), unused)
            nothing = "has no 'training', 'validation' or 'test' list of scans; is it a dataset.json?"
    elif uri.lower().endswith((".csv", ".tsv")):
        found = csv_sources(uri)
        nothing = "lists no scans; write a row per scan below the header image,label,subject,..."
    elif volume.suffix_of(uri):
        entry = object_store.stat(uri)
        if entry is None:
            raise UserError(f"{uri}: no such scan; correct the path")
        known = {uri: entry}
        found = folder_sources(known, folder_of(uri))
        nothing = "is named like a label map; give its image"
    elif PACKED.search(uri) and object_store.stat(uri) is not None:
        raise UserError(f"{uri}: is packed in a way that is not read; unpack it, and save scans as .nii.gz")
    else:
        root, known = uri, list_files(uri)
        found = sources_below(uri, known, unused)
        endings = ", ".join(volume.SUFFIXES)
        nothing = f"no scans found ({len(known)} files; looked for {endings}, DICOM and dataset.json); correct the URI"
    if not found:
        raise UserError(f"{uri}: {nothing}")
    if channels:
        found, others = naming.chosen(found, channels)
        if not found:
            raise UserError(
                f"{uri}: no case has all of the channels {', '.join(channels)} at the end of its files' names"
            )
        if others:
            unused[f"scans without all of the channels {', '.join(channels)}"] += others
        known = {u: e for u, e in known.items() if u not in set(others)}
    found = versioned(naming.identify(found, root), known)
    if root:
        for why, file in _not_used(root, known, found):
            unused[why].append(file)
    redaction.hide_names((s.uri, (*s.files, *s.channels, s.label_uri, s.subject)) for s in found)
    return Survey(found, dict(unused))


def sources_below(root: str, entries: Entries, unused: Unused) -> list[Source]:
    """All scans in a folder: datasets with a dataset.json, then BIDS, then the remaining files."""
    found, described = [], []
    for uri in entries:
        if name_of(uri) != DATASET_FILE:
            continue
        description = read_description(uri)
        if is_nnunet(description):
            # described even when empty: nnU-Net copies its dataset.json beside preprocessed data and results
            found += nnunet_sources(uri, description, entries, root)
            described.append(folder_of(uri) + "/")
        elif listed := msd_sources(uri, description, root, unused):
            found += listed
            described.append(folder_of(uri) + "/")
    rest = {u: e for u, e in entries.items() if not u.startswith(tuple(described))}
    for bids in bids_roots(root, rest):
        found += bids_sources(bids, rest)
        inside = re.compile(re.escape(bids + "/") + r"(sub-[A-Za-z0-9]+|derivatives|sourcedata)/")
        rest = {u: e for u, e in rest.items() if not inside.match(u)}
    found += folder_sources(rest, root)
    return found


def _not_used(root: str, entries: Entries, found: list[Source]) -> Iterator[tuple[str, str]]:
    """(why, file) of every file below ``root`` that is no part of a scan and does not describe any."""
    used = {u for s in found for u in (*scan_files(s), *label_files(s))}
    for uri in entries:
        name, ending = name_of(uri), PurePosixPath(uri).suffix.lower()
        if uri in used or name == DATASET_FILE or ending in (".json", ".tsv"):
            continue
        if packed := PACKED.search(name):
            yield f"packed as {packed[1].lower()}, which is not read", uri
        elif volume.suffix_of(uri) and naming.is_label(uri, root):
            yield "label maps without an image of that name", uri
        elif volume.suffix_of(uri):
            yield "scans that their dataset does not list as such", uri
        else:
            yield f"files that are no scan{f', {ending}' if ending else ''}", uri
    if not object_store.is_s3(root):
        yield from _dangling(object_store.local_path(root))


def _dangling(folder: str) -> Iterator[tuple[str, str]]:
    """Links to nothing, such as git-annex leaves where content was not fetched."""
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            if os.path.islink(path) and not os.path.exists(path) and not hidden(path):
                yield "links to files that are not there (git-annex: fetch them)", path
