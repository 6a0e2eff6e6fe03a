"""What the last map of a block makes up for: which map that is, and how much, against least squares of its own."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUICK, Ended
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertModel

from lillama_core import Recipe, UserError
from lillama_core.architecture.base import Architecture
from lillama_core.architecture.blocks import Block, find_blocks
from lillama_core.architecture.find import find_architecture
from lillama_core.architecture.targets.linear import linear_targets
from lillama_core.distillation.correction import Corrected, LastMap, correct
from lillama_core.distillation.training import BlockData
from lillama_core.initialization import MapStatistics
from lillama_core.pipeline import Request, compress
from lillama_core.runtime.block_runner import BlockInputs, BlockRunner
from lillama_core.runtime.harness import StackHarness
from lillama_core.runtime.weight_source import ResidentSource
from lillama_core.statistics.last_map import find_last_map
from lillama_core.strategies import StrategyChoice, make

CPU = torch.device("cpu")
WIDTH = 6
SMALL = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "settings", "expected"),
    [
        ("llama", SMALL, "mlp.down_proj"),
        ("opt", {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 24, "pad_token_id": 1}, "fc2"),
        ("gpt2", {"vocab_size": 40, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32}, "mlp.c_proj"),
        ("mamba", {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 4}, "mixer.out_proj"),
        # Its blocks end in a norm, and experts add up.
        ("gemma2", {**SMALL, "head_dim": 8, "query_pre_attn_scalar": 8}, None),
        ("mixtral", {**SMALL, "num_local_experts": 2}, None),
    ],
)
def test_the_last_map_is_found_where_its_output_is_added(
    model_type: str, settings: dict[str, Any], expected: str | None
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings)).eval()
    model.requires_grad_(False)
    architecture = find_architecture(model.config)
    (blocks,) = find_blocks(architecture, model).values()
    parent, source = StackHarness(model, architecture, blocks), ResidentSource(model, CPU)
    hidden, calls = parent.record({"input_ids": torch.arange(20).view(2, 10)})
    runner = BlockRunner(architecture, [calls], CPU, None)
    for block in blocks:
        module = source.block(block)
        before = runner(module, block, 0, hidden)
        found = find_last_map(block, module, lambda m=module, b=block: runner(m, b, 0, hidden))  # type: ignore[misc]
        assert (found and found[1].name) == expected
        # Looking leaves nothing behind.
        assert torch.equal(runner(module, block, 0, hidden), before)


SMALL_RIDGE = 1e-3
"""So that few rows are followed too closely."""


class Layer(nn.Module):
    """A residual block whose last map has a bias or none."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH, bias=bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.down(torch.tanh(self.up(hidden)))


