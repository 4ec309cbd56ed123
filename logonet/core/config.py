"""Configs: frozen dataclasses beside their owners, merged strictly from mappings, YAML and ``a.b=c``.

A config is a dataclass tree. A part that is chosen by name (a network, a method) is a `Component`: in YAML and in
JSON the mapping ``{"name": ..., **options}``, whose options are those of the chosen file's ``Config``.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, get_origin, get_type_hints

import dacite
import yaml

from logonet.core.errors import UserError

T = TypeVar("T")
MAX_YAML_NODES = 100_000
MAX_DEPTH = 100  # of a JSON document


@dataclasses.dataclass(frozen=True)
class Component:
    """A part that is chosen by name, such as a network or a method, and its settings.

    Attributes:
        name: of a file in the part's package; "" while nothing is chosen.
        config: the options that differ from the defaults, as a mapping; once resolved, the file's whole ``Config``.
    """

    name: str
    config: Any = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, values: Mapping[str, Any] | Component, where: str) -> Component:
        """The component that ``{"name": ..., **options}`` describes; ``where`` names its section in errors.

        Raises:
            UserError: ``values`` is no such mapping.
        """
        if isinstance(values, Component):
            return values
        if not isinstance(values, Mapping):
            raise UserError(f"config section '{where}' must be a mapping of keys to values, not {values!r}")
        name = values.get("name", "")
        if not isinstance(name, str):
            raise UserError(f"config key '{where}.name' is {name!r}; it must be a name")
        return cls(name, {key: value for key, value in values.items() if key != "name"})

    def resolve(self, make: Callable[[str, Mapping[str, Any]], Any], where: str) -> Component:
        """The same component with its whole config, which ``make(name, options)`` gives. Resolving twice is harmless.

        Raises:
            UserError: it has no name, or ``make`` refuses its name or options.
        """
        if not self.name:
            raise UserError(f"config section '{where}' has no name; set {where}.name")
        if dataclasses.is_dataclass(self.config):
            return self
        return Component(self.name, make(self.name, self.config))


def to_dict(cfg: Any) -> dict[str, Any]:
    """A plain, JSON-able mapping of a config (tuples become lists, components ``{"name": ..., **options}``)."""
    return json.loads(json.dumps(cfg, default=_fields))


def _fields(value: Any) -> Mapping[str, Any]:
    if isinstance(value, Component):
        options = value.config if isinstance(value.config, Mapping) else _fields(value.config)
        return {"name": value.name, **options} if value.name else options
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    raise TypeError(f"{type(value).__name__} is no part of a config")


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build the dataclass ``cls`` from a mapping, refusing unknown keys and wrong types.

    Raises:
        UserError: naming the key, and for an unknown one the nearest that exists.
    """
    check_keys(cls, values, where)
    try:
        return dacite.from_dict(
            cls,
            _components(cls, _numbers(cls, values), where),
            config=dacite.Config(strict=True, cast=[tuple], check_types=True),
        )
    except dacite.WrongTypeError as err:
        key = f"{where}.{err.field_path}".lstrip(".")
        raise UserError(
            f"config key '{key}' is {err.value!r} ({type(err.value).__name__}); it must be {err.field_type}"
        ) from None
    except dacite.MissingValueError as err:
        raise UserError(
            f"config key '{f'{where}.{err.field_path}'.lstrip('.')}' is missing; set it"
        ) from None
    except (ValueError, TypeError, OverflowError, dacite.UnexpectedDataError) as err:
        raise UserError(f"config section '{where or cls.__name__}': {err}") from None


def check_keys(cls: type, values: Mapping[str, Any], where: str = "") -> None:
    """Raise UserError for the first key of ``values`` that ``cls`` (or a nested dataclass) lacks."""
    if not isinstance(values, Mapping):
        raise UserError(f"config section '{where}' must be a mapping of keys to values, not {values!r}")
    hints = get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for key, value in values.items():
        path = f"{where}.{key}".lstrip(".")
        if key not in names:
            raise UserError(unknown("config key", path, [f"{where}.{n}".lstrip(".") for n in names]))
        if hints[key] is Component:
            Component.of(value, path)  # its options are checked once it is resolved
        elif dataclasses.is_dataclass(hints[key]):
            check_keys(hints[key], value, path)
        elif get_origin(hints[key]) is dict and not isinstance(value, Mapping):
            raise UserError(f"config section '{path}' must be a mapping of keys to values, not {value!r}")


def unknown(kind: str, name: Any, known: Iterable[str]) -> str:
    """The sentence for a name that does not exist, with the nearest that does. YAML's keys may be no text."""
    known = sorted(known)
    # Cut off: comparing takes the square of the length, and a file may hold a key of megabytes.
    near = difflib.get_close_matches(str(name)[:100], known, n=1, cutoff=0.0)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"unknown {kind} '{name}'{hint} (known: {', '.join(known) or 'none'})"


