"""The site's pages that are written from the code cover all of it, and what people wrote names only what there is."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import re
import typing
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import yaml

from logonet import cli, methods, networks, recipes
from logonet.cli import keys as cli_keys
from logonet.core import config
from logonet.pipelines import Finetuning, Pretraining

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def reference() -> Any:
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(page: str) -> dict[str, tuple[str, str]]:
    """key -> (default, what it is) of a page's tables."""
    found = re.findall(r"^\| `([\w.]+)` \| .+? \| (`.*?`) \|(.*)\|$", page, re.MULTILINE)
    return {key: (default, what.strip()) for key, default, what in found}


def keys(reference: Any, cfg: Any, path: str = "") -> set[str]:
    """What a setting could name, found without the generator's own walk."""
    out = set()
    for field in dataclasses.fields(cfg):
        value, where = getattr(cfg, field.name), f"{path}.{field.name}".lstrip(".")
        section = config.section_of(typing.get_type_hints(type(cfg))[field.name])
        if field.name in ("backbone", "method"):
            continue
        if section is not None:
            out |= keys(reference, section() if value is None else value, where)
        else:
            out.add(where)
    return out


@pytest.mark.parametrize(
    ("page", "cfg"),
    [("pretraining", Pretraining()), ("finetuning", Finetuning())],
    ids=["pretraining", "finetuning"],
)
def test_every_key_of_a_config_is_there_and_explained(reference, page, cfg):
    found = rows(reference.PAGES[f"reference/{page}.md"]())
    assert found.keys() == keys(reference, cfg)
    assert [key for key, (_, what) in found.items() if not what] == []
    assert found["train.epochs"][0] == f"`{cfg.train.epochs}`"


@pytest.mark.parametrize(("package", "section"), [(methods, "method"), (networks, "backbone")])
def test_every_option_of_every_method_and_network_is_there_and_explained(reference, package, section):
    page = reference.PAGES[f"reference/{package.__name__.split('.')[1]}.md"]()
    for name in package.names():
        _, _, own = page.partition(f"\n## {name}\n")
        found = rows(own.split("\n## ")[0])
        assert found.keys() == keys(reference, package.config(name), section), name
        assert [key for key, (_, what) in found.items() if not what] == [], name


def test_recipes_and_commands_are_all_there(reference):
    page = reference.PAGES["reference/recipes.md"]()
    for job, named in (("pretrain", recipes.PRETRAINING), ("finetune", recipes.FINETUNING)):
        for name in named:
            assert f"### {name} {{#{job}-{name}}}" in page
    shown = yaml.safe_load(
        page.partition("{#pretrain-small}")[2].partition("```yaml\n")[2].partition("```")[0]
    )
    assert shown["train"] == {"epochs": 50, "global_batch": 8, "warmup_epochs": 5}
    page = reference.PAGES["reference/commands.md"]()
    for command in cli.COMMANDS:
        assert f"## logonet {command}\n" in page
        assert f"usage: logonet {command} " in page
    for job in ("pretrain", "finetune", "evaluate", "postprocess", "predict", "sweep", "study"):
        assert f"usage: jobs/{job}.py " in page


@dataclasses.dataclass(frozen=True)
class Base:
    """
    Attributes:
        zeroth: of the base.
        first: of the base.
    """

    zeroth: int = 0


@dataclasses.dataclass(frozen=True)
class Said(Base):
    """Some settings.

    Attributes:
        first, second: of two
            lines, such as a: b.
        third: of one.
    """

    first: int = 1
    second: tuple[float, float] = (1.0, 2.0)
    third: int = 3
    last: str = ""


def test_what_is_said_of_a_field_is_found_in_the_docstrings_of_the_class_and_its_bases():
    said = cli_keys.attributes(Said)
    assert said["first"] == said["second"] == "of two lines, such as a: b."
    assert said["zeroth"] == "of the base." and said["third"] == "of one."
    assert "last" not in said


def test_types_are_said_as_people_say_them_who_write_yaml(reference):
    said = {
        int | None: "integer or `null`",
        config.Count | None: "integer or `null`, at least 1",
        tuple[config.Share, config.Share]: "2 numbers, at least 0, at most 1",
        tuple[float, float]: "2 numbers",
        tuple[int, ...]: "list of integers",
        tuple[tuple[int, int, int], ...]: "list of 3 integers",
        tuple[tuple[int, ...], ...] | None: "list of lists of integers or `null`",
        Literal["a", "b"]: "`a` or `b`",
        bool: "true or false",
    }
    assert {hint: cli_keys.kind(hint) for hint in said} == said


def test_links_out_of_the_site_become_names(reference):
    page = SimpleNamespace(file=SimpleNamespace(src_path="methods.md"))
    mended = reference.on_page_markdown(
        "[the loop](../logonet/training/loop.py) [d](data.md) [no](../logonet/no.py)", page
    )
    assert mended == "the loop (`logonet/training/loop.py`) [d](data.md) [no](../logonet/no.py)"


def nav_pages(part: Any) -> list[str]:
    if isinstance(part, str):
        return [part]
    return [
        page for value in (part.values() if isinstance(part, dict) else part) for page in nav_pages(value)
    ]


def test_the_navigation_leads_to_pages_that_exist(reference):
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert config["hooks"] == ["docs/reference.py"]
    pages = nav_pages(config["nav"])
    assert set(reference.PAGES) <= set(pages)
    for page in pages:
        assert page in reference.PAGES or (DOCS / page).exists(), page


@pytest.mark.parametrize("file", [*sorted(DOCS.glob("*.md")), ROOT / "README.md"], ids=lambda f: f.name)
def test_pages_name_commands_that_exist(file):
    text = file.read_text()
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    code = [*re.findall(r"`([^`\n]+)`", text), *blocks.splitlines()]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in code:
        if named := re.match(r"(?:.* -- )?logonet ([a-z0-9-]+)(?: ([a-z0-9-]+))?", line):
            assert {named[1], f"{named[1]} {named[2]}"} & set(cli.COMMANDS), line
        if named := re.match(r"make ([a-z-]+)", line):
            assert named[1] in targets, line
        for script in re.findall(
            r"\b((?:jobs|tools|benchmarks|deploy|tests|logonet)/[\w/-]+\.(?:py|yaml))\b", line
        ):
            assert (ROOT / script).exists(), line
