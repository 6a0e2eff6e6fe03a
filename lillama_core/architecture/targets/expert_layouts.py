"""Layouts of experts fused into three-dimensional parameters: which are read, and what they hold as matrices.

transformers 5 keeps the experts of a layer in one module with ``gate_up_proj`` [E, 2I, H] and ``down_proj`` [E, H, I],
both perhaps transposed, perhaps with ``gate_up_proj_bias`` [E, 2I] and ``down_proj_bias`` [E, H]. It is called as
(hidden_states [T, H], top_k_index [T, k], top_k_weights [T, k]). For every token x it gives the sum over its chosen
experts e of w_e (D_e gate(U_e x + a_e) + b_e). The gate makes I numbers of 2I: act(g) * u of [g; u], or what the module
has of its own.
"""

from __future__ import annotations

import torch
from torch import nn

from lillama_core.models.transformers_adapter import has_own_gate

FUSED = {"gate_up": "gate_up_proj", "down": "down_proj"}
"""A part of an expert -> the parameter that holds it for all experts."""
BIASES = {part: f"{name}_bias" for part, name in FUSED.items()}
"""Likewise of the biases, where there are some."""
FLAGS = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_transposed": False,
    "is_concatenated": True,
}
"""What transformers' experts modules say of themselves, and what holds for one that does not say it."""

READ = "experts are read that hold gate_up_proj and down_proj, perhaps with biases, and nothing else"
"""What to say of any others."""


def is_fused(module: nn.Module) -> bool:
    """Whether ``module`` holds experts in three-dimensional parameters, of whatever layout."""
    parameters = dict(module.named_parameters(recurse=False))
    return any(name in parameters and parameters[name].dim() == 3 for name in ("gate_up_proj", "up_proj", "down_proj"))


def has_known_layout(module: nn.Module) -> bool:
    """Whether ``module`` is fused experts that compute what the head of this file says."""
    flags = {name: getattr(module, name, usual) for name, usual in FLAGS.items()}
    if not flags["has_gate"] or flags["has_post_expert_norm"]:
        return False
    dimensions = dict.fromkeys(FUSED.values(), 3) | (dict.fromkeys(BIASES.values(), 2) if flags["has_bias"] else {})
    # Of anything else that it holds it is not known what it is for.
    own = {name: tensor.dim() for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
    if own != dimensions:
        return False
    experts, twice, width = fused_weight(module, "gate_up").shape
    shapes = {"gate_up": (experts, twice, width), "down": (experts, width, twice // 2)}
    for part, shape in shapes.items():
        bias = fused_bias(module, part)
        if fused_weight(module, part).shape != shape or (bias is not None and bias.shape != shape[:2]):
            return False
    if has_own_gate(module):
        # transformers calls it between the two matrices of experts that say their layout, and of those alone.
        return all(hasattr(module, name) for name in FLAGS)
    return flags["is_concatenated"] and hasattr(module, "act_fn")


def fused_experts(block: nn.Module) -> dict[str, bool]:
    """Paths of the block's fused experts, and whether their layout is known."""
    return {name: has_known_layout(module) for name, module in block.named_modules() if is_fused(module)}


def fused_weight(module: nn.Module, part: str) -> torch.Tensor:
    """A view [E, out, in] of the parameter that holds ``part`` of all experts."""
    return as_stored(module, getattr(module, FUSED[part]))


def fused_bias(module: nn.Module, part: str) -> torch.Tensor | None:
    """The biases [E, out] of ``part`` of all experts, or None."""
    bias = getattr(module, BIASES[part], None)
    return bias if isinstance(bias, torch.Tensor) else None


def as_stored(module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """Turn matrices [E, out, in] into those that ``module`` holds, and those into these: a view."""
    return weight.transpose(1, 2) if getattr(module, "is_transposed", False) else weight
