"""Perplexity on fixed windows of one text."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lillama_core.data.hashing import rows_sha256
from lillama_core.data.shipped import OFFLINE_TEXT
from lillama_core.data.sources import Source
from lillama_core.data.text.calibration import check_rows, load_text_windows
from lillama_core.data.text.checks import check_evaluation_text
from lillama_core.errors import UserError
from lillama_core.evaluation.base import EvaluationOptions, Measurement, Report, Subject
from lillama_core.evaluation.metrics.batching import sequences_per_batch
from lillama_core.system.processes import ALONE, World

CHUNK = 128
"""Rows of logits whose float32 log-softmax is held at a time."""


@torch.inference_mode()
def window_losses(model: Any, rows: Tensor, device: torch.device, batch: int | None = None) -> Tensor:
    """Mean negative log-likelihood of the next token in every window, in nats.

    ``rows``: token ids [windows, L]; window i is scored on its own, L-1 predictions. ``model``: a causal
    language model in eval mode on ``device``. ``batch``: windows a forward pass; None lets the size of the
    logits decide. Returns float64 [windows] on the CPU.
    """
    windows, length = rows.shape
    batch = batch or sequences_per_batch(model, length, device)
    losses = torch.zeros(windows, dtype=torch.float64)
    for start in range(0, windows, batch):
        ids = rows[start : start + batch].to(device)
        logits = model(input_ids=ids, use_cache=False).logits
        for offset in range(ids.shape[0]):
            for first in range(0, length - 1, CHUNK):
                last = min(first + CHUNK, length - 1)
                loss = functional.cross_entropy(
                    logits[offset, first:last].float(), ids[offset, first + 1 : last + 1], reduction="sum"
                )
                losses[start + offset] += loss.item()
    return losses / (length - 1)


def perplexity(
    model: Any, rows: Tensor, device: torch.device, batch: int | None = None, world: World = ALONE
) -> tuple[float, float]:
    """Perplexity of ``rows`` (token ids [windows, L]) and its standard error.

    The perplexity is exp of the mean of :func:`window_losses`. The standard error treats the windows as
    independent draws and carries the error of that mean through exp (delta method); it is nan for a single
    window. Both are inf or nan when the model's logits are. Of several processes each reads every ``world.size``-th
    window, and all get the same numbers.
    """
    losses = torch.zeros(len(rows), dtype=torch.float64)
    own = window_losses(model, rows[world.rank :: world.size], device, batch)
    for rank, found in enumerate(world.gather(own.tolist())):
        losses[rank :: world.size] = torch.tensor(found, dtype=torch.float64)
    value = losses.mean().exp().item()
    error = value * losses.std().item() / math.sqrt(len(losses)) if len(losses) > 1 else math.nan
    return value, error


class Perplexity:
    """Perplexity on the first ``options.windows`` windows of ``options.data``, or of the text shipped.

    The text is encoded once and cut into windows of ``options.sequence_length`` tokens that follow each other without
    overlap. If the tokenizer begins every text with a token of its own, that token takes the place of the first one of
    each window. No window sees the one before.
    """

    name = "perplexity"
    by_block = shared = True

    def check(self, options: EvaluationOptions) -> None:
        check_evaluation_text(options.data)

    def check_with(self, processor: Any, options: EvaluationOptions) -> None:
        """Raise UserError when the text does not fill one window."""
        if options.data is not None:
            load_text_windows(Source.parse(options.data), processor, options.sequence_length, 1)

    def measure(self, subject: Subject, options: EvaluationOptions, report: Report) -> list[Measurement]:
        """One measurement, on all windows there are when the data have fewer than asked for.

        Raises UserError when a window has fewer than 2 tokens or the data do not fill one window.
        """
        length = options.sequence_length
        if length < 2:
            raise UserError(f"sequence length {length}: perplexity needs windows of at least 2 tokens")
        # The path is not parsed: an "@" in it is not a weight.
        source = Source.parse(options.data) if options.data else Source(str(OFFLINE_TEXT))
        data = source.name
        rows = load_text_windows(source, subject.tokenizer, length, options.windows)
        check_rows(data, rows, subject.model)
        if len(rows) < options.windows:
            report(f"perplexity: {data} has only {len(rows)} windows of {length} tokens; using all")
        report(f"perplexity: {len(rows)} windows of {length} tokens")
        batch = sequences_per_batch(subject.model, length, subject.device, subject.streamed)
        value, error = perplexity(subject.model, rows, subject.device, batch, subject.world)
        if not math.isfinite(value):
            report("perplexity: not a finite number, the model's logits overflow")
        return [
            Measurement(
                name=self.name,
                value=value,
                unit="",
                better="lower",
                meaning="How many equally likely next tokens the model hesitates between on average; "
                f"{len(rows)} windows of {length} tokens.",
                standard_error=error if math.isfinite(error) else None,
                data=rows_sha256(rows),
            )
        ]
