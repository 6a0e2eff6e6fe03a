"""MoDeGPT (arXiv 2408.09632), its type I alone: Nyström's approximation of feed-forward nets, no training.

With C = E[z z^T] of what the last map W of a net reads, the k channels K of the highest ridge leverage scores
s_i = [C (C + lambda I)^-1]_ii stay, and W' = W C_:K C_KK^-1 (its algorithm for type I). That is how the core refits a
map behind channels, in another order.

Of L nets, net l gives up the part phi_l = L phi softmax(-s_l / epsilon) of its channels (its global sparsity
allocation), with s_l the Block Influence of its block, 1 - E[cos(h, h')] of what enters and leaves it (ShortGPT, arXiv
2403.03853), and phi the part that all give up.

Deviations: types II and III, which narrow the heads of attention, are left out, and attention stays dense. Biases are
left as they are. lambda is relative to the mean diagonal of C, and C_KK is inverted with a small ridge in place of a
pseudo-inverse. The paper's values of lambda and epsilon are not known to us: those here are of public
re-implementations, with their highest phi_l of 0.8; what a net would give beyond that, the others give.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field

from lillama_core.allocation import AllocationRequest, Allocator
from lillama_core.allocation.plan import PlannedMap, RankPlan
from lillama_core.errors import UserError
from lillama_core.initialization import MapStatistics, Whitened
from lillama_core.initialization.eigen import symmetric_product
from lillama_core.initialization.elimination import Elimination, in_order
from lillama_core.initialization.second_moments import WhitenedOptions, root
from lillama_core.strategies import StrategyOptions

OPTIONS: Mapping[str, Any] = {"init": "nystrom", "allocation": "block-influence", "format": "factored"}

HALVINGS = 100
"""Of the interval in which a number is looked for: more than a double has digits."""


class NystromOptions(WhitenedOptions):
    """The ridges."""

    input_damping: float = Field(
        1e-6,
        description="ridge on E[z z^T], relative to its mean diagonal, where the map behind the channels is refitted:"
        " what fp32 can tell from nothing",
        gt=0.0,
        le=1.0,
    )
    leverage_damping: float = Field(
        1e-2, description="lambda of the leverage scores, relative to the mean diagonal of E[z z^T]", gt=0.0, le=10.0
    )


class Nystrom(Whitened):
    """Channels by their ridge leverage scores; ranks, where any are lowered, as ``whitened`` does."""

    name = "nystrom"
    Options = NystromOptions
    options: NystromOptions

    def eliminate(self, weight: torch.Tensor, statistics: MapStatistics) -> Elimination | None:
        W = weight.double()
        C, _ = self.input_moment(W, MapStatistics(inputs=statistics.inputs))
        R = root(C, self.options.input_damping)
        # With its ridge, whatever that had to be.
        C = symmetric_product(R, R.T)
        ridge = self.options.leverage_damping * C.diagonal().mean()
        ridged = C.clone()
        ridged.diagonal().add_(ridge)
        scores = 1 - ridge * torch.cholesky_inverse(torch.linalg.cholesky(ridged)).diagonal()
        order = scores.argsort(descending=True, stable=True)
        return in_order(order, torch.arange(1, len(order) + 1), C, W)


class BlockInfluenceOptions(StrategyOptions):
    """How differently blocks are treated."""

    smoothing: float = Field(
        0.071,
        description="epsilon: the larger, the more alike; of a public re-implementation at 25 % of Llama-3-8B",
        gt=0.0,
    )
    most: float = Field(0.8, description="largest part of its channels that a net gives up", gt=0.0, lt=1.0)


class BlockInfluence(Allocator):
    """Take channels out of nets, fewer where the block changes its hidden states more; all else stays dense."""

    name = "block-influence"
    Options = BlockInfluenceOptions
    options: BlockInfluenceOptions
    needs_spectra = True
    needs_measurements = True
    removes_channels = True
    compares_channels = False

    def allocate(self, request: AllocationRequest) -> RankPlan:
        # It is asked for.
        assert request.measurements is not None
        nets: dict[str, list[PlannedMap]] = {}
        for map_ in request.maps:
            for name in {map_.writes, map_.reads} & request.channels.keys():
                nets.setdefault(name, []).append(map_)
        if not nets:
            raise UserError(
                f"{self.name} takes channels out of feed-forward nets, and this model has none that could lose"
                " channels; choose another --allocation"
            )
        sizes = {name: int(request.channels[name].counts[-1]) for name in nets}
        each = {name: sum(m.dense_parameters for m in maps) // sizes[name] for name, maps in nets.items()}
        found = request.measurements.influences()
        influences = {name: found[maps[0].stack, maps[0].block] for name, maps in nets.items()}
        counts = self._counts(request, sizes, each, influences)
        left = request.budget.maps_kept - request.kept({}, counts)
        for name in sorted(counts, key=lambda name: -influences[name]):
            more = min(left // each[name], sizes[name] - counts[name])
            counts[name] += more
            left -= more * each[name]
        return RankPlan(request.format.name, {}, {name: k for name, k in counts.items() if k < sizes[name]})

    def _counts(
        self,
        request: AllocationRequest,
        sizes: Mapping[str, int],
        each: Mapping[str, int],
        influences: Mapping[str, float],
    ) -> dict[str, int]:
        """How many channels stay of each net, rounded down; a scale of the softmax is found by bisection."""
        least = min(influences.values())
        # Relative to the largest; what is nothing beside it gives up channels when no other has any left.
        weights = {n: max(math.exp((least - s) / self.options.smoothing), 1e-15) for n, s in influences.items()}

        def kept(scale: float) -> dict[str, int]:
            given_up = {name: min(scale * weights[name], self.options.most) for name in sizes}
            # 1 - 0.8 is a little less than 0.2.
            return {name: max(1, int(sizes[name] * (1 - given_up[name]) + 1e-6)) for name in sizes}

        # At the upper end every net gives up all that it may.
        low, high = 0.0, self.options.most / min(weights.values())
        if (fewest := request.kept({}, kept(high))) > request.budget.maps_kept:
            raise UserError(
                f"{self.name} keeps {fewest:,} parameters of the maps at least, {request.budget.maps_kept:,} are"
                " allowed; lower --reduction"
            )
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if request.kept({}, kept(middle)) > request.budget.maps_kept else (low, middle)
        return kept(high)
