"""Bolaco (arXiv 2405.10616): principal components of the outputs, their number by Bayesian optimisation, no training.

Factors are those of `lillama_benchmarks.baselines.liteasr`: with mu = E[y] and V the leading principal directions of
y = W x, B = V, A = V^T W. Values stay dense. Every other kind of map keeps one fraction of its parameters
in all blocks, queries and keys a common one, between 0.2 and 1, so that a transformer's block has five numbers. A
Gaussian process looks for those that cost least by a small validation set: in each of 50 runs the model is put together
from the slices of the factors and measured. Numbers and bounds are those of the paper's code.

Deviations: the loss is the divergence from the dense model, on rows that are calibrated on; the paper's code adds a
thousandth of it to the perplexity of other text. Each proposal is scaled onto the budget, where the paper's code takes
those that come within a tenth of it. The search begins with equal fractions, and with optuna's Gaussian process in
place of OpenBox's. Ranks are no multiples of 8. The covariance is that of all rows, not the mean of those of groups.
A map without a bias gets none. The paper's training afterwards is left out.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from lillama_core.allocation import AllocationRequest, Allocator, spend_remainder
from lillama_core.allocation.plan import PlannedMap, RankPlan
from lillama_core.architecture.targets.linear_map import kind_of
from lillama_core.errors import UserError
from lillama_core.strategies import StrategyOptions

OPTIONS: Mapping[str, Any] = {"init": "output-pca", "allocation": "bayesian-search", "format": "factored"}

QUERIES, KEYS, VALUES = "q_proj", "k_proj", "v_proj"
"""Last parts of the names of attention's maps; attention that names them otherwise has them searched apart."""
HALVINGS = 60


class BayesianSearchOptions(StrategyOptions):
    """How long is searched, and where."""

    trials: int = Field(50, description="runs of the model, the paper's number", ge=1)
    least: float = Field(0.2, description="smallest of the numbers that are searched, the paper's", gt=0.0, lt=1.0)
    seed: int = Field(0, description="seed of the search", ge=0)


class BayesianSearch(Allocator):
    """One fraction for each kind of map, searched for by running the model; values stay dense."""

    name = "bayesian-search"
    Options = BayesianSearchOptions
    options: BayesianSearchOptions
    needs_spectra = True
    needs_measurements = True

    def allocate(self, request: AllocationRequest) -> RankPlan:
        # It is asked for.
        assert request.measurements is not None
        kinds: dict[str, list[PlannedMap]] = {}
        for map_ in request.maps:
            path, _, name = kind_of(map_.map.name).rpartition(".")
            # A map with a single input or output is no smaller at any rank.
            if name != VALUES and request.largest_rank(map_, map_.dense_parameters - 1):
                shared = f"{path}.{QUERIES}" if name == KEYS else f"{path}.{name}"
                kinds.setdefault(f"{map_.stack}: {shared}", []).append(map_)
        if len(kinds) < 2:
            return self._plan(request, kinds, dict.fromkeys(kinds, 1.0))
        optuna = _optuna()
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            study = optuna.create_study(sampler=optuna.samplers.GPSampler(seed=self.options.seed))
            study.enqueue_trial(dict.fromkeys(kinds, 1.0))
            plans: dict[int, RankPlan] = {}
            for _ in range(self.options.trials):
                trial = study.ask()
                numbers = {kind: trial.suggest_float(kind, self.options.least, 1.0) for kind in kinds}
                plans[trial.number] = self._plan(request, kinds, numbers)
                loss = request.measurements.divergence(plans[trial.number])
                if math.isfinite(loss):
                    study.tell(trial, loss)
                else:
                    study.tell(trial, state=optuna.trial.TrialState.FAIL)
        finally:
            optuna.logging.set_verbosity(verbosity)
        done = [trial for trial in study.trials if trial.value is not None]
        if not done:
            raise UserError(f"{self.name}: no plan of {self.options.trials} gave finite numbers; lower --reduction")
        return plans[min(done, key=lambda trial: (trial.value, trial.number)).number]

    def _plan(
        self, request: AllocationRequest, kinds: Mapping[str, list[PlannedMap]], numbers: Mapping[str, float]
    ) -> RankPlan:
        """Each map of a kind keeps its number, times what is the same for all, of its parameters: the budget in all."""

        def ranks(scale: float) -> dict[str, int]:
            fractions = {m.name: scale * numbers[kind] for kind, maps in kinds.items() for m in maps}
            wanted = {m.name: int(fractions[m.name] * m.dense_parameters) for maps in kinds.values() for m in maps}
            return {
                m.name: max(1, request.largest_rank(m, wanted[m.name]))
                for maps in kinds.values()
                for m in maps
                if wanted[m.name] < m.dense_parameters
            }

        if (least := request.kept(ranks(0.0))) > request.budget.maps_kept:
            raise UserError(
                f"{self.name} keeps {least:,} parameters of the maps at least, {request.budget.maps_kept:,} are"
                " allowed; lower --reduction"
            )
        # At the upper end every map is dense.
        low, high = 0.0, 1 / min(numbers.values()) + 1
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if request.kept(ranks(middle)) <= request.budget.maps_kept else (low, middle)
        order = sorted(kinds, key=lambda kind: -numbers[kind])
        return spend_remainder(request, ranks(low), [m for kind in order for m in kinds[kind]])


def _optuna() -> Any:
    try:
        return importlib.import_module("optuna")
    except ImportError as error:
        raise UserError("bayesian-search needs the library optuna: pip install 'lillama[search]'") from error