def _numbers(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Ints where a float is asked for, as YAML users write ``lr: 1``."""
    hints, out = get_type_hints(cls), dict(values)
    for key, value in values.items():
        if hints[key] is Component:
            out[key] = value
        elif dataclasses.is_dataclass(hints[key]) and isinstance(value, Mapping):
            out[key] = _numbers(hints[key], value)
        elif hints[key] in (float, float | None) and isinstance(value, int) and not isinstance(value, bool):
            out[key] = float(value)
        elif isinstance(value, list | tuple) and "float" in str(hints[key]):
            out[key] = [float(v) if isinstance(v, int) else v for v in value]
    return out


def _components(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {
        key: Component.of(value, f"{where}.{key}".lstrip(".")) if hints[key] is Component else value
        for key, value in values.items()
    }


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid on ``base``, mapping by mapping. Changing a part's ``name`` drops its old options."""
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            renamed = "name" in value and value["name"] != old.get("name")
            out[key] = dict(value) if renamed else merge(old, value)
        else:
            out[key] = value
    return out


def override(values: Mapping[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """Apply ``a.b=c`` settings, left to right; the value is read as YAML."""
    out = dict(values)
    for setting in settings:
        path, eq, text = setting.partition("=")
        if not eq or not path:
            raise UserError(f"--set {setting!r} is not of the form section.key=value")
        value: Any = parse_yaml(text, f"--set {setting}")
        for part in reversed(path.split(".")):
            value = {part: value}
        out = merge(out, value)
    return out


def read_yaml(text: str, source: str) -> dict[str, Any]:
    """A YAML file's mapping; ``source`` names it in errors."""
    values = parse_yaml(text, source)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{source} must hold a mapping of config keys, not {type(values).__name__}")
    return values


def parse_yaml(text: str, source: str) -> Any:
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        _refuse_bomb(node, source)
        value = loader.construct_document(node) if node is not None else None
    except yaml.YAMLError as err:
        raise UserError(f"{source} is not valid YAML: {' '.join(str(err).split())}") from None
    except RecursionError:
        raise UserError(f"{source} is nested too deeply; mend it") from None
    finally:
        if loader is not None:
            loader.dispose()
    return _yaml_number(value)


class _Loader(yaml.SafeLoader):
    """PyYAML's constructors raise what int(), float() and datetime() do; here they say line and column."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, OverflowError):
            sort = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                problem=f"this is no {sort}", problem_mark=node.start_mark
            ) from None


def _refuse_bomb(root: yaml.Node | None, source: str) -> None:
    """Aliases cost nothing to read, but what they stand for is walked, merged and printed again at each of them."""
    sizes: dict[int, int] = {}  # 0 while a node's own parts are counted

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = 0
            parts = node.value if isinstance(node, yaml.SequenceNode) else []
            if isinstance(node, yaml.MappingNode):
                parts = [part for pair in node.value for part in pair]
            sizes[id(node)] = 1 + sum(map(size, parts))
        if sizes[id(node)] == 0:
            raise UserError(f"{source} holds a list or mapping that contains itself; remove that alias")
        return sizes[id(node)]

    if root is not None and (nodes := size(root)) > MAX_YAML_NODES:
        raise UserError(
            f"{source} has {nodes} values once its aliases are written out, more than {MAX_YAML_NODES}; remove some"
        )


def _yaml_number(value: Any) -> Any:
    """YAML 1.1 reads ``1e-4`` as text; people mean the number."""
    if isinstance(value, dict):
        return {k: _yaml_number(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_yaml_number(v) for v in value]
    if isinstance(value, str) and "e" in value.lower() and value[:1] in "+-.0123456789":
        try:
            return float(value)
        except ValueError:
            return value
    return value


def parse_json(data: str | bytes) -> Any:
    """A JSON document from anywhere.

    Raises:
        ValueError: it is none, or so deeply nested that it cannot be walked (which json tells by a RecursionError).
    """
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [part for node in level for part in _parts(node)]
        if not level:
            return value
    raise ValueError("nested too deeply")


def _parts(node: Any) -> Iterable[Any]:
    return node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()


def to_yaml(cfg: Any) -> str:
    return yaml.safe_dump(to_dict(cfg), sort_keys=False, default_flow_style=None, width=100)


def fingerprint(*parts: Any) -> str:
    """16 hex digits that name ``parts`` (configs, mappings, parents' fingerprints) by content."""
    plain = [to_dict(p) if dataclasses.is_dataclass(p) else p for p in parts]
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), default=_fields)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
