"""Published methods against what their papers say, computed another way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lillama_benchmarks.baselines.liteasr import OutputComponents, VarianceThreshold
from lillama_core.allocation import AllocationRequest, Spectrum
from lillama_core.allocation.plan import PlannedMap, kept_parameters, make_budget
from lillama_core.architecture.targets.linear_map import TargetLinear
from lillama_core.initialization import MapStatistics
from lillama_core.statistics.moments import SecondMoment
from lillama_core.strategies import make


@pytest.mark.parametrize(("out_features", "in_features"), [(12, 20), (20, 12)])
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
