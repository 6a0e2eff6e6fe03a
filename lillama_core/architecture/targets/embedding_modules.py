"""Low-rank modules that take the place of a token embedding and of an output head tied to it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from lillama_core.formats.factored import FactoredLinear
from lillama_core.formats.pivoted import InputPivotedLinear


class PlainProjection(nn.Module):
    """The projection A [r, width], stored whole as ``down.weight``."""

    def __init__(self, layer: FactoredLinear) -> None:
        super().__init__()
        self.down = layer.down
        self.width = layer.in_features

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., width] -> A x [..., r]."""
        z: torch.Tensor = self.down(x)
        return z

    def restore(self, z: torch.Tensor) -> torch.Tensor:
        """z [..., r] -> A^T z [..., width]."""
        return z @ self.down.weight


class PivotedProjection(nn.Module):
    """A = [I | T] with its columns permuted; ``mix.weight`` is T [r, width - r]."""

    permutation: torch.Tensor

    def __init__(self, layer: InputPivotedLinear) -> None:
        super().__init__()
        self.mix = layer.mix
        self.width = layer.in_features
        self.register_buffer("permutation", layer.permutation)

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., width] -> A x [..., r]."""
        x = x.index_select(-1, self.permutation.int())
        rank = self.mix.out_features
        z: torch.Tensor = x[..., :rank] + self.mix(x[..., rank:])
        return z

    def restore(self, z: torch.Tensor) -> torch.Tensor:
        """z [..., r] -> A^T z [..., width]."""
        whole = torch.cat((z, z @ self.mix.weight), dim=-1)
        return whole.index_select(-1, torch.argsort(self.permutation.long()))


Projection = PlainProjection | PivotedProjection


class LowRankEmbedding(nn.Module):
    """Look up rows s U[ids] A [..., width], where s is the factor that the dense module multiplies its rows by."""

    projection: Projection

    def __init__(self, weight: nn.Parameter, projection: Projection, scale: float, owns: bool) -> None:
        super().__init__()
        self.weight = weight
        self.scale = scale
        _hold(self, projection, owns)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = self.projection.restore(functional.embedding(ids, self.weight))
        return rows if self.scale == 1.0 else rows * self.scale


class LowRankHead(nn.Module):
    """Compute the logits (x A^T) U^T + bias [..., vocabulary] of an output head tied to the embedding."""

    projection: Projection

    def __init__(self, weight: nn.Parameter, projection: Projection, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        _hold(self, projection, owns=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(self.projection.reduce(x), self.weight, self.bias)


def _hold(module: nn.Module, projection: Projection, owns: bool) -> None:
    """Register A in the module that owns it; let the others refer to it only, so that it is saved once."""
    if owns:
        module.projection = projection
    else:
        module.__dict__["projection"] = projection
