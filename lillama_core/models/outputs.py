"""Pick the tensor that matters out of what a model of transformers returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def class_logits(model: nn.Module, outputs: Any) -> torch.Tensor | None:
    """The scores of tokens or labels of which one is right; None where the model puts out other numbers.

    A single score (of a reward model) is such a number, and so are those of labels of which several may hold. Scores
    of pixels [rows, classes, height, width] end in no axis of classes.
    """
    logits = getattr(outputs, "logits", None)
    problem = getattr(model.config, "problem_type", None)
    if logits is None or problem in ("regression", "multi_label_classification"):
        return None
    if logits.dim() > 3 or logits.shape[-1] < 2:
        return None
    assert isinstance(logits, torch.Tensor)
    return logits


def main_output(outputs: Any) -> torch.Tensor:
    """The tensor that a model is for: logits, or else the first of its outputs."""
    logits = getattr(outputs, "logits", None)
    found = outputs[0] if logits is None else logits
    assert isinstance(found, torch.Tensor)
    return found
