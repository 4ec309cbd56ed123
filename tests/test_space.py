"""Spaces of sweeps: read strictly, drawn the same whatever the budget, the same to every searcher."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from logonet import pipelines, recipes, training
from logonet.core import config
from logonet.core.errors import UserError
from logonet.sweep import space
from logonet.sweep.space import Key, Space

SPACES = Path(__file__).parents[1] / "jobs" / "spaces"
RECIPE_OF = {"paper": "paper", "table14": "paper", "hippocampus": "hippocampus_logonet", "phantoms": "demo"}


def resolve(values: dict[str, Any]) -> pipelines.Pretraining:
    return pipelines.resolve(config.from_dict(pipelines.Pretraining, values))


def base_of(recipe: str) -> dict[str, Any]:
    return config.to_dict(pipelines.resolve(recipes.PRETRAINING[recipe]()))


@pytest.fixture
def no_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Configs are checked without a pass through the network, which takes most of the time."""
    monkeypatch.setattr(training, "dry_run", lambda *_: None)


@pytest.fixture(scope="module")
def demo() -> dict[str, Any]:
    return base_of("demo")


def parse(search: dict[str, Any], first: list[Any] | None = None) -> Space:
    return space.parse({"search": search, "first": first or []}, "a.yaml")


EVERY_SORT = """
search:
  method.chain_length: {grid: [3, 5, 7]}
  clusterers: {choice: [{k_min: 8, k_max: 40}, {k_min: 20, k_max: 100}]}
  train.lr: {loguniform: [1e-4, 1.0e-2]}
  method.phi2: {uniform: [0.5, 1]}
  crops.per_scan: {int: [8, 32]}
first:
  - {method.chain_length: 5, method.phi2: 0.7}
"""


