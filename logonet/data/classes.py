"""The classes of labels by name: the same organ has other numbers in other datasets.

Names are compared by their words, whatever their order and case: "Left kidney" is "kidney_left". A dataset that
declares no names has only numbers, and is believed to number as the others do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from logonet.core.config import Section
from logonet.core.errors import BadScan, UserError

IGNORE = 255  # index of voxels that nobody has labelled; they count neither in the loss nor in scores
IGNORE_NAME = "ignore"  # nnU-Net's name of them
BACKGROUND = "background"
NUM_VALUES = 256  # of what label maps are written with; those that are read may go further
MAX_REGIONS = 8  # a voxel's regions are the bits of a byte


@dataclass(frozen=True)
class Config(Section, key="data"):
    """Which channels of the scans and which classes of the labels count, and how crops are drawn.

    Attributes:
        fresh_crops: pretraining cuts new crops of every scan in each epoch, as the papers do, and labels them on the
            spot. False trains on the fixed pool of crops that clusterers are fitted on.
        channels: contrasts that make up a scan, in this order, by the last word of their files' names: [flair, t1ce].
            Empty: as the dataset says.
        classes: chosen by name, all others become background; a mapping {new: [old, ...]} merges and renames. Empty:
            all. Of the old names one must be in some dataset; the log names those that are in none.
        regions: {name: [class, ...]}: unions of classes that overlap, such as BraTS' whole tumour, tumour core and
            enhancing tumour; each is an output of the network by itself. Empty: those that the dataset declares.
        region_values: what each region is written as in a label map, those written later on top. Empty: the class
            that a region has and none of those after it.
    """

    fresh_crops: bool = True
    channels: tuple[str, ...] = ()
    classes: tuple[str, ...] | dict[str, tuple[str, ...]] = ()
    regions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    region_values: tuple[int, ...] = ()

    @property
    def members(self) -> dict[str, tuple[str, ...]]:
        """The names that each chosen class goes by in the datasets."""
        if isinstance(self.classes, Mapping):
            return dict(self.classes)
        return {name: (name,) for name in self.classes}


class Labelled(Protocol):
    """What of a manifest's row tells its classes."""

    @property
    def dataset(self) -> str: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def regions(self) -> tuple[str, ...]: ...
    @property
    def region_values(self) -> tuple[int, ...]: ...
    @property
    def label_values(self) -> tuple[int, ...]: ...


def key(name: str) -> tuple[str, ...]:
    """What two names of one class have in common."""
    return tuple(sorted(re.findall(r"[^\W_]+", name.casefold())))


@dataclass(frozen=True)
class Classes:
    """The classes that a network learns or gives.

    Attributes:
        names: of each class index; the first is "background".
        values: what each index is written as in label maps.
        members: names in datasets -> class index, by `key`; what is in none is background, if ``chosen``.
        numbers: label value -> class index, for datasets that declare no names.
        chosen: the user has chosen classes.
        regions: name -> the class indices in it.
        region_values: what each region is written as.
    """

    names: tuple[str, ...]
    values: tuple[int, ...]
    members: Mapping[tuple[str, ...], int] = field(default_factory=dict)
    numbers: Mapping[int, int] = field(default_factory=dict)
    chosen: bool = False
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    region_values: tuple[int, ...] = ()

    @classmethod
    def named(
        cls, names: Sequence[str], values: Sequence[int], *members: Mapping[str, Sequence[str]]
    ) -> Classes:
        """Classes that go by their own names, such as a trained model's, and by those that ``members`` adds.

        Raises:
            UserError: ``members`` adds names to a class that does not exist.
        """
        index_of = {key(name): i for i, name in enumerate(names)}
        for new, olds in (item for more in members for item in more.items()):
            if key(new) not in index_of:
                raise UserError(
                    f"classes names '{new}', which the model lacks (known: {', '.join(names[1:])})"
                )
            index_of |= {key(old): index_of[key(new)] for old in olds}
        # Classes that were merged or renamed have numbers of their own, which no other dataset has.
        numbers = {} if any(members) else {value: i for i, value in enumerate(values) if value}
        return cls(tuple(names), tuple(values), index_of, numbers)

    def of(self, scan: Labelled) -> LabelMap:
        """How to read the label map of ``scan``: by the names its dataset declares, else by number."""
        count = max(NUM_VALUES, len(scan.classes), max(scan.label_values, default=0) + 1)
        index_of, unknown = np.zeros(count, np.uint8), {}
        for value in range(1, count):
            name = scan.classes[value] if value < len(scan.classes) else ""
            if name and key(name) == key(IGNORE_NAME):
                index_of[value] = IGNORE
            elif name:
                index = self.members.get(key(name))
                index_of[value] = index or 0
                if index is None:
                    unknown[value] = name
            elif not any(scan.classes) and (index := self._by_number(value)):
                index_of[value] = index
            elif value in scan.label_values:
                unknown[value] = f"class {value}"
        return LabelMap(tuple(index_of.tolist()), unknown)

    def _by_number(self, value: int) -> int:
        """The class of a value that has no name; 0 for none."""
        return self.numbers.get(value) or self.members.get(key(f"class {value}"), 0)


