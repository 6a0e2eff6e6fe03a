"""Rank allocation: which map gets how many parameters."""

from __future__ import annotations

from lillama_core.allocation.base import AllocationRequest, Allocator, Spectrum, spend_remainder
from lillama_core.allocation.depth import BottomFirst, TopFirst
from lillama_core.allocation.spectrum import SpectrumAllocator
from lillama_core.allocation.uniform import Uniform

BUILT_IN: dict[str, Allocator] = {a.name: a for a in (Uniform(), BottomFirst(), TopFirst(), SpectrumAllocator())}

__all__ = [
    "BUILT_IN",
    "AllocationRequest",
    "Allocator",
    "BottomFirst",
    "Spectrum",
    "SpectrumAllocator",
    "TopFirst",
    "Uniform",
    "spend_remainder",
]
