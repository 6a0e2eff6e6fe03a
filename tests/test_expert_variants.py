"""Experts without a gate, with gate and up apart, sorted beforehand, for every token, or that give what they get."""

from __future__ import annotations

import copy
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.inkling.modeling_inkling import InklingSharedExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from lillama_core.architecture.blocks import Block
from lillama_core.architecture.targets.expert_layouts import has_known_layout
from lillama_core.architecture.targets.expert_modules import LowRankExperts
from lillama_core.architecture.targets.experts import ExpertsTarget, find_targets
from lillama_core.architecture.targets.linear_map import MapChoice
from lillama_core.errors import LillamaError, UserError
from lillama_core.statistics.observers import InputObserver
from lillama_core.strategies import make

EXPERTS, IDENTITIES, CHOSEN, WIDTH, UNITS, TOKENS = 4, 2, 2, 8, 10, 15
ALL = {"sorted": Llama4TextExperts, "no gate": NemotronHExperts, "every": InklingSharedExperts}
ALL["identity"] = LongcatFlashExperts

CONFIG = SimpleNamespace(
    **{"hidden_size": WIDTH, "moe_latent_size": None, "hidden_act": "silu", "mlp_hidden_act": "relu2"},
    **dict.fromkeys(("num_local_experts", "n_routed_experts", "n_shared_experts"), EXPERTS),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "expert_ffn_hidden_size"), UNITS),
    **{"zero_expert_num": IDENTITIES, "_experts_implementation": "eager"},
)


class Layer(nn.Module):
    """A block of nothing but experts, of random weights, which are called as their model calls them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.experts: nn.Module = ALL[kind](CONFIG)
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter)

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor
        if self.kind == "sorted":
            scores = torch.zeros(len(hidden), EXPERTS).scatter(1, index, weights)
            out = self.experts((hidden.repeat(EXPERTS, 1).view(EXPERTS, -1, WIDTH) * scores.T[..., None]).flatten(0, 1))
        elif self.kind == "every":
            out = self.experts(hidden[None], gammas=weights[None])
        else:
            out = self.experts(hidden, index, weights)
        return out


@pytest.fixture(params=sorted(ALL))
def layer(request: pytest.FixtureRequest) -> Layer:
    torch.manual_seed(0)
    return Layer(request.param)


def call_of(layer: Layer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, experts and weights of tokens; where they choose, none goes to the last that has matrices."""
    generator = torch.Generator().manual_seed(1)
    chosen = EXPERTS if layer.kind == "every" else CHOSEN
    numbers = [e for e in range(EXPERTS + (IDENTITIES if layer.kind == "identity" else 0)) if e != EXPERTS - 1]
    if layer.kind == "every":
        numbers = list(range(EXPERTS))
    order = [torch.randperm(len(numbers), generator=generator)[:chosen] for _ in range(TOKENS)]
    index = torch.tensor(numbers)[torch.stack(order)]
    return torch.randn(TOKENS, WIDTH, generator=generator), index, torch.rand(TOKENS, chosen, generator=generator)


