"""The benchmark suite: models, methods and the commands that run them."""

from lillama_benchmarks.command import lillama_commands
from lillama_registry import hookimpl

__all__ = ["lillama_allocators", "lillama_commands", "lillama_initializers"]


@hookimpl
def lillama_initializers() -> dict[str, str]:
    return {"output-pca": "lillama_benchmarks.baselines.liteasr:OutputComponents"}


@hookimpl
def lillama_allocators() -> dict[str, str]:
    return {"variance-threshold": "lillama_benchmarks.baselines.liteasr:VarianceThreshold"}
