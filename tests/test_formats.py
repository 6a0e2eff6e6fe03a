"""Formats: the same function, exactly counted, through every conversion."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended, core_names
from hypothesis import given, settings
from hypothesis import strategies as st

from lillama_core import UserError
from lillama_core.formats import Factored, Format, Pivoted
from lillama_core.formats.pivoted import LARGEST_ENTRY, interpolate
from lillama_core.formats.trial import check_format
from lillama_core.strategies import make

FORMATS = [make("formats", name) for name in core_names("formats")]
shapes = st.tuples(st.integers(2, 40), st.integers(2, 40))


def factors(m: int, n: int, r: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, r, generator=generator), torch.randn(r, n, generator=generator)


@pytest.mark.parametrize("format_", FORMATS, ids=lambda f: f.name)
@given(shape=shapes, bias=st.booleans(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_format_computes_the_product_of_its_factors(
    format_: Format, shape: tuple[int, int], bias: bool, data: st.DataObject
) -> None:
    m, n = shape
    r = data.draw(st.integers(1, min(m, n) - 1))
    B, A = factors(m, n, r, data.draw(st.integers(0, 1000)))
    b = torch.randn(m) if bias else None
    layer = format_.from_factors(B.double(), A.double(), None if b is None else b.double())
    x = torch.randn(3, 5, n, dtype=torch.float64)
    expected = x @ (B.double() @ A.double()).T + (0 if b is None else b.double())
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    back_B, back_A = format_.to_factors(layer)
    torch.testing.assert_close(back_B @ back_A, B.double() @ A.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("format_", FORMATS, ids=lambda f: f.name)
@given(shape=shapes, data=st.data())
@settings(max_examples=60, deadline=None)
def test_counted_parameters_are_those_of_the_module(
    format_: Format, shape: tuple[int, int], data: st.DataObject
) -> None:
    m, n = shape
    r = data.draw(st.integers(1, min(m, n) - 1))
    layer = format_.module(m, n, r, bias=False, dtype=torch.float32, device="meta")
    assert sum(p.numel() for p in layer.parameters()) == format_.parameters(m, n, r)
    with_bias = format_.module(m, n, r, bias=True, dtype=torch.float32, device="meta")
    assert sum(p.numel() for p in with_bias.parameters()) == format_.parameters(m, n, r) + m


@pytest.mark.parametrize("format_", FORMATS, ids=lambda f: f.name)
@given(shape=shapes, data=st.data())
@settings(max_examples=200, deadline=None)
def test_largest_rank_is_the_largest_that_fits(format_: Format, shape: tuple[int, int], data: st.DataObject) -> None:
    m, n = shape
    budget = data.draw(st.integers(0, m * n + 5))
    fitting = [r for r in range(1, min(m, n)) if format_.parameters(m, n, r) <= min(budget, m * n - 1)]
    assert format_.largest_rank(m, n, budget) == max(fitting, default=0)


def test_pivoted_is_bounded_where_the_leading_columns_are_singular() -> None:
    """The identity must not be built on dependent columns: the first half of A repeats one column."""
    A = torch.randn(8, 20)
    A[:, :10] = A[:, :1]
    layer = make("formats", "pivoted").from_factors(torch.randn(30, 8), A, None)
    assert layer.mix.weight.abs().max() < 20


def test_stored_names_differ_in_shape_from_the_dense_weight() -> None:
    """What a stock loader compares is the shape of ``<map>.weight``."""
    for format_ in FORMATS:
        for m, n in ((6, 10), (10, 6), (7, 7)):
            for r in range(1, min(m, n)):
                layer = format_.module(m, n, r, bias=False, dtype=torch.float32, device="meta")
                stored = layer.get_submodule(format_.stored_as_weight(m, n)).weight
                assert tuple(stored.shape) != (m, n)


@pytest.mark.parametrize("shape", [(12, 12), (12, 20), (20, 12)])
@pytest.mark.parametrize("rank", [0, 2])
def test_pivoted_of_factors_that_are_singular(shape: tuple[int, int], rank: int) -> None:
    """A map of zeros, and one of a lower rank than it is given."""
    m, n = shape
    B, A = factors(m, n, 5)
    B, A = B.double(), A.double()
    A[rank:] = 0
    B[:, rank:] = 0
    layer = make("formats", "pivoted").from_factors(B, A, None)
    assert all(p.abs().max() < 100 for p in layer.parameters())
    x = torch.randn(4, n, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ (B @ A).T, rtol=1e-9, atol=1e-9)


@given(shape=shapes, data=st.data(), dtype=st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=100, deadline=None)
def test_interpolation_reproduces_the_rows_with_small_entries(
    shape: tuple[int, int], data: st.DataObject, dtype: torch.dtype
) -> None:
    r, n = sorted(shape)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    A = torch.randn(r, n, generator=generator, dtype=dtype) * torch.logspace(0, -3, r, dtype=dtype)[:, None]
    order, R, T = interpolate(A)
    assert sorted(order.tolist()) == list(range(n))
    assert T.shape == (r, n - r)
    assert T.dtype == R.dtype == dtype
    assert n == r or float(T.abs().max()) <= LARGEST_ENTRY * (1 + 1e-3)
    rounding = 1e-5 if dtype == torch.float32 else 1e-10
    expected = A.double()[:, order]
    torch.testing.assert_close(expected[:, :r], R.double(), rtol=0, atol=0)
    torch.testing.assert_close(R.double() @ T.double(), expected[:, r:], rtol=0, atol=rounding * float(A.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(60, 100), (100, 60)])
def test_pivoted_keeps_its_dtype_and_loses_only_what_rounding_takes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """No more than a few times the rounding of plain factors to the same dtype."""
    B, A = (t.to(dtype) for t in factors(*shape, 40))
    layer = make("formats", "pivoted").from_factors(B, A, None)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    back_B, back_A = make("formats", "pivoted").to_factors(layer)
    expected = B.double() @ A.double()
    error = (back_B.double() @ back_A.double() - expected).norm() / expected.norm()
    assert error < 20 * torch.finfo(dtype).eps


def test_converting_factors_that_are_trained_leaves_no_trace_of_their_gradients() -> None:
    B, A = (t.requires_grad_() for t in factors(12, 9, 4))
    layer = make("formats", "pivoted").from_factors(B, A, None)
    assert all(p.is_leaf and p.grad is None for p in layer.parameters())


class Doubling(Factored):
    name = "doubling"

    def from_factors(self, B: torch.Tensor, A: torch.Tensor, bias: torch.Tensor | None) -> Any:
        return super().from_factors(2 * B, A, bias)


class Miscounting(Factored):
    name = "miscounting"

    def parameters(self, out_features: int, in_features: int, rank: int) -> int:
        return super().parameters(out_features, in_features, rank) - rank * rank


class Forgetful(Factored):
    name = "forgetful"

    def from_factors(self, B: torch.Tensor, A: torch.Tensor, bias: torch.Tensor | None) -> Any:
        return super().from_factors(B, A, None)


class Turned(Factored):
    name = "turned"

    def to_factors(self, module: Any) -> tuple[torch.Tensor, torch.Tensor]:
        B, A = super().to_factors(module)
        return B, A.flip(1)


class Failing(Factored):
    name = "failing"

    def module(self, *arguments: Any) -> Any:
        raise KeyError("rank")


@pytest.mark.parametrize(
    ("format_", "complaint"),
    [
        (Doubling(), "computes something else than B A x + bias"),
        (Miscounting(), "promises 36 parameters at rank 2, and holds 40"),
        (Forgetful(), "promises 40 parameters at rank 2, and holds 28"),
        (Turned(), "gives other factors back than those that it was made of"),
        (Failing(), "fails (KeyError: 'rank')"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_format_that_breaks_a_promise_is_found(format_: Format, complaint: str) -> None:
    with pytest.raises(UserError) as raised:
        check_format(format_, [(12, 8)])
    assert str(raised.value) == f"format {format_.name!r} cannot be used: for a map [12, 8] it {complaint}"


def test_a_format_is_tried_before_the_model_is_read(
    run_cli: Callable[..., Ended], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lillama_core import hookimpl
    from lillama_registry import Registry

    class Plugin:
        @staticmethod
        @hookimpl
        def lillama_formats() -> dict[str, type[Format]]:
            return {"doubling": Doubling}

    added = Registry()
    added.load_entry_points()
    added.add(Plugin, "mine")
    monkeypatch.setattr("lillama_registry.registry", lambda: added)
    said = run_cli("plan", tiny_model, "--format", "doubling").error
    assert said == "format 'doubling' cannot be used: for a map [16, 32] it computes something else than B A x + bias"


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_an_order_that_is_kept_follows_what_is_loaded(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    out, in_ = shape
    first, second = (Pivoted().from_factors(torch.randn(out, 3), torch.randn(3, in_), None) for _ in range(2))
    x = torch.randn(4, in_)

    def expected(layer: torch.nn.Module) -> torch.Tensor:
        B, A = Pivoted().to_factors(layer)
        return x @ A.T @ B.T

    torch.testing.assert_close(first(x), expected(first))
    first.load_state_dict(second.state_dict())
    torch.testing.assert_close(first(x), expected(second))
    torch.testing.assert_close(copy.deepcopy(first)(x), expected(second))
    # Whoever writes into the order itself is heard, too, and so is another tensor in its place.
    first.permutation.copy_(first.permutation.flip(0))
    torch.testing.assert_close(first(x), expected(first))
    first.permutation = first.permutation.roll(1)
    torch.testing.assert_close(first(x), expected(first))
    with torch.inference_mode():
        torch.testing.assert_close(first(x), expected(first))
    assert first.state_dict()["permutation"].dtype == torch.int16
    torch.testing.assert_close(torch.compile(first, backend="eager")(x), expected(first))
    torch.testing.assert_close(torch.export.export(first, (x,)).module()(x), expected(first))
