"""`quantize` of the API: a model in 8 or 4 bits."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lillama_core.api.arguments import (
    Scratch,
    check_architecture,
    model_spec,
    path_of,
    python_terms,
    strings,
    tokenizer_spec,
    whole_number,
)
from lillama_core.api.results import CompressionResult
from lillama_core.architecture.base import Architecture
from lillama_core.output.quantized import QuantizedRecord
from lillama_core.output.run_directory import RunDirectory
from lillama_core.pipeline.quantize import QuantizeRequest
from lillama_core.pipeline.quantize import quantize as work


def quantize(
    model: str | os.PathLike[str] | nn.Module | CompressionResult,
    output: str | os.PathLike[str],
    *,
    bits: int = 8,
    embedding_bits: int = 8,
    exclude: str | Sequence[str] = (),
    tokenizer: Any = None,
    architecture: str | Architecture | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    verbose: bool = False,
) -> QuantizedRecord:
    """Hold the weights of ``model`` in 8 or 4 bits, and write that to the directory ``output``; ``model`` stays.

    ``model`` is a directory that `compress` has made or what it gave, or a dense model as `compress` takes it.
    ``embedding_bits`` are those of token embeddings and output heads; ``exclude`` are paths of modules that stay as
    they are. The result loads as any other once lillama_core is imported. Raises UserError for what can be known before
    the work, leaving nothing behind.
    """
    with python_terms(), contextlib.ExitStack() as stack:
        path = Path(path_of(output, "output"))
        check_architecture(architecture)
        RunDirectory(path).check(bool(overwrite), False)
        scratch = Scratch(stack, path.absolute().parent)
        request = QuantizeRequest(
            model=model_spec(model, tokenizer, architecture, trust_remote_code, scratch, True),
            output=path,
            bits=whole_number(bits, "bits"),
            table_bits=whole_number(embedding_bits, "embedding_bits"),
            exclude=strings(exclude, "exclude"),
            architecture=architecture,
            tokenizer=None if isinstance(model, nn.Module) else tokenizer_spec(tokenizer, scratch),
            trust_remote_code=bool(trust_remote_code),
            overwrite=bool(overwrite),
        )
        return work(request, "quiet" if quiet else "verbose" if verbose else "normal")
