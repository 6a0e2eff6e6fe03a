"""Models at the same work in turns, by the clock: whatever slows the machine down slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from lillama_core.data.workload import Meter

T = TypeVar("T")
Round = Callable[[Any, Meter], None]
"""What each model does in a round; the meter is told when what counts begins and ends."""


class Clock:
    """Seconds between begin and end; work that a device is handed over is waited for."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._device = device
        self._started = 0.0

    def begin(self) -> None:
        self._wait()
        self._started = time.perf_counter()

    def end(self) -> None:
        self._wait()
        self.seconds = time.perf_counter() - self._started

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elif self._device.type == "mps":
            torch.mps.synchronize()


@torch.inference_mode()
def in_turns(
    models: Sequence[Any], rounds: Iterable[Round], device: torch.device, step: Callable[[], None] = lambda: None
) -> list[list[float]]:
    """Let each of ``models``, in eval mode on ``device``, do every round, one after the other.

    Who begins changes from round to round. ``step`` is called after each. Returns the seconds of every round, by model.
    """
    clock = Clock(device)
    seconds: list[list[float]] = [[] for _ in models]
    for number, round_ in enumerate(rounds):
        order = list(range(len(models)))
        for which in order if number % 2 else reversed(order):
            round_(models[which], clock)
            seconds[which].append(clock.seconds)
        step()
    return seconds


def repeated(round_: T, least: int, most: int, seconds: float) -> Iterator[T]:
    """``round_`` again and again: ``least`` times, and more while ``seconds`` are not over, up to ``most`` times."""
    until = time.monotonic() + seconds
    for number in range(most):
        if number >= least and time.monotonic() > until:
            return
        yield round_


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile of at least one number."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
