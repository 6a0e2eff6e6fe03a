"""The interface of an allocator, and how every allocator spends the last parameters."""

from __future__ import annotations

import bisect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from pydantic import Field

from lillama_core.allocation.plan import Budget, PlannedMap, RankPlan, kept_parameters
from lillama_core.formats import Format
from lillama_core.strategies import Strategy, StrategyOptions

LEAST_SAVING = 0.05
"""Part of a map's parameters that a rank has to save: two products for as many multiply-adds as one make a map slower.
In the format ``pivoted`` high ranks cost nearly as much as dense. Of SmolLM2's 216 maps at 20 %, one run each, 177 were
low rank without this and 151 with it; perplexity 29.5 and 29.7 on WikiText-2, 30.6 and 30.6 on tales."""


class RankOptions(StrategyOptions):
    """Which ranks are allowed."""

    rank_multiple: int = Field(
        1,
        description="ranks are multiples of this, where a map is large enough for one: 8, 16 or 32 suit the kernels of"
        " many devices, and quantisers",
        ge=1,
    )


@dataclass(frozen=True)
class Spectrum:
    """What each rank component of a map is worth.

    ``squared_singular_values`` [k], descending, are those of the weighted matrix that the initialiser decomposed:
    dropping component i adds the i-th value to the squared error. ``comparable`` says whether the values of different
    maps are in one unit (the model's loss), so that an allocator may trade them against each other as they are.
    """

    squared_singular_values: torch.Tensor
    comparable: bool


@dataclass(frozen=True)
class AllocationRequest:
    """All that an allocator may look at."""

    maps: list[PlannedMap]
    """In forward order."""
    budget: Budget
    format: Format
    spectra: Mapping[str, Spectrum] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """The width of the model, as far as its maps tell: the largest of their smaller sides."""
        return max(min(m.map.out_features, m.map.in_features) for m in self.maps)

    def cost(self, map_: PlannedMap, rank: int | None) -> int:
        """Parameters of ``map_`` at ``rank``; None means dense."""
        if rank is None:
            return map_.dense_parameters
        return self.format.parameters(map_.map.out_features, map_.map.in_features, rank)

    def largest_rank(self, map_: PlannedMap, parameters: int) -> int:
        """The largest rank of ``map_`` that costs at most ``parameters`` and less than dense; 0: none."""
        return self.format.largest_rank(map_.map.out_features, map_.map.in_features, parameters)

    def ranks(self, map_: PlannedMap, multiple: int = 1) -> Sequence[int]:
        """The ranks of ``map_`` that save enough of it to be worth having, rising; empty if there is none.

        All are multiples of ``multiple``, unless none of these is small enough.
        """
        highest = self.largest_rank(map_, int((1 - LEAST_SAVING) * map_.dense_parameters))
        # A map too small to save that much is still smaller at some rank.
        highest = highest or self.largest_rank(map_, map_.dense_parameters - 1)
        return range(multiple, highest + 1, multiple) or range(1, highest + 1)


class Allocator(Strategy, ABC):
    """Chooses a rank for each map within a budget; found by its name."""

    needs_spectra: bool = False

    @property
    def rank_multiple(self) -> int:
        """What ranks are to be multiples of; 1 for an allocator without such an option."""
        return int(getattr(self.options, "rank_multiple", 1))

    @abstractmethod
    def allocate(self, request: AllocationRequest) -> RankPlan:
        """A plan that keeps at most ``request.budget.maps_kept`` parameters, and as close to it as ranks go."""


def spend_remainder(
    request: AllocationRequest,
    ranks: dict[str, int],
    order: Iterable[PlannedMap],
    allowed: Callable[[PlannedMap], Sequence[int]] | None = None,
) -> RankPlan:
    """Raise ``ranks``, map by map in ``order``, with the parameters that they leave of the budget, and return the plan.

    Ranks are whole numbers, so every rule ends below the budget; the first map of ``order`` takes the
    remainder, and what it cannot use goes to the next. ``allowed`` gives a map's ranks, rising; all of them by default.
    """
    left = request.budget.maps_kept - kept_parameters(
        request.maps, RankPlan(request.format.name, ranks), request.format
    )
    for map_ in order:
        rank = ranks.get(map_.name)
        if rank is None:
            continue
        spent = request.cost(map_, rank)
        raised = request.largest_rank(map_, spent + left)
        if allowed is not None:
            those = allowed(map_)
            fitting = bisect.bisect_right(those, raised)
            raised = those[fitting - 1] if fitting else 0
        raised = max(rank, raised)
        left -= request.cost(map_, raised) - spent
        ranks[map_.name] = raised
    return RankPlan(request.format.name, ranks)
