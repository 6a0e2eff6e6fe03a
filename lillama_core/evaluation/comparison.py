"""Measurements of several models: what they are, as JSON, as a table."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lillama_core.evaluation.base import Answer, Measurement


@dataclass(frozen=True)
class Evaluated:
    """A model and what was measured of it."""

    model: str
    measurements: list[Measurement]
    answers: list[Answer] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """A line for each metric that could not measure it."""


def by_model(found: list[Evaluated]) -> dict[str, list[dict[str, Any]]]:
    """The measurements as JSON, by model; one that is measured again gets a number behind its name."""
    named: dict[str, list[dict[str, Any]]] = {}
    for number, evaluated in enumerate(found, start=1):
        name = evaluated.model if evaluated.model not in named else f"{evaluated.model} ({number})"
        named[name] = [vars(m) for m in evaluated.measurements]
    return named


def comparison_rows(found: list[Evaluated]) -> tuple[list[list[str]], list[str]]:
    """The cells of a table with a row for each metric and a column for each model, and what each metric means.

    The first row is the header.
    """
    header = ["metric", *_columns([e.model for e in found]), *(["change"] if len(found) == 2 else []), "unit", "better"]
    rows, meanings = [header], []
    # Some compare with the first model, which has none of them itself.
    for first in {m.name: m for e in reversed(found) for m in e.measurements}.values():
        values = [next((m for m in e.measurements if m.name == first.name), None) for e in found]
        cells = ["—" if m is None else _number(m) for m in values]
        if len(found) == 2:
            before, after = values
            relative = before is not None and after is not None and before.value != 0
            cells.append(f"{after.value / before.value - 1:+.1%}" if relative and after and before else "")
        rows.append([first.name, *cells, first.unit, first.better])
        meanings.append(f"{first.name}: {first.meaning}")
    return rows, meanings


def _columns(models: list[str]) -> list[str]:
    """The ends of the models' paths, as long as it takes to tell them apart; one that is there twice gets a number."""
    paths = [Path(model).parts for model in models]
    for length in range(1, max(map(len, paths), default=0) + 1):
        names = [str(Path(*parts[-length:])) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{Path(model).name} ({number})" for number, model in enumerate(models, start=1)]


def show_comparison(found: list[Evaluated]) -> str:
    """The table of `comparison_rows` as lines of text, then what each metric means."""
    rows, meanings = comparison_rows(found)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 or i > len(found) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join([*lines, "", *meanings])


def answers_side_by_side(found: list[Evaluated]) -> list[tuple[str, list[str]]]:
    """Each prompt, and what every model answered to it."""
    prompts = list(dict.fromkeys(a.prompt for e in found for a in e.answers))
    answered = [{a.prompt: a.answer for a in e.answers} for e in found]
    return [(prompt, [of_model.get(prompt, "") for of_model in answered]) for prompt in prompts]


def show_answers(found: list[Evaluated]) -> str:
    """`answers_side_by_side` as lines of text."""
    names = _columns([e.model for e in found])
    width = max(map(len, names), default=0)
    lines = []
    for prompt, answers in answers_side_by_side(found):
        lines += ["", *_wrapped(prompt, "> ", "> ")]
        for name, answer in zip(names, answers, strict=True):
            lines += _wrapped(answer or "—", f"{name.ljust(width)}  ", " " * (width + 2))
    return "\n".join(lines)


def _wrapped(text: str, first: str, later: str) -> list[str]:
    """``text`` in lines of 100 characters; its own ends of lines stay."""
    lines = [part for line in text.splitlines() or [""] for part in textwrap.wrap(line, 100 - len(first)) or [""]]
    return [f"{first if i == 0 else later}{line}".rstrip() for i, line in enumerate(lines)]


def _number(m: Measurement) -> str:
    digits = 2 if abs(m.value) < 1000 else 0
    # What is small is still not nothing.
    text = f"{m.value:.1e}" if 0 < abs(m.value) < 0.005 else f"{m.value:,.{digits}f}"
    if m.interval is not None:
        low, high = m.interval
        return f"{text} [{low:.{digits}f}, {high:.{digits}f}]"
    return text if m.standard_error is None else f"{text} ± {m.standard_error:.{digits}f}"
