"""How the compressed model predicts on rows that it was not trained on, against the dense model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import nll_loss

from lillama_core.data.modality import IGNORE_INDEX, Samples
from lillama_core.models.outputs import class_logits, main_output
from lillama_core.runtime.harness import StackHarness
from lillama_core.runtime.modules import swapped_modules
from lillama_core.runtime.states import rows_of
from lillama_core.system.processes import ALONE, World


@dataclass
class Fidelity:
    """How the compressed model predicts on held-out calibration rows, against the dense model."""

    tokens: int
    perplexity_before: float | None
    perplexity_after: float | None
    divergence: float | None
    """Mean Kullback-Leibler divergence of the predictions from the dense model's, in nats a token."""
    agreement: float | None
    """Part of the tokens where both models find the same next token the most likely."""
    relative_error: float
    """Squared error of the model's outputs (logits, or hidden states), relative to their squares."""


class Comparison:
    """What the rows compared so far say of a compressed model, beside the dense one."""

    def __init__(self) -> None:
        self._tokens, self._predictions, self._divergence, self._agreement = 0.0, 0.0, 0.0, 0.0
        self._nll = [0.0, 0.0]
        self._wrong, self._size = 0.0, 0.0

    def add(self, model: nn.Module, dense: Any, compressed: Any, samples: Samples, row: int) -> None:
        """Add the outputs of both models for one row of ``samples``; ``model`` says what they mean."""
        mains = [main_output(found)[0] for found in (dense, compressed)]
        mains = [m.reshape(-1, m.shape[-1]) for m in mains]
        device = mains[0].device
        predicts = class_logits(model, dense) is not None
        kept = None if samples.output_mask is None else samples.output_mask[row].to(device) > 0
        labels = None if samples.targets is None else samples.targets[row].to(device)
        # Some tokens at a time: these tables are as wide as the vocabulary.
        for start in range(0, mains[0].shape[0], 64):
            part = slice(start, start + 64)
            inside = slice(None) if kept is None else kept[part]
            p, q = (m[part][inside].float() for m in mains)
            self._wrong += (q - p).square().sum().item()
            self._size += p.square().sum().item()
            if not predicts:
                continue
            p, q = p.log_softmax(-1), q.log_softmax(-1)
            self._tokens += p.shape[0]
            self._divergence += (p.exp() * (p - q)).sum().item()
            self._agreement += (p.argmax(-1) == q.argmax(-1)).sum().item()
            if labels is not None:
                wanted = labels[part][inside]
                self._predictions += int((wanted != IGNORE_INDEX).sum().item())
                for i, log in enumerate((p, q)):
                    self._nll[i] += nll_loss(log, wanted, ignore_index=IGNORE_INDEX, reduction="sum").item()

    def fidelity(self, world: World = ALONE) -> dict[str, Any]:
        """What comes of the rows of all processes together."""
        tokens, predictions, divergence, agreement, wrong, size, *nll = world.sums(
            [self._tokens, self._predictions, self._divergence, self._agreement, self._wrong, self._size, *self._nll]
        )
        perplexities = [math.exp(min(n / predictions, 700)) for n in nll] if predictions else [None, None]
        return asdict(
            Fidelity(
                tokens=int(tokens),
                perplexity_before=perplexities[0],
                perplexity_after=perplexities[1],
                divergence=divergence / tokens if tokens else None,
                agreement=agreement / tokens if tokens else None,
                relative_error=wrong / max(size, 1e-30),
            )
        )


def measure_fidelity(
    harness: StackHarness,
    held: list[tuple[Samples, torch.Tensor, torch.Tensor]],
    autocast: torch.dtype | None,
    dense_embeddings: Mapping[str, nn.Module],
    world: World = ALONE,
) -> dict[str, Any]:
    """Compare predictions from the last hidden states (dense, compressed) of each held-out batch.

    Both streams are there already, so this costs what comes after the last stack alone. Perplexities need targets;
    divergence and agreement, a model that puts out scores of classes. ``dense_embeddings`` are the modules outside
    of the blocks, by path, that the model had before it was compressed. Of several processes each brings its own rows,
    and all learn what comes of them together.
    """
    device = next(harness.model.parameters()).device
    found = Comparison()
    with torch.no_grad(), torch.autocast(device.type, autocast, enabled=autocast is not None):
        for samples, dense, compressed in held:
            for row in range(dense.shape[0]):
                one = {k: v[row : row + 1].to(device) for k, v in samples.inputs.items()}
                with swapped_modules(harness.model, dense_embeddings):
                    before = harness.outputs(one, dense[row : row + 1].to(device))
                after = harness.outputs(one, compressed[row : row + 1].to(device))
                found.add(harness.model, before, after, samples, row)
    return found.fidelity(world)


