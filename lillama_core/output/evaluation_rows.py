"""What the card and the report say of the evaluation that a compression ended with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lillama_core.evaluation.base import Measurement
from lillama_core.evaluation.comparison import Evaluated, comparison_rows
from lillama_core.output.record import RunRecord


def evaluated_of(said: Mapping[str, Any]) -> list[Evaluated]:
    """The measurements of the dense model and of the compressed one, as a record has them."""
    return [Evaluated(what, [Measurement(**measured) for measured in said[what]]) for what in ("dense", "compressed")]


def evaluation_rows(record: RunRecord) -> list[tuple[str, ...]]:
    """Metric, dense model, this model, change, unit and meaning; empty where nothing was evaluated."""
    if record.evaluation is None:
        return []
    rows, meanings = comparison_rows(evaluated_of(record.evaluation))
    return [
        (name, before, after, change, unit, meaning.removeprefix(f"{name}: "))
        for (name, before, after, change, unit, _), meaning in zip(rows[1:], meanings, strict=True)
    ]
