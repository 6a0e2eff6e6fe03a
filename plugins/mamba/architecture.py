"""Where Mamba keeps its blocks, and which of its mixers' maps are called as modules."""

from typing import Any

from lillama_core.architecture import Architecture
from lillama_registry import hookimpl

from .evaluation import evaluation


class Mamba(Architecture):
    """A stack of Mamba blocks under a language-model head; ``dt_proj`` stays dense, its weight is read directly."""

    name = "mamba"
    maps = ("mixer.in_proj", "mixer.out_proj")
    exclude = ("mixer.dt_proj",)
    optional = ("mixer.x_proj",)
    evaluation = evaluation

    def adapt(self, model: Any) -> None:
        from .mixer import call_maps_as_modules

        call_maps_as_modules(model)


@hookimpl
def lillama_architectures() -> list[Architecture]:
    return [Mamba(model_types=("mamba",), stacks={"decoder": "backbone.layers"})]
