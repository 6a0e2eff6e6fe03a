"""``spectrum``: give each parameter to the map where it saves the most error.

With e_i(r) the error of map i at rank r and c_i(r) its parameters: minimise sum e_i(r_i), sum c_i(r_i) within budget.
The lower convex hull of each map's points (c_i(r), e_i(r)), its dense state included, makes the greedy choice by slope
optimal up to the last segment (the Lagrangian relaxation of a multiple-choice knapsack), for costs that grow
linearly in the rank as well as for those that do not.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import Field

from lillama_core.allocation.base import AllocationRequest, Allocator, RankOptions, Spectrum, spend_remainder
from lillama_core.allocation.plan import PlannedMap, RankPlan
from lillama_core.errors import UserError
from lillama_core.strategies import ChosenStrategies


class SpectrumOptions(RankOptions):
    """How far ranks may depart from the uniform ones."""

    rank_floor: float = Field(
        0.5,
        description="smallest rank as a part of the uniform one, when the spectra of the maps are in no common unit"
        " (init whitened, svd, random): relative errors are a poor guide to what a map matters (Swift-SVD,"
        " arXiv 2604.01609, table 6), and the floor bounds the harm",
        ge=0.0,
        le=1.0,
    )


@dataclass(frozen=True)
class Point:
    """A state that a map may be in; rank None is dense."""

    cost: int
    error: float
    rank: int | None


def tail_errors(spectrum: Spectrum) -> list[float]:
    """Return the truncation error at rank 0, 1, …, k: the sum of the squared singular values that are left out.

    It is relative to the sum of all of them if the spectrum is not comparable.
    """
    squared_singular_values = spectrum.squared_singular_values.double().clamp(min=0)
    if not spectrum.comparable:
        squared_singular_values = squared_singular_values / squared_singular_values.sum().clamp(min=1e-300)
    tails: list[float] = squared_singular_values.flip(0).cumsum(0).flip(0).tolist()
    return [*tails, 0.0]


def lower_hull(points: list[Point]) -> list[Point]:
    """The lower convex hull of points sorted by cost."""
    hull: list[Point] = []
    for p in points:
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            if (b.error - a.error) * (p.cost - a.cost) < (p.error - a.error) * (b.cost - a.cost):
                break
            hull.pop()
        hull.append(p)
    return hull


class SpectrumAllocator(Allocator):
    """Give each parameter to the map where it saves the most error, as its spectrum tells."""

    Options = SpectrumOptions
    options: SpectrumOptions
    name = "spectrum"
    needs_spectra = True

    def unread_options(self, chosen: ChosenStrategies) -> Mapping[str, str]:
        if getattr(chosen.init, "needs_gradients", False):
            return {"rank_floor": f"the spectra of the initialiser {chosen.init.name!r} are in one unit for all maps"}
        return {}

    def allocate(self, request: AllocationRequest) -> RankPlan:
        fraction = request.budget.maps_kept / request.budget.maps_dense
        ranks: dict[str, int | None] = {}
        segments: list[tuple[float, int, Point, PlannedMap]] = []
        used = 0
        for index, map_ in enumerate(request.maps):
            spectrum = request.spectra[map_.name]
            lowest = 1
            if not spectrum.comparable:
                even = request.largest_rank(map_, int(fraction * map_.dense_parameters))
                lowest = max(1, int(self.options.rank_floor * even))
            errors = tail_errors(spectrum)
            choices = self._choices(request, map_)
            points = [Point(request.cost(map_, r), errors[r], r) for r in choices if r >= lowest or r == choices[-1]]
            hull = lower_hull([*points, Point(map_.dense_parameters, 0.0, None)])
            used += hull[0].cost
            ranks[map_.name] = hull[0].rank
            for a, b in itertools.pairwise(hull):
                segments.append(((a.error - b.error) / (b.cost - a.cost), index, b, map_))

        if used > request.budget.maps_kept:
            raise UserError(
                f"ranks of at least {self.rank_multiple} keep {used:,} parameters of the maps,"
                f" {request.budget.maps_kept:,} are allowed; lower --rank-multiple or --reduction"
            )
        # Steepest first; on one hull the slopes fall, so a map's own segments come in order.
        segments.sort(key=lambda s: (-s[0], s[1], s[2].cost))
        blocked: set[str] = set()
        reached: list[PlannedMap] = []
        for _, _, point, map_ in segments:
            if map_.name in blocked:
                continue
            extra = point.cost - request.cost(map_, ranks[map_.name])
            if used + extra > request.budget.maps_kept:
                blocked.add(map_.name)
                reached.append(map_)
                continue
            used += extra
            ranks[map_.name] = point.rank
        chosen = {name: rank for name, rank in ranks.items() if rank is not None}
        return spend_remainder(request, chosen, reached, functools.partial(self._choices, request))

    def _choices(self, request: AllocationRequest, map_: PlannedMap) -> Sequence[int]:
        return request.ranks(map_, self.rank_multiple)
