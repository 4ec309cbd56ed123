"""The one exception a user is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """Something only the user can mend.

    Its message is one sentence that names the file, key or setting and says what to do. The command
    line prints it without a traceback and exits with status 2.
    """


class BadScan(UserError):
    """One scan cannot be used. The stage that meets it quarantines the scan and goes on."""
