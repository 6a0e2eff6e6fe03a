"""Initialisation: from a matrix and what is known of it to two factors."""

from __future__ import annotations

from lillama_core.initialization.base import Decomposition, Initializer, MapStatistics, balance
from lillama_core.initialization.second_moments import ActivationAware, SensitivityAware, root
from lillama_core.initialization.weights_only import PlainSVD, RandomInit

BUILT_IN: dict[str, Initializer] = {
    i.name: i for i in (PlainSVD(), RandomInit(), ActivationAware(), SensitivityAware())
}

__all__ = [
    "BUILT_IN",
    "ActivationAware",
    "Decomposition",
    "Initializer",
    "MapStatistics",
    "PlainSVD",
    "RandomInit",
    "SensitivityAware",
    "balance",
    "root",
]
