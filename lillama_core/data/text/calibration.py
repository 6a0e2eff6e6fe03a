"""Calibration data put together from its sources."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lillama_core.data.hashing import rows_sha256
from lillama_core.data.objects import DATA
from lillama_core.data.self_generated.sampling import (
    SAMPLER_VERSION,
    TEMPERATURE,
    SamplingPlace,
    check_can_sample,
    sample_rows,
    text_config,
)
from lillama_core.data.sources import SELF, Source
from lillama_core.data.text.checks import check_sources
from lillama_core.data.text.named import Demand, NamedWindows, given_windows, named_windows
from lillama_core.data.text.options import CalibrationOptions
from lillama_core.errors import UserError
from lillama_core.system.progress import Progress


@dataclass(frozen=True)
class CalibrationData:
    """Rows of tokens, ready for a model."""

    rows: torch.Tensor
    """int64 ``[rows, sequence_length]``; every prefix holds about the right mix of sources."""
    description: dict[str, dict[str, Any]]
    """What went in, by source; can be written as JSON."""
    sha256: str
    """Of all rows."""


def load_calibration(
    options: CalibrationOptions,
    model: Any,
    tokenizer: Any,
    *,
    model_fingerprint: str,
    device: torch.device | str,
    progress: Progress,
    cache_dir: Path | None = None,
    autocast_dtype: torch.dtype | None = None,
    whole_model: Callable[[], Any] | None = None,
) -> CalibrationData:
    """The rows that ``options`` ask for.

    ``model`` is on ``device`` and is used only to write its own text, under autocast to ``autocast_dtype``
    when given; where its weights are not in memory, ``whole_model`` gives one that has them.
    ``model_fingerprint`` must change with its weights, since that text is cached (``cache_dir``, else
    ``LILLAMA_CACHE`` or the user's cache folder). Raises UserError for data that cannot be read or is too small,
    and for a model that cannot take such rows.
    """
    check_sources(options)
    counts = _rows_by_source(options, options.rows())
    _check_model(options, model, own_rows=counts.get(SELF, 0))
    parts: dict[str, torch.Tensor] = {}
    description: dict[str, dict[str, Any]] = {}
    # What the user named comes first: if it fails, it fails before the long work of sampling.
    for source in sorted(options.effective_sources(), key=lambda source: source.name == SELF):
        count = counts.get(source.name, 0)
        if not count:
            continue
        if source.name == SELF:
            place = SamplingPlace(torch.device(device), autocast_dtype, model_fingerprint, cache_dir)
            rows = sample_rows(
                model, tokenizer, count, options.sequence_length, options.seed, place, progress, whole_model
            )
            details: dict[str, Any] = {
                "kind": "self",
                "temperature": TEMPERATURE,
                "sampler_version": SAMPLER_VERSION,
            }
        else:
            named = _named(source, tokenizer, count, options)
            rows, details = named.rows, named.description
            check_rows(source.name, rows, model)
        parts[source.name] = rows
        description[source.name] = {
            **details,
            "weight": source.weight,
            "rows": len(rows),
            "tokens": rows.numel(),
            "sha256": rows_sha256(rows),
        }
        progress.detail(f"calibration: {len(rows)} x {options.sequence_length} tokens from {source.name}")
    order = interleaved({name: len(rows) for name, rows in parts.items()})
    mixed = torch.stack([parts[name][index] for name, index in order])
    return CalibrationData(mixed, description, rows_sha256(mixed))


def load_text_windows(
    source: Source,
    tokenizer: Any,
    sequence_length: int,
    windows: int,
    seed: int | None = None,
) -> torch.Tensor:
    """The first ``windows`` windows of ``source`` in order (0: all), int64 ``[windows, sequence_length]``.

    For evaluation: running text is encoded as a whole without special tokens and cut without padding or
    overlap; a token that the tokenizer begins every text with takes the first place of every window. Data that is
    smaller gives fewer windows, at least one. With a ``seed`` the windows are drawn at random instead, as for
    calibration. Raises UserError when there is no text, or not enough for one window.
    """
    demand = Demand(sequence_length, windows or None, seed)
    found = named_windows(source, tokenizer, demand, "evaluation")
    if not len(found.rows):
        raise UserError(
            f"{source.name} has {found.tokens} tokens, less than one window of {sequence_length}; "
            "give more text or a smaller sequence length"
        )
    return found.rows


def _rows_by_source(options: CalibrationOptions, total: int) -> dict[str, int]:
    """Rows of each source, by largest remainder; they sum to ``total``."""
    sources = options.effective_sources()
    whole = sum(source.weight for source in sources)
    exact = {source.name: total * source.weight / whole for source in sources}
    # A rounding error must not turn a whole number into the one below.
    counts = {name: math.floor(rows + 1e-9) for name, rows in exact.items()}
    named_first = sorted(exact, key=lambda name: (counts[name] - exact[name], name == SELF))
    for name in named_first[: total - sum(counts.values())]:
        counts[name] += 1
    for source in options.sources:
        if not counts[source.name]:
            raise UserError(
                f"{source.name} gets none of the {total} rows of {options.sequence_length} tokens at its "
                "weight; ask for more with --tokens, raise its weight, or leave it out"
            )
    return counts


def _named(source: Source, tokenizer: Any, count: int, options: CalibrationOptions) -> NamedWindows:
    """``count`` rows of ``source``, or what there is when the user allowed that."""
    demand = Demand(options.sequence_length, count, options.seed)
    if source.name == DATA and options.given is not None:
        found = given_windows(options.given, tokenizer, demand)
    else:
        found = named_windows(source, tokenizer, demand, "calibration")
    if len(found.rows) == count:
        return found
    if not len(found.rows):
        raise UserError(
            f"{source.name} has {found.tokens} tokens, less than one sequence of {options.sequence_length}; "
            "give more text or a smaller sequence length"
        )
    if options.use_all:
        return found
    raise UserError(
        f"{source.name} has {found.tokens} tokens "
        f"({len(found.rows)} sequences of {options.sequence_length}), "
        f"{count * options.sequence_length} asked of it; ask for fewer with --tokens, "
        "or pass --use-all-tokens to take what there is"
    )


def _check_model(options: CalibrationOptions, model: Any, own_rows: int) -> None:
    if own_rows:
        check_can_sample(model)
    if model is not None:
        _check_length(options.sequence_length, model)


def _check_length(sequence_length: int, model: Any) -> None:
    longest = getattr(text_config(model), "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < sequence_length:
        raise UserError(
            f"sequence length {sequence_length} is more than the {longest} positions that the model "
            f"knows; ask for at most {longest}"
        )


def check_rows(name: str, rows: torch.Tensor, model: Any) -> None:
    """Raise UserError for rows [rows, length] of the data ``name`` that are too long or hold tokens beyond the model's.

    Either would fail much later, as an index error without a name.
    """
    if model is None:
        return
    _check_length(rows.shape[1], model)
    vocabulary = getattr(text_config(model), "vocab_size", None)
    if isinstance(vocabulary, int) and int(rows.max()) >= vocabulary:
        raise UserError(
            f"{name}: the tokenizer gives token {int(rows.max())}, but the model knows only "
            f"{vocabulary}; use the tokenizer that belongs to the model"
        )


def interleaved(counts: dict[str, int]) -> list[tuple[str, int]]:
    """Source and index of every row, such that each source is spread evenly over the whole."""
    places = [
        ((index + 0.5) / count, number, name, index)
        for number, (name, count) in enumerate(counts.items())
        for index in range(count)
    ]
    return [(name, index) for _, _, name, index in sorted(places)]
