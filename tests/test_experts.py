"""Fused experts as sites: full rank, what their maps see, statistics of few rows, and layouts that are refused."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from lillama_core.allocation.plan import PlannedMap, RankPlan, describe_plan
from lillama_core.architecture.base import Architecture
from lillama_core.architecture.blocks import Block, find_blocks
from lillama_core.architecture.targets.base import TargetModule
from lillama_core.architecture.targets.expert_modules import LowRankExperts, SharedExperts
from lillama_core.architecture.targets.experts import ExpertsTarget, SharedExpertsTarget, find_targets
from lillama_core.architecture.targets.linear_map import MapChoice, TargetLinear
from lillama_core.distillation.training import trained_parameters
from lillama_core.errors import LillamaError, UserError
from lillama_core.pipeline.spec import check_choice
from lillama_core.statistics.observers import GradientObserver, InputObserver, map_statistics
from lillama_core.strategies import get, make

EXPERTS, CHOSEN, WIDTH, UNITS, TOKENS = 4, 2, 8, 10, 15


class Experts(nn.Module):
    """The layout that transformers has for fused experts, with the loop over tokens that the definition suggests."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * UNITS, WIDTH))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, UNITS))
        self.act_fn = nn.SiLU()

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows = []
        for x, chosen, share in zip(hidden, index.tolist(), weights, strict=True):
            total = torch.zeros_like(x)
            for e, w in zip(chosen, share, strict=True):
                gate, up = (self.gate_up_proj[e] @ x).chunk(2)
                total = total + w * (self.down_proj[e] @ (functional.silu(gate) * up))
            rows.append(total)
        return torch.stack(rows)


class Layer(nn.Module):
    """A block of nothing but experts, with tokens sent where ``index`` says."""

    def __init__(self) -> None:
        super().__init__()
        self.experts: nn.Module = Experts()

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.experts(*args)
        return out


@pytest.fixture
def layer() -> Layer:
    torch.manual_seed(0)
    return Layer()


