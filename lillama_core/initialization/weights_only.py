"""Initialisers that look at the weights alone: ``svd`` and ``random``."""

from __future__ import annotations

import torch

from lillama_core.allocation import Spectrum
from lillama_core.initialization.base import Decomposition, Initializer, MapStatistics
from lillama_core.initialization.eigen import descending_eigenpairs, symmetric_product


class PlainSVD(Initializer):
    """The best rank-r approximation of W itself (Eckart and Young 1936).

    From the eigenvectors U of W W^T, or V of W^T W when that is smaller: W' = U_r U_r^T W.
    """

    name = "svd"

    def decompose(self, weight: torch.Tensor, statistics: MapStatistics) -> Decomposition:
        W = weight.double()
        on_outputs = W.shape[0] <= W.shape[1]
        gram = symmetric_product(W, W.T) if on_outputs else symmetric_product(W.T, W)
        squared_singular_values, vectors = descending_eigenpairs(gram)
        vectors = vectors.float().contiguous()
        return Decomposition(
            Spectrum(squared_singular_values.float(), False), vectors, vectors.T.contiguous(), on_outputs
        )


class RandomInit(PlainSVD):
    """Entries drawn from N(0, 1 / width), the ablation of arXiv 2412.16719; ranks still follow W's spectrum."""

    name = "random"

    def factors(
        self, weight: torch.Tensor, rank: int, decomposition: Decomposition, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        (out_features, in_features), scale = weight.shape, weight.shape[1] ** -0.5
        B = torch.randn(out_features, rank, generator=generator) * scale
        A = torch.randn(rank, in_features, generator=generator) * scale
        return B.to(weight.device), A.to(weight.device)
