"""Records of sweeps: whole or absent, strict JSON, and never mixed with those of another sweep."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logonet.core.errors import UserError
from logonet.storage import object_store
from logonet.sweep import records
from logonet.sweep.records import Spec, Trial


@pytest.fixture(params=["path", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    root = request.getfixturevalue("bucket") if request.param == "s3" else str(tmp_path)
    return object_store.join(root, "sweep", "first-look")


def trial(index: int = 0, **values: Any) -> Trial:
    return replace(
        Trial(
            index,
            {"method.phi1": 0.1, "clusterers": {"k_min": 8, "k_max": 40}, "train.grad_clip": None},
            status="done",
            history=[{"epoch": 1, "loss": 3.5}, {"epoch": 2, "loss": 2.5, "objective": 0.25}],
            pretrain="s3://out/pretrain/ab12",
            final={"dice": 0.75, "uri": "s3://out/finetune/cd34"},
            wall_s=12.5,
        ),
        **values,
    )


# ------------------------------------------------------------------------------------------------- trials


def test_trials_come_back_by_index(uri: str) -> None:
    assert records.read_all(uri) == []
    for index in (10, 2, 0, 12345):
        records.write(uri, trial(index))
    assert records.read_all(uri) == [trial(i) for i in (0, 2, 10, 12345)]
    assert object_store.exists(f"{uri}/trials/0002.json")


def test_a_trial_is_replaced_as_it_goes_on(uri: str) -> None:
    begun = Trial(3, {"method.phi1": 0.2}, status="running")
    records.write(uri, begun)
    stopped = replace(begun, status="stopped", reason="stopped after epoch 2", wall_s=3.0)
    records.write(uri, stopped)
    assert records.read_all(uri) == [stopped]
    assert len(list(object_store.listing(uri))) == 1


numbers = st.one_of(st.floats(), st.integers(-(2**53), 2**53), st.text(), st.lists(st.floats(), max_size=3))


@given(st.lists(st.dictionaries(st.text(), numbers, max_size=4), max_size=3), st.floats())
@settings(deadline=None)
def test_histories_are_strict_json_and_what_is_not_finite_becomes_nan(
    history: list[Any], dice: float
) -> None:
    def expected(value: Any) -> Any:
        if isinstance(value, list):
            return [expected(v) for v in value]
        return math.nan if isinstance(value, float) and not math.isfinite(value) else value

    def no_constants(name: str) -> None:
        pytest.fail(f"{name} is not JSON")

    history = [{**entry, "epoch": epoch, "objective": dice} for epoch, entry in enumerate(history, 1)]
    tried = trial(history=history, final={"dice": dice})
    data = records.seal(tried)
    json.loads(data, parse_constant=no_constants)
    back = records._parsed(data, tried.index, "here")
    assert isinstance(back, Trial)
    assert back.settings["train.grad_clip"] is None
    # repr: NaN is unequal to itself.
    assert repr(back.history) == repr([{k: expected(v) for k, v in e.items()} for e in history])
    assert repr(back.final) == repr({"dice": expected(dice)})


def damage(kind: str, good: bytes) -> bytes:
    if kind == "cut":
        return good[: len(good) // 2]
    if kind == "empty":
        return b""
    if kind == "edited":
        return good.replace(b'"done"', b'"failed"')
    if kind == "another trial's":
        return records.seal(trial(7))
    if kind == "a list":
        return b"[1, 2]"
    if kind == "an unknown status":
        return records.seal(trial(status="asleep"))
    assert kind == "not text"
    return b"\xff\xfe\x00"


KINDS = ["cut", "empty", "edited", "another trial's", "a list", "an unknown status", "not text"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_record_is_absent_named_and_kept(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    uri = str(tmp_path)
    records.write(uri, trial(0))
    records.write(uri, trial(1))
    record = f"{uri}/trials/0000.json"
    bad = damage(kind, object_store.read(record))
    object_store.write(record, bad)
    with caplog.at_level(logging.WARNING):
        assert records.read_all(uri) == [trial(1)]
    assert len(caplog.records) == 1
    assert record in caplog.text
    for _ in range(2):  # the second time there is nothing to keep
        records.write(uri, trial(0))
        assert records.read_all(uri) == [trial(0), trial(1)]
        kept = [e.uri for e in object_store.listing(uri) if ".torn-" in e.uri]
        assert [object_store.read(k) for k in kept] == [bad]


def test_the_table_has_the_last_finite_objective_and_a_column_for_each_key() -> None:
    nan = {"epoch": 3, "objective": math.nan}
    trials = [
        trial(0, history=[*trial().history, nan]),
        trial(
            1, status="failed", reason="out of memory", history=[], final={}, settings={"method.phi1": 0.3}
        ),
        trial(2, history=[{"epoch": 1, "objective": None}, {"epoch": 2, "objective": math.inf}]),
        trial(3, settings={"method.phi1": 0.2, "clusterers": {"k_min": 2}, "method.patch_sizes": [1, 2]}),
    ]
    table = records.table(trials, ["method.phi1", "clusterers", "method.patch_sizes"])
    assert table.columns.tolist() == [
        *("trial", "status", "reason", "epochs", "objective", "final_dice", "wall_s", "pretrain"),
        *("method.phi1", "clusterers", "method.patch_sizes"),
    ]
    np.testing.assert_array_equal(table["objective"], [0.25, np.nan, np.nan, 0.25])
    np.testing.assert_array_equal(table["final_dice"], [0.75, np.nan, 0.75, 0.75])
    assert table["epochs"].tolist() == [3, 0, 2, 2]
    assert table["method.phi1"].tolist() == [0.1, 0.3, 0.1, 0.2]
    assert table["clusterers"].tolist()[::3] == ['{"k_min":8,"k_max":40}', '{"k_min":2}']
    assert table["method.patch_sizes"].tolist()[3] == "[1,2]"
    assert table["clusterers"].isna().tolist() == [False, True, False, False]


def test_the_table_of_no_trials_has_its_columns() -> None:
    table = records.table([], ["method.phi1"])
    assert len(table) == 0
    assert "objective" in table and "method.phi1" in table


# ---------------------------------------------------------------------------------------------- the sweep

SPEC = Spec(
    name="first-look",
    space={"search": {"method.phi1": {"grid": [0.1, 0.2]}}, "first": []},
    base={"train": {"epochs": 2, "betas": [0.9, 0.999]}, "split": None},
    objective="probe",
    source="s3://in",
    labelled="s3://labelled",
    search="random",
    seed=0,
    finetuning={},
    scheduler={"grace_epochs": 1},
)


def test_the_same_sweep_goes_on(uri: str) -> None:
    records.claim(uri, SPEC)
    before = object_store.stat(f"{uri}/sweep.json")
    records.claim(uri, SPEC)
    assert object_store.stat(f"{uri}/sweep.json") == before
    assert records.read_spec(uri) == SPEC


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"objective": "rank"}, 'objective was "probe", now "rank"'),
        (
            {"space": {"search": {"method.phi1": {"grid": [0.1, 0.3]}}, "first": []}},
            "space.search.method.phi1.grid was [0.1, 0.2], now [0.1, 0.3]",
        ),
        (
            {"space": {"search": {"method.phi1": {"choice": [0.1, 0.2]}}, "first": []}},
            "space.search.method.phi1.grid was [0.1, 0.2], now unset, "
            "space.search.method.phi1.choice was unset, now [0.1, 0.2]",
        ),
        (
            {"base": {"train": {"epochs": 3, "betas": [0.9, 0.999]}, "split": None}},
            "base.train.epochs was 2, now 3",
        ),
        ({"finetuning": {"train": {"lr": 0.1}}}, "finetuning.train.lr was unset, now 0.1"),
        ({"scheduler": {"grace_epochs": None}}, "scheduler.grace_epochs was 1, now null"),
        ({"source": "s3://" + "x" * 200}, f'source was "s3://in", now "s3://{"x" * 71}...'),
    ],
)
def test_another_sweep_under_that_name_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    uri = str(tmp_path / "a")
    records.claim(uri, SPEC)
    with pytest.raises(UserError) as refused:
        records.claim(uri, replace(SPEC, **change))
    assert str(refused.value) == (
        f"the sweep at {uri} was begun with other settings: {said}; "
        "give --name another name, or the old settings"
    )
    assert records.read_spec(uri) == SPEC


def test_many_differences_are_counted(tmp_path: Path) -> None:
    records.claim(str(tmp_path), SPEC)
    other = replace(SPEC, scheduler={f"key{i}": i for i in range(7)})
    with pytest.raises(UserError, match=r"key3 was unset, now 3, and 3 more; give --name"):
        records.claim(str(tmp_path), other)


def test_a_damaged_sweep_is_not_taken_over(tmp_path: Path) -> None:
    uri = str(tmp_path)
    records.claim(uri, SPEC)
    whole = object_store.read(f"{uri}/sweep.json")
    for bad, why in [
        (whole[:50], "is torn"),
        (whole.replace(b'"probe"', b'"rank"'), "does not match its own"),
    ]:
        object_store.write(f"{uri}/sweep.json", bad)
        with pytest.raises(UserError, match=rf"sweep\.json {why}.*begin another sweep with --name"):
            records.claim(uri, SPEC)
        assert object_store.read(f"{uri}/sweep.json") == bad


def test_no_sweep_is_a_sentence(uri: str) -> None:
    with pytest.raises(UserError, match=r"holds no sweep \(sweep\.json is missing\)"):
        records.read_spec(uri)
