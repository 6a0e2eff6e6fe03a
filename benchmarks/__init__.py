"""The benchmark suite: models, methods and the commands that run them."""

from lillama_benchmarks.command import lillama_commands

__all__ = ["lillama_commands"]
