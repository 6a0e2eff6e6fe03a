"""All that lillama uses of transformers without being promised it: private names, and modules that are not documented.

Releases may move these names without notice. They are looked up here alone, when they are needed, and ``NAMES`` and
``ATTRIBUTES`` list them for the test that says which one is missing.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from lillama_core.errors import LillamaError

NAMES = {
    "transformers.core_model_loading:WeightRenaming": "names the matrices of a low-rank module otherwise on disk",
    "transformers.conversion_mapping:get_model_conversion_mapping": "finds a family's own names on disk, for saving",
    "transformers.quantizers.auto:AUTO_QUANTIZATION_CONFIG_MAPPING": "says whether the format is registered already",
    "transformers.quantizers.base:HfQuantizer._process_model_before_weight_loading": "swaps the modules",
    "transformers.quantizers.base:HfQuantizer._process_model_after_weight_loading": "adapts a loaded model",
    "transformers.quantizers.base:HfQuantizer.update_weight_conversions": "adds the names on disk",
    "transformers.modeling_utils:PreTrainedModel._from_config": "builds a model of a class that is no auto class",
    "transformers.modeling_utils:PreTrainedModel._can_compile_fullgraph": "says whether a static cache may be used",
    "transformers.models.auto.modeling_auto:MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "lists the classes that write text",
    "transformers.models.auto.modeling_auto:MODEL_FOR_MASKED_LM_MAPPING_NAMES": "lists the families of encoders",
    "transformers.integrations.moe:_default_apply_gate": "is the gate of fused experts that is understood",
}
"""``module:name`` -> what lillama needs it for."""
ATTRIBUTES = {
    "_weight_conversions": ("transformers.core_model_loading", "renames weights when a model is saved"),
    "hf_quantizer": ("transformers.modeling_utils", "decides whether and how a model is saved"),
    "is_quantized": ("transformers.modeling_utils", "forbids changes of the dtype"),
    "all_tied_weights_keys": ("transformers.modeling_utils", "says which weights are one parameter"),
}
"""Attribute of a loaded model -> the module of transformers that reads it, and what it does there."""


def lookup(name: str) -> Any:
    """Return what transformers has under ``name``, a key of `NAMES`; raise LillamaError when it has moved."""
    import transformers

    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        raise LillamaError(
            f"transformers {transformers.__version__} has no {name}, which {NAMES[name]};"
            " install the version that lillama's constraints.txt names"
        ) from None
    return found


def weight_renaming(on_disk: str, in_memory: str) -> Any:
    """Return the conversion by which transformers loads the tensor ``on_disk`` as ``in_memory``, and saves it back."""
    return lookup("transformers.core_model_loading:WeightRenaming")(on_disk, in_memory)


def is_registered(quant_method: str) -> bool:
    """Whether transformers knows a quantisation method of this name."""
    return quant_method in lookup("transformers.quantizers.auto:AUTO_QUANTIZATION_CONFIG_MAPPING")


def attach_quantizer(model: Any, quantizer: Any, config: Any) -> None:
    """Make ``model`` one that ``quantizer`` has loaded by ``config``, as far as saving is concerned."""
    model.quantization_method = config.quant_method
    model.hf_quantizer = quantizer
    model.config.quantization_config = config
    # What loading would have found out: how the names in memory differ from those on disk.
    mapping = lookup("transformers.conversion_mapping:get_model_conversion_mapping")
    model._weight_conversions = mapping(model, hf_quantizer=quantizer, add_legacy=False)


def detach_quantizer(model: Any) -> None:
    """Make ``model``, whose weights are plain numbers by now, one that transformers saves as any other."""
    model.hf_quantizer = None
    model.is_quantized = False
    model._weight_conversions = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def from_config(model_class: Any, config: Any, trust_remote_code: bool) -> nn.Module:
    """Build a model of ``model_class``, an auto class or a model's own, with random weights."""
    if hasattr(model_class, "from_config"):
        model: nn.Module = model_class.from_config(config, trust_remote_code=trust_remote_code)
    else:
        model = model_class._from_config(config)
    return model


def causal_classes() -> dict[str, str]:
    """Return the model types that can write text -> the name of the class with the head for it."""
    return dict(lookup("transformers.models.auto.modeling_auto:MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"))


def is_encoder_family(model_type: str) -> bool:
    """Whether models of this type are trained to fill in masked tokens."""
    return model_type in lookup("transformers.models.auto.modeling_auto:MODEL_FOR_MASKED_LM_MAPPING_NAMES")


def can_use_static_cache(model: Any) -> bool:
    """Whether ``model`` says that it can be compiled as one graph, for which its cache may be of fixed size."""
    return bool(getattr(model, "_can_compile_fullgraph", False))


def has_own_gate(experts: nn.Module) -> bool:
    """Whether fused experts compute something else than act(gate) * up between their two matrices."""
    gate = getattr(type(experts), "_apply_gate", None)
    return gate is not None and gate.__name__ != "_default_apply_gate"


def tied_weights(model: nn.Module) -> list[tuple[str, str]]:
    """Return pairs of names of weights of ``model`` that are one parameter."""
    return list((getattr(model, "all_tied_weights_keys", None) or {}).items())
