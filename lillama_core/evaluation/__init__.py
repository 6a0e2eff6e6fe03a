"""Measuring models: metrics, comparisons, fidelity."""

from lillama_core.evaluation.base import (
    Evaluation,
    EvaluationOptions,
    Measurement,
    Metric,
    Report,
    Subject,
    language_model_evaluation,
)

__all__ = [
    "Evaluation",
    "EvaluationOptions",
    "Measurement",
    "Metric",
    "Report",
    "Subject",
    "language_model_evaluation",
]
