"""Layouts of experts fused into three-dimensional parameters: which are read, and what they hold as matrices.

transformers 5 keeps the experts of a layer in one module with ``gate_up_proj`` [E, 2I, H] and ``down_proj`` [E, H, I],
both perhaps transposed, perhaps with ``gate_up_proj_bias`` [E, 2I] and ``down_proj_bias`` [E, H]. It is called as
(hidden_states [T, H], top_k_index [T, k], top_k_weights [T, k]). For every token x it gives the sum over its chosen
experts e of w_e (D_e gate(U_e x + a_e) + b_e). The gate makes I numbers of 2I: act(g) * u of [g; u], or what the module
has of its own. Variants:

- Instead of U there is ``gate_proj`` and ``up_proj``, [E, I, H] each; or ``up_proj`` alone, and act(U_e x).
- ``gate_up_proj`` has more experts than ``down_proj``: e from there on gives w_e x.
- Called with hidden states and weights [..., E], every token goes to all experts.
- Called with rows [E T, H], sorted by expert, each row goes to its own one: [E T, H] again, not summed.
"""

from __future__ import annotations

from torch import nn

from lillama_core.architecture.targets.expert_modules import (
    arguments_of,
    fused_bias,
    fused_weight,
    identities_of,
    parts_of,
)
from lillama_core.models.transformers_adapter import has_own_gate

FLAGS = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_transposed": False,
    "is_concatenated": True,
}
"""What transformers' experts modules say of themselves, and what holds for one that does not say it."""

READ = (
    "experts are read that hold gate_up_proj (or up_proj, or gate_proj and up_proj) and down_proj, perhaps with biases,"
    " and nothing else"
)
"""What to say of any others."""


def is_fused(module: nn.Module) -> bool:
    """Whether ``module`` holds experts in three-dimensional parameters, of whatever layout."""
    parameters = dict(module.named_parameters(recurse=False))
    return any(name in parameters and parameters[name].dim() == 3 for name in ("gate_up_proj", "up_proj", "down_proj"))


def has_known_layout(module: nn.Module) -> bool:
    """Whether ``module`` is fused experts of which the head of this file says what they compute, as far as is seen.

    What they compute is compared with it when they are observed.
    """
    flags = {name: getattr(module, name, usual) for name, usual in FLAGS.items()}
    if flags["has_post_expert_norm"]:
        return False
    parts = parts_of(module)
    if flags["has_gate"] == (tuple(parts) == ("up", "down")):
        return False
    dimensions = dict.fromkeys(parts.values(), 3)
    if flags["has_bias"]:
        dimensions |= {f"{name}_bias": 2 for name in parts.values()}
    # Of anything else that it holds it is not known what it is for.
    own = {name: tensor.dim() for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
    if own != dimensions or not _fits(module):
        return False
    if not flags["has_gate"]:
        return hasattr(module, "act_fn")
    if has_own_gate(module):
        # transformers calls it between the two matrices of experts that say their layout, and of those alone.
        return all(hasattr(module, name) for name in FLAGS)
    return flags["is_concatenated"] and hasattr(module, "act_fn")


def _fits(module: nn.Module) -> bool:
    """Whether the sizes of the parameters of ``module``, and how it is called, are those of one of the layouts."""
    parts = parts_of(module)
    experts, width, units = fused_weight(module, "down").shape
    identities, tensors = identities_of(module), len(arguments_of(module))
    if tensors not in (1, 2, 3) or identities < 0 or not experts:
        return False
    # Zeros give zeros, and an expert behind the others has a token, only where that is so.
    has_bias = fused_bias(module, "down") is not None
    if (identities and (tensors != 3 or tuple(parts) != ("gate_up", "down"))) or (has_bias and tensors == 1):
        return False
    for part in parts:
        shape: tuple[int, ...] = (experts + identities, 2 * units if part == "gate_up" else units, width)
        if part == "down":
            shape = (experts, width, units)
        bias = fused_bias(module, part)
        if fused_weight(module, part).shape != shape or (bias is not None and bias.shape != shape[:2]):
            return False
    return True


def is_routed(module: nn.Module) -> bool:
    """Whether fused experts of a known layout see those tokens alone that are sent to them."""
    return len(arguments_of(module)) != 2


def can_share(module: nn.Module) -> bool:
    """Whether one map can stand for each part of all experts of ``module``, which have a known layout."""
    usual = tuple(parts_of(module)) == ("gate_up", "down") and len(arguments_of(module)) == 3
    return usual and not identities_of(module) and fused_bias(module, "gate_up") is None


def fused_experts(block: nn.Module) -> dict[str, bool]:
    """Paths of the block's fused experts, and whether their layout is known."""
    return {name: has_known_layout(module) for name, module in block.named_modules() if is_fused(module)}
