"""``spectrum``: give each parameter, or whatever else maps cost, to the map where it saves the most error.

With e_i(r) the error of map i at rank r and c_i(r) its parameters: minimise sum e_i(r_i), sum c_i(r_i) within budget.
The lower convex hull of each map's points (c_i(r), e_i(r)), its dense state included, makes the greedy choice by slope
optimal up to the last segment (the Lagrangian relaxation of a multiple-choice knapsack), for costs that grow
linearly in the rank as well as for those that do not. Maps between which channels may be taken out have one hull
together.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence

from pydantic import Field

from lillama_core.allocation.base import AllocationRequest, Allocator, RankOptions, Spectrum, spend_remainder
from lillama_core.allocation.nets import Point, lower_hull, net_points
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


def tail_errors(spectrum: Spectrum) -> list[float]:
    """Return the truncation error at rank 0, 1, …, k: the sum of the squared singular values that are left out.

    It is relative to the sum of all of them if the spectrum is not comparable.
    """
    squared_singular_values = spectrum.squared_singular_values.double().clamp(min=0)
    if not spectrum.comparable:
        squared_singular_values = squared_singular_values / squared_singular_values.sum().clamp(min=1e-300)
    tails: list[float] = squared_singular_values.flip(0).cumsum(0).flip(0).tolist()
    return [*tails, 0.0]


class SpectrumAllocator(Allocator):
    """Give each parameter to the map where it saves the most error, as its spectrum tells."""

    Options = SpectrumOptions
    options: SpectrumOptions
    name = "spectrum"
    needs_spectra = True
    removes_channels = True
    reads_prices = True
    _known: tuple[AllocationRequest, list[list[Point]]] | None = None
    """The last request, and its hulls: most of the work, and the same for another budget where no floor is due."""

    def unread_options(self, chosen: ChosenStrategies) -> Mapping[str, str]:
        if getattr(chosen.init, "needs_gradients", False):
            return {"rank_floor": f"the spectra of the initialiser {chosen.init.name!r} are in one unit for all maps"}
        return {}

    def allocate(self, request: AllocationRequest) -> RankPlan:
        hulls = self._hulls_of(request)
        used = sum(hull[0].cost for hull in hulls)
        if used > request.budget.maps_kept:
            raise UserError(
                f"ranks of at least {self.rank_multiple} keep {used:,} {request.unit} of the maps,"
                f" {request.budget.maps_kept:,} are allowed; lower --rank-multiple or --reduction"
            )
        states = [hull[0] for hull in hulls]
        steps = [
            ((a.error - b.error) / (b.cost - a.cost), index, b)
            for index, hull in enumerate(hulls)
            for a, b in itertools.pairwise(hull)
        ]
        # Steepest first; on one hull the slopes fall, so a map's own steps come in order.
        steps.sort(key=lambda s: (-s[0], s[1], s[2].cost))
        blocked: dict[int, None] = {}
        for _, index, point in steps:
            if index in blocked:
                continue
            extra = point.cost - states[index].cost
            if used + extra > request.budget.maps_kept:
                blocked[index] = None
                continue
            used += extra
            states[index] = point
        ranks = {name: rank for state in states for name, rank in state.ranks.items() if rank is not None}
        channels = {name: count for state in states for name, count in state.channels.items()}
        maps = {m.name: m for m in request.maps}
        reached = [maps[name] for index in blocked for name in states[index].ranks]
        return spend_remainder(request, ranks, reached, functools.partial(self._choices, request), channels)

    def _hulls_of(self, request: AllocationRequest) -> list[list[Point]]:
        floored = not all(spectrum.comparable for spectrum in request.spectra.values())
        if floored or self._known is None or not request.differs_in_budget_alone(self._known[0]):
            self._known = request, list(self._hulls(request))
        return self._known[1]

    def _hulls(self, request: AllocationRequest) -> Iterator[list[Point]]:
        """The lower hull of every map in no net, and of every net, in forward order."""
        fraction = request.budget.maps_kept / request.budget.maps_dense
        nets: dict[str, list[PlannedMap]] = {}
        for map_ in request.maps:
            for name in {map_.writes, map_.reads} & request.channels.keys():
                nets.setdefault(name, []).append(map_)
        of_net = {m.name for members in nets.values() for m in members}
        for map_ in request.maps:
            if map_.name in of_net:
                if map_.reads in nets:
                    members = nets[map_.reads]
                    tails = {m.name: tail_errors(request.spectra[m.name]) for m in members}
                    curve = request.channels[map_.reads]
                    yield net_points(request, map_.reads, curve, members, tails, self.rank_multiple)
                continue
            spectrum = request.spectra[map_.name]
            lowest = 1
            if not spectrum.comparable:
                even = request.largest_rank(map_, int(fraction * map_.dense_parameters))
                lowest = max(1, int(self.options.rank_floor * even))
            errors = tail_errors(spectrum)
            choices = self._choices(request, map_)
            points = [
                Point(request.cost(map_, r), errors[r], {map_.name: r}, {})
                for r in choices
                if r >= lowest or r == choices[-1]
            ]
            yield lower_hull([*points, Point(request.cost(map_, None), 0.0, {map_.name: None}, {})])

    def _choices(self, request: AllocationRequest, map_: PlannedMap) -> Sequence[int]:
        return request.ranks(map_, self.rank_multiple)
