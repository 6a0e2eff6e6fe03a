"""Decoder-only transformers: Llama and its many relatives, OPT, GPT-2, GPT-NeoX."""

from .architecture import lillama_architectures

__all__ = ["lillama_architectures"]
