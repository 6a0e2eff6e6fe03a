"""Where lillama keeps what it can make or download again."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path


def default_cache_dir() -> Path:
    """Return the folder that ``LILLAMA_CACHE`` names, else ``lillama`` in the user's cache folder of this system."""
    chosen = os.environ.get("LILLAMA_CACHE")
    return Path(chosen).expanduser() if chosen else user_cache_path("lillama", appauthor=False)
