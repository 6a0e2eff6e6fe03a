"""lillama: pretrained models made smaller by low-rank maps and local distillation.

Importing this package loads neither torch nor transformers: its names are imported when they are first used. Once it
is imported, transformers loads compressed models with ``from_pretrained``, whichever of the two comes first.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lillama_core import transformers_hook

if TYPE_CHECKING:
    from lillama_core.allocation.plan import RankPlan
    from lillama_core.api import (
        CompressionResult,
        EvaluationResult,
        analyze,
        bench,
        compress,
        evaluate,
        export,
        finetune,
        load,
        lora_targets,
        push,
        quantize,
        reproduce,
    )
    from lillama_core.architecture.base import Architecture
    from lillama_core.data.modality import Inputs, Modality, SampleRequest, Samples
    from lillama_core.errors import LillamaError, UserError
    from lillama_core.evaluation.base import (
        Evaluation,
        EvaluationOptions,
        Measurement,
        Metric,
        Subject,
        language_model_evaluation,
    )
    from lillama_core.recipe.loading import load_recipe
    from lillama_core.recipe.model import Recipe
    from lillama_registry import hookimpl

_HOMES = {
    "Architecture": "lillama_core.architecture.base",
    "CompressionResult": "lillama_core.api",
    "Evaluation": "lillama_core.evaluation.base",
    "EvaluationOptions": "lillama_core.evaluation.base",
    "EvaluationResult": "lillama_core.api",
    "Inputs": "lillama_core.data.modality",
    "LillamaError": "lillama_core.errors",
    "Measurement": "lillama_core.evaluation.base",
    "Metric": "lillama_core.evaluation.base",
    "Modality": "lillama_core.data.modality",
    "RankPlan": "lillama_core.allocation.plan",
    "Recipe": "lillama_core.recipe.model",
    "SampleRequest": "lillama_core.data.modality",
    "Samples": "lillama_core.data.modality",
    "Subject": "lillama_core.evaluation.base",
    "UserError": "lillama_core.errors",
    "analyze": "lillama_core.api",
    "bench": "lillama_core.api",
    "compress": "lillama_core.api",
    "evaluate": "lillama_core.api",
    "export": "lillama_core.api",
    "finetune": "lillama_core.api",
    "hookimpl": "lillama_registry",
    "language_model_evaluation": "lillama_core.evaluation.base",
    "load": "lillama_core.api",
    "load_recipe": "lillama_core.recipe.loading",
    "lora_targets": "lillama_core.api",
    "push": "lillama_core.api",
    "quantize": "lillama_core.api",
    "reproduce": "lillama_core.api",
}
"""Public name -> the module that it is imported from when it is first used."""

__all__ = [
    "Architecture",
    "CompressionResult",
    "Evaluation",
    "EvaluationOptions",
    "EvaluationResult",
    "Inputs",
    "LillamaError",
    "Measurement",
    "Metric",
    "Modality",
    "RankPlan",
    "Recipe",
    "SampleRequest",
    "Samples",
    "Subject",
    "UserError",
    "analyze",
    "bench",
    "compress",
    "evaluate",
    "export",
    "finetune",
    "hookimpl",
    "language_model_evaluation",
    "load",
    "load_recipe",
    "lora_targets",
    "push",
    "quantize",
    "reproduce",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    # The next use finds it without coming here.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


transformers_hook.install()
