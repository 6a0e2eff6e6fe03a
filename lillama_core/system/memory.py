"""Giving memory back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from functools import cache


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    # musl and others have no such function; nothing is lost without it.
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def release_memory() -> None:
    """Return freed memory to the system; called between blocks, where much of it has just become free.

    glibc keeps freed tensors of up to 32 MB for itself, scattered so that little of it fits what comes next: without
    this the resident memory of a run grows to several times what is in use.
    """
    # What a block leaves in cycles is young. A full collection walks every object of the libraries: 0.2 s each time.
    gc.collect(1)
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
