"""``factored``: y = B (A x), r (m + n) parameters; A and B are ``down`` and ``up``, two plain linear layers."""

from __future__ import annotations

import torch
from torch import nn

from lillama_core.formats.base import Format, LowRankLinear, empty_linear


class FactoredLinear(LowRankLinear):
    """x [..., in] -> B (A x) + bias [..., out], with A = ``down.weight`` [r, in] and B = ``up.weight`` [out, r]."""

    def __init__(self, down: nn.Linear, up: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = down.in_features, up.out_features
        self.down = down
        self.up = up

    @property
    def bias(self) -> torch.Tensor | None:
        return self.up.bias

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(B [out, r], A [r, in]); gradients reach the parameters."""
        return self.up.weight, self.down.weight

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        z: torch.Tensor = self.down(x)
        return z

    def expand(self, z: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.up(z)
        return y


class Factored(Format):
    """Store both factors as they are: r (m + n) parameters of an m x n map at rank r."""

    name = "factored"

    def stored_as_weight(self, out_features: int, in_features: int) -> str:
        return "down"

    def parameters(self, out_features: int, in_features: int, rank: int) -> int:
        return rank * (out_features + in_features)

    def largest_rank(self, out_features: int, in_features: int, parameters: int) -> int:
        parameters = min(parameters, out_features * in_features - 1)
        return max(0, parameters // (out_features + in_features))

    def module(
        self, out_features: int, in_features: int, rank: int, bias: bool, dtype: torch.dtype, device: str
    ) -> FactoredLinear:
        return FactoredLinear(
            empty_linear(in_features, rank, False, dtype, device),
            empty_linear(rank, out_features, bias, dtype, device),
        )

    def from_factors(self, B: torch.Tensor, A: torch.Tensor, bias: torch.Tensor | None) -> FactoredLinear:
        (out_features, rank), in_features = B.shape, A.shape[1]
        layer = self.module(out_features, in_features, rank, bias is not None, B.dtype, str(B.device))
        layer.down.weight.data = A.contiguous()
        layer.up.weight.data = B.contiguous()
        if bias is not None:
            layer.up.bias.data = bias.detach().to(B.dtype, copy=True)
        return layer

    def to_factors(self, module: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        assert isinstance(module, FactoredLinear)
        return module.matrices()


FactoredLinear.format = Factored()
