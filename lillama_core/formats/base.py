"""What a format of a low-rank map has to answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import nn

from lillama_core.strategies import Strategy


class Format(Strategy, ABC):
    """A way to store and apply W' = B A with B [out, r] and A [r, in].

    Training always uses plain factors; a format converts from and to them without changing the function,
    so it decides how many parameters a rank costs and what the file holds.
    """

    @abstractmethod
    def parameters(self, out_features: int, in_features: int, rank: int) -> int:
        """Parameters of the map at ``rank``, its bias left out."""

    @abstractmethod
    def largest_rank(self, out_features: int, in_features: int, parameters: int) -> int:
        """The largest rank that costs at most ``parameters`` and less than the dense map; 0 if there is none."""

    def index_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes that a low-rank map of these sizes has on disk beside its parameters."""
        return 0

    @abstractmethod
    def module(
        self, out_features: int, in_features: int, rank: int, bias: bool, dtype: torch.dtype, device: str
    ) -> nn.Module:
        """An uninitialised low-rank module, ready for a state dict."""

    @abstractmethod
    def stored_as_weight(self, out_features: int, in_features: int) -> str:
        """Path, from the low-rank module, of the layer whose matrix is stored on disk as ``<map>.weight``.

        Its shape differs from the dense weight's, so that a loader which does not know the format stops
        with an error instead of filling the map with random numbers.
        """

    @abstractmethod
    def from_factors(self, B: torch.Tensor, A: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
        """The module that computes x -> B A x + bias, in the factors' dtype."""

    @abstractmethod
    def to_factors(self, module: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """(B [out, r], A [r, in]) of a module of this format; gradients reach its parameters."""


class LowRankLinear(nn.Module):
    """What every low-rank module shares: it says of itself what a dense linear layer says, and runs in two stages."""

    in_features: int
    out_features: int
    format: Format
    orders: ClassVar[tuple[str, ...]] = ()
    """Names of buffers that hold an order: the numbers 0 to n - 1, each once."""

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The first stage: x [..., in] -> A x [..., r]."""
        raise NotImplementedError

    def expand(self, z: torch.Tensor) -> torch.Tensor:
        """The second stage: z [..., r] -> B z + bias [..., out]."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.expand(self.reduce(x))

    @property
    def weight(self) -> torch.Tensor:
        """W' = B A [out, in], multiplied out anew at each access; for code that looks at a layer's weight, or
        multiplies by it: gradients reach the factors."""
        B, A = self.format.to_factors(self)
        return B @ A

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def dense_weight(layer: nn.Module) -> torch.Tensor:
    """W [out, in] of a linear module, dense or low rank; a product of factors is computed in fp32, rounded once."""
    if not isinstance(layer, LowRankLinear):
        assert isinstance(layer.weight, torch.Tensor)
        return layer.weight.detach()
    with torch.no_grad():
        B, A = layer.format.to_factors(layer)
        return (B.float() @ A.float()).to(B.dtype)


def empty_linear(in_features: int, out_features: int, bias: bool, dtype: torch.dtype, device: str) -> nn.Linear:
    """A linear module whose memory is allocated but not initialised."""
    # skip_init avoids the random numbers, which would also disturb the global generator.
    layer = nn.utils.skip_init(nn.Linear, in_features, out_features, bias=bias, dtype=dtype, device=device)
    assert isinstance(layer, nn.Linear)
    return layer
