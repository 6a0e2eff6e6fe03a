"""The interface of an allocator, and how every allocator spends the last parameters."""

from __future__ import annotations

import bisect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Protocol

import torch
from pydantic import Field

from lillama_core.allocation.plan import Budget, PlannedMap, RankPlan
from lillama_core.formats import Format
from lillama_core.strategies import Strategy, StrategyOptions

LEAST_SAVING = 0.2
"""Part of a matrix's parameters that a rank has to save: two products for as many multiply-adds as one make a map
slower. SmolLM2 at 20 % by ``fast``, one run each: 0.05 makes 105 of 216 maps low rank, 0.2 makes 75; perplexity 30.0
and 30.1 on WikiText-2, 30.6 and 30.6 on tales."""


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
class ChannelCurve:
    """What each number of channels costs: ``errors`` [s] at ``counts`` [s], rising, all channels last.

    ``shares`` [s] is the part of the net's output, in squares, that those channels have in the dense map.
    """

    counts: torch.Tensor
    errors: torch.Tensor
    shares: torch.Tensor

    def scaled(self, scale: float) -> ChannelCurve:
        """A curve whose errors count ``scale`` times as much."""
        return replace(self, errors=self.errors * scale)


class Prices(Protocol):
    """What maps cost, where that is not their number of parameters."""

    @property
    def unit(self) -> str:
        """What they are in, and the budget, too: ``nanoseconds``."""
        ...

    def of(self, map_: PlannedMap, rank: int | None) -> int:
        """The cost of ``map_`` at ``rank``, which rises with the rank; None means a matrix of full rank."""
        ...


class Measurements(Protocol):
    """What running the model on a few calibration rows tells; the embedding is dense meanwhile.

    Each question costs passes over the model, and its answer is kept: a run that is resumed gets the same ones.
    """

    def divergence(self, plan: RankPlan) -> float:
        """Twice the divergence of what the model predicts under ``plan``, untrained, from the dense model, in nats a
        row; of outputs that are no predictions, their relative squared error."""
        ...

    def influences(self) -> Mapping[tuple[str, int], float]:
        """By stack and number of a block, 1 - E[cos(h, h')] of the hidden states that enter and leave it."""
        ...


@dataclass(frozen=True)
class AllocationRequest:
    """All that an allocator may look at."""

    maps: list[PlannedMap]
    """In forward order."""
    budget: Budget
    """In parameters, or in the unit of ``prices``."""
    format: Format
    spectra: Mapping[str, Spectrum] = field(default_factory=dict)
    channels: Mapping[str, ChannelCurve] = field(default_factory=dict)
    """By the names that maps have for what they write or read: channels that may be taken out."""
    prices: Prices | None = None
    """None: maps cost their parameters."""
    measurements: Measurements | None = None
    """For an allocator that ``needs_measurements``, but for time."""

    def differs_in_budget_alone(self, other: AllocationRequest) -> bool:
        """Whether all else is that of ``other``, as objects."""
        return all(getattr(self, f.name) is getattr(other, f.name) for f in fields(self) if f.name != "budget")

    @property
    def width(self) -> int:
        """The width of the model, as far as its maps tell: the largest of their smaller sides."""
        return max(min(m.map.out_features, m.map.in_features) for m in self.maps)

    def cost(self, map_: PlannedMap, rank: int | None) -> int:
        """What ``map_`` costs at ``rank``, by default in parameters; None means dense."""
        if self.prices is not None:
            return self.prices.of(map_, rank)
        if rank is None:
            return map_.dense_parameters
        return self.format.parameters(map_.map.out_features, map_.map.in_features, rank)

    def kept(self, ranks: Mapping[str, int], channels: Mapping[str, int] = MappingProxyType({})) -> int:
        """What all maps cost at ``ranks``, by name, when of ``channels`` only so many stay."""
        return sum(self.cost(m.without(channels), ranks.get(m.name)) for m in self.maps)

    @property
    def unit(self) -> str:
        """What costs are counted in."""
        return "parameters" if self.prices is None else self.prices.unit

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
    needs_measurements: bool = False
    """Whether it looks at ``AllocationRequest.measurements``; it needs spectra then, too, which wait for weights."""
    removes_channels: bool = False
    """Whether it looks at ``AllocationRequest.channels``."""
    compares_channels: bool = True
    """Whether it sets what channels cost against other errors, for which both have to be in one unit."""
    reads_prices: bool = False
    """Whether it spends whatever unit the request's costs are in, and not parameters alone."""

    @property
    def rank_multiple(self) -> int:
        """What ranks are to be multiples of; 1 for an allocator without such an option."""
        return int(getattr(self.options, "rank_multiple", 1))

    @abstractmethod
    def allocate(self, request: AllocationRequest) -> RankPlan:
        """A plan whose cost is at most ``request.budget.maps_kept``, and as close to it as ranks go."""


def spend_remainder(
    request: AllocationRequest,
    ranks: dict[str, int],
    order: Iterable[PlannedMap],
    allowed: Callable[[PlannedMap], Sequence[int]] | None = None,
    channels: Mapping[str, int] = MappingProxyType({}),
) -> RankPlan:
    """Raise ``ranks``, map by map in ``order``, with what they leave of the budget, and return the plan.

    Ranks are whole numbers, so every rule ends below the budget; the first map of ``order`` takes the
    remainder, and what it cannot use goes to the next. ``allowed`` gives a map's ranks, rising; all of them by default.
    ``channels`` says how many of them stay, where some are taken out.
    """
    left = request.budget.maps_kept - request.kept(ranks, channels)
    for map_ in (m.without(channels) for m in order):
        rank = ranks.get(map_.name)
        if rank is None:
            continue
        spent = request.cost(map_, rank)
        those = (
            range(1, request.largest_rank(map_, map_.dense_parameters - 1) + 1) if allowed is None else allowed(map_)
        )
        fitting = bisect.bisect_right(those, spent + left, key=lambda r: request.cost(map_, r))
        raised = max(rank, those[fitting - 1]) if fitting else rank
        left -= request.cost(map_, raised) - spent
        ranks[map_.name] = raised
    return RankPlan(request.format.name, ranks, dict(channels))
