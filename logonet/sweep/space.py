"""What a sweep searches: config keys, the values each may take, and the settings of every trial.

A space is YAML. Keys are dotted config keys of a pretraining, or whole sections, which are merged as configs are::

    search:
      method.chain_length: {grid: [3, 5, 7]}      # trials walk through the product of all grids
      clusterers: {choice: [{k_min: 8, k_max: 40}, {k_min: 20, k_max: 100}]}
      method.phi2: {uniform: [0.5, 0.9]}
      train.lr: {loguniform: [1.0e-4, 1.0e-2]}
      clusterers.n: {int: [8, 32]}                # both ends included
    first:                                        # tried before any other; keys left out keep the config's value
      - {method.chain_length: 5}

Settings are a mapping of such keys to values.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from logonet.core import config, seeding
from logonet.core.errors import UserError

LISTS = ("grid", "choice")
RANGES = ("uniform", "loguniform", "int")
WORDS = ("search", "first")
MAX_GRID = 100_000  # cells; every draw permutes them all
COMBINATIONS = 20

Settings = dict[str, Any]


@dataclass(frozen=True)
class Key:
    """One searched config key. ``values`` are those listed, or the two ends of a range."""

    path: str
    sort: str
    values: tuple[Any, ...]

    @property
    def listed(self) -> bool:
        return self.sort in LISTS

    def holds(self, value: Any) -> bool:
        """Whether ``value`` is one of those listed, or a number in the range."""
        if self.listed:
            return value in self.values
        return _is_number(value, self.sort) and self.values[0] <= value <= self.values[1]


@dataclass(frozen=True)
class Space:
    """The keys in the file's order, and the settings tried before any other."""

    keys: tuple[Key, ...]
    first: tuple[Settings, ...] = ()

    @property
    def paths(self) -> list[str]:
        return [key.path for key in self.keys]

    def to_dict(self) -> dict[str, Any]:
        """What ``parse`` takes, JSON-able."""
        search = {key.path: {key.sort: list(key.values)} for key in self.keys}
        return {"search": search, "first": [dict(settings) for settings in self.first]}


# ------------------------------------------------------------------------------------------------ reading


def read(text: str, source: str) -> Space:
    """The space of a YAML file; ``source`` names it in errors.

    Raises:
        UserError: the file is not a space, in one sentence.
    """
    values = config.read_yaml(text, source)
    if repeated := _repeated(yaml.compose(text, Loader=yaml.SafeLoader)):  # PyYAML silently keeps the last
        raise UserError(f"{source} gives '{repeated}' twice; keep one of them")
    return parse(values, source)


def parse(values: Mapping[str, Any], source: str) -> Space:
    """The space of a parsed YAML file, or of ``Space.to_dict``. Raises as ``read`` does."""
    for word in values:
        if word not in WORDS:
            raise UserError(config.unknown(f"word in {source}", word, WORDS))
    search = values.get("search")
    if not isinstance(search, Mapping) or not search:
        raise UserError(f"{source} searches nothing; give 'search:' a mapping of config keys to their values")
    space = Space(tuple(_key(path, spec, source) for path, spec in search.items()))
    for path, other in itertools.permutations(space.paths, 2):
        if other.startswith(f"{path}."):
            ways = f"put the values of '{other.removeprefix(path)[1:]}' into those of '{path}'"
            both = f"{source} searches both '{path}' and '{other}', which is part of it"
            raise UserError(f"{both}; {ways}, or search its keys one by one")
    if (cells := grid_size(space)) > MAX_GRID:
        many = f"the grid of {source} has {cells} cells, more than {MAX_GRID}"
        raise UserError(f"{many}; make some keys a choice instead")
    return Space(space.keys, _first(values.get("first") or [], space.paths, source))


def _repeated(node: yaml.Node | None) -> str:
    """A key that a mapping of the document gives twice, or ''."""
    children = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if repeated := [name for name, count in names.most_common(1) if count > 1]:
            return repeated[0]
        children = [value for _, value in node.value]
    return next(filter(None, map(_repeated, children)), "")


