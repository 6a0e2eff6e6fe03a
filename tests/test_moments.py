"""Second moments of weighted rows against sums over single rows, in fp64."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from lillama_core.initialization import balance
from lillama_core.statistics import moments
from lillama_core.statistics.moments import SecondMoment, add_upper_gram, computes_in_bfloat16
from lillama_core.system.devices import fast_gram_products


@given(
    size=st.integers(1, 40),
    batches=st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=4),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_batches_with_and_without_weights_add_up(size: int, batches: list[tuple[int, bool]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    moment, total, sums, count = SecondMoment(), torch.zeros(size, size).double(), torch.zeros(size).double(), 0.0
    for tokens, weighted in batches:
        rows = torch.randn(tokens, size, generator=generator)
        weights = torch.randint(0, 4, (tokens,), generator=generator) if weighted else None
        moment.add(rows, weights)
        for row, weight in zip(rows.double(), [1] * tokens if weights is None else weights.tolist(), strict=True):
            total += weight * torch.outer(row, row)
            sums += weight * row
            count += weight
    assert moment.count == count
    if not count:
        with pytest.raises(ValueError, match="no rows"):
            moment.mean()
        return
    torch.testing.assert_close(moment.mean().double(), total / count, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moment.center().double(), sums / count, rtol=1e-4, atol=1e-4)
    assert torch.equal(moment.mean(), moment.mean().T)


def test_rows_that_count_for_nothing_may_hold_anything() -> None:
    rows = torch.tensor([[1.0, 2.0], [float("inf"), float("nan")], [3.0, 4.0]])
    moment = SecondMoment()
    moment.add(rows, torch.tensor([True, False, True]))
    assert moment.count == 2
    torch.testing.assert_close(moment.mean(), torch.tensor([[5.0, 7.0], [7.0, 10.0]]))


def test_rows_that_are_not_contiguous_and_of_half_precision() -> None:
    rows = torch.randn(7, 50, dtype=torch.bfloat16).T
    moment = SecondMoment()
    moment.add(rows)
    torch.testing.assert_close(moment.mean(), rows.float().T @ rows.float() / 50, rtol=1e-4, atol=1e-5)


def test_the_sum_is_made_in_place_and_below_the_diagonal_nothing_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    # On several threads tiles on the diagonal are filled; nobody reads what is below it.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    total = torch.full((30, 30), 2.0)
    before, rows = total.data_ptr(), torch.randn(11, 30)
    add_upper_gram(total, rows)
    assert total.data_ptr() == before
    torch.testing.assert_close(total.triu(), (2 + rows.T @ rows).triu(), rtol=1e-4, atol=1e-5)
    assert (total.tril(-1) == torch.full((30, 30), 2.0).tril(-1)).all()


def test_a_count_beyond_what_fp32_holds_stays_exact() -> None:
    moment = SecondMoment()
    for _ in range(3):
        moment.add(torch.ones(1, 1), torch.tensor([2**24 + 2]))
    assert moment.count == 3 * (2**24 + 2)


@pytest.mark.parametrize("half", [False, True])
def test_a_pass_on_cuda_waits_for_nothing(half: bool) -> None:
    """Tensors without values, which raise where one is asked for: the batches of a pass ask for none."""
    if half:
        torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", half)
    try:
        with FakeTensorMode():
            moment = SecondMoment()
            for weights in (None, torch.ones(5, device="cuda"), torch.ones(5, device="cuda", dtype=torch.bool)):
                moment.add(torch.ones(5, 3, device="cuda"), weights)
            assert moment.total is not None
            assert moment.total.dtype == torch.float32
            B, A = balance(torch.ones(4, 2, device="cuda"), torch.ones(2, 3, device="cuda"))
            assert (B.shape, A.shape) == ((4, 2), (2, 3))
            with pytest.raises(DataDependentOutputException):
                _ = moment.count
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", torch.float16)


def test_off_cuda_products_are_as_they_were() -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.mkldnn.matmul.fp32_precision
    for name in ("cpu", "mps"):
        with fast_gram_products(torch.device(name)):
            assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.mkldnn.matmul.fp32_precision) == before


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_rows_lose_nothing_by_products_in_bfloat16(autocast: bool) -> None:
    """On a CPU without such products the fp32 ones are taken, and the bound is the same."""
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(2000, 400, generator=generator) @ torch.randn(400, 400, generator=generator)).bfloat16()
    exact = rows.double().T @ rows.double() / len(rows)
    moment = SecondMoment()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        moment.add(rows.float() if autocast else rows)
    before = torch.backends.mkldnn.matmul.fp32_precision
    assert (moment.mean() - exact).abs().max() < 4e-6 * exact.abs().max()
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    # Small eigenvalues are what a rounded sum would lose: bfloat16 sums are off by 4e-3 of the largest entry. fp32 sums
    # may be off by a few roundings of the largest eigenvalue.
    eigenvalues = torch.linalg.eigvalsh(exact)
    bound = 4 * torch.finfo(torch.float32).eps * eigenvalues.max().item()
    torch.testing.assert_close(torch.linalg.eigvalsh(moment.mean().double()), eigenvalues, rtol=1e-5, atol=bound)


@pytest.mark.parametrize("weighted", [False, True])
def test_moments_and_means_are_of_the_same_rows(weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A channel that hardly varies around a number that bfloat16 has not: its variance must not become negative."""
    monkeypatch.setattr(moments, "has_fast_bfloat16_cpu", lambda: True)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(500, 8, generator=generator)
    rows[:, 0] = 100.2
    weights = torch.rand(500, generator=generator) if weighted else None
    moment = SecondMoment()
    with torch.autocast("cpu", torch.bfloat16):
        moment.add(rows, weights)
    G, center = moment.mean().double(), moment.center().double()
    # As far as fp32 holds its square.
    assert torch.linalg.eigvalsh(G - torch.outer(center, center))[0] > -1e-2
    roots = torch.ones(500) if weights is None else weights.sqrt()
    rounded = (roots[:, None] * rows).bfloat16().float()
    torch.testing.assert_close(moment.center(), roots @ rounded / roots.square().sum())


def test_on_cuda_tf32_is_allowed_inside_only() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    with contextlib.suppress(KeyError), fast_gram_products(torch.device("cuda")):
        assert torch.backends.cuda.matmul.allow_tf32
        raise KeyError
    assert torch.backends.cuda.matmul.allow_tf32 == before


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_bfloat16_rows_only_where_the_pass_computes_in_it(kind: str) -> None:
    device, before = torch.device(kind), torch.get_autocast_dtype(kind)
    assert not computes_in_bfloat16(device)
    torch.set_autocast_enabled(kind, True)
    try:
        torch.set_autocast_dtype(kind, torch.float16)
        assert not computes_in_bfloat16(device)
        torch.set_autocast_dtype(kind, torch.bfloat16)
        assert computes_in_bfloat16(device)
    finally:
        torch.set_autocast_enabled(kind, False)
        torch.set_autocast_dtype(kind, before)
