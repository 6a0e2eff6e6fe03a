"""Rank allocation: which map gets how many parameters."""

from __future__ import annotations

from lillama_core.allocation.base import AllocationRequest, Allocator, ChannelCurve, Spectrum, spend_remainder
from lillama_core.allocation.depth import BottomFirst, TopFirst
from lillama_core.allocation.spectrum import SpectrumAllocator
from lillama_core.allocation.uniform import Uniform

__all__ = [
    "AllocationRequest",
    "Allocator",
    "BottomFirst",
    "ChannelCurve",
    "Spectrum",
    "SpectrumAllocator",
    "TopFirst",
    "Uniform",
    "spend_remainder",
]
