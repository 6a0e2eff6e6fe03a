"""What may be said of the data that weights are rounded for."""

from __future__ import annotations

from lillama_core.recipe.model import DATA_FIELDS

__all__ = ["DATA_FIELDS", "TOKENS"]

TOKENS = 16384
"""By default."""
