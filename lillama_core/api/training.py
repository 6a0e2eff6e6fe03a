"""`finetune` of the API: a compressed model trained as a whole."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lillama_core.api.arguments import (
    Scratch,
    TrainingData,
    check_architecture,
    model_spec,
    path_of,
    python_terms,
    recipe_of,
    tokenizer_spec,
)
from lillama_core.api.functions import load
from lillama_core.api.results import CompressionResult
from lillama_core.architecture.base import Architecture
from lillama_core.data.objects import given_data
from lillama_core.errors import UserError, nearest
from lillama_core.healing.options import DATA_FIELDS, EPOCHS, HealingOptions
from lillama_core.output.run_directory import RunDirectory
from lillama_core.pipeline.finetune import FinetuneRequest, data_recipe
from lillama_core.pipeline.finetune import finetune as train
from lillama_core.strategies.options import StrategyChoice, validated_options


def finetune(
    model: str | os.PathLike[str] | CompressionResult,
    output: str | os.PathLike[str],
    *,
    teacher: str | os.PathLike[str] | torch.nn.Module | None = None,
    calibration: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    data: TrainingData | None = None,
    epochs: float = EPOCHS,
    tokenizer: Any = None,
    architecture: str | Architecture | None = None,
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
    track: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    quiet: bool = False,
    verbose: bool = False,
    **options: Any,
) -> CompressionResult:
    """Train a compressed model as a whole, and write it to the directory ``output``; ``model`` stays as it is.

    ``model`` is a directory that `compress` has made, or what it gave. ``teacher`` is the dense model, needed unless
    ``objective="lm"``. ``calibration`` names sources of data, ``data`` takes objects, as for `compress`. ``options``
    are those of `HealingOptions` and of the data (``tokens``, ``self_share``, ``sequence_length``, ``batch_size`` …),
    named as on the command line; ``track`` names a tracker that accelerate knows, which gets losses as they come.
    Raises UserError for what can be known before the training, leaving nothing behind,
    and LillamaError for what fails later, leaving ``OUTPUT.partial``, from which ``resume=True`` goes on.
    """
    with python_terms(), contextlib.ExitStack() as stack:
        path = Path(path_of(output, "output"))
        own = {name: value for name, value in options.items() if name in HealingOptions.model_fields}
        of_data = {name: value for name, value in options.items() if name in DATA_FIELDS}
        for name in options:
            if name not in own and name not in of_data:
                known = [*HealingOptions.model_fields, *DATA_FIELDS]
                raise UserError(f"finetune() has no option {name!r}{nearest(name, known)}")
        if isinstance(epochs, bool) or not isinstance(epochs, int | float) or not 0 < epochs <= 1000:
            raise UserError(f"epochs must be a number above 0 and at most 1000, not {epochs!r}")
        choice = StrategyChoice(name="finetune", options=own)
        healing = validated_options(HealingOptions, choice, {name: f"{name}=" for name in own}, {})
        assert isinstance(healing, HealingOptions)
        recipe = recipe_of(data_recipe(healing.objective, of_data), calibration, {}, finetune)
        check_architecture(architecture)
        RunDirectory(path).check(bool(overwrite), bool(resume))
        scratch = Scratch(stack, path.absolute().parent)
        request = FinetuneRequest(
            model=model_spec(model, tokenizer, architecture, trust_remote_code, scratch, True),
            output=path,
            teacher=None
            if teacher is None
            else model_spec(teacher, tokenizer, architecture, trust_remote_code, scratch),
            recipe=recipe,
            options=healing,
            epochs=float(epochs),
            data=None if data is None else given_data(data),
            architecture=architecture,
            tokenizer=tokenizer_spec(tokenizer, scratch),
            device=str(device),
            trust_remote_code=bool(trust_remote_code),
            track=None if track is None else str(track),
            overwrite=bool(overwrite),
            resume=bool(resume),
        )
        record = train(request, "quiet" if quiet else "verbose" if verbose else "normal")
    return CompressionResult(
        path, record, lambda: load(path, architecture=architecture, trust_remote_code=trust_remote_code)
    )
