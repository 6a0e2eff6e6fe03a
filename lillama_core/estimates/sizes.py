"""Sizes of memory as people write them."""

from __future__ import annotations

import math
import re

from lillama_core.errors import UserError

UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
UNITS |= {"TIB": 2**40}
_SIZE = re.compile(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([A-Za-z]{0,3})\s*")


def parse_size(text: str | int, what: str = "--max-memory") -> int:
    """Bytes of ``3GB``, ``3GiB`` or ``500MB``, or of a number of bytes; raises UserError for anything else."""
    if isinstance(text, int) and not isinstance(text, bool):
        found = float(text)
    else:
        matched = _SIZE.fullmatch(text) if isinstance(text, str) else None
        if matched is None or matched[2].upper() not in UNITS:
            raise UserError(f"{what} must be a size such as 3GB, 3GiB or 500MB, not {str(text)[:40]!r}")
        found = float(matched[1]) * UNITS[matched[2].upper()]
    if not 1 <= found <= 2**60 or not math.isfinite(found):
        raise UserError(f"{what} must be between one byte and 1024 PiB, not {str(text)[:40]!r}")
    return int(found)


def show_size(size: float) -> str:
    """A size with a unit, to two or three digits."""
    for unit, value in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= value:
            number = size / value
            return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"
    return f"{size / 1e3:.0f} kB"


def show_seconds(seconds: float) -> str:
    """A duration in the unit that suits it."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 150 else f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
