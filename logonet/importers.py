"""What is to be inspected at a URI: every way in which people lay out scans, labels and splits.

``sources`` is the one entrance. The layouts: Medical Segmentation Decathlon and MONAI lists (JSON), nnU-Net v2
raw folders, BIDS with derivatives, CSV tables, DICOM series, and plain folders of NIfTI files. Files are
told by their names; no scan is opened here. Everything may lie in a local folder or in a bucket.

Lists travel with the data they describe, so a JSON list may name what lies below the folder it was found in, and
whatever the user allows in ``LOGONET_DATA_ROOTS``. A CSV is the user's own and may name any place; from a bucket it
may not name this machine's files.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from logonet import config, redaction, store
from logonet.errors import UserError
from logonet.manifest import MAX_LABEL, NIFTI_SUFFIXES, Source, stem
from logonet.store import Entry

DICOM_SUFFIX = ".dcm"
DATASET_FILE = "dataset.json"
SPLITS_FILE = "splits_final.json"
LABEL_FOLDERS = {"labelstr", "labelsts", "labels"}
LABEL_ENDINGS = ("_labels", "_label", "_seg", "_mask", "_dseg")
LISTS = {"training": "train", "validation": "val", "test": "test"}
SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "validation": "val", "test": "test"}
# nnU-Net's names of normalisations, where others name a modality
NO_MODALITY = {"nonorm", "zscore", "rescale_to_0_1", "rgb_to_0_1"}
CSV_COLUMNS = (
    "image",
    "label",
    "subject",
    "dataset",
    "licence",
    "modality",
    "split",
    "fold",
    "sha256",
)
STATS_AT_ONCE = 16
DATA_ROOTS = "LOGONET_DATA_ROOTS"  # places that lists may name besides their own, with commas between
MAX_FOLD = 10**6
Entries = Mapping[str, Entry]  # what a listing gave, by URI


def sources(uri: str) -> list[Source]:
    """What is to be inspected at ``uri``: a scan, a list (JSON or CSV), or everything below a folder or prefix.

    Below a folder: each Decathlon or nnU-Net dataset.json, each BIDS tree and each folder of .dcm slices is
    read by its own rules, and every other .nii and .nii.gz is a scan. Hidden files (macOS leaves
    ``._x.nii.gz``) and label maps (in labelsTr/, or named like an image with "_labels", "_seg", ... behind)
    are no scans; the latter become their image's ``label_uri``.

    Raises:
        UserError: when nothing is found, or a list, table or dataset.json cannot be understood.
    """
    known: dict[str, Entry] = {}
    if uri.lower().endswith(".json"):
        description = _description(uri)
        if _is_nnunet(description):
            known = _listed(_folder(uri))
            found = _nnunet(uri, description, known)
            nothing = f"no images of this nnU-Net dataset in {_folder(uri)}/imagesTr; copy them there"
        else:
            found = _lists(uri, description, _folder(uri))
            nothing = "has no 'training', 'validation' or 'test' list of scans; is it a dataset.json?"
    elif uri.lower().endswith(".csv"):
        found = _table_of_scans(uri)
        nothing = "lists no scans; write a row per scan below the header image,label,subject,..."
    elif uri.lower().endswith(NIFTI_SUFFIXES):
        entry = store.stat(uri)
        if entry is None:
            raise UserError(f"{uri}: no such scan; correct the path")
        known = {uri: entry}
        found = _plain(known, _folder(uri))
        nothing = "is named like a label map; give its image"
    else:
        known = _listed(uri)
        found = _below(uri, known)
        looked_for = ".nii.gz, .nii, .dcm and dataset.json"
        nothing = f"no scans found ({len(known)} files; looked for {looked_for}); correct the URI"
    if not found:
        raise UserError(f"{uri}: {nothing}")
    redaction.hide_names((s.uri, (*s.files, s.label_uri, s.subject)) for s in found)
    return _versioned(found, known)


def _below(root: str, entries: Entries) -> list[Source]:
    """Everything in a folder: the datasets that describe themselves, then BIDS, then what is left."""
    found, described = [], []
    for uri in entries:
        if _name(uri) != DATASET_FILE:
            continue
        description = _description(uri)
        if _is_nnunet(description):
            # described even when empty: nnU-Net copies its dataset.json beside preprocessed data and results
            found += _nnunet(uri, description, entries)
            described.append(_folder(uri) + "/")
        elif listed := _lists(uri, description, root):
            found += listed
            described.append(_folder(uri) + "/")
    rest = {u: e for u, e in entries.items() if not u.startswith(tuple(described))}
    for bids in _bids_roots(root, rest):
        found += _bids(bids, rest)
        inside = re.compile(re.escape(bids + "/") + r"(sub-[A-Za-z0-9]+|derivatives|sourcedata)/")
        rest = {u: e for u, e in rest.items() if not inside.match(u)}
    found += _plain(rest, root)
    return found


def _listed(uri: str) -> dict[str, Entry]:
    return {e.uri: e for e in store.listing(uri) if not _name(e.uri).startswith(".")}


def _versioned(found: Sequence[Source], known: Entries) -> list[Source]:
    """``found`` with sizes and versions; lists may name files far away from where anything was listed."""
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


def _stat(uri: str) -> Entry | None:
    try:
        return store.stat(uri)
    except store.Refused:  # one scan of a list: who reads it will say so
        return None


# ------------------------------------------------------------------------------- Decathlon, MONAI lists


def _description(uri: str) -> dict[str, Any]:
    """The mapping that a dataset.json holds."""
    description = _json(uri)
    if not isinstance(description, dict):
        raise UserError(f"{uri} must hold a mapping with 'training' and 'test', as in the Decathlon")
    return description


def _json(uri: str) -> Any:
    try:
        return config.parse_json(store.read(uri))
    except ValueError as err:
        raise UserError(f"{uri} is not valid JSON ({err}); mend it") from None


def _lists(uri: str, description: Mapping[str, Any], root: str) -> list[Source]:
    """The scans of an MSD dataset.json or a MONAI list; none when it has no lists of scans.

    All of them must lie below ``root``.
    """
    if not any(description.get(key) for key in LISTS):
        return []
    folder = _folder(uri)
    modalities = description.get("modality") or {}
    if not isinstance(modalities, dict):
        modalities = {"0": modalities}
    common = _common(uri, description)
    found = []
    for key, split in LISTS.items():
        items = description.get(key) or []
        if not isinstance(items, list):
            raise UserError(f"{uri}: '{key}' must be a list of scans, not {items!r}")
        for item in items:
            # the Decathlon lists its test scans as strings, others as mappings; MONAI allows a list of channels
            pair = {"image": item} if isinstance(item, str) else item
            images = _paths(pair.get("image")) if isinstance(pair, dict) else []
            if not images:
                raise UserError(f"{uri}: an item of '{key}' names no image: {item!r}; write {{image, label}}")
            label = _paths(pair.get("label"))
            if pair.get("label") and len(label) != 1:
                raise UserError(
                    f"{uri}: an item of '{key}' has the label {pair['label']!r}; give the path of one label map"
                )
            fold = pair.get("fold", -1)
            if type(fold) is not int or abs(fold) > MAX_FOLD:  # True is an int too
                raise UserError(f"{uri}: an item of '{key}' has the fold {fold!r}; write an integer")
            # one subject for all channels, or they could fall on both sides of a split
            case = images[0] if len(images) == 1 else (label or images)[0]
            subject = str(pair.get("subject") or _subject(case))
            for channel, image in enumerate(images):
                source = Source(
                    uri=_inside(root, _resolve(folder, image), uri),
                    subject=subject,
                    modality=str(modalities.get(str(channel), "")),
                    split=split,
                    fold=fold,
                    label_uri=_inside(root, _resolve(folder, label[0]), uri) if label else "",
                    **common,
                )
                found.append(_series(source))
    return found


def _common(uri: str, description: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "dataset": str(description.get("name") or _name(_folder(uri))),
        "licence": str(description.get("licence") or description.get("license") or ""),
        "classes": _classes(description.get("labels"), uri),
    }


def _classes(labels: Any, uri: str) -> tuple[str, ...]:
    """Names by label value, from the Decathlon's value -> name or nnU-Net's name -> value."""
    if not labels:
        return ()
    if not isinstance(labels, dict):
        raise UserError(f'{uri}: \'labels\' must be a mapping such as {{"1": "liver"}}, not {labels!r}')
    names: dict[int, str] = {}
    for key, value in labels.items():
        if isinstance(value, list):
            raise UserError(
                f"{uri}: the label '{key}' is a region of the values {value}; regions overlap and logonet "
                "trains one class per voxel, so declare one value per name"
            )
        number, name = (key, value) if isinstance(value, str) else (value, key)
        if not re.fullmatch(r"-?[0-9]+", str(number)):
            raise UserError(
                f"{uri}: 'labels' has the item {key!r}: {value!r}; one of the two must be the label's integer"
            )
        number = int(number)
        if not 0 <= number <= MAX_LABEL:
            raise UserError(f"{uri}: the label '{name}' has the value {number}; use 0 to {MAX_LABEL}")
        if number in names:
            raise UserError(f"{uri}: the labels '{names[number]}' and '{name}' share the value {number}")
        names[number] = str(name)
    return tuple(names.get(v, "") for v in range(max(names) + 1))


def _paths(value: Any) -> list[str]:
    """A path or a list of paths; empty for anything else."""
    values = value if isinstance(value, list) else [value]
    return values if all(isinstance(v, str) and v for v in values) else []


def _series(source: Source) -> Source:
    """``source`` with its slices, where a list names the folder of a DICOM series."""
    if source.uri.lower().endswith(NIFTI_SUFFIXES):
        return source
    return replace(source, files=tuple(u for u in _listed(source.uri) if u.lower().endswith(DICOM_SUFFIX)))


# -------------------------------------------------------------------------------------------- nnU-Net


def _is_nnunet(description: Mapping[str, Any]) -> bool:
    return "channel_names" in description and "file_ending" in description


def _nnunet(uri: str, description: Mapping[str, Any], entries: Entries) -> list[Source]:
    """The scans of an nnU-Net v2 raw dataset: every channel is a scan, with its case as subject."""
    folder, ending = _folder(uri), description["file_ending"]
    if ending not in NIFTI_SUFFIXES:
        raise UserError(
            f"{uri}: its files end in '{ending}'; logonet reads .nii.gz and .nii, so convert them"
        )
    names = description["channel_names"]
    if not isinstance(names, dict) or not all(str(k).isdecimal() for k in names):
        raise UserError(f'{uri}: \'channel_names\' must be a mapping such as {{"0": "CT"}}, not {names!r}')
    channels = {int(k): str(v) for k, v in names.items()}
    common = _common(uri, description)
    found = []
    for which, split in (("Tr", "train"), ("Ts", "test")):
        for image in entries:
            if _folder(image) != f"{folder}/images{which}" or not image.endswith(ending):
                continue
            case, _, channel = _name(image).removesuffix(ending).rpartition("_")
            if not re.fullmatch(r"[0-9]{4}", channel) or int(channel) not in channels:
                raise UserError(
                    f"{image}: does not end in a channel of {uri} ({', '.join(f'_{c:04d}' for c in channels)} "
                    f"before {ending}); rename it"
                )
            label = f"{folder}/labels{which}/{case}{ending}"
            modality = channels[int(channel)]
            source = Source(
                uri=image,
                subject=case,
                modality="" if modality.lower() in NO_MODALITY else modality,
                split=split,
                label_uri=label if label in entries else "",
                **common,
            )
            found.append(source)
    splits = f"{folder}/{SPLITS_FILE}"
    return _with_folds(found, splits) if splits in entries else found


def _with_folds(found: Sequence[Source], uri: str) -> list[Source]:
    """``found`` with the folds of nnU-Net's splits_final.json, a list of {train: [case], val: [case]}."""
    folds: dict[str, int] = {}
    try:
        for number, fold in enumerate(_json(uri)):
            for case in fold["val"]:
                if not isinstance(case, str):
                    raise TypeError
                if folds.setdefault(case, number) != number:
                    raise UserError(
                        f"{uri}: validates '{case}' in the folds {folds[case]} and {number}; keep one of them"
                    )
    except (TypeError, KeyError):
        raise UserError(f"{uri} must hold a list of {{train: [cases], val: [cases]}}") from None
    if unknown := sorted(set(folds) - {s.subject for s in found if s.split == "train"}):
        raise UserError(
            f"{uri}: names {len(unknown)} cases that imagesTr lacks ({', '.join(unknown[:3])}"
            f"{', ...' if len(unknown) > 3 else ''}); copy them there or remove them from the splits"
        )
    return [replace(s, fold=folds.get(s.subject, -1)) if s.split == "train" else s for s in found]


