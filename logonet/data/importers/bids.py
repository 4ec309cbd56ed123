"""BIDS datasets and their derivatives."""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from logonet.core.errors import UserError
from logonet.data.importers.common import Entries, class_names, folder_of, name_of, parse_fold, parse_split
from logonet.data.importers.csv import read_rows
from logonet.data.importers.msd import read_description
from logonet.data.manifest import Source, stem
from logonet.storage import object_store

# func, dwi, fmap, perf... hold time series and maps, not scans of one anatomy
_BIDS_IMAGE = re.compile(
    r"(?P<root>(?:.*/)?)(?P<subject>sub-[A-Za-z0-9]+)/(?:ses-[A-Za-z0-9]+/)?(?P<kind>anat|ct)/"
    r"(?P=subject)_(?:[^/]*_)?(?P<suffix>[A-Za-z0-9]+)\.nii(?:\.gz)?"
)
BIDS_MAP = re.compile(r"sub-[^/]*_(dseg|seg|mask|probseg|defacemask)\.nii(\.gz)?")
_BIDS_LABEL = re.compile(r"sub-[^/]*_(?:d?seg|label-[A-Za-z0-9]+(?:_[^/]*)?_mask)\.nii(?:\.gz)?")
# entities that a label map's name may have beyond its image's and still lie on the image's grid
_BIDS_EXTRA = {"desc", "label", "seg", "atlas", "space"}


def bids_roots(root: str, entries: Entries) -> list[str]:
    """The folders below ``root`` that hold BIDS subjects."""
    roots = {}
    for uri in entries:
        match = _BIDS_IMAGE.fullmatch(uri[len(root.rstrip("/")) + 1 :])
        if match and not re.search(r"(^|/)(derivatives|sourcedata)/", match["root"]):
            roots[object_store.join(root, match["root"]) if match["root"] else root.rstrip("/")] = True
    return list(roots)


def bids_sources(root: str, entries: Entries) -> list[Source]:
    """The anatomical images of a BIDS tree with the label maps beside them or in its derivatives.

    A label map of an image is a ``_dseg`` or ``_label-<name>_mask`` whose name has all of the image's
    entities; of several the one with the fewest more of them. Class names come from ``dseg.tsv`` files,
    splits and folds from columns of that name in participants.tsv.
    """
    described, people = f"{root}/dataset_description.json", f"{root}/participants.tsv"
    description = read_description(described) if described in entries else {}
    rows = read_rows(people, "\t", {"split", "fold"}) if people in entries else iter(())
    participants = {row.get("participant_id", ""): (row, where) for where, row in rows}
    below = {u for u in entries if u.startswith(root + "/")}
    labels: dict[str, list[str]] = defaultdict(list)  # by subject
    tables: dict[str, list[str]] = defaultdict(list)  # by folder
    for uri in below:
        if _BIDS_LABEL.fullmatch(name_of(uri)):
            labels[name_of(uri).split("_")[0]].append(uri)
        elif uri.endswith("dseg.tsv"):
            tables[folder_of(uri)].append(uri)
    read_classes = functools.cache(_class_table)
    found = []
    for uri in sorted(below):
        image = _BIDS_IMAGE.fullmatch(uri[len(root) + 1 :])
        if not image or image["root"] or BIDS_MAP.fullmatch(name_of(uri)):
            continue
        label = _bids_label(uri, labels[image["subject"]])
        row, where = participants.get(image["subject"], ({}, ""))
        source = Source(
            uri=uri,
            subject=image["subject"],
            dataset=str(description.get("Name") or name_of(root)),
            licence=str(description.get("License") or ""),
            modality="CT" if "ct" in (image["kind"], image["suffix"].lower()) else "MR",
            split=parse_split(row.get("split", ""), where),
            fold=parse_fold(row.get("fold", ""), where),
            label_uri=label,
            classes=_bids_classes(label, tables, read_classes, root) if label else (),
        )
        found.append(source)
    return found


def _bids_name(uri: str) -> tuple[set[str], list[str]]:
    """The entities (key-value) and the other words of a BIDS file name, the suffix last."""
    words = stem(uri).removesuffix(".tsv").split("_")
    return {w for w in words if "-" in w}, [w for w in words if "-" not in w]


def _bids_label(image: str, labels: Sequence[str]) -> str:
    """The label map of ``image`` among those of its subject; "" when none is on its grid."""
    entities, (*_, suffix) = _bids_name(image)
    own_space = ("space-orig", f"space-{suffix}")
    ranked: list[tuple[tuple[bool, int, bool], str]] = []
    for label in labels:
        own, words = _bids_name(label)
        extra = own - entities
        other_space = any(e.startswith("space-") and e not in own_space for e in extra)
        foreign = {e.partition("-")[0] for e in extra} - _BIDS_EXTRA
        if not entities <= own or other_space or foreign or (words[:-1] and suffix not in words[:-1]):
            continue
        # rather of this very contrast, rather the plain one, rather all classes than one of them
        ranked.append(((not words[:-1], len(extra), words[-1] == "mask"), label))
    ranked.sort()
    if len(ranked) > 1 and ranked[0][0] == ranked[1][0]:
        both = f"{image}: both {ranked[0][1]} and {ranked[1][1]} are label maps of it"
        hint = "remove one, or list the pairs that you mean in a CSV with the columns image,label"
        raise UserError(f"{both}; {hint}")
    return ranked[0][1] if ranked else ""


def _bids_classes(
    label: str, tables: Mapping[str, list[str]], read: Callable[[str], tuple[str, ...]], root: str
) -> tuple[str, ...]:
    """Class names of a label map: from the nearest dseg.tsv that applies, or from its name."""
    entities, words = _bids_name(label)
    if words[-1] == "mask":
        name = next(e.partition("-")[2] for e in entities if e.startswith("label-"))
        return "background", name
    folder = label
    while folder != root:
        folder = folder_of(folder)
        # BIDS' inheritance principle: a table applies to files below it that have all of its entities
        here = [t for t in tables.get(folder, []) if _bids_name(t)[0] <= entities]
        if here:
            return read(max(here, key=lambda t: (len(_bids_name(t)[0]), t)))
    return ()


def _class_table(uri: str) -> tuple[str, ...]:
    """The classes of a BIDS dseg.tsv."""
    rows = [row for _, row in read_rows(uri, "\t", {"index"})]
    if not rows or "name" not in rows[0]:
        raise UserError(f"{uri}: a table of classes has the columns index and name; add them")
    return class_names({row["index"]: row["name"] for row in rows}, uri)
