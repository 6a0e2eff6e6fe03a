"""Mixture-of-experts language models whose experts are fused into three-dimensional parameters."""

from .architecture import lillama_architectures

__all__ = ["lillama_architectures"]
