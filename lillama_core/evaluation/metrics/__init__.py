"""Ready-made metrics that an architecture plugin puts into its evaluation."""

from __future__ import annotations

from lillama_core.evaluation.metrics.answers import Answers
from lillama_core.evaluation.metrics.decoding import DecodeSpeed, Footprint
from lillama_core.evaluation.metrics.perplexity import Perplexity
from lillama_core.evaluation.metrics.speech import RealTimeFactor, WordErrorRate
from lillama_core.evaluation.metrics.zero_shot import ZeroShotAccuracy

__all__ = [
    "Answers",
    "DecodeSpeed",
    "Footprint",
    "Perplexity",
    "RealTimeFactor",
    "WordErrorRate",
    "ZeroShotAccuracy",
]
