"""Eigenpairs and the truncation errors that follow from them, on spectra that are hard, against fp64 arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lillama_core.initialization import MapStatistics
from lillama_core.initialization.eigen import SPLIT, descending_eigenpairs, symmetric_product
from lillama_core.initialization.second_moments import FisherOptions
from lillama_core.strategies import make

SPECTRA = {
    "spread": lambda d: torch.logspace(0, -8, d, dtype=torch.float64),
    "clustered": lambda d: 1 + 1e-9 * torch.arange(d, dtype=torch.float64).flip(0) + 100.0 * (torch.arange(d) < d // 4),
    "rank-deficient": lambda d: (torch.arange(d) < d // 3).double() * torch.linspace(2, 1, d, dtype=torch.float64),
    "one token": lambda d: (torch.arange(d) < 1).double(),
    "zero": lambda d: torch.zeros(d, dtype=torch.float64),
}


def orthogonal(d: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q


def moment_of(name: str, d: int, seed: int = 0) -> torch.Tensor:
    Q = orthogonal(d, torch.Generator().manual_seed(seed))
    return Q @ SPECTRA[name](d).diag() @ Q.T


@pytest.mark.parametrize("name", SPECTRA)
def test_eigenpairs_of_hard_spectra(name: str) -> None:
    d = 120
    expected = SPECTRA[name](d)
    moment = moment_of(name, d)
    eigenvalues, vectors = descending_eigenpairs(moment)
    assert (eigenvalues.diff() <= 0).all()
    torch.testing.assert_close(eigenvalues, expected, rtol=0, atol=1e-13 * d * float(expected.max()) + 1e-300)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(d, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(vectors * eigenvalues @ vectors.T, moment, rtol=0, atol=1e-11)


def test_eigenpairs_do_not_change_the_moment() -> None:
    moment = moment_of("spread", 40)
    before = moment.clone()
    descending_eigenpairs(moment)
    assert torch.equal(moment, before)


@given(d=st.integers(1, 3 * SPLIT), k=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_symmetric_products_equal_the_full_ones(d: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(d, k, generator=generator, dtype=torch.float64)
    weights = torch.rand(k, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        symmetric_product(left * weights, left.T), left * weights @ left.T, rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (70, 70)])
@pytest.mark.parametrize("gradients", SPECTRA)
@pytest.mark.parametrize("inputs", SPECTRA)
def test_errors_at_every_rank_are_within_a_thousandth_of_the_optimum(
    shape: tuple[int, int], inputs: str, gradients: str
) -> None:
    """The error of the fp32 factors, multiplied out in fp64, against the singular values that numpy finds."""
    m, n = shape
    W = torch.randn(shape, generator=torch.Generator().manual_seed(2)).double()
    G, F = moment_of(inputs, n, 3), moment_of(gradients, m, 4)
    scale = float(F.diagonal().mean())
    decomposition = make("initializers", "fisher").decompose(W, MapStatistics(G, F if m <= n else W.T @ F @ W, scale))

    # The problem as the initialiser states it: a moment of nothing is the identity, and each root has its ridge.
    G = G if float(G.diagonal().sum()) > 0 else torch.eye(n, dtype=torch.float64)
    F = F + FisherOptions().gradient_damping * scale * torch.eye(m) if scale > 0 else torch.eye(m, dtype=torch.float64)
    G = G + FisherOptions().input_damping * G.diagonal().mean() * torch.eye(n)
    half_F, half_G = symmetric_root(F), symmetric_root(G)
    energies = torch.from_numpy(np.linalg.svd((half_F @ W @ half_G).numpy(), compute_uv=False)) ** 2
    total = float(energies.sum())
    # Factors in fp32 hold the map to a part in 10^7 of its size, and the weighted gram of W is made in fp32.
    floor = 1e-12 * total if m <= n else 1e-8 * total
    for part in (0.1, 0.3, 0.5, 0.7, 0.9):
        rank = int(part * min(m, n))
        B, A = decomposition.factors(W, rank)
        reached = float((half_F @ (W - B.double() @ A.double()) @ half_G).square().sum())
        assert reached <= float(energies[rank:].sum()) * (1 + 1e-3) + floor
        told = float(decomposition.spectrum.squared_singular_values.double()[rank:].sum())
        if scale > 0:
            assert told == pytest.approx(float(energies[rank:].sum()), rel=1e-3, abs=floor)


def symmetric_root(moment: torch.Tensor) -> torch.Tensor:
    eigenvalues, vectors = np.linalg.eigh(moment.numpy())
    return torch.from_numpy(vectors * np.sqrt(eigenvalues.clip(min=0)) @ vectors.T)
