"""Initialisers against optima that are found another way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import core_names

from lillama_core.errors import LillamaError
from lillama_core.initialization import MapStatistics
from lillama_core.initialization.second_moments import FisherOptions, WhitenedOptions, root
from lillama_core.strategies import make


def random_map(m: int, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W [m, n], inputs X [tokens, n] and output gradients Y [tokens, m], all correlated."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(m, n, generator=g, dtype=torch.float64)
    X = torch.randn(400, n, generator=g, dtype=torch.float64) @ torch.randn(n, n, generator=g, dtype=torch.float64)
    Y = torch.randn(400, m, generator=g, dtype=torch.float64) @ torch.randn(m, m, generator=g, dtype=torch.float64)
    return W, X, Y


def statistics(W: torch.Tensor, X: torch.Tensor, Y: torch.Tensor) -> MapStatistics:
    G, F = X.T @ X / len(X), Y.T @ Y / len(Y)
    gradients = F if W.shape[0] <= W.shape[1] else W.T @ F @ W
    return MapStatistics(G, gradients, float(F.diagonal().mean()))


def with_ridge(moment: torch.Tensor, damping: float) -> torch.Tensor:
    return moment + damping * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)


def best_by_descent(objective, m: int, n: int, r: int) -> float:
    """The smallest value that gradient descent finds from several starts: an optimum without any algebra."""
    best = float("inf")
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        B = torch.randn(m, r, generator=g, dtype=torch.float64, requires_grad=True)
        A = torch.randn(r, n, generator=g, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([B, A], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

        def closure(B: torch.Tensor = B, A: torch.Tensor = A) -> torch.Tensor:
            B.grad = A.grad = None
            loss = objective(B @ A)
            loss.backward()
            return loss

        optimizer.step(closure)
        best = min(best, objective(B @ A).item())
    return best


@pytest.mark.parametrize(("m", "n"), [(5, 7), (7, 5), (6, 6)])
@pytest.mark.parametrize("r", [1, 3])
def test_activation_aware_reaches_the_optimum_of_the_output_error(m: int, n: int, r: int) -> None:
    W, X, Y = random_map(m, n)
    G = with_ridge(X.T @ X / len(X), WhitenedOptions().input_damping)

    def error(product: torch.Tensor) -> torch.Tensor:
        return torch.trace((W - product) @ G @ (W - product).T)

    init = make("initializers", "whitened")
    B, A = init.decompose(W, statistics(W, X, Y)).factors(W, r)
    reached = error((B @ A).double()).item()
    assert reached == pytest.approx(best_by_descent(error, m, n, r), rel=1e-5)


@pytest.mark.parametrize(("m", "n"), [(5, 7), (7, 5), (6, 6)])
@pytest.mark.parametrize("r", [1, 3])
def test_sensitivity_aware_reaches_the_optimum_of_the_weighted_error(m: int, n: int, r: int) -> None:
    W, X, Y = random_map(m, n)
    F = with_ridge(Y.T @ Y / len(Y), FisherOptions().gradient_damping)
    G = with_ridge(X.T @ X / len(X), FisherOptions().input_damping)

    def error(product: torch.Tensor) -> torch.Tensor:
        return torch.trace(F @ (W - product) @ G @ (W - product).T)

    init = make("initializers", "fisher")
    found = init.decompose(W, statistics(W, X, Y))
    B, A = found.factors(W, r)
    reached = error((B @ A).double()).item()
    assert reached == pytest.approx(best_by_descent(error, m, n, r), rel=1e-5)
    # What the allocator is told is what leaving the components out costs.
    assert float(found.spectrum.squared_singular_values[r:].sum()) == pytest.approx(reached, rel=1e-5)


def test_plain_svd_equals_a_truncated_svd() -> None:
    for m, n in ((5, 9), (9, 5)):
        W = torch.randn(m, n, dtype=torch.float64)
        U, s, Vt = torch.linalg.svd(W, full_matrices=False)
        B, A = make("initializers", "svd").decompose(W, MapStatistics()).factors(W, 3)
        expected = (U[:, :3] * s[:3]) @ Vt[:3]
        torch.testing.assert_close((B @ A).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", core_names("initializers"))
@pytest.mark.parametrize(("m", "n"), [(6, 9), (9, 6)])
def test_full_rank_gives_the_matrix_back(name: str, m: int, n: int) -> None:
    if name == "random":
        pytest.skip("random factors approximate nothing")
    W, X, Y = random_map(m, n)
    B, A = make("initializers", name).decompose(W, statistics(W, X, Y)).factors(W, min(m, n))
    torch.testing.assert_close((B @ A).double(), W, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["whitened", "fisher"])
@pytest.mark.parametrize(("m", "n"), [(6, 9), (9, 6)])
def test_degenerate_statistics_give_finite_factors(name: str, m: int, n: int) -> None:
    W, X, Y = random_map(m, n)
    nothing_in = MapStatistics(torch.zeros(n, n), statistics(W, X, Y).gradients, 1.0)
    one_token = X[:1]
    singular = MapStatistics(one_token.T @ one_token, statistics(W, X, Y).gradients, 1.0)
    side = min(m, n)
    no_gradient = MapStatistics(X.T @ X, torch.zeros(side, side), 0.0)
    for case in (nothing_in, singular, no_gradient):
        B, A = make("initializers", name).decompose(W, case).factors(W, 2)
        assert torch.isfinite(B).all()
        assert torch.isfinite(A).all()


def test_random_init_has_the_stated_scale_and_is_seeded() -> None:
    W = torch.zeros(200, 300)
    init = make("initializers", "random")
    d = init.decompose(torch.randn(200, 300), MapStatistics())
    B, A = init.factors(W, 50, d, torch.Generator().manual_seed(1))
    again, _ = init.factors(W, 50, d, torch.Generator().manual_seed(1))
    assert torch.equal(B, again)
    assert A.std().item() == pytest.approx(300**-0.5, rel=0.05)


def test_components_are_balanced() -> None:
    W, X, Y = random_map(6, 9)
    B, A = make("initializers", "fisher").decompose(W, statistics(W, X, Y)).factors(W, 4)
    torch.testing.assert_close(B.norm(dim=0), A.norm(dim=1))


@pytest.mark.parametrize("shape", [(10, 16), (16, 10)])
def test_a_bias_makes_up_for_what_all_inputs_share(shape: tuple[int, int]) -> None:
    """Inputs far from zero: the error left is that of the centred inputs, as a sum over all rows says."""
    out_features, in_features = shape
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(shape, generator=generator)
    b = torch.randn(out_features, generator=generator)
    X = (
        torch.randn(400, in_features, generator=generator) @ torch.randn(in_features, in_features, generator=generator)
        + 5
    )
    with_bias = MapStatistics(X.T @ X / len(X), center=X.mean(0), has_bias=True)
    found = make("initializers", "whitened").decompose(W, with_bias)
    B, A = found.factors(W, 4)
    bias = found.bias(b, W, B, A)
    assert bias is not None
    error = ((X @ W.T + b) - (X @ A.T @ B.T + bias)).square().sum(1).mean()
    assert error == pytest.approx(float(found.spectrum.squared_singular_values[4:].sum()), rel=2e-2)

    plain = make("initializers", "whitened").decompose(W, replace(with_bias, has_bias=False))
    B, A = plain.factors(W, 4)
    assert plain.bias(b, W, B, A) is b
    assert error < ((X @ W.T) - (X @ A.T @ B.T)).square().sum(1).mean()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_moments_that_are_no_numbers_are_an_error(value: float) -> None:
    moment = torch.eye(4)
    moment[1, 1] = value
    with pytest.raises(LillamaError, match=r"moments \[4, 4\] .* are infinite or not a number"):
        root(moment, 0.1)