@pytest.fixture
def call() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, experts and weights of tokens none of which goes to the last expert."""
    generator = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(EXPERTS - 1, generator=generator)[:CHOSEN] for _ in range(TOKENS)])
    return (
        torch.randn(TOKENS, WIDTH, generator=generator),
        index,
        torch.rand(TOKENS, CHOSEN, generator=generator),
    )


def site_of(layer: nn.Module, share: bool = False) -> TargetModule:
    (target,) = find_targets(layer, choice=MapChoice(share_experts=share))
    return target


def full_rank_layers(target: TargetModule, block: nn.Module, format_name: str = "factored") -> dict[str, nn.Module]:
    """For every map a low-rank module that computes the same: all ranks that the format can have less none."""
    layers = {}
    for map_ in target.maps:
        U, S, Vt = torch.linalg.svd(target.weight(block, map_).detach(), full_matrices=False)
        layers[map_.name] = make("formats", format_name).from_factors(U * S, Vt, None)
    return layers


def test_maps_are_the_matrices_of_the_experts(layer: Layer) -> None:
    target = site_of(layer)
    assert isinstance(target, ExpertsTarget)
    assert [m.name for m in target.maps] == [
        f"experts.{part}.{e}" for part in ("gate_up", "down") for e in range(EXPERTS)
    ]
    assert {m.group for m in target.maps} == {"experts.gate_up", "experts.down"}
    experts: Any = layer.experts
    for e in range(EXPERTS):
        assert torch.equal(target.weight(layer, target.maps[e]), experts.gate_up_proj[e])
        assert torch.equal(target.weight(layer, target.maps[EXPERTS + e]), experts.down_proj[e])


@pytest.mark.parametrize("format_name", ["factored", "pivoted"])
@pytest.mark.parametrize("share", [False, True])
def test_full_rank_equals_dense_forward_and_backward(layer: Layer, call: Any, share: bool, format_name: str) -> None:
    hidden, index, weights = call
    compressed = copy.deepcopy(layer)
    target = site_of(compressed, share)
    target.replace(compressed, full_rank_layers(target, compressed, format_name))
    assert isinstance(compressed.experts, SharedExperts if share else LowRankExperts)
    found = []
    for module in (layer, compressed.train()):
        x = hidden.clone().requires_grad_(True)
        w = weights.clone().requires_grad_(True)
        out = module(x, index, w)
        out.square().sum().backward()
        found.append((out, x.grad, w.grad))
    for dense, low in zip(*found, strict=True):
        torch.testing.assert_close(low, dense, rtol=1e-3, atol=1e-3)
    again = get("targets", target.kind).at(target.name, compressed.experts)
    assert [(m.name, m.out_features, m.in_features) for m in again.maps] == [
        (m.name, m.out_features, m.in_features) for m in target.maps
    ]
    for map_ in target.maps:
        torch.testing.assert_close(target.weight(compressed, map_), target.weight(layer, map_), rtol=1e-3, atol=1e-4)
    # Factors alone are trained, and all of them.
    if format_name == "factored":
        assert len(trained_parameters(compressed, "factors")) == 2 * len(target.maps)


def test_only_the_maps_named_are_replaced_and_may_be_replaced_again(layer: Layer, call: Any) -> None:
    expected = layer(*call)
    target = site_of(layer)
    target.replace(layer, {})
    assert isinstance(layer.experts, Experts)
    layers = full_rank_layers(target, layer)
    target.replace(layer, {"experts.down.1": layers["experts.down.1"]})
    assert target.layer(layer, target.maps[EXPERTS + 1]) is layers["experts.down.1"]
    assert type(target.layer(layer, target.maps[0])) is nn.Linear
    torch.testing.assert_close(layer(*call), expected, rtol=1e-3, atol=1e-4)
    changed = make("formats", "factored").from_factors(torch.zeros(WIDTH, 1), torch.zeros(1, UNITS), None)
    for e in range(EXPERTS):
        target.replace(layer, {f"experts.down.{e}": changed})
    assert not layer(*call).any()


def test_each_expert_has_a_rank_of_its_own_on_the_meta_device_too(layer: Layer) -> None:
    with torch.device("meta"):
        empty = Layer()
    target = site_of(empty)
    for e, map_ in enumerate(target.maps[:EXPERTS]):
        target.replace(
            empty,
            {map_.name: make("formats", "factored").module(2 * UNITS, WIDTH, e + 1, False, torch.float32, "meta")},
        )
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert [target.layer(empty, m).down.out_features for m in target.maps[:EXPERTS]] == [1, 2, 3, 4]


def by_token(layer: Layer, call: Any) -> dict[str, list[torch.Tensor]]:
    """Every row that a map multiplies, found token by token."""
    rows: dict[str, list[torch.Tensor]] = defaultdict(list)
    experts: Any = layer.experts
    for x, chosen in zip(call[0], call[1].tolist(), strict=True):
        for e in chosen:
            rows[f"experts.gate_up.{e}"].append(x)
            gate, up = (experts.gate_up_proj[e] @ x).chunk(2)
            rows[f"experts.down.{e}"].append(functional.silu(gate) * up)
    return rows


def test_each_map_is_shown_its_own_rows_and_outputs(layer: Layer, call: Any) -> None:
    target = site_of(layer)
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}
    with target.observe(layer, on_input=lambda m, x: inputs.update({m.name: x})):
        with target.observe(layer, on_output=lambda m, y: outputs.update({m.name: y})):
            watched = layer(*call)
        layer(*call)
    torch.testing.assert_close(watched, layer(*call), rtol=1e-4, atol=1e-4)
    assert "forward" not in layer.experts.__dict__
    expected = by_token(layer, call)
    assert set(inputs) == set(outputs) == set(expected)
    assert not any(name.endswith(".3") for name in inputs)
    for map_ in target.maps:
        if map_.name in expected:
            rows = torch.stack(expected[map_.name])
            torch.testing.assert_close(inputs[map_.name], rows)
            torch.testing.assert_close(outputs[map_.name], rows @ target.weight(layer, map_).T, rtol=1e-4, atol=1e-4)


def test_moments_equal_those_of_single_tokens_and_borrow_from_the_group(layer: Layer, call: Any) -> None:
    target = site_of(layer)
    observer = InputObserver(Block("decoder", 0, "", (target,)))
    with observer.observe(layer), torch.no_grad():
        for part in range(3):
            observer.next_batch()
            layer(*(t[5 * part : 5 * part + 5] for t in call))
    rows = {name: torch.stack(found) for name, found in by_token(layer, call).items()}
    for part in ("gate_up", "down"):
        own = {e: rows[f"experts.{part}.{e}"] for e in range(EXPERTS - 1)}
        everything = torch.cat(list(own.values()))
        average = everything.T @ everything / len(everything)
        size = len(average)
        for e, x in own.items():
            expected = (x.T @ x + size * average) / (len(x) + size)
            torch.testing.assert_close(observer.moment(f"experts.{part}.{e}"), expected, rtol=1e-4, atol=1e-5)
            assert observer.count(f"experts.{part}.{e}") == len(x)
        # No token came by: the identity, in the size of what the others saw, so that the weights decide.
        starved = f"experts.{part}.{EXPERTS - 1}"
        assert observer.count(starved) == 0
        torch.testing.assert_close(observer.moment(starved), torch.eye(size) * average.diagonal().mean())
        assert observer.expected(starved) == pytest.approx(0.05 * len(everything) / EXPERTS)


def test_gradient_moments_equal_those_of_single_tokens(layer: Layer, call: Any) -> None:
    hidden, index, weights = call
    target = site_of(layer)
    observer = GradientObserver(Block("decoder", 0, "", (target,)))
    slope = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(2))
    observer.output.add(slope)
    with observer.observe(layer):
        layer(hidden.clone().requires_grad_(True), index, weights).backward(slope)
    found = observer.statistics()

    gradients: dict[str, list[torch.Tensor]] = defaultdict(list)
    experts: Any = layer.experts
    for x, chosen, share, g in zip(hidden, index.tolist(), weights, slope, strict=True):
        for e, w in zip(chosen, share, strict=True):
            y = (experts.gate_up_proj[e] @ x).detach().requires_grad_(True)
            gate, up = y.chunk(2)
            z = experts.down_proj[e] @ (functional.silu(gate) * up)
            z.retain_grad()
            (w * z @ g).backward()
            gradients[f"experts.gate_up.{e}"].append(y.grad)
            gradients[f"experts.down.{e}"].append(z.grad)
    inputs = InputObserver(Block("decoder", 0, "", (target,)))
    with inputs.observe(layer), torch.no_grad():
        layer(*call)
    for map_ in target.maps:
        part, e = map_.name.removeprefix("experts.").split(".")
        own = gradients.get(map_.name)
        group = torch.cat([torch.stack(gradients[f"experts.{part}.{i}"]) for i in range(EXPERTS - 1)])
        F = group.T @ group / len(group)
        scale = F.diagonal().mean()
        W = target.weight(layer, map_).detach()
        seen = map_statistics(map_, W, inputs, found, 3, torch.device("cpu"))
        assert seen.gradient_scale == pytest.approx(scale.item(), rel=1e-4)
        if part == "gate_up":
            # W^T F W is of this expert alone: where rows are few the group lends the size of its gradients.
            g = torch.zeros(0, WIDTH) if own is None else torch.stack(own) @ W
            expected = (g.T @ g + WIDTH * scale * W.T @ W) / (len(g) + WIDTH)
        elif own is None:
            expected = F
        else:
            g = torch.stack(own)
            expected = (g.T @ g + WIDTH * F) / (len(g) + WIDTH)
        torch.testing.assert_close(seen.gradients, expected, rtol=1e-3, atol=1e-4)


def test_shared_projections_see_tokens_and_weighted_units_of_their_experts(layer: Layer, call: Any) -> None:
    target = site_of(layer, share=True)
    assert isinstance(target, SharedExpertsTarget)
    gate_up, down = target.maps
    assert (gate_up.out_features, gate_up.in_features) == (EXPERTS * 2 * UNITS, WIDTH)
    assert (down.out_features, down.in_features) == (WIDTH, EXPERTS * UNITS)
    inputs: dict[str, torch.Tensor] = {}
    with target.observe(layer, on_input=lambda m, x: inputs.update({m.name: x})):
        watched = layer(*call)
    torch.testing.assert_close(watched, layer(*call), rtol=1e-4, atol=1e-4)
    assert torch.equal(inputs["experts.gate_up"], call[0])
    expected = torch.zeros(TOKENS, EXPERTS, UNITS)
    experts: Any = layer.experts
    for t, (x, chosen, share) in enumerate(zip(call[0], call[1].tolist(), call[2], strict=True)):
        for e, w in zip(chosen, share, strict=True):
            gate, up = (experts.gate_up_proj[e] @ x).chunk(2)
            expected[t, e] = w * functional.silu(gate) * up
    torch.testing.assert_close(inputs["experts.down"], expected.flatten(1))
    torch.testing.assert_close(expected.flatten(1) @ target.weight(layer, down).T, watched, rtol=1e-4, atol=1e-4)


def test_a_format_without_a_matrix_to_cut_up_is_refused(layer: Layer) -> None:
    class Wide(Experts):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(2, 4, 16))
            self.down_proj = nn.Parameter(torch.randn(2, 16, 2))

    target = SharedExpertsTarget("experts", Wide())
    target.check(make("formats", "factored"))
    with pytest.raises(UserError, match="--format factored"):
        target.check(make("formats", "pivoted"))


def test_autocast_changes_the_products_and_not_the_stream(layer: Layer, call: Any) -> None:
    expected = layer(*call)
    target = site_of(layer)
    target.replace(layer, full_rank_layers(target, layer))
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(*call)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1 * expected.abs().max().item())
    half = layer.to(torch.bfloat16)
    assert half(call[0].bfloat16(), *call[1:]).dtype == torch.bfloat16


@pytest.mark.parametrize("change", ["is_transposed", "has_bias", "interleaved", "gate", "shape", "extra"])
def test_other_layouts_are_refused(layer: Layer, change: str) -> None:
    experts: Any = layer.experts
    if change == "interleaved":
        experts.is_concatenated = False
    elif change == "gate":
        layer.experts = type("Own", (Experts,), {"_apply_gate": lambda self, x: x})()
    elif change == "shape":
        experts.down_proj = nn.Parameter(torch.randn(EXPERTS, UNITS, WIDTH))
    elif change == "extra":
        experts.gate_up_proj_bias = nn.Parameter(torch.zeros(EXPERTS, 2 * UNITS))
    else:
        setattr(experts, change, True)
    with pytest.raises(UserError, match="layout is not known"):
        find_targets(layer)
    assert find_targets(layer, exclude=("experts",)) == []
    with pytest.raises(LillamaError, match="layout is not known"):
        ExpertsTarget.at("experts", layer.experts)


class Both(Layer):
    """A block with a linear map beside its experts, whose biases make their layout an unknown one."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(WIDTH, WIDTH)
        self.experts.gate_up_proj_bias = nn.Parameter(torch.zeros(EXPERTS, 2 * UNITS))


