"""Allocate: choose the rank of every map, after predicted losses have been set against measured ones."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from lillama_core.allocation.plan import RankPlan, describe_plan
from lillama_core.data.split import CalibrationSplit
from lillama_core.pipeline.context import CalibrationRows, Context, DenseModel, Statistics
from lillama_core.pipeline.measuring import UntrainedBlocks, measured_rows
from lillama_core.pipeline.planning import Planner
from lillama_core.pipeline.prediction import Prediction
from lillama_core.pipeline.stage import Stage
from lillama_core.statistics.loss_calibration import Ablation, StackErrors, predicted_errors
from lillama_core.strategies import ChosenStrategies, StrategyOptions, make
from lillama_core.system.files import read_json, write_json
from lillama_core.system.memory import release_memory

REDUCTIONS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
"""Parts of the parameters at which the report shows what would have been lost, as far as the maps can give them."""


class AllocateOptions(StrategyOptions):
    """How predicted losses are set against measured ones."""

    parts: int = Field(
        default=10,
        description="runs of consecutive blocks of a stack whose loss is measured apart, each a forward pass of some"
        " rows; ten are three blocks each in a model of thirty, not swept since",
        ge=1,
    )


class AllocateStage(Stage):
    """Let the allocator share out ranks within the budget; where spectra decide, scale them by measured losses."""

    name = "ranks"
    Options = AllocateOptions
    options: AllocateOptions
    reads = (DenseModel, CalibrationRows, CalibrationSplit, Statistics)
    gives = (RankPlan,)

    def unread_options(self, chosen: ChosenStrategies) -> Mapping[str, str]:
        spectra = getattr(chosen.allocation, "needs_spectra", False) and getattr(chosen.init, "needs_gradients", False)
        if chosen.recipe.rescaling_tokens and spectra:
            return {}
        return {"parts": "no losses are measured before ranks are shared out"}

    def found(self, context: Context) -> str | None:
        there = [(context.directory.store / name).is_file() for name in ("scales.json", "measured.json")]
        return "measured losses" if any(there) else None

    def run(self, context: Context) -> None:
        spec, recipe, record = context.spec, context.recipe, context.record
        store = context.get(Statistics).store
        planner = Planner(context, store)
        allocator = make("allocators", recipe.allocation)
        predicts = allocator.needs_spectra and context.initializer.needs_gradients
        if predicts and recipe.rescaling_tokens:
            path = context.directory.store / "scales.json"
            if not context.world.from_main(path.is_file):
                measured = self._measure_losses(context, planner.first())
                if context.world.is_main:
                    write_json(path, measured)
                release_memory()
            # Read back: a resumed run has to come to the same ranks.
            found = context.world.from_main(lambda: read_json(path))
            record.scales, record.losses["parts"] = found["scales"], found["parts"]
        plan = planner.final(record.scales)
        # One that runs the model for its plan is not asked for plans of other sizes.
        if predicts and context.world.is_main and not getattr(allocator, "needs_measurements", False):
            prediction = Prediction(context, store, record.scales)
            record.losses["unit"], record.losses["predicted"] = prediction.unit, prediction.of(plan)
            record.losses["sizes"] = [[s.reduction, s.loss] for s in prediction.sizes(REDUCTIONS)]
        record.plan = {"format": plan.format, "ranks": dict(plan.ranks), "channels": dict(plan.channels)}
        record.plan["shapes"] = {
            b.path_of(name): list(shape) for b in spec.all_blocks for name, shape in plan.shapes_of(b).items()
        }
        if planner.measured is not None:
            record.plan["speed"] = planner.measured
        record.shapes = {m.name: [m.map.out_features, m.map.in_features] for m in spec.maps}
        bytes_per_parameter = context.get(DenseModel).dtype.itemsize
        record.parameters = describe_plan(spec.maps, plan, spec.format, spec.total_parameters, bytes_per_parameter)
        context.progress.line(
            f"Plan: {len(plan.ranks)} of {len(spec.maps)} maps low rank,"
            + (f" {len(plan.channels)} nets with fewer channels," if plan.channels else "")
            + f" {record.parameters['parameters_before']:,} -> {record.parameters['parameters_after']:,} parameters"
        )
        context.put(plan)

    def _measure_losses(self, context: Context, plan: RankPlan) -> dict[str, Any]:
        """What the predicted loss of each map counts for, measured on some of the rows that are fitted to.

        ``scales`` by the paths of maps, and ``parts``: for each part of the model that was measured its name, and what
        it was predicted to lose and lost.
        """
        dense, store, parts = context.get(DenseModel), context.get(Statistics).store, self.options.parts
        compressed = UntrainedBlocks(plan, store, context.initializer, context.recipe.seed)
        scales: dict[str, float] = {}
        table: list[list[Any]] = []
        factor = Prediction(context, store, {}).factor
        for chain in context.get(CalibrationRows).chains:
            small = measured_rows(context)
            context.progress.phase("Measuring what each part costs", sum(len(h.blocks) for h in chain))
            errors = []
            for harness in (h for h in chain if h.stack in dense.chosen):
                ranks = {b.name: r for b in harness.blocks if (r := {**plan.of(b), **plan.channels_of(b)})}
                left_out = {
                    b.name: functools.partial(predicted_errors, store.spectra(b), store.curves(b), b.channels)
                    for b in harness.blocks
                    if b.name in ranks
                }
                errors.append(StackErrors(harness.blocks, ranks, left_out))
            variants = [found.variants(parts) for found in errors]
            ablation = Ablation(chain, dense.source, small, compressed, context.progress, context.world)
            costs = iter(ablation.costs([variant for of_stack in variants for variant in of_stack]))
            for found, of_stack in zip(errors, variants, strict=True):
                measured = [next(costs) for _ in of_stack]
                scales |= found.scales(parts, measured)
                table += [
                    [variant.name, factor * predicted, factor * cost]
                    for variant, predicted, cost in zip(of_stack, found.predicted(parts), measured, strict=True)
                ]
        return {"scales": scales, "parts": table}
