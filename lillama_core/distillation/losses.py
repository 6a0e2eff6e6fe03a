"""Distillation losses: how far a student block's output is from the teacher block's.

Every loss takes the student's output ``a`` and the target ``y`` [batch, length, width] and a ``mask``
[batch, length] that is 0 at padding, and returns a scalar. ``fisher_factor`` C [width, width] is a factor of the Fisher
information C C^T of the block's output, for the losses that use it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from pydantic import Field
from torch.nn import functional

from lillama_core.strategies import Strategy, StrategyOptions


class Loss(Strategy, ABC):
    """A loss, found by its name."""

    needs_sensitivity: bool = False
    """Whether the loss needs ``fisher_factor``, which takes a backward pass through the whole model."""

    @property
    def fisher_damping(self) -> float:
        """Ridge on the Fisher information before it is factored, relative to its mean diagonal."""
        return 1e-2

    @abstractmethod
    def __call__(
        self, a: torch.Tensor, y: torch.Tensor, mask: torch.Tensor | None, fisher_factor: torch.Tensor | None
    ) -> torch.Tensor:
        """The loss, averaged over the tokens that ``mask`` keeps."""


def token_mean(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean of ``values`` [batch, length] over the tokens where ``mask`` is not 0."""
    if mask is None:
        return values.mean()
    mask = mask.to(values.dtype)
    return (values * mask).sum() / mask.sum().clamp(min=1)


class L1LogCos(Loss):
    """mean |a - y| - log sigmoid(cos(a, y)): the loss of Lillama (arXiv 2412.16719, section 3.2).

    Its smallest value is -log sigmoid(1) = 0.313, at a = y.
    """

    name = "l1+logcos"

    def __call__(
        self, a: torch.Tensor, y: torch.Tensor, mask: torch.Tensor | None, fisher_factor: torch.Tensor | None
    ) -> torch.Tensor:
        distance = (a - y).abs().mean(dim=-1)
        direction = functional.logsigmoid(functional.cosine_similarity(a, y, dim=-1))
        return token_mean(distance - direction, mask)


class MSE(Loss):
    """mean (a - y)^2."""

    name = "mse"

    def __call__(
        self, a: torch.Tensor, y: torch.Tensor, mask: torch.Tensor | None, fisher_factor: torch.Tensor | None
    ) -> torch.Tensor:
        return token_mean((a - y).square().mean(dim=-1), mask)


class SensitivityOptions(StrategyOptions):
    """The ridge on the loss's metric."""

    damping: float = Field(
        default=1e-2,
        description="ridge on E[g g^T], relative to its mean diagonal: directions in which the few gradients say"
        " nothing keep a small weight",
        gt=0.0,
        le=10.0,
    )


class Sensitivity(Loss):
    """mean (a - y)^T S (a - y) with S = E[g g^T], g the gradient of the model's loss at the block's output.

    To second order this is the divergence between the predictions of the model with ``a`` and with ``y`` in that
    place (S is the Fisher information of the hidden state), so that a feature counts by what it does to the
    model's output and not by its size. ``fisher_factor`` is a factor C of S = C C^T [width, width].
    """

    name = "sensitivity"
    Options = SensitivityOptions
    options: SensitivityOptions
    needs_sensitivity = True

    @property
    def fisher_damping(self) -> float:
        return self.options.damping

    def __call__(
        self, a: torch.Tensor, y: torch.Tensor, mask: torch.Tensor | None, fisher_factor: torch.Tensor | None
    ) -> torch.Tensor:
        if fisher_factor is None:
            raise ValueError("the loss 'sensitivity' needs the block's Fisher factor")
        return token_mean(((a - y) @ fisher_factor).square().mean(dim=-1), mask)
