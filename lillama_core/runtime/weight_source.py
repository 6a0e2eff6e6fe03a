"""Where the dense weights come from: one block at a time."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

if TYPE_CHECKING:
    from lillama_core.architecture.blocks import Block


class WeightSource(Protocol):
    """Gives the dense model's blocks, one at a time, as fp32 modules that the caller owns."""

    def block(self, block: Block) -> nn.Module:
        """A fresh fp32 copy of ``block`` on the compute device, in eval mode, without gradients."""
        ...


class ResidentSource:
    """Blocks of a model that is held in memory, in whatever dtype it was loaded."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = model
        self.device = device

    def block(self, block: Block) -> nn.Module:
        module = copy.deepcopy(self.model.get_submodule(block.path))
        # A copy made while the parent bypasses its blocks must run for itself.
        module.__dict__.pop("forward", None)
        return module.to(device=self.device, dtype=torch.float32).eval().requires_grad_(False)
