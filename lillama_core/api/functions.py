"""What a notebook or a script calls: `compress`, `evaluate` and `load`, with results that show themselves.

Every mistake in an argument is a `UserError` that says what is accepted, before any work is done.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lillama_core import pipeline
from lillama_core.api.arguments import (
    Scratch,
    TrainingData,
    check_architecture,
    evaluation_data,
    model_spec,
    path_of,
    python_terms,
    recipe_of,
    refuse_unknown,
    strings,
    tokenizer_spec,
    whole_number,
)
from lillama_core.api.results import CompressionResult, EvaluationResult
from lillama_core.architecture.base import Architecture
from lillama_core.architecture.find import find_architecture
from lillama_core.data.objects import given_data
from lillama_core.errors import UserError, nearest
from lillama_core.estimates.sizes import parse_size
from lillama_core.evaluation.base import EvaluationOptions
from lillama_core.models.loading import DTYPES, load_config, load_model
from lillama_core.models.source import locate
from lillama_core.output.run_directory import RunDirectory
from lillama_core.pipeline.evaluate import EvaluationRequest, compare
from lillama_core.pipeline.to_size import compress_to_size, low_rank_of
from lillama_core.recipe.model import Recipe
from lillama_core.system.devices import choose_device


def compress(
    model: str | os.PathLike[str] | nn.Module,
    output: str | os.PathLike[str],
    *,
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe = "default",
    tokenizer: Any = None,
    calibration: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    data: TrainingData | None = None,
    architecture: str | Architecture | None = None,
    device: str | torch.device = "auto",
    stream: bool | None = None,
    max_memory: int | str | None = None,
    target_size: int | str | None = None,
    trust_remote_code: bool = False,
    evaluate: bool = False,
    track: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    quiet: bool = False,
    verbose: bool = False,
    **options: Any,
) -> CompressionResult:
    """Make a model smaller and write it to the directory ``output``.

    ``model`` is a Hub id, a directory, a .gguf file, or a loaded transformers model, which stays as it is: what is
    compressed is a copy on disk beside ``output``, removed at the end. ``recipe`` is a name, a YAML file, a mapping of
    options (its key ``recipe`` names the base) or a `Recipe`; ``options`` go over it, named as on the command line:
    ``reduction=0.2, tokens=65536``. ``tokenizer`` is an id, a directory or an object, needed where the model brings
    none.

    ``calibration`` names sources of data as the command line does. ``data`` takes objects: a list of texts, a
    `datasets.Dataset` with a column of texts or messages, or an iterable of batches of the model's inputs. Texts are
    read in their order until there are enough, and may be mixed with named sources; batches are used as they stand.

    ``target_size``, such as "100MB", bounds the files of weights in place of ``reduction``: they are held in 8 and 4
    bits, and ranks are lowered where that does not suffice.

    ``stream`` says whether the model's blocks are read from disk one at a time (True) or all held in memory (False);
    None: as it fits. ``max_memory`` bounds the host's memory, in bytes or as ``"3GB"``. ``evaluate`` measures both
    models at the end, for the record and the card. ``track`` names a tracker that accelerate knows, such as
    "tensorboard", which gets losses as they come.

    Raises UserError for what can be known before the first block, leaving nothing behind, and LillamaError for what
    fails later, leaving ``OUTPUT.partial``, from which ``resume=True`` goes on.
    """
    with python_terms():
        path = Path(path_of(output, "output"))
        chosen = recipe_of(recipe, calibration, options, compress)
        given = None if data is None else given_data(data)
        check_architecture(architecture)
        RunDirectory(path).check(bool(overwrite), bool(resume), None if target_size is None else low_rank_of(path))
        with contextlib.ExitStack() as stack:
            # Beside the output, where there must be room for a model.
            scratch = Scratch(stack, path.absolute().parent)
            request = pipeline.Request(
                model=model_spec(model, tokenizer, architecture, trust_remote_code, scratch),
                output=path,
                recipe=chosen,
                architecture=architecture,
                tokenizer=None if isinstance(model, nn.Module) else tokenizer_spec(tokenizer, scratch),
                device=str(device),
                stream=None if stream is None else bool(stream),
                max_memory=None if max_memory is None else parse_size(max_memory),
                trust_remote_code=bool(trust_remote_code),
                evaluate=bool(evaluate),
                track=None if track is None else str(track),
                overwrite=bool(overwrite),
                resume=bool(resume),
                data=given,
            )
            said: Any = "quiet" if quiet else "verbose" if verbose else "normal"
            if target_size is None:
                record = pipeline.compress(request, said)
            else:
                record = compress_to_size(request, parse_size(target_size, "target_size"), said)
    return CompressionResult(
        path, record, lambda: load(path, architecture=architecture, trust_remote_code=trust_remote_code)
    )


def evaluate(
    model: str | os.PathLike[str] | nn.Module | CompressionResult,
    *,
    baseline: str | os.PathLike[str] | nn.Module | None = None,
    baseline_details: str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    metrics: str | Sequence[str] = (),
    data: str | os.PathLike[str] | TrainingData | None = None,
    tasks: str | Sequence[str] = (),
    sequence_length: int = 512,
    windows: int = 40,
    limit: int | None = None,
    shots: int = 0,
    answers: int = 0,
    seed: int = 0,
    details: str | os.PathLike[str] | None = None,
    architecture: str | Architecture | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    stream: bool | None = None,
    trust_remote_code: bool = False,
    quiet: bool = False,
    **unknown: Any,
) -> EvaluationResult:
    """Measure a model with the metrics of its architecture's plugin, beside ``baseline`` where one is given.

    Both are ids, directories, .gguf files or loaded transformers models, which stay as they are; ``model`` may be what
    `compress` gave. ``data`` is the text for perplexity: a source as the command line names it, a list of texts, or a
    `datasets.Dataset`; None: the text that comes with lillama. ``dtype`` is what to compute in, None: float32 on a CPU,
    elsewhere what each model is stored in. ``stream`` reads blocks from disk whenever they run; None: those of models
    that do not fit in memory. The other options are those of the command line.
    Raises UserError for what cannot be measured.
    """
    with python_terms(), contextlib.ExitStack() as stack:
        refuse_unknown(unknown, evaluate)
        scratch = Scratch(stack, None)
        options = EvaluationOptions(
            data=None if data is None else evaluation_data(data, scratch),
            tasks=strings(tasks, "tasks"),
            sequence_length=whole_number(sequence_length, "sequence_length"),
            windows=whole_number(windows, "windows"),
            limit=None if limit is None else whole_number(limit, "limit"),
            shots=whole_number(shots, "shots"),
            answers=whole_number(answers, "answers"),
            seed=whole_number(seed, "seed"),
            details=None if details is None else Path(path_of(details, "details")),
        )
        check_architecture(architecture)
        measured = [model] if baseline is None else [baseline, model]
        specs = [model_spec(m, tokenizer, architecture, trust_remote_code, scratch, True) for m in measured]
        request = EvaluationRequest(
            models=tuple(specs),
            options=options,
            metrics=strings(metrics, "metrics"),
            baseline_details=None if baseline_details is None else Path(path_of(baseline_details, "baseline_details")),
            architecture=architecture,
            tokenizer=tokenizer_spec(tokenizer, scratch),
            device=str(device),
            dtype=None if dtype is None else str(dtype).removeprefix("torch."),
            trust_remote_code=bool(trust_remote_code),
            stream=None if stream is None else bool(stream),
            quiet=bool(quiet),
        )
        found = compare(request)
        labels = [Path(spec).name if Path(spec).exists() else spec for spec in specs]
        if len(set(labels)) < len(labels):
            labels[0] += " (baseline)"
        return EvaluationResult([replace(e, model=label) for e, label in zip(found, labels, strict=True)])


def load(
    model: str | os.PathLike[str] | CompressionResult,
    *,
    architecture: str | Architecture | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    **unknown: Any,
) -> Any:
    """Load a model, compressed or dense, by the transformers class of its architecture, in eval mode.

    ``model`` is a directory, an id, a .gguf file or what `compress` gave; ``dtype`` is that of the weights: ``auto``
    (the one on disk), ``float32``, ``bfloat16`` or ``float16``. Raises UserError when there is no such model.
    """
    with python_terms():
        refuse_unknown(unknown, load)
        check_architecture(architecture)
        spec = str(model.path) if isinstance(model, CompressionResult) else path_of(model, "model", "a Hub id")
        chosen: Any = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
        if chosen != "auto" and chosen not in DTYPES.values():
            raise UserError(
                f"dtype must be auto, {', '.join(DTYPES)}, not {dtype!r}{nearest(str(dtype), list(DTYPES))}"
            )
        where = choose_device(str(device))
        source = locate(spec, bool(trust_remote_code))
        config = load_config(source, allow_compressed=True)
        found = load_model(source, find_architecture(config, architecture, bool(trust_remote_code)), chosen)
        # As from_pretrained gives it: it may be trained further.
        return found.requires_grad_(True).to(where)
