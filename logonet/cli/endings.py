"""How every command ends.

With status 0; with one sentence for the user and status 2; with a word on what was kept when it was asked to stop, and
status 130 or 143; or with a traceback and status 1, which is our mistake.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import traceback
from collections.abc import Iterator
from types import TracebackType

from logonet.core import redaction
from logonet.core.errors import Stopped, user_sentence


@contextlib.contextmanager
def sentences() -> Iterator[None]:
    """Turn UserError, also one from a Ray task or worker, into one sentence and exit status 2."""
    to_stderr = logging.StreamHandler()
    to_stderr.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[to_stderr])
    sys.excepthook = _traceback
    try:
        yield
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        sys.exit(130)
    except Stopped as err:
        print(err, file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except Exception as err:
        sentence = user_sentence(err)
        if sentence is None:
            raise
        print(f"error: {shown(sentence)}", file=sys.stderr)
        sys.exit(2)


def shown(text: str) -> str:
    """What may be printed of ``text``."""
    return redaction.without_names(redaction.without_secrets(text))


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


def _traceback(kind: type[BaseException], err: BaseException, trace: TracebackType | None) -> None:
    """A library's error may repeat an address with its password."""
    print(shown("".join(traceback.format_exception(kind, err, trace))), end="", file=sys.stderr)