def compare_models(
    dense: nn.Module,
    compressed: nn.Module,
    held: Sequence[Samples],
    autocast: torch.dtype | None,
    world: World = ALONE,
) -> dict[str, Any]:
    """The same as `measure_fidelity`, by running both models."""
    device = next(compressed.parameters()).device
    found = Comparison()
    with torch.no_grad(), torch.autocast(device.type, autocast, enabled=autocast is not None):
        for samples in held:
            for row in range(len(samples)):
                one = {k: v[row : row + 1].to(device) for k, v in samples.inputs.items()}
                found.add(dense, dense(**one), compressed(**one), samples, row)
    return found.fidelity(world)


def measure_costs(
    harness: StackHarness,
    batches: Sequence[Samples],
    dense: Sequence[torch.Tensor],
    variants: Sequence[Sequence[torch.Tensor]],
    autocast: torch.dtype | None,
    world: World = ALONE,
) -> list[float]:
    """How far the predictions of each of several ``variants`` are from the dense model's.

    ``dense`` and each variant are the last hidden states by batch. Twice the divergence, in nats a row; of outputs that
    are no predictions the relative squared error. What follows the last stack is run once for the dense model.
    """
    device = next(harness.model.parameters()).device
    divergence, wrong = ([torch.zeros((), device=device) for _ in variants] for _ in range(2))
    size, predicts = torch.zeros((), device=device), False
    with torch.no_grad(), torch.autocast(device.type, autocast, enabled=autocast is not None):
        for index, samples in enumerate(batches):
            for row in range(len(samples)):
                one = {k: v[row : row + 1].to(device) for k, v in samples.inputs.items()}
                kept = None if samples.output_mask is None else samples.output_mask[row].to(device) > 0

                def output(
                    hidden: torch.Tensor,
                    one: dict[str, torch.Tensor] = one,
                    kept: torch.Tensor | None = kept,
                    row: int = row,
                    of: int = len(samples),
                ) -> tuple[torch.Tensor, bool]:
                    outputs = harness.outputs(one, rows_of(hidden, slice(row, row + 1), of).to(device))
                    found = main_output(outputs)[0]
                    found = found.reshape(-1, found.shape[-1])
                    return found if kept is None else found[kept], class_logits(harness.model, outputs) is not None

                p, predicts = output(dense[index])
                size += p.float().square().sum()
                if predicts:
                    # As wide as the vocabulary, and the same for all variants.
                    p = p.float().log_softmax(-1)
                for i, hidden in enumerate(variants):
                    q, _ = output(hidden[index])
                    # Some tokens at a time: these tables are as wide as the vocabulary.
                    for a, q_part in zip(p.split(64), q.split(64), strict=True):
                        b = q_part.float()
                        if predicts:
                            divergence[i] += (a.exp() * (a - b.log_softmax(-1))).sum()
                        else:
                            wrong[i] += (b - a.float()).square().sum()
    rows = sum(len(samples) for samples in batches)
    sums = [found.item() for found in (divergence if predicts else wrong)]
    *sums, size_of_all, rows_of_all = world.sums([*sums, size.item(), rows])
    return [2 * found / rows_of_all if predicts else found / max(size_of_all, 1e-30) for found in sums]


def predictions_per_row(harness: StackHarness, data: Samples, autocast: torch.dtype | None) -> float | None:
    """How many predictions a row of ``data`` has on average, as `measure_costs` counts; None: the outputs are none."""
    device = next(harness.model.parameters()).device
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        outputs = harness.formal_outputs({k: v[:1].to(device) for k, v in data.inputs.items()})
    logits = class_logits(harness.model, outputs)
    if logits is None or data.output_mask is None:
        return None if logits is None else float(logits.shape[:-1].numel())
    return float((data.output_mask > 0).sum().item()) / len(data)
