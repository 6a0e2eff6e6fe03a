"""Factors that are fitted again to what the compressed model reads: which rows an initialiser is told of, and when."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lillama_core import Recipe
from lillama_core.architecture.base import Architecture
from lillama_core.architecture.blocks import Block
from lillama_core.architecture.targets.linear import linear_targets
from lillama_core.data.modality import Samples
from lillama_core.distillation.adaptation import adapt
from lillama_core.distillation.training import RoutingReplay
from lillama_core.initialization import MapStatistics, PlainSVD, StudentStatistics
from lillama_core.pipeline import Request, compress
from lillama_core.runtime.activations import StackActivations
from lillama_core.runtime.block_runner import BlockInputs, BlockRunner
from lillama_core.runtime.masks import StackMasks
from lillama_core.strategies import make

WIDTH, RANK = 6, 3


class Layer(nn.Module):
    """A block of a gated net: two maps that read one tensor, and one that reads what they give."""

    def __init__(self) -> None:
        super().__init__()
        # Not in the order in which they are called.
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.gate = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.down(torch.tanh(self.gate(hidden)) * self.up(hidden))


class Halving(PlainSVD):
    """Halves every map, so that what comes after it tells; notes what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[StudentStatistics] = []

    def adapt(
        self, weight: torch.Tensor, B: torch.Tensor, A: torch.Tensor, seen: StudentStatistics
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        self.told.append(seen)
        return B / 2, A, torch.ones(len(B)) if seen.has_bias else None


def activations(hidden: list[torch.Tensor], masks: list[torch.Tensor | None]) -> StackActivations:
    runner = BlockRunner(Architecture(), [[BlockInputs((), {})] for _ in hidden], torch.device("cpu"), None)
    return StackActivations([Samples({}) for _ in hidden], hidden, [StackMasks(mask) for mask in masks], runner)


@pytest.mark.parametrize("compares", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_each_map_is_told_of_what_those_before_it_give_by_then(masked: bool, compares: bool) -> None:
    torch.manual_seed(0)
    dense = Layer().requires_grad_(False)
    block = Block("decoder", 0, "layers.0", tuple(linear_targets(dense)))
    student = copy.deepcopy(dense)
    for map_ in block.maps:
        target = block.target_of(map_)
        W = target.weight(student, map_)
        B, A = PlainSVD().decompose(W, MapStatistics()).factors(W, RANK)
        layer = make("formats", "factored").from_factors(B, A, target.bias(student, map_))
        target.replace(student, {map_.name: layer})
    before = copy.deepcopy(student)
    x = [torch.randn(4, 8, WIDTH) for _ in range(3)]
    own = [h + 0.3 * torch.randn_like(h) + 0.1 for h in x]
    masks = [torch.rand(4, 8).round(decimals=1).clamp(min=0.2) - 0.2 if masked else None for _ in x]
    initializer = Halving()
    names = [map_.name for map_ in block.maps]
    routing = RoutingReplay(())
    # The last batch serves other ends.
    there, other = activations(own, masks), activations(x, masks) if compares else None
    adapt(block, dense, student, names, initializer, there, other, x, [0, 1], routing)

    def halved(layer: nn.Module, bias: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
        out = rows @ (layer.up.weight @ layer.down.weight).T / 2
        return out if bias is None else out + bias + 1

    rows, kept = (torch.cat([h.flatten(0, 1) for h in of[:2]]) for of in (x, own))
    weights = torch.cat([torch.ones(32) if mask is None else mask.flatten() for mask in masks[:2]])
    gate, up = (halved(getattr(before, name), getattr(dense, name).bias, kept) for name in ("gate", "up"))
    expected = [(rows, kept)] * 2 + [(torch.tanh(dense.gate(rows)) * dense.up(rows), torch.tanh(gate) * up)]
    assert [seen.has_bias for seen in initializer.told] == [True, True, False]
    for seen, (theirs, ours) in zip(initializer.told, expected, strict=True):
        weighted = weights[:, None] * ours / weights.sum()
        torch.testing.assert_close(seen.inputs, ours.T @ weighted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen.center, weighted.sum(0), rtol=1e-4, atol=1e-5)
        if not compares:
            assert seen.cross is seen.dense_center is None
            continue
        torch.testing.assert_close(seen.cross, theirs.T @ weighted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen.dense_center, weights @ theirs / weights.sum(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(student.down(ours), halved(before.down, None, ours), rtol=1e-4, atol=1e-5)


def test_a_map_that_few_rows_reach_keeps_its_factors() -> None:
    torch.manual_seed(0)
    dense = Layer().requires_grad_(False)
    block = Block("decoder", 0, "layers.0", tuple(linear_targets(dense)))
    student = copy.deepcopy(dense)
    for map_ in block.maps:
        W = block.target_of(map_).weight(student, map_)
        B, A = PlainSVD().decompose(W, MapStatistics()).factors(W, RANK)
        block.put(student, {map_.name: make("formats", "factored").from_factors(B, A, None)})
    x, initializer = [torch.randn(1, 2 * WIDTH - 1, WIDTH)], Halving()
    there = activations(x, [None])
    adapt(block, dense, student, [m.name for m in block.maps], initializer, there, there, x, [0], RoutingReplay(()))
    # Not of the map with twice as many inputs.
    assert [len(seen.inputs) for seen in initializer.told] == [WIDTH, WIDTH]


@pytest.mark.parametrize("family", ["llama", "mixtral", "opt"])
def test_what_is_lost_below_is_made_up_for(
    family: str, tmp_path: Path, make_model: Callable[..., Path], calibration_text: Path
) -> None:
    """With experts and with biases, too."""
    dense = make_model(tmp_path / "dense", family, num_hidden_layers=3)
    options: dict[str, Any] = {
        **{"reduction": 0.3, "tokens": 4096, "sequence_length": 32, "rescaling_tokens": 0, "steps": 0},
        **{"calibration": (str(calibration_text),), "self_share": 0.0, "held_out": 0.25, "compute": "float32"},
        **{"allocation": "uniform", "compress_embeddings": False},
    }

    def errors(init: str) -> list[float]:
        request = Request(str(dense), tmp_path / init, Recipe(**options, init=init))
        return [block["error_after"] for block in compress(request, "quiet").blocks]

    # Of rows that nothing was fitted to.
    assert errors("anchored")[-1] < errors("whitened")[-1]
