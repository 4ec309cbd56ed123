"""Configs: frozen dataclasses beside their owners, merged strictly from mappings, YAML and ``a.b=c``.

A config is a dataclass tree. A part that is chosen by name (a network, a method) is a `Component`: in YAML and in
JSON the mapping ``{"name": ..., **options}``, whose options are those of the chosen file's ``Config``.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import re
import types
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from annotated_types import Ge, Gt, Le

from logonet.core.errors import UserError

if TYPE_CHECKING:  # it takes a quarter of a second, and most data tasks make no config
    from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")
MAX_YAML_NODES = 100_000
# Metadata of a field that came later: what leaves it at its default is called by the same fingerprint as before.
OMIT_DEFAULT = {"omit_default": True}
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
            raise UserError(f"{where}.name is {name!r}; it must be text")
        return cls(name, {key: value for key, value in values.items() if key != "name"})

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(lambda values: cls.of(values, ""))

    @staticmethod
    def convert(owner: Any, *names: str) -> None:
        """Turn fields of a frozen dataclass that hold plain mappings into components, in its ``__post_init__``."""
        for name in names:
            object.__setattr__(owner, name, Component.of(getattr(owner, name), name))

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
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if not _omitted(f, value)}
    raise TypeError(f"{type(value).__name__} is no part of a config")


def _omitted(field: dataclasses.Field[Any], value: Any) -> bool:
    made = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return OMIT_DEFAULT.items() <= field.metadata.items() and getattr(value, field.name) == made


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build the dataclass ``cls`` from a mapping, refusing unknown keys, wrong types and values out of bounds.

    Args:
        where: the section that ``values`` is, such as "train"; it leads the keys in errors.

    Raises:
        UserError: naming the key, and for an unknown one the nearest that exists.
    """
    from pydantic import ValidationError

    check_keys(cls, values, where)
    try:
        # As JSON: strict validation takes its arrays for tuples and its whole numbers for floats, and nothing else.
        return _adapter(cls).validate_json(json.dumps(values, default=str), strict=True)  # type: ignore[arg-type]
    except ValidationError as err:
        raise UserError(_sentence(err, where)) from None
    except (ValueError, TypeError, RecursionError) as err:
        raise UserError(f"config section '{where or cls.__name__}': {err}") from None


def check_keys(cls: type, values: Mapping[str, Any], where: str = "") -> None:
    """Raise UserError for the first key of ``values`` that ``cls`` (or a nested dataclass) lacks."""
    if not isinstance(values, Mapping):
        raise UserError(f"config section '{where}' must be a mapping of keys to values, not {values!r}")
    hints = get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for key, value in values.items():
        path = _path(where, key)
        if key not in names:
            raise UserError(unknown("config key", path, [_path(where, n) for n in names]))
        section = section_of(hints[key])
        if hints[key] is Component:
            Component.of(value, path)  # its options are checked once it is resolved
        elif section is not None and not (value is None and type(None) in get_args(hints[key])):
            check_keys(section, value, path)
        elif get_origin(hints[key]) is dict and not isinstance(value, Mapping):
            raise UserError(f"config section '{path}' must be a mapping of keys to values, not {value!r}")


def section_of(hint: Any) -> type | None:
    """The dataclass of a field that is a section, also of one that may be null."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next((part for part in parts if isinstance(part, type) and dataclasses.is_dataclass(part)), None)


def _path(*parts: str | int) -> str:
    """("crops", "size_vox", 2) as people write it: crops.size_vox[2]."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")


@functools.cache
def _adapter(cls: type) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


@functools.cache
def _field_checker(cls: type) -> TypeAdapter[Any]:
    """Checks a mapping of the fields' values."""
    from pydantic import TypeAdapter
    from typing_extensions import TypedDict

    hints = get_type_hints(cls, include_extras=True)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    return TypeAdapter(TypedDict(cls.__name__, fields))  # type: ignore[operator]


def _sentence(err: ValidationError, where: str) -> str:
    """What is wrong with the first of the values that pydantic refuses."""
    wrong = err.errors(include_url=False)[0]
    loc, value, said = wrong["loc"], wrong["input"], wrong["msg"]
    if wrong["type"] in ("value_error", "json_invalid"):
        return f"config section '{_path(where, *loc)}': {wrong.get('ctx', {}).get('error', said)}"
    if wrong["type"] == "missing" and isinstance(loc[-1], str):
        return f"{_path(where, *loc)} is missing; set it"
    if wrong["type"] == "missing":
        loc, said = loc[:-1], f"Input should have more than {len(value)} entries"
    for theirs, ours in WORDS.items():
        said = said.replace(theirs, ours)
    return f"{_path(where, *loc)} is {value!r}; {said}"


WORDS = {  # of pydantic's messages
    "Input should": "it must",
    "Tuple should": "it must",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "greater than": "above",
    "less than": "below",
    " after validation": "",
}


class Section:
    """Base of config dataclasses: an instance checks the types and bounds of its fields when it is made.

    Bounds stand in the annotations: ``lr: Annotated[float, Gt(0)]``, or `Positive`, `Count`, `Share`... for the usual
    ones. A rule about several keys is code in the class's own ``__post_init__``, after ``super().__post_init__()``.
    ``class Config(Section, key="train")`` says how errors name the section.
    """

    _key = ""

    def __init_subclass__(cls, key: str = "") -> None:
        cls._key = key or cls._key

    def __post_init__(self) -> None:
        from pydantic import ValidationError

        for name, value in vars(self).items():
            if isinstance(value, list):  # as people write in Python what YAML has in brackets
                object.__setattr__(self, name, tuple(value))
        try:
            _field_checker(type(self)).validate_python(vars(self), strict=True)  # type: ignore[arg-type]
        except ValidationError as err:
            raise UserError(_sentence(err, self._key)) from None


Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
Fraction = Annotated[float, Gt(0), Le(1)]
Percentile = Annotated[float, Ge(0), Le(100)]
SizeVox = tuple[Count, Count, Count]


def unknown(kind: str, name: Any, known: Iterable[str]) -> str:
    """The sentence for a name that does not exist, with the nearest that does. YAML's keys may be no text."""
    known = sorted(known)
    # Cut off: comparing takes the square of the length, and a file may hold a key of megabytes.
    near = difflib.get_close_matches(str(name)[:100], known, n=1, cutoff=0.0)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"unknown {kind} '{name}'{hint} (known: {', '.join(known) or 'none'})"


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


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of nested mappings: ``{"train": {"lr": 1.0}}`` as ``{"train.lr": 1.0}``."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out


def override(values: Mapping[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """Apply ``a.b=c`` settings, left to right; the value is read as YAML. ``method=simclr`` sets the method's name."""
    out = dict(values)
    for setting in settings:
        path, eq, text = setting.partition("=")
        if not eq or not path:
            raise UserError(f"{setting!r} is not of the form section.key=value")
        value: Any = parse_yaml(text, setting)
        old = out.get(path)
        if isinstance(value, str) and isinstance(old, Mapping) and ("name" in old or not old):
            value = {"name": value}
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
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        _refuse_bomb(node, source)
        return loader.construct_document(node) if node is not None else None
    except yaml.YAMLError as err:
        raise UserError(f"{source} is not valid YAML: {' '.join(str(err).split())}") from None
    except RecursionError:
        raise UserError(f"{source} is nested too deeply; mend it") from None


class _Loader(yaml.SafeLoader):
    """PyYAML's constructors raise what int(), float() and datetime() do; here they say line and column."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, OverflowError):
            problem = f"this is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


# YAML 1.1 reads 1e-4 as text; people mean the number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


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
