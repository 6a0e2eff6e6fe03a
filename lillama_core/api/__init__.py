"""What a notebook or a script calls: `compress`, `evaluate` and `load`, with results that show themselves."""

from lillama_core.api.functions import compress, evaluate, load
from lillama_core.api.results import CompressionResult, EvaluationResult

__all__ = ["CompressionResult", "EvaluationResult", "compress", "evaluate", "load"]
