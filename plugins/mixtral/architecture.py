"""Where mixture-of-experts decoders keep their blocks and routers; the core finds their fused experts by structure."""

from lillama_core import Architecture, hookimpl

from .evaluation import ROUTER, evaluation


class Mixtral(Architecture):
    """A stack of decoder layers whose MLP is a router and its experts; the router, and its like, stay dense."""

    name = "mixtral"
    exclude = (ROUTER, "mlp.shared_expert_gate")
    pinned = (ROUTER,)
    evaluation = evaluation


FAMILIES = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
)


@hookimpl
def lillama_architectures() -> list[Architecture]:
    return [Mixtral(model_types=FAMILIES, stacks={"decoder": "model.layers"})]
