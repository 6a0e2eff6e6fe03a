"""The benchmark suite: models, methods and the commands that run them."""

from typing import Any

from lillama_benchmarks.command import lillama_commands
from lillama_core import hookimpl


@hookimpl
def lillama_initializers() -> dict[str, Any]:
    from lillama_benchmarks.baselines.liteasr import OutputComponents

    return {OutputComponents.name: OutputComponents()}


@hookimpl
def lillama_allocators() -> dict[str, Any]:
    from lillama_benchmarks.baselines.liteasr import VarianceThreshold

    return {VarianceThreshold.name: VarianceThreshold()}


__all__ = ["lillama_allocators", "lillama_commands", "lillama_initializers"]
