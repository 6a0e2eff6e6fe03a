"""Initialisation: from a matrix and what is known of it to two factors."""

from __future__ import annotations

from lillama_core.initialization.base import Decomposition, Initializer, MapStatistics, StudentStatistics, balance
from lillama_core.initialization.second_moments import Fisher, Whitened, root
from lillama_core.initialization.weights_only import PlainSVD, RandomInit

__all__ = [
    "Decomposition",
    "Fisher",
    "Initializer",
    "MapStatistics",
    "PlainSVD",
    "RandomInit",
    "StudentStatistics",
    "Whitened",
    "balance",
    "root",
]
