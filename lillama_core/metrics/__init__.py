"""Ready-made metrics that an architecture plugin puts into its Evaluation."""

from __future__ import annotations

from lillama_core.metrics.decoding import DecodeSpeed, Footprint
from lillama_core.metrics.perplexity import Perplexity
from lillama_core.metrics.speech import RealTimeFactor, WordErrorRate
from lillama_core.metrics.zero_shot import ZeroShotAccuracy

__all__ = ["DecodeSpeed", "Footprint", "Perplexity", "RealTimeFactor", "WordErrorRate", "ZeroShotAccuracy"]