@pytest.mark.parametrize(
    ("only", "exclude", "choice"),
    [
        (("attention",), (), MapChoice()),
        ((), ("experts",), MapChoice()),
        ((), (), MapChoice(exclude=("experts",))),
        ((), (), MapChoice(exclude=("*",), include=("attention",))),
        (("experts", "attention"), (), MapChoice(exclude=("experts",))),
    ],
)
def test_experts_of_an_unknown_layout_may_stay_dense(only: Any, exclude: Any, choice: MapChoice) -> None:
    names = [m.name for target in find_targets(Both(), only, exclude, choice) for m in target.maps]
    assert names == ([] if "*" in choice.exclude else ["attention"])


@pytest.mark.parametrize(
    ("only", "exclude", "choice"),
    [
        (("attention", "experts.down.*"), (), MapChoice()),
        (("attention",), (), MapChoice(include=("experts.gate_up.0",))),
        (("attention",), ("experts",), MapChoice(include=("experts",))),
        ((), (), MapChoice(exclude=("attention", "experts.down.*"))),
    ],
)
def test_experts_of_an_unknown_layout_that_are_asked_for_are_refused(
    only: Any, exclude: Any, choice: MapChoice
) -> None:
    with pytest.raises(UserError, match=r"layout is not known.*leave them dense with --exclude experts"):
        find_targets(Both(), only, exclude, choice)


