"""Published methods against what their papers say, computed another way."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ended

from lillama_benchmarks.baselines.asvd import ActivationScaled
from lillama_benchmarks.baselines.bolaco import BayesianSearch
from lillama_benchmarks.baselines.d_rank import EffectiveRank, effective_rank
from lillama_benchmarks.baselines.liteasr import OutputComponents, VarianceThreshold
from lillama_benchmarks.cells import command_line
from lillama_benchmarks.methods import BASELINES, Method, find_methods
from lillama_core.allocation import AllocationRequest, ChannelCurve, Spectrum
from lillama_core.allocation.plan import PlannedMap, RankPlan, kept_parameters, make_budget
from lillama_core.architecture.targets.linear_map import TargetLinear
from lillama_core.errors import UserError
from lillama_core.formats.pivoted import InputPivotedLinear
from lillama_core.initialization import MapStatistics, PlainSVD, StudentStatistics
from lillama_core.recipe.loading import load_recipe
from lillama_core.recipe.model import Recipe
from lillama_core.recipe.reading import check_options_are_read, choose
from lillama_core.statistics.moments import SecondMoment
from lillama_core.strategies import ChosenStrategies, make
from lillama_testing.tiny import QUICK

SHAPES = [(12, 20), (20, 12)]


def recipe_of(method: Method) -> Recipe:
    return load_recipe(method.recipe).with_options(method.options, f"method {method.name}")


def strategies_of(name: str) -> ChosenStrategies:
    """What the method of this name is made of."""
    return choose(recipe_of(find_methods((name,))[0]))


def drawn(out_features: int, in_features: int, tokens: int = 500) -> tuple[torch.Tensor, torch.Tensor, MapStatistics]:
    """W [out, in], inputs [tokens, in] that are correlated and of unequal size, and their statistics."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(out_features, in_features, generator=generator)
    mixing = torch.randn(in_features, in_features, generator=generator) * torch.logspace(0, -2, in_features)
    x = torch.randn(tokens, in_features, generator=generator) @ mixing.T + 0.3
    moment = SecondMoment()
    moment.add(x)
    return W, x, MapStatistics(inputs=moment.mean(), center=moment.center())


def plan_for(
    allocator: Any, shapes: dict[str, tuple[int, int]], reduction: float, format_: str, spectra: dict[str, Spectrum]
) -> tuple[RankPlan, int]:
    """The plan for maps of these shapes by path, blocks counted from the name, and what it leaves of the budget."""
    maps = [
        PlannedMap(name, "decoder", int(name.split(".")[1]), TargetLinear(name.split(".", 2)[2], *shape))
        for name, shape in shapes.items()
    ]
    stored = make("formats", format_)
    budget = make_budget(maps, sum(m.dense_parameters for m in maps), reduction, stored)
    plan = allocator.allocate(AllocationRequest(maps, budget, stored, spectra))
    return plan, budget.maps_kept - kept_parameters(maps, plan, stored)


# All of them


@pytest.mark.parametrize("method", BASELINES, ids=lambda m: m.name)
def test_a_baseline_has_the_data_of_fast_and_no_training(method: Method) -> None:
    recipe, fast = recipe_of(method), load_recipe("fast")
    check_options_are_read(recipe)
    theirs = {"name", "init", "allocation", "format"}
    assert {k: v for k, v in recipe if k not in theirs} == {k: v for k, v in fast if k not in theirs}
    assert (recipe.tokens, recipe.self_share, recipe.steps) == (16384, 0.5, 0)


@pytest.mark.parametrize("method", BASELINES, ids=lambda m: m.name)
def test_a_baseline_compresses_a_tiny_model(
    method: Method, tiny_model: Path, calibration_text: Path, run_cli: Callable[..., Ended], tmp_path: Path
) -> None:
    read = ("tokens", "sequence_length", "self_share", "compute")
    options = {"recipe": method.recipe, "reduction": 0.2, **method.options, **{k: QUICK[k] for k in read}}
    if method.name == "bolaco":
        # Ten at random and two that the Gaussian process proposes, which takes a second each.
        options["allocation"] = {"name": options["allocation"], "trials": 12}
    ended = run_cli(
        *("compress", tiny_model, "-o", tmp_path / "small", "--calibration", calibration_text, "--quiet"),
        *command_line(options),
    )
    assert ended.status == 0, ended
    record = json.loads((tmp_path / "small" / "lillama.json").read_text(encoding="utf-8"))
    assert record["plan"]["format"] == method.options["format"]
    assert record["parameters"]["reduction"] == pytest.approx(0.2, abs=0.01)


