"""`analyze` of the API: what a model would lose, before anything of it is compressed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lillama_core.api.arguments import (
    Scratch,
    TrainingData,
    check_architecture,
    model_spec,
    python_terms,
    recipe_of,
    tokenizer_spec,
)
from lillama_core.architecture.base import Architecture
from lillama_core.data.objects import given_data
from lillama_core.estimates.sizes import parse_size
from lillama_core.pipeline.analyze import Analysis
from lillama_core.pipeline.analyze import analyze as look
from lillama_core.pipeline.request import Request


def analyze(
    model: str | os.PathLike[str] | nn.Module,
    *,
    recipe: str | os.PathLike[str] | Mapping[str, Any] = "default",
    tokenizer: Any = None,
    calibration: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    data: TrainingData | None = None,
    architecture: str | Architecture | None = None,
    device: str | torch.device = "auto",
    stream: bool | None = None,
    max_memory: int | str | None = None,
    trust_remote_code: bool = False,
    quiet: bool = False,
    **options: Any,
) -> Analysis:
    """Tell what a model would lose by size, map and depth, without compressing it.

    The arguments are those of `compress`. What comes back shows itself as a table, and ``to_dict()`` is ready for JSON.
    Raises UserError for what `compress` would refuse, and for a recipe that predicts no losses.
    """
    with python_terms(), contextlib.ExitStack() as stack:
        chosen = recipe_of(recipe, calibration, options, analyze)
        check_architecture(architecture)
        scratch = Scratch(stack, None)
        request = Request(
            model=model_spec(model, tokenizer, architecture, trust_remote_code, scratch),
            output=Path("analysis"),
            recipe=chosen,
            architecture=architecture,
            tokenizer=None if isinstance(model, nn.Module) else tokenizer_spec(tokenizer, scratch),
            device=str(device),
            stream=None if stream is None else bool(stream),
            max_memory=None if max_memory is None else parse_size(max_memory),
            trust_remote_code=bool(trust_remote_code),
            data=None if data is None else given_data(data),
        )
        return look(request, "quiet" if quiet else "normal")