# ----------------------------------------------------------------------------------------------- BIDS

# func, dwi, fmap, perf... hold time series and maps, not scans of one anatomy
_BIDS_IMAGE = re.compile(
    r"(?P<root>(?:.*/)?)(?P<subject>sub-[A-Za-z0-9]+)/(?:ses-[A-Za-z0-9]+/)?(?P<kind>anat|ct)/"
    r"(?P=subject)_(?:[^/]*_)?(?P<suffix>[A-Za-z0-9]+)\.nii(?:\.gz)?"
)
_BIDS_MAP = re.compile(r"sub-[^/]*_(dseg|seg|mask|probseg|defacemask)\.nii(\.gz)?")
_BIDS_LABEL = re.compile(r"sub-[^/]*_(?:d?seg|label-[A-Za-z0-9]+(?:_[^/]*)?_mask)\.nii(?:\.gz)?")
# what a label map's name may have beyond its image's name and still lie on the image's grid
_BIDS_EXTRA = {"desc", "label", "seg", "atlas", "space"}


def _bids_roots(root: str, entries: Entries) -> list[str]:
    roots = {}
    for uri in entries:
        match = _BIDS_IMAGE.fullmatch(uri[len(root.rstrip("/")) + 1 :])
        if match and not re.search(r"(^|/)(derivatives|sourcedata)/", match["root"]):
            roots[store.join(root, match["root"]) if match["root"] else root.rstrip("/")] = True
    return list(roots)