def setting(bias: bool, masked: bool) -> tuple[Layer, nn.Module, Block, BlockRunner, BlockData]:
    torch.manual_seed(3)
    dense = Layer(bias).requires_grad_(False)
    block = Block("decoder", 0, "layers.0", tuple(linear_targets(dense)))
    runner = BlockRunner(Architecture(), [[BlockInputs((), {})] for _ in range(7)], CPU, None)
    teacher = [torch.randn(4, 8, WIDTH) for _ in range(7)]
    # What is lost below can be told in part from what is left.
    change = torch.eye(WIDTH) - 0.3 * torch.rand(WIDTH, WIDTH)
    stream = [h @ change + 1.2 * torch.randn_like(h) + 0.1 for h in teacher]
    masks = [torch.rand(4, 8).round(decimals=1).clamp(min=0.2) - 0.2 if masked else None for _ in range(7)]
    targets = list(teacher)
    runner.advance(dense, block, targets)
    student = copy.deepcopy(dense)
    for target in block.targets:
        map_ = target.maps[0]
        W = target.weight(student, map_)
        B, A = make("initializers", "svd").decompose(W, MapStatistics()).factors(W, 3)
        target.replace(student, {map_.name: make("formats", "factored").from_factors(B, A, target.bias(student, map_))})
    return dense, student, block, runner, BlockData([], stream, targets, masks, [5, 6], [])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_correction_is_a_ridge_regression_and_the_share_a_line_search(bias: bool, masked: bool) -> None:
    dense, student, block, runner, data = setting(bias, masked)
    target = block.targets[1]
    last = LastMap.of(target, target.maps[0], dense)
    fisher_factor = torch.randn(WIDTH, WIDTH)
    correction_batches = [1]
    found = correct(last, block, student, runner, data, correction_batches, fisher_factor, SMALL_RIDGE)

    def rows(batches: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inputs, what the map lacks, and weights."""
        h = torch.cat([data.student[i].flatten(0, 1) for i in batches])
        x = torch.tanh(student.get_submodule("up")(h))
        lacking = torch.cat([data.targets[i].flatten(0, 1) for i in batches]) - h - dense.down(x)
        kept = [data.masks[i] for i in batches]
        w = torch.cat([torch.ones(32) if m is None else m.flatten() for m in kept])
        return x.double(), lacking.double(), w.double()

    x, lacking, w = rows(correction_batches)
    center = (w[:, None] * x).sum(0) / w.sum()
    torch.testing.assert_close(found.center.double(), center, rtol=1e-4, atol=1e-5)
    spread = x - center if bias else x
    ridge = SMALL_RIDGE * (w[:, None] * spread.square()).sum(0).mean()
    # A ridge is so many more rows; one more column, of ones, is the shift, which has no ridge.
    design = torch.cat([x, torch.ones(len(x), 1)], 1) if bias else x
    extra = ridge.sqrt() * torch.eye(x.shape[1], design.shape[1], dtype=torch.float64)
    left = torch.cat([design * w.sqrt()[:, None], extra])
    right = torch.cat([lacking * w.sqrt()[:, None], torch.zeros(x.shape[1], WIDTH, dtype=torch.float64)])
    solution = torch.linalg.lstsq(left, right).solution

    x, lacking, w = rows(data.choose)
    offered = torch.cat([x, torch.ones(len(x), 1)], 1) @ solution if bias else x @ solution

    def error(shrinkage: float) -> float:
        return (((lacking - shrinkage * offered) @ fisher_factor.double()).square().sum(1) * w).sum().item()

    best = min((i / 1000 for i in range(1001)), key=error)
    assert found.shrinkage == pytest.approx(best, abs=6e-4)
    assert 0.05 < found.shrinkage < 1
    K = solution[: x.shape[1]].T
    expected = dense.down.weight.double() + found.shrinkage * K
    # Moments are summed in fp32.
    assert (found.weight - expected).norm() < 2e-3 * K.norm()
    if bias:
        assert found.bias is not None
        shifted = dense.down.bias.double() + found.shrinkage * solution[-1]
        torch.testing.assert_close(found.bias.double(), shifted, rtol=1e-2, atol=1e-4)


def test_experts_that_share_a_projection_are_not_taken_for_a_last_map(
    tmp_path: Path, calibration_text: Path, make_model: Callable[..., Path], run_cli: Callable[..., Ended]
) -> None:
    dense = make_model(tmp_path / "dense", "mixtral", num_local_experts=2, num_experts_per_tok=1)
    done = run_cli("compress", dense, "-o", tmp_path / "out", "--share-experts", "--correction-tokens", "512",
                   "--format", "factored", "--calibration", calibration_text, *QUICK)  # fmt: skip
    assert done.status == 0, done
    record = json.loads((tmp_path / "out" / "lillama.json").read_text())
    assert {block["correction"] for block in record["blocks"]} == {0.0}


def test_nothing_lost_nothing_corrected() -> None:
    dense, _, block, runner, data = setting(True, False)
    data.student[:] = [h.clone() for h in data.student]
    data.targets[:] = data.student
    runner.advance(dense, block, data.targets)
    target = block.targets[1]
    found = correct(LastMap.of(target, target.maps[0], dense), block, dense, runner, data, [0, 1, 2, 3, 4], None, 0.1)
    assert found.bias is not None
    torch.testing.assert_close(found.weight, dense.down.weight, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.bias, dense.down.bias, rtol=0, atol=1e-4)


def test_factors_of_a_corrected_map_suit_the_inputs_that_it_has() -> None:
    torch.manual_seed(0)
    W, b = torch.randn(4, 6), torch.randn(4)
    x = torch.randn(500, 6) @ torch.diag(torch.tensor([5.0, 1, 1, 0.5, 0.1, 0.1])) + 2
    corrected = Corrected(W, b, x.T @ x / 500, x.mean(0), 0.5)
    layer = corrected.factored(2, make("initializers", "whitened"), None, 0.0, torch.Generator())
    y = x @ W.T + b
    # No affine map of rank 2 does better: that is the principal components of the outputs.
    S = torch.linalg.svdvals(y - y.mean(0))
    assert (layer(x) - y).square().sum().item() == pytest.approx(S[2:].square().sum().item(), rel=1e-2)


@pytest.mark.parametrize("inputs", [6, 12])
def test_factors_of_a_corrected_map_weigh_outputs_however_many_channels_are_left(inputs: int) -> None:
    torch.manual_seed(0)
    W, x, g = torch.randn(8, inputs), torch.randn(500, inputs) @ torch.randn(inputs, inputs), torch.randn(500, 8)
    g = g @ torch.diag(torch.tensor([5.0, 3, 2, 1, 1, 0.5, 0.2, 0.1]))
    G, F = x.T @ x / 500, g.T @ g / 500
    corrected = Corrected(W, None, G, x.mean(0), 0.5)
    options = {"input_damping": 1e-6, "gradient_damping": 1e-6}
    initializer = make("initializers", StrategyChoice(name="fisher", options=options))
    layer = corrected.factored(3, initializer, F, F.diagonal().mean().item(), torch.Generator())
    off = W - layer(torch.eye(inputs)).T
    tail = torch.linalg.svdvals(torch.linalg.cholesky(F).T @ W @ torch.linalg.cholesky(G))[3:]
    assert torch.trace(F @ off @ G @ off.T).item() == pytest.approx(tail.square().sum().item(), rel=1e-3)


def test_a_run_corrects_and_says_by_how_much(
    tmp_path: Path, make_model: Callable[..., Path], calibration_text: Path
) -> None:
    dense = make_model(tmp_path / "dense", num_hidden_layers=3)
    options: dict[str, Any] = {
        **{"reduction": 0.4, "tokens": 2048, "sequence_length": 32, "sensitivity_tokens": 512, "rescaling_tokens": 0},
        **{"calibration": (str(calibration_text),), "self_share": 0.0, "held_out": 0.25, "compute": "float32"},
        **{"steps": 0, "remove_channels": False},
    }

    def run(name: str, **changes: Any) -> list[dict[str, Any]]:
        return compress(Request(str(dense), tmp_path / name, Recipe(**options | changes)), "quiet").blocks

    without, with_ = run("without", correction_tokens=0), run("with", correction_tokens=2048)
    assert [b["correction"] for b in without] == [0.0, 0.0, 0.0]
    assert all(0 < b["correction"] <= 1 for b in with_)
    # Rows that nothing was fitted to; later blocks also gain from what those before have mended.
    assert with_[0]["loss_before"] < without[0]["loss_before"]
    assert with_[2]["loss_before"] < 0.98 * without[2]["loss_before"]
    # Plain SVD takes nothing but the weights.
    del options["sensitivity_tokens"]
    with pytest.raises(UserError, match="--correction-tokens does nothing: the initialiser 'svd' makes no correction"):
        run("svd", init="svd", allocation="uniform", correction_tokens=2048)


def test_a_block_that_ends_in_a_norm_is_left_alone() -> None:
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=40, hidden_size=24, num_hidden_layers=1, num_attention_heads=4,
                                 intermediate_size=48)).eval()  # fmt: skip
    layer = model.encoder.layer[0]
    block = Block("encoder", 0, "encoder.layer.0", tuple(linear_targets(layer)))
    hidden = torch.randn(2, 5, 24)
    assert find_last_map(block, layer, lambda: layer(hidden)[0]) is None