def _key(path: Any, spec: Any, source: str) -> Key:
    if not isinstance(path, str) or not all(path.split(".")):
        raise UserError(f"search key {path!r} of {source} is no config key; write it as section.key")
    where = f"search key '{path}' of {source}"
    if not isinstance(spec, Mapping) or len(spec) != 1:
        must = f"exactly one of {', '.join(LISTS + RANGES)}, such as {{grid: [1, 2]}}"
        raise UserError(f"{where} must hold {must}, not {text(spec)}")
    ((sort, values),) = spec.items()
    if sort not in LISTS + RANGES:
        raise UserError(config.unknown(f"sort of values of {where},", sort, LISTS + RANGES))
    return Key(path, sort, _listed(values, where) if sort in LISTS else _ends(values, sort, where))


def _listed(values: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(values, list) or not values:
        raise UserError(f"{where} must list at least one value, not {text(values)}")
    for place, value in enumerate(values):
        _refuse_odd(value, where)
        if value in values[:place]:
            raise UserError(f"{where} lists {text(value)} twice; keep one of them")
    return tuple(values)


def _ends(values: Any, sort: str, where: str) -> tuple[Any, ...]:
    if not isinstance(values, list) or len(values) != 2 or not all(_is_number(v, sort) for v in values):
        what = "whole numbers" if sort == "int" else "numbers"
        raise UserError(f"{where} must be {sort} between two {what}, [low, high], not {text(values)}")
    low, high = values
    if not low < high:
        raise UserError(f"{where} goes from {low} to {high}; the first end must be below the second")
    if sort == "loguniform" and low <= 0:
        raise UserError(f"{where} is loguniform from {low}; a logarithm needs a first end above 0")
    # Floats, so that `check` refuses the range for an integer config key, which hardly any draw would suit.
    return (low, high) if sort == "int" else (float(low), float(high))


def _is_number(value: Any, sort: str) -> bool:
    kind = int if sort == "int" else int | float
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)


def _refuse_odd(value: Any, where: str) -> None:
    """Refuse dates, NaN and keys that are not text: YAML has them, but a trial's record could not give them back."""
    try:
        same = json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError):
        same = False
    if not same:
        raise UserError(f"{where} holds {value!r}; use numbers, text, true, false, null, lists and mappings")


def _first(entries: Any, paths: list[str], source: str) -> tuple[Settings, ...]:
    if not isinstance(entries, list) or not all(isinstance(e, Mapping) for e in entries):
        raise UserError(f"'first' of {source} must be a list of mappings of searched keys to values")
    for place, entry in enumerate(entries, 1):
        for path, value in entry.items():
            if path not in paths:
                raise UserError(config.unknown(f"key in entry {place} of 'first' of {source},", path, paths))
            _refuse_odd(value, f"entry {place} of 'first' of {source}")
    return tuple(dict(entry) for entry in entries)


# -------------------------------------------------------------------------------------------- on a config


