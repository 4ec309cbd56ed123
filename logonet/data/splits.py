"""Which labelled scans train, validate and test: by subject, seeded, and the same wherever the scans lie."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Annotated

from annotated_types import Ge, Lt

from logonet.core import config, seeding
from logonet.core.config import Count, Fraction, Natural, Section
from logonet.core.errors import UserError
from logonet.data.manifest import Scan

SETS = ("test", "val", "train", "excluded")  # the earlier wins where a manifest has a subject in two


@dataclass(frozen=True)
class Config(Section, key="split"):
    """How to split.

    Attributes:
        test_share: of the subjects, put aside for testing when the manifest has no labelled test scans.
        folds: parts that the subjects that are not tested fall into.
        fold: the one that validates; None trains on all that is not tested.
        fraction: share of the training subjects that is used, at least one; nested, so 1 % lies within 5 %.
        shots: use so many training subjects instead; nested too.
        subset: which subjects ``fraction`` and ``shots`` take: 0, 1, 2... are independent draws, each nested in itself.
        seed: of the subjects' order.
        test_names, val_names: patterns of the subjects or files that test and validate, such as "img0035" or "*_12";
            they go before the manifest's own sets, and those of either leave nothing for ``test_share`` or ``fold``.
    """

    test_share: Annotated[float, Ge(0), Lt(1)] = 0.0
    folds: Annotated[int, Ge(2)] = 5
    fold: Natural | None = 0
    fraction: Fraction = 1.0
    shots: Count | None = None
    seed: int = 0
    test_names: tuple[str, ...] = field(default=(), metadata=config.OMIT_DEFAULT)
    val_names: tuple[str, ...] = field(default=(), metadata=config.OMIT_DEFAULT)
    subset: Natural = field(default=0, metadata=config.OMIT_DEFAULT)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shots is not None and self.fraction != 1:
            both = f"split.shots is {self.shots} and split.fraction {self.fraction:g}"
            raise UserError(f"{both}; set one of them only")


@dataclass(frozen=True)
class Case:
    """What a split knows of a scan: ``subject`` is "dataset/subject"."""

    subject: str
    sha256: str
    label_sha256: str


@dataclass(frozen=True)
class Split:
    """Scan ids by what they are for, sorted; ``excluded`` ones for nothing. ``cases`` has a row for every id."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    excluded: tuple[str, ...] = ()
    cases: Mapping[str, Case] = field(kw_only=True)

    @property
    def id(self) -> str:
        """16 hex digits of the content: equal for the same scans and labels under other names or URIs."""
        digests = {i: [case.sha256, case.label_sha256] for i, case in self.cases.items()}
        return config.fingerprint({name: sorted(digests[i] for i in getattr(self, name)) for name in SETS})

    def describe(self) -> str:
        """One line for a log: subjects and scans of every set."""
        parts = []
        for name in ("train", "val", "test", *(["excluded"] if self.excluded else [])):
            subjects = [self.cases[i].subject for i in getattr(self, name)]
            parts.append(f"{name} {len(subjects)} scans of {len(set(subjects))} subjects")
        return f"split {self.id}: {', '.join(parts)}"

    def to_json(self) -> str:
        content = {name: list(getattr(self, name)) for name in SETS}
        cases = {i: asdict(self.cases[i]) for i in sorted(self.cases)}
        return json.dumps({"id": self.id, **content, "cases": cases}, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes, name: str = "split.json") -> Split:
        """What ``to_json`` wrote.

        Raises:
            UserError: naming ``name``, for anything else, a scan or subject in two sets included.
        """
        try:
            values = config.parse_json(text)
            stated = values.pop("id")
            cases = {i: Case(**row) for i, row in values.pop("cases").items()}
            split = cls(**{key: tuple(ids) for key, ids in values.items()}, cases=cases)
            ids = [i for key in SETS for i in getattr(split, key)]
            whole = sorted(ids) == sorted(cases) and split.id == stated
        except (ValueError, TypeError, KeyError, AttributeError) as err:
            raise UserError(f"{name} is no split ({err}); make it again") from None
        if not whole:
            raise UserError(f"{name}: its scans do not match its id {stated}; it was changed, make it again")
        subjects = [{cases[i].subject for i in getattr(split, key)} for key in SETS[:3]]
        for a, b in ((0, 1), (0, 2), (1, 2)):
            if both := subjects[a] & subjects[b]:
                raise UserError(f"{name}: subject {min(both)} is in {SETS[a]} and {SETS[b]}; make it again")
        return split


