"""How many sequences fit into one batch: the logits are what fills the memory."""

from __future__ import annotations

from typing import Any

import torch

LOGIT_BYTES = {"cpu": 256e6, "cuda": 2e9}
"""Bytes that one batch of float32 logits may take, by type of device; other types are treated as a CPU."""
MOST = 64
"""Sequences that one batch has at the most."""
STREAMED = 4
"""How many times as large batches of a model are that reads all its weights for each."""


def vocabulary_size(model: Any) -> int:
    """Width of the logits, as the configuration of ``model`` (or of its text part) states it."""
    return int(model.config.get_text_config().vocab_size)


def sequences_per_batch(model: Any, length: int, device: torch.device, streamed: bool = False) -> int:
    """Sequences of ``length`` tokens whose logits stay within ``LOGIT_BYTES``; at least 1, at most ``MOST``.

    Both limits are ``STREAMED`` times as large where the blocks of ``model`` are ``streamed`` from disk.
    """
    budget, most = LOGIT_BYTES.get(device.type, LOGIT_BYTES["cpu"]), MOST
    if streamed:
        budget, most = STREAMED * budget, STREAMED * most
    return max(1, min(most, int(budget / (4 * length * vocabulary_size(model)))))
