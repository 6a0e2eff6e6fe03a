"""Where decoder-only transformers keep their blocks; every linear map in a block is compressed."""

from lillama_core.architecture import Architecture
from lillama_registry import hookimpl

from .evaluation import evaluation


class Transformer(Architecture):
    """A stack of decoder layers under a language-model head. A fused projection (q, k and v in one) is one map."""

    name = "transformer"
    evaluation = evaluation


# Llama's layout; InkubaLM is a Llama, and Phi-1 and Phi-2 are `phi`.
LLAMAS = ("llama", "mistral", "phi", "phi3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "stablelm")
FAMILIES = {
    "model.layers": LLAMAS,
    "model.decoder.layers": ("opt",),
    "transformer.h": ("gpt2",),
    "gpt_neox.layers": ("gpt_neox",),
}


@hookimpl
def lillama_architectures() -> list[Architecture]:
    from .declared import declared

    return [*(Transformer(model_types=t, stacks={"decoder": path}) for path, t in FAMILIES.items()), *declared()]
