"""What an allocator finds out by running the model: the numbers are those of the whole model, and are found once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Ended
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM

import lillama_core
from lillama_core import hookimpl, load_recipe
from lillama_core.allocation import AllocationRequest
from lillama_core.allocation.plan import RankPlan
from lillama_core.allocation.uniform import Uniform
from lillama_core.errors import UserError
from lillama_core.pipeline.spec import prepare
from lillama_core.statistics.loss_calibration import Ablation
from lillama_registry import Registry

ROWS, LENGTH = 16, 24
OPTIONS: dict[str, Any] = {
    "recipe": "fast", "init": "whitened", "allocation": "asking", "reduction": 0.3, "tokens": ROWS * LENGTH,
    "sequence_length": LENGTH, "rescaling_tokens": 5 * LENGTH, "batch_size": 4, "self_share": 0.0,
    "compute": "float32", "dtype": "float32",
}  # fmt: skip


class Asking(Uniform):
    """Even ranks; what they cost and what each block changes is noted in `found`, asked for twice."""

    name = "asking"
    needs_spectra = True
    needs_measurements = True
    found: tuple[list[float], dict[tuple[str, int], float]]

    def allocate(self, request: AllocationRequest) -> RankPlan:
        plan = super().allocate(request)
        if request.measurements is not None:
            costs = [request.measurements.divergence(plan) for _ in range(2)]
            Asking.found = costs, dict(request.measurements.influences())
        return plan


class Hooks:
    @hookimpl
    def lillama_allocators(self) -> dict[str, Any]:
        return {"asking": Asking}


@pytest.fixture
def _asking(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Registry()
    made.load_entry_points()
    made.add(Hooks(), "asking", "asking", "1")
    monkeypatch.setattr("lillama_registry.registry", lambda: made)


@pytest.fixture
def dense(make_model: Callable[..., Path], tmp_path: Path) -> Path:
    return make_model(tmp_path / "dense", num_hidden_layers=3, initializer_range=0.2)


def rows() -> torch.Tensor:
    return torch.randint(2, 300, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


def run(dense: Path, output: Path, **options: Any) -> SimpleNamespace:
    """Compress, and give what was measured and how many passes of measuring there were."""
    lillama_core.compress(dense, output, data=[{"input_ids": rows()}], quiet=True, **{**OPTIONS, **options})
    costs, influences = Asking.found
    return SimpleNamespace(costs=costs, influences=influences)


@pytest.mark.usefixtures("_asking")
def test_a_plan_costs_what_the_whole_model_does(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    costs = Ablation.costs

    def counted(self: Ablation, variants: Any) -> list[float]:
        passes.append(len(variants))
        return costs(self, variants)

    monkeypatch.setattr(Ablation, "costs", counted)
    found = run(dense, tmp_path / "small")
    # The second answer is the first one's.
    assert passes == [1]
    assert found.costs[0] == found.costs[1]

    some = rows()[:5]
    before, after = (
        AutoModelForCausalLM.from_pretrained(path)(some).logits.double().log_softmax(-1).detach()
        for path in (dense, tmp_path / "small")
    )
    expected = 2 * (before.exp() * (before - after)).sum().item() / len(some)
    assert expected > 0.01
    assert found.costs[0] == pytest.approx(expected, rel=1e-3)

    model = AutoModelForCausalLM.from_pretrained(dense)
    streams: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda _, args, output: streams.append((args[0], output[0] if isinstance(output, tuple) else output))
        )
    with torch.no_grad():
        model(some)
    assert found.influences.keys() == {("decoder", i) for i in range(3)}
    for index, (entering, leaving) in enumerate(streams):
        expected = 1 - cosine_similarity(entering, leaving, dim=-1).mean().item()
        assert expected > 1e-3
        assert found.influences["decoder", index] == pytest.approx(expected, rel=1e-4)


@pytest.mark.usefixtures("_asking")
def test_a_resumed_run_measures_nothing_again(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lillama_core.pipeline import planning

    out = tmp_path / "small"

    class Stopped(Exception):  # noqa: N818  it is no error
        pass

    def stop(*_: Any, **__: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patched:
        # After what was measured is on the disk, and before anything is made of it.
        patched.setattr("lillama_core.pipeline.stages.allocate.describe_plan", stop)
        with pytest.raises(Stopped):
            run(dense, out)
    first = Asking.found
    (kept,) = tmp_path.glob("small.partial/**/measured.json")
    assert len(json.loads(kept.read_text())) == 2

    def again(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(planning.ModelMeasurements, "_divergence", again)
    monkeypatch.setattr(planning.ModelMeasurements, "_influences", again)
    assert run(dense, out, resume=True).costs == first[0]
    assert Asking.found == first


@pytest.mark.usefixtures("_asking")
def test_without_tokens_nothing_can_be_measured(dense: Path, run_cli: Callable[..., Ended]) -> None:
    words = ("--recipe", "fast", "--init", "whitened", "--allocation", "asking")
    said = run_cli("plan", dense, *words, "--rescaling-tokens", "0").error
    assert said.startswith("--rescaling-tokens 0: the allocator 'asking' runs the model on those tokens")
    # What reads them is no mistake, and the dry run shows even ranks.
    assert run_cli("plan", dense, *words, "--rescaling-tokens", "64").status == 0
    with pytest.raises(UserError, match="rescaling-tokens 0"):
        prepare(str(dense), load_recipe("fast").with_options({"allocation": "asking", "rescaling_tokens": 0}))