def by_hand(layer: Layer, call: Any) -> tuple[dict[str, list[torch.Tensor]], dict[str, list[torch.Tensor]]]:
    """The rows that each map multiplies, and what it gives, in the order of the tokens: from the formulas."""
    experts: Any = layer.experts
    rows, outputs = defaultdict(list), defaultdict(list)

    def apply(name: str, W: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        rows[f"experts.{name}"].append(x)
        outputs[f"experts.{name}"].append(W @ x)
        return W @ x

    for x, chosen, shares in zip(call[0], call[1].tolist(), call[2], strict=True):
        for choice, share in zip(chosen, shares, strict=True):
            e = chosen.index(choice) if layer.kind == "every" else choice
            if e >= EXPERTS:
                continue
            if layer.kind == "no gate":
                units = apply(f"up.{e}", experts.up_proj[e], x).relu() ** 2
                apply(f"down.{e}", experts.down_proj[e], units)
            elif layer.kind == "every":
                gate = apply(f"gate.{e}", experts.gate_proj[e], x)
                units = nn.functional.silu(gate) * apply(f"up.{e}", experts.up_proj[e], x)
                apply(f"down.{e}", experts.down_proj[e], units)
            else:
                turned = layer.kind == "sorted"
                U, D = (p[e].T if turned else p[e] for p in (experts.gate_up_proj, experts.down_proj))
                gate, up = apply(f"gate_up.{e}", U, x * share if turned else x).chunk(2)
                apply(f"down.{e}", D, nn.functional.silu(gate) * up)
    return rows, outputs


def target_of(layer: nn.Module) -> ExpertsTarget:
    (target,) = find_targets(layer)
    assert isinstance(target, ExpertsTarget)
    return target


def replaced(layer: Layer, format_name: str = "factored") -> Layer:
    """A copy of ``layer`` whose maps are factors of full rank."""
    low = copy.deepcopy(layer)
    target, layers = target_of(low), {}
    for map_ in target.maps:
        U, S, Vt = torch.linalg.svd(target.weight(low, map_).detach(), full_matrices=False)
        layers[map_.name] = make("formats", format_name).from_factors(U * S, Vt, None)
    target.replace(low, layers)
    assert isinstance(low.experts, LowRankExperts)
    return low


def test_maps_are_shown_the_rows_that_are_sent_to_them(layer: Layer) -> None:
    target, call = target_of(layer), call_of(layer)
    expected = layer(*call)
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}
    with target.observe(layer, lambda m, x: inputs.update({m.name: x}), lambda m, y: outputs.update({m.name: y})):
        torch.testing.assert_close(layer(*call), expected, rtol=1e-4, atol=1e-4)
    for found, hand in zip((inputs, outputs), by_hand(layer, call), strict=True):
        assert set(found) == set(hand)
        for name, rows in hand.items():
            torch.testing.assert_close(found[name], torch.stack(rows), rtol=1e-4, atol=1e-4)
    if layer.kind == "every":
        # One moment is enough for both.
        assert inputs["experts.gate.0"] is inputs["experts.up.0"]


class Apart(nn.Module):
    """Experts with gate and up apart, to which tokens are sent by their choice."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Parameter(torch.randn(3, UNITS, WIDTH)) for _ in range(2))
        self.down_proj = nn.Parameter(torch.randn(3, WIDTH, UNITS))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden_states)
        for e, (gate, up, down) in enumerate(zip(self.gate_proj, self.up_proj, self.down_proj, strict=True)):
            shares = ((top_k_index == e) * weights).sum(-1, keepdim=True)
            out += shares * (self.act_fn(hidden_states @ gate.T) * (hidden_states @ up.T)) @ down.T
        return out


def test_gate_and_up_borrow_alike() -> None:
    """They read the same rows, which are kept once: few of its own are joined by the others', none by their size."""
    torch.manual_seed(0)
    layer, hidden = nn.Module(), torch.randn(20, WIDTH)
    layer.experts = Apart()
    observer = InputObserver(Block("decoder", 0, "", (target_of(layer),)))
    index = torch.tensor([0] * 17 + [1] * 3)[:, None]
    with observer.observe(layer), torch.no_grad():
        observer.next_batch()
        layer.experts(hidden, index, torch.ones(20, 1))
    average = hidden.T @ hidden / 20
    few = (hidden[17:].T @ hidden[17:] + WIDTH * average) / (3 + WIDTH)
    for part in ("gate", "up"):
        torch.testing.assert_close(observer.moment(f"experts.{part}.1"), few)
        center = (hidden[17:].sum(0) + WIDTH * hidden.mean(0)) / (3 + WIDTH)
        torch.testing.assert_close(observer.center(f"experts.{part}.1"), center)
        torch.testing.assert_close(observer.moment(f"experts.{part}.2"), torch.eye(WIDTH) * average.diagonal().mean())