def test_every_sort_is_read() -> None:
    got = space.read(EVERY_SORT, "a.yaml")
    assert got.keys == (
        Key("method.chain_length", "grid", (3, 5, 7)),
        Key("clusterers", "choice", ({"k_min": 8, "k_max": 40}, {"k_min": 20, "k_max": 100})),
        Key("train.lr", "loguniform", (1e-4, 1e-2)),
        Key("method.phi2", "uniform", (0.5, 1.0)),
        Key("crops.per_scan", "int", (8, 32)),
    )
    assert got.first == ({"method.chain_length": 5, "method.phi2": 0.7},)
    assert type(got.keys[3].values[1]) is float
    assert space.describe(got).splitlines() == [
        "method.chain_length  grid        3, 5, 7",
        'clusterers           choice      {"k_min": 8, "k_max": 40}, {"k_min": 20, "k_max": 100}',
        "train.lr             loguniform  0.0001 to 0.01",
        "method.phi2          uniform     0.5 to 1.0",
        "crops.per_scan       int         8 to 32",
        'first                {"method.chain_length": 5, "method.phi2": 0.7}',
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "a.yaml searches nothing; give 'search:' a mapping of config keys to their values"),
        ("search: {}", "a.yaml searches nothing"),
        ("search: [a]", "a.yaml searches nothing"),
        ("serach: {}", "unknown word in a.yaml 'serach'; did you mean 'search'?"),
        ("search: {a: {grid: [1]}}\nfist: []", "unknown word in a.yaml 'fist'; did you mean 'first'?"),
        ("search: {a: {gird: [1]}}", "values of search key 'a' of a.yaml, 'gird'; did you mean 'grid'?"),
        ("search: {a: [1, 2]}", "search key 'a' of a.yaml must hold exactly one of grid, choice, uniform"),
        ("search: {a: {grid: [1], choice: [2]}}", "search key 'a' of a.yaml must hold exactly one of"),
        ("search: {a: {grid: []}}", "search key 'a' of a.yaml must list at least one value, not []"),
        ("search: {a: {choice: 3}}", "search key 'a' of a.yaml must list at least one value, not 3"),
        ("search: {a: {grid: [1, 2, 1.0]}}", "search key 'a' of a.yaml lists 1.0 twice; keep one of them"),
        ("search: {a: {grid: [.nan]}}", "search key 'a' of a.yaml holds nan; use numbers, text"),
        (
            "search: {a: {choice: [2024-01-01]}}",
            "search key 'a' of a.yaml holds datetime.date(2024, 1, 1); use",
        ),
        ("search: {a: {choice: [{1: 2}]}}", "search key 'a' of a.yaml holds {1: 2}; use numbers"),
        (
            "search: {a: {uniform: [1, 1]}}",
            "search key 'a' of a.yaml goes from 1 to 1; the first end must be",
        ),
        ("search: {a: {uniform: [2, 1.5]}}", "goes from 2 to 1.5; the first end must be below the second"),
        (
            "search: {a: {uniform: [1]}}",
            "'a' of a.yaml must be uniform between two numbers, [low, high], not [1]",
        ),
        (
            "search: {a: {uniform: [true, 2]}}",
            "must be uniform between two numbers, [low, high], not [true, 2]",
        ),
        ("search: {a: {uniform: [0, .inf]}}", "must be uniform between two numbers"),
        ("search: {a: {int: [1, 2.5]}}", "must be int between two whole numbers, [low, high], not [1, 2.5]"),
        ("search: {a: {loguniform: [0, 1]}}", "is loguniform from 0; a logarithm needs a first end above 0"),
        (
            "search: {a..b: {grid: [1]}}",
            "search key 'a..b' of a.yaml is no config key; write it as section.key",
        ),
        ("search: {3: {grid: [1]}}", "search key 3 of a.yaml is no config key"),
        ("search:\n  a: {grid: [1]}\n  b: {grid: [1]}\n  a: {grid: [2]}", "a.yaml gives 'a' twice; keep one"),
        ("search: {a: {grid: [1]}}\nsearch: {b: {grid: [1]}}", "a.yaml gives 'search' twice"),
        (
            "search: {c.n: {int: [8, 32]}, c: {choice: [{k: 8}]}}",
            "a.yaml searches both 'c' and 'c.n', which is part of it; put the values of 'n' into those of 'c', "
            "or search its keys one by one",
        ),
        ("search: {a: {grid: [1]}}\nfirst: {a: 1}", "'first' of a.yaml must be a list of mappings"),
        ("search: {a.bc: {grid: [1]}}\nfirst: [{a.b: 1}]", "'first' of a.yaml, 'a.b'; did you mean 'a.bc'?"),
        (
            "search: {a: {grid: [1]}}\nfirst: [{a: .inf}]",
            "entry 1 of 'first' of a.yaml holds inf; use numbers",
        ),
        ("search: {a: {grid: [1]}}\nfirst: [{a: 1, a: 2}]", "a.yaml gives 'a' twice"),
        ("search: [", "a.yaml is not valid YAML"),
    ],
)
def test_what_is_no_space_is_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        space.read(text, "a.yaml")
    assert sentence in str(refused.value)


def test_a_grid_too_big_to_shuffle_is_refused() -> None:
    with pytest.raises(UserError, match="has 1000000 cells, more than 100000; make some keys a choice"):
        parse({f"k{i}": {"grid": list(range(100))} for i in range(3)})


def test_keys_side_by_side_are_no_overlap() -> None:
    assert parse({"clusterers.n": {"grid": [1]}, "clusterers.n_max": {"grid": [1]}}).paths == [
        "clusterers.n",
        "clusterers.n_max",
    ]


# -------------------------------------------------------------------------------------------- on a config


def test_settings_are_laid_on_a_config_all_at_once(demo: dict[str, Any]) -> None:
    before = config.to_yaml(config.from_dict(pipelines.Pretraining, demo))
    got = space.apply(demo, {"backbone.widths": [4], "clusterers": {"n": 3}, "backbone.name": "dynunet"})
    assert got["backbone"] == {
        "name": "dynunet",
        "widths": [4],
    }  # the old network's options are gone, not the new
    assert got["clusterers"] == {**demo["clusterers"], "n": 3}
    assert got["train"] == demo["train"]
    assert config.to_yaml(config.from_dict(pipelines.Pretraining, demo)) == before


@pytest.mark.parametrize("name", sorted(RECIPE_OF))
def test_the_spaces_in_jobs_suit_their_recipes(name: str, no_dry_run: None) -> None:
    check_shipped(name)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "phantoms")) for name in RECIPE_OF]
)
def test_networks_take_the_values_of_the_spaces_in_jobs(name: str) -> None:
    check_shipped(name)


