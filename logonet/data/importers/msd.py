"""Decathlon datasets and MONAI's data lists (dataset.json)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from logonet.core import config
from logonet.core.errors import UserError
from logonet.data.importers import common
from logonet.data.importers.common import Unused
from logonet.data.importers.naming import as_channels, joined
from logonet.data.manifest import Source

DATASET_FILE = "dataset.json"
LISTS = {
    "training": "train",
    "validation": "val",
    "test": "test",
    "testing": "test",
}  # "testing": Auto3DSeg's
ITEM_KEYS = ("image", "label", "fold", "subject")


def read_description(uri: str) -> dict[str, Any]:
    """The mapping that a dataset.json holds."""
    description = common.read_json(uri)
    if not isinstance(description, dict):
        raise UserError(f"{uri} must hold a mapping with 'training' and 'test', as in the Decathlon")
    return description


def msd_sources(uri: str, description: Mapping[str, Any], root: str, unused: Unused) -> list[Source]:
    """The scans of an MSD dataset.json or a MONAI list; none when it has no lists of scans.

    All of them must lie below ``root``. What its items say beyond what is used is added to ``unused``.
    """
    if not any(description.get(key) for key in LISTS):
        return []
    folder = common.folder_of(uri)
    modalities = description.get("modality") or {}
    if not isinstance(modalities, dict):
        modalities = {"0": modalities}
    fields = common_fields(uri, description)
    for key, values in description.items():
        if key not in LISTS and isinstance(values, list) and values and _names_image(values[0]):
            raise UserError(f"{uri}: {config.unknown('list of scans', key, LISTS)}")
    found = []
    for key, split in LISTS.items():
        items = description.get(key) or []
        if not isinstance(items, list):
            raise UserError(f"{uri}: '{key}' must be a list of scans, not {items!r}")
        for item in items:
            # the Decathlon lists its test scans as strings, others as mappings; MONAI allows a list of channels
            pair = {"image": item} if isinstance(item, str) else item
            images = channel_paths(pair.get("image")) if isinstance(pair, dict) else []
            if not images:
                raise UserError(f"{uri}: an item of '{key}' names no image: {item!r}; write {{image, label}}")
            for unknown in set(pair) - set(ITEM_KEYS):
                if near := difflib.get_close_matches(str(unknown), ITEM_KEYS, n=1, cutoff=0.75):
                    raise UserError(
                        f"{uri}: an item of '{key}' has the key '{unknown}'; did you mean '{near[0]}'?"
                    )
                unused[f"keys of list items named '{unknown}'"].append(uri)
            label = channel_paths(pair.get("label"))
            if pair.get("label") and len(label) != 1:
                raise UserError(f"{uri}: an item of '{key}' has the label {pair['label']!r}; give one path")
            fold = pair.get("fold", -1)
            if type(fold) is not int or abs(fold) > common.MAX_FOLD:  # True is an int too
                raise UserError(f"{uri}: an item of '{key}' has the fold {fold!r}; write an integer")
            label_uri = common.inside(root, common.resolve(folder, label[0]), uri) if label else ""
            own: dict[str, Any] = {"split": split, "fold": fold, "label_uri": label_uri, **fields}
            own["subject"] = str(pair.get("subject") or "")
            uris = [common.inside(root, common.resolve(folder, image), uri) for image in images]
            # One image may hold all the channels that the list names, as the Decathlon's brains do.
            names = [
                str(modalities.get(str(c), "")) for c in range(len(images) if images[1:] else len(modalities))
            ]
            if images[1:]:
                source = as_channels([Source(u, modality=m, **own) for u, m in zip(uris, names)])
            else:
                source = common.with_slices(Source(uris[0], modality=joined(names), **own))
            found.append(source)
    return found


def common_fields(uri: str, description: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "dataset": str(description.get("name") or common.name_of(common.folder_of(uri))),
        "licence": str(description.get("licence") or description.get("license") or ""),
        **_classes(uri, description),
    }


def _classes(uri: str, description: Mapping[str, Any]) -> dict[str, Any]:
    labels = description.get("labels")
    if isinstance(labels, dict) and any(isinstance(value, list) for value in labels.values()):
        return common.region_fields(description, uri)
    return {"classes": common.class_names(labels, uri)}


def _names_image(item: Any) -> bool:
    return isinstance(item, dict) and "image" in item


def channel_paths(value: Any) -> list[str]:
    """A path or a list of paths; empty for anything else."""
    values = value if isinstance(value, list) else [value]
    return values if all(isinstance(v, str) and v for v in values) else []
