"""What the card and the report say of the evaluation that a compression ended with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lillama_core.evaluation.base import Measurement
from lillama_core.evaluation.comparison import Evaluated, comparison_rows
from lillama_core.output.numbers import number
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


def speed_rows(record: RunRecord) -> list[tuple[str, float, str]]:
    """Label, times as fast as the dense model, and a note: of what was planned for, and of what was evaluated.

    Of an evaluation only what was measured in turns: one after the other says more of the machine than of the models.
    """
    found = []
    planned = record.plan.get("speed")
    if planned:
        found.append((f"planned for: {planned['work']}", float(planned["measured"]), ""))
    if record.evaluation is None:
        return found
    dense, compressed = ({m.name: m for m in e.measurements} for e in evaluated_of(record.evaluation))
    for name, times in compressed.items():
        kind, _, work = name.partition("/")
        before, after = dense.get(f"speed/{work}"), compressed.get(f"speed/{work}")
        if kind == "speed_up" and times.interval is not None and before is not None and after is not None:
            numbers = f"{number(before.value)} → {number(after.value)} {after.unit}".rstrip()
            spread = " to ".join(f"{end:.2f}" for end in times.interval)
            found.append((f"speed/{work}", times.value, f" ({spread}; {numbers})"))
    return found


def left_out_rows(record: RunRecord) -> list[str]:
    """What could not be measured, and why."""
    return list((record.evaluation or {}).get("left_out", []))