def check_shipped(name: str) -> None:
    file = SPACES / f"{name}.yaml"
    got, base = space.read(file.read_text(), file.name), base_of(RECIPE_OF[name])
    space.check(got, base, resolve)
    assert space.default_trials(got) == (9 if name in ("table14", "phantoms") else None)
    assert all(space.point(got, base, first) is not None for first in got.first)


def test_there_is_no_other_space_in_jobs() -> None:
    assert {file.stem for file in SPACES.iterdir()} == set(RECIPE_OF)


def test_what_the_papers_space_leaves_commented_out_works_too(no_dry_run: None) -> None:
    text = (SPACES / "paper.yaml").read_text()
    options = re.findall(r"^  # (\w+(?:\.\w+)?: \{.*)$", text, re.MULTILINE)
    with pytest.raises(UserError, match=r"searches both 'clusterers' and 'clusterers\.n'"):
        space.read("\n  ".join(["search:", "clusterers: {choice: [{n: 1}]}", *options]), "paper.yaml")
    got = space.read("\n  ".join(["search:", *options]), "paper.yaml")
    assert set(got.paths) == {"method.temperature", "method.patch_sizes", "train.lr", "clusterers.n"}
    space.check(got, base_of("paper"), resolve)


@pytest.mark.parametrize(
    ("search", "sentence"),
    [
        (
            {"method.phi11": {"grid": [0.1]}},
            "search key 'method.phi11' with value 0.1: unknown config key 'method.phi11'; did you mean 'method.phi1'?",
        ),
        (
            {"train.lrr": {"uniform": [0.1, 0.2]}},
            "'train.lrr' with value 0.1: unknown config key 'train.lrr'",
        ),
        ({"tain": {"choice": [{"lr": 1e-3}]}}, "unknown config key 'tain'; did you mean 'train'?"),
        (
            {"backbone.dim": {"choice": [[4]]}},
            "unknown config key 'backbone.dim'; did you mean 'backbone.dims'?",
        ),
        (
            {"backbone.name": {"grid": ["logonet", "resnet"]}},
            "search key 'backbone.name' with value \"resnet\": unknown",
        ),
        (
            {"method.chain_length": {"grid": [3, 33]}},
            "'method.chain_length' with value 33: method.chain_length is 33; set",
        ),
        # An integer key in a range of floats would fail in every trial but those on the ends.
        ({"method.chain_length": {"uniform": [3, 7]}}, "method.chain_length is 3.0"),
        (
            {"method.phi1": {"uniform": [0.5, 1.5]}},
            "search key 'method.phi1' with value 1.5: method.phi1 is 1.5",
        ),
        ({"train.lr.peak": {"grid": [1]}}, "search key 'train.lr.peak' with value 1: train.lr is"),
        (
            {"crops.size_vox": {"choice": [[32, 32, 32], [33, 32, 32]]}},
            "'crops.size_vox' with value [33, 32, 32]: ",
        ),
        (
            {"clusterers": {"choice": [{"k_min": 8, "kmax": 9}]}},
            "unknown config key 'clusterers.kmax'; did you mean",
        ),
    ],
)
def test_what_no_trial_could_run_is_refused(
    demo: dict[str, Any], search: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError) as refused:
        space.check(parse(search), demo, resolve)
    assert sentence in str(refused.value)


def test_a_value_that_needs_another_is_let_through(demo: dict[str, Any], no_dry_run: None) -> None:
    assert demo["clusterers"]["k_max"] == 12
    together = parse({"clusterers.k_min": {"grid": [4, 16]}, "clusterers.k_max": {"choice": [12, 24]}})
    space.check(together, demo, resolve)
    with pytest.raises(UserError, match=r"search key 'clusterers\.k_min' with value 16: .*k_max"):
        space.check(parse({"clusterers.k_min": {"grid": [4, 16]}}), demo, resolve)


def test_first_settings_are_checked(demo: dict[str, Any], no_dry_run: None) -> None:
    got = parse({"method.chain_length": {"grid": [3, 5]}}, [{}, {"method.chain_length": 50}])
    with pytest.raises(UserError, match=r"entry 2 of 'first': method.chain_length is 50"):
        space.check(got, demo, resolve)


