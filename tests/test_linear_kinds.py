"""Which modules are one linear map: ``nn.Linear``, what says the same in its own words, and nothing that does more."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter

from lillama_core.architecture.targets.linear import LinearTarget


class InOtherWords(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = torch.einsum("...i,oi->...o", x, self.weight)
        return found if self.bias is None else found + self.bias


class Rounding(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax().clamp(min=1e-5) / 127
        return nn.functional.linear((x / scale).round() * scale, self.weight, self.bias)


class Clipping(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.clamp(-100, 100), self.weight, self.bias)


class WithoutBias(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


class Scaled(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.scale = nn.Parameter(torch.ones(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * nn.functional.linear(x, self.weight, self.bias)


class WithATable(InOtherWords):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("table", torch.ones(2))


def test_a_subclass_is_a_map_if_it_computes_what_linear_layers_do() -> None:
    assert LinearTarget.accepts(nn.Linear(4, 3))
    for bias in (True, False):
        assert LinearTarget.accepts(FalconLinear(4, 3, bias=bias))
        assert LinearTarget.accepts(InOtherWords(4, 3, bias=bias))
    # On the meta device, where models are looked at before they are loaded.
    assert LinearTarget.accepts(FalconLinear(4, 3, device="meta"))


def test_one_that_does_more_is_not() -> None:
    for kind in (Rounding, Clipping, WithoutBias, Scaled, WithATable):
        assert not LinearTarget.accepts(kind(4, 3)), kind
    # Read by attention instead of called: it inherits its forward.
    assert not LinearTarget.accepts(NonDynamicallyQuantizableLinear(4, 3))
    assert not LinearTarget.accepts(DeepseekV4GroupedLinear(4, 6, 2))
    assert "forward" in PhimoeTopKRouter.__dict__
