"""Mamba (Gu & Dao, arXiv 2312.00752), in transformers' format and in mamba-ssm's own."""

from .architecture import lillama_architectures
from .native import lillama_checkpoints

__all__ = ["lillama_architectures", "lillama_checkpoints"]
