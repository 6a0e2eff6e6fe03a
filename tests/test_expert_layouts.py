"""Experts with biases, transposed matrices and a gate of their own: what is seen of them, what replaces them."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from lillama_core.architecture.targets.base import TargetModule
from lillama_core.architecture.targets.block import Block
from lillama_core.architecture.targets.expert_layouts import has_known_layout
from lillama_core.architecture.targets.expert_modules import LowRankExperts, gate_of
from lillama_core.architecture.targets.experts import ExpertsTarget, find_targets
from lillama_core.architecture.targets.linear_map import MapChoice
from lillama_core.errors import UserError
from lillama_core.statistics.observers import InputObserver
from lillama_core.strategies import make

EXPERTS, CHOSEN, WIDTH, UNITS, TOKENS = 4, 2, 8, 10, 15
ALPHA, LIMIT = 1.5, 2.0


class Layer(nn.Module):
    """A block of nothing but transformers' GPT-OSS experts, of random weights and biases."""

    def __init__(self) -> None:
        super().__init__()
        config: Any = AutoConfig.for_model(
            "gpt_oss", hidden_size=WIDTH, intermediate_size=UNITS, num_local_experts=EXPERTS, swiglu_alpha=ALPHA,
            swiglu_limit=LIMIT,
        )  # fmt: skip
        config._experts_implementation = "eager"
        self.experts: nn.Module = GptOssExperts(config)
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter)

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
    return torch.randn(TOKENS, WIDTH, generator=generator), index, torch.rand(TOKENS, CHOSEN, generator=generator)


def by_token(experts: Any, call: Any) -> tuple[dict[str, list[torch.Tensor]], dict[str, list[torch.Tensor]]]:
    """What each map multiplies, and what it gives, in the order of the tokens: from the formula, one at a time."""
    rows, outputs = defaultdict(list), defaultdict(list)
    for x, chosen in zip(call[0], call[1].tolist(), strict=True):
        for e in chosen:
            y = experts.gate_up_proj[e].T @ x + experts.gate_up_proj_bias[e]
            gate, up = y[0::2].clamp(max=LIMIT), y[1::2].clamp(-LIMIT, LIMIT)
            units = (up + 1) * gate * torch.sigmoid(ALPHA * gate)
            rows[f"experts.gate_up.{e}"].append(x)
            outputs[f"experts.gate_up.{e}"].append(y)
            rows[f"experts.down.{e}"].append(units)
            outputs[f"experts.down.{e}"].append(experts.down_proj[e].T @ units + experts.down_proj_bias[e])
    return rows, outputs


def target_of(block: nn.Module) -> ExpertsTarget:
    (target,) = find_targets(block)
    assert isinstance(target, ExpertsTarget)
    return target


def full_rank_layers(target: TargetModule, block: nn.Module, format_name: str = "factored") -> dict[str, nn.Module]:
    layers = {}
    for map_ in target.maps:
        U, S, Vt = torch.linalg.svd(target.weight(block, map_).detach(), full_matrices=False)
        bias = target.bias(block, map_)
        assert bias is not None
        layers[map_.name] = make("formats", format_name).from_factors(U * S, Vt, bias.detach().clone())
    return layers


def test_maps_are_views_of_the_transposed_parameters_and_their_biases(layer: Layer) -> None:
    target, experts = target_of(layer), layer.experts
    assert [(m.out_features, m.in_features) for m in target.maps] == [(2 * UNITS, WIDTH)] * 4 + [(WIDTH, UNITS)] * 4
    for part, maps in (("gate_up", target.maps[:EXPERTS]), ("down", target.maps[EXPERTS:])):
        for e, map_ in enumerate(maps):
            assert torch.equal(target.weight(layer, map_), experts.get_parameter(f"{part}_proj")[e].T)
            bias = target.bias(layer, map_)
            assert bias is not None
            assert bias.data_ptr() == experts.get_parameter(f"{part}_proj_bias")[e].data_ptr()