def _bids(root: str, entries: Entries) -> list[Source]:
    """The anatomical images of a BIDS tree with the label maps beside them or in its derivatives.

    A label map of an image is a ``_dseg`` or ``_label-<name>_mask`` whose name has all of the image's
    entities; of several the one with the fewest more of them. Class names come from ``dseg.tsv`` files,
    splits and folds from columns of that name in participants.tsv.
    """
    described, people = f"{root}/dataset_description.json", f"{root}/participants.tsv"
    description = _description(described) if described in entries else {}
    rows = _rows(people, "\t", {"split", "fold"}) if people in entries else iter(())
    participants = {row.get("participant_id", ""): (row, where) for where, row in rows}
    below = {u for u in entries if u.startswith(root + "/")}
    labels: dict[str, list[str]] = {}
    for uri in below:
        if _BIDS_LABEL.fullmatch(_name(uri)):
            labels.setdefault(_name(uri).split("_")[0], []).append(uri)
    tables: dict[str, list[str]] = {}
    for uri in below:
        if uri.endswith("dseg.tsv"):
            tables.setdefault(_folder(uri), []).append(uri)
    classes: dict[str, tuple[str, ...]] = {}
    found = []
    for uri in sorted(below):
        image = _BIDS_IMAGE.fullmatch(uri[len(root) + 1 :])
        if not image or image["root"] or _BIDS_MAP.fullmatch(_name(uri)):
            continue
        label = _bids_label(uri, labels.get(image["subject"], []))
        row, where = participants.get(image["subject"], ({}, ""))
        source = Source(
            uri=uri,
            subject=image["subject"],
            dataset=str(description.get("Name") or _name(root)),
            licence=str(description.get("License") or ""),
            modality="CT" if "ct" in (image["kind"], image["suffix"].lower()) else "MR",
            split=_split(row.get("split", ""), where),
            fold=_fold(row.get("fold", ""), where),
            label_uri=label,
            classes=_bids_classes(label, tables, classes, root) if label else (),
        )
        found.append(source)
    return found


