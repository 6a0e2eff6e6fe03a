"""Where mixture-of-experts decoders keep their blocks and routers; the core finds their fused experts by structure."""

from lillama_core.architecture import Architecture
from lillama_registry import hookimpl

from .evaluation import evaluation

ROUTERS = ("mlp.gate", "mlp.router")
"""Paths of a block's router; the last of what it returns are the numbers of the chosen experts [tokens, k]."""


class Mixtral(Architecture):
    """A stack of decoder layers whose MLP is a router and its experts; the router, and its like, stay dense."""

    name = "mixtral"
    exclude = (*ROUTERS, "mlp.shared_expert_gate")
    pinned = ROUTERS
    evaluation = evaluation


FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss")


@hookimpl
def lillama_architectures() -> list[Architecture]:
    return [Mixtral(model_types=FAMILIES, stacks={"decoder": "model.layers"})]
