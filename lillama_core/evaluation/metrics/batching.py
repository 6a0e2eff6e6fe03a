"""How many sequences fit into one batch: the logits are what fills the memory."""

from __future__ import annotations

from typing import Any

import torch

LOGIT_BYTES = {"cpu": 256e6, "cuda": 2e9}
"""Bytes that one batch of float32 logits may take, by type of device; other types are treated as a CPU."""


def vocabulary_size(model: Any) -> int:
    """Width of the logits, as the configuration of ``model`` (or of its text part) states it."""
    return int(model.config.get_text_config().vocab_size)


def sequences_per_batch(model: Any, length: int, device: torch.device) -> int:
    """Sequences of ``length`` tokens whose logits stay within ``LOGIT_BYTES``; at least 1, at most 64."""
    budget = LOGIT_BYTES.get(device.type, LOGIT_BYTES["cpu"])
    return max(1, min(64, int(budget / (4 * length * vocabulary_size(model)))))
