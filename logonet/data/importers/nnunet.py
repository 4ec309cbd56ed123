"""nnU-Net's raw datasets, with the folds of splits_final.json."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from logonet.core.errors import UserError
from logonet.data import volume
from logonet.data.importers.common import Entries, folder_of, inside, read_json, resolve
from logonet.data.importers.msd import channel_paths, common_fields
from logonet.data.importers.naming import CHANNEL, as_channels, joined, patient
from logonet.data.manifest import Source, stem

SPLITS_FILE = "splits_final.json"


def is_nnunet(description: Mapping[str, Any]) -> bool:
    return "channel_names" in description and "file_ending" in description


def nnunet_sources(uri: str, description: Mapping[str, Any], entries: Entries, root: str) -> list[Source]:
    """The scans of an nnU-Net v2 raw dataset, with all channels of a case.

    Files that its key "dataset" names must lie below ``root``.
    """
    folder, ending = folder_of(uri), description["file_ending"]
    if ending not in volume.SUFFIXES:
        known = ", ".join(volume.SUFFIXES)
        raise UserError(f"{uri}: its files end in '{ending}'; logonet reads {known}; convert them")
    names = description["channel_names"]
    if not isinstance(names, dict) or not all(str(k).isdecimal() for k in names):
        raise UserError(f'{uri}: \'channel_names\' must be a mapping such as {{"0": "CT"}}, not {names!r}')
    channels = {int(k): str(v) for k, v in names.items()}
    common = common_fields(uri, description)
    cases = description.get("dataset")
    pairs = _in_folders(uri, ending, channels, entries) if cases is None else _listed(uri, cases, root)
    found: dict[tuple[str, str], Source] = {}  # by split and case
    for case, split, images, label in pairs:
        own: dict[str, Any] = {"split": split, "label_uri": label, "subject": patient(case)}
        scans = [
            Source(uri=u, modality=joined([channels.get(c, "")]), **own, **common)
            for c, u in sorted(images.items())
        ]
        found[split, case] = as_channels(scans)
    splits = f"{folder}/{SPLITS_FILE}"
    if splits in entries:
        _set_folds(found, splits)
    return list(found.values())


Case = tuple[str, str, dict[int, str], str]  # name, split, channel -> image, label


def _in_folders(uri: str, ending: str, channels: Mapping[int, str], entries: Entries) -> Iterator[Case]:
    """The cases in imagesTr and imagesTs."""
    folder = folder_of(uri)
    for which, split in (("Tr", "train"), ("Ts", "test")):
        images: dict[str, dict[int, str]] = defaultdict(dict)
        for image in entries:
            if folder_of(image) != f"{folder}/images{which}" or not image.endswith(ending):
                continue
            match = CHANNEL.search(stem(image))
            if not match or int(match[1]) not in channels:
                known = ", ".join(f"_{c:04d}" for c in channels) + f" before {ending}"
                raise UserError(f"{image}: does not end in a channel of {uri} ({known}); rename it")
            images[stem(image)[: match.start()]][int(match[1])] = image
        for case, own in images.items():
            label = f"{folder}/labels{which}/{case}{ending}"
            yield case, split, own, label if label in entries else ""


def _listed(uri: str, cases: Any, root: str) -> Iterator[Case]:
    """The cases of the key "dataset" of a dataset.json, {case: {images: [path, ...], label: path}}."""
    try:
        for case, files in cases.items():
            images, label = channel_paths(files["images"]), files.get("label", "")
            if not images or not isinstance(label, str):
                raise TypeError
            paths = [inside(root, resolve(folder_of(uri), path), uri) for path in (*images, label) if path]
            yield case, "train", dict(enumerate(paths[: len(images)])), paths[-1] if label else ""
    except (AttributeError, TypeError, KeyError):
        raise UserError(
            f"{uri}: 'dataset' must hold {{case: {{images: [path, ...], label: path}}}}"
        ) from None


def _set_folds(found: dict[tuple[str, str], Source], uri: str) -> None:
    """Give the cases in ``found`` the folds of nnU-Net's splits_final.json, a list of {train: [case], val: [case]}."""
    folds: dict[str, int] = {}
    try:
        for number, fold in enumerate(read_json(uri)):
            for case in fold["val"]:
                if not isinstance(case, str):
                    raise TypeError
                if folds.setdefault(case, number) != number:
                    raise UserError(f"{uri}: lists '{case}' in folds {folds[case]} and {number}; keep one")
    except (TypeError, KeyError):
        raise UserError(f"{uri} must hold a list of {{train: [cases], val: [cases]}}") from None
    training = {case for split, case in found if split == "train"}
    if unknown := sorted(set(folds) - training):
        some = ", ".join(unknown[:3] + ["..."] * (len(unknown) > 3))
        lacks = f"{uri}: names {len(unknown)} cases that imagesTr lacks ({some})"
        raise UserError(f"{lacks}; copy them there or remove them from the splits")
    for case in training:
        found["train", case] = replace(found["train", case], fold=folds.get(case, -1))
