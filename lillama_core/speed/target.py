"""A plan that makes a model so many times as fast: made by prices, built with random weights, measured, made again."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lillama_core.allocation.base import Prices
from lillama_core.allocation.plan import Budget, PlannedMap, RankPlan
from lillama_core.architecture.blocks import Block
from lillama_core.data.workload import Workload
from lillama_core.errors import UserError
from lillama_core.formats.base import Format, empty_linear
from lillama_core.runtime.modules import shared_copy
from lillama_core.speed.comparison import Work, compare_speed
from lillama_core.speed.prices import MapReadings, filled, measure_prices

TOLERANCE = 0.02
"""A plan is taken when the speed that is measured of it is within this part of the one that is asked for."""
MISSED = 0.05
"""Beyond this part below it, after all attempts, the request is refused."""
ATTEMPTS = 5
REPEATS = 11
"""Rounds of the work, in turns with the dense model, by which a plan is judged."""
MOST_REMOVED = 0.98
"""Part of what the maps could give at rank 1 that is asked of them at the most."""

Allocate = Callable[[Budget, Prices], RankPlan]


@dataclass(frozen=True)
class Attempt:
    """One plan, and how many times as fast as the dense model one of its shapes was."""

    plan: RankPlan
    removed: int
    """Nanoseconds that the maps were to take less."""
    speedup: float


def next_removed(speedup: float, attempts: Sequence[Attempt]) -> int:
    """What to ask of the maps next: what is saved is taken to be in proportion to it, by all that was measured so far.

    Least squares through the origin: what other work on the machine does to one measurement moves it less each time. At
    most twice, and at least half, of what was asked for last.
    """
    saved = [1 - 1 / attempt.speedup for attempt in attempts]
    asked = [attempt.removed for attempt in attempts]
    product = sum(s * a for s, a in zip(saved, asked, strict=True))
    wanted = (1 - 1 / speedup) * sum(a * a for a in asked) / product if product > 0 else math.inf
    return int(min(2.0 * asked[-1], max(0.5 * asked[-1], wanted)))


class SpeedPlanner:
    """Plans for one model, piece of work and machine.

    ``model`` is the dense one, in memory; a copy of it in ``dtype`` is held as long as this. ``stood_in_for`` are paths
    of modules in whose place it runs something else, as the copy must not.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        maps: Sequence[PlannedMap],
        format_: Format,
        workload: Workload,
        dtype: torch.dtype,
        stood_in_for: Sequence[str] = (),
    ) -> None:
        self._dense: Any = copy.deepcopy(model)
        for path in stood_in_for:
            # A copy must run for itself, whatever stands in for the block in its model.
            self._dense.get_submodule(path).__dict__.pop("forward", None)
        self._dense.to(dtype).eval().requires_grad_(False)
        self._blocks, self._maps, self._format, self.workload = blocks, maps, format_, workload
        readings = MapReadings(self._dense, blocks)
        with torch.inference_mode():
            workload.run(self._dense, readings)
        device = next(self._dense.parameters()).device
        self._prices = measure_prices(maps, format_, readings.found, dtype, device)
        self._of_maps = sum(self._prices.of(m, None) for m in maps)
        self.dense_seconds = self._timed(self._dense).baseline.median

    def first(self, speedup: float, allocate: Allocate) -> RankPlan:
        """A plan by prices alone."""
        return allocate(self._budget(self._asked(speedup)), self._prices)

    def plan(self, speedup: float, allocate: Allocate, say: Callable[[str], None]) -> Attempt:
        """The plan of ``allocate`` whose shapes are ``speedup`` times as fast, as nearly as a few attempts come to it.

        Raises UserError when none comes near enough.
        """
        removed, attempts = self._asked(speedup), list[Attempt]()
        for _ in range(ATTEMPTS):
            plan = allocate(self._budget(removed), self._prices)
            attempts.append(Attempt(plan, removed, self._timed(self.built(plan)).speed_up[1]))
            say(f"Planned for {speedup:g} times as fast at {self.workload.name}: {attempts[-1].speedup:.2f} measured")
            if abs(attempts[-1].speedup / speedup - 1) <= TOLERANCE:
                break
            following = min(next_removed(speedup, attempts), self._most())
            if following == removed:
                break
            removed = following
        best = min(attempts, key=lambda a: abs(a.speedup / speedup - 1))
        if best.speedup < (1 - MISSED) * speedup:
            raise UserError(
                f"--target-speedup {speedup:g} is not reached at {self.workload.name}: the fastest plan that was tried"
                f" is {max(a.speedup for a in attempts):.2f} times as fast as the dense model; ask for less"
            )
        return best

    def built(self, plan: RankPlan) -> nn.Module:
        """The dense model with random layers of the shapes of ``plan`` in it; it shares all other weights."""
        model = shared_copy(self._dense)
        for block in self._blocks:
            module, ranks, shapes = model.get_submodule(block.path), plan.of(block), plan.shapes_of(block)
            for target in block.targets:
                changed = [m for m in target.maps if m.name in ranks or m.name in shapes]
                layers: dict[str, nn.Module] = {}
                for map_ in changed:
                    weight, bias = target.weight(module, map_), target.bias(module, map_)
                    out, in_ = shapes.get(map_.name, (map_.out_features, map_.in_features))
                    kind = (weight.dtype, str(weight.device))
                    layers[map_.name] = filled(
                        self._format.module(out, in_, ranks[map_.name], bias is not None, *kind)
                        if map_.name in ranks
                        else empty_linear(in_, out, bias is not None, *kind)
                    )
                target.replace(module, layers)
        return model

    def _timed(self, model: nn.Module) -> Work:
        (work,) = compare_speed(model, self._dense, [self.workload], REPEATS, lambda _: None)
        return work

    def _asked(self, speedup: float) -> int:
        return min(int(self.dense_seconds * 1e9 * (1 - 1 / speedup)), self._most())

    def _most(self) -> int:
        least = sum(min(self._prices.of(m, None), self._prices.of(m, 1)) for m in self._maps)
        return int(MOST_REMOVED * (self._of_maps - least))

    def _budget(self, removed: int) -> Budget:
        return Budget(self._of_maps, round(self.dense_seconds * 1e9), removed)
