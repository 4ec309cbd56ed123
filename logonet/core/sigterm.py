"""SIGTERM as a request to store and leave, where it would end the process."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


def listen(then: Callable[[], None]) -> Any:
    """Call ``then`` at the first SIGTERM; the second does what it did before, which is returned. Main thread only."""
    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL

    def heard(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, before)
        then()

    signal.signal(signal.SIGTERM, heard)
    return before


@contextlib.contextmanager
def listening(then: Callable[[], None]) -> Iterator[None]:
    """Call ``then`` at SIGTERM, in this block. Off the main thread, as in a sweep's trial, there is nothing to hear."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = listen(then)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
