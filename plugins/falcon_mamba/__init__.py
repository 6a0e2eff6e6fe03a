"""Falcon-Mamba (arXiv 2410.05355)."""

from .architecture import lillama_architectures

__all__ = ["lillama_architectures"]