def _bids_name(uri: str) -> tuple[set[str], list[str]]:
    """The entities (key-value) and the other words of a BIDS file name, the suffix last."""
    words = stem(uri).removesuffix(".tsv").split("_")
    return {w for w in words if "-" in w}, [w for w in words if "-" not in w]


def _bids_label(image: str, labels: Sequence[str]) -> str:
    entities, (*_, suffix) = _bids_name(image)
    ranked: list[tuple[tuple[bool, int, bool], str]] = []
    for label in labels:
        own, words = _bids_name(label)
        extra = own - entities
        other_space = any(
            e.startswith("space-") and e not in ("space-orig", f"space-{suffix}") for e in extra
        )
        foreign = {e.partition("-")[0] for e in extra} - _BIDS_EXTRA
        if not entities <= own or other_space or foreign or (words[:-1] and suffix not in words[:-1]):
            continue
        # rather of this very contrast, rather the plain one, rather all classes than one of them
        ranked.append(((not words[:-1], len(extra), words[-1] == "mask"), label))
    ranked.sort()
    if len(ranked) > 1 and ranked[0][0] == ranked[1][0]:
        raise UserError(
            f"{image}: both {ranked[0][1]} and {ranked[1][1]} are label maps of it; remove one, or list the "
            "pairs that you mean in a CSV with the columns image,label"
        )
    return ranked[0][1] if ranked else ""


