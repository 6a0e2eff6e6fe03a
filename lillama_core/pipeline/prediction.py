"""What a model is predicted to lose, at its own size or another one, once its maps are decomposed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lillama_core.allocation.plan import RankPlan, describe_plan, make_budget
from lillama_core.errors import UserError
from lillama_core.evaluation.fidelity import predictions_per_row
from lillama_core.pipeline.context import CalibrationRows, Context
from lillama_core.pipeline.spec import CompressionSpec, make_plans
from lillama_core.statistics.loss_calibration import predicted_errors
from lillama_core.statistics.store import DecompositionStore


@dataclass(frozen=True)
class Size:
    """The whole model at one size."""

    reduction: float
    parameters: int
    loss: float
    low_rank: int
    """Maps of low rank."""
    channels: int
    """Nets with fewer channels."""


class Prediction:
    """Losses of the whole model, of untrained maps, in `unit`."""

    def __init__(self, context: Context, store: DecompositionStore, scales: Mapping[str, float]) -> None:
        """``scales``: what the energies of each map count for, by its path, as far as that was measured."""
        self._spec: CompressionSpec = context.spec
        self._allocation, self._store, self._scales = context.recipe.allocation, store, scales
        rows = context.get(CalibrationRows)
        per_row = predictions_per_row(rows.chains[-1][-1], rows.data, context.autocast)
        # Costs are twice the divergence of a row.
        self.factor = 1.0 if per_row is None else 1 / (2 * per_row)
        """From a cost as it is measured to `unit`."""
        self.unit = "relative error of the outputs" if per_row is None else "nats a prediction"
        typical = math.exp(sum(map(math.log, scales.values())) / len(scales)) if scales else 1.0
        self.factors = {name: scales.get(name, typical) * self.factor for name in _names(self._spec)}
        """From left-out energies of a map, or of channels, to `unit`, by its path."""

    def of(self, plan: RankPlan) -> float:
        """What is lost by ``plan``."""
        total = 0.0
        for block in self._spec.all_blocks:
            ranks = {**plan.of(block), **plan.channels_of(block)}
            if ranks:
                lost = predicted_errors(self._store.spectra(block), self._store.curves(block), block.channels, ranks)
                total += sum(value * self.factors[block.path_of(name)] for name, value in lost.items())
        return total

    def sizes(self, reductions: Sequence[float]) -> list[Size]:
        """The model without each of ``reductions``, parts of its parameters in rising order, as far as it can be."""
        spec, found = self._spec, list[Size]()
        budgets = (make_budget(spec.maps, spec.budget.reference, r, spec.format) for r in reductions)
        plans = make_plans(spec, self._allocation, self._store, self._scales, budgets)
        # The first size that cannot be met ends it.
        with contextlib.suppress(UserError):
            for reduction, plan in zip(reductions, plans, strict=False):
                after = describe_plan(spec.maps, plan, spec.format, spec.total_parameters, 1)["parameters_after"]
                found.append(Size(reduction, after, self.of(plan), len(plan.ranks), len(plan.channels)))
        return found


def _names(spec: CompressionSpec) -> list[str]:
    """Of all maps, and of all channels that may be taken out."""
    return [b.path_of(n) for b in spec.all_blocks for n in [*(m.name for m in b.maps), *(c.name for c in b.channels)]]