@dataclass(frozen=True)
class LabelMap:
    """Class indices of the values of a dataset's label maps.

    Attributes:
        index_of: by value, 256 entries or more; IGNORE where a voxel does not count.
        unknown: value -> name, of what is declared, or occurs, and is no class; it is read as background.
    """

    index_of: tuple[int, ...]
    unknown: Mapping[int, str]

    def indices(self, labels_XYZ: np.ndarray) -> np.ndarray:
        """uint8 class indices of a label map's values."""
        table = np.zeros(max(len(self.index_of), int(labels_XYZ.max(initial=0)) + 1), np.uint8)
        table[: len(self.index_of)] = self.index_of
        return table[labels_XYZ]

    def as_values(
        self, labels_XYZ: np.ndarray, found_XYZ: np.ndarray, values: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """A truth and what a model found, in the model's ``values``; background where the truth is to be ignored."""
        indices_XYZ = self.indices(labels_XYZ)
        known_XYZ = indices_XYZ != IGNORE
        values_of = np.array(values, np.uint8)
        return values_of[indices_XYZ * known_XYZ], np.where(known_XYZ, found_XYZ, values_of[0])

    def present(self) -> set[int]:
        """The class indices, background apart, that the dataset has."""
        return set(self.index_of) - {0, IGNORE}


def union(scans: Iterable[Labelled], cfg: Config) -> Classes:
    """The classes of all labelled ``scans``, background first: what is declared, else what occurs.

    Datasets that number a class differently are matched by name; the first one's numbers are written.

    Raises:
        UserError: a chosen class that no dataset has, two names of one class in a dataset, or nothing but background.
    """
    scans = list(scans)
    numbers: dict[str, int] = {}  # name -> value, of the dataset that names it first
    for declared in dict.fromkeys(scan.classes for scan in scans):
        named = {name: v for v, name in enumerate(declared) if name and v and key(name) != key(IGNORE_NAME)}
        _refuse_twice(named)
        for name, value in named.items():
            if key(name) not in map(key, numbers):
                numbers[name] = value
    if not numbers:
        occurring = sorted({v for scan in scans for v in scan.label_values if v})
        if 255 in occurring and occurring != [255]:
            others = ", ".join(map(str, occurring[:-1]))
            raise UserError(
                f"label maps hold 255 beside {others} and no names are declared: is 255 a class, or voxels that nobody "
                f"has labelled? Declare it in a dataset.json, as '{IGNORE_NAME}' in the latter case"
            )
        numbers = {f"class {value}": value for value in occurring}
    if not numbers:
        raise UserError("no scan has a label but background; nothing can be learnt")
    members = cfg.members or {name: (name,) for name in numbers}
    if len(members) >= IGNORE:
        raise UserError(
            f"the labels have {len(members)} classes, and a network learns at most {IGNORE - 1}; choose some of them "
            "as data.classes"
        )
    known_keys = set(map(key, numbers))
    for names in members.values():
        if not known_keys & set(map(key, names)):
            raise UserError(
                f"data.classes names '{' or '.join(names)}', which no dataset has (known: {', '.join(numbers)})"
            )
    for name in members:
        if key(name) in (key("mean"), key(BACKGROUND)):
            raise UserError(f"the class name '{name}' is taken by the tables of scores; give it another name")
    index_of = {key(old): i for i, olds in enumerate(members.values(), 1) for old in olds}
    known = Classes(
        (BACKGROUND, *members),
        (0, *_values(numbers, members)),
        index_of,
        {value: index_of[key(name)] for name, value in numbers.items() if key(name) in index_of},
        chosen=bool(cfg.members),
    )
    return replace(known, **_regions(scans, known, cfg))


def absent(scans: Iterable[Labelled], cfg: Config) -> list[str]:
    """The names that ``cfg.classes`` has beside others for one class, and no dataset has."""
    declared = set()
    for scan in scans:
        names = scan.classes if any(scan.classes) else [f"class {value}" for value in scan.label_values]
        declared |= set(map(key, names))
    return [n for names in cfg.members.values() if len(names) > 1 for n in names if key(n) not in declared]


def _regions(scans: Sequence[Labelled], known: Classes, cfg: Config) -> dict[str, Any]:
    """The ``regions`` and ``region_values`` of `Classes`: those chosen, else those that the one dataset declares."""
    declared = {(scan.regions, scan.region_values) for scan in scans}
    if cfg.regions:
        index_of = {key(name): index for index, name in enumerate(known.names)}
        names = [name for members in cfg.regions.values() for name in members]
        if missing := [name for name in names if key(name) not in index_of]:
            told = ", ".join(known.names[1:])
            raise UserError(
                f"data.regions names the class '{missing[0]}', which there is not (known: {told})"
            )
        regions = {name: tuple(index_of[key(m)] for m in members) for name, members in cfg.regions.items()}
        values = cfg.region_values
    elif declared == {((), ())}:
        return {}
    elif len(declared) > 1:
        raise UserError("datasets declare different regions; give those that are meant as data.regions")
    else:
        ((texts, values),) = declared
        pairs = [text.rpartition(":") for text in texts]
        regions = {n: tuple(known.numbers.get(int(v), 0) for v in own.split(",")) for n, _, own in pairs}
        if lost := [name for name, own in regions.items() if 0 in own]:
            raise UserError(
                f"data.classes leaves out a class of the region '{lost[0]}'; give data.regions too"
            )
    if len(regions) > MAX_REGIONS:
        raise UserError(f"there are {len(regions)} regions; at most {MAX_REGIONS} can be learnt at once")
    values = values or tuple(_top_values(regions, known))
    if len(values) != len(regions) or not {*values} <= {*known.values}:
        told = ", ".join(map(str, known.values[1:]))
        raise UserError(
            f"data.region_values is {list(values)}; give each of {', '.join(regions)} one of {told}"
        )
    return {"regions": regions, "region_values": values}


def _top_values(regions: Mapping[str, tuple[int, ...]], known: Classes) -> Iterator[int]:
    """The value of the one class of each region that no later region has."""
    for place, (name, members) in enumerate(regions.items()):
        later = {index for others in list(regions.values())[place + 1 :] for index in others}
        own = [index for index in members if index not in later]
        if len(own) != 1:
            raise UserError(f"what the region '{name}' is written as is not clear; set data.region_values")
        yield known.values[own[0]]


def _values(numbers: Mapping[str, int], members: Mapping[str, tuple[str, ...]]) -> list[int]:
    """The value of each class: its dataset's where it is one class there and no other has it, else 1, 2, 3...; so too
    where a value is above 255, since label maps are written in bytes."""
    by_key = {key(name): value for name, value in numbers.items()}
    found = [[by_key[key(old)] for old in olds if key(old) in by_key] for olds in members.values()]
    own = [values[0] for values in found if len(values) == 1]
    fits = len(set(own)) == len(members) and max(own) < NUM_VALUES
    return own if fits else list(range(1, len(members) + 1))


def _refuse_twice(named: Mapping[str, int]) -> None:
    seen: dict[tuple[str, ...], str] = {}
    for name in named:
        if (other := seen.setdefault(key(name), name)) != name:
            raise UserError(
                f"the class names '{other}' and '{name}' of one dataset are the same words; give each a name of its own"
            )


def check_present(labels_XYZ: np.ndarray, label_map: LabelMap, scan_id: str, classes: Classes) -> None:
    """Refuse a label map with values that are no class, where the user has not chosen classes.

    Raises:
        BadScan: naming the first such value.
    """
    if classes.chosen or not label_map.unknown:
        return
    values = np.flatnonzero(np.bincount(labels_XYZ.ravel(order="K"), minlength=NUM_VALUES))
    if odd := [int(v) for v in values if int(v) in label_map.unknown]:
        known = ", ".join(map(str, classes.values))
        what = f"the value {odd[0]}, which is no class of the dataset"
        hint = "correct the label or the dataset's class list"
        raise BadScan(f"{scan_id}: its label map holds {what} (those are {known}); {hint}")


def match(scans: Sequence[Labelled], model: Classes) -> dict[tuple[str, ...], LabelMap]:
    """How to read the label maps of ``scans`` as a model's classes, by what their datasets declare.

    Raises:
        UserError: a dataset has none of the model's classes, or, where nothing is declared, other numbers; both tables
            are shown.
    """
    found: dict[tuple[str, ...], LabelMap] = {}
    for scan in scans:
        label_map = model.of(scan)
        declared = any(scan.classes[1:])
        if not label_map.present() or (not declared and label_map.unknown):
            theirs = {v: n for v, n in enumerate(scan.classes) if v and n} or {
                v: "?" for v in scan.label_values if v
            }
            ours = _table(zip(model.values[1:], model.names[1:]))
            raise UserError(
                f"the labels of {scan.dataset} are not the model's: they are {_table(theirs.items())}, the model's "
                f"{ours}; give them its names in a dataset.json, or say which are which as {{model's: [dataset's]}}"
            )
        found[scan.classes] = label_map
    return found


def _table(pairs: Iterable[tuple[int, str]]) -> str:
    return ", ".join(f"{value} {name}" for value, name in pairs)


def membership(regions: Sequence[Sequence[int]]) -> np.ndarray:
    """uint8 bits of each of 256 class indices: bit r is set where region r has the class."""
    bits = np.zeros(NUM_VALUES, np.uint8)
    for r, members in enumerate(regions):
        bits[list(members)] |= np.uint8(1 << r)
    return bits


def written_as(region_values: Sequence[int]) -> np.ndarray:
    """uint8 label value of each of 256 bit patterns of regions: that of the last region in it, 0 of none."""
    values = np.zeros(NUM_VALUES, np.uint8)
    for r, value in enumerate(region_values):
        values[(np.arange(NUM_VALUES) & (1 << r)) > 0] = value
    return values
