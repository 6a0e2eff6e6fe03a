"""What maps cost in time on this machine: a few layers of their sizes are timed, and lines laid through that.

A matrix product takes a time that grows with its multiply-adds, with the rows and columns that are read and written,
and has a cost of its own; a low-rank layer is two such products and what stands between them. So the time of a layer is
fitted by a linear function of these numbers with coefficients of 0 or more (least squares of the relative errors), for
each number of rows that the model feeds its maps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import nn

from lillama_core.allocation.plan import PlannedMap
from lillama_core.architecture.blocks import Block
from lillama_core.architecture.targets.linear_map import TargetLinear
from lillama_core.evaluation.turns import Clock
from lillama_core.formats.base import Format, LowRankLinear, empty_linear

SIZES = (1.0, 0.75, 0.5)
"""Parts of a map's rows, and of its columns, at which a dense layer is timed: channels may be taken out."""
RANKS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
"""Parts of the smaller side of a map at which a low-rank layer is timed; more than that saves too little to be used."""
ROUNDS = 9
"""Calls that are timed of each layer, of which the median counts, unless `SECONDS` are over."""
SECONDS = 0.5
"""Time for one layer."""


@dataclass
class Reading:
    """How often a map is called in a piece of work, and on how many rows in all."""

    calls: int = 0
    rows: int = 0

    @property
    def rows_per_call(self) -> int:
        """The power of two that is nearest: routed experts see another number each time."""
        return 0 if not self.rows else int(2 ** round(np.log2(max(1.0, self.rows / self.calls))))


@dataclass
class MapReadings:
    """A meter that counts, between begin and end, what each map of some blocks reads."""

    model: nn.Module
    blocks: Sequence[Block]
    found: dict[str, Reading] = field(default_factory=dict)
    _open: ExitStack = field(default_factory=ExitStack)

    def begin(self) -> None:
        self.found.clear()
        for block in self.blocks:
            for target in block.targets:
                names = {m.name: block.full_name(m) for m in target.maps}
                self.found |= {name: Reading() for name in names.values()}
                self._open.enter_context(self._observed(target, self.model.get_submodule(block.path), names))

    def _observed(self, target: Any, module: nn.Module, names: Mapping[str, str]) -> Any:
        def note(map_: TargetLinear, rows: torch.Tensor) -> None:
            reading = self.found[names[map_.name]]
            reading.calls += 1
            reading.rows += rows[..., 0].numel()

        return target.observe(module, on_input=note)

    def end(self) -> None:
        self._open.close()


@dataclass(frozen=True)
class MeasuredTime:
    """Prices of maps in nanoseconds of a piece of work: `lillama_core.allocation.base.Prices`."""

    format: Format
    readings: Mapping[str, Reading]
    """By the names of maps; one that is not named is never called."""
    dense: Mapping[int, np.ndarray]
    """Rows of a call -> coefficients of `dense_features`, in nanoseconds."""
    low_rank: Mapping[int, np.ndarray]
    """Likewise of `low_rank_features`."""
    unit: str = "nanoseconds"

    def of(self, map_: PlannedMap, rank: int | None) -> int:
        reading = self.readings.get(map_.name)
        if reading is None or not reading.rows:
            return 0
        sizes, rows = (map_.map.out_features, map_.map.in_features), reading.rows_per_call
        if rank is None:
            call = float(dense_features(*sizes) @ self.dense[rows])
        else:
            call = float(low_rank_features(self.format, *sizes, rank) @ self.low_rank[rows])
        return round(call * reading.rows / rows)


def dense_features(out_features: int, in_features: int) -> np.ndarray:
    """What the time of a dense layer is linear in [3]: once, multiply-adds a row, numbers read and written a row."""
    return np.array([1.0, out_features * in_features, out_features + in_features])


def low_rank_features(format_: Format, out_features: int, in_features: int, rank: int) -> np.ndarray:
    """What the time of a low-rank layer is linear in [4]: as of a dense one, and the numbers between its products."""
    return np.array([1.0, format_.parameters(out_features, in_features, rank), out_features + in_features, rank])


def measure_prices(
    maps: Sequence[PlannedMap],
    format_: Format,
    readings: Mapping[str, Reading],
    dtype: torch.dtype,
    device: torch.device,
) -> MeasuredTime:
    """Time layers of the sizes of ``maps``, on as many rows as ``readings`` say."""
    read = {m.name: readings[m.name].rows_per_call for m in maps if m.name in readings and readings[m.name].rows}
    kinds = sorted({(read[m.name], m.map.out_features, m.map.in_features) for m in maps if m.name in read})
    dense: dict[int, list[tuple[np.ndarray, float]]] = {}
    low_rank: dict[int, list[tuple[np.ndarray, float]]] = {}
    for rows, out, in_ in kinds:
        x = torch.randn(1, rows, in_, device=device).to(dtype)
        sizes = {(max(1, int(out * part)), in_) for part in SIZES} | {(out, max(1, int(in_ * part))) for part in SIZES}
        for size in sorted(sizes):
            layer = filled(empty_linear(size[1], size[0], False, dtype, str(device)))
            dense.setdefault(rows, []).append(
                (dense_features(*size), seconds_of(layer, x[..., : size[1]].contiguous()))
            )
        for rank in sorted({max(1, int(min(out, in_) * part)) for part in RANKS}):
            layer = filled(format_.module(out, in_, rank, False, dtype, str(device)))
            low_rank.setdefault(rows, []).append((low_rank_features(format_, out, in_, rank), seconds_of(layer, x)))
    return MeasuredTime(
        format_,
        readings,
        {rows: fitted(found) for rows, found in dense.items()},
        {rows: fitted(found) for rows, found in low_rank.items()},
    )


def fitted(found: Sequence[tuple[np.ndarray, float]]) -> np.ndarray:
    """The coefficients of 0 or more, in nanoseconds, whose linear function is nearest to some seconds, relatively."""
    features = np.stack([of / seconds for of, seconds in found]) / 1e9
    # The features are of very different sizes.
    scale = np.linalg.norm(features, axis=0)
    scale[scale == 0] = 1.0
    solution, _ = nnls(features / scale, np.ones(len(found)))
    return np.asarray(solution / scale)


@torch.inference_mode()
def seconds_of(layer: nn.Module, x: torch.Tensor) -> float:
    """The median of what some calls of ``layer`` on ``x`` take."""
    clock, found = Clock(x.device), list[float]()
    layer(x)
    until = time.monotonic() + SECONDS
    while len(found) < ROUNDS and (len(found) < 3 or time.monotonic() < until):
        clock.begin()
        layer(x)
        clock.end()
        found.append(clock.seconds)
    return max(statistics.median(found), 1e-9)


def filled(layer: nn.Module) -> nn.Module:
    """``layer`` with small random numbers in place of what was in memory, and orders that are some order."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    for module in layer.modules():
        if isinstance(module, LowRankLinear):
            for name in module.orders:
                order = getattr(module, name)
                order.copy_(torch.randperm(order.numel(), device=order.device).to(order.dtype))
    return layer.requires_grad_(False).eval()
