"""Finding, checking and loading the model to compress."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lillama_core.errors import UserError, is_out_of_memory, one_line
from lillama_core.models.complete import check_complete
from lillama_core.models.gguf_header import forget_header
from lillama_core.models.sizes import allowed_by, check_numbers, no_larger_than
from lillama_core.models.source import QUANT_METHOD, ModelSource
from lillama_core.models.transformers_adapter import detach_quantizer, from_config
from lillama_core.models.unclaimed import no_plugin
from lillama_core.system.quiet import quiet
from lillama_core.system.regular import check_folder

if TYPE_CHECKING:
    from lillama_core.architecture.base import Architecture

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_config(source: ModelSource, allow_compressed: bool = False) -> Any:
    """The model's transformers config; raises UserError when there is none, or for an unsuitable model."""
    from transformers import AutoConfig, PretrainedConfig

    try:
        if source.gguf_file is None:
            # As it stands: a config may make lists of the length that it names.
            found, _ = PretrainedConfig.get_config_dict(source.location)
            check_numbers(found, source.spec)
            if "transformers_weights" in found:
                raise UserError(
                    f"the config of model {source.spec!r} names weights of its own ('transformers_weights'); remove"
                    " that, and call them model.safetensors"
                )
        config = AutoConfig.from_pretrained(source.location, **source.extra)
    except UserError:
        raise
    except Exception as error:
        raise _bad_config(source, error) from None
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and source.gguf_file is None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        if str(method) == QUANT_METHOD:
            if allow_compressed:
                return config
            raise UserError(f"model {source.spec!r} is already compressed by lillama; start from its base model")
        raise UserError(f"model {source.spec!r} is quantized ({method}); start from its unquantized weights")
    return config


def _bad_config(source: ModelSource, error: Exception) -> UserError:
    """Why there is no config, in the words of the user's request instead of the library's."""
    from transformers import CONFIG_MAPPING

    if "trust_remote_code" in str(error):
        return UserError(
            f"model {source.spec!r} brings code of its own, which is not run unless you pass --trust-remote-code"
        )
    if not source.is_local:
        return UserError(f"no file or directory {source.spec!r}, and not to be had from the hub: {one_line(error)}")
    model_type = None
    if source.gguf_file is None:
        with contextlib.suppress(Exception):
            found = json.loads((Path(source.location) / "config.json").read_text(encoding="utf-8"))
            model_type = found.get("model_type")
    if isinstance(model_type, str) and model_type not in CONFIG_MAPPING:
        return no_plugin(model_type, " (nor does this version of transformers know it)")
    return UserError(f"cannot read the config of model {source.spec!r}: {one_line(error)}")


def auto_class(architecture: Architecture) -> Any:
    import transformers

    return getattr(transformers, architecture.auto_class)


def meta_model(config: Any, architecture: Architecture, trust_remote_code: bool = False) -> nn.Module:
    """The model without weights, on the meta device: shapes and names only."""
    try:
        with torch.device("meta"), no_larger_than(allowed_by(config.name_or_path)):
            model = from_config(auto_class(architecture), config, trust_remote_code)
    except Exception as error:
        raise UserError(f"cannot build a {config.model_type!r} model from its config: {one_line(error)}") from None
    tie = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()
    return model


def count_parameters(model: nn.Module) -> int:
    """All parameters of a model, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def load_tokenizer(source: ModelSource, spec: str | None = None) -> Any:
    """The tokenizer at ``spec``, or the model's own; raises UserError when there is none."""
    from transformers import AutoTokenizer

    check_folder(Path(spec or source.location))
    try:
        if spec is None:
            tokenizer = AutoTokenizer.from_pretrained(source.location, **source.extra)
        else:
            tokenizer = AutoTokenizer.from_pretrained(spec, trust_remote_code=source.trust_remote_code)
    except Exception as error:
        where = spec or source.spec
        raise UserError(f"no tokenizer found at {where!r} ({one_line(error)}); name one with --tokenizer") from None
    # Without its files transformers builds some tokenizers empty instead of failing.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(f"the tokenizer at {spec or source.spec!r} has no vocabulary; name one with --tokenizer")
    return tokenizer


def load_model(source: ModelSource, architecture: Architecture, dtype: torch.dtype | str) -> nn.Module:
    """The dense model on the CPU in eval mode; ``dtype`` may be ``auto``. Raises UserError when it cannot load."""
    try:
        # Its bars for the conversion of GGUF have no switch.
        allowed = allowed_by(source.location)
        with quiet(), contextlib.redirect_stderr(io.StringIO()), no_larger_than(allowed):
            model: Any
            model, notes = auto_class(architecture).from_pretrained(
                source.location,
                dtype=dtype,
                use_safetensors=source.gguf_file is None or None,
                output_loading_info=True,
                **source.extra,
            )
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"cannot load model {source.spec!r}: {one_line(error)}") from None
    check_complete(source, architecture, model, notes["missing_keys"], notes["unexpected_keys"])
    if source.gguf_file is not None:
        detach_quantizer(model)
        forget_header()
    model.eval().requires_grad_(False)
    architecture.adapt(model)
    return model


def check_finite(model: nn.Module, path: str = "") -> None:
    """Raise UserError that names the first map, or other module, whose weight holds NaN or infinity.

    ``path`` is that of ``model`` in a larger one. Weights that are elsewhere, on the meta device, are passed over.
    """
    for name, parameter in model.named_parameters(path):
        if not parameter.is_meta and not torch.isfinite(parameter).all():
            module, _, kind = name.rpartition(".")
            raise UserError(f"the {kind} of {module} holds NaN or infinite values")


def check_dtype(name: str | None, model_dtype: torch.dtype, from_gguf: bool) -> torch.dtype:
    """The dtype of the output: as asked, else the input's; float16 for GGUF, whose own types are not kept."""
    if name is not None:
        return DTYPES[name]
    if from_gguf:
        return torch.float16
    if model_dtype not in DTYPES.values():
        raise UserError(f"the model's dtype {model_dtype} is not one that lillama writes; choose with --dtype")
    return model_dtype
