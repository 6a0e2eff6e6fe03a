"""What `compress` and `evaluate` give: results that show themselves in a notebook."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lillama_core.errors import nearest
from lillama_core.evaluation.base import Measurement
from lillama_core.evaluation.comparison import (
    Evaluated,
    answers_side_by_side,
    by_model,
    comparison_rows,
    show_answers,
    show_comparison,
)
from lillama_core.output.quantization_rows import before_rounding
from lillama_core.output.record import RunRecord
from lillama_core.system.tables import aligned


class CompressionResult:
    """A compressed model on disk and what is known of it; in a notebook its table of sizes and losses."""

    def __init__(self, path: Path, record: RunRecord, open_model: Callable[[], Any]) -> None:
        self.path = path
        """The directory that `load`, and transformers' ``from_pretrained``, take."""
        self.record = record
        """Everything that lillama.json says."""
        self._open_model = open_model

    @cached_property
    def model(self) -> Any:
        """The compressed model, loaded on the CPU at first use."""
        return self._open_model()

    @property
    def losses(self) -> dict[str, tuple[float, float]]:
        """By block, in the order of the run: the distillation loss before and after training."""
        return {b["name"]: (b["loss_before"], b["loss_after"]) for b in self.record.blocks}

    @property
    def table(self) -> list[tuple[str, str, str, str]]:
        """What is measured, before, after, and the change."""
        numbers, sizes, fidelity = self.record.parameters, self.record.bytes, self.record.fidelity or {}
        rows = [
            _row("parameters", numbers["parameters_before"], numbers["parameters_after"], ",.0f"),
            _row(f"bytes ({self.record.dtype})", sizes["dense"], sizes["compressed"], ",.0f"),
        ]
        if fidelity.get("perplexity_after") is not None:
            name = f"perplexity ({before_rounding(self.record, ', ')}{fidelity['tokens']} held-out tokens)"
            rows.append(_row(name, fidelity["perplexity_before"], fidelity["perplexity_after"], ",.2f"))
        return rows

    def __repr__(self) -> str:
        rows = [("", "before", "after", "change"), *self.table]
        return "\n".join([f"CompressionResult {str(self.path)!r}", *aligned(rows)])

    def _repr_html_(self) -> str:
        losses = [
            (name, f"{before:.4g}", f"{after:.4g}", _change(before, after))
            for name, (before, after) in self.losses.items()
        ]
        took = f"{self.record.seconds['total']:.0f} s, at most {self.record.peak_memory_bytes / 1e6:,.0f} MB of memory"
        return (
            f"<p><code>{html.escape(str(self.path))}</code>, {html.escape(took)}</p>"
            + _html_table([("", "before", "after", "change"), *self.table])
            + "<details><summary>Losses</summary>"
            + _html_table([("block", "loss before", "loss after", "change"), *losses])
            + "</details>"
        )


class EvaluationResult:
    """What was measured of a model, and of its baseline; in a notebook the table of both."""

    def __init__(self, found: Sequence[Evaluated]) -> None:
        self.evaluated = list(found)
        """The baseline, if there is one, and the model."""

    @property
    def measurements(self) -> list[Measurement]:
        """Those of the model."""
        return self.evaluated[-1].measurements

    @property
    def baseline(self) -> list[Measurement] | None:
        """Those of the baseline; None when there is none."""
        return self.evaluated[0].measurements if len(self.evaluated) > 1 else None

    def __getitem__(self, name: str) -> float:
        """The model's number of this name: ``result["perplexity"]``; raises KeyError that names those there are."""
        found = {m.name: m.value for m in self.measurements}
        if name not in found:
            raise KeyError(f"{name!r} was not measured{nearest(name, list(found))}; there are: {', '.join(found)}")
        return found[name]

    def to_dict(self) -> dict[str, list[dict[str, Any]]]:
        """The measurements by model, ready for JSON."""
        return by_model(self.evaluated)

    @property
    def answers(self) -> list[tuple[str, list[str]]]:
        """Each prompt of ``answers=N``, and what the baseline, if there is one, and the model answered."""
        return answers_side_by_side(self.evaluated)

    def __repr__(self) -> str:
        return "\n".join(filter(None, (show_comparison(self.evaluated), show_answers(self.evaluated))))

    def _repr_html_(self) -> str:
        rows, meanings = comparison_rows(self.evaluated)
        said = "".join(f"<li>{html.escape(line)}</li>" for line in meanings)
        return f"{_html_table(rows)}<details><summary>What they mean</summary><ul>{said}</ul></details>"


def _row(name: str, before: float, after: float, form: str) -> tuple[str, str, str, str]:
    return name, format(before, form), format(after, form), _change(before, after)


def _change(before: float, after: float) -> str:
    return f"{after / before - 1:+.1%}" if before else ""


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the header."""
    head, *body = ["".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row) for tag, row in _tagged(rows)]
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(f'<tr>{r}</tr>' for r in body)}</tbody></table>"


def _tagged(rows: Sequence[Sequence[str]]) -> Iterator[tuple[str, Sequence[str]]]:
    for number, row in enumerate(rows):
        yield ("td" if number else "th"), row