# SVD-LLM


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_svd_llm_truncates_after_whitening(out_features: int, in_features: int) -> None:
    W, x, statistics = drawn(out_features, in_features)
    found = strategies_of("svd-llm").init.decompose(W, statistics)
    B, A = found.factors(W, 5)

    # The paper's own way: the Cholesky factor of the sum, and no ridge.
    S = np.linalg.cholesky((x.double().T @ x.double()).numpy())
    U, sigma, Vt = np.linalg.svd(W.double().numpy() @ S, full_matrices=False)
    expected = (U[:, :5] * sigma[:5]) @ Vt[:5] @ np.linalg.inv(S)
    np.testing.assert_allclose((B @ A).double().numpy(), expected, rtol=1e-3, atol=1e-3)
    squared_singular_values = found.spectrum.squared_singular_values.double().numpy() * len(x)
    np.testing.assert_allclose(squared_singular_values, sigma**2, rtol=1e-3)
    lost = ((x @ (W - B @ A).T).double() ** 2).sum().item()
    assert lost == pytest.approx((sigma[5:] ** 2).sum(), rel=1e-4)


def test_svd_llm_does_with_fewer_tokens_than_inputs() -> None:
    """There is no Cholesky factor then; the outputs of these tokens are met as closely all the same."""
    W, x, statistics = drawn(20, 12, tokens=8)
    B, A = strategies_of("svd-llm").init.decompose(W, statistics).factors(W, 5)
    sigma = np.linalg.svd((x @ W.T).double().numpy(), compute_uv=False)
    lost = ((x @ (W - B @ A).T).double() ** 2).sum().item()
    assert lost == pytest.approx((sigma[5:] ** 2).sum(), rel=1e-2)


def test_svd_llm_keeps_one_fraction_of_every_map() -> None:
    shapes = {f"layers.{i}.{kind}": shape for i in range(3) for kind, shape in (("up", (40, 16)), ("o", (16, 16)))}
    plan, left = plan_for(strategies_of("svd-llm").allocation, shapes, 0.25, "factored", {})
    # The last maps take what rounding down leaves.
    for name, (m, n) in list(shapes.items())[:-2]:
        assert plan.ranks[name] == int(m * n * 0.75 / (m + n))
    assert 0 <= left < 56


# SVD-LLM's update, and AA-SVD


def student_of(x: torch.Tensor, has_bias: bool) -> tuple[torch.Tensor, StudentStatistics]:
    """What a map reads in a compressed model that reads ``x`` [tokens, in] in the dense one, and moments of both."""
    generator = torch.Generator().manual_seed(2)
    change = torch.eye(x.shape[1]) - 0.3 * torch.rand(x.shape[1], x.shape[1], generator=generator)
    own = x @ change + 0.1 * torch.randn(x.shape, generator=generator) - 0.2
    moment = SecondMoment()
    moment.add(own)
    return own, StudentStatistics(moment.mean(), moment.center(), has_bias, x.T @ own / len(x), x.mean(0))