def test_another_network_or_method_may_be_searched(demo: dict[str, Any]) -> None:
    networks = [{"name": "logonet", "dims": [4, 4, 4, 4]}, {"name": "ulkanet"}]
    space.check(parse({"backbone": {"choice": networks}, "method.phi1": {"grid": [0.1]}}), demo, resolve)


# ------------------------------------------------------------------------------------------------ drawing

scalars = st.one_of(st.integers(-5, 5), st.floats(-5, 5), st.sampled_from(["a", "b", "logonet"]), st.none())
# Not the same twice, and 1 is 1.0.
listed = st.lists(
    st.one_of(scalars, st.fixed_dictionaries({"k_min": st.integers(1, 9)})),
    min_size=1,
    max_size=4,
    unique_by=repr,
).filter(lambda values: all(v not in values[:i] for i, v in enumerate(values)))
ends = st.tuples(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6)).filter(lambda e: e[0] < e[1]).map(list)
whole_ends = st.tuples(st.integers(-100, 100), st.integers(1, 100)).map(lambda e: [e[0], e[0] + e[1]])
specs = st.one_of(
    listed.map(lambda v: {"grid": v}),
    listed.map(lambda v: {"choice": v}),
    ends.map(lambda e: {"uniform": e}),
    ends.map(lambda e: {"loguniform": e}),
    whole_ends.map(lambda e: {"int": e}),
)
spaces = st.dictionaries(
    st.sampled_from(["train.lr", "method.phi1", "method.phi2", "clusterers", "crops.per_scan"]),
    specs,
    min_size=1,
).map(parse)


@given(spaces)
@settings(max_examples=30)
def test_a_space_survives_yaml(searched: Space) -> None:
    assert space.read(yaml.safe_dump(searched.to_dict(), sort_keys=False), "b.yaml") == searched


@given(spaces, st.integers(0, 5))
@settings(max_examples=50)
def test_every_block_of_trials_covers_the_grid(searched: Space, seed: int) -> None:
    grids = [key for key in searched.keys if key.sort == "grid"]
    size = space.grid_size(searched)
    assert size == math.prod(len(key.values) for key in grids)
    for block in range(2):
        cells = [space.draw(searched, block * size + place, seed) for place in range(size)]
        assert len({repr([cell[key.path] for key in grids]) for cell in cells}) == size


def test_the_papers_grid_is_walked_whole_in_shuffled_order() -> None:
    searched = space.read((SPACES / "table14.yaml").read_text(), "table14.yaml")
    product = [{"method.chain_length": m, "method.phi1": phi1} for m in (3, 5, 7) for phi1 in (0.1, 0.2, 0.3)]
    orders = set()
    for seed in range(3):
        walked = [space.draw(searched, index, seed) for index in range(18)]
        for block in (walked[:9], walked[9:]):
            assert sorted(map(repr, block)) == sorted(map(repr, product))
            orders.add(repr(block))
    assert len(orders) == 6


@given(spaces, st.integers(0, 40))
def test_draws_lie_in_the_space_and_depend_on_index_and_seed_alone(searched: Space, index: int) -> None:
    got = space.draw(searched, index, seed=3)
    assert list(got) == searched.paths
    for key in searched.keys:
        if key.listed:
            assert got[key.path] in key.values
        else:
            assert key.values[0] <= got[key.path] <= key.values[1]
            assert type(got[key.path]) is (int if key.sort == "int" else float)
    backwards = Space(searched.keys[::-1])
    assert space.draw(backwards, index, seed=3) == got  # neither on the order of the file


def test_draws_do_not_change_with_what_was_drawn_before_or_with_another_key() -> None:
    search: dict[str, Any] = {"a": {"uniform": [0, 1]}, "b": {"int": [0, 10**6]}}
    alone, more = parse(search), parse({"c": {"choice": [1, 2, 3]}, **search})
    later = [space.draw(alone, index, seed=0) for index in (9, 3, 5)]
    assert later == [space.draw(alone, index, seed=0) for index in range(10)][9:2:-6] + [
        space.draw(alone, 5, 0)
    ]
    for index in range(5):
        drawn = space.draw(more, index, seed=0)
        assert drawn.pop("c") in (1, 2, 3)
        assert drawn == space.draw(alone, index, seed=0) != space.draw(alone, index, seed=1)


