"""Ranks for a speed: prices that are fitted to times, plans that spend them, and the whole request."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ended
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

from lillama_core import load_recipe
from lillama_core.allocation import AllocationRequest, Spectrum, SpectrumAllocator
from lillama_core.allocation.plan import Budget, PlannedMap, RankPlan
from lillama_core.architecture.blocks import Block
from lillama_core.architecture.targets.linear import linear_targets
from lillama_core.architecture.targets.linear_map import TargetLinear
from lillama_core.data.workload import Meter, Workload
from lillama_core.formats import Factored, Pivoted
from lillama_core.pipeline.pipeline import compress
from lillama_core.pipeline.request import Request
from lillama_core.recipe.model import Recipe
from lillama_core.speed.prices import MapReadings, MeasuredTime, Reading, dense_features, fitted, low_rank_features
from lillama_core.speed.target import Attempt, SpeedPlanner, next_removed
from lillama_registry import registry
from lillama_testing.tiny import QUICK as KIT_QUICK
from lillama_testing.tiny import make_tiny_model

Cli = Callable[..., Ended]


class OfTable:
    """Prices from a table, as far from parameters as one likes."""

    unit = "coins"

    def __init__(self, dense: dict[str, int], once: dict[str, int], each: dict[str, int]) -> None:
        self._dense, self._once, self._each = dense, once, each

    def of(self, map_: PlannedMap, rank: int | None) -> int:
        return self._dense[map_.name] if rank is None else self._once[map_.name] + self._each[map_.name] * rank


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_plans_by_prices_are_the_best_of_all_on_their_hull(data: st.DataObject) -> None:
    """Beside brute force over all ranks: no plan of the same price has an error lower than one segment's worth."""
    count = data.draw(st.integers(1, 3))
    maps = [PlannedMap(f"m{i}", "s", 0, TargetLinear(f"m{i}", 6, 6)) for i in range(count)]
    drawn = [data.draw(st.tuples(st.integers(20, 60), st.integers(0, 20), st.integers(1, 9))) for _ in maps]
    dense, once, each = ({m.name: d[k] for m, d in zip(maps, drawn, strict=True)} for k in range(3))
    prices = OfTable(dense, once, each)
    values = [sorted(data.draw(st.lists(st.floats(0.01, 10), min_size=6, max_size=6)), reverse=True) for _ in maps]
    spectra = {m.name: Spectrum(torch.tensor(v).double(), True) for m, v in zip(maps, values, strict=True)}
    format_ = Factored()
    request = AllocationRequest(maps, Budget(1, 1, 0), format_, spectra, {}, prices)
    allowed = [[*request.ranks(m), None] for m in maps]
    totals = sorted(
        {request.kept(dict(zip([m.name for m in maps], r, strict=True))) for r in itertools.product(*allowed)}
    )
    kept = data.draw(st.sampled_from(totals))
    least = sum(min(prices.of(m, r) for r in those) for m, those in zip(maps, allowed, strict=True))
    if kept < least:
        return
    budget = Budget(sum(dense.values()), sum(dense.values()), sum(dense.values()) - kept)
    request = AllocationRequest(maps, budget, format_, spectra, {}, prices)
    plan = SpectrumAllocator().allocate(request)
    assert request.kept(plan.ranks) <= kept

    def error(ranks: dict[str, int | None]) -> float:
        tails = {m.name: np.cumsum([0.0, *v[::-1]])[::-1] for m, v in zip(maps, values, strict=True)}
        return float(sum(0.0 if r is None else tails[name][r] for name, r in ranks.items()))

    names = [m.name for m in maps]
    every = [dict(zip(names, r, strict=True)) for r in itertools.product(*allowed)]
    best = min(error(ranks) for ranks in every if request.kept(ranks) <= kept)
    own = error({name: plan.ranks.get(name) for name in names})
    # The hull leaves a gap of at most the largest single step of a map.
    largest = max(sum(v) for v in values)
    assert best - 1e-9 <= own <= best + largest + 1e-9


def test_a_dear_low_rank_leaves_a_map_dense() -> None:
    maps = [PlannedMap(n, "s", 0, TargetLinear(n, 8, 8)) for n in ("slow", "fast")]
    spectra = {m.name: Spectrum(torch.ones(8).double(), True) for m in maps}
    # Of "slow" two products take longer than one, whatever the rank.
    prices = OfTable({"slow": 100, "fast": 100}, {"slow": 101, "fast": 0}, {"slow": 1, "fast": 10})
    request = AllocationRequest(maps, Budget(200, 200, 70), Factored(), spectra, {}, prices)
    assert SpectrumAllocator().allocate(request).ranks == {"fast": 3}