def with_ones(rows: torch.Tensor, has_bias: bool) -> np.ndarray:
    """Rows in fp64, with a column of ones for a bias."""
    found = rows.double().numpy()
    return np.concatenate([found, np.ones((len(found), 1))], 1) if has_bias else found


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_svd_llm_update_is_least_squares_on_what_the_compressed_model_reads(
    out_features: int, in_features: int, has_bias: bool
) -> None:
    W, x, statistics = drawn(out_features, in_features)
    own, seen = student_of(x, has_bias)
    init = strategies_of("svd-llm-update").init
    B, A = init.decompose(W, statistics).factors(W, 5)
    left, right, shift = init.adapt(W, B, A, seen)
    assert right is A
    y = (own @ W.T).double().numpy()
    solution = np.linalg.lstsq(with_ones(own @ A.T, has_bias), y, rcond=None)[0]
    np.testing.assert_allclose(left.double().numpy(), solution[:5].T, rtol=1e-3, atol=1e-3)
    assert (shift is None) == (not has_bias)
    if shift is not None:
        np.testing.assert_allclose(shift.double().numpy(), solution[5], rtol=1e-3, atol=2e-3)
    # Where nothing is lost below, nothing is to be updated.
    same = StudentStatistics(statistics.inputs, statistics.center, False)
    torch.testing.assert_close(init.adapt(W, B, A, same)[0], B, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_aa_svd_is_the_reduced_rank_regression_of_dense_outputs(
    out_features: int, in_features: int, has_bias: bool
) -> None:
    """Another way: least squares of full rank, then the principal components of what it gives."""
    W, x, statistics = drawn(out_features, in_features)
    own, seen = student_of(x, has_bias)
    init = strategies_of("aa-svd").init
    B, A, shift = init.adapt(W, *init.decompose(W, statistics).factors(W, 5), seen)
    y = (x @ W.T).double().numpy()
    fitted = with_ones(own, has_bias) @ np.linalg.lstsq(with_ones(own, has_bias), y, rcond=None)[0]
    center = fitted.mean(0) if has_bias else np.zeros(out_features)
    _, _, Vt = np.linalg.svd(fitted - center, full_matrices=False)
    expected = (fitted - center) @ Vt[:5].T @ Vt[:5] + center
    found = (own @ (B @ A).T).double().numpy() + (0.0 if shift is None else shift.double().numpy())
    assert np.linalg.norm(found - expected) < 2e-3 * np.linalg.norm(expected)
    least = np.linalg.norm(y - expected) ** 2
    assert np.linalg.norm(y - found) ** 2 == pytest.approx(least, rel=1e-3)
    # Where nothing is lost below, it is SVD-LLM.
    same = StudentStatistics(statistics.inputs, statistics.center, False, statistics.inputs, statistics.center)
    plain = torch.matmul(*strategies_of("svd-llm").init.decompose(W, statistics).factors(W, 5))
    B, A, _ = init.adapt(W, B, A, same)
    assert (x @ (B @ A - plain).T).norm() < 1e-2 * (x @ plain.T).norm()


# SkipCat


def test_skipcat_stores_no_identity() -> None:
    W, _, statistics = drawn(20, 12)
    B, A = strategies_of("skipcat").init.decompose(W, statistics).factors(W, 7)
    module = strategies_of("skipcat").format.from_factors(B, A, None)
    assert isinstance(module, InputPivotedLinear)
    assert sum(p.numel() for p in module.parameters()) == 7 * (20 + 12 - 7)

    order = module.permutation.long().numpy()
    permuted, up = A.double().numpy()[:, order], B.double().numpy()
    A_1, A_2 = permuted[:, :7], permuted[:, 7:]
    np.testing.assert_allclose(module.mix.weight.detach(), np.linalg.inv(A_1) @ A_2, atol=1e-4)
    np.testing.assert_allclose(module.up.weight.detach(), up @ A_1, atol=1e-4)
    # Of all choices of columns a well-conditioned one: entries are bounded, as a strong rank-revealing QR has them.
    assert abs(np.linalg.inv(A_1) @ A_2).max() <= 2


def test_skipcat_has_the_ranks_of_the_paper() -> None:
    shapes = {f"layers.{i}.{kind}": shape for i in range(3) for kind, shape in (("up", (40, 16)), ("o", (16, 16)))}
    plan, _ = plan_for(strategies_of("skipcat").allocation, shapes, 0.25, "pivoted", {})
    # The last maps take what rounding down leaves.
    for name, (m, n) in list(shapes.items())[:-2]:
        # Files are to be as much smaller: at most 0.4 % of the parameters make room for the permutations.
        ranks = {int((m + n - math.sqrt((m + n) ** 2 - 4 * kept * m * n)) / 2) for kept in (0.75 * 0.996, 0.75)}
        assert plan.ranks[name] in ranks


# ASVD


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_asvd_scales_inputs_by_the_root_of_their_size(out_features: int, in_features: int) -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(out_features, in_features, generator=generator)
    # Inputs that differ in scale alone: of constant magnitude here, so that its mean is known from second moments.
    signs = torch.randint(0, 2, (500, in_features), generator=generator) * 2.0 - 1
    x = signs * torch.logspace(-2, 1, in_features)
    moment = SecondMoment()
    moment.add(x)
    statistics = MapStatistics(inputs=moment.mean(), center=moment.center(), has_bias=True)
    found = strategies_of("asvd").init.decompose(W, statistics)
    B, A = found.factors(W, 5)

    s = (x.abs().double().mean(0) ** 0.5).numpy()
    U, sigma, Vt = np.linalg.svd(W.double().numpy() * s, full_matrices=False)
    np.testing.assert_allclose((B @ A).double().numpy(), (U[:, :5] * sigma[:5]) @ Vt[:5] / s, rtol=1e-3, atol=1e-3)
    bias = torch.ones(out_features)
    assert found.bias(bias, W, B, A) is bias


def test_asvd_of_power_zero_is_plain_svd_and_dead_inputs_do_no_harm() -> None:
    W, x, statistics = drawn(20, 12)
    B, A = ActivationScaled(ActivationScaled.Options(alpha=0.0)).decompose(W, statistics).factors(W, 5)
    plain = torch.matmul(*PlainSVD().decompose(W, MapStatistics()).factors(W, 5))
    torch.testing.assert_close(B @ A, plain, rtol=1e-4, atol=1e-4)
    x[:, 3] = 0
    moment = SecondMoment()
    moment.add(x)
    B, A = ActivationScaled().decompose(W, MapStatistics(inputs=moment.mean())).factors(W, 5)
    assert torch.isfinite(B @ A).all()


# D-Rank


def with_effective_rank(size: int, rank: int) -> Spectrum:
    """``rank`` equal values of ``size``: what has exactly this effective rank."""
    return Spectrum((torch.arange(size) < rank).double(), False)


def test_effective_rank_is_the_exponential_of_the_entropy() -> None:
    assert effective_rank(with_effective_rank(40, 7)) == pytest.approx(7)
    values = np.array([8.0, 4.0, 2.0, 2.0])
    p = values / values.sum()
    expected = math.exp(-sum(float(x) * math.log(x) for x in p))
    assert effective_rank(Spectrum(torch.from_numpy(values), False)) == pytest.approx(expected)
    assert effective_rank(Spectrum(torch.zeros(4), False)) == 1


@pytest.mark.parametrize("effective", [(3, 12, 30), (5, 5, 5), (1, 4, 39)])
def test_d_rank_minimises_effective_ranks_by_ranks(effective: Sequence[int]) -> None:
    """Equation 3 by brute force over all ranks that a budget allows; a rank at which nothing is saved is dense."""
    names = [f"layers.{i}.mlp.up_proj" for i in range(3)]
    spectra = {n: with_effective_rank(40, r) for n, r in zip(names, effective, strict=True)}
    plan, left = plan_for(strategies_of("d-rank").allocation, dict.fromkeys(names, (40, 40)), 0.5, "factored", spectra)
    budget = 0.5 * 3 * 1600
    affordable = [k for k in itertools.product(range(1, 21), repeat=3) if sum(k) * 80 <= budget]
    least = min(sum(r / k for r, k in zip(effective, ranks, strict=True)) for ranks in affordable)
    # Dense costs as much as rank 20.
    found = [plan.ranks.get(n, 20) for n in names]
    assert 0 <= left < 80
    assert sum(r / k for r, k in zip(effective, found, strict=True)) <= least * 1.02


def attention(queries: int, keys: int) -> dict[str, tuple[int, int]]:
    sizes = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    return {f"layers.{i}.self_attn.{kind}": (size, 64) for i in range(2) for kind, size in sizes.items()}


def test_d_rank_moves_ranks_from_queries_and_keys_to_values() -> None:
    """Equations 9 to 12, of multi-head attention."""
    shapes = attention(64, 64)
    spectra = {name: with_effective_rank(64, 4 if ".0." in name else 9) for name in shapes}
    fraction, beta, cost = 0.4, 0.3, 128
    plan, left = plan_for(strategies_of("d-rank").allocation, shapes, 1 - fraction, "factored", spectra)
    # Equation 7, the same for the three kinds.
    total = fraction * 2 * 64 * 64
    first, second = (total * math.sqrt(r / cost) / (math.sqrt(4 * cost) + math.sqrt(9 * cost)) for r in (4, 9))
    moved = beta / 2 * 2 * (first + second)
    for name in shapes:
        equal = first if ".0." in name else second
        expected = equal + moved if "v_proj" in name else (1 - beta) * equal
        # The map of the highest effective rank, the first of several, takes what rounding down leaves.
        assert expected - 1 < plan.ranks[name] <= expected + (6 if name == "layers.1.self_attn.q_proj" else 0)
    assert 0 <= left < cost


def test_d_rank_gives_no_map_more_than_it_has() -> None:
    """Values narrower than queries cannot take all that these have to give: they stay dense, and the rest goes back."""
    shapes = attention(64, 16)
    spectra = {name: with_effective_rank(16, 4 if ".0." in name else 9) for name in shapes}
    plan, left = plan_for(strategies_of("d-rank").allocation, shapes, 0.3, "factored", spectra)
    assert not [name for name in plan.ranks if "v_proj" in name]
    assert 0 <= left < 128
    none, left = plan_for(EffectiveRank(EffectiveRank.Options(transfer=0.0)), shapes, 0.3, "factored", spectra)
    assert none.ranks["layers.0.self_attn.v_proj"] < none.ranks["layers.1.self_attn.v_proj"]
    # Each kind keeps its fraction, but for what rounding leaves of all of them.
    queries = sum(128 * none.ranks[f"layers.{i}.self_attn.q_proj"] for i in range(2))
    assert abs(queries - 0.7 * 2 * 64 * 64) < 6 * 128
    assert 0 <= left < 128


@pytest.mark.parametrize("reduction", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("format_", ["factored", "pivoted"])
def test_d_rank_keeps_the_budget(reduction: float, format_: str) -> None:
    shapes = {**attention(64, 32), "layers.0.mlp.gate": (1, 64), "layers.0.mlp.down": (64, 128)}
    generator = torch.Generator().manual_seed(0)
    spectra = {
        name: Spectrum(torch.rand(min(s), generator=generator).sort(descending=True).values ** 8, False)
        for name, s in shapes.items()
    }
    plan, left = plan_for(EffectiveRank(), shapes, reduction, format_, spectra)
    assert "layers.0.mlp.gate" not in plan.ranks
    assert 0 <= left < 192


# OBD-LLM


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_obd_llm_whitens_on_both_sides(out_features: int, in_features: int) -> None:
    W, x, statistics = drawn(out_features, in_features)
    generator = torch.Generator().manual_seed(1)
    g = torch.randn(300, out_features, generator=generator) * torch.logspace(0, -1.5, out_features)
    F, G = (m.double().T @ m.double() / len(m) for m in (g, x))
    on_outputs = out_features <= in_features
    given = F if on_outputs else W.double().T @ F @ W.double()
    found = strategies_of("obd-llm").init.decompose(
        W, MapStatistics(statistics.inputs, given.float(), float(F.diagonal().mean()), center=statistics.center)
    )
    B, A = found.factors(W, 5)

    def root(moment: torch.Tensor) -> np.ndarray:
        ridge = 0.1 * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
        return np.linalg.cholesky((moment + ridge).numpy())

    L_g, L_x = root(F), root(G)
    U, sigma, Vt = np.linalg.svd(L_g.T @ W.double().numpy() @ L_x, full_matrices=False)
    half = np.sqrt(sigma[:5])
    expected = (np.linalg.inv(L_g).T @ U[:, :5] * half) @ ((half[:, None] * Vt[:5]) @ np.linalg.inv(L_x))
    np.testing.assert_allclose((B @ A).double().numpy(), expected, rtol=1e-3, atol=1e-3)


# LiteASR


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_liteasr_is_principal_components_of_the_outputs(out_features: int, in_features: int) -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(out_features, in_features, generator=generator)
    b = torch.randn(out_features, generator=generator)
    x = torch.randn(500, in_features, generator=generator) * torch.linspace(0.1, 2, in_features) + 3
    moment = SecondMoment()
    moment.add(x)
    found = OutputComponents().decompose(W, MapStatistics(inputs=moment.mean(), center=moment.center()))
    B, A = found.factors(W, 5)
    bias = found.bias(b, W, B, A)
    assert bias is not None

    # The paper's own way: SVD of the centred outputs.
    y = (x @ W.T + b).double().numpy()
    mu = y.mean(0)
    V = np.linalg.svd(y - mu, full_matrices=False)[2][:5].T
    expected = mu + (y - mu) @ V @ V.T
    np.testing.assert_allclose((x @ A.T @ B.T + bias).double().numpy(), expected, rtol=1e-3, atol=1e-3)


def test_one_threshold_for_all_maps() -> None:
    names = [f"layers.{i}.{kind}" for i in range(3) for kind in ("self_attn.q", "fc1")]
    maps = [PlannedMap(name, "encoder", 0, TargetLinear(name, 40, 40)) for name in names]
    spectra = {m.name: Spectrum(0.9 ** (torch.arange(40.0) * (1 + i / 4)), False) for i, m in enumerate(maps)}
    format_ = make("formats", "factored")
    budget = make_budget(maps, 6 * 1600, 0.3, format_)
    plan = VarianceThreshold().allocate(AllocationRequest(maps, budget, format_, spectra))
    assert 0 <= budget.maps_kept - kept_parameters(maps, plan, format_) < 80
    dropped = {
        n: 1 - float(spectra[n].squared_singular_values[:r].sum() / spectra[n].squared_singular_values.sum())
        for n, r in plan.ranks.items()
    }
    attention = [d for n, d in dropped.items() if "attn" in n]
    # Ranks are whole: the threshold lies between what each map drops and what it would with one less.
    assert max(attention) < 2.5 * min(attention)
    assert all(d < 0.25 * max(attention) for n, d in dropped.items() if "fc1" in n)


@pytest.mark.parametrize("fraction", [0.5, 0.8])
def test_a_threshold_is_found_where_mlps_have_to_lose_nearly_all(fraction: float) -> None:
    """Ten times as strict, they drop a tenth of their variance when attention has dropped all of its own."""
    maps = [PlannedMap(name, "encoder", 0, TargetLinear(name, 40, 40)) for name in ("self_attn.q", "fc1", "fc2")]
    spectra = {m.name: Spectrum(torch.ones(40), False) for m in maps}
    format_ = make("formats", "factored")
    budget = make_budget(maps, 3 * 1600, fraction, format_)
    plan = VarianceThreshold().allocate(AllocationRequest(maps, budget, format_, spectra))
    assert 0 <= budget.maps_kept - kept_parameters(maps, plan, format_) < 160


# MoDeGPT


class Told:
    """Measurements that a test makes up; notes the plans that were asked for."""

    def __init__(
        self,
        influences: dict[tuple[str, int], float] | None = None,
        cost: Callable[[RankPlan], float] = lambda plan: 0.0,
    ) -> None:
        self._influences, self._cost = influences or {}, cost
        self.asked: list[RankPlan] = []

    def divergence(self, plan: RankPlan) -> float:
        self.asked.append(plan)
        return self._cost(plan)

    def influences(self) -> dict[tuple[str, int], float]:
        return self._influences


def test_modegpt_keeps_channels_of_high_leverage_and_refits() -> None:
    W, z, statistics = drawn(6, 20)
    found = strategies_of("modegpt").init.eliminate(W, statistics)
    C = (z.double().T @ z.double() / len(z)).numpy()
    ridge = 1e-2 * np.diagonal(C).mean()
    # The diagonal of C (C + lambda I)^-1 another way: each eigenvector counts by what the ridge leaves of it.
    values, vectors = np.linalg.eigh(C)
    scores = (vectors**2 * (values / (values + ridge))).sum(1)
    order = scores.argsort()[::-1]
    assert found.order.tolist() == order.tolist()
    for k in (1, 7, 20):
        kept = sorted(order[:k])
        assert found.kept(k).tolist() == kept
        # What least squares makes of the channels that stay, for these very inputs.
        expected = np.linalg.lstsq(z.double().numpy()[:, kept], (z @ W.T).double().numpy(), rcond=None)[0].T
        refitted, bias = found.refit(W, torch.ones(6), k)
        np.testing.assert_allclose(refitted.double().numpy(), expected, rtol=2e-2, atol=2e-3)
        assert bias is not None
        assert bias.tolist() == [1.0] * 6
        lost = ((z @ W.T - z[:, kept] @ refitted.T).double() ** 2).sum().item() / len(z)
        assert float(found.curve.errors[k - 1]) == pytest.approx(lost, rel=1e-2, abs=1e-4)


def test_wanda_sp_keeps_large_channels_as_they_are() -> None:
    W, z, statistics = drawn(6, 20)
    found = strategies_of("wanda-sp").init.eliminate(W, statistics)
    norms = np.linalg.norm(z.double().numpy(), axis=0)
    order = np.array([sum(abs(float(w)) for w in W[:, j]) * norms[j] for j in range(20)]).argsort()[::-1]
    assert found.order.tolist() == order.tolist()
    for k in (1, 7, 20):
        assert found.kept(k).tolist() == sorted(order[:k])
        refitted, bias = found.refit(W, torch.ones(6), k)
        np.testing.assert_allclose(refitted, W[:, sorted(order[:k])], rtol=1e-5)
        assert bias is not None
        assert bias.tolist() == [1.0] * 6


def test_wanda_sp_takes_the_same_part_of_every_net() -> None:
    told = Told({("decoder", 0): 0.9, ("decoder", 1): 0.1, ("decoder", 2): 0.5})
    plan = strategies_of("wanda-sp").allocation.allocate(request_for_nets([16, 16, 16], 40, 0.3, told))
    assert not plan.ranks
    counts = list(plan.channels.values())
    # What rounding leaves goes to one of them.
    assert len(counts) == 3
    assert max(counts) - min(counts) <= 2


def nets(widths: Sequence[int], size: int = 40) -> tuple[list[PlannedMap], dict[str, ChannelCurve]]:
    """A net of three maps and an attention map in each of several blocks of these widths, and what may be taken out."""
    maps, curves = [], {}
    for block, width in enumerate(widths):
        name = f"layers.{block}.down.channels"
        for kind, shape, ends in (
            ("o", (width, width), {}),
            ("gate", (size, width), {"writes": name}),
            ("up", (size, width), {"writes": name}),
            ("down", (width, size), {"reads": name}),
        ):
            maps.append(PlannedMap(f"layers.{block}.{kind}", "decoder", block, TargetLinear(kind, *shape), **ends))
        curves[name] = ChannelCurve(torch.arange(1, size + 1), torch.zeros(size), torch.ones(size))
    return maps, curves


def shares_given_up(plan: RankPlan, blocks: int, size: int) -> list[float]:
    return [1 - plan.channels.get(f"layers.{i}.down.channels", size) / size for i in range(blocks)]


def request_for_nets(widths: Sequence[int], size: int, reduction: float, told: Told) -> AllocationRequest:
    maps, curves = nets(widths, size)
    format_ = make("formats", "factored")
    budget = make_budget(maps, sum(m.dense_parameters for m in maps), reduction, format_)
    return AllocationRequest(maps, budget, format_, {}, curves, measurements=told)


def test_modegpt_shares_out_channels_by_the_softmax_of_influences() -> None:
    """Equal nets, so that the paper's formula holds as it stands."""
    influences = [0.30, 0.05, 0.10, 0.08]
    told = Told({("decoder", i): s for i, s in enumerate(influences)})
    size, width = 2000, 10
    request = request_for_nets([width] * 4, size, 0.2, told)
    plan = strategies_of("modegpt").allocation.allocate(request)
    assert plan.ranks == {}
    left = request.budget.maps_kept - request.kept({}, plan.channels)
    assert 0 <= left < 3 * width

    phi = request.budget.removed / (4 * 3 * width * size)
    e = np.exp(-np.array(influences) / 0.071)
    expected = 4 * phi * e / e.sum()
    np.testing.assert_allclose(shares_given_up(plan, 4, size), expected, atol=5 / size)


def test_modegpt_takes_no_more_than_most_of_a_net() -> None:
    told = Told({("decoder", 0): 0.0, ("decoder", 1): 0.5, ("decoder", 2): 0.5})
    request = request_for_nets([8, 8, 16], 100, 0.45, told)
    plan = strategies_of("modegpt").allocation.allocate(request)
    first, second, third = shares_given_up(plan, 3, 100)
    assert first == pytest.approx(0.8)
    # What the first cannot give, the others give alike.
    assert second == pytest.approx(third, abs=0.03)
    assert 0 <= request.budget.maps_kept - request.kept({}, plan.channels) < 3 * 16
    with pytest.raises(UserError, match=r"block-influence keeps .* lower --reduction"):
        strategies_of("modegpt").allocation.allocate(request_for_nets([8, 8, 16], 100, 0.8, told))
    bare = AllocationRequest(request.maps, request.budget, request.format, measurements=told)
    with pytest.raises(UserError, match="this model has none that could lose channels"):
        strategies_of("modegpt").allocation.allocate(bare)


# Bolaco


def searched(reduction: float, told: Told, **options: Any) -> tuple[RankPlan, AllocationRequest]:
    shapes = {**attention(64, 32), **{f"layers.{i}.mlp.{k}": (64, 64) for i in range(2) for k in ("up", "down")}}
    maps = [
        PlannedMap(name, "decoder", int(name.split(".")[1]), TargetLinear(name.split(".", 2)[2], *shape))
        for name, shape in shapes.items()
    ]
    format_ = make("formats", "factored")
    budget = make_budget(maps, sum(m.dense_parameters for m in maps), reduction, format_)
    request = AllocationRequest(maps, budget, format_, measurements=told)
    return BayesianSearch(BayesianSearch.Options(**options)).allocate(request), request


def test_bolaco_finds_the_kind_that_matters() -> None:
    """Of a loss that one kind of map causes the search finds a plan that leaves little of it."""

    def cost(plan: RankPlan) -> float:
        # Rank 32 of a square map is as large as the dense one.
        return float(sum((32 - rank) ** 2 for name, rank in plan.ranks.items() if name.endswith("up")))

    told = Told(cost=cost)
    plan, request = searched(0.3, told, trials=16)
    losses = [cost(p) for p in told.asked]
    assert len(losses) == 16
    assert cost(plan) == min(losses)
    assert min(losses) < 0.2 * losses[0]
    # Even fractions come first.
    first = told.asked[0].ranks
    fractions = {m.name: request.cost(m, first.get(m.name)) / m.dense_parameters for m in request.maps}
    searched_for = [f for name, f in fractions.items() if "v_proj" not in name]
    assert max(searched_for) - min(searched_for) < 0.05
    for proposal in told.asked:
        assert not [name for name in proposal.ranks if "v_proj" in name]
        assert 0 <= request.budget.maps_kept - request.kept(proposal.ranks) < 2 * 128
        # One number for each kind in all blocks, and one for queries and keys.
        for kind in ("mlp.up", "mlp.down"):
            one, two = (proposal.ranks.get(f"layers.{i}.{kind}", 32) for i in range(2))
            assert abs(one - two) <= 2
        for i in range(2):
            q, k = (
                request.cost(m, proposal.ranks.get(m.name)) / m.dense_parameters
                for m in request.maps
                if m.name in (f"layers.{i}.self_attn.q_proj", f"layers.{i}.self_attn.k_proj")
            )
            assert q == pytest.approx(k, abs=0.07)


def test_bolaco_searches_alike_with_one_seed() -> None:
    def cost(plan: RankPlan) -> float:
        return float(sum(plan.ranks.values()))

    first, second, other = Told(cost=cost), Told(cost=cost), Told(cost=cost)
    searched(0.3, first, trials=12)
    searched(0.3, second, trials=12)
    searched(0.3, other, trials=12, seed=1)
    assert first.asked == second.asked
    assert first.asked != other.asked


def test_bolaco_bears_plans_that_give_no_numbers() -> None:
    told = Told(cost=lambda plan: math.nan if len(told.asked) % 2 else 1.0)
    plan, _ = searched(0.3, told, trials=6)
    assert plan in told.asked[1::2]
    with pytest.raises(UserError, match=r"no plan of 3 gave finite numbers"):
        searched(0.3, Told(cost=lambda plan: math.inf), trials=3)
    with pytest.raises(UserError, match=r"bayesian-search keeps .* lower --reduction"):
        searched(0.9, Told(), trials=3)