def test_the_experts_of_a_model_can_be_left_out_by_their_module() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Both()])

    model, architecture = Model(), Architecture(stacks={"decoder": "layers"})
    check_choice(architecture, model, MapChoice(exclude=("experts",)))
    (block,) = find_blocks(architecture, model, choice=MapChoice(exclude=("experts",)))["decoder"]
    assert [m.name for m in block.maps] == ["attention"]
    with pytest.raises(UserError, match=r"'expert' matches no linear map.*did you mean 'experts'"):
        check_choice(architecture, model, MapChoice(exclude=("expert",)))
    architecture.exclude = ("experts",)
    for asked in ("experts", "experts.down.*"):
        with pytest.raises(UserError, match=r"cannot compress 'experts'|matches no linear map"):
            check_choice(architecture, model, MapChoice(include=(asked,)))
    # The same where the maps have names.
    del model.layers[0].experts.gate_up_proj_bias
    with pytest.raises(UserError, match="cannot compress 'experts'"):
        check_choice(architecture, model, MapChoice(include=("experts.down.*",)))
    assert find_targets(Layer(), choice=MapChoice(exclude=("experts",))) == []
    assert len(find_targets(Layer(), ("else",), choice=MapChoice(include=("experts",)))[0].maps) == 2 * EXPERTS