def test_a_line_through_times_is_found_again() -> None:
    rng = np.random.default_rng(0)
    wanted = np.array([2000.0, 0.5, 3.0, 0.0])
    sizes = [(int(m), int(n), int(r)) for m, n, r in rng.integers(16, 512, (40, 3))]
    features = [low_rank_features(Pivoted(), m, n, min(m, n, r)) for m, n, r in sizes]
    found = fitted([(f, float(f @ wanted) * 1e-9) for f in features])
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
    # Noise makes no coefficient negative: a layer never becomes cheaper by being larger.
    noisy = fitted([(f, float(f @ wanted) * 1e-9 * float(rng.lognormal(0, 0.3))) for f in features])
    assert (noisy >= 0).all()
    np.testing.assert_allclose([f @ noisy for f in features], [f @ wanted for f in features], rtol=0.35)


def test_prices_are_those_of_the_calls_and_rows_that_were_counted() -> None:
    dense, low = np.array([10.0, 1.0, 0.0]), np.array([20.0, 1.0, 0.0, 0.0])
    prices = MeasuredTime(Factored(), {"a": Reading(2, 8), "b": Reading(1, 6)}, {4: dense, 8: dense}, {4: low, 8: low})
    a, b, c = (PlannedMap(n, "s", 0, TargetLinear(n, 5, 7)) for n in "abc")
    assert prices.of(a, None) == 2 * (10 + 35)
    assert prices.of(a, 2) == 2 * (20 + 2 * 12)
    # Measured at 8 rows, the power of two that is nearest, of which there are 6.
    assert prices.of(b, None) == round(45 * 6 / 8)
    assert prices.of(c, None) == prices.of(c, 1) == 0
    assert float(dense_features(5, 7) @ dense) == 45.0


def test_what_is_asked_next_follows_all_that_was_measured() -> None:
    def attempts(*pairs: tuple[int, float]) -> list[Attempt]:
        return [Attempt(RankPlan("factored", {}), removed, speedup) for removed, speedup in pairs]

    # A fifth was saved by 200: a quarter of the time, which makes 4/3, takes 250.
    assert next_removed(4 / 3, attempts((200, 1.25))) == 250
    # Where nothing became faster, or much too much, the steps are bounded.
    assert next_removed(1.5, attempts((200, 1.0))) == 400
    assert next_removed(1.01, attempts((200, 2.0))) == 100
    # Noise on two measurements of one plan is averaged: 1/5 and 3/10 are 1/4.
    assert next_removed(4 / 3, attempts((200, 1.25), (200, 1 / 0.7))) == pytest.approx(200, abs=1)


