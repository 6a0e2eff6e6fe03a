"""Ready-made metrics that an architecture plugin puts into its Evaluation."""

from __future__ import annotations

from lillama_core.evaluation import Evaluation
from lillama_core.metrics.decoding import DecodeSpeed, Footprint
from lillama_core.metrics.perplexity import OFFLINE_TEXT, Perplexity
from lillama_core.metrics.speech import RealTimeFactor, WordErrorRate
from lillama_core.metrics.zero_shot import ZeroShotAccuracy

__all__ = [
    "OFFLINE_TEXT",
    "DecodeSpeed",
    "Footprint",
    "Perplexity",
    "RealTimeFactor",
    "WordErrorRate",
    "ZeroShotAccuracy",
    "language_model_evaluation",
]

language_model_evaluation = Evaluation(Perplexity(), ZeroShotAccuracy(), DecodeSpeed(), Footprint())
"""What says how good a language model is: perplexity, zero-shot accuracy, speed of decoding and size."""
