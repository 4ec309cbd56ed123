"""The command line: ``logonet <command>`` for looking after data, runs and machines, and what job scripts share."""

from logonet.cli.commands import COMMANDS, app, main
from logonet.cli.endings import sentences
from logonet.cli.jobs import ConfigArgs, JobArgs, absolute, absolute_model, job, job_config

__all__ = [
    "COMMANDS",
    "ConfigArgs",
    "JobArgs",
    "absolute",
    "absolute_model",
    "app",
    "job",
    "job_config",
    "main",
    "sentences",
]
