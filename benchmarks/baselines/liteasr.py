"""LiteASR (arXiv 2502.20583): principal components of every map's outputs, no training.

With mu = E[y] and V the k leading principal directions of y = W x + b, y ~ mu + V V^T (y - mu): factors B = V,
A = V^T W, and the bias mu + V V^T (b - mu), which is b + (W - B A) E[x]. A map without a bias keeps none (in Whisper
those are the keys' maps, where a bias changes no attention weight).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field

from lillama_core.allocation import AllocationRequest, Allocator, Spectrum, spend_remainder
from lillama_core.allocation.plan import PlannedMap, RankPlan
from lillama_core.initialization import Decomposition, Initializer, MapStatistics
from lillama_core.strategies import StrategyOptions

OPTIONS: Mapping[str, Any] = {"init": "output-pca", "allocation": "variance-threshold", "format": "factored"}

ATTENTION = "attn"
HALVINGS = 60


class OutputComponents(Initializer):
    """Principal components of the outputs (section 3)."""

    name = "output-pca"
    needs_inputs = True

    def decompose(self, weight: torch.Tensor, statistics: MapStatistics) -> Decomposition:
        W = weight.double()
        covariance = torch.eye(W.shape[1], dtype=torch.float64, device=W.device)
        if statistics.inputs is not None and statistics.center is not None:
            covariance = statistics.inputs.double() - torch.outer(statistics.center, statistics.center).double()
        squared_singular_values, V = torch.linalg.eigh(W @ covariance @ W.T)
        # A product W' = V V^T W has at most as many components as W has inputs.
        k = min(W.shape)
        squared_singular_values, V = (
            squared_singular_values.flip(0)[:k].clamp(min=0),
            V.flip(1)[:, :k].float().contiguous(),
        )
        return Decomposition(Spectrum(squared_singular_values, False), V, V.T.contiguous(), True, statistics.center)


class VarianceThresholdOptions(StrategyOptions):
    """How differently maps are treated."""

    mlp_strictness: float = Field(
        0.1,
        description="part of the variance that an MLP's map may drop, relative to attention's: the paper's code drops"
        " 0.001 there and 0.01 here",
        gt=0.0,
        le=1.0,
    )


class VarianceThreshold(Allocator):
    """Every map keeps the same part of its outputs' variance, MLPs ten times as strictly, as the paper's code does.

    Its threshold is given and the size comes out; here the size is given, and the threshold found by bisection. A map
    for which factors would not be smaller stays dense.
    """

    name = "variance-threshold"
    Options = VarianceThresholdOptions
    options: VarianceThresholdOptions
    needs_spectra = True

    def allocate(self, request: AllocationRequest) -> RankPlan:
        # At the upper end every map may drop all of it, MLPs included.
        low, high = 0.0, 1 / self.options.mlp_strictness
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            kept = sum(request.cost(m, r) for m, r in zip(request.maps, self._ranks(request, middle), strict=True))
            low, high = (middle, high) if kept > request.budget.maps_kept else (low, middle)
        chosen = zip(request.maps, self._ranks(request, high), strict=True)
        ranks = {m.name: rank for m, rank in chosen if rank is not None}
        return spend_remainder(request, ranks, reversed(request.maps))

    def _ranks(self, request: AllocationRequest, dropped: float) -> list[int | None]:
        """The rank of each map when a part ``dropped`` of the variance may go; None: dense."""
        strict = [dropped * (1 if ATTENTION in m.name else self.options.mlp_strictness) for m in request.maps]
        return [self._rank(request, m, min(1.0, part)) for m, part in zip(request.maps, strict, strict=True)]

    @staticmethod
    def _rank(request: AllocationRequest, map_: PlannedMap, dropped: float) -> int | None:
        squared_singular_values = request.spectra[map_.name].squared_singular_values.double()
        kept = squared_singular_values.cumsum(0) / squared_singular_values.sum().clamp(min=1e-300)
        rank = max(1, int((kept < 1 - dropped).sum().item()) + 1)
        largest = request.largest_rank(map_, map_.dense_parameters - 1)
        return rank if rank <= largest else None
