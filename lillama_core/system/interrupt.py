"""Ctrl-C that cannot get lost.

Python raises KeyboardInterrupt wherever the program happens to be; in a destructor or a callback from native code it is
printed and forgotten. The command line therefore also takes a note, which long work looks at between its steps.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_noted = threading.Event()


def raise_if_interrupted() -> None:
    """Raise KeyboardInterrupt if one was asked for and got lost."""
    if _noted.is_set():
        raise KeyboardInterrupt


@contextlib.contextmanager
def noting_interrupts() -> Iterator[None]:
    """While open, Ctrl-C raises KeyboardInterrupt as ever, and is noted; only in the main thread."""

    def handler(number: int, frame: FrameType | None) -> None:
        _noted.set()
        raise KeyboardInterrupt

    _noted.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        _noted.clear()
