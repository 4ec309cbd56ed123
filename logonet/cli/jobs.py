"""What job scripts share: their flags, their config and the cluster they join."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, TypeVar

import tyro

from logonet.cli.endings import sentences
from logonet.core import config
from logonet.core.errors import UserError
from logonet.distributed import cluster
from logonet.distributed.cluster import Resources
from logonet.recipes.scale import Scale, scaled
from logonet.storage import object_store

A = TypeVar("A", bound="ConfigArgs")


@dataclass(frozen=True)
class ConfigArgs:
    """How a config is chosen.

    Attributes:
        settings: config keys laid on recipe and file, such as method=simclr train.lr=1e-3.
        recipe: a named full config (a job's --list-recipes shows them).
        scale: "smoke" makes the recipe small enough to try in minutes on two cores: tiny network and crops, six steps.
        config: a YAML file laid on the recipe.
        set: another way to write KEY=VALUE; may be repeated.
    """

    settings: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[KEY=VALUE ...]")] = ()
    recipe: str = ""
    scale: Scale = "full"
    config: str | None = None
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE")] = ()


@dataclass(frozen=True)
class JobArgs(ConfigArgs):
    """What every job script takes.

    Attributes:
        data: the scans: a folder or s3:// prefix, an MSD dataset.json, or a DICOM series folder.
        root: folder or s3:// prefix that holds every stage's artifacts; the same root resumes.
        resources: what the run may use; never changes a result.
        experiment: MLflow experiment.
        show_config: print the resolved config as YAML, and what its recipe is, and stop.
        list_recipes: print the recipes with their data, hardware, hours and results, and stop.
    """

    data: str = ""
    root: str = ""
    resources: tyro.conf.OmitArgPrefixes[Resources] = field(default_factory=Resources)
    experiment: str = "logonet"
    show_config: tyro.conf.FlagCreatePairsOff[bool] = False
    list_recipes: tyro.conf.FlagCreatePairsOff[bool] = False


def job(
    name: str,
    description: str,
    recipes: Mapping[str, Callable[[], Any]],
    run: Callable[[Any, Any], None],
    check: Callable[[Any], Any],
    args_type: type[JobArgs] = JobArgs,
    configure: Callable[[Any, Any], Any] = lambda cfg, args: cfg,
    room: Callable[[Any], Resources] = lambda args: args.resources,
    logs: bool = True,
) -> None:
    """A job script's main: parse, resolve the config, join the cluster, run; errors become sentences.

    Args:
        check: checks a config and writes its defaults out, without a cluster.
        args_type, configure: for a job with flags of its own, and what they do to the config.
        room: what a Ray that the job starts itself should have room for.
        logs: show what workers print.
    """
    with sentences():
        argv = [word for word in sys.argv[1:] if word not in ("-h", "--help")]
        args = parse(args_type, name, description, argv)
        if len(argv) < len(sys.argv) - 1:
            with contextlib.suppress(SystemExit):  # tyro leaves --help this way
                parse(args_type, name, description, ["--help"])
            print(describe(args, recipes), end="")
            return
        if args.list_recipes:
            for recipe, make in recipes.items():
                print(f"{recipe}\n    {' '.join((make.__doc__ or '').split())}\n")
            return
        cfg = check(configure(job_config(args, recipes), args))
        if args.show_config:
            if args.recipe:
                about = " ".join((recipes[args.recipe].__doc__ or "").split())
                print(textwrap.fill(about, 118, initial_indent="# ", subsequent_indent="# "))
            print(config.to_yaml(cfg), end="")
            return
        for flag in ("data", "root"):
            if not getattr(args, flag):
                raise UserError(f"--{flag} is missing; see {name} --help")
        args = replace(args, data=absolute(args.data, "--data"), root=absolute(args.root, "--root"))
        with cluster.connected(room(args), logs, tracked=True):
            run(cfg, args)


def parse(args_type: type[A], name: str, description: str, argv: list[str]) -> A:
    """A job's flags, and its settings wherever they stand among them."""
    told: dict[str, Any] = {"prog": name, "description": description, "return_unknown_args": True}
    args, rest = tyro.cli(args_type, args=argv, config=(tyro.conf.AvoidSubcommands,), **told)
    for word in rest:
        if not re.match(r"[A-Za-z_][\w.]*=", word):
            raise UserError(f"unknown option '{word}'; {name} --help lists those that exist")
    return replace(args, settings=(*args.settings, *rest))


def describe(args: ConfigArgs, recipes: Mapping[str, Callable[[], Any]]) -> str:
    """Every config key, with its value under the recipe and the settings that are given."""
    from logonet.cli import keys

    if not args.recipe:
        recipes = {"": type(next(iter(recipes.values()))())}
    of = (
        f"with --recipe {args.recipe}" if args.recipe else "by default; --recipe NAME --help shows a recipe's"
    )
    return f"Settings (KEY=VALUE), and their values {of}\n\n{keys.describe(job_config(args, recipes))}"


def absolute(uri: str, flag: str) -> str:
    """Local paths made absolute: Ray's workers run in other folders than the command."""
    if object_store.is_s3(uri) or os.path.isabs(object_store.local_path(uri)):
        return uri
    if cluster.submitted():
        raise UserError(
            f"{flag} {uri} is relative, and a submitted job's folder is thrown away; give an absolute path or s3://"
        )
    return os.path.abspath(object_store.local_path(uri))


def absolute_model(uri: str, flag: str = "--model") -> str:
    """The same for where a model is: a folder, an artifact, or models:/NAME@alias; or several, joined by commas."""
    return ",".join(m if m.startswith("models:/") else absolute(m, flag) for m in uri.split(","))


def job_config(args: ConfigArgs, recipes: Mapping[str, Callable[[], Any]]) -> Any:
    """Recipe, then file, then settings: each laid on what came before, strictly."""
    if args.recipe not in recipes:
        missing = (
            f"--recipe is missing; choose one of {', '.join(recipes)} (a job's --list-recipes says what for)"
        )
        raise UserError(config.unknown("recipe", args.recipe, recipes) if args.recipe else missing)
    base = scaled(recipes[args.recipe](), args.scale)
    values = config.to_dict(base)
    if args.config is not None:
        values = config.merge(values, config.read_yaml(object_store.read_text(args.config), args.config))
    return config.from_dict(type(base), config.override(values, (*args.set, *args.settings)))
