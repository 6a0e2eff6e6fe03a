"""What a modality adds so that two models can be compared by their outputs alone."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lillama_core.data.modality import Inputs, Modality

if TYPE_CHECKING:
    from lillama_core.evaluation.base import EvaluationOptions


@dataclass(frozen=True)
class EvaluationRows:
    """Inputs on which models are compared, in batches."""

    batches: list[Inputs]
    what: str
    """What they are, in a few words for a table: ``40 rows of 256 tokens of notes.txt``."""


class ComparableModality(Modality):
    """A modality that can say what it feeds, and that knows inputs for an evaluation."""

    feeds: str
    """What the model is given, in a few words."""
    calibrates: str
    """Where its calibration data comes from, in a few words."""

    @abstractmethod
    def check_evaluation(self, options: EvaluationOptions) -> None:
        """Raise UserError when ``options.data`` cannot be read, as far as is known without a model."""

    @abstractmethod
    def evaluation(self, model: Any, processor: Any, options: EvaluationOptions) -> EvaluationRows:
        """The inputs that ``options`` ask for; raises UserError when they cannot be had."""
