"""Where lillama keeps what it can make or download again."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """``LILLAMA_CACHE``, else ``lillama`` in the user's cache folder."""
    chosen = os.environ.get("LILLAMA_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lillama"
