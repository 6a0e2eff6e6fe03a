"""Two models at the same work in turns, so that whatever slows the machine down slows both."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from lillama_core.data.workload import Workload
from lillama_core.evaluation.metrics.decoding import memory_bytes
from lillama_core.evaluation.turns import in_turns, quartiles
from lillama_core.speed.meters import Arithmetic, TensorMemory
from lillama_core.system.tables import aligned

WARM_UP = 2
"""Rounds that do not count: kernels are compiled, memory is asked for."""


@dataclass(frozen=True)
class Timed:
    """What one kind of work took one model."""

    seconds: list[float]
    """Of every round."""
    multiply_adds: int
    """Of matrix products, convolutions and attention in one run."""
    products: int
    """How many of these operators one run calls."""
    peak_bytes: int
    """What the weights take, and the most that other tensors took at once."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Work:
    """One kind of work, and what it took."""

    name: str
    unit: str
    amount: float
    """Units that a run works on."""
    model: Timed
    baseline: Timed

    @property
    def speed_up(self) -> tuple[float, float, float]:
        """How many times as fast as the baseline the model is: lower quartile, median and upper one of the rounds."""
        return quartiles([b / m for b, m in zip(self.baseline.seconds, self.model.seconds, strict=True)])

    @property
    def promised(self) -> float:
        """How many times as fast it would be if time were multiply-adds."""
        return self.baseline.multiply_adds / max(1, self.model.multiply_adds)

    @property
    def verdict(self) -> str:
        """The comparison in words, with what was counted where it falls short."""
        low, middle, high = self.speed_up
        spread = f"{_ratio(low)} to {_ratio(high)}"
        if low > 1:
            said = f"{self.name}: {_ratio(middle)} times as fast ({spread})"
        elif high < 1:
            said = f"{self.name}: slower, {_ratio(middle)} times as fast ({spread})"
        else:
            said = f"{self.name}: not faster, {_ratio(middle)} times as fast ({spread})"
        said += f"; the arithmetic promises {_ratio(self.promised)}"
        own, other = self.model.products, self.baseline.products
        if middle < 0.95 * self.promised and own > other:
            said += f", but the same work is {own:,} smaller products instead of {other:,}"
        return said

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        low, middle, high = self.speed_up
        derived = {"speed_up": middle, "speed_up_quartiles": [low, high], "promised": self.promised}
        return {**asdict(self), **derived, "verdict": self.verdict}


@dataclass(frozen=True)
class Bench:
    """A comparison of two models."""

    model: str
    baseline: str
    dtype: str
    device: str
    threads: int
    weights: tuple[int, int]
    """Bytes of parameters and buffers in memory, of the model and of the baseline."""
    works: list[Work] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return {**asdict(self), "works": [work.to_dict() for work in self.works]}

    def __str__(self) -> str:
        rows = [["", "baseline", "model", "model / baseline", "middle half", "arithmetic"]]
        for work in self.works:
            low, middle, high = work.speed_up
            baseline, model = (f"{work.amount / t.median:,.1f}" for t in (work.baseline, work.model))
            numbers = [_ratio(middle), f"{_ratio(low)} to {_ratio(high)}", _ratio(work.promised)]
            rows.append([f"{work.name}, {work.unit}/s", baseline, model, *numbers])
        own, other = self.weights
        rows.append(_megabytes("weights in memory, MB", other, own))
        for work in self.works:
            rows.append(_megabytes(f"peak, {work.name}, MB", work.baseline.peak_bytes, work.model.peak_bytes))
        head = f"model {self.model}, baseline {self.baseline}; {self.dtype}, {self.device}, threads: {self.threads}"
        return "\n".join([head, "", *aligned(rows), "", *(w.verdict for w in self.works)])

    __repr__ = __str__


def _megabytes(name: str, baseline: int, model: int) -> list[str]:
    return [name, f"{baseline / 1e6:,.1f}", f"{model / 1e6:,.1f}", _ratio(model / max(1, baseline)), "", ""]


def _ratio(value: float) -> str:
    return f"{value:.2f}"


@torch.inference_mode()
def compare_speed(
    model: Any, baseline: Any, workloads: Sequence[Workload], repeats: int, step: Callable[[str], None]
) -> list[Work]:
    """Let both models do every workload ``repeats`` times in turns; ``step`` is called after each round.

    Who begins changes from round to round. Both are in eval mode on one device.
    """
    found = []
    for workload in workloads:
        rounds = [workload.run] * (WARM_UP + repeats)
        times = in_turns((model, baseline), rounds, model.device, partial(step, workload.name))
        own, other = (_timed(m, workload, t[WARM_UP:]) for m, t in zip((model, baseline), times, strict=True))
        found.append(Work(workload.name, workload.unit, workload.amount, own, other))
    return found


def _timed(model: Any, workload: Workload, seconds: list[float]) -> Timed:
    arithmetic, memory = Arithmetic(), TensorMemory()
    workload.run(model, arithmetic)
    workload.run(model, memory)
    return Timed(seconds, arithmetic.multiply_adds, arithmetic.products, memory_bytes(model) + memory.bytes)
