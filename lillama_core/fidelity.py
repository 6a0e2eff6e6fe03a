"""How the compressed model predicts on rows that it was not trained on, against the dense model."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch

from lillama_core.blocks import Inputs, Parent
from lillama_core.record import Fidelity


def measure_fidelity(
    parent: Parent,
    held: list[tuple[Inputs, torch.Tensor, torch.Tensor]],
    autocast: torch.dtype | None,
    next_token: bool,
) -> dict[str, Any]:
    """Compare predictions from the last hidden states (dense, compressed) of each held-out batch.

    Both streams are there already, so this costs the model's head alone. Perplexities need a model that predicts the
    next token; divergence and agreement, one that returns logits.
    """
    device = next(parent.model.parameters()).device
    tokens, predictions, divergence, agreement = 0, 0, 0.0, 0.0
    nll = [0.0, 0.0]
    wrong, size = 0.0, 0.0
    with torch.no_grad(), torch.autocast(device.type, autocast, enabled=autocast is not None):
        for inputs, dense, compressed in held:
            wrong += (compressed - dense).square().sum().item()
            size += dense.square().sum().item()
            for row in range(dense.shape[0]):
                one = {k: v[row : row + 1].to(device) for k, v in inputs.items()}
                outputs = [parent.outputs(one, hidden[row : row + 1].to(device)) for hidden in (dense, compressed)]
                if not hasattr(outputs[0], "logits"):
                    break
                logits = [found.logits for found in outputs]
                labels = one["input_ids"][0, 1:, None] if next_token else None
                # Some tokens at a time: these tables are as wide as the vocabulary.
                for start in range(0, logits[0].shape[1], 64):
                    logs = [x[0, start : start + 64].float().log_softmax(-1) for x in logits]
                    p, q = logs
                    tokens += p.shape[0]
                    divergence += (p.exp() * (p - q)).sum().item()
                    agreement += (p.argmax(-1) == q.argmax(-1)).sum().item()
                    if labels is not None:
                        wanted = labels[start : start + 64]
                        predictions += wanted.shape[0]
                        for i, log in enumerate(logs):
                            nll[i] -= log[: wanted.shape[0]].gather(1, wanted).sum().item()
    perplexities = [math.exp(min(n / predictions, 700)) for n in nll] if predictions else [None, None]
    return asdict(
        Fidelity(
            tokens=tokens,
            perplexity_before=perplexities[0],
            perplexity_after=perplexities[1],
            divergence=divergence / tokens if tokens else None,
            agreement=agreement / tokens if tokens else None,
            relative_error=wrong / max(size, 1e-30),
        )
    )
