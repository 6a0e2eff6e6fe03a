"""Experts in low rank: modules that stand for a layer's fused experts, and how rows find their way to an expert."""

from __future__ import annotations

import copy
import inspect
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


def run_called(
    call: tuple[torch.Tensor, ...], experts: int, expert: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """What experts give that are called with one tensor, two or three, as the head of `expert_layouts` says.

    ``expert`` as for `run_experts`.
    """
    if len(call) == 3:
        return run_experts(*call, experts, expert)
    if len(call) == 2:
        hidden, weights = call
        rows = hidden.reshape(-1, hidden.shape[-1])
        everyone = torch.arange(experts, device=rows.device).expand(len(rows), experts)
        return run_experts(rows, everyone, weights.reshape(-1, experts), experts, expert).view(hidden.shape)
    (rows,) = call
    numbers = torch.arange(experts, device=rows.device).repeat_interleave(len(rows) // experts)
    # A row of zeros is a token that was not sent to the expert: it would give zeros.
    sent = rows.detach().any(-1).nonzero().squeeze(-1)
    found = run_experts(rows[sent], numbers[sent, None], rows.new_ones(len(sent), 1), experts, expert)
    return torch.zeros_like(rows).index_copy(0, sent, found)


def gated(act_fn: Callable[[torch.Tensor], torch.Tensor], gate_up: torch.Tensor) -> torch.Tensor:
    """act(g) * u [..., I] of [g; u] [..., 2I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return act_fn(gate) * up


Gate = Callable[[torch.Tensor], torch.Tensor]
"""What an expert computes before its last matrix: [..., 2I] -> [..., I], or of I numbers without a gate."""


def gate_of(experts: Any) -> Gate:
    """The gate of dense ``experts``, as a function that does not keep their weights alive."""
    if not getattr(experts, "has_gate", True):
        gate: Gate = experts.act_fn
        return gate
    if not hasattr(experts, "_apply_gate"):
        return partial(gated, experts.act_fn)
    hollow = copy.copy(experts)
    hollow.__dict__ |= {"_parameters": dict.fromkeys(experts._parameters)}
    hollow.__dict__.pop("forward", None)
    gate = hollow._apply_gate
    return gate


def takes_turns(gate: Gate) -> bool:
    """Whether ``gate`` finds the two numbers of a unit side by side, rather than in two halves; found by trying."""
    units = torch.ones(1, 4, device="cpu")
    changed = units.clone()
    # Of two units: side by side the second number is of the first one.
    changed[0, 1] = 2.0
    return bool((gate(units) != gate(changed))[0, 0])


def arguments_of(experts: nn.Module) -> tuple[str, ...]:
    """Names of the tensors that dense ``experts`` are called with."""
    return tuple(inspect.signature(type(experts).forward).parameters)[1:]


def parts_of(experts: nn.Module) -> dict[str, str]:
    """The parts of an expert -> the parameter that holds each for all of the dense ``experts``; the last is ``down``.

    ``gate_up`` and ``down``, or ``gate``, ``up`` and ``down``, or ``up`` and ``down``.
    """
    names = [name for name, _ in experts.named_parameters(recurse=False)]
    firsts = ("gate_up",) if "gate_up_proj" in names else ("gate", "up") if "gate_proj" in names else ("up",)
    return {part: f"{part}_proj" for part in (*firsts, "down")}


def as_stored(experts: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """Turn matrices [E, out, in] into those that dense ``experts`` hold, and those into these: a view."""
    return weight.transpose(1, 2) if is_transposed(experts) else weight


def is_transposed(experts: Any) -> bool:
    """Whether dense ``experts`` hold matrices [in, out]: they say so, or their inner sizes do."""
    if hasattr(experts, "is_transposed") or "gate_up" not in parts_of(experts):
        return bool(getattr(experts, "is_transposed", False))
    return bool(experts.gate_up_proj.shape[2] == 2 * experts.down_proj.shape[1])


def fused_weight(experts: nn.Module, part: str) -> torch.Tensor:
    """A view [E, out, in] of the parameter that holds ``part`` of all ``experts``."""
    return as_stored(experts, getattr(experts, f"{part}_proj"))


def fused_bias(experts: nn.Module, part: str) -> torch.Tensor | None:
    """The biases [E, out] of ``part`` of all ``experts``, or None."""
    bias = getattr(experts, f"{part}_proj_bias", None)
    return bias if isinstance(bias, torch.Tensor) else None


def identities_of(experts: Any) -> int:
    """How many experts behind the others of the dense ``experts`` give what they get."""
    first = next(iter(parts_of(experts)))
    return len(getattr(experts, f"{first}_proj")) - len(experts.down_proj)


def in_order(
    arguments: tuple[str, ...], tensors: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """The tensors of a call of experts whose ``arguments`` have these names, in their order."""
    return (*tensors, *(named[name] for name in arguments[len(tensors) :]))


def run_parts(
    call: tuple[torch.Tensor, ...],
    parts: tuple[str, ...],
    experts: int,
    identities: int,
    gate: Gate,
    apply: Callable[[str, int, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """What a call of experts gives, where ``apply`` multiplies the rows [n, in] of one by a part of it.

    The last of ``parts`` is ``down``.
    """
    *firsts, down = parts

    def expert(e: int, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if e >= experts:
            return rows * weights
        units = [apply(part, e, rows) for part in firsts]
        return apply(down, e, gate(torch.cat(units, -1) if len(units) > 1 else units[0])) * weights

    return run_called(call, experts + identities, expert)


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

    down_maps: nn.ModuleList

    # The names must not begin with those of the fused parameters and a dot: transformers' converters would cut the
    # tensors up on saving.
    def __init__(self, dense: nn.Module, maps: dict[str, list[nn.Module]]) -> None:
        """``maps`` are the modules of each part, by expert, that stand for those of ``dense``."""
        super().__init__()
        self.gate: Gate = gate_of(dense)
        self.arguments = arguments_of(dense)
        self.identities = identities_of(dense)
        self.parts: tuple[str, ...] = tuple(maps)
        for part, layers in maps.items():
            self.add_module(f"{part}_maps", nn.ModuleList(layers))
        if self.identities:
            # Nothing multiplies by them, but checkpoints have them.
            rest = fused_weight(dense, "gate_up")[len(self.down_maps) :]
            self.rest = nn.Parameter(rest.detach().clone(), requires_grad=False)

    @property
    def num_experts(self) -> int:
        return len(self.down_maps) + self.identities

    def forward(self, *tensors: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        def apply(part: str, e: int, rows: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = getattr(self, f"{part}_maps")[e](rows)
            return out

        call = in_order(self.arguments, tensors, named)
        return run_parts(call, self.parts, len(self.down_maps), self.identities, self.gate, apply)


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
