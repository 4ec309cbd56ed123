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
from logonet.data.manifest import MAX_LABEL, NIFTI_SUFFIXES, Source, stem
from logonet.storage import object_store
from logonet.storage.object_store import Entry

DICOM_SUFFIX = ".dcm"
LABEL_FOLDERS = {"labelstr", "labelsts", "labels"}
LABEL_ENDINGS = ("_labels", "_label", "_seg", "_mask", "_dseg")
SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "validation": "val", "test": "test"}
STATS_AT_ONCE = 16
DATA_ROOTS = "LOGONET_DATA_ROOTS"  # folders and prefixes that lists may name besides their own, by commas
MAX_FOLD = 10**6
Entries = Mapping[str, Entry]  # what a listing gave, by URI


def folder_of(uri: str) -> str:
    return uri.rpartition("/")[0] or "."


def name_of(uri: str) -> str:
    return PurePosixPath(uri).name


def list_files(uri: str) -> dict[str, Entry]:
    return {e.uri: e for e in object_store.listing(uri) if not name_of(e.uri).startswith(".")}


def _stat(uri: str) -> Entry | None:
    try:
        return object_store.stat(uri)
    except object_store.Refused:  # one scan of a list: reading it will say so
        return None


def resolve(folder: str, path: str) -> str:
    """``path`` as a list in ``folder`` means it."""
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
    """``found`` with sizes and versions. ``known`` are the files listed already; lists may name others."""
    named = {u for s in found for u in (*(s.files or (s.uri,)), s.label_uri) if u}
    with ThreadPoolExecutor(STATS_AT_ONCE) as pool:
        more = pool.map(_stat, sorted(named - set(known)))
        entries = {**known, **{e.uri: e for e in more if e is not None}}
    out = []
    for source in found:
        scan = [entries[u] for u in source.files or (source.uri,) if u in entries]
        label = [entries[source.label_uri]] if source.label_uri in entries else []
        version = config.fingerprint([[e.uri, e.size_bytes, e.version] for e in scan + label])
        out.append(replace(source, size_bytes=sum(e.size_bytes for e in scan), version=version))
    return out


def dicom_series(source: Source) -> Source:
    """``source`` with its slices, where a list names the folder of a DICOM series."""
    if source.uri.lower().endswith(NIFTI_SUFFIXES):
        return source
    return replace(source, files=tuple(u for u in list_files(source.uri) if u.lower().endswith(DICOM_SUFFIX)))


def label_beside(image: str, entries: Entries) -> str:
    """The label map that goes by ``image``'s name: labelsTr/x for imagesTr/x, or x_seg beside x."""
    folder, name = folder_of(image), name_of(image)
    plain = stem(name)
    suffix = name[len(plain) :]
    if name_of(folder) in ("imagesTr", "imagesTs"):
        labels = folder[: -len("imagesTr")] + name_of(folder).replace("images", "labels")
        channelless = re.sub(r"_[0-9]{4}$", "", plain)  # nnU-Net's images end in their channel
        beside = [f"{labels}/{name}", f"{labels}/{channelless}{suffix}"]
    else:
        beside = [f"{folder}/{plain}{ending}{suffix}" for ending in LABEL_ENDINGS]
    return next((uri for uri in beside if uri in entries), "")


def subject_of(path: str) -> str:
    """The BIDS subject in the path, else the file's stem without nnU-Net's channel number."""
    bids = re.search(r"(?:^|/)(sub-[A-Za-z0-9]+)", path)
    return bids[1] if bids else re.sub(r"_[0-9]{4}$", "", stem(path))


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
        if isinstance(value, list):
            why = "regions overlap and logonet trains one class per voxel, so declare one value per name"
            raise UserError(f"{uri}: the label '{key}' is a region of the values {value}; {why}")
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
