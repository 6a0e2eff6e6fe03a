"""Stacked matrices for rows that come sorted by expert: a map for each, and what other classes meet."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts

from lillama_core import Architecture, LillamaError
from lillama_core.architecture.targets.linear_map import MapChoice
from lillama_core.architecture.targets.sorted_rows import SortedMaps, SortedTarget, sorted_targets
from lillama_core.strategies import make

EXPERTS, INPUTS, OUTPUTS = 3, 10, 6
SIZES = [4, 0, 3]


class Router(nn.Module):
    top_k = 2


class Block(nn.Module):
    def __init__(self, of: type[nn.Module] = JetMoeParallelExperts) -> None:
        super().__init__()
        self.router = Router()
        self.inner: Any = of(EXPERTS, INPUTS, OUTPUTS)
        nn.init.normal_(self.inner.weight)

    def forward(self, rows: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        out: torch.Tensor = self.inner(rows, sizes)
        return out


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block()


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randn(sum(SIZES), INPUTS, generator=torch.Generator().manual_seed(1))


def target_of(block: nn.Module) -> SortedTarget:
    (target,) = sorted_targets(block)
    assert isinstance(target, SortedTarget)
    return target


def by_hand(weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Row by row, by the number of its expert."""
    experts = [0] * 4 + [2] * 3
    return torch.stack([weight[e] @ row for e, row in zip(experts, rows, strict=True)])


@pytest.mark.parametrize("format_name", ["factored", "pivoted"])
@pytest.mark.parametrize("replaced", [(0, 1, 2), (2,)])
def test_full_rank_equals_dense_forward_and_backward(
    block: Block, rows: torch.Tensor, format_name: str, replaced: tuple[int, ...]
) -> None:
    low, target = copy.deepcopy(block), target_of(block)
    layers = {}
    for e in replaced:
        U, S, Vt = torch.linalg.svd(block.inner.weight[e].detach(), full_matrices=False)
        layers[f"inner.{e}"] = make("formats", format_name).from_factors(U * S, Vt, None)
    target.replace(low, layers)
    assert isinstance(low.inner, SortedMaps)
    x, y = (rows.clone().requires_grad_(True) for _ in range(2))
    expected, found = by_hand(block.inner.weight, x), low(y, SIZES)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    expected.square().sum().backward()
    found.square().sum().backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-3, atol=1e-3)
    assert [m.name for m in SortedTarget.at("inner", low.inner).maps] == [m.name for m in target.maps]
    dense = target.dense_tensors(low, Block().to("meta"))
    torch.testing.assert_close(dense, {"inner.weight": block.inner.weight.detach()}, rtol=1e-4, atol=1e-4)


def test_the_rows_shown_are_those_of_each_expert(block: Block, rows: torch.Tensor) -> None:
    shown: dict[str, torch.Tensor] = {}
    outs: dict[str, torch.Tensor] = {}

    def on_output(map_: Any, y: torch.Tensor) -> None:
        y.retain_grad()
        outs[map_.name] = y

    with target_of(block).observe(block, lambda map_, x: shown.update({map_.name: x}), on_output):
        out = block(rows, SIZES)
    torch.testing.assert_close(out, by_hand(block.inner.weight, rows))
    # An expert without a row shows nothing.
    assert list(shown) == list(outs) == ["inner.0", "inner.2"]
    out.square().sum().backward()
    expected = torch.autograd.grad(by_hand(block.inner.weight, rows).square().sum(), block.inner.weight)[0]
    for name in shown:
        found = outs[name].grad.T @ shown[name]
        torch.testing.assert_close(found, expected[int(name[-1])], rtol=1e-4, atol=1e-4)


def test_maps_are_of_one_group_and_see_a_part_of_the_tokens(block: Block) -> None:
    architecture = Architecture(stacks={"blocks": "0"})
    (target,) = architecture.targets(block, MapChoice())
    assert [m.name for m in target.maps] == ["inner.0", "inner.1", "inner.2"]
    assert {(m.group, m.token_fraction) for m in target.maps} == {("inner", 2 / 3)}
    for pattern in ("inner", "inner.*"):
        assert architecture.targets(block, MapChoice(exclude=(pattern,))) == []
    architecture.exclude = ("inner",)
    assert architecture.targets(block, MapChoice()) == []
    assert len(architecture.targets(block, MapChoice(include=("inner",)))) == 1
    for other in (nn.Bilinear(3, 4, 5, bias=False), nn.Conv1d(3, 4, 2, bias=False), nn.Linear(3, 4, bias=False)):
        with pytest.raises(LillamaError, match="not a stack of matrices"):
            SortedTarget.at("inner", other)


def test_a_class_that_computes_something_else_is_found_out(rows: torch.Tensor) -> None:
    class Doubling(JetMoeParallelExperts):
        def forward(self, inputs: torch.Tensor, expert_size: list[int]) -> torch.Tensor:
            out: torch.Tensor = 2 * super().forward(inputs, expert_size)
            return out

    block = Block(Doubling)
    with target_of(block).observe(block), pytest.raises(LillamaError, match="leave it dense with --exclude inner"):
        block(rows, SIZES)
