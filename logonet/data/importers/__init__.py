"""The scans at a URI, whatever the layout of scans, labels and splits.

``sources`` is the entrance. The layouts: Medical Segmentation Decathlon and MONAI lists (JSON), nnU-Net v2
raw folders, BIDS with derivatives, CSV tables, DICOM series, and plain folders of NIfTI files. Importers go by the
names of files and open no scan. Everything may lie in a local folder or in a bucket.

Lists travel with the data they describe, so a JSON list may name files below the folder it was found in, and below
those that the user allows in ``LOGONET_DATA_ROOTS``. A CSV is the user's own and may name any place; from a bucket it
may not name this machine's files.
"""

from __future__ import annotations

import re

from logonet.core import redaction
from logonet.core.errors import UserError
from logonet.data.importers.bids import bids_roots, bids_sources
from logonet.data.importers.common import DATA_ROOTS, Entries, folder_of, list_files, name_of, versioned
from logonet.data.importers.csv import csv_sources
from logonet.data.importers.folder import folder_sources
from logonet.data.importers.msd import DATASET_FILE, msd_sources, read_description
from logonet.data.importers.nnunet import is_nnunet, nnunet_sources
from logonet.data.manifest import NIFTI_SUFFIXES, Source
from logonet.storage import object_store
from logonet.storage.object_store import Entry

__all__ = ["DATA_ROOTS", "sources"]


def sources(uri: str) -> list[Source]:
    """The scans at ``uri``: one scan, those of a list (JSON or CSV), or all below a folder or prefix.

    Below a folder: each Decathlon or nnU-Net dataset.json, each BIDS tree and each folder of .dcm slices is
    read by its own rules, and every other .nii and .nii.gz is a scan. Hidden files (macOS leaves
    ``._x.nii.gz``) and label maps (in labelsTr/, or named like an image with "_labels", "_seg", ... behind)
    are not scans; the latter become their image's ``label_uri``.

    Raises:
        UserError: when nothing is found, or a list, table or dataset.json cannot be understood.
    """
    known: dict[str, Entry] = {}
    if uri.lower().endswith(".json"):
        description = read_description(uri)
        if is_nnunet(description):
            known = list_files(folder_of(uri))
            found = nnunet_sources(uri, description, known)
            nothing = f"no images of this nnU-Net dataset in {folder_of(uri)}/imagesTr; copy them there"
        else:
            found = msd_sources(uri, description, folder_of(uri))
            nothing = "has no 'training', 'validation' or 'test' list of scans; is it a dataset.json?"
    elif uri.lower().endswith(".csv"):
        found = csv_sources(uri)
        nothing = "lists no scans; write a row per scan below the header image,label,subject,..."
    elif uri.lower().endswith(NIFTI_SUFFIXES):
        entry = object_store.stat(uri)
        if entry is None:
            raise UserError(f"{uri}: no such scan; correct the path")
        known = {uri: entry}
        found = folder_sources(known, folder_of(uri))
        nothing = "is named like a label map; give its image"
    else:
        known = list_files(uri)
        found = sources_below(uri, known)
        looked_for = ".nii.gz, .nii, .dcm and dataset.json"
        nothing = f"no scans found ({len(known)} files; looked for {looked_for}); correct the URI"
    if not found:
        raise UserError(f"{uri}: {nothing}")
    redaction.hide_names((s.uri, (*s.files, s.label_uri, s.subject)) for s in found)
    return versioned(found, known)


def sources_below(root: str, entries: Entries) -> list[Source]:
    """All scans in a folder: datasets with a dataset.json, then BIDS, then the remaining files."""
    found, described = [], []
    for uri in entries:
        if name_of(uri) != DATASET_FILE:
            continue
        description = read_description(uri)
        if is_nnunet(description):
            # described even when empty: nnU-Net copies its dataset.json beside preprocessed data and results
            found += nnunet_sources(uri, description, entries)
            described.append(folder_of(uri) + "/")
        elif listed := msd_sources(uri, description, root):
            found += listed
            described.append(folder_of(uri) + "/")
    rest = {u: e for u, e in entries.items() if not u.startswith(tuple(described))}
    for bids in bids_roots(root, rest):
        found += bids_sources(bids, rest)
        inside = re.compile(re.escape(bids + "/") + r"(sub-[A-Za-z0-9]+|derivatives|sourcedata)/")
        rest = {u: e for u, e in rest.items() if not inside.match(u)}
    found += folder_sources(rest, root)
    return found
