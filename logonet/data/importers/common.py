"""Helpers of all importers: URIs that lists name, labels beside images, subjects, splits, folds and class names."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from logonet.core import config
from logonet.core.errors import UserError
from logonet.data import volume
from logonet.data.importers.naming import folder_of, name_of
from logonet.data.manifest import MAX_LABEL, Source
from logonet.storage import object_store
from logonet.storage.object_store import Entry

DICOM_SUFFIX = ".dcm"
DICOM_ENDINGS = ("", ".ima", ".dicom", ".dic")  # and numbers: what slices are called beside .dcm
DICOM_PREAMBLE = 132  # bytes, of which the last four are DICM
SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "validation": "val", "test": "test"}
STATS_AT_ONCE = 16
DATA_ROOTS = "LOGONET_DATA_ROOTS"  # folders and prefixes that lists may name besides their own, by commas
MAX_FOLD = 10**6
Entries = Mapping[str, Entry]  # what a listing gave, by URI
Unused = dict[str, list[str]]  # what was not used and why -> the files concerned


def hidden(uri: str) -> bool:
    """Whether a file is hidden, as those are that macOS leaves (``._x.nii.gz``)."""
    return name_of(uri).startswith(".")


def list_files(uri: str) -> dict[str, Entry]:
    return {e.uri: e for e in object_store.listing(uri) if not hidden(e.uri)}


def _stat(uri: str) -> Entry | None:
    try:
        return object_store.stat(uri)
    except object_store.Refused:  # one scan of a list: reading it will say so
        return None


def resolve(folder: str, path: str) -> str:
    """``path`` as a list in ``folder`` means it."""
    if "\\" in path and "/" not in path:  # written on Windows
        path = path.replace("\\", "/")
    if "://" in path or path.startswith(("/", "~")):
        return path
    for part in PurePosixPath(path).parts:  # drops the Decathlon's "./"
        # the file system walks up by itself, and knows links; a bucket has no folders to walk
        up = part == ".."
        folder = folder_of(folder) if up and object_store.is_s3(folder) else f"{folder.rstrip('/')}/{part}"
    return folder


def inside(root: str, uri: str, named_by: str) -> str:
    """``uri``, once it is known to lie below ``root`` or where the user allows it.

    Links in a local folder count as part of it: who can make one there can as well copy files there.

    Raises:
        UserError: that starts with ``named_by``, when it does not.
    """
    allowed = [root, *filter(None, os.environ.get(DATA_ROOTS, "").split(","))]
    if any(_below_folder(uri, folder.strip()) for folder in allowed):
        return uri
    ways = f"move it there, or set {DATA_ROOTS} to the folders or prefixes that lists may name, with commas between"
    raise UserError(f"{named_by}: names {uri}, which does not lie below {root}; {ways}")


def _below_folder(uri: str, folder: str) -> bool:
    if object_store.is_s3(uri) or object_store.is_s3(folder):
        return ".." not in uri.split("/") and uri.startswith(folder.rstrip("/") + "/")
    path, top = object_store.local_path(uri), os.path.abspath(object_store.local_path(folder))
    if ".." in path.split("/"):  # what it means depends on links that come before it
        path, top = os.path.join(os.path.realpath(os.path.dirname(path)), "x"), os.path.realpath(top)
    return os.path.commonpath([os.path.abspath(path), top]) == top


def versioned(found: Sequence[Source], known: Entries) -> list[Source]:
    """``found`` with sizes and versions. ``known`` are the files listed already; lists may name others.

    Where a list names ``case.nii.gz`` and only nnU-Net's ``case_0000.nii.gz`` is there, that is taken.
    """
    named = {u for s in found for u in (*scan_files(s), *label_files(s))}
    with ThreadPoolExecutor(STATS_AT_ONCE) as pool:
        more = pool.map(_stat, sorted(named - set(known)))
        entries = {**known, **{e.uri: e for e in more if e is not None}}
        absent = [s.uri for s in found if not s.files and s.uri not in entries]
        channels = dict(zip(absent, pool.map(_stat, map(_first_channel, absent))))
    out = []
    for source in found:
        if entry := channels.get(source.uri):
            source = replace(source, uri=entry.uri)
            entries[entry.uri] = entry
        scan, label = ([entries[u] for u in of(source) if u in entries] for of in (scan_files, label_files))
        version = config.fingerprint([[e.uri, e.size_bytes, e.version] for e in scan + label])
        out.append(replace(source, size_bytes=sum(e.size_bytes for e in scan), version=version))
    return out


def scan_files(source: Source) -> list[str]:
    """Every file that a scan's voxels may lie in."""
    return [u for uri in (*(source.files or (source.uri,)), *source.channels) for u in _with_voxels(uri)]


def label_files(source: Source) -> list[str]:
    """Every file that its label map may lie in."""
    named = source.label_files or ((source.label_uri,) if source.label_uri else ())
    return [u for uri in named for u in _with_voxels(uri)]


def _with_voxels(uri: str) -> list[str]:
    return [uri, *volume.voxel_files(uri)]


def _first_channel(uri: str) -> str:
    suffix = volume.suffix_of(uri)
    return f"{uri[: len(uri) - len(suffix)]}_0000{suffix}"


