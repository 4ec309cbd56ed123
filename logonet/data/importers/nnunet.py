"""nnU-Net's raw datasets, with the folds of splits_final.json."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from logonet.core.errors import UserError
from logonet.data.importers.common import Entries, folder_of, name_of, read_json
from logonet.data.importers.msd import NO_MODALITY, common_fields
from logonet.data.manifest import NIFTI_SUFFIXES, Source

SPLITS_FILE = "splits_final.json"


def is_nnunet(description: Mapping[str, Any]) -> bool:
    return "channel_names" in description and "file_ending" in description


def nnunet_sources(uri: str, description: Mapping[str, Any], entries: Entries) -> list[Source]:
    """The scans of an nnU-Net v2 raw dataset: every channel is a scan, with its case as subject."""
    folder, ending = folder_of(uri), description["file_ending"]
    if ending not in NIFTI_SUFFIXES:
        raise UserError(f"{uri}: its files end in '{ending}'; logonet reads .nii.gz and .nii; convert them")
    names = description["channel_names"]
    if not isinstance(names, dict) or not all(str(k).isdecimal() for k in names):
        raise UserError(f'{uri}: \'channel_names\' must be a mapping such as {{"0": "CT"}}, not {names!r}')
    channels = {int(k): str(v) for k, v in names.items()}
    common = common_fields(uri, description)
    found = []
    for which, split in (("Tr", "train"), ("Ts", "test")):
        for image in entries:
            if folder_of(image) != f"{folder}/images{which}" or not image.endswith(ending):
                continue
            case, _, channel = name_of(image).removesuffix(ending).rpartition("_")
            if not re.fullmatch(r"[0-9]{4}", channel) or int(channel) not in channels:
                known = ", ".join(f"_{c:04d}" for c in channels) + f" before {ending}"
                raise UserError(f"{image}: does not end in a channel of {uri} ({known}); rename it")
            label = f"{folder}/labels{which}/{case}{ending}"
            modality = channels[int(channel)]
            own: dict[str, Any] = {
                "split": split,
                "modality": "" if modality.lower() in NO_MODALITY else modality,
            }
            own["label_uri"] = label if label in entries else ""
            found.append(Source(uri=image, subject=case, **own, **common))
    splits = f"{folder}/{SPLITS_FILE}"
    return _with_folds(found, splits) if splits in entries else found


def _with_folds(found: Sequence[Source], uri: str) -> list[Source]:
    """``found`` with the folds of nnU-Net's splits_final.json, a list of {train: [case], val: [case]}."""
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
    if unknown := sorted(set(folds) - {s.subject for s in found if s.split == "train"}):
        some = ", ".join(unknown[:3] + ["..."] * (len(unknown) > 3))
        lacks = f"{uri}: names {len(unknown)} cases that imagesTr lacks ({some})"
        raise UserError(f"{lacks}; copy them there or remove them from the splits")
    return [replace(s, fold=folds.get(s.subject, -1)) if s.split == "train" else s for s in found]
