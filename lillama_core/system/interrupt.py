"""Ctrl-C that cannot get lost, and the other signals that ask a program to end, which do the same.

Python raises KeyboardInterrupt wherever the program happens to be; in a destructor or a callback from native code it is
printed and forgotten, and a library may turn it into an error of its own. The command line therefore also takes a note,
which long work looks at between its steps.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

# What ends a job on a cluster, and what a terminal sends that is closed; not every system has the latter.
_ALSO = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))

_noted = threading.Event()


def raise_if_interrupted() -> None:
    """Raise KeyboardInterrupt if one was asked for and got lost."""
    if _noted.is_set():
        raise KeyboardInterrupt


@contextlib.contextmanager
def noting_interrupts() -> Iterator[None]:
    """While open, Ctrl-C, SIGTERM and SIGHUP raise KeyboardInterrupt, and are noted; only in the main thread.

    What fails after one of them was noted failed because of it, and is a KeyboardInterrupt as well.
    """

    def handler(number: int, frame: FrameType | None) -> None:
        _noted.set()
        raise KeyboardInterrupt

    _noted.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # What is ignored stays so: nohup asks for it.
    asked = [signal.SIGINT, *(number for number in _ALSO if signal.getsignal(number) is not signal.SIG_IGN)]
    before = {number: signal.signal(number, handler) for number in asked}
    try:
        yield
    except Exception as error:
        if _noted.is_set():
            raise KeyboardInterrupt from error
        raise
    finally:
        for number, former in before.items():
            signal.signal(number, former)
        _noted.clear()
