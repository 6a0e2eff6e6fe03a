"""Falcon-Mamba is a Mamba with norms inside its mixers."""

from typing import Any

from lillama_core.architecture import Architecture
from lillama_registry import hookimpl

from ..mamba.architecture import Mamba
from .evaluation import evaluation


class FalconMamba(Mamba):
    """Blocks and maps are Mamba's."""

    name = "falcon_mamba"
    evaluation = evaluation

    def adapt(self, model: Any) -> None:
        super().adapt(model)
        # In a model marked as quantized the mixer calls dt_proj and takes its bias off again, which in half precision
        # costs digits. dt_proj is dense here.
        vars(model.config).pop("_is_quantized", None)


@hookimpl
def lillama_architectures() -> list[Architecture]:
    return [FalconMamba(model_types=("falcon_mamba",), stacks={"decoder": "backbone.layers"})]
