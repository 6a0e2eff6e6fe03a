"""What an evaluation returns: named metrics with a unit, a direction and a meaning.

A plugin composes an :class:`Evaluation` from metrics; `lillama_core.metrics` holds ready ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch


@dataclass(frozen=True)
class Measurement:
    """One measured number."""

    name: str
    """Short and stable, for tables and JSON: ``perplexity``, ``accuracy/wiki_continuation``."""
    value: float
    unit: str
    """``""`` for a pure number, else ``tokens/s``, ``MB``, ``%`` …"""
    better: Literal["higher", "lower"]
    meaning: str
    """One sentence for a reader who meets the number for the first time."""
    standard_error: float | None = None


@dataclass
class Subject:
    """A model ready to be measured, in eval mode on ``device``."""

    name: str
    model: Any
    tokenizer: Any
    """Or processor: what the architecture's modality loads."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    baseline: Subject | None = None
    """The model that this one is compared with. Its weights are gone; what its metrics noted is there."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What a metric wants to see again when it measures the next model: outputs, say."""


@dataclass(frozen=True)
class EvaluationOptions:
    """What the user may choose; every metric reads what concerns it."""

    data: str | None = None
    """Text for perplexity: any calibration source (file, dataset name); None: the offline set."""
    tasks: tuple[str, ...] = ()
    """lm-eval task names; empty: the offline set."""
    sequence_length: int = 512
    windows: int = 40
    """Number of windows for perplexity; 0 means all of the data."""
    limit: int | None = None
    """Items per task; None means all."""
    seed: int = 0
    details: Path | None = None
    """Folder for what a metric has to show besides numbers, transcripts for one; None: nothing is written."""


Report = Callable[[str], None]
"""Receives one line of progress."""


class Metric(Protocol):
    """Measures one aspect of a model."""

    name: str

    def measure(self, subject: Subject, options: EvaluationOptions, report: Report) -> list[Measurement]:
        """Measurements of ``subject``; raises UserError when ``options`` cannot be met."""
        ...


class Evaluation:
    """An architecture's choice of metrics, run one after the other."""

    def __init__(self, *metrics: Metric) -> None:
        self.metrics = metrics

    def check(self, options: EvaluationOptions) -> None:
        """Raise UserError for what a metric can refuse without a model: a metric may have a method of this name."""
        for metric in self.metrics:
            check = getattr(metric, "check", None)
            if check is not None:
                check(options)

    def check_with(self, processor: Any, options: EvaluationOptions) -> None:
        """Raise UserError for what a metric can refuse once the tokenizer or processor is there."""
        for metric in self.metrics:
            check = getattr(metric, "check_with", None)
            if check is not None:
                check(processor, options)

    def run(
        self, subject: Subject, options: EvaluationOptions, report: Report = lambda line: None
    ) -> list[Measurement]:
        """All metrics of ``subject`` in the order in which they were declared."""
        return [m for metric in self.metrics for m in metric.measure(subject, options, report)]