@pytest.mark.parametrize("format_name", ["factored", "pivoted"])
def test_full_rank_equals_dense_forward_and_backward(layer: Layer, format_name: str) -> None:
    hidden, index, weights = call_of(layer)
    found = []
    for module in (layer, replaced(layer, format_name).train()):
        x, w = hidden.clone().requires_grad_(True), weights.clone().requires_grad_(True)
        out = module(x, index, w)
        out.square().sum().backward()
        found.append((out, x.grad, w.grad))
    for expected, seen in zip(*found, strict=True):
        torch.testing.assert_close(seen, expected, rtol=1e-3, atol=1e-2)


def test_factors_multiplied_out_are_the_dense_parameters_again(layer: Layer) -> None:
    low = replaced(layer)
    tensors = target_of(layer).dense_tensors(low, Layer(layer.kind).to("meta"))
    assert set(tensors) == {name for name, _ in layer.named_parameters()}
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(tensors[name], parameter.detach(), rtol=1e-4, atol=1e-4)


def test_every_number_is_a_map_s_or_idle(layer: Layer) -> None:
    target = target_of(layer)
    idle = target.idle(layer)
    maps = sum(m.parameters for m in target.maps)
    assert maps + sum(t.numel() for t in idle) == sum(p.numel() for p in layer.parameters())
    assert sum(t.numel() for t in idle) == (IDENTITIES * 2 * UNITS * WIDTH if layer.kind == "identity" else 0)
    assert target_of(layer).maps[0].token_fraction == 1


def test_a_fraction_of_the_tokens_goes_to_an_expert_unless_all_do(layer: Layer) -> None:
    layer.top_k = CHOSEN
    everyone = EXPERTS + (IDENTITIES if layer.kind == "identity" else 0)
    assert {m.token_fraction for m in target_of(layer).maps} == {1.0 if layer.kind == "every" else CHOSEN / everyone}


def test_they_are_taken_apart_and_found_again(layer: Layer) -> None:
    call, names = call_of(layer), [m.name for m in target_of(layer).maps]
    expected = layer(*call)
    target_of(layer).separate(layer)
    torch.testing.assert_close(layer(*call), expected, rtol=1e-4, atol=1e-4)
    assert [m.name for m in ExpertsTarget.at("experts", layer.experts).maps] == names


def test_one_map_cannot_stand_for_all_of_them(layer: Layer) -> None:
    with pytest.raises(UserError, match=r"--share-experts: .* or another layout .* --exclude experts"):
        find_targets(layer, choice=MapChoice(share_experts=True))


class Other(LongcatFlashExperts):
    """The same parameters, of which something else is made."""

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: Any) -> torch.Tensor:
        out: torch.Tensor = super().forward(hidden_states, top_k_index, top_k_weights)
        return 1.1 * out


def test_experts_that_compute_something_else_are_told_when_they_are_observed() -> None:
    torch.manual_seed(0)
    layer = Layer("identity")
    layer.experts.__class__ = Other
    with (
        target_of(layer).observe(layer),
        pytest.raises(LillamaError, match="'experts' are a Other that gives something"),
    ):
        layer(*call_of(layer))


@pytest.mark.parametrize("change", ["arguments", "more downs", "biased and sorted", "units", "no activation"])
def test_what_is_none_of_the_layouts_is_not_known(change: str) -> None:
    experts: Any = Layer("no gate" if change == "units" else "identity").experts
    if change == "arguments":
        experts.__class__ = type("Two", (LongcatFlashExperts,), {"forward": lambda self, hidden, weights: hidden})
    elif change == "more downs":
        experts.down_proj = nn.Parameter(torch.zeros(EXPERTS + IDENTITIES + 1, WIDTH, UNITS))
    elif change == "biased and sorted":
        experts = Layer("sorted").experts
        experts.has_bias = True
        experts.gate_up_proj_bias = nn.Parameter(torch.zeros(EXPERTS, 2 * UNITS))
        experts.down_proj_bias = nn.Parameter(torch.zeros(EXPERTS, WIDTH))
    elif change == "units":
        experts.up_proj = nn.Parameter(torch.zeros(EXPERTS, UNITS + 1, WIDTH))
    else:
        del experts.act_fn
    assert not has_known_layout(experts)
