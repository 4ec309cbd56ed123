"""The one exception a user is meant to read."""

from __future__ import annotations

import re

from logonet.core.redaction import without_secrets

LONGEST = 600  # characters of a sentence; names and values that a file holds have any length


class UserError(Exception):
    """Something only the user can correct.

    Its message is one sentence that names the file, key or setting and says what to do. The command
    line prints it without a traceback and exits with status 2. Credentials in it are taken out: a sentence may
    name a URI or repeat what a library said, and it goes to logs, tables and reports. As text it is one printable
    line whatever it quotes: a file's name may hold a line break, half a UTF-8 letter or what turns a terminal red.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(without_secrets(sentence))

    def __str__(self) -> str:
        return plain(super().__str__())


class Stopped(Exception):
    """Somebody asked a command to end before it was done; its message says what was kept and how to go on."""


class BadScan(UserError):
    """One scan cannot be used. The stage that meets it quarantines the scan and goes on."""


def plain(text: str, longest: int = LONGEST) -> str:
    """``text`` as one printable line of at most ``longest`` characters; its middle is left out where it has more."""
    text = _shortened(text, longest)
    if text.isprintable():
        return text
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return _shortened("".join(escaped), longest)


def _shortened(text: str, longest: int) -> str:
    half = (longest - 5) // 2
    return text if len(text) <= longest else f"{text[:half]} ... {text[-half:]}"


def user_sentence(err: BaseException | None) -> str | None:
    """The words of the UserError behind ``err``, looked for through Ray's wrappers; None when there is none."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [err]
    while waiting:
        err = waiting.pop(0)
        if err is None or id(err) in seen:
            continue
        seen.add(id(err))
        if isinstance(err, UserError):
            # Ray makes a task's error an instance of its cause's class too, with a traceback for text.
            cause = getattr(err, "cause", None)
            return str(cause if isinstance(cause, UserError) else err)
        waiting += [getattr(err, "cause", None), err.__cause__]
        waiting += list(getattr(err, "worker_failures", {}).values())
        waiting += [getattr(err, "controller_failure", None)]
        # Ray Data keeps no more of a task's error than its text.
        if told := _TOLD.findall(str(err)):
            return told[-1]
    return None


_TOLD = re.compile(
    r"^(?:.*\s)?logonet\.[\w.]+\.(?:UserError|BadScan|IntegrityError|Refused): (.+)$", re.MULTILINE
)
