"""Losses against values worked out by hand, and masking."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import core_names

from lillama_core.strategies import make


def test_l1_logcos_of_a_hand_computed_case() -> None:
    a = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    y = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
    # Token 1: |a-y| mean 1, cos 0. Token 2: mean 0.5, cos 1.
    log_sigmoid = lambda x: -math.log(1 + math.exp(-x))  # noqa: E731
    expected = ((1 - log_sigmoid(0)) + (0.5 - log_sigmoid(1))) / 2
    assert make("losses", "l1+logcos")(a, y, None, None).item() == pytest.approx(expected, rel=1e-6)


def test_l1_logcos_has_its_floor_at_equality() -> None:
    y = torch.randn(2, 3, 8)
    assert make("losses", "l1+logcos")(y, y, None, None).item() == pytest.approx(
        -math.log(1 / (1 + math.exp(-1))), rel=1e-5
    )


def test_mse() -> None:
    assert make("losses", "mse")(torch.ones(1, 1, 4), torch.zeros(1, 1, 4), None, None).item() == 1.0


def test_sensitivity_is_the_quadratic_form() -> None:
    C = torch.randn(6, 6)
    a, y = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    e = (a - y).reshape(-1, 6)
    expected = torch.stack([row @ (C @ C.T) @ row for row in e]).mean() / 6
    torch.testing.assert_close(make("losses", "sensitivity")(a, y, None, C), expected)


@pytest.mark.parametrize("name", core_names("losses"))
def test_padding_does_not_count(name: str) -> None:
    a, y, C = torch.randn(2, 5, 6), torch.randn(2, 5, 6), torch.eye(6)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    changed = a.clone()
    changed[0, 3:] += 100
    loss = make("losses", name)
    torch.testing.assert_close(loss(a, y, mask, C), loss(changed, y, mask, C))
    kept = torch.cat([a[0, :3], a[1]])[None], torch.cat([y[0, :3], y[1]])[None]
    torch.testing.assert_close(loss(a, y, mask, C), loss(*kept, None, C))


@pytest.mark.parametrize("name", core_names("losses"))
def test_every_loss_pulls_towards_the_target(name: str) -> None:
    y = torch.randn(2, 4, 8)
    a = (y + 0.1 * torch.randn_like(y)).requires_grad_(True)
    loss = make("losses", name)(a, y, None, torch.eye(8))
    (gradient,) = torch.autograd.grad(loss, a)
    assert make("losses", name)(a - 1e-2 * gradient, y, None, torch.eye(8)) < loss
