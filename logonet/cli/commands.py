"""The ``logonet`` command."""

from __future__ import annotations

from collections.abc import Callable

import tyro

from logonet.cli import data, machines, runs
from logonet.cli.endings import sentences

COMMANDS: dict[str, Callable[..., None]] = {
    "data import": data.data_import,
    "data check": data.data_check,
    "data leakcheck": data.data_leakcheck,
    "phantoms": data.phantoms,
    "compare": runs.compare,
    "register": runs.register,
    "alias": runs.alias,
    "export": runs.export,
    "clusters report": runs.clusters_report,
    "sweep-report": runs.sweep_report,
    "plan": machines.plan,
    "doctor": machines.doctor,
    "chaos": machines.chaos,
    "spot-watch": machines.spot_watch,
    "cache clear": machines.cache_clear,
    "s3 serve": machines.s3_serve,
}
GROUPS = {
    "data": "Import, check and compare scans.",
    "clusters": "Judge clusterers.",
    "cache": "Look after what this machine keeps of a bucket.",
    "s3": "Serve S3 on this machine.",
}


def app() -> tyro.extras.SubcommandApp:
    """The parser of all commands."""
    whole = tyro.extras.SubcommandApp()
    groups = {"": whole}
    for words, command in COMMANDS.items():
        group, _, name = words.rpartition(" ")
        if group not in groups:
            groups[group] = whole.command(tyro.extras.SubcommandApp(), name=group, help=GROUPS[group])
        groups[group].command(name=name)(command)
    return whole


def main(args: list[str] | None = None) -> None:
    """Run the command that ``args`` names; by default those of the process."""
    with sentences():
        about = "Look after the data, the models and the results of pretraining and finetuning."
        app().cli(prog="logonet", description=about, args=args)
