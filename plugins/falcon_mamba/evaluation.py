"""What says how good a language model is: perplexity, zero-shot accuracy, speed of decoding and size."""

from lillama_core import Evaluation
from lillama_core.metrics import DecodeSpeed, Footprint, Perplexity, ZeroShotAccuracy

evaluation = Evaluation(Perplexity(), ZeroShotAccuracy(), DecodeSpeed(), Footprint())
