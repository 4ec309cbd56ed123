"""The site's pages that are written from the code at every build, and so are never out of date.

Config keys come from the dataclasses, with their types, defaults and docstrings; recipes from ``logonet/recipes``;
commands from what ``--help`` prints. mkdocs.yml names this file as a hook: `on_files` adds the pages,
`on_page_markdown` mends links that lead out of docs/ and are right in the repository only.
"""

from __future__ import annotations

import contextlib
import html
import importlib
import inspect
import io
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from logonet.cli.keys import fields, leaves, value, walk
from logonet.core.config import Component

ROOT = Path(__file__).parents[1]
CHOSEN_BY_NAME = {"backbone": "networks.md", "method": "methods.md"}  # mappings {"name": ..., **options}
SHELL_WIDTH = 80


# ------------------------------------------------------------------------------------------ one dataclass


def prose(doc: str | None) -> str:
    """A docstring's text before its sections, without the paragraph that explains shape letters."""
    doc = re.split(r"\n\s*(?:Attributes|Args|Returns|Raises):\n", inspect.cleandoc(doc or ""))[0]
    if re.match(r"\w+\(.*\)$", doc, re.DOTALL):
        return ""  # what dataclass writes where nobody has written anything
    parts = [p for p in doc.split("\n\n") if not re.match(r"(Letters|Shapes):", p)]
    return markdown("\n\n".join(parts))


def markdown(text: str) -> str:
    """A docstring's marks as Markdown's."""
    code = re.sub(r"``(.+?)``", r"`\1`", text)
    return re.sub(r"<(?=\w)", "&lt;", code) if "`" not in code else _outside_code(code)


def _outside_code(text: str) -> str:
    parts = text.split("`")
    return "`".join(re.sub(r"<(?=\w)", "&lt;", p) if i % 2 == 0 else p for i, p in enumerate(parts))


def _yaml_words(text: str) -> str:
    return re.sub(r"\bNone\b", "`null`", text)


def table(cfg: Any, path: str) -> str:
    """One line a key, of the keys that are no sections."""
    rows = []
    for name, (kind, said) in leaves(type(cfg)).items():
        what = _yaml_words(markdown(said).replace("|", r"\|"))
        if re.match(r"[a-z]{2,}[ ,:;]", what):
            what = what[0].upper() + what[1:]
        key = f"{path}.{name}".lstrip(".")
        rows.append(f"| `{key}` | {kind} | `{value(getattr(cfg, name))}` | {what} |".replace("  ", " "))
    if not rows:
        return ""
    return "\n".join(["| key | type | default | what it is |", "|---|---|---|---|", *rows]) + "\n"


def tree(cfg: Any, path: str = "", level: int = 2) -> str:
    """All keys of a config, a heading for each section."""
    out = []
    for where, part in walk(cfg, path):
        if where:
            parent = _find(cfg, where.removeprefix(path).lstrip("."))
            out.append(f"{'#' * level} {where}\n" if where != path else "")
            if parent is None:
                out.append(f"Off (`{where}: null`) by default; `{where}={{}}` turns it on with these:\n")
        out += [_yaml_words(prose(type(part).__doc__)) + "\n", table(part, where)]
        for name, page in CHOSEN_BY_NAME.items():
            if name in fields(type(part)):
                chosen = Component.of(getattr(part, name), name)
                text = f"`{name}` is chosen by name; the default is `{value(chosen)}`."
                if not chosen.name:
                    text = f"`{name}` is chosen by name; by default it is the one of `init.weights`."
                out.append(f"{text} [All of them, with their options]({page})\n")
    return "\n".join(out)


def _find(cfg: Any, path: str) -> Any:
    for name in filter(None, path.split(".")):
        cfg = getattr(cfg, name, None)
    return cfg


# ------------------------------------------------------------------------------------------------ pages


def pretraining_page() -> str:
    from logonet.pipelines import Pretraining

    return (
        "# Pretraining settings\n\n"
        "Every key of `jobs/pretrain.py`, `jobs/crop.py`, `jobs/cluster.py` and of what `jobs/sweep.py` may search. "
        "Set one with `train.lr=3e-4`, many with `--config mine.yaml`; both are laid on a [recipe](recipes.md), "
        "strictly: an unknown key is refused with the nearest that exists. `--show-config` prints what came out.\n\n"
        f"{tree(Pretraining())}"
    )


def finetuning_page() -> str:
    from logonet.pipelines import Finetuning

    return f"# Finetuning settings\n\nEvery key of `jobs/finetune.py`.\n\n{tree(Finetuning())}"


