"""The command line: ``logonet <command>`` for looking after data, runs and machines, and what job scripts share."""

# ruff: noqa: F401
from logonet.cli.commands import COMMANDS, main
from logonet.cli.endings import sentences
from logonet.cli.jobs import ConfigArgs, JobArgs, absolute, absolute_model, job, job_config
