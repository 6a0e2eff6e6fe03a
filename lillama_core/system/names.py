"""Names of files."""

from __future__ import annotations

import re


def safe_file_stem(name: str) -> str:
    """Return ``name`` as a part of a file name: runs of all but ASCII letters, digits, - and _ become one -."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name)
