"""Initialisers that weigh errors by what the model does: ``whitened`` and ``fisher``.

Both solve min over rank r of |L^T (W - W') C|_F^2 in closed form, with C C^T = G = E[x x^T] the second moment of the
inputs and L L^T = F a weight on the outputs, each with a ridge. With M = L^T W C and its singular vectors U, V:
W' = L^-T U_r U_r^T L^T W = W C V_r V_r^T C^-1, and the error is the sum of the squared singular values left out.

A map with a bias may shift it: with b' = b + (W - W') E[x] the error that is the same for all inputs is gone, and G is
their covariance instead.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field

from lillama_core.allocation import Spectrum
from lillama_core.initialization.base import Decomposition, Initializer, MapStatistics
from lillama_core.initialization.eigen import check_moment, descending_eigenpairs, symmetric_product
from lillama_core.initialization.elimination import Elimination, eliminate
from lillama_core.strategies import StrategyOptions

SMALLEST_RIDGE = 1e-12
"""Of what is a Gram matrix but for rounding in fp64, so that it has a root."""


class WhitenedOptions(StrategyOptions):
    """The ridge that keeps second moments invertible."""

    input_damping: float = Field(
        1e-4,
        description="ridge on E[x x^T], relative to its mean diagonal: makes it invertible where there are fewer"
        " tokens than inputs, or dead inputs",
        gt=0.0,
        le=1.0,
    )


class FisherOptions(WhitenedOptions):
    """The ridges on second moments."""

    # SmolLM2-135M at 20 % by `fast`, one run each, perplexity on WikiText-2 and on tales that nothing was calibrated
    # on: none 29.7 and 31.1, 0.01 29.6 and 30.9, 0.1 29.5 and 30.6, 0.3 30.2 and 30.9.
    input_damping: float = Field(
        0.1,
        description="ridge on E[x x^T], relative to its mean diagonal: text of another kind has other inputs",
        gt=0.0,
        le=10.0,
    )
    gradient_damping: float = Field(
        0.1,
        description="ridge on E[g g^T], relative to its mean diagonal; larger than that on the inputs, because"
        " gradients come from fewer tokens and are a second-order guide only",
        gt=0.0,
        le=10.0,
    )


def root(moment: torch.Tensor, damping: float) -> torch.Tensor:
    """Lower Cholesky factor (fp64) of a second moment [d, d] with a ridge of ``damping`` times its mean diagonal.

    A moment of trace zero (of a map that no token reached) becomes the identity, so that the weights alone decide.
    Rounding can leave a moment slightly indefinite: the ridge grows tenfold until the factor exists. Raises
    LillamaError for a moment that is not finite.
    """
    check_moment(moment)
    moment = moment.double()
    size = moment.shape[0]
    mean = moment.diagonal().mean().item()
    if not mean > 0:
        return torch.eye(size, dtype=torch.float64, device=moment.device)
    # Scaled to a mean diagonal of 1 first: gradients can be so small that squares underflow.
    moment = moment / mean
    while True:
        ridged = moment.clone()
        ridged.diagonal().add_(damping)
        factor, info = torch.linalg.cholesky_ex(ridged)
        if int(info.item()) == 0:
            return factor * mean**0.5
        damping *= 10


class Whitened(Initializer):
    """The smallest error of the map's outputs, min E|W x - W' x|^2 (SVD-LLM, arXiv 2403.07378).

    When the outputs are the smaller side no factor of G is needed: U are the eigenvectors of W G W^T.
    """

    name = "whitened"
    Options: ClassVar[type[StrategyOptions]] = WhitenedOptions
    options: WhitenedOptions
    needs_inputs = True
    corrects = True

    def decompose(self, weight: torch.Tensor, statistics: MapStatistics) -> Decomposition:
        W = weight.double()
        G, center = self.input_moment(W, statistics)
        damping = self.options.input_damping
        if W.shape[0] <= W.shape[1]:
            L = self.output_root(statistics, W)
            LW = W if L is None else L.T @ W
            ridge = damping * G.diagonal().mean() * symmetric_product(LW, LW.T)
            squared_singular_values, U = descending_eigenpairs(symmetric_product(LW @ G, LW.T) + ridge)
            # What is kept in fp32 is made in fp32: errors at 0.9 of the full rank rise by 1e-4 of themselves at most.
            left = U if L is None else torch.linalg.solve_triangular(L.T.float(), U.float(), upper=True)
            right = U.T if L is None else U.float().T @ L.T.float()
        else:
            C = root(G, damping)
            squared_singular_values, V = descending_eigenpairs(
                symmetric_product(C.T @ self.weighted_gram(statistics, W), C)
            )
            left = C.float() @ V.float()
            right = torch.linalg.solve_triangular(C.T.float(), V.float(), upper=True).T
        return Decomposition(
            Spectrum(squared_singular_values.clamp(min=0), comparable=self.needs_gradients),
            left.float().contiguous(),
            right.float().contiguous(),
            W.shape[0] <= W.shape[1],
            center,
        )

    def eliminate(self, weight: torch.Tensor, statistics: MapStatistics) -> Elimination | None:
        W = weight.double()
        if statistics.inputs is None:
            return None
        G, center = self.input_moment(W, statistics)
        C = root(G, self.options.input_damping)
        G = G.clone()
        # With its ridge, whatever that had to be.
        G.diagonal().copy_(C.square().sum(1))
        if W.shape[0] > W.shape[1]:
            # Any matrix of that Gram matrix will do: here its root, of the smaller side.
            gram = self.weighted_gram(statistics, W)
            weighted = root(gram, SMALLEST_RIDGE).T if gram.diagonal().sum() > 0 else torch.zeros_like(gram)
            return eliminate(G, C, weighted, center)
        L = self.output_root(statistics, W)
        return eliminate(G, C, W if L is None else L.T @ W, center)

    @staticmethod
    def input_moment(W: torch.Tensor, statistics: MapStatistics) -> tuple[torch.Tensor, torch.Tensor | None]:
        """E[x x^T] [in, in] in fp64, about E[x] where a bias takes up what that is; and that E[x]."""
        G = None if statistics.inputs is None else statistics.inputs.double()
        center = statistics.center if statistics.has_bias else None
        if G is not None and center is not None:
            G = G - torch.outer(center, center).double()
        if G is None or not G.diagonal().sum() > 0:
            # Nothing came by: the weights alone decide.
            G = torch.eye(W.shape[1], dtype=torch.float64, device=W.device)
        return G, center

    def output_root(self, statistics: MapStatistics, W: torch.Tensor) -> torch.Tensor | None:
        """L [out, out], or None for the identity."""
        return None

    def weighted_gram(self, statistics: MapStatistics, W: torch.Tensor) -> torch.Tensor:
        """W^T L L^T W [in, in]."""
        return symmetric_product(W.T, W)


class Fisher(Whitened):
    """The smallest change of the model's predictions: errors of the outputs weighed by F = E[g g^T].

    With g the gradient of the log-likelihood of the model's own predictions, E[(e^T g)^2] is to second order twice the
    Kullback-Leibler divergence that an output error e causes; taking inputs and gradients as independent (K-FAC,
    Martens and Grosse, arXiv 1503.05671, section 3) gives |L^T (W - W') C|_F^2. Its singular values are in one unit
    for all maps of the model, which is what lets ``spectrum`` trade ranks between them.
    """

    name = "fisher"
    Options = FisherOptions
    options: FisherOptions
    needs_gradients = True

    def decompose(self, weight: torch.Tensor, statistics: MapStatistics) -> Decomposition:
        found = super().decompose(weight, statistics)
        scaled = found.spectrum.squared_singular_values * self.uses(statistics)
        return replace(found, spectrum=Spectrum(scaled, comparable=True))

    def eliminate(self, weight: torch.Tensor, statistics: MapStatistics) -> Elimination | None:
        found = super().eliminate(weight, statistics)
        return None if found is None else replace(found, curve=found.curve.scaled(self.uses(statistics)))

    @staticmethod
    def uses(statistics: MapStatistics) -> float:
        """How often an error counts: as often as the map is used.

        A map that no gradient reached has no effect on the loss: any rank is as good as another.
        """
        return statistics.rows if statistics.gradient_scale > 0 else 0.0

    def output_root(self, statistics: MapStatistics, W: torch.Tensor) -> torch.Tensor | None:
        return None if statistics.gradients is None else root(statistics.gradients, self.options.gradient_damping)

    def weighted_gram(self, statistics: MapStatistics, W: torch.Tensor) -> torch.Tensor:
        scale = statistics.gradient_scale
        if statistics.gradients is None or not scale > 0:
            return symmetric_product(W.T, W)
        weights = W.float()
        return statistics.gradients.double() + self.options.gradient_damping * scale * symmetric_product(
            weights.T, weights
        )