def test_maps_are_shown_their_rows_and_outputs(layer: Layer, call: Any) -> None:
    target, expected = target_of(layer), layer(*call)
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}
    with target.observe(layer, lambda m, x: inputs.update({m.name: x}), lambda m, y: outputs.update({m.name: y})):
        torch.testing.assert_close(layer(*call), expected)
    for found, by_hand in zip((inputs, outputs), by_token(layer.experts, call), strict=True):
        assert set(found) == set(by_hand)
        for name, rows in by_hand.items():
            torch.testing.assert_close(found[name], torch.stack(rows), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format_name", ["factored", "pivoted"])
def test_full_rank_equals_dense_forward_and_backward(layer: Layer, call: Any, format_name: str) -> None:
    hidden, index, weights = call
    low = copy.deepcopy(layer)
    target = target_of(low)
    target.replace(low, full_rank_layers(target, low, format_name))
    assert isinstance(low.experts, LowRankExperts)
    # None of the dense parameters is kept by what it took of the module: deep copies and files stay small.
    assert sum(p.numel() for p in low.experts.gate.__self__.parameters()) == 0  # type: ignore[attr-defined]
    found = []
    for module in (layer, copy.deepcopy(low).train()):
        x, w = hidden.clone().requires_grad_(True), weights.clone().requires_grad_(True)
        out = module(x, index, w)
        out.square().sum().backward()
        found.append((out, x.grad, w.grad))
    for expected, seen in zip(*found, strict=True):
        torch.testing.assert_close(seen, expected, rtol=1e-3, atol=1e-3)


def test_some_maps_alone_can_be_replaced_and_the_module_taken_apart(layer: Layer, call: Any) -> None:
    expected, target = layer(*call), target_of(layer)
    target.replace(layer, {"experts.down.1": full_rank_layers(target, layer)["experts.down.1"]})
    torch.testing.assert_close(layer(*call), expected, rtol=1e-4, atol=1e-4)
    apart = Layer()
    expected = apart(*call)
    target_of(apart).separate(apart)
    torch.testing.assert_close(apart(*call), expected, rtol=1e-4, atol=1e-4)


def test_factors_multiplied_out_are_the_dense_parameters_again(layer: Layer, call: Any) -> None:
    dense = copy.deepcopy(layer)
    target = target_of(layer)
    target.replace(layer, full_rank_layers(target, layer))
    tensors = target.dense_tensors(layer, Layer().to("meta"))
    assert set(tensors) == {name for name, _ in dense.named_parameters()}
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(tensors[name], parameter.detach(), rtol=1e-4, atol=1e-4)
    again = Layer()
    again.load_state_dict(tensors)
    torch.testing.assert_close(again(*call), layer(*call), rtol=1e-4, atol=1e-4)


def test_the_mean_of_few_rows_is_blended_as_their_moment_is(layer: Layer, call: Any) -> None:
    target = target_of(layer)
    observer = InputObserver(Block("decoder", 0, "", (target,)))
    with observer.observe(layer), torch.no_grad():
        # One token, two experts: about their own means nothing would be left of the moments.
        layer(*(t[:1] for t in call))
        layer(*(t[1:2] for t in call))
    rows = {name: torch.stack(found) for name, found in by_token(layer.experts, [t[:2] for t in call])[0].items()}
    for part, size in (("gate_up", WIDTH), ("down", UNITS)):
        everything = torch.cat([x for name, x in rows.items() if part in name])
        for e in range(EXPERTS):
            name = f"experts.{part}.{e}"
            center, moment = observer.center(name), observer.moment(name)
            if name not in rows:
                assert center is None
                continue
            x = rows[name]
            expected = (x.sum(0) + size * everything.mean(0)) / (len(x) + size)
            assert center is not None
            assert moment is not None
            torch.testing.assert_close(center, expected, rtol=1e-4, atol=1e-5)
            about = moment.double() - torch.outer(center, center).double()
            assert torch.linalg.eigvalsh(about).min() > -1e-5 * moment.diagonal().sum()


def test_biases_cannot_be_shared(layer: Layer) -> None:
    with pytest.raises(UserError, match=r"--share-experts: the experts 'experts' have biases of their own"):
        find_targets(layer, choice=MapChoice(share_experts=True))


@pytest.mark.parametrize("change", ["no flags", "norm", "no gate", "shape", "buffer", "within"])
def test_what_else_such_a_module_may_be_is_not_known(layer: Layer, change: str) -> None:
    experts: Any = layer.experts
    assert has_known_layout(experts)
    if change == "no flags":
        del experts.has_gate
    elif change == "norm":
        experts.has_post_expert_norm = True
    elif change == "no gate":
        experts.has_gate = False
    elif change == "shape":
        experts.down_proj_bias = nn.Parameter(torch.zeros(EXPERTS, UNITS))
    elif change == "buffer":
        experts.register_buffer("scales", torch.ones(EXPERTS))
    else:
        experts.inner = nn.Linear(2, 2)
    assert not has_known_layout(experts)


def test_a_gate_keeps_no_weights_and_no_observer(layer: Layer) -> None:
    experts: Any = layer.experts
    with target_of(layer).observe(layer):
        gate: Any = gate_of(experts)
    assert gate.__self__ is not experts
    assert "forward" not in gate.__self__.__dict__
    assert experts.gate_up_proj is not None
    y = torch.randn(3, 2 * UNITS)
    assert torch.equal(gate(y), experts._apply_gate(y))
