"""Grouped projections: a map for each group, on request, and what a class that computes something else meets."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear

from lillama_core import Architecture, LillamaError
from lillama_core.architecture.targets.grouped import GroupedTarget, GroupMaps, grouped_targets
from lillama_core.architecture.targets.linear_map import MapChoice
from lillama_core.output.quantizer import LillamaConfig, LillamaHfQuantizer, attach
from lillama_core.strategies import make

GROUPS, INPUTS, OUTPUTS = 3, 10, 6


class Block(nn.Module):
    """transformers' own module alone: the other way to the same numbers, by one batched product."""

    def __init__(self, of: type[nn.Linear] = DeepseekV4GroupedLinear) -> None:
        super().__init__()
        self.inner: Any = of(INPUTS, GROUPS * OUTPUTS, GROUPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x)
        return out


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 5, GROUPS, INPUTS, generator=torch.Generator().manual_seed(1))


def target_of(block: nn.Module) -> GroupedTarget:
    (target,) = grouped_targets(block, ("inner",))
    assert isinstance(target, GroupedTarget)
    return target


def full_rank(target: GroupedTarget, block: nn.Module, format_name: str) -> dict[str, nn.Module]:
    layers = {}
    for map_ in target.maps:
        U, S, Vt = torch.linalg.svd(target.weight(block, map_).detach(), full_matrices=False)
        layers[map_.name] = make("formats", format_name).from_factors(U * S, Vt, None)
    return layers


@pytest.mark.parametrize("format_name", ["factored", "pivoted"])
@pytest.mark.parametrize("replaced", [(0, 1, 2), (1,)])
def test_full_rank_equals_dense_forward_and_backward(
    block: Block, x: torch.Tensor, format_name: str, replaced: tuple[int, ...]
) -> None:
    low, target = copy.deepcopy(block), target_of(block)
    layers = full_rank(target, low, format_name)
    target.replace(low, {f"inner.{g}": layers[f"inner.{g}"] for g in replaced})
    assert isinstance(low.inner, GroupMaps)
    found = []
    for module in (block, low):
        y = x.clone().requires_grad_(True)
        out = module(y)
        out.square().sum().backward()
        found.append((out, y.grad))
    for expected, seen in zip(*found, strict=True):
        torch.testing.assert_close(seen, expected, rtol=1e-3, atol=1e-4)
    assert GroupedTarget.at("inner", low.inner).maps == target.maps
    dense = target.dense_tensors(low, Block().to("meta"))
    torch.testing.assert_close(dense, {"inner.weight": block.inner.weight.detach()}, rtol=1e-4, atol=1e-5)


def test_the_rows_shown_explain_output_and_gradient(block: Block, x: torch.Tensor) -> None:
    target = target_of(block)
    rows: dict[str, torch.Tensor] = {}
    outs: dict[str, torch.Tensor] = {}

    def on_output(map_: Any, y: torch.Tensor) -> None:
        y.retain_grad()
        outs[map_.name] = y

    with target.observe(block, lambda map_, shown: rows.update({map_.name: shown}), on_output):
        out = block(x)
    torch.testing.assert_close(out, block(x))
    out.square().sum().backward()
    expected = torch.autograd.grad(block(x).square().sum(), block.inner.weight)[0].view(GROUPS, OUTPUTS, INPUTS)
    for g, map_ in enumerate(target.maps):
        assert torch.equal(rows[map_.name], x[..., g, :])
        found = torch.einsum("nlo,nli->oi", outs[map_.name].grad, rows[map_.name])
        torch.testing.assert_close(found, expected[g], rtol=1e-4, atol=1e-4)


def test_they_are_maps_on_request_alone(block: Block) -> None:
    architecture = Architecture(stacks={"blocks": "0"})
    assert architecture.targets(block, MapChoice()) == []
    (target,) = architecture.targets(block, MapChoice(include=("inner",)))
    assert [m.name for m in target.maps] == ["inner.0", "inner.1", "inner.2"]
    architecture.maps = ("inner",)
    assert len(architecture.targets(block, MapChoice())) == 1
    assert architecture.targets(block, MapChoice(exclude=("inner",))) == []
    with pytest.raises(LillamaError, match="'inner' is a Linear, not a grouped projection"):
        GroupedTarget.at("inner", nn.Linear(4, 4, bias=False))


def test_a_class_that_computes_something_else_is_found_out(x: torch.Tensor) -> None:
    class Sorted(DeepseekV4GroupedLinear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = super().forward(x.flip(-2))
            return out

    torch.manual_seed(0)
    block = Block(Sorted)
    with target_of(block).observe(block), pytest.raises(LillamaError, match="leave it dense with --exclude inner"):
        block(x)


def test_save_and_load(tmp_path: Path) -> None:
    config = AutoConfig.for_model("deepseek_v4", num_hidden_layers=1)
    for name, size in {"hidden_size": 32, "moe_intermediate_size": 16, "intermediate_size": 16, "vocab_size": 64,
                       "num_attention_heads": 4, "head_dim": 16, "q_lora_rank": 16, "o_lora_rank": 8, "o_groups": 2,
                       "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 1,
                       "bos_token_id": 0, "eos_token_id": 1}.items():  # fmt: skip
        setattr(config, name, size)
    path = "model.layers.0.self_attn.o_a_proj"
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    said = LillamaConfig({path: {"kind": "grouped", "format": "factored", "ranks": {"0": 3, "1": 5}}})
    LillamaHfQuantizer(said, pre_quantized=True)._process_model_before_weight_loading(model)
    maps = model.get_submodule(path)
    assert isinstance(maps, GroupMaps)
    with torch.no_grad():
        for parameter in maps.parameters():
            parameter.normal_()
    attach(model, said)
    model.save_pretrained(tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path).get_submodule(path)
    assert found.state_dict().keys() == maps.state_dict().keys()
    for name, tensor in maps.named_parameters():
        assert torch.equal(found.get_parameter(name), tensor)
