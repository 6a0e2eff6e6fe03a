"""TODO."""

from __future__ import annotations

import re


def safe_file_stem(name: str) -> str:
    """A block's name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name)