def apply(base: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``settings``, merged as `config.merge` does.

    All at once: one by one, a new ``method.name`` would drop a ``method.phi1`` set before it.
    """
    over: dict[str, Any] = {}
    for path, value in settings.items():
        *sections, name = path.split(".")
        inner = over
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return config.merge(base, over)


def check(space: Space, base: Mapping[str, Any], resolve: Callable[[dict[str, Any]], Any]) -> None:
    """Refuse what no trial could run: a key that does not exist, a value that suits no trial.

    Every listed value and both ends of every range are applied to ``base`` one at a time. A value that fails alone
    (a k_min above the base's k_max) is tried in some drawn combinations. Other combinations may still be invalid;
    such a trial fails when it is tried.

    Args:
        base: the config that the trials vary.
        resolve: raises UserError for a config that cannot run.

    Raises:
        UserError: naming the key and the value, and why.
    """

    def problem(settings: Settings) -> str:
        try:
            resolve(apply(base, settings))
        except UserError as err:
            return str(err)
        return ""

    resolve(dict(base))
    for key in space.keys:
        for value in key.values:
            alone = problem({key.path: value})
            drawn = (draw(space, len(space.first) + place, seed=0) for place in range(COMBINATIONS))
            if alone and all(problem({**settings, key.path: value}) for settings in drawn):
                raise UserError(f"search key '{key.path}' with value {text(value)}: {alone}")
    for place, settings in enumerate(space.first, 1):
        if why := problem(settings):
            raise UserError(f"entry {place} of 'first': {why}")


def complete(space: Space, base: Mapping[str, Any], settings: Mapping[str, Any]) -> Settings:
    """``settings`` with, for every searched key they leave out, what the config then holds there.

    A key that the config lacks stays out. The config that results is the same.
    """
    cfg, out = apply(base, settings), {}
    for key in space.keys:
        # The listed value that changes nothing, such as a part of the section, or else what is there.
        same = [value for value in key.values if key.listed and apply(cfg, {key.path: value}) == cfg]
        found = [settings[key.path]] if key.path in settings else [*same, *_held(cfg, key.path)]
        if found:
            out[key.path] = found[0]
    return out


def _held(cfg: Mapping[str, Any], path: str) -> list[Any]:
    """What ``cfg`` holds at ``path``, in a list, which is empty where it holds nothing."""
    held: Any = cfg
    for name in path.split("."):
        if not isinstance(held, Mapping) or name not in held:
            return []
        held = held[name]
    return [held]


def point(space: Space, base: Mapping[str, Any], settings: Mapping[str, Any]) -> Settings | None:
    """`complete` settings as a searcher takes them, or None where they lie outside the space."""
    full = complete(space, base, settings)
    return full if all(key.path in full and key.holds(full[key.path]) for key in space.keys) else None


# ------------------------------------------------------------------------------------------------ drawing


def grid_size(space: Space) -> int:
    """Cells of the product of all grids; 1 where no key is a grid."""
    return math.prod(len(key.values) for key in space.keys if key.sort == "grid")


def default_trials(space: Space) -> int | None:
    """How many trials try everything once, or None where a budget is needed because some keys are drawn."""
    return len(space.first) + grid_size(space) if all(k.sort == "grid" for k in space.keys) else None


def draw(space: Space, index: int, seed: int) -> Settings:
    """The settings of trial ``index``, a pure function of its arguments.

    The ``first`` come first. Then keys with a grid walk through the product in a shuffled order, each block of
    ``grid_size`` trials through all of it, and the others are drawn for each trial and key.
    """
    if index < len(space.first):
        return dict(space.first[index])
    cell = _cell(space, index - len(space.first), seed)
    return {key.path: cell[key.path] if key.path in cell else _drawn(key, index, seed) for key in space.keys}


def _cell(space: Space, position: int, seed: int) -> Settings:
    # Sorted: the order of the keys in the file decides nothing.
    keys = sorted((key for key in space.keys if key.sort == "grid"), key=lambda key: key.path)
    block, place = divmod(position, grid_size(space))
    cell = seeding.rng(seed, "sweep", "grid", block).permutation(grid_size(space))[place]
    places = np.unravel_index(cell, [len(key.values) for key in keys])
    return {key.path: key.values[i] for key, i in zip(keys, places)}


def _drawn(key: Key, index: int, seed: int) -> Any:
    rng = seeding.rng(seed, "sweep", index, key.path)
    if key.listed:
        return key.values[rng.integers(len(key.values))]
    low, high = key.values
    if key.sort == "int":
        return int(rng.integers(low, high, endpoint=True))
    if key.sort == "uniform":
        return float(rng.uniform(low, high))
    return float(np.clip(np.exp(rng.uniform(np.log(low), np.log(high))), low, high))


# ------------------------------------------------------------------------------------------------ showing


def describe(space: Space) -> str:
    """A line for each key, and one for what is tried first."""
    width = max(map(len, space.paths))
    values = [(", " if key.listed else " to ").join(map(text, key.values)) for key in space.keys]
    lines = [f"{key.path:<{width}}  {key.sort:<10}  {what}" for key, what in zip(space.keys, values)]
    lines += [f"{'first':<{width}}  {text(settings)}" for settings in space.first]
    return "\n".join(lines)


def text(value: Any) -> str:
    return json.dumps(value, default=str)
