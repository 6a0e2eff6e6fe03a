"""What a model does while its speed is measured: each modality knows what models are used for that are fed it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

SHORT_PROMPT = 64
"""Tokens before those that are written while decoding is measured."""


class Meter(Protocol):
    """Measures what happens between two calls: time, arithmetic, memory."""

    def begin(self) -> None:
        """Called when what counts begins."""

    def end(self) -> None:
        """Called when it is over."""


@dataclass(frozen=True)
class Workload:
    """One thing that a model is asked to do, always the same."""

    name: str
    """For people, in the plural: ``prompts of 512 tokens``."""
    unit: str
    """What is counted: ``tokens``, ``seconds of sound``."""
    amount: float
    """How many of them one run works on, in all rows."""
    run: Callable[[Any, Meter], None]
    """Let a model, in eval mode and without gradients, do it once; the meter is told when what counts begins and ends.
    """


@dataclass(frozen=True)
class WorkloadOptions:
    """What the user may choose of the work."""

    lengths: tuple[int, ...] = (128, 512)
    """Tokens of a prompt."""
    new_tokens: int = 32
    """Tokens that are written while decoding is measured."""
    batch_sizes: tuple[int, ...] = (1,)


def in_batches(name: str, rows: int) -> str:
    """``name``, and how many rows are worked on at once where it is more than one."""
    return name if rows == 1 else f"{name}, {rows} at once"


class _Ticks:
    """A stopping criterion of ``generate`` that stops nothing: it calls ``tick`` with each new token's number."""

    def __init__(self, tick: Callable[[int], None]) -> None:
        self._tick, self._count = tick, 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._count += 1
        self._tick(self._count)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def generate(model: Any, inputs: dict[str, torch.Tensor], new_tokens: int, tick: Callable[[int], None]) -> None:
    """Write exactly ``new_tokens`` tokens, greedily; ``tick`` hears the number of each when it is there, from 1 on."""
    model.generate(
        **inputs,
        do_sample=False,
        num_beams=1,
        max_new_tokens=new_tokens,
        # An end of text in between would make runs of different models incomparable.
        min_new_tokens=new_tokens,
        pad_token_id=0,
        stopping_criteria=[_Ticks(tick)],
    )


def reading(model: Any, inputs: dict[str, torch.Tensor], meter: Meter) -> None:
    """Measure what it takes until the first token is there."""
    meter.begin()
    generate(model, inputs, 1, lambda count: meter.end())


def decoding(model: Any, inputs: dict[str, torch.Tensor], new_tokens: int, meter: Meter) -> None:
    """Measure what it takes from the first new token to the last of ``new_tokens``, with the cache."""

    def tick(count: int) -> None:
        if count == 1:
            meter.begin()
        elif count == new_tokens:
            meter.end()

    generate(model, inputs, new_tokens, tick)


def forward(model: Any, inputs: dict[str, torch.Tensor], meter: Meter) -> None:
    """Measure one forward pass."""
    meter.begin()
    model(**inputs)
    meter.end()


def placed(inputs: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """``inputs`` where the model is, with real numbers in its dtype."""
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }
