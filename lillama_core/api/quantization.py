"""`quantize` of the API: a model in 8 or 4 bits."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lillama_core.api.arguments import (
    Scratch,
    TrainingData,
    check_architecture,
    model_spec,
    path_of,
    python_terms,
    recipe_of,
    strings,
    tokenizer_spec,
    whole_number,
)
from lillama_core.api.results import CompressionResult
from lillama_core.architecture.base import Architecture
from lillama_core.data.objects import given_data
from lillama_core.errors import UserError, nearest
from lillama_core.estimates.sizes import parse_size
from lillama_core.output.quantized import QuantizedRecord
from lillama_core.output.run_directory import RunDirectory
from lillama_core.pipeline.quantize import QuantizeRequest, calibration_recipe
from lillama_core.pipeline.quantize import quantize as work
from lillama_core.quantization.options import DATA_FIELDS


def quantize(
    model: str | os.PathLike[str] | nn.Module | CompressionResult,
    output: str | os.PathLike[str],
    *,
    bits: int | None = None,
    embedding_bits: int | None = None,
    target_size: str | int | None = None,
    exclude: str | Sequence[str] = (),
    calibration: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    data: TrainingData | None = None,
    tokenizer: Any = None,
    architecture: str | Architecture | None = None,
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    verbose: bool = False,
    **options: Any,
) -> QuantizedRecord:
    """Hold the weights of ``model`` in 8 or 4 bits, and write that to the directory ``output``; ``model`` stays.

    ``model`` is a directory that `compress` has made or what it gave, or a dense model as `compress` takes it. ``bits``
    are 8 by default, and so are ``embedding_bits``, those of token embeddings and output heads; ``target_size``, such
    as "100MB", chooses both for every matrix, so that the files fit into it. ``exclude`` are paths of modules that stay
    as they are. With ``calibration``, sources of data, or ``data``, objects, both as for `compress`, weights in 4 bits
    are rounded for what they read there; ``options`` are those of the data (``tokens``, ``samples``, ``self_share`` …),
    named as on the command line. The result loads as any other once lillama_core is imported. Raises UserError for
    what can be known before the work, leaving nothing behind.
    """
    with python_terms(), contextlib.ExitStack() as stack:
        path = Path(path_of(output, "output"))
        check_architecture(architecture)
        RunDirectory(path, resumes=False).check(bool(overwrite), False)
        for name in options:
            if name not in DATA_FIELDS:
                raise UserError(f"quantize() has no option {name!r}{nearest(name, DATA_FIELDS)}")
        if target_size is not None and (bits is not None or embedding_bits is not None):
            raise UserError("target_size= chooses the bits: leave out bits= and embedding_bits=")
        calibrated = calibration is not None or data is not None
        if not calibrated and (options or str(device) != "auto"):
            name = next(iter(options), "device")
            raise UserError(f"{name}= does nothing without calibration= or data=, which weights are rounded for")
        scratch = Scratch(stack, path.absolute().parent)
        request = QuantizeRequest(
            model=model_spec(model, tokenizer, architecture, trust_remote_code, scratch, True),
            output=path,
            bits=8 if bits is None else whole_number(bits, "bits"),
            table_bits=8 if embedding_bits is None else whole_number(embedding_bits, "embedding_bits"),
            target_size=None if target_size is None else parse_size(target_size, "target_size"),
            exclude=strings(exclude, "exclude"),
            architecture=architecture,
            tokenizer=None if isinstance(model, nn.Module) else tokenizer_spec(tokenizer, scratch),
            trust_remote_code=bool(trust_remote_code),
            overwrite=bool(overwrite),
            calibration=recipe_of(calibration_recipe(options), calibration, {}, quantize) if calibrated else None,
            data=None if data is None else given_data(data),
            device=str(device),
        )
        return work(request, "quiet" if quiet else "verbose" if verbose else "normal")
