"""What can be wrong with the options before there is a model."""

from __future__ import annotations

import math

from lillama_core.data.objects import DATA
from lillama_core.data.sources import SELF, LocalFile, Source, locate
from lillama_core.data.text.files import check_json, check_parquet, check_text
from lillama_core.data.text.options import CalibrationOptions
from lillama_core.errors import UserError
from lillama_core.system.regular import check_regular


def check_sources(options: CalibrationOptions) -> None:
    """Raise UserError for everything that is known to fail without a model, a tokenizer or the network.

    Files are opened and their beginnings read; of datasets only the name is looked at.
    """
    _check_numbers(options)
    seen: set[str] = set()
    for source in options.sources:
        _check_weight(source)
        if source.name in seen:
            raise UserError(f"source {source.name} is named twice; name it once, with the sum of the weights")
        seen.add(source.name)
        if source.name == DATA and options.given is not None:
            continue
        location = locate(source.name)
        if isinstance(location, LocalFile):
            _check_file(location)


def _check_numbers(options: CalibrationOptions) -> None:
    if options.sequence_length < 2:
        raise UserError(f"sequence length {options.sequence_length} is too small; it must be at least 2 tokens")
    if options.tokens < options.sequence_length:
        raise UserError(
            f"{options.tokens} tokens do not fill one sequence of {options.sequence_length}; "
            f"ask for at least {options.sequence_length} tokens, or for shorter sequences"
        )
    if not 0 <= options.self_share <= 1:
        raise UserError(f"the self share must lie between 0 and 1, not {options.self_share}")
    if options.self_share == 1 and options.sources and all(s.name != "self" for s in options.sources):
        names = ", ".join(source.name for source in options.sources)
        raise UserError(f"a self share of 1 leaves no tokens for {names}; lower it, or do not name the data")


def _check_weight(source: Source) -> None:
    if not (source.weight > 0 and math.isfinite(source.weight)):
        raise UserError(f"source {source.name} has weight {source.weight}; weights must be positive numbers")


def _check_file(file: LocalFile) -> None:
    check_regular(file.path)
    if file.path.stat().st_size == 0:
        raise UserError(f"{file.path} is empty; calibration needs text")
    match file.format:
        case "parquet":
            check_parquet(file.path)
        case "jsonl":
            check_json(file.path)
        case "text":
            check_text(file.path)


def check_evaluation_text(data: str | None) -> None:
    """Raise UserError when ``data``, what ``--data`` names, is no text that can be read; None: the text shipped."""
    if data is None:
        return
    source = Source.parse(data)
    check_sources(CalibrationOptions(sources=(source,), self_share=0.0, sequence_length=2))
    if source.name == SELF:
        raise UserError("--data must be a text that no model is to write")