def named_page(package: str, title: str, section: str, guide: str) -> str:
    """Every file of ``logonet/networks`` or ``logonet/methods`` with its options."""
    registry = importlib.import_module(f"logonet.{package}")
    out = [
        f"# {title}\n\nChosen by `{section}=NAME`; options are `{section}.KEY=VALUE`. [Which to choose](../{guide})\n"
    ]
    for name in registry.names():
        doc = prose(importlib.import_module(f"logonet.{package}.{name}").__doc__)
        out += [f"## {name}\n", doc + "\n", tree(registry.config(name), section, level=3)]
    return "\n".join(out)


def recipes_page() -> str:
    from logonet import recipes
    from logonet.core import config

    out = [
        "# Recipes\n\nA recipe is a full config with a name. Shown is where it departs from the defaults.\n"
    ]
    for job, named in (("pretrain", recipes.PRETRAINING), ("finetune", recipes.FINETUNING)):
        out.append(f"## jobs/{job}.py\n")
        for name, make in named.items():
            made = make()
            changed = _departs(config.to_dict(made), config.to_dict(type(made)()))
            text = (
                yaml.safe_dump(changed, sort_keys=False, default_flow_style=None, width=96) if changed else ""
            )
            yaml_block = f"```yaml\n{text}```\n" if changed else "The defaults themselves.\n"
            out.append(f"### {name} {{#{job}-{name}}}\n\n{prose(make.__doc__)}\n\n{yaml_block}")
    return "\n".join(out)


def _departs(values: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    out = {}
    for key, mine in values.items():
        other = base.get(key)
        if isinstance(mine, dict) and isinstance(other, dict) and "name" not in mine:
            if inner := _departs(mine, other):
                out[key] = inner
        elif mine != other:
            out[key] = mine
    return out


def commands_page() -> str:
    import tyro

    from jobs import evaluate, finetune, postprocess, predict, study, sweep
    from logonet import cli

    out = [
        "# Commands\n\nWhat `--help` prints. A job script takes `ray job submit --working-dir . --` before it.\n"
    ]
    for name in cli.COMMANDS:
        shown = _help(lambda name=name: cli.main([*name.split(), "--help"]))
        out.append(f"## logonet {name}\n\n```text\n{shown}```\n")
    jobs: dict[str, Any] = {
        "pretrain": cli.JobArgs,
        "finetune": finetune.Args,
        "evaluate": evaluate.Args,
        "postprocess": postprocess.Args,
        "predict": predict.Args,
        "sweep": sweep.Args,
        "study": study.Args,
    }
    for job, args in jobs.items():
        told = {"prog": f"jobs/{job}.py", "description": importlib.import_module(f"jobs.{job}").__doc__}
        told["config"] = (tyro.conf.AvoidSubcommands,)
        shown = _help(lambda args=args, told=told: tyro.cli(args, args=["--help"], **told))
        out.append(f"## jobs/{job}.py\n\n```text\n{shown}```\n")
    out.append("`jobs/crop.py` and `jobs/cluster.py` take what `jobs/pretrain.py` takes, and stop earlier.\n")
    return "\n".join(out)


def _help(call: Callable[[], Any]) -> str:
    shown, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(SHELL_WIDTH)
    try:
        with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
            call()
    finally:
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue())
    return "\n".join(line.rstrip() for line in plain.strip().splitlines()) + "\n"


def root_page(name: str) -> str:
    """A page that lies at the repository's root, where its links to docs/ begin with that."""
    return (ROOT / name).read_text().replace("](docs/", "](")


PAGES: dict[str, Callable[[], str]] = {
    "reference/pretraining.md": pretraining_page,
    "reference/finetuning.md": finetuning_page,
    "reference/methods.md": lambda: named_page("methods", "Method options", "method", "methods.md"),
    "reference/networks.md": lambda: named_page("networks", "Network options", "backbone", "networks.md"),
    "reference/recipes.md": recipes_page,
    "reference/commands.md": commands_page,
    "contributing.md": lambda: root_page("CONTRIBUTING.md"),
    "changelog.md": lambda: root_page("CHANGELOG.md"),
}


# ------------------------------------------------------------------------------------------------ hooks


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for path, write in PAGES.items():
        files.append(File.generated(config, path, content=write()))
    return files


def on_page_markdown(text: str, page: Any, **_: Any) -> str:
    """Links to the repository's files outside docs/ become the files' names: the site does not hold them."""
    folder = (ROOT / "docs" / page.file.src_path).parent

    def named(link: re.Match[str]) -> str:
        target = (folder / link[2].partition("#")[0]).resolve()
        inside = (
            target.is_relative_to(ROOT / "docs") or not target.is_relative_to(ROOT) or not target.exists()
        )
        if inside:
            return link[0]
        name = html.escape(str(target.relative_to(ROOT)))
        return link[1] if name in link[1] else f"{link[1]} (`{name}`)"

    return re.sub(r"(?<!!)\[([^\]]+)\]\((\.\./[^)\s]+)\)", named, text)
