"""Every key of a config with its type, value and meaning, as its dataclasses have them."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
import textwrap
import types
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from logonet import methods, networks
from logonet.core import config
from logonet.core.config import Component

CHOSEN_BY_NAME: dict[str, Any] = {"backbone": networks, "method": methods}
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "multiple_of": "a multiple of"}


def attributes(cls: type) -> dict[str, str]:
    """What the docstrings of a dataclass and its bases say of each field, under "Attributes:"."""
    out: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, listed = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")
        for entry in re.finditer(r"^ {4}(\w+(?:, \w+)*): (.*(?:\n {5,}.*)*)", listed, re.MULTILINE):
            out |= dict.fromkeys(entry[1].split(", "), " ".join(entry[2].split()))
    return out


def fields(cls: type) -> dict[str, Any]:
    """Type hints of a dataclass's fields, with their bounds, in their order."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def kind(hint: Any) -> str:
    """A type and its bounds as people say them who write YAML."""
    return ", ".join([_noun(hint), *dict.fromkeys(_bounds(hint))])


def _noun(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _noun(args[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in args)
    if origin in (Union, types.UnionType):
        return " or ".join("`null`" if arg is type(None) else _noun(arg) for arg in args)
    if origin is tuple and args[-1] is Ellipsis:
        inner = _noun(args[0])
        plural = inner.replace("list of", "lists of") if inner.startswith("list of") else f"{inner}s"
        return f"list of {inner if inner[0].isdigit() else plural}"
    if origin is tuple:
        each = {_noun(arg) for arg in args}
        return f"{len(args)} {each.pop()}s" if len(each) == 1 else " and ".join(map(_noun, args))
    if origin is dict:
        return "mapping"
    name = getattr(hint, "__name__", str(hint))
    return {"int": "integer", "float": "number", "bool": "true or false", "str": "text"}.get(name, name)


def _bounds(hint: Any) -> Iterator[str]:
    for bound in getattr(hint, "__metadata__", ()):
        yield from (f"{word} {getattr(bound, name)}" for name, word in BOUNDS.items() if hasattr(bound, name))
    for part in get_args(hint):
        yield from _bounds(part)


def value(default: Any) -> str:
    """A default as it would stand in YAML."""
    plain = yaml.safe_dump(config.to_dict([default]), default_flow_style=True, width=10_000)
    return plain.strip().removeprefix("[").removesuffix("]")


def walk(cfg: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, config) of a config and all sections below it; one that is null stands there with its own defaults."""
    yield path, cfg
    for name, hint in fields(type(cfg)).items():
        cls = config.section_of(hint)
        if cls not in (None, Component):
            yield from walk(getattr(cfg, name) or cls(), f"{path}.{name}".lstrip("."))


def leaves(cls: type) -> dict[str, tuple[str, str]]:
    """Type and meaning of each key that is no section."""
    said = attributes(cls)
    return {
        name: (kind(hint), said.get(name, ""))
        for name, hint in fields(cls).items()
        if config.section_of(hint) is None and name not in CHOSEN_BY_NAME
    }


def describe(cfg: Any) -> str:
    """A help text of all keys: ``train.lr=0.001``, its type, and one line of what it is."""
    out = _described("Other settings", [("", cfg)])
    for name, hint in fields(type(cfg)).items():
        part, cls = getattr(cfg, name), config.section_of(hint)
        if name in CHOSEN_BY_NAME:
            chosen, package = Component.of(part, name), CHOSEN_BY_NAME[name]
            others = ", ".join(other for other in package.names() if other != chosen.name)
            title = f"{name}={chosen.name or '(that of init.weights)'}, or {others} ({name}=NAME --help shows its keys)"
            keys = walk(chosen.resolve(package.config, name).config, name) if chosen.name else ()
            out += _described(title, keys)
        elif cls is not None:
            off = f" Off; {name}={{}} turns it on with these." if part is None else ""
            title = f"{name}: {_first_sentence(cls.__doc__ or '')}{off}"
            out += _described(title, walk(cls() if part is None else part, name))
    return "\n".join(out)


def _described(title: str, parts: Iterable[tuple[str, Any]]) -> list[str]:
    """Lines of help on the keys of some sections."""
    width, indent = shutil.get_terminal_size().columns, " " * 6
    out = textwrap.wrap(title, width)
    for path, part in parts:
        for name, (what, said) in leaves(type(part)).items():
            key = f"{path}.{name}".lstrip(".")
            out.append(f"  {key}={value(getattr(part, name))}  ({what.replace('`', '')})")
            out += textwrap.wrap(
                _first_sentence(said), width, initial_indent=indent, subsequent_indent=indent
            )
    return [*out, ""]


def _first_sentence(doc: str) -> str:
    text = " ".join(inspect.cleandoc(doc).partition("\n\n")[0].split()).replace("``", "")
    return re.sub(r"\bNone\b", "null", re.split(r"(?<=\.)\s", text)[0])