def _bids_classes(
    label: str, tables: Mapping[str, list[str]], read: dict[str, tuple[str, ...]], root: str
) -> tuple[str, ...]:
    """Class names of a label map: from the nearest dseg.tsv that applies, or from its name."""
    entities, words = _bids_name(label)
    if words[-1] == "mask":
        name = next(e.partition("-")[2] for e in entities if e.startswith("label-"))
        return "background", name
    folder = label
    while folder != root:
        folder = _folder(folder)
        # BIDS' inheritance principle: a table applies to files below it that have all of its entities
        here = [t for t in tables.get(folder, []) if _bids_name(t)[0] <= entities]
        if here:
            nearest = max(here, key=lambda t: (len(_bids_name(t)[0]), t))
            if nearest not in read:
                read[nearest] = _class_table(nearest)
            return read[nearest]
    return ()


def _class_table(uri: str) -> tuple[str, ...]:
    """The classes of a BIDS dseg.tsv."""
    rows = [row for _, row in _rows(uri, "\t", {"index"})]
    if not rows or "name" not in rows[0]:
        raise UserError(f"{uri}: a table of classes has the columns index and name; add them")
    return _classes({row["index"]: row["name"] for row in rows}, uri)


# ------------------------------------------------------------------------------------------------ CSV


def _table_of_scans(uri: str) -> list[Source]:
    """One scan per row: an image, and where given its label, subject, split, ..."""
    found: dict[str, Source] = {}
    for where, row in _rows(uri, ",", set(CSV_COLUMNS)):
        for column in row:
            if column not in CSV_COLUMNS:
                raise UserError(f"{uri}: {config.unknown('column', column, CSV_COLUMNS)}")
        if not row.get("image"):
            raise UserError(f"{where}: names no image; fill in the column 'image'")
        image, label = (_resolve(_folder(uri), row[c]) if row.get(c) else "" for c in ("image", "label"))
        for place in filter(None, (image, label)):
            if store.is_s3(uri) and not store.is_s3(place):
                _inside(uri, place, where)
        if image in found:
            raise UserError(f"{where}: lists {image} a second time; keep one of the rows")
        found[image] = _series(
            Source(
                uri=image,
                subject=row.get("subject") or _subject(row["image"]),
                dataset=row.get("dataset") or _name(uri)[: -len(".csv")],
                licence=row.get("licence", ""),
                modality=row.get("modality", ""),
                split=_split(row.get("split", ""), where),
                fold=_fold(row.get("fold", ""), where),
                label_uri=label,
                sha256=_digest(row.get("sha256", ""), where),
            )
        )
    return list(found.values())


