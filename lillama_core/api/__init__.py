"""What a notebook or a script calls: `compress`, `finetune`, `evaluate` and `load`; results show themselves."""

from lillama_core.api.functions import compress, evaluate, load
from lillama_core.api.results import CompressionResult, EvaluationResult
from lillama_core.api.training import finetune

__all__ = ["CompressionResult", "EvaluationResult", "compress", "evaluate", "finetune", "load"]
