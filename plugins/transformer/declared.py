"""The claims of a table: where the decoders of model types that no plugin names keep their blocks."""

from .architecture import Transformer
from .coverage import WORKS


class Declared(Transformer):
    """A decoder of which every linear map is compressed but for those below."""

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


def declared() -> list[Declared]:
    """Return an architecture for each place where the table has blocks."""
    paths = dict.fromkeys(WORKS.values())
    return [
        Declared(model_types=tuple(t for t, where in WORKS.items() if where == path), stacks={"decoder": path})
        for path in paths
    ]
