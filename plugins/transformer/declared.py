"""The claims of a table: where the decoders of model types that no plugin names keep their blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lillama_core.errors import UserError

from .architecture import Transformer
from .coverage import LOADED_BY, WORKS

if TYPE_CHECKING:
    from torch import nn


class Declared(Transformer):
    """A decoder of which every linear map is compressed but for those below; what a model has beside it stays dense."""

    fallback = True
    exclude = (
        # What decides which expert, or which position, a token goes to.
        *("mlp.gate.*", "mlp.router.*", "mlp.shared_expert_gate", "feed_forward.router"),
        "self_attention.experts.router.*",
        *("self_attn.indexer.*", "self_attn.compressor.indexer.*", "self_attn.compressor.indexer.*.*"),
        # Weights that are read instead of called.
        *("mamba.dt_proj", "temporal_block.rg_lru.*"),
        # What makes the kernels of convolutions: transformers has another name for its weight on disk.
        *("self_attn.k_sconv.weight_proj", "self_attn.v_sconv.weight_proj"),
        *("post_attention_convolution.weight_proj", "post_mlp_convolution.weight_proj"),
    )
    optional = ("self_attn.o_a_proj",)  # a grouped projection, which is taken on request

    def block_paths(self, model: nn.Module, stack: str) -> list[str]:
        whole: Any = model.config
        config = whole.get_text_config(decoder=True)
        shared = getattr(config, "num_kv_shared_layers", None)
        if shared:
            raise UserError(
                f"num_kv_shared_layers of the config is {shared}: the last blocks take the keys and values of earlier"
                " ones, and such models cannot be compressed block by block"
            )
        # Blocks that look at an image are passed over where there is none.
        looking = {f"{self.stacks[stack]}.{i}" for i in getattr(config, "cross_attention_layers", None) or ()}
        return [path for path in super().block_paths(model, stack) if path not in looking]


def declared() -> list[Declared]:
    """Return an architecture for each place where the table has blocks, and class that loads the models."""
    found = []
    loaders = {t: LOADED_BY.get(t, Declared.auto_class) for t in WORKS}
    for path, loader in dict.fromkeys((WORKS[t], loaders[t]) for t in WORKS):
        types = tuple(t for t, where in WORKS.items() if (where, loaders[t]) == (path, loader))
        architecture = Declared(model_types=types, stacks={"decoder": path})
        architecture.auto_class = loader
        found.append(architecture)
    return found
