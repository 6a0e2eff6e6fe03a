"""D-Rank (arXiv 2509.25622): ranks by the effective rank of every map's whitened spectrum, no training.

With p_i = sigma_i^2 / sum sigma^2 of the whitened W, R = exp(-sum p_i log p_i) (equations 1 and 2). The maps of one
kind, such as the queries of all blocks, keep a budget T together, and map g has omega_g = m + n parameters a rank.
Minimising sum R_g / k_g subject to sum k_g omega_g = T gives k_g = T sqrt(R_g / omega_g) / sum_j sqrt(R_j omega_j)
(equations 3 and 7). Queries and keys then give the part beta of their ranks to the values, in equal shares (equations 9
to 12). Every map is a group of its own, as the paper has it for grouped-query attention (section 3.4). Factors are
those of SVD-LLM.

Deviations: what queries and keys give is counted in parameters, as in the paper's code for grouped-query attention; in
multi-head attention that is the same. No map gets more parameters than the dense one, which is better: what equation 7
gives beyond goes to the others of the kind, and what the values cannot take goes back. The paper's code, but not the
paper, keeps uniform ranks for kinds of which the truncation error would rise. Weights are not updated on the inputs of
the compressed model, as the paper does from 40 % on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field

from lillama_benchmarks.baselines.svd_llm import WHITENED
from lillama_core.allocation import AllocationRequest, Allocator, Spectrum, spend_remainder
from lillama_core.allocation.plan import PlannedMap, RankPlan
from lillama_core.architecture.targets.linear_map import kind_of
from lillama_core.errors import UserError
from lillama_core.strategies import StrategyOptions

OPTIONS: Mapping[str, Any] = {"init": WHITENED, "allocation": "effective-rank", "format": "factored"}

GIVING, TAKING = ("q_proj", "k_proj"), "v_proj"
"""Last parts of the names of queries and keys, and of values; attention that names them otherwise is not rebalanced."""
HALVINGS = 100


class EffectiveRankOptions(StrategyOptions):
    """What is moved after the allocation."""

    transfer: float = Field(
        0.3,
        description="part of the ranks of queries and keys that goes to the values, beta: the paper finds 0.3 to 0.4"
        " best (table 5)",
        ge=0.0,
        lt=1.0,
    )


def effective_rank(spectrum: Spectrum) -> float:
    """exp of the entropy of the normalised squared singular values; 1 where all are zero."""
    energies = spectrum.squared_singular_values.double().clamp(min=0)
    total = energies.sum()
    return math.exp(torch.special.entr(energies / total).sum().item()) if total > 0 else 1.0


class EffectiveRank(Allocator):
    """Ranks in proportion to the square root of the effective rank, within each kind of map."""

    name = "effective-rank"
    Options = EffectiveRankOptions
    options: EffectiveRankOptions
    needs_spectra = True

    def allocate(self, request: AllocationRequest) -> RankPlan:
        # A map with a single input or output is no smaller at any rank.
        maps = [m for m in request.maps if request.largest_rank(m, m.dense_parameters - 1)]
        dense = sum(m.dense_parameters for m in maps)
        fraction = (request.budget.maps_kept - request.budget.maps_dense + dense) / dense
        importance = {m.name: effective_rank(request.spectra[m.name]) for m in maps}
        kinds: dict[tuple[str, str], list[PlannedMap]] = {}
        for map_ in maps:
            kinds.setdefault((map_.stack, kind_of(map_.map.name)), []).append(map_)
        kept: dict[str, float] = {}
        for of_kind in kinds.values():
            kept |= self._share(request, of_kind, fraction, importance)
        for (stack, kind), values in kinds.items():
            path, _, name = kind.rpartition(".")
            if name == TAKING:
                givers = [m for giving in GIVING for m in kinds.get((stack, f"{path}.{giving}".lstrip(".")), [])]
                self._transfer(request, givers, values, kept)
        ranks = {
            m.name: max(1, request.largest_rank(m, int(kept[m.name])))
            for m in maps
            # Sums that come to the dense map's parameters may have been rounded down.
            if round(kept[m.name]) < m.dense_parameters
        }
        needed = sum(request.cost(m, ranks.get(m.name)) for m in request.maps)
        if needed > request.budget.maps_kept:
            raise UserError(
                f"{self.name} keeps {needed:,} parameters of the maps at least, {request.budget.maps_kept:,} are"
                " allowed; lower --reduction"
            )
        return spend_remainder(request, ranks, sorted(maps, key=lambda m: -importance[m.name]))

    @staticmethod
    def _share(
        request: AllocationRequest, maps: list[PlannedMap], fraction: float, importance: Mapping[str, float]
    ) -> dict[str, float]:
        """The parameters of each map of one kind by equation 7, between those of rank 1 and the dense ones.

        With bounds the minimiser is still C sqrt(R omega), clipped: C is found by bisection.
        """
        budget = fraction * sum(m.dense_parameters for m in maps)
        weights = {m.name: math.sqrt(importance[m.name] * (m.map.out_features + m.map.in_features)) for m in maps}

        def kept(scale: float) -> dict[str, float]:
            return {m.name: min(max(scale * weights[m.name], request.cost(m, 1)), m.dense_parameters) for m in maps}

        low, high = 0.0, max(m.dense_parameters / weights[m.name] for m in maps)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(kept(middle).values()) <= budget else (low, middle)
        return kept(low)

    def _transfer(
        self, request: AllocationRequest, givers: list[PlannedMap], takers: list[PlannedMap], kept: dict[str, float]
    ) -> None:
        """Move parameters from queries and keys to values, as far as these have room."""
        given = {m.name: min(self.options.transfer * kept[m.name], kept[m.name] - request.cost(m, 1)) for m in givers}
        pool = sum(given.values())
        if not pool > 0:
            return
        taken = {m.name: min(pool / len(takers), m.dense_parameters - kept[m.name]) for m in takers}
        back = 1 - sum(taken.values()) / pool
        for name, part in given.items():
            kept[name] -= part * (1 - back)
        for name, part in taken.items():
            kept[name] += part