def make(scans: Sequence[Scan], cfg: Config) -> Split:
    """Split the labelled ones of ``scans``; unlabelled ones are left out.

    - Whom ``test_names`` or ``val_names`` name is tested or validates, whatever the manifest says.
    - Test: the manifest's test scans; if it has none, the first ``test_share`` of the subjects.
    - Validation, unless ``fold`` is None: the manifest's validation scans; if it has none, fold ``fold`` of the
      manifest's own folds; if it has none, one of ``folds`` equal parts of the subjects.
    - Train: all else, or a nested part of its subjects. Test and validation do not depend on that part.
    - Subjects are taken in an order that depends on the seed and their own names alone, so more scans leave
      the order of those there were as it is. Scans without a subject's name are each their own subject.
    - A subject whom the manifest puts into two sets stays in the first of test, val, train; its scans of the
      other set are excluded.

    Raises:
        UserError: for settings that are out of range or do not fit the scans.
    """
    scans_of: dict[str, list[Scan]] = defaultdict(list)
    for scan in scans:
        if scan.label_uri:
            scans_of[f"{scan.dataset}/{scan.subject or scan.scan_id}"].append(scan)
    if not scans_of:
        ways = "import a labelled dataset, or set split=null to pretrain on all"
        raise UserError(f"none of the {len(scans)} scans has a label; {ways}")
    given = {subject: min((s.split for s in own), key=SETS.index) for subject, own in scans_of.items()}
    role = dict(given)
    for name, patterns in (("val", cfg.val_names), ("test", cfg.test_names)):
        if patterns:  # they say it all: the manifest's own are free to train
            role |= {subject: "train" for subject, own in role.items() if own == name}
            role |= dict.fromkeys(_named(scans_of, name, patterns), name)

    def of(name: str) -> set[str]:
        return {subject for subject, own in role.items() if own == name}

    if cfg.test_share and not of("test"):
        # from "train" alone: what is tested must not depend on whether the manifest's validation is used
        role |= dict.fromkeys(_test(of("train"), cfg), "test")
    if cfg.fold is None:
        role |= dict.fromkeys(of("val"), "train")
    elif not of("val"):
        role |= dict.fromkeys(_val(scans_of, of("train"), cfg), "val")
    elif cfg.fold != 0:
        only = f"fold {cfg.fold}: the manifest has its own validation scans, so its only fold is 0"
        raise UserError(f"{only}; set fold to 0, or to null to train on all")
    learners = _part(of("train"), cfg)

    members: dict[str, list[str]] = {name: [] for name in SETS}
    cases = {}
    for subject, own in scans_of.items():
        if role[subject] == "train" and subject not in learners:
            continue
        for scan in own:
            torn = role[subject] == given[subject] != scan.split  # the manifest has this subject in two sets
            members["excluded" if torn else role[subject]].append(scan.scan_id)
            cases[scan.scan_id] = Case(subject, scan.sha256, scan.label_sha256)
    return Split(**{name: tuple(sorted(ids)) for name, ids in members.items()}, cases=cases)


def without(split: Split, test_ids: Collection[str]) -> Split:
    """``split`` with ``test_ids``, which leaked, excluded from its test scans.

    Raises:
        UserError: for an id that is no test scan, or when none is left to test on.
    """
    if strange := set(test_ids) - set(split.test):
        raise UserError(f"{min(strange)} is no test scan of split {split.id}; name only test scans")
    kept = tuple(i for i in split.test if i not in test_ids)
    if split.test and not kept:
        raise UserError(f"all {len(split.test)} test scans of split {split.id} have leaked; none is left")
    return replace(split, test=kept, excluded=tuple(sorted({*split.excluded, *test_ids})))


def _named(scans_of: Mapping[str, Sequence[Scan]], name: str, patterns: Sequence[str]) -> set[str]:
    """The subjects that one of ``patterns`` matches, by their own name or that of a file."""
    found: set[str] = set()
    for pattern in patterns:
        own = {
            subject
            for subject, scans in scans_of.items()
            for scan in scans
            if any(fnmatchcase(n, pattern) for n in (scan.subject, scan.scan_id.rsplit("-", 1)[0]))
        }
        if not own:
            some = ", ".join(
                sorted(scan.scan_id.rsplit("-", 1)[0] for s in scans_of.values() for scan in s)[:3]
            )
            raise UserError(
                f"split.{name}_names has '{pattern}', which no labelled scan matches (such as {some})"
            )
        found |= own
    return found


def _ordered(subjects: Collection[str], cfg: Config, *subset: int) -> list[str]:
    return sorted(subjects, key=lambda s: (seeding.integer(cfg.seed, "split", *subset, s), s))


def _test(subjects: Collection[str], cfg: Config) -> list[str]:
    n = len(subjects)
    count = max(1, round(cfg.test_share * n))
    if count >= n:
        raise UserError(f"test_share {cfg.test_share:g} leaves none of {n} subjects to train on; lower it")
    return _ordered(subjects, cfg)[:count]


def _val(scans_of: Mapping[str, Sequence[Scan]], subjects: Collection[str], cfg: Config) -> list[str]:
    """The validation subjects of the fold, of the manifest's own folds if it has any."""
    fold = cfg.fold or 0
    own = {s.fold for scans in scans_of.values() for s in scans if s.fold >= 0}
    if own:
        if fold not in own:
            raise UserError(f"fold {fold} is none of the manifest's own folds {sorted(own)}; choose one")
        chosen = [s for s in subjects if any(scan.fold == fold for scan in scans_of[s])]
        if not chosen:
            raise UserError(f"every subject of the manifest's fold {fold} is tested; choose another fold")
        return chosen
    if fold >= cfg.folds:
        raise UserError(f"split.fold is {fold}; it must be below split.folds ({cfg.folds})")
    n = len(subjects)
    if cfg.folds > n:
        raise UserError(f"{cfg.folds} folds need as many subjects, but there are {n}; lower folds")
    return _ordered(subjects, cfg)[n * fold // cfg.folds : n * (fold + 1) // cfg.folds]


def _part(subjects: Collection[str], cfg: Config) -> set[str]:
    """The subjects to train on: the first of the seeded order, so that smaller parts lie in larger ones."""
    if not subjects:
        raise UserError("no labelled subject is left to train on; lower test_share or set fold to null")
    if cfg.shots is not None and cfg.shots > len(subjects):
        raise UserError(f"shots is {cfg.shots}, but there are {len(subjects)} subjects to train on; lower it")
    count = cfg.shots or max(1, round(cfg.fraction * len(subjects)))
    # Without a number for the first, whose order is also that of test and validation.
    return set(_ordered(subjects, cfg, *([cfg.subset] if cfg.subset else []))[:count])
