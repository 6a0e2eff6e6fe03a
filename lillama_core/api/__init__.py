"""What a notebook or a script calls: `compress`, `finetune`, `quantize`, `evaluate`, `bench`, `export`, `load` …"""

from lillama_core.api.analysis import analyze
from lillama_core.api.exports import export
from lillama_core.api.functions import compress, evaluate, load
from lillama_core.api.lora import lora_targets
from lillama_core.api.publishing import push, reproduce
from lillama_core.api.quantization import quantize
from lillama_core.api.results import CompressionResult, EvaluationResult
from lillama_core.api.speed import bench
from lillama_core.api.training import finetune

__all__ = [
    "CompressionResult",
    "EvaluationResult",
    "analyze",
    "bench",
    "compress",
    "evaluate",
    "export",
    "finetune",
    "load",
    "lora_targets",
    "push",
    "quantize",
    "reproduce",
]
