"""``uniform``: every map keeps the same fraction of its parameters."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence

from lillama_core.allocation.base import AllocationRequest, Allocator, RankOptions, spend_remainder
from lillama_core.allocation.plan import PlannedMap, RankPlan
from lillama_core.errors import UserError


class Uniform(Allocator):
    """Leave every map the same fraction of its parameters."""

    name = "uniform"
    Options = RankOptions
    options: RankOptions

    def allocate(self, request: AllocationRequest) -> RankPlan:
        kept, dense = request.budget.maps_kept, request.budget.maps_dense
        allowed = functools.partial(self._allowed, request)
        ranks = {}
        for map_ in request.maps:
            # One with a single input or output is no smaller at any rank.
            if those := allowed(map_):
                fitting = bisect.bisect_right(those, request.largest_rank(map_, map_.dense_parameters * kept // dense))
                # A map too small for that fraction stays at the lowest rank; the budget was checked to allow 1.
                ranks[map_.name] = those[max(0, fitting - 1)]
        plan = spend_remainder(request, ranks, reversed(request.maps), allowed)
        return RankPlan(plan.format, self._fit(request, dict(plan.ranks)))

    def _allowed(self, request: AllocationRequest, map_: PlannedMap) -> Sequence[int]:
        multiple, highest = self.rank_multiple, request.largest_rank(map_, map_.dense_parameters - 1)
        return range(multiple, highest + 1, multiple) or range(1, highest + 1)

    def _fit(self, request: AllocationRequest, ranks: dict[str, int]) -> dict[str, int]:
        """Lower the largest ranks, last map first, until ``ranks`` is within the budget."""
        allowed = {m.name: self._allowed(request, m) for m in request.maps}
        total = sum(request.cost(m, ranks.get(m.name)) for m in request.maps)
        while total > request.budget.maps_kept:
            higher = [m for m in reversed(request.maps) if m.name in ranks and ranks[m.name] > allowed[m.name][0]]
            if not higher:
                raise UserError(
                    f"ranks of at least {self.rank_multiple} keep {total:,} parameters of the maps,"
                    f" {request.budget.maps_kept:,} are allowed; lower --rank-multiple or --reduction"
                )
            map_ = max(higher, key=lambda m: ranks[m.name])
            rank, those = ranks[map_.name], allowed[map_.name]
            lower = those[those.index(rank) - 1]
            total -= request.cost(map_, rank) - request.cost(map_, lower)
            ranks[map_.name] = lower
        return ranks
