"""What an evaluation is: named metrics, each measurement with a unit, a direction and a meaning.

A plugin composes an `Evaluation` from metrics, by name or as objects; `lillama_core.evaluation.metrics` holds ready
ones. Nothing here loads torch, so that declaring an evaluation costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from lillama_core.errors import UserError, nearest
from lillama_core.strategies import make
from lillama_core.system.processes import ALONE, World

if TYPE_CHECKING:
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
    interval: tuple[float, float] | None = None
    """Shown instead of the standard error; ``meaning`` says what lies in it: 95 % of resamples, half of the rounds."""
    data: str | None = None
    """SHA-256 of what was measured on, where the metric tells: the same of models that saw the same."""


@dataclass(frozen=True)
class Answer:
    """What a model makes of something, to be read beside what another one makes of it."""

    prompt: str
    """What it was given: a text, or of a recording what is said in it."""
    answer: str


def _cpu() -> torch.device:
    import torch

    return torch.device("cpu")


@dataclass
class Subject:
    """A model ready to be measured, in eval mode on ``device``."""

    name: str
    model: Any
    tokenizer: Any
    """Or processor: what the architecture's modality loads."""
    device: torch.device = field(default_factory=_cpu)
    baseline: Subject | None = None
    """The model that this one is compared with. Its weights are gone but while both are measured in turns; what its
    metrics noted is there."""
    streamed: bool = False
    """Whether each run of the model reads its blocks from disk: few large batches then, and nothing token by token."""
    answers: list[Answer] = field(default_factory=list)
    """Where a metric that has such puts them."""
    left_out: list[str] = field(default_factory=list)
    """A line for each metric that could not measure this model, which says why."""
    world: World = ALONE
    """The processes that measure the model together, each with a copy of it."""
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
    shots: int = 0
    """Solved examples of a task that stand before each of its questions."""
    answers: int = 0
    """How many answers to keep, to be read."""
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


@runtime_checkable
class MetricInTurns(Metric, Protocol):
    """A metric that does not measure two models one after the other, but in turns, so that the clock is fair."""

    def measure_in_turns(
        self, subject: Subject, options: EvaluationOptions, report: Report
    ) -> tuple[list[Measurement], list[Measurement]]:
        """Measurements of ``subject`` and of ``subject.baseline``, whose models are both in memory."""
        ...


class Evaluation:
    """An architecture's choice of metrics, run one after the other."""

    def __init__(self, *metrics: str | Metric) -> None:
        """Metrics by the name that ``lillama_metrics`` knows, or as objects."""
        self.declared = metrics

    @cached_property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics as objects; raises UserError for a name that is not registered."""
        return tuple(make("metrics", metric) if isinstance(metric, str) else metric for metric in self.declared)

    def only(self, names: tuple[str, ...]) -> Evaluation:
        """The metrics of these names alone, in their own order; all of them when there are no names.

        Raises UserError for a name that no metric has.
        """
        if not names:
            return self
        there = [metric.name for metric in self.metrics]
        for name in names:
            if name not in there:
                raise UserError(f"no metric named {name!r} (there are: {', '.join(there)}){nearest(name, there)}")
        return Evaluation(*(metric for metric in self.metrics if metric.name in names))

    def check(self, options: EvaluationOptions) -> None:
        """Raise UserError for what a metric can refuse without a model: a metric may have a method of this name."""
        if options.answers and not self.gives_answers:
            raise UserError("--answers does nothing: none of the metrics writes or transcribes")
        for metric in self._wanted(options):
            check = getattr(metric, "check", None)
            if check is not None:
                check(options)

    def _wanted(self, options: EvaluationOptions) -> list[Metric]:
        """The metrics that ``options`` ask for; without a method ``wanted`` one always is."""
        return [m for m in self.metrics if not hasattr(m, "wanted") or m.wanted(options)]

    def check_with(self, processor: Any, options: EvaluationOptions) -> None:
        """Raise UserError for what a metric can refuse once the tokenizer or processor is there."""
        for metric in self.metrics:
            check = getattr(metric, "check_with", None)
            if check is not None:
                check(processor, options)

    @property
    def needs_live_baseline(self) -> bool:
        """Whether a metric needs the baseline measured in the same run: one may say so by this name."""
        return any(getattr(metric, "needs_live_baseline", False) for metric in self.metrics)

    @property
    def by_block(self) -> bool:
        """Whether a metric measures models whose blocks are read from disk whenever they run, as it may say so."""
        return any(getattr(metric, "by_block", False) for metric in self.metrics)

    @property
    def in_turns(self) -> frozenset[str]:
        """Names of the metrics that measure two models in turns."""
        return frozenset(metric.name for metric in self.metrics if isinstance(metric, MetricInTurns))

    @property
    def gives_answers(self) -> bool:
        """Whether a metric keeps what the model answers, as many as ``options.answers`` says: one may say so."""
        return any(getattr(metric, "gives_answers", False) for metric in self.metrics)

    def load_saved(self, folder: Path) -> dict[str, Any]:
        """What the metrics noted of the model whose details (`EvaluationOptions.details`) lie in ``folder``.

        A metric that writes details may read them again by a method of this name, so that a model need not be measured
        anew beside each one that is compared with it. Raises OSError or ValueError for details that cannot be read.
        """
        notes: dict[str, Any] = {}
        for metric in self.metrics:
            read = getattr(metric, "load_saved", None)
            if read is not None:
                notes |= read(folder)
        return notes

    def run(
        self,
        subject: Subject,
        options: EvaluationOptions,
        report: Report = lambda line: None,
        later: frozenset[str] = frozenset(),
    ) -> list[Measurement]:
        """All metrics of ``subject`` in the order in which they were declared, but for those named in ``later``.

        Of a model that is read block by block those alone that have an attribute ``by_block`` which is true: they run
        it forward a few times, and neither look into blocks nor at the clock. Raises UserError where there is none.
        Of several processes all measure what has an attribute ``shared``, and give the same; the rest is the main
        one's.
        """
        main = subject.world.is_main
        say: Report = report if main else lambda line: None
        wanted = self._wanted(options)
        measured = [m for m in wanted if not subject.streamed or getattr(m, "by_block", False)]
        for metric in wanted:
            if metric not in measured:
                subject.left_out.append(f"{metric.name}: left out, it needs the whole model in memory")
                say(subject.left_out[-1])
        if not measured:
            raise UserError(
                f"{subject.name} can be measured only where it fits in memory: none of its metrics reads it block by"
                " block; take a machine with more memory, or --dtype bfloat16"
            )
        found = []
        for metric in measured:
            if metric.name not in later and (main or getattr(metric, "shared", False)):
                found += metric.measure(subject, options, say)
        return found

    def run_in_turns(
        self, subject: Subject, options: EvaluationOptions, names: frozenset[str], report: Report = lambda line: None
    ) -> tuple[list[Measurement], list[Measurement]]:
        """Those of the metrics of ``names`` that are asked for, of ``subject`` and of its baseline, both in memory."""
        own, other = list[Measurement](), list[Measurement]()
        for metric in self._wanted(options):
            if metric.name in names:
                assert isinstance(metric, MetricInTurns)
                found = metric.measure_in_turns(subject, options, report)
                own += found[0]
                other += found[1]
        return own, other


language_model_evaluation = Evaluation("perplexity", "accuracy", "speed", "footprint", "answers")
"""What says how good a language model is: perplexity, zero-shot accuracy, speed, size, and what it writes."""
