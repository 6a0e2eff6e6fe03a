"""What may be said of the data that weights are rounded for."""

from __future__ import annotations

TOKENS = 16384
"""By default."""
DATA_FIELDS = (
    "self_share",
    "tokens",
    "sequence_length",
    "samples",
    "use_all_tokens",
    "batch_size",
    "compute",
    "seed",
)
"""Fields of a recipe that say which data it is, and in what arithmetic it is run, besides its sources."""