@pytest.mark.parametrize(("share", "format_name"), [(False, "factored"), (True, "factored"), (True, "pivoted")])
@pytest.mark.parametrize("left_dense", [(), ("experts.gate_up",), ("experts.down",)])
def test_multiply_adds_are_those_that_a_forward_pass_does(
    layer: Layer, call: Any, share: bool, format_name: str, left_dense: tuple[str, ...]
) -> None:
    layer.top_k = CHOSEN  # what a router beside the experts says
    target = site_of(layer, share)
    maps = [PlannedMap(m.name, "decoder", 0, m) for m in target.maps]
    ranks = {m.name: 3 for m in target.maps if m.group not in left_dense and m.name not in left_dense}
    plan, format_ = RankPlan(format_name, ranks), make("formats", format_name)
    found = describe_plan(maps, plan, format_, sum(p.numel() for p in layer.parameters()), 4)

    def counted() -> float:
        with FlopCounterMode(display=False) as counter:
            layer(*call)
        return counter.get_total_flops() / 2 / TOKENS

    # The loop over tokens multiplies by vectors, which the counter does not know.
    dense = CHOSEN * (2 * UNITS * WIDTH + WIDTH * UNITS)
    assert found["multiply_adds_per_token_before"] == dense
    B, A = torch.randn(1000, 3), torch.randn(3, 1000)
    target.replace(
        layer,
        {
            m.name: format_.from_factors(B[: m.out_features], A[:, : m.in_features], None)
            for m in target.maps
            if m.name in ranks
        },
    )
    assert found["multiply_adds_per_token_after"] == counted()


def test_maps_of_experts_can_be_left_out(layer: Layer) -> None:
    (target,) = find_targets(layer, choice=MapChoice(exclude=("experts.down.*", "experts.gate_up.2")))
    assert [m.name for m in target.maps] == ["experts.gate_up.0", "experts.gate_up.1", "experts.gate_up.3"]
    assert find_targets(layer, choice=MapChoice(exclude=("experts.*.*",))) == []
    assert [m.name for m in find_targets(layer, only=("experts.down.*",))[0].maps] == [
        f"experts.down.{e}" for e in range(EXPERTS)
    ]


def test_a_map_without_a_group_borrows_nothing() -> None:
    target = site_of(Layer())
    observer = InputObserver(Block("decoder", 0, "", (target,)))
    lone = TargetLinear("experts.gate_up.0", 2 * UNITS, WIDTH)
    statistics = map_statistics(lone, torch.zeros(2 * UNITS, WIDTH), observer, {}, 1, torch.device("cpu"))
    assert statistics.inputs is None
    assert statistics.gradients is None
