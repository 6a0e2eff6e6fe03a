"""``uniform``: every map keeps the same fraction of its parameters."""

from __future__ import annotations

from lillama_core.allocation.base import AllocationRequest, Allocator, spend_remainder
from lillama_core.allocation.plan import RankPlan


class Uniform(Allocator):
    """Leave every map the same fraction of its parameters."""

    name = "uniform"

    def allocate(self, request: AllocationRequest) -> RankPlan:
        kept, dense = request.budget.maps_kept, request.budget.maps_dense
        ranks = {
            # A map too small for that fraction stays at rank 1; the budget was checked to allow that.
            m.name: max(1, request.largest_rank(m, m.dense_parameters * kept // dense))
            for m in request.maps
            # One with a single input or output is no smaller at any rank.
            if request.largest_rank(m, m.dense_parameters - 1) > 0
        }
        plan = spend_remainder(request, ranks, reversed(request.maps))
        return RankPlan(plan.format, fit(request, dict(plan.ranks)))


def fit(request: AllocationRequest, ranks: dict[str, int]) -> dict[str, int]:
    """Lower the largest ranks, last map first, until ``ranks`` is within the budget."""
    total = sum(request.cost(m, ranks.get(m.name)) for m in request.maps)
    while total > request.budget.maps_kept:
        map_ = max(reversed(request.maps), key=lambda m: ranks.get(m.name, 0))
        total -= request.cost(map_, ranks[map_.name]) - request.cost(map_, ranks[map_.name] - 1)
        ranks[map_.name] -= 1
    return ranks