class Stack(nn.Module):
    """Some nets one after the other, wide enough for their products to take the time."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(depth))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def planner_of(width: int = 1024, depth: int = 3) -> tuple[SpeedPlanner, list[PlannedMap], list[Block]]:
    torch.manual_seed(0)
    model = Stack(width, depth).eval()
    blocks = [Block("s", i, f"blocks.{i}", tuple(linear_targets(b))) for i, b in enumerate(model.blocks)]
    maps = [PlannedMap(b.full_name(m), "s", b.index, m) for b in blocks for m in b.maps]
    x = torch.randn(1, 128, width)

    def run(model: Any, meter: Meter) -> None:
        meter.begin()
        model(x)
        meter.end()

    workload = Workload("passes", "rows", 128, run)
    return SpeedPlanner(model, blocks, maps, Factored(), workload, torch.float32), maps, blocks


def test_what_maps_read_is_counted_between_begin_and_end() -> None:
    model = Stack(8, 2)
    blocks = [Block("s", i, f"blocks.{i}", tuple(linear_targets(b))) for i, b in enumerate(model.blocks)]
    readings = MapReadings(model, blocks)
    model(torch.randn(2, 3, 8))
    readings.begin()
    model(torch.randn(2, 3, 8))
    model(torch.randn(1, 5, 8))
    readings.end()
    model(torch.randn(2, 3, 8))
    assert readings.found == {"blocks.0.0": Reading(2, 11), "blocks.1.0": Reading(2, 11)}


def test_a_plan_is_as_fast_as_was_asked_for_when_it_is_measured() -> None:
    planner, maps, _ = planner_of()
    spectra = {m.name: Spectrum(torch.linspace(2, 1, 1024).double(), True) for m in maps}

    def allocate(budget: Budget, prices: Any) -> RankPlan:
        return SpectrumAllocator().allocate(AllocationRequest(maps, budget, Factored(), spectra, {}, prices))

    lines: list[str] = []
    found = planner.plan(1.5, allocate, lines.append)
    assert found.plan.ranks
    assert len(lines) <= 5
    # Other tests run beside this one: the plan itself is what can be relied on.
    promised = (
        3
        * 1024
        * 1024
        / sum(
            Factored().parameters(1024, 1024, r) if (r := found.plan.ranks.get(m.name)) else 1024 * 1024 for m in maps
        )
    )
    assert 1.2 < promised < 3
    assert abs(found.speedup / 1.5 - 1) < 0.25


def test_a_model_of_a_plan_has_its_shapes_and_shares_the_rest() -> None:
    planner, maps, _ = planner_of(width=32, depth=2)
    built = planner.built(RankPlan("factored", {maps[0].name: 4}))
    layer = built.get_submodule(maps[0].name)
    assert (layer.down.weight.shape, layer.up.weight.shape, layer.bias.shape) == ((4, 32), (32, 4), (32,))
    assert (
        built.get_submodule(maps[1].name).weight
        is planner.built(RankPlan("factored", {})).get_submodule(maps[1].name).weight
    )
    assert torch.isfinite(built(torch.randn(1, 3, 32))).all()


def test_compress_for_a_speed(
    make_model: Callable[..., Path], calibration_text: str, tmp_path: Path, run_cli: Cli
) -> None:
    dense = make_model(tmp_path / "dense", hidden_size=128, intermediate_size=512, num_hidden_layers=2)
    options = ("--recipe", "fast", "--tokens", "1024", "--sequence-length", "32", "--batch-size", "4")
    options = (*options, "--sensitivity-tokens", "256", "--self-share", "0", "--calibration", calibration_text)
    # Nothing of so small a model is sure to become faster beside other tests: what is asked for is next to nothing.
    ended = run_cli("compress", dense, "--output", tmp_path / "small", *options, "--target-speedup", "1.001")
    assert ended.status == 0, ended
    record = json.loads((tmp_path / "small" / "lillama.json").read_text())
    assert record["plan"]["speed"]["asked"] == 1.001
    assert record["plan"]["speed"]["measured"] >= 0.95 * 1.001
    assert record["plan"]["speed"]["work"].startswith("prompts of")
    assert "model.embed_tokens" not in record["plan"]["ranks"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False).shape[1] <= 5
    card = (tmp_path / "small" / "README.md").read_text()
    assert "times as fast" in card


def test_a_speed_out_of_reach_is_refused(
    make_model: Callable[..., Path], calibration_text: str, tmp_path: Path, run_cli: Cli
) -> None:
    dense = make_model(tmp_path / "dense")
    options = ("--recipe", "fast", "--tokens", "1024", "--sequence-length", "32", "--batch-size", "4")
    options = (*options, "--sensitivity-tokens", "256", "--self-share", "0", "--calibration", calibration_text)
    ended = run_cli("compress", dense, "--output", tmp_path / "small", *options, "--target-speedup", "50")
    assert ended.status == 2, ended
    assert "error: --target-speedup 50 is not reached at prompts of" in ended.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("small*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target-speedup", "1"), "target-speedup"),
        (("--target-speedup", "nan"), "target-speedup"),
        (("--target-speedup", "1.3", "--reduction", "0.2"), "--reduction does nothing: --target-speedup says"),
        (("--target-speedup", "1.3", "--compress-embeddings"), "--compress-embeddings does nothing"),
        (("--target-speedup", "1.3", "--allocation", "uniform"), "'uniform' shares out parameters"),
        (("--speedup-work", "decoding"), "--speedup-work does nothing"),
        (("--target-speedup", "1.3", "--speedup-work", "cooking"), "is none of: prompts of"),
        (("--target-speedup", "1.3", "--stream"), "--no-stream"),
    ],
)
def test_mistaken_requests(
    options: tuple[str, ...], message: str, tiny_model: Path, calibration_text: str, tmp_path: Path, run_cli: Cli
) -> None:
    ended = run_cli(
        "compress", tiny_model, "--output", tmp_path / "small", "--self-share", "0", "--calibration", calibration_text,
        "--tokens", "1024", "--sequence-length", "32", *options,
    )  # fmt: skip
    assert message in ended.error
    assert not list(tmp_path.glob("small*"))


def test_the_recipe_of_a_run_for_a_speed_can_be_given_again(tiny_model: Path, tmp_path: Path, run_cli: Cli) -> None:
    recipe = Recipe(target_speedup=1.2, speedup_work="decoding")
    (tmp_path / "mine.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    ended = run_cli("plan", tiny_model, "--recipe", tmp_path / "mine.yaml", "--no-estimate")
    assert ended.status == 0, ended
    assert "ranks for 1.2 times the speed follow times that are measured" in ended.stdout


def test_one_stack_of_speech_for_a_speed(tmp_path: Path) -> None:
    (architecture,) = registry().architectures_for("whisper")
    made = make_tiny_model(architecture, "whisper", tmp_path / "dense")
    recipe = load_recipe("fast").with_options(
        {
            **KIT_QUICK, "calibration": made.calibration, "steps": 0, "batch_size": 2, "sensitivity_tokens": 128,
            "rescaling_tokens": 0, "stacks": ["encoder"], "target_speedup": 1.001, "speedup_work": "encoder",
        }
    )  # fmt: skip
    record = compress(Request(str(made.folder), tmp_path / "out", recipe, stream=False), "quiet")
    assert record.plan["speed"]["work"] == "the encoder's passes"
    assert all("encoder" in name for name in record.plan["ranks"])
