"""Local distillation on a small block: it learns, it stays local, and it never keeps worse weights."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from conftest import core_names
from torch import nn

from lillama_core.architecture.base import Architecture
from lillama_core.architecture.blocks import Block
from lillama_core.architecture.targets.linear import linear_targets
from lillama_core.distillation.training import (
    BlockData,
    TrainingOptions,
    distill_block,
    learning_rate_factor,
    trained_parameters,
)
from lillama_core.errors import LillamaError
from lillama_core.initialization import MapStatistics
from lillama_core.runtime.block_runner import BlockInputs, BlockRunner
from lillama_core.strategies import make

WIDTH = 16


class Layer(nn.Module):
    """A residual block with a norm, as small as can be."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.down(torch.tanh(self.up(self.norm(hidden))))


OPTIONS = TrainingOptions(
    loss=make("losses", "mse"), mode="student", train="factors", steps=60, learning_rate=1e-2, schedule="cosine",
    warmup=0.1, weight_decay=0.0, gradient_clip=0.0, seed=0,
)  # fmt: skip


def setting(rank: int = 4) -> tuple[nn.Module, Block, BlockRunner, BlockData]:
    torch.manual_seed(0)
    dense = Layer().requires_grad_(False)
    block = Block("decoder", 0, "layers.0", tuple(linear_targets(dense)))
    calls = [[BlockInputs((), {})] for _ in range(6)]
    runner = BlockRunner(Architecture(), calls, torch.device("cpu"), None)
    teacher = [torch.randn(4, 8, WIDTH) for _ in range(6)]
    student_stream = [h + 0.1 * torch.randn_like(h) for h in teacher]
    targets = list(teacher)
    runner.advance(dense, block, targets)
    student = copy.deepcopy(dense)
    for target in block.targets:
        map_ = target.maps[0]
        W = target.weight(student, map_)
        B, A = make("initializers", "svd").decompose(W, MapStatistics()).factors(W, rank)
        target.replace(student, {map_.name: make("formats", "factored").from_factors(B, A, target.bias(student, map_))})
    data = BlockData(teacher, student_stream, targets, [None] * 6, [4], [5])
    return student, block, runner, data


@pytest.mark.parametrize("mode", ["teacher", "student", "teacher+student"])
@pytest.mark.parametrize("loss", core_names("losses"))
def test_training_lowers_the_loss_on_rows_it_never_saw(mode: str, loss: str) -> None:
    student, block, runner, data = setting()
    fisher_factor = torch.eye(WIDTH)
    result = distill_block(
        student, block, runner, data, fisher_factor, replace(OPTIONS, mode=mode, loss=make("losses", loss))
    )
    assert result.kept_step > 0
    assert result.loss_after < result.loss_before
    assert result.error_after < result.error_before


def test_kept_weights_are_those_that_the_result_describes() -> None:
    student, block, runner, data = setting()
    result = distill_block(student, block, runner, data, None, OPTIONS)
    with torch.no_grad():
        again = [
            OPTIONS.loss(runner(student, block, i, data.student[i]), data.targets[i], None, None).item()
            for i in data.report
        ]
    assert sum(again) == pytest.approx(result.loss_after, rel=1e-5)


def test_a_rate_that_diverges_costs_nothing_but_time() -> None:
    student, block, runner, data = setting()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    result = distill_block(
        student, block, runner, data, None, replace(OPTIONS, learning_rate=30.0, schedule="constant")
    )
    assert result.kept_step == 0
    assert result.loss_after == result.loss_before
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())


class Seldom(Layer):
    """Its maps are for positions that do not come: an expert that no token is sent to."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        chosen = hidden[..., 0] > 100
        out = hidden.clone()
        if chosen.any():
            out[chosen] = super().forward(hidden[chosen])
        return out


def test_factors_that_no_row_reaches_stay_as_they_are() -> None:
    student, block, runner, data = setting()
    student.__class__ = Seldom
    before = {k: v.clone() for k, v in student.state_dict().items()}
    result = distill_block(student, block, runner, data, None, OPTIONS)
    assert result.loss_after == result.loss_before
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())


def test_factors_alone_or_the_whole_block() -> None:
    student, block, runner, data = setting()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    distill_block(student, block, runner, data, None, OPTIONS)
    changed = {k for k, v in student.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"up.down.weight", "up.up.weight", "down.down.weight", "down.up.weight"}

    student, block, runner, data = setting()
    assert len(trained_parameters(student, "block")) == len(list(student.parameters()))
    distill_block(student, block, runner, data, None, replace(OPTIONS, train="block"))
    changed = {k for k, v in student.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == set(before)


def test_teacher_plus_student_is_the_sum_of_both_gradients() -> None:
    """One step of plain arithmetic on the summed loss gives what the two backward passes give."""
    student, block, runner, data = setting()
    one = replace(OPTIONS, steps=1, warmup=0.0, schedule="constant", mode="teacher+student", learning_rate=1e-3)
    by_hand = copy.deepcopy(student)
    distill_block(student, block, runner, replace(data, choose=[1, 2, 3, 4], report=[5]), None, one)
    parameters = trained_parameters(by_hand, "factors")
    by_hand.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, betas=(0.9, 0.95))
    total = sum(
        OPTIONS.loss(runner(by_hand, block, 0, s[0]), data.targets[0], None, None) for s in (data.teacher, data.student)
    )
    total.backward()
    optimizer.step()
    for found, expected in zip(trained_parameters(student, "factors"), parameters, strict=True):
        torch.testing.assert_close(found, expected)


def test_gradients_never_leave_the_block() -> None:
    student, block, runner, data = setting()
    for stream in (data.teacher, data.student, data.targets):
        assert not any(h.requires_grad for h in stream)
    distill_block(student, block, runner, data, None, OPTIONS)
    assert not any(h.requires_grad or h.grad is not None for h in data.student)
    assert not any(p.requires_grad for p in student.parameters())


def test_the_same_seed_gives_the_same_weights() -> None:
    states = []
    for seed in (0, 0, 1):
        student, block, runner, data = setting()
        distill_block(student, block, runner, data, None, replace(OPTIONS, seed=seed))
        states.append(student.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not all(torch.equal(states[0][k], states[2][k]) for k in states[0])


def test_infinite_activations_name_the_block() -> None:
    student, block, runner, data = setting()
    data.student[4][0, 0, 0] = math.inf
    with pytest.raises(LillamaError, match=r"layers\.0"):
        distill_block(student, block, runner, data, None, OPTIONS)


def test_learning_rate_rises_then_falls() -> None:
    factors = [learning_rate_factor(s, 100, 0.1, "cosine") for s in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == pytest.approx(1.0)
    assert factors.index(max(factors)) in (9, 10)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] < 0.01
    assert {learning_rate_factor(s, 100, 0.0, "constant") for s in range(100)} == {1.0}
