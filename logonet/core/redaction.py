"""What must not be written down: credentials, wherever they turn up, and the names of scans where that is asked.

Credentials are taken out of every message for the user (`errors.UserError`), of what a command prints at its end, of
MLflow's params and tags and of what is passed on to workers. They are told by where they stand (``user:password@``,
a signature in a URL, ``secret=...``) and by their value, when a variable of the environment holds it.

A scan's file name can be a patient's. MLflow never gets one; with ``LOGONET_HIDE_NAMES=1`` nothing printed has one.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Iterable, Sequence

HIDE_NAMES = "LOGONET_HIDE_NAMES"
HIDDEN = "REDACTED"
SHORTEST = 8  # characters of a secret that is told by its value; shorter ones occur by chance
SHORTEST_NAME = 3  # the same of a scan's name: "1" stands in every second line

_SECRET = r"(?:secret|passw|credential|token(?!s|i)|api_?key|access_?key|private_?key)"
SECRET_NAME = re.compile(_SECRET, re.I)
_NO_SECRET = re.compile(r"_(ID|FILE|PATH|DIR|CREDENTIALS)$", re.I)  # AWS_ACCESS_KEY_ID and where secrets lie
# A text may be a megabyte of one letter: what could begin anywhere and run to the end must begin at a boundary, or end.
_CREDENTIALS = [
    (re.compile(r"(\b\w+://)[^/\s@]+@"), r"\1REDACTED@"),
    # A secret key may have slashes; a port is none.
    (re.compile(r"(\b\w+://)[^/\s@:]+:(?!\d+/)[^\s@]{1,1000}@"), r"\1REDACTED@"),
    (re.compile(r"([?&](?:x-amz-\w+|signature|sig|awsaccesskeyid|se|sv)=)[^&\s]+", re.I), r"\1REDACTED"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), HIDDEN),
    (re.compile(rf"({_SECRET}[\w.-]{{0,100}}[\"']?=)[^\s,&]+", re.I), r"\1REDACTED"),
]
# In data, unlike in sentences, what follows such a word is its value.
_VALUES = (re.compile(rf"({_SECRET}[\w.-]{{0,100}}[\"']?(?:\s*[=:]\s*|\s+))[^\s,&]+", re.I), r"\1REDACTED")
_SCANS = (
    re.compile(r"(?<![^=,;'\"\[\]{}])[^=,;'\"\[\]{}]*\.(?:nii(?:\.gz)?|dcm|ima|mha|mhd|nrrd)\b", re.I),
    "[scan]",
)


def without_secrets(text: str) -> str:
    """``text``, such as a sentence, without passwords, signatures, access keys and the environment's secrets."""
    for name, value in os.environ.items():
        named = len(value) >= SHORTEST and value in text and SECRET_NAME.search(name)
        if named and not _NO_SECRET.search(name):
            text = text.replace(value, HIDDEN)
    for pattern, by in _CREDENTIALS:
        text = pattern.sub(by, text)
    return text


def holds_credentials(text: str) -> bool:
    """Whether some stand in ``text``, such as an address; by their place alone."""
    return any(pattern.search(text) for pattern, _ in _CREDENTIALS)


def redact(text: str) -> str:
    """The same, and without scans' file names and whatever is called a secret: for what others will read."""
    for pattern, by in (_VALUES, _SCANS):
        text = pattern.sub(by, without_secrets(text))
    return without_names(text)


def command_line(argv: Sequence[str]) -> str:
    """The command as one shell line, without secrets; what the ``logonet.command`` tag should hold."""
    words, hide_next = [], False
    for word in argv:
        name, equals, _ = word.partition("=")
        secret = bool(SECRET_NAME.search(name))
        words.append(HIDDEN if hide_next else f"{name}={HIDDEN}" if secret and equals else redact(word))
        hide_next = secret and not equals and word.startswith("-")
    return shlex.join(words)


# ---------------------------------------------------------------------------------------- scans' names

_names: dict[str, str] = {}  # what names a scan -> what is shown for it; of this process


def hide_names(scans: Iterable[tuple[str, Sequence[str]]]) -> None:
    """Remember what scans are called, if names are to be hidden.

    Args:
        scans: of each its URI and whatever else names it: its files, label map, subject.
    """
    if os.environ.get(HIDE_NAMES, "") in ("", "0"):
        return
    for uri, others in scans:
        shown = name_of(uri)
        for text in (uri, *others):
            last = text.rstrip("/").rpartition("/")[2]
            stem = re.sub(r"\.(nii(\.gz)?|dcm)$", "", last, flags=re.I)
            plain = re.sub(r"[^A-Za-z0-9._-]+", "_", stem)  # as in a scan's id
            for name in (text, last, stem, plain):
                if len(name) >= SHORTEST_NAME:
                    _names.setdefault(name, shown)


def name_of(uri: str) -> str:
    """What is shown instead of the scan at ``uri``: the same for the same place, by a digest."""
    return f"scan-{hashlib.sha256(uri.encode()).hexdigest()[:8]}"


def without_names(text: str) -> str:
    """``text`` with what `hide_names` was told of replaced by digests; the text itself when it was told nothing."""
    # The longest first: a file's name begins with its stem.
    for name in sorted((n for n in _names if n in text), key=len, reverse=True):
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", _names[name], text)
    return text
