"""Where linear maps live in a model: what an architecture declares, its blocks, and the kinds of target in them."""

from lillama_core.architecture.base import Architecture

__all__ = ["Architecture"]
