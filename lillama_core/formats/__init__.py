"""Formats of a low-rank map: how a product of two factors is stored and applied."""

from __future__ import annotations

from lillama_core.formats.base import Format, LowRankLinear
from lillama_core.formats.factored import Factored, FactoredLinear
from lillama_core.formats.pivoted import InputPivotedLinear, OutputPivotedLinear, Pivoted

__all__ = [
    "Factored",
    "FactoredLinear",
    "Format",
    "InputPivotedLinear",
    "LowRankLinear",
    "OutputPivotedLinear",
    "Pivoted",
]
