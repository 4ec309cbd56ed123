"""Configs merge strictly, and say what is wrong in one sentence."""

from __future__ import annotations

import dataclasses
import pickle
import re
from collections.abc import Mapping
from typing import Any, Literal

import pytest

from logonet.core import config
from logonet.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Inner:
    lr: float = 1e-4
    size: tuple[int, int, int] = (1, 2, 3)
    spacing_mm: tuple[float, float, float] | None = None
    clip: float | None = None


@dataclasses.dataclass(frozen=True)
class Outer:
    train: Inner = dataclasses.field(default_factory=Inner)
    method: dict[str, Any] = dataclasses.field(default_factory=lambda: {"name": "a", "x": 1})


BASE = config.to_dict(Outer())


def build(*settings: str) -> Outer:
    return config.from_dict(Outer, config.override(BASE, settings))


def test_round_trip_through_dict_and_yaml() -> None:
    cfg = build("train.lr=1e-3", "train.spacing_mm=[1, 1.5, 2]")
    assert config.from_dict(Outer, config.to_dict(cfg)) == cfg
    assert config.from_dict(Outer, config.read_yaml(config.to_yaml(cfg), "x")) == cfg


@pytest.mark.parametrize(
    ("setting", "path", "value"),
    [
        ("train.lr=1e-3", "lr", 1e-3),
        ("train.lr=1", "lr", 1.0),
        ("train.clip=2", "clip", 2.0),
        ("train.clip=null", "clip", None),
        ("train.size=[4, 5, 6]", "size", (4, 5, 6)),
        ("train.spacing_mm=[1, 1, 2]", "spacing_mm", (1.0, 1.0, 2.0)),
    ],
)
def test_overrides_are_typed(setting: str, path: str, value: Any) -> None:
    got = getattr(build(setting).train, path)
    assert got == value
    assert type(got) is type(value)


def test_later_settings_win_and_a_new_name_drops_old_options() -> None:
    assert build("train.lr=1", "train.lr=2").train.lr == 2.0
    assert build("method.x=5").method == {"name": "a", "x": 5}
    assert build("method.name=b").method == {"name": "b"}


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.lrr=1", "unknown config key 'train.lrr'; did you mean 'train.lr'?"),
        ("trian.lr=1", "did you mean 'train'?"),
        ("train.size=[1, 2]", "train.size"),
        ("train.lr=fast", "train.lr"),
        ("train=3", "'train' must be a mapping"),
        ("train.lr", "not of the form section.key=value"),
        ("train.lr=[1", "not valid YAML"),
    ],
)
def test_mistakes_are_one_sentence(setting: str, said: str) -> None:
    with pytest.raises(UserError) as err:
        build(setting)
    assert said in str(err.value)
    assert "\n" not in str(err.value)


# ------------------------------------------------------------------------------------------- sections


@dataclasses.dataclass(frozen=True)
class Bounded(config.Section, key="some"):
    count: config.Count = 1
    share: config.Share | None = 0.5
    sizes: tuple[config.Count, ...] = (1, 2)
    way: Literal["up", "down"] = "up"
    pair: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pair[0] > self.pair[1]:
            raise UserError(f"some.pair is {self.pair}; set (low, high) with low <= high")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"count": 0}, "count is 0; it must be at least 1"),
        ({"count": "3"}, "count is '3'; it must be a valid integer"),
        ({"count": True}, "count is True; it must be a valid integer"),
        ({"share": 1.5}, "share is 1.5; it must be at most 1"),
        ({"share": float("nan")}, "share is nan; it must be at"),
        ({"sizes": [3, 0]}, "sizes[1] is 0; it must be at least 1"),
        ({"way": "left"}, "way is 'left'; it must be 'up' or 'down'"),
        ({"pair": [2.0, 1.0]}, "some.pair is (2.0, 1.0); set (low, high)"),
    ],
)
def test_a_section_is_checked_from_python_as_from_yaml(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)) as direct:
        Bounded(**values)
    with pytest.raises(UserError, match=re.escape(said)) as read:
        config.from_dict(Bounded, values, "a.b")
    assert str(direct.value).startswith("some.")
    assert "pair" in values or str(read.value).startswith("a.b.")


def test_a_section_is_a_plain_frozen_dataclass() -> None:
    made = Bounded(sizes=[4, 5], share=None)  # type: ignore[arg-type]
    assert made.sizes == (4, 5)
    assert made == config.from_dict(Bounded, {"sizes": [4, 5], "share": None})
    assert pickle.loads(pickle.dumps(made)) == made
    assert dataclasses.asdict(dataclasses.replace(made, count=2))["count"] == 2
    assert isinstance(hash(made), int)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.count = 3  # type: ignore[misc]


# ------------------------------------------------------------------------------------------- components


@dataclasses.dataclass(frozen=True)
class Parts:
    network: config.Component = dataclasses.field(default_factory=lambda: config.Component("small"))
    train: Inner = dataclasses.field(default_factory=Inner)


def make(name: str, options: Mapping[str, Any]) -> Inner:
    assert name == "small"
    return config.from_dict(Inner, options, "network")


def test_a_component_is_the_mapping_of_its_name_and_options() -> None:
    chosen = config.Component("small", {"lr": 1})
    whole = chosen.resolve(make, "network")
    assert whole == config.Component("small", Inner(lr=1.0))
    assert whole.resolve(make, "network") is whole
    assert pickle.loads(pickle.dumps(whole)) == whole
    assert config.to_dict(Parts(chosen))["network"] == {"name": "small", "lr": 1}
    assert config.to_dict(Parts(whole))["network"] == {"name": "small", **config.to_dict(Inner(lr=1.0))}
    as_mapping = {
        "network": {"name": "small", **config.to_dict(Inner(lr=1.0))},
        "train": config.to_dict(Inner()),
    }
    assert config.fingerprint(Parts(whole)) == config.fingerprint(as_mapping)
    read = config.from_dict(Parts, config.override(config.to_dict(Parts(chosen)), ["network.lr=2"]))
    assert read.network == config.Component("small", {"lr": 2})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (3, "'network' must be a mapping"),
        ({"name": 3}, "network.name is 3"),
        ({"lr": 3}, "set network.name"),
    ],
)
def test_what_is_no_component_is_one_sentence(values: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        config.from_dict(Parts, {"network": values}).network.resolve(make, "network")


def test_fingerprints_see_every_value_and_no_order() -> None:
    assert config.fingerprint({"a": 1, "b": 2}) == config.fingerprint({"b": 2, "a": 1})
    assert config.fingerprint(Outer()) != config.fingerprint(build("train.lr=2e-4"))
    assert len(config.fingerprint(Outer())) == 16
