"""Experts in low rank: modules that stand for a layer's fused experts, and how rows find their way to an expert."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lillama_core.errors import LillamaError
from lillama_core.formats.base import LowRankLinear


def run_experts(
    rows: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    experts: int,
    expert: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """For each row of ``rows`` [T, d] the sum [T, out] of what its k experts give; in the dtype of ``rows``.

    ``expert`` gets an expert's number, the rows [n, d] that are routed to it, in their order, and their routing
    weights [n, 1], and returns [n, out], weighted; it is called once for every expert that has rows.
    """
    choices = top_k_index.shape[-1]
    numbers, order = torch.sort(top_k_index.reshape(-1), stable=True)
    counts = torch.bincount(numbers, minlength=experts).tolist()
    parts = rows[order // choices].split(counts)
    weights = top_k_weights.reshape(-1, 1)[order].split(counts)
    found = [expert(e, part, weights[e]) for e, part in enumerate(parts) if len(part)]
    if not found:
        raise LillamaError("experts were called without a token")
    together = torch.cat(found)
    # Put back in place and summed, rather than added up by index, whose order of summation a GPU leaves to chance.
    placed = torch.zeros_like(together).index_copy(0, order, together)
    return placed.view(len(rows), choices, -1).sum(1).to(rows.dtype)


def gated(act_fn: Callable[[torch.Tensor], torch.Tensor], gate_up: torch.Tensor) -> torch.Tensor:
    """act(g) * u [..., I] of [g; u] [..., 2I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return act_fn(gate) * up


Gate = Callable[[torch.Tensor], torch.Tensor]
"""What an expert computes between its two matrices: [..., 2I] -> [..., I]."""


def gate_of(experts: Any) -> Gate:
    """The gate of dense ``experts``, as a function that does not keep their weights alive."""
    if not hasattr(experts, "_apply_gate"):
        return partial(gated, experts.act_fn)
    hollow = copy.copy(experts)
    hollow.__dict__ |= {"_parameters": dict.fromkeys(experts._parameters)}
    hollow.__dict__.pop("forward", None)
    gate: Gate = hollow._apply_gate
    return gate


def dense_linear(weight: torch.Tensor, requires_grad: bool, bias: torch.Tensor | None = None) -> nn.Linear:
    """A linear module with copies of ``weight`` [out, in] and ``bias`` [out], which may be on the meta device."""
    layer = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    assert isinstance(layer, nn.Linear)
    # Copies: a view would keep the parameter of all experts alive, and on disk.
    layer.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format), requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), requires_grad)
    return layer


class LowRankExperts(nn.Module):
    """Experts with a module for each matrix: a low-rank one of a rank of its own, or a linear one while dense."""

    # The names must not begin with those of the fused parameters and a dot: transformers' converters would cut the
    # tensors up on saving.
    def __init__(self, gate: Gate, gate_up_maps: list[nn.Module], down_maps: list[nn.Module]) -> None:
        super().__init__()
        self.gate = gate
        self.gate_up_maps = nn.ModuleList(gate_up_maps)
        self.down_maps = nn.ModuleList(down_maps)

    @property
    def num_experts(self) -> int:
        return len(self.gate_up_maps)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        def expert(e: int, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.down_maps[e](self.gate(self.gate_up_maps[e](rows)))
            return out * weights

        return run_experts(hidden_states, top_k_index, top_k_weights, self.num_experts, expert)


class SharedExperts(nn.Module):
    """Experts that share an input projection and an output projection, each computed once a token.

    ``gate_up_map`` is the stacked map [E 2I, H] of all experts, ``down_map`` [H, E I]; an expert multiplies by its own
    slice of the first one's second stage and of the second one's first stage. Either may be a linear module.
    """

    def __init__(self, gate: Gate, gate_up_map: nn.Module, down_map: nn.Module, experts: int) -> None:
        super().__init__()
        self.gate = gate
        self.gate_up_map = gate_up_map
        self.down_map = down_map
        self.num_experts = experts

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        gate_up: Any = self.gate_up_map
        down: Any = self.down_map
        low_in, low_out = isinstance(gate_up, LowRankLinear), isinstance(down, LowRankLinear)
        rows = gate_up.reduce(hidden_states) if low_in else hidden_states
        ups = (gate_up.up if low_in else gate_up).weight.chunk(self.num_experts)
        downs = (down.down if low_out else down).weight.chunk(self.num_experts, dim=1)

        def expert(e: int, part: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            hidden = self.gate(functional.linear(part, ups[e]))
            return functional.linear(hidden, downs[e]) * weights

        summed = run_experts(rows, top_k_index, top_k_weights, self.num_experts, expert)
        out: torch.Tensor = down.expand(summed) if low_out else summed
        return out.to(hidden_states.dtype)
