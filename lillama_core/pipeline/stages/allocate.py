"""Allocate: choose the rank of every map, after predicted losses have been set against measured ones."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from pydantic import Field
from torch import nn

from lillama_core.allocation.plan import RankPlan, describe_plan
from lillama_core.architecture.blocks import Block
from lillama_core.data.split import CalibrationSplit
from lillama_core.distillation.finished_blocks import FinishedBlocks
from lillama_core.pipeline.context import Context, DenseModel, Statistics
from lillama_core.pipeline.spec import make_plan
from lillama_core.pipeline.stage import Stage
from lillama_core.pipeline.stages.statistics import ROWS_PER_BATCH
from lillama_core.statistics.loss_calibration import (
    Ablation,
    Ranks,
    kinds_of,
    measure_scales,
    parts_of,
    truncation_error,
)
from lillama_core.strategies import ChosenStrategies, StrategyOptions, make
from lillama_core.system.files import read_json, write_json
from lillama_core.system.memory import release_memory


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
    reads = (DenseModel, CalibrationSplit, Statistics)
    gives = (RankPlan,)

    def unread_options(self, chosen: ChosenStrategies) -> Mapping[str, str]:
        spectra = getattr(chosen.allocation, "needs_spectra", False) and getattr(chosen.init, "needs_gradients", False)
        if chosen.recipe.rescaling_tokens and spectra:
            return {}
        return {"parts": "no losses are measured before ranks are shared out"}

    def found(self, context: Context) -> str | None:
        return "measured losses" if (context.directory.store / "scales.json").is_file() else None

    def run(self, context: Context) -> None:
        spec, recipe, record = context.spec, context.recipe, context.record
        store = context.get(Statistics).store
        plan = make_plan(spec, recipe.allocation, store)
        allocator = make("allocators", recipe.allocation)
        if allocator.needs_spectra and context.initializer.needs_gradients and recipe.rescaling_tokens:
            path = context.directory.store / "scales.json"
            if not path.is_file():
                write_json(path, self._measure_losses(context, plan))
                release_memory()
            # Read back: a resumed run has to come to the same ranks.
            record.scales = read_json(path)
            plan = make_plan(spec, recipe.allocation, store, record.scales)
        record.plan = {"format": plan.format, "ranks": dict(plan.ranks)}
        record.shapes = {m.name: [m.map.out_features, m.map.in_features] for m in spec.maps}
        bytes_per_parameter = context.get(DenseModel).dtype.itemsize
        record.parameters = describe_plan(spec.maps, plan, spec.format, spec.total_parameters, bytes_per_parameter)
        context.progress.line(
            f"Plan: {len(plan.ranks)} of {len(spec.maps)} maps low rank,"
            f" {record.parameters['parameters_before']:,} -> {record.parameters['parameters_after']:,} parameters"
        )
        context.put(plan)

    def _measure_losses(self, context: Context, plan: RankPlan) -> dict[str, float]:
        """What the predicted loss of each map counts for, measured on some of the rows that are fitted to."""
        dense, found = context.get(DenseModel), context.get(Statistics)
        rows = context.get(CalibrationSplit).rows_for(context.recipe.rescaling_tokens, context.given_tokens)
        small = found.activations.first_rows(rows, ROWS_PER_BATCH, context.device)
        ranks = {
            name: {block.name: r for block in harness.blocks if (r := plan.of(block))}
            for name, harness in dense.chosen.items()
        }
        parts = self.options.parts
        steps = sum(len(parts_of(dense.chosen[n].blocks, parts)) + len(kinds_of(r)) for n, r in ranks.items())
        context.progress.phase("Measuring what each part costs", steps)
        finished = context.finished_blocks(dense)
        scales: dict[str, float] = {}
        for name, harness in dense.chosen.items():
            low_rank = functools.partial(_low_rank, dense, finished, found, context)
            ablation = Ablation(harness, dense.source, small.record(harness), low_rank)
            left_out = {
                block.name: truncation_error(found.store.load(block)[0], ranks[name].get(block.name, {}))
                for block in harness.blocks
            }
            scales |= measure_scales(ablation, ranks[name], left_out, parts, context.progress.step)
        return scales


def _low_rank(
    dense: DenseModel, finished: FinishedBlocks, found: Statistics, context: Context, block: Block, ranks: Ranks
) -> nn.Module:
    """``block`` with untrained factors of these ranks."""
    module = dense.source.block(block)
    finished.factor(block, module, ranks, found.store.load(block, ranks)[0])
    return module.to(context.device).eval()
