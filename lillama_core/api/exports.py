"""`export` of the API: a compressed model written as something that runs without lillama."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lillama_core.api.arguments import check_architecture, path_of, python_terms, refuse_unknown
from lillama_core.api.results import CompressionResult
from lillama_core.architecture.base import Architecture
from lillama_core.errors import UserError, nearest
from lillama_core.exporting.run import Exported, ExportRequest
from lillama_core.exporting.run import export as write
from lillama_core.models.loading import DTYPES


def export(
    model: str | os.PathLike[str] | CompressionResult,
    output: str | os.PathLike[str],
    *,
    to: str,
    dtype: str | None = None,
    architecture: str | Architecture | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    verbose: bool = False,
    **unknown: Any,
) -> Exported:
    """Write a compressed model in the format ``to`` to the directory ``output``; it then runs without lillama.

    ``model`` is a directory that `compress` has made, or what it gave; ``to`` is ``standalone``, ``dense``, ``onnx``,
    ``gguf``, ``ctranslate2`` or a plugin's format; ``dtype`` is that of the weights, ``float32``, ``bfloat16`` or
    ``float16``. A fresh process without lillama compares the result with ``model`` before ``output`` appears. Raises
    UserError for what can be known beforehand and LillamaError for what fails later; neither leaves anything behind.
    """
    with python_terms():
        refuse_unknown(unknown, export)
        check_architecture(architecture)
        if dtype is not None and dtype not in DTYPES:
            raise UserError(f"dtype must be {', '.join(DTYPES)}, not {dtype!r}{nearest(str(dtype), list(DTYPES))}")
        request = ExportRequest(
            model=str(model.path) if isinstance(model, CompressionResult) else path_of(model, "model"),
            to=to,
            output=Path(path_of(output, "output")),
            dtype=dtype,
            architecture=architecture,
            trust_remote_code=bool(trust_remote_code),
            overwrite=bool(overwrite),
        )
        return write(request, "quiet" if quiet else "verbose" if verbose else "normal")
