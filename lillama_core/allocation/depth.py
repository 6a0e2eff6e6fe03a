"""``bottom-first`` and ``top-first``: compress blocks one after the other until the model is small enough.

Lillama (arXiv 2412.16719, section 3.1, and its code): every map has candidate ranks k, k + step, k + 2 step, …; the
candidates are tried block by block from one end, the highest rank of a block first, so that a block goes down to
the minimum rank k before the next one is touched. Blocks never reached stay dense.
"""

from __future__ import annotations

from pydantic import Field

from lillama_core.allocation.base import AllocationRequest, Allocator, spend_remainder
from lillama_core.allocation.plan import PlannedMap, RankPlan
from lillama_core.errors import UserError
from lillama_core.strategies import StrategyOptions


class DepthOptions(StrategyOptions):
    """The candidate ranks."""

    minimum_rank: int | None = Field(
        None,
        description="smallest rank; default: a quarter of the model's width, the paper's 1024 at 4096"
        " (arXiv 2412.16719)",
        ge=1,
    )
    rank_step: int | None = Field(
        None,
        description="distance between candidate ranks; default: a sixteenth of the width, the 256 at 4096 of the"
        " paper's code",
        ge=1,
    )


class _DepthOrder(Allocator):
    Options = DepthOptions
    options: DepthOptions
    from_top: bool

    def allocate(self, request: AllocationRequest) -> RankPlan:
        position = {(s, b): i for i, (s, b) in enumerate(dict.fromkeys((m.stack, m.block) for m in request.maps))}
        minimum_rank = self.options.minimum_rank or max(1, request.width // 4)
        rank_step = self.options.rank_step or max(1, request.width // 16)
        sign = -1 if self.from_top else 1
        candidates: list[tuple[int, int, int, PlannedMap]] = []
        for index, map_ in enumerate(request.maps):
            highest = request.largest_rank(map_, map_.dense_parameters - 1)
            for rank in range(minimum_rank, highest + 1, rank_step):
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
                f"{self.name} with minimum rank {minimum_rank} and step {rank_step} cannot remove"
                f" {request.budget.removed:,} parameters (at most {request.budget.maps_dense - kept:,});"
                " lower --minimum-rank or --reduction"
            )
        return spend_remainder(request, ranks, [last] if last else [])


class BottomFirst(_DepthOrder):
    """Compress the lowest blocks first, as the paper does (arXiv 2412.16719, section 3.1)."""

    name = "bottom-first"
    from_top = False


class TopFirst(_DepthOrder):
    """Compress the highest blocks first, an ablation of the paper's order."""

    name = "top-first"
    from_top = True
