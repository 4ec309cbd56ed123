"""Splits: disjoint by subject, nested, stable, and the same wherever the scans lie."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logonet.core import config
from logonet.core.errors import UserError
from logonet.data import splits
from logonet.data.manifest import Scan
from logonet.data.splits import Config, Split, make


def scan(subject: str, visit: int = 0, **values: Any) -> Scan:
    sha256 = config.fingerprint(subject, visit) * 4
    row: dict[str, Any] = {
        "scan_id": f"{subject}_{visit}-{sha256[:10]}",
        "uri": f"s3://scans/{subject}_{visit}.nii.gz",
        "files": (),
        "sha256": sha256,
        "voxel_sha256": "",
        "thumbprint": "",
        "size_bytes": 1,
        "subject": subject,
        "dataset": "set",
        "licence": "",
        "modality": "CT",
        "shape": (2, 2, 2),
        "spacing_mm": (1.0, 1.0, 1.0),
        "orientation": "RAS",
        "dtype": "int16",
        "intensity_min": 0.0,
        "intensity_max": 1.0,
        "split": "train",
        "fold": -1,
        "label_uri": f"s3://labels/{subject}_{visit}.nii.gz",
        "label_sha256": sha256[::-1],
        "label_values": (0, 1),
        "classes": (),
    }
    return Scan(**{**row, **values})


def plain(n: int, visits: int = 1) -> list[Scan]:
    return [scan(f"p{i:03d}", v) for i in range(n) for v in range(visits)]


def subjects(split: Split, name: str) -> set[str]:
    return {split.cases[i].subject for i in getattr(split, name)}


visits: st.SearchStrategy[dict[str, Any]] = st.builds(
    dict,
    split=st.sampled_from(["train", "train", "train", "val", "test"]),
    fold=st.integers(-1, 2),
    label_uri=st.sampled_from(["s3://labels/x.nii.gz", ""]),
)
cohorts = st.dictionaries(st.integers(0, 99).map("{:02d}".format), st.lists(visits, min_size=1, max_size=3))


def rows(cohort: dict[str, list[dict[str, Any]]]) -> list[Scan]:
    return [scan(subject, i, **v) for subject, own in cohort.items() for i, v in enumerate(own)]


@settings(max_examples=150, deadline=None)
@given(
    cohorts,
    st.sampled_from([0.0, 0.1, 0.5]),
    st.sampled_from([None, 0, 1]),
    st.sampled_from([0.01, 0.3, 1.0]),
    st.integers(0, 3),
)
def test_no_subject_is_in_two_sets_and_no_scan_is_lost(
    cohort: dict[str, list[dict[str, Any]]], share: float, fold: int | None, fraction: float, seed: int
) -> None:
    scans = rows(cohort)
    cfg = Config(test_share=share, folds=3, fold=fold, fraction=fraction, seed=seed)
    try:
        split = make(scans, cfg)
        whole = make(scans, replace(cfg, fraction=1.0))
    except UserError:
        return
    labelled = {s.scan_id: s for s in scans if s.label_uri}
    ids = [*whole.train, *whole.val, *whole.test, *whole.excluded]
    assert sorted(ids) == sorted(labelled)
    assert set(split.cases) == {*split.train, *split.val, *split.test, *split.excluded}
    assert not subjects(split, "train") & subjects(split, "val")
    assert not (subjects(split, "train") | subjects(split, "val")) & subjects(split, "test")
    assert split.train
    stated = {i for i, s in labelled.items() if s.split == "test"}
    assert stated <= set(split.test)
    assert stated == set(split.test) or not stated
    assert (split.val == ()) == (fold is None)
    assert Split.from_json(split.to_json()) == split


@settings(max_examples=40, deadline=None)
@given(
    st.integers(5, 40), st.integers(1, 3), st.integers(0, 5), st.sampled_from([None, 0, 4]), st.integers(0, 2)
)
def test_fractions_and_shots_are_nested_and_leave_val_and_test(
    n: int, scans_each: int, seed: int, fold: int | None, subset: int
) -> None:
    scans = plain(n + 2, scans_each)
    whole = make(scans, Config(test_share=0.1, fold=fold, seed=seed))
    base = Config(test_share=0.1, fold=fold, seed=seed, subset=subset)
    total = len(subjects(whole, "train"))
    cuts = [replace(base, fraction=f) for f in (0.01, 0.05, 0.1, 0.25, 0.5, 1.0)]
    shots = [replace(base, shots=k) for k in range(1, total + 1)]
    for configs in (cuts, shots):
        smaller: set[str] = set()
        for cfg in configs:
            split = make(scans, cfg)
            assert (split.val, split.test) == (whole.val, whole.test)
            assert smaller <= set(split.train) <= set(whole.train)
            count = cfg.shots or max(1, round(cfg.fraction * total))
            assert len(subjects(split, "train")) == count
            assert len(split.train) == count * scans_each
            smaller = set(split.train)
        assert smaller == set(whole.train)


def test_subsets_are_other_draws() -> None:
    drawn = [subjects(make(plain(40), Config(shots=4, subset=k)), "train") for k in range(4)]
    assert all(len(part) == 4 for part in drawn)
    assert len(set().union(*drawn)) > 10, "of 16 drawn independently from 32 hardly any come twice"


@pytest.mark.parametrize(("n", "folds"), [(10, 5), (11, 3), (7, 7)])
def test_folds_cover_every_subject_once_and_are_even(n: int, folds: int) -> None:
    parts = [make(plain(n, 2), Config(folds=folds, fold=i)) for i in range(folds)]
    held = [s for part in parts for s in subjects(part, "val")]
    assert len(held) == len(set(held)) == n
    assert {len(subjects(p, "val")) for p in parts} <= {n // folds, -(-n // folds)}
    assert all(len(p.train) + len(p.val) == 2 * n for p in parts)


def test_the_order_of_subjects_holds_when_scans_are_added_or_shuffled() -> None:
    few, more = plain(8), plain(16, 2)[::-1]
    order = [s.subject for k in range(1, 9) for s in few if s.scan_id in _newest(few, k)]
    larger = [s.subject for k in range(1, 17) for s in more if s.scan_id in _newest(more, k)]
    known = set(order)
    assert [s for s in dict.fromkeys(larger) if s in known] == order
    assert make(few[::-1], Config()) == make(few, Config())
    assert make(few, Config(seed=1)) != make(few, Config(seed=0))


def _newest(scans: list[Scan], shots: int) -> set[str]:
    def train(k: int) -> set[str]:
        return set(make(scans, Config(fold=None, shots=k)).train) if k else set()

    return train(shots) - train(shots - 1)


def test_the_manifests_own_sets_come_first() -> None:
    scans = plain(10)
    scans[0] = replace(scans[0], split="test")
    scans[1] = replace(scans[1], split="val")
    scans[2] = replace(scans[2], split="test", label_uri="", label_sha256="")
    split = make(scans, Config(test_share=0.5))
    assert split.test == (scans[0].scan_id,)
    assert split.val == (scans[1].scan_id,)
    assert len(split.train) == 7
    everything = make(scans, Config(fold=None))
    assert everything.val == ()
    assert len(everything.train) == 8
    with pytest.raises(UserError, match="only fold is 0"):
        make(scans, Config(fold=1))


def test_the_manifests_own_folds_are_used() -> None:
    scans = [replace(s, fold=(i % 3) - 1) for i, s in enumerate(plain(9))]
    for fold in (0, 1):
        split = make(scans, Config(folds=5, fold=fold))
        assert set(split.val) == {s.scan_id for s in scans if s.fold == fold}
        assert len(split.train) == 6  # a scan without a fold always trains
    with pytest.raises(UserError, match=r"own folds \[0, 1\]"):
        make(scans, Config(fold=2))


def test_what_is_tested_does_not_depend_on_the_fold() -> None:
    scans = plain(20)
    tests = {make(scans, Config(test_share=0.2, fold=f)).test for f in (None, 0, 4)}
    assert len(tests) == 1
    assert len(tests.pop()) == 4
    scans = [replace(s, split="val") if i < 8 else s for i, s in enumerate(scans)]
    assert len({make(scans, Config(test_share=0.25, fold=f)).test for f in (None, 0)}) == 1


def test_a_subject_in_two_sets_of_the_manifest_stays_in_one() -> None:
    scans = [*plain(6), scan("p000", 1, split="test"), scan("p001", 1, split="val")]
    split = make(scans, Config())
    assert split.test == (scans[6].scan_id,)
    assert split.val == (scans[7].scan_id,)
    assert split.excluded == (scans[0].scan_id, scans[1].scan_id)
    assert len(split.train) == 4
    assert make(scans, Config(fold=None)).excluded == (scans[0].scan_id,)


def test_subjects_of_two_datasets_are_two_and_nameless_ones_are_each_their_own() -> None:
    scans = plain(4) + [replace(scan(f"p{i:03d}", 1), dataset="other") for i in range(4)]
    assert len(subjects(make(scans, Config(fold=None)), "train")) == 8
    nameless = [replace(s, subject="") for s in plain(4)]
    assert len(subjects(make(nameless, Config(fold=None)), "train")) == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"test_share": 1.0}, "test_share is 1"),
        ({"test_share": -0.1}, "test_share is -0.1"),
        ({"test_share": 0.95}, "leaves none of 10 subjects to train on"),
        ({"fold": 5}, "fold is 5"),
        ({"fold": -1}, "fold is -1"),
        ({"folds": 1}, "folds is 1"),
        ({"folds": 11}, "11 folds need as many subjects, but there are 10"),
        ({"fraction": 0.0}, "fraction is 0"),
        ({"fraction": 1.5}, "fraction is 1.5"),
        ({"shots": 0}, "shots is 0"),
        ({"shots": 9}, "shots is 9, but there are 8"),
        ({"shots": 2, "fraction": 0.5}, "set one of them only"),
    ],
)
def test_settings_that_do_not_fit_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(plain(10), Config(**values))


def test_scans_that_do_not_do_are_refused() -> None:
    with pytest.raises(UserError, match="none of the 1 scans has a label"):
        make([scan("a", label_uri="")], Config())
    with pytest.raises(UserError, match="no labelled subject is left to train on"):
        make([scan("a", split="val")], Config())
    scans = [scan("a", fold=0, split="test"), scan("b", fold=1), scan("c", fold=1)]
    with pytest.raises(UserError, match="every subject of the manifest's fold 0 is tested"):
        make(scans, Config())


def test_the_id_is_of_the_content() -> None:
    scans = plain(10)
    split = make(scans, Config())
    moved = make([replace(s, uri="/data/x", label_uri="/data/y") for s in scans], Config())
    assert moved.id == split.id
    relabelled = [replace(s, label_sha256="0" * 64) if i == 3 else s for i, s in enumerate(scans)]
    others = [make(relabelled, Config()), make(scans, Config(fold=1)), make(scans, Config(fraction=0.5))]
    assert len({split.id, *(o.id for o in others)}) == 4


def test_describe_counts_subjects_and_scans() -> None:
    split = make(plain(10, 2), Config(test_share=0.2, folds=4, fold=0))
    expected = f"split {split.id}: train 12 scans of 6 subjects, val 4 scans of 2 subjects, test 4 scans of 2 subjects"
    assert split.describe() == expected
    dropped = splits.without(split, split.test[:1])
    assert dropped.describe().endswith("test 3 scans of 2 subjects, excluded 1 scans of 1 subjects")


def test_without_moves_test_scans_to_the_excluded() -> None:
    split = make(plain(10), Config(test_share=0.3, folds=2))
    kept = splits.without(split, split.test[:2])
    assert (kept.test, kept.excluded) == (split.test[2:], split.test[:2])
    assert (kept.train, kept.val) == (split.train, split.val)
    assert kept.id != split.id
    assert Split.from_json(kept.to_json()) == kept
    assert splits.without(split, []) == split
    with pytest.raises(UserError, match="is no test scan"):
        splits.without(split, split.train[:1])
    with pytest.raises(UserError, match="none is left"):
        splits.without(split, split.test)


def _edited(text: str, **values: Any) -> str:
    return json.dumps({**json.loads(text), **values})


def test_a_changed_or_broken_split_is_refused() -> None:
    split = make(plain(6), Config(test_share=0.2, folds=2))
    text = split.to_json()
    broken = [
        "",
        "[]",
        "null",
        "{}",
        _edited(text, extra=[]),
        _edited(text, train=3),
        _edited(text, cases=[]),
    ]
    for bad in broken:
        with pytest.raises(UserError, match=r"s\.json is no split"):
            Split.from_json(bad, "s.json")
    swapped = _edited(text, train=list(split.val), val=list(split.train))
    for bad in (swapped, _edited(text, val=[]), _edited(text, id="0" * 16)):
        with pytest.raises(UserError, match="was changed"):
            Split.from_json(bad, "s.json")
    one = {i: {**vars(case), "subject": "set/one"} for i, case in split.cases.items()}
    with pytest.raises(UserError, match="subject set/one is in test and val"):
        Split.from_json(_edited(text, cases=one), "s.json")
