"""``bottom-first`` and ``top-first``: compress blocks one after the other until the model is small enough.

Lillama (arXiv 2412.16719, section 3.1, and its code): every map has candidate ranks k, k + step, k + 2 step, …; the
candidates are tried block by block from one end, the highest rank of a block first, so that a block goes down to
the minimum rank k before the next one is touched. Blocks never reached stay dense.
"""

from __future__ import annotations

from lillama_core.allocation.base import AllocationRequest, Allocator, spend_remainder
from lillama_core.allocation.plan import PlannedMap, RankPlan
from lillama_core.errors import UserError


class _DepthOrder(Allocator):
    from_top: bool

    def allocate(self, request: AllocationRequest) -> RankPlan:
        position = {(s, b): i for i, (s, b) in enumerate(dict.fromkeys((m.stack, m.block) for m in request.maps))}
        sign = -1 if self.from_top else 1
        candidates: list[tuple[int, int, int, PlannedMap]] = []
        for index, map_ in enumerate(request.maps):
            highest = request.largest_rank(map_, map_.dense_parameters - 1)
            for rank in range(request.minimum_rank, highest + 1, request.rank_step):
                candidates.append((sign * position[map_.stack, map_.block], -rank, index, map_))
        candidates.sort(key=lambda c: c[:3])

        kept = request.budget.maps_dense
        ranks: dict[str, int] = {}
        last: PlannedMap | None = None
        for _, negative_rank, _, map_ in candidates:
            if kept <= request.budget.maps_kept:
                break
            kept += request.cost(map_, -negative_rank) - request.cost(map_, ranks.get(map_.name))
            ranks[map_.name] = -negative_rank
            last = map_
        if kept > request.budget.maps_kept:
            raise UserError(
                f"{self.name} with minimum rank {request.minimum_rank} and step {request.rank_step} cannot remove"
                f" {request.budget.removed:,} parameters (at most {request.budget.maps_dense - kept:,});"
                " lower --minimum-rank or --reduction"
            )
        return spend_remainder(request, ranks, [last] if last else [])


class BottomFirst(_DepthOrder):
    name = "bottom-first"
    from_top = False


class TopFirst(_DepthOrder):
    name = "top-first"
    from_top = True
