"""All that lillama uses of transformers without being promised it: private names, and modules that are not documented.

Releases may move these names without notice. They are looked up here alone, when they are needed, and ``NAMES`` and
``ATTRIBUTES`` list them for the test that says which one is missing.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lillama_core.errors import LillamaError, UserError, one_line

NAMES = {
    "transformers.core_model_loading:WeightRenaming": "names the matrices of a low-rank module otherwise on disk",
    "transformers.core_model_loading:WeightConverter": "makes tensors in memory of others on disk",
    "transformers.core_model_loading:dot_natural_key": "orders the tensors that are made one",
    "transformers.core_model_loading:rename_source_key": "tells the name in memory of a tensor on disk",
    "transformers.core_model_loading:revert_weight_conversion": "makes the tensors on disk of those in memory",
    "transformers.conversion_mapping:get_model_conversion_mapping": "finds a family's own names on disk",
    "transformers.initialization:guard_torch_init_functions": "keeps what is loaded from being initialised",
    "transformers.modeling_utils:remove_tied_weights_from_state_dict": "leaves one of several tied weights to save",
    "transformers.modeling_utils:PreTrainedModel._adjust_missing_and_unexpected_keys": "knows which may be missing",
    "transformers.modeling_utils:PreTrainedModel._get_dtype_plan": "says which weights stay in fp32",
    "transformers.modeling_utils:PreTrainedModel._init_weights": "computes the buffers that are not on disk",
    "transformers.quantizers.auto:AUTO_QUANTIZATION_CONFIG_MAPPING": "says whether the format is registered already",
    "transformers.quantizers.base:HfQuantizer._process_model_before_weight_loading": "swaps the modules",
    "transformers.quantizers.base:HfQuantizer._process_model_after_weight_loading": "adapts a loaded model",
    "transformers.quantizers.base:HfQuantizer.update_weight_conversions": "adds the names on disk",
    "transformers.modeling_utils:PreTrainedModel._from_config": "builds a model of a class that is no auto class",
    "transformers.modeling_utils:PreTrainedModel._can_compile_fullgraph": "says whether a static cache may be used",
    "transformers.integrations.gguf.utils:is_gguf_arch_supported": "says of which GGUF files the tensors are packed",
    "transformers.modeling_gguf_pytorch_utils:load_gguf_checkpoint": "reads the sizes by which tensors are reordered",
    "transformers.modeling_gguf_pytorch_utils:get_gguf_hf_weights_map": "tells the names of a GGUF file's tensors",
    "transformers.modeling_gguf_pytorch_utils:TENSOR_PROCESSORS": "reorders the tensors of GGUF files",
    "transformers.modeling_gguf_pytorch_utils:TensorProcessor": "stands for no reordering",
    "transformers.models.auto.modeling_auto:MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "lists the classes that write text",
    "transformers.models.auto.modeling_auto:MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": "lists those that see as well",
    "transformers.models.auto.modeling_auto:MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES": "lists those that hear as well",
    "transformers.models.auto.modeling_auto:MODEL_FOR_MASKED_LM_MAPPING_NAMES": "lists the families of encoders",
    "transformers.modeling_utils:PreTrainedModel.is_remote_code": "says whether a model brings code of its own",
    "transformers.dynamic_module_utils:custom_object_save": "copies a model's own code beside its weights",
    "transformers.integrations.moe:_default_apply_gate": "is the gate of fused experts that is understood",
}
"""``module:name`` -> what lillama needs it for."""
ATTRIBUTES = {
    "_weight_conversions": ("transformers.core_model_loading", "renames weights when a model is saved"),
    "hf_quantizer": ("transformers.modeling_utils", "decides whether and how a model is saved"),
    "is_quantized": ("transformers.modeling_utils", "forbids changes of the dtype"),
    "_from_model_config": ("transformers.generation.configuration_utils", "says that settings are a config's"),
    "_is_hf_initialized": ("transformers.initialization", "says that a weight is loaded and to be left alone"),
    "_keys_to_ignore_on_save": ("transformers.modeling_utils", "names what is never written"),
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


def save_settings(model: Any, folder: Path) -> None:
    """Write all of the directory of ``model``, which may have no weights, that ``save_pretrained`` writes besides them.

    Its config, its settings for generation, and the code that it was loaded with.
    """
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    if model.is_remote_code():
        lookup("transformers.dynamic_module_utils:custom_object_save")(model, str(folder), config=model.config)
    model.config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


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


def writing_classes() -> dict[str, dict[str, str]]:
    """Return auto class -> the model types that it loads as models that write text, with all that they read besides.

    A type that several load is of the first of them.
    """
    mappings = {
        "AutoModelForImageTextToText": "IMAGE_TEXT_TO_TEXT",
        "AutoModelForMultimodalLM": "MULTIMODAL_LM",
        "AutoModelForCausalLM": "CAUSAL_LM",
    }
    module = "transformers.models.auto.modeling_auto"
    return {name: dict(lookup(f"{module}:MODEL_FOR_{of}_MAPPING_NAMES")) for name, of in mappings.items()}


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


def forget_ties(model: Any, name: str) -> None:
    """Take the weights that are the parameter ``name`` for such no more: what they belong to refers to its module."""
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    names = {name}
    for _ in ties:
        names |= {n for pair in ties.items() if names & set(pair) for n in pair}
    for target in [target for target in ties if target in names]:
        del ties[target]


# Loading by parts, and saving by parts: what ``from_pretrained`` and ``save_pretrained`` do with the names


class Names:
    """From the names of tensors on disk to those in memory, for one checkpoint of ``model``.

    What some families call a tensor depends on which other tensors there are: an object is for one checkpoint, whose
    names are asked for in the order of `natural`.
    """

    def __init__(self, model: Any) -> None:
        mapping = lookup("transformers.conversion_mapping:get_model_conversion_mapping")
        found = mapping(model, hf_quantizer=getattr(model, "hf_quantizer", None))
        converter = lookup("transformers.core_model_loading:WeightConverter")
        self._converters = [entry for entry in found if isinstance(entry, converter)]
        self._renamings = [entry for entry in found if not isinstance(entry, converter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        self._rename = lookup("transformers.core_model_loading:rename_source_key")
        self._prefix = model.base_model_prefix
        self.known: dict[str, torch.Tensor] = model.state_dict()
        """The model's tensors by name in memory."""

    @staticmethod
    def natural(key: str) -> Any:
        """What to sort names on disk by: numbers in them count as numbers."""
        return lookup("transformers.core_model_loading:dot_natural_key")(key)

    def in_memory(self, key: str) -> tuple[str, str | None]:
        """Return the name in memory of ``key``, and the converter's pattern that takes it, if one does.

        Where a converter makes several tensors it is the name of the first of them.
        """
        name, pattern = self._rename(key, self._renamings, self._converters, self._prefix, self.known)
        if name not in self.known and key in self.known:
            name, pattern = self._rename(key, [], [], self._prefix, self.known)
        return name, pattern

    def unmatched(self, name: str, pattern: str | None) -> list[str]:
        """Return what transformers calls the unexpected tensors at ``name``, which is not one of the model's."""
        if pattern is None:
            return [name]
        targets = self._by_pattern[pattern].target_patterns
        return [name.replace(targets[0], target) for target in targets]

    def convert(
        self, model: Any, name: str, tensors: Iterable[tuple[str, str, Callable[[], torch.Tensor]]]
    ) -> dict[str, torch.Tensor]:
        """Return the tensors in memory that a converter makes of ``tensors``: (name on disk, pattern, how to read it).

        All have ``name`` by `in_memory`. ``model`` gives sizes alone, and may be on the meta device.
        """
        sources = list(tensors)
        converter = copy.deepcopy(self._by_pattern[sources[0][1]])
        for key, pattern, read in sources:
            converter.add_tensor(name, key, pattern, read)
        made = converter.convert(name, model=model, config=model.config)
        return {k: v[0] if isinstance(v, list) else v for k, v in made.items()}


