"""The plans of a run: within a number of parameters, or for a speed that is measured."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from lillama_core.allocation.base import Prices
from lillama_core.allocation.plan import Budget, RankPlan
from lillama_core.data.modality import Modality
from lillama_core.data.workload import Workload, WorkloadOptions
from lillama_core.errors import UserError, nearest
from lillama_core.pipeline.context import Context, DenseModel
from lillama_core.pipeline.measuring import ModelMeasurements
from lillama_core.pipeline.spec import make_plan
from lillama_core.speed.target import SpeedPlanner
from lillama_core.statistics.store import DecompositionStore
from lillama_core.strategies import make as make_strategy
from lillama_core.system.files import read_json, write_json

LENGTH = 512
"""Tokens of a prompt that is to be read faster."""


class Planner:
    """Makes plans of one run. Of several processes the main one speaks for all: a last bit may decide a tie."""

    def __init__(self, context: Context, store: DecompositionStore) -> None:
        self._context, self._store = context, store
        self._speed: SpeedPlanner | None = None
        measures = getattr(make_strategy("allocators", context.recipe.allocation), "needs_measurements", False)
        # Of plans for a speed each process would time others.
        alike = context.recipe.target_speedup is None
        self._measurements = ModelMeasurements(context) if measures and alike else None
        self.measured: dict[str, Any] | None = None
        """How many times as fast as the dense model a model of the final shapes was, where a speed is asked for."""

    def first(self) -> RankPlan:
        """What losses are measured with, before they are known."""
        target = self._context.recipe.target_speedup

        def make() -> RankPlan:
            return self._within() if target is None else self._planner().first(target, self._within)

        return self._agreed(make)

    def final(self, scales: Mapping[str, float] = MappingProxyType({})) -> RankPlan:
        """The plan of the run; where a speed is asked for, a resumed run keeps the one that was measured.

        Raises UserError when that speed is not reached.
        """
        target, context = self._context.recipe.target_speedup, self._context
        if target is None:
            return self._agreed(lambda: self._within(scales=scales))
        path = context.directory.store / "speed.json"

        def make() -> RankPlan:
            planner = self._planner()
            best = planner.plan(target, lambda b, p: self._within(b, p, scales), context.progress.line)
            plan = {"format": best.plan.format, "ranks": dict(best.plan.ranks), "channels": dict(best.plan.channels)}
            measured = {
                "asked": target,
                "measured": round(best.speedup, 4),
                "work": planner.workload.name,
                "dtype": str(speed_dtype(context)).removeprefix("torch."),
                "threads": torch.get_num_threads(),
                "dense_seconds": round(planner.dense_seconds, 6),
            }
            write_json(path, {"plan": plan, "speed": measured})
            return best.plan

        if not context.world.from_main(path.is_file):
            self._agreed(make)
        # A resumed run has to come to the same ranks, and measures nothing anew.
        found = context.world.from_main(lambda: read_json(path))
        self.measured = found["speed"]
        self._speed = None
        return RankPlan(**found["plan"])

    def _within(
        self,
        budget: Budget | None = None,
        prices: Prices | None = None,
        scales: Mapping[str, float] = MappingProxyType({}),
    ) -> RankPlan:
        context = self._context
        return make_plan(
            context.spec, context.recipe.allocation, self._store, scales, budget, prices, self._measurements
        )

    def _agreed(self, make: Any) -> RankPlan:
        def plain() -> dict[str, Any]:
            found = make()
            return {"format": found.format, "ranks": dict(found.ranks), "channels": dict(found.channels)}

        if self._measurements is not None:
            # All processes run the model, each on its own rows, and see the same numbers.
            mine = plain()
            return RankPlan(**self._context.world.from_main(lambda: mine))
        return RankPlan(**self._context.world.from_main(plain))

    def _planner(self) -> SpeedPlanner:
        if self._speed is None:
            context, spec = self._context, self._context.spec
            workload = speed_workload(context.modality, spec.config, context.recipe.speedup_work)
            context.progress.line(f"Timing layers for {workload.name}")
            self._speed = SpeedPlanner(
                context.get(DenseModel).model,
                [block for of_stack in spec.blocks.values() for block in of_stack],
                spec.maps,
                spec.format,
                workload,
                speed_dtype(context),
                [block.path for harness in context.get(DenseModel).stacks for block in harness.blocks],
            )
        return self._speed


def speed_workload(modality: Modality, config: Any, asked: str | None) -> Workload:
    """The work that is to become faster: the first that models of this kind do, or the one whose name has ``asked``.

    Raises UserError for a name that no work has.
    """
    works = modality.workloads(config, WorkloadOptions(lengths=(LENGTH,)))
    if asked is None:
        return works[0]
    for work in works:
        if asked.lower() in work.name.lower():
            return work
    names = [work.name for work in works]
    raise UserError(f"--speedup-work {asked!r} is none of: {', '.join(names)}{nearest(asked, names)}")


def speed_dtype(context: Context) -> torch.dtype:
    """The dtype that speed is measured in: that of the saved weights, but no half precision that a CPU emulates."""
    dtype = context.get(DenseModel).dtype
    return torch.float32 if context.device.type == "cpu" and dtype == torch.float16 else dtype
