"""lillama: pretrained models made smaller by low-rank maps and local distillation.

Importing this package makes transformers load compressed models with ``from_pretrained``.
"""

from __future__ import annotations

import os

# A CPU's kernels are compiled and kept for every shape of matrix, and a compression meets a thousand ranks: without a
# limit these caches grow to more memory than the model. They are read when torch is first used, hence here.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
os.environ.setdefault("LRU_CACHE_CAPACITY", "128")

from lillama_core.allocation.plan import RankPlan
from lillama_core.architecture.base import Architecture
from lillama_core.data.modality import Inputs, Modality, SampleRequest, Samples
from lillama_core.errors import LillamaError, UserError
from lillama_core.evaluation.base import Evaluation, EvaluationOptions, Measurement, Metric, Subject
from lillama_core.output.quantizer import register
from lillama_core.pipeline import Request, compress
from lillama_core.pipeline.spec import make_plan, prepare
from lillama_core.recipe.loading import load_recipe
from lillama_core.recipe.model import Recipe
from lillama_registry import hookimpl

register()

__all__ = [
    "Architecture",
    "Evaluation",
    "EvaluationOptions",
    "Inputs",
    "LillamaError",
    "Measurement",
    "Metric",
    "Modality",
    "RankPlan",
    "Recipe",
    "Request",
    "SampleRequest",
    "Samples",
    "Subject",
    "UserError",
    "compress",
    "hookimpl",
    "load_recipe",
    "make_plan",
    "prepare",
]
