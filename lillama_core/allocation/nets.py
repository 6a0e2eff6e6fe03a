"""Points of the hull for maps that share channels: how many of those stay, and the rank of every map between them.

For each number of channels the maps are matrices of their own sizes, whose errors add up: the greedy choice along their
hulls is the hull of all of them together. The lower hull of what all numbers of channels give is the net's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lillama_core.allocation.base import AllocationRequest, ChannelCurve
from lillama_core.allocation.plan import PlannedMap

MOST_RANKS = 64
"""Ranks of a map that are looked at for each number of channels; what lies between two of them is a part in 64."""


@dataclass(frozen=True)
class Point:
    """A state that a map, or a net of maps, may be in."""

    cost: int
    error: float
    ranks: Mapping[str, int | None]
    """None is a matrix of full rank."""
    channels: Mapping[str, int]


def lower_hull(points: Sequence[Point]) -> list[Point]:
    """The lower convex hull of points, as far as errors fall with the cost."""
    hull: list[Point] = []
    for p in sorted(points, key=lambda p: (p.cost, p.error)):
        if hull and p.error >= hull[-1].error:
            continue
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            if (b.error - a.error) * (p.cost - a.cost) < (p.error - a.error) * (b.cost - a.cost):
                break
            hull.pop()
        hull.append(p)
    return hull


def net_points(
    request: AllocationRequest,
    name: str,
    curve: ChannelCurve,
    maps: Sequence[PlannedMap],
    tails: Mapping[str, Sequence[float]],
    multiple: int,
) -> list[Point]:
    """The lower hull of the net whose ``maps`` write or read the channels ``name``; ``tails`` are errors by rank."""
    every: list[Point] = []
    full = int(curve.counts[-1])
    for count, lost, share in zip(curve.counts.tolist(), curve.errors.tolist(), curve.shares.tolist(), strict=True):
        channels = {} if count == full else {name: count}
        hulls = [_map_hull(request, m.without(channels), tails[m.name], share, multiple) for m in maps]
        # Errors of maps at a low rank are of channels that stay.
        every += [Point(p.cost, p.error + lost, p.ranks, channels) for p in _together(hulls)]
    return lower_hull(every)


def _map_hull(
    request: AllocationRequest, map_: PlannedMap, tails: Sequence[float], share: float, multiple: int
) -> list[Point]:
    ranks = [r for r in request.ranks(map_, multiple) if r < len(tails)]
    step = -(-len(ranks) // MOST_RANKS) or 1
    # Counted from the largest, which saves little and loses least.
    chosen = ranks[::-1][::step][::-1]
    points = [Point(request.cost(map_, r), tails[r] * share, {map_.name: r}, {}) for r in chosen]
    return lower_hull([*points, Point(request.cost(map_, None), 0.0, {map_.name: None}, {})])


def _together(hulls: Sequence[Sequence[Point]]) -> Iterator[Point]:
    """The points of a sum of hulls: from the cheapest of all, the steepest step first."""
    cost, error = sum(h[0].cost for h in hulls), sum(h[0].error for h in hulls)
    ranks = {name: rank for h in hulls for name, rank in h[0].ranks.items()}
    steps = [(a, b) for h in hulls for a, b in itertools.pairwise(h)]
    steps.sort(key=lambda s: (s[1].error - s[0].error) / (s[1].cost - s[0].cost))
    yield Point(cost, error, ranks, {})
    for a, b in steps:
        cost, error, ranks = cost + b.cost - a.cost, error + b.error - a.error, {**ranks, **b.ranks}
        yield Point(cost, error, ranks, {})