def adjusted(model: Any, missing: set[str], unexpected: set[str]) -> tuple[set[str], set[str]]:
    """Return both without the names that the model's class says may be missing, or left over."""
    lookup("transformers.modeling_utils:PreTrainedModel._adjust_missing_and_unexpected_keys")
    notes = SimpleNamespace(missing_keys=set(missing), unexpected_keys=set(unexpected))
    model._adjust_missing_and_unexpected_keys(notes)
    return notes.missing_keys, notes.unexpected_keys


def dtypes_kept(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return patterns, to be searched for in names, -> the dtype that such weights have in a model of ``dtype``."""
    lookup("transformers.modeling_utils:PreTrainedModel._get_dtype_plan")
    return {k.replace("*", ".*"): v for k, v in model._get_dtype_plan(dtype).items()}


def initialize(model: nn.Module, owner: Any, skip: Container[nn.Module] = ()) -> None:
    """Compute the tensors of ``model`` that were not `mark_loaded`, by the rules of ``owner`` or of models inside.

    ``owner`` is the nearest model of transformers that holds ``model``. Modules in ``skip`` are passed over.
    """
    lookup("transformers.modeling_utils:PreTrainedModel._init_weights")
    guard = lookup("transformers.initialization:guard_torch_init_functions")
    with torch.no_grad(), guard():
        _initialize(model, owner, skip)


def nearest_model(model: nn.Module, path: str) -> Any:
    """Return the innermost model of transformers that holds the module at ``path`` of ``model``, or is it."""
    found = module = model
    for part in path.split("."):
        module = module.get_submodule(part)
        found = module if hasattr(module, "_init_weights") else found
    return found


def _initialize(module: nn.Module, owner: Any, skip: Container[nn.Module]) -> None:
    for child in module.children():
        if child not in skip:
            _initialize(child, child if hasattr(child, "_init_weights") else owner, skip)
    if not getattr(module, "_is_hf_initialized", False):
        owner._init_weights(module)


def set_generation_config(model: Any, location: str) -> None:
    """Give ``model`` the settings for writing text that are stored at ``location``, as ``from_pretrained`` does.

    Raises UserError for settings that cannot be read.
    """
    from transformers import GenerationConfig

    if not model.can_generate():
        return
    try:
        try:
            model.generation_config = GenerationConfig.from_pretrained(location)
        except OSError:
            # Older models have them in their config.
            model.generation_config = GenerationConfig.from_pretrained(
                location, config_file_name="config.json", _from_model_config=True
            )
    except Exception as error:
        raise UserError(f"the settings for writing text at {location!r} cannot be read: {one_line(error)}") from None


def mark_loaded(part: torch.Tensor | nn.Module) -> None:
    """Keep `initialize`, and transformers, from touching a tensor or a module."""
    part._is_hf_initialized = True  # type: ignore[union-attr]


def as_saved(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return some of a model's tensors, by name in memory, as ``save_pretrained`` writes them: by name on disk."""
    revert = lookup("transformers.core_model_loading:revert_weight_conversion")
    found: dict[str, torch.Tensor] = revert(model, without_ties(model, tensors))
    return found


def without_ties(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return those of ``tensors``, by name in memory, that ``save_pretrained`` writes: of tied ones a single one."""
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    kept = {name: tensor for name, tensor in tensors.items() if name not in ignored}
    found: dict[str, torch.Tensor] = lookup("transformers.modeling_utils:remove_tied_weights_from_state_dict")(
        kept, model
    )
    return found


class GgufTensors:
    """The tensors of a GGUF file, one after the other, as transformers loads them into ``model``."""

    def __init__(self, file: str, architecture: str, model: Any) -> None:
        module = "transformers.modeling_gguf_pytorch_utils"
        config = lookup(f"{module}:load_gguf_checkpoint")(file)["config"]
        processors = lookup(f"{module}:TENSOR_PROCESSORS")
        self._processor = processors.get(architecture, lookup(f"{module}:TensorProcessor"))(config=config)
        self._names = lookup(f"{module}:get_gguf_hf_weights_map")(model, self._processor)

    @staticmethod
    def can_read(architecture: str) -> bool:
        """Whether files of this architecture, by GGUF's name for it, are unpacked by names and orders alone."""
        return not lookup("transformers.integrations.gguf.utils:is_gguf_arch_supported")(architecture)

    def add(self, name: str, weights: Any, found: dict[str, torch.Tensor]) -> None:
        """Put the tensor ``name`` of the file, an array of numbers, into ``found`` by its name in the model.

        Parts of one tensor must be added to the same ``found``. What the model has no name for is left out.
        """
        parsed: dict[str, Any] = {"tensors": found}
        made = self._processor.process(
            weights=weights, name=name, tensor_key_mapping=self._names, parsed_parameters=parsed
        )
        if made.name in self._names:
            found[self._names[made.name]] = torch.from_numpy(made.weights.copy())
