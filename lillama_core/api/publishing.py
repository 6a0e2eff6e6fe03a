"""`push` and `reproduce` of the API: a finished directory on the Hub, and made once more from its record."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from lillama_core.api.arguments import path_of, python_terms
from lillama_core.api.results import CompressionResult
from lillama_core.errors import UserError
from lillama_core.output.push import check_push
from lillama_core.output.push import push as upload
from lillama_core.pipeline.reproduce import ReproduceRequest, Reproduction
from lillama_core.pipeline.reproduce import reproduce as repeat


def push(result: str | os.PathLike[str] | CompressionResult, repository: str, *, private: bool = False) -> str:
    """Upload a directory that lillama has made, with its card, to the Hugging Face Hub, and return its address.

    ``repository`` is OWNER/NAME, and is made if there is none; ``private`` says how. Raises UserError for what can be
    told before the upload, and LillamaError where it fails.
    """
    with python_terms():
        folder = _folder(result)
        if not (folder / "lillama.json").is_file():
            raise UserError(f"{str(folder)!r} is no directory that lillama has made: it holds no lillama.json")
        check_push(repository)
        return upload(folder, repository, bool(private))


def _folder(result: str | os.PathLike[str] | CompressionResult) -> Path:
    return result.path if isinstance(result, CompressionResult) else Path(path_of(result, "result"))


def reproduce(
    result: str | os.PathLike[str] | CompressionResult,
    *,
    output: str | os.PathLike[str] | None = None,
    model: str | os.PathLike[str] | None = None,
    calibration: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    tokenizer: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> Reproduction:
    """Repeat the compression that made the directory ``result``, from its record, and compare what comes out.

    ``differences`` of what comes back is empty where all bytes are the same; ``conditions`` names what numbers depend
    on and is not as it was. ``model``, ``calibration`` and ``tokenizer`` say where these are now, None: where the
    record has them. The new directory is kept as ``output``, if one is named. Raises UserError for a run that its
    record does not repeat.
    """
    with python_terms():
        sources = [calibration] if isinstance(calibration, str | os.PathLike) else list(calibration)
        request = ReproduceRequest(
            folder=_folder(result),
            output=None if output is None else Path(path_of(output, "output")),
            model=None if model is None else path_of(model, "model", "a Hub id"),
            calibration=tuple(os.fspath(source) for source in sources),
            tokenizer=None if tokenizer is None else os.fspath(tokenizer),
            device=None if device is None else str(device),
            trust_remote_code=bool(trust_remote_code),
            overwrite=bool(overwrite),
        )
        return repeat(request, "quiet" if quiet else "normal")