def with_slices(source: Source) -> Source:
    """``source`` with its slices, where a list names the folder of a DICOM series."""
    if volume.suffix_of(source.uri):
        return source
    return replace(source, files=tuple(dicom_files(list_files(source.uri), source.uri)))


def dicom_files(entries: Entries, folder: str) -> list[str]:
    """The files directly in ``folder`` that are, or may be, slices of a DICOM series.

    Files with endings of other kinds are none. Without any .dcm, the first and the last of the others are looked into:
    one that is DICOM makes all of them candidates, and decoding sorts out what is none.
    """
    here = sorted(u for u in entries if folder_of(u) == folder.rstrip("/") and name_of(u) != "DICOMDIR")
    slices = [u for u in here if u.lower().endswith(DICOM_SUFFIX)]
    others = [u for u in here if _may_be_dicom(u)]
    if others and any(_is_dicom(u, entries[u]) for u in {others[0], others[-1]}):
        slices += others
    return sorted(slices)


def _may_be_dicom(uri: str) -> bool:
    ending = PurePosixPath(uri).suffix.lower()
    return ending in DICOM_ENDINGS or ending[1:].isdecimal()


def _is_dicom(uri: str, entry: Entry) -> bool:
    if entry.size_bytes < DICOM_PREAMBLE:
        return False
    try:
        return object_store.read(uri, start=DICOM_PREAMBLE - 4, length=4) == b"DICM"
    except object_store.NotGiven:  # reading the series will say so, if it is one
        return False


def read_json(uri: str) -> Any:
    try:
        return config.parse_json(object_store.read(uri))
    except ValueError as err:
        raise UserError(f"{uri} is not valid JSON ({err}); correct it") from None


def class_names(labels: Any, uri: str) -> tuple[str, ...]:
    """Names by label value, from the Decathlon's value -> name or nnU-Net's name -> value."""
    if not labels:
        return ()
    if not isinstance(labels, dict):
        raise UserError(f'{uri}: \'labels\' must be a mapping such as {{"1": "liver"}}, not {labels!r}')
    names: dict[int, str] = {}
    for key, value in labels.items():
        number, name = (key, value) if isinstance(value, str) else (value, key)
        if not re.fullmatch(r"-?[0-9]+", str(number)):
            raise UserError(f"{uri}: 'labels' has the item {key!r}: {value!r}; one must be an integer")
        number = int(number)
        if not 0 <= number <= MAX_LABEL:
            raise UserError(f"{uri}: the label '{name}' has the value {number}; use 0 to {MAX_LABEL}")
        if number in names:
            raise UserError(f"{uri}: the labels '{names[number]}' and '{name}' share the value {number}")
        names[number] = str(name)
    return tuple(names.get(v, "") for v in range(max(names) + 1))


def region_fields(description: Mapping[str, Any], uri: str) -> dict[str, Any]:
    """The ``classes``, ``regions`` and ``region_values`` of nnU-Net's labels, some of which are lists of values.

    Every label but background and "ignore" is then a region. A value that is a region by itself has its name.
    """
    labels = description["labels"]
    regions: dict[str, list[int]] = {}
    names: dict[Any, str] = {}
    for name, value in labels.items():
        values = value if isinstance(value, list) else [value]
        if not values or not all(type(v) is int and 0 <= v <= MAX_LABEL for v in values):
            raise UserError(f"{uri}: the label '{name}' is {value!r}; write values from 0 to {MAX_LABEL}")
        if values in ([0], [labels.get("ignore")]):
            names[values[0]] = str(name)
        else:
            regions[str(name)] = sorted(set(values))
    names |= {
        v: next((n for n, own in regions.items() if own == [v]), f"label {v}")
        for r in regions.values()
        for v in r
    }
    order = description.get("regions_class_order")
    if not isinstance(order, list) or len(order) != len(regions) or not all(type(v) is int for v in order):
        what = "the value that each region is written as, those written later on top"
        raise UserError(f"{uri}: regions want 'regions_class_order', {len(regions)} numbers: {what}")
    return {
        "classes": tuple(names.get(v, "") for v in range(max(names) + 1)),
        "regions": tuple(f"{name}:{','.join(map(str, values))}" for name, values in regions.items()),
        "region_values": tuple(order),
    }


def parse_split(word: str, where: str) -> str:
    if word in ("", "n/a"):
        return "train"
    if word.lower() not in SPLIT_WORDS:
        raise UserError(f"{where}: {config.unknown('split', word, ('train', 'val', 'test'))}")
    return SPLIT_WORDS[word.lower()]


def parse_fold(word: str, where: str) -> int:
    if word in ("", "n/a"):
        return -1
    try:
        if abs(fold := int(word)) <= MAX_FOLD:
            return fold
    except ValueError:
        pass
    raise UserError(f"{where}: the fold is {word!r}; write an integer")


def parse_digest(word: str, where: str) -> str:
    if word and not re.fullmatch(r"[0-9a-f]{64}", word.lower()):
        raise UserError(f"{where}: the sha256 is {word!r}; write 64 hex digits or leave it empty")
    return word.lower()
