"""Giving memory back to the system."""

from __future__ import annotations

import ctypes
import gc
import os
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


def limit_kernel_caches() -> None:
    """Bound the caches of compiled CPU kernels; without effect once torch has used one in this process.

    Kernels of oneDNN are compiled and kept for every shape of matrix, and a compression meets a thousand ranks: 1200
    products in bfloat16 left 680 MB behind, 145 MB with this limit. Not for whoever only runs a model, whose hundreds
    of shapes would be compiled anew for every token. A variable that the user has set stays.
    """
    # Read when the first kernel is made, not when torch is imported.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "128")