def test_draws_have_the_distribution_they_are_asked_for() -> None:
    searched = parse({"u": {"uniform": [2, 6]}, "l": {"loguniform": [1e-4, 1]}, "i": {"int": [1, 4]}})
    drawn = [space.draw(searched, index, seed=0) for index in range(2000)]
    u, log10_l = np.array([d["u"] for d in drawn]), np.log10([d["l"] for d in drawn])
    # Four standard errors of a uniform's mean.
    assert abs(u.mean() - 4) < 4 * 4 / np.sqrt(12 * 2000)
    assert abs(log10_l.mean() + 2) < 4 * 4 / np.sqrt(12 * 2000)
    counts = np.bincount([d["i"] for d in drawn], minlength=5)
    assert counts[0] == 0 and (abs(counts[1:] - 500) < 4 * np.sqrt(2000 * 0.25 * 0.75)).all()


def test_the_first_come_first_and_the_grid_after_them() -> None:
    first = [{"a": 2}, {}]
    searched = parse({"a": {"grid": [1, 2]}, "b": {"grid": [1, 2]}}, first)
    assert [space.draw(searched, index, seed=0) for index in range(2)] == first
    assert len({repr(space.draw(searched, index, seed=0)) for index in range(2, 6)}) == 4
    assert space.default_trials(searched) == 6
    assert space.default_trials(parse({"a": {"grid": [1]}, "b": {"choice": [1]}})) is None


# ------------------------------------------------------------------------------------------------ searchers


@given(spaces, st.integers(0, 20))
def test_what_is_drawn_is_a_point_of_the_space(searched: Space, index: int) -> None:
    drawn = space.draw(searched, index, seed=1)
    assert space.point(searched, {}, drawn) == drawn


BASE = {"method": {"phi1": 0.1, "phi2": 0.7}, "clusterers": {"n": 4, "k_min": 8, "k_max": 40}, "split": None}
SECTIONS = [{"k_min": 4, "k_max": 12}, {"k_min": 8, "k_max": 40}]


def test_keys_left_out_are_the_configs() -> None:
    searched = parse(
        {
            "clusterers": {"choice": SECTIONS},
            "method.phi1": {"grid": [0.3, 0.1]},
            "method.phi2": {"uniform": [0.5, 0.9]},
            "split.seed": {"choice": [1]},
        }
    )
    full = space.complete(searched, BASE, {"method.phi2": 0.6})
    assert full == {"clusterers": SECTIONS[1], "method.phi1": 0.1, "method.phi2": 0.6}
    assert list(full) == ["clusterers", "method.phi1", "method.phi2"]
    assert space.apply(BASE, full) == space.apply(BASE, {"method.phi2": 0.6})
    assert space.point(searched, BASE, {"split.seed": 1}) == {
        "clusterers": SECTIONS[1],
        "method.phi1": 0.1,
        "method.phi2": 0.7,
        "split.seed": 1,
    }


def test_what_another_network_drops_is_not_put_back() -> None:
    searched = parse({"backbone.name": {"grid": ["a", "b"]}, "backbone.dims": {"grid": [[1], [2]]}})
    base = {"backbone": {"name": "a", "dims": [1]}}
    assert space.complete(searched, base, {}) == {"backbone.name": "a", "backbone.dims": [1]}
    assert space.complete(searched, base, {"backbone.name": "b"}) == {"backbone.name": "b"}
    assert space.point(searched, base, {"backbone.name": "b"}) is None


@pytest.mark.parametrize(
    "search",
    [
        {"method.phi1": {"grid": [0.2, 0.3]}},
        {"method.phi1": {"uniform": [0.2, 0.3]}},
        {"clusterers": {"choice": SECTIONS[:1]}},
        {"clusterers.n": {"int": [5, 9]}},
        {"split": {"uniform": [0.0, 1.0]}},
        {"method.phi1": {"int": [0, 1]}},
        {"method.phi9": {"grid": [1]}},
    ],
    ids=str,
)
def test_what_lies_outside_has_no_point(search: dict[str, Any]) -> None:
    assert space.point(parse(search), BASE, {}) is None
