"""Mixture-of-experts language models whose experts are fused into three-dimensional parameters."""

from .architecture import lillama_architectures
from .evaluation import lillama_metrics

__all__ = ["lillama_architectures", "lillama_metrics"]