def _rows(uri: str, delimiter: str, wanted: set[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """(where, row) of each line below the header of a table, if it has one of the ``wanted`` columns.

    ``where`` names file and line in errors.
    """
    lines = _lines(uri, delimiter)
    _, first = next(lines, ("", []))
    header = [cell.strip() for cell in first]
    if not wanted & set(header):
        return
    for where, cells in lines:
        if not any(cells):
            continue
        if len(cells) != len(header):
            raise UserError(f"{where}: has {len(cells)} cells, its header {len(header)}; mend the line")
        yield where, {name: cell.strip() for name, cell in zip(header, cells)}


def _lines(uri: str, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    lines = csv.reader(io.StringIO(store.read_text(uri), newline=""), delimiter=delimiter)
    try:
        for cells in lines:
            yield f"{uri}, line {lines.line_num}", cells
    except csv.Error as err:
        raise UserError(f"{uri}, line {lines.line_num}: is no line of a table ({err}); mend it") from None


def _split(word: str, where: str) -> str:
    if word in ("", "n/a"):
        return "train"
    if word.lower() not in SPLIT_WORDS:
        raise UserError(f"{where}: {config.unknown('split', word, ('train', 'val', 'test'))}")
    return SPLIT_WORDS[word.lower()]


def _fold(word: str, where: str) -> int:
    if word in ("", "n/a"):
        return -1
    try:
        if abs(fold := int(word)) <= MAX_FOLD:
            return fold
    except ValueError:
        pass
    raise UserError(f"{where}: the fold is {word!r}; write an integer")


def _digest(word: str, where: str) -> str:
    if word and not re.fullmatch(r"[0-9a-f]{64}", word.lower()):
        raise UserError(f"{where}: the sha256 is {word!r}; write 64 hex digits or leave it empty")
    return word.lower()


# ------------------------------------------------------------------------------------- plain folders


def _plain(entries: Entries, root: str) -> list[Source]:
    """Scans told from labels by folder and name."""
    scans = [u for u in entries if u.lower().endswith(NIFTI_SUFFIXES) and not _BIDS_MAP.fullmatch(_name(u))]
    label_of = {image: label for image in scans if (label := _label_beside(image, entries))}
    labels = set(label_of.values())
    found = []
    for uri in scans:
        below = uri[len(root) :]
        folders = {p.lower() for p in PurePosixPath(below).parts[:-1]} | {_name(root).lower()}
        if uri in labels or folders & LABEL_FOLDERS:
            continue
        source = Source(
            uri=uri,
            subject=_subject(below),
            dataset=_name(root),
            split="test" if "imagests" in folders else "train",
            label_uri=label_of.get(uri, ""),
        )
        found.append(source)
    series: dict[str, list[str]] = {}
    for uri in entries:
        if uri.lower().endswith(DICOM_SUFFIX):
            series.setdefault(_folder(uri), []).append(uri)
    for folder, files in series.items():
        found.append(Source(uri=folder, files=tuple(files), subject=_subject(folder), dataset=_name(root)))
    return found


def _label_beside(image: str, entries: Entries) -> str:
    """The label map that goes by ``image``'s name: labelsTr/x for imagesTr/x, or x_seg beside x."""
    folder, name = _folder(image), _name(image)
    plain = stem(name)
    suffix = name[len(plain) :]
    if _name(folder) in ("imagesTr", "imagesTs"):
        labels = folder[: -len("imagesTr")] + _name(folder).replace("images", "labels")
        channelless = re.sub(r"_[0-9]{4}$", "", plain)  # nnU-Net's images end in their channel
        beside = [f"{labels}/{name}", f"{labels}/{channelless}{suffix}"]
    else:
        beside = [f"{folder}/{plain}{ending}{suffix}" for ending in LABEL_ENDINGS]
    return next((uri for uri in beside if uri in entries), "")


# ---------------------------------------------------------------------------------------------- names


def _folder(uri: str) -> str:
    return uri.rpartition("/")[0] or "."


def _name(uri: str) -> str:
    return PurePosixPath(uri).name


def _resolve(folder: str, path: str) -> str:
    """``path`` as a list in ``folder`` means it."""
    if "://" in path or path.startswith(("/", "~")):
        return path
    for part in PurePosixPath(path).parts:  # drops the Decathlon's "./"
        # the file system walks up by itself, and knows links; a bucket has no folders to walk
        up = part == ".."
        folder = _folder(folder) if up and store.is_s3(folder) else f"{folder.rstrip('/')}/{part}"
    return folder


def _inside(root: str, place: str, named_by: str) -> str:
    """``place``, once it is known to lie below ``root`` or where the user allows it.

    Links in a local folder count as part of it: who can make one there can as well copy files there.

    Raises:
        UserError: that starts with ``named_by``, when it does not.
    """
    allowed = [root, *filter(None, os.environ.get(DATA_ROOTS, "").split(","))]
    if any(_below_folder(place, folder.strip()) for folder in allowed):
        return place
    raise UserError(
        f"{named_by}: names {place}, which does not lie below {root}; move it there, or set {DATA_ROOTS} to the "
        "folders or prefixes that lists may name, with commas between"
    )


def _below_folder(place: str, folder: str) -> bool:
    if store.is_s3(place) or store.is_s3(folder):
        return ".." not in place.split("/") and place.startswith(folder.rstrip("/") + "/")
    path, top = store.local_path(place), os.path.abspath(store.local_path(folder))
    if ".." in path.split("/"):  # what it means depends on links that come before it
        path, top = os.path.join(os.path.realpath(os.path.dirname(path)), "x"), os.path.realpath(top)
    return os.path.commonpath([os.path.abspath(path), top]) == top


def _subject(path: str) -> str:
    """The BIDS subject in the path, else the file's stem without nnU-Net's channel number."""
    bids = re.search(r"(?:^|/)(sub-[A-Za-z0-9]+)", path)
    return bids[1] if bids else re.sub(r"_[0-9]{4}$", "", stem(path))
