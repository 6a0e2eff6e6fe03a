"""Checkpoints of mamba-ssm (``state-spaces/mamba-*``): a config.json of its own and ``pytorch_model.bin``.

The modules are those of transformers' Mamba, under the same names except for the embedding. The names of the options
are those of mamba-ssm 2.2: ``mamba_ssm/models/config_mamba.py`` and the arguments of ``modules/mamba_simple.py``.
"""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lillama_core.errors import UserError, is_out_of_memory, one_line
from lillama_core.models.sizes import Allowed, check_numbers, no_larger_than

CONFIG, WEIGHTS = "config.json", "pytorch_model.bin"

MODEL_OPTIONS = {
    *("d_model", "n_layer", "vocab_size", "ssm_cfg", "pad_vocab_size_multiple", "tie_embeddings", "residual_in_fp32"),
    *("rms_norm", "d_intermediate", "attn_layer_idx", "attn_cfg", "fused_add_norm"),
}
MIXER_OPTIONS = {
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "dt_rank": "time_step_rank",
    "conv_bias": "use_conv_bias",
    "bias": "use_bias",
}
"""Options of mamba-ssm's mixer that say what it computes, and transformers' names for them."""
WITHOUT_EFFECT = {"layer", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "use_fast_path"}
"""Options that concern the initial weights or the kernel; ``layer`` is checked apart."""


class MambaSsmCheckpoint:
    """Reads a directory as mamba-ssm's ``save_pretrained`` writes it. It holds no tokenizer."""

    name = "mamba-ssm"
    version = 1

    def accepts(self, folder: Path) -> bool:
        """Whether config.json is one of mamba-ssm's: it names ``d_model`` and ``n_layer``, and no model type."""
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(config, dict) and {"d_model", "n_layer"} <= set(config) and "model_type" not in config

    def convert(self, folder: Path, target: Path) -> None:
        """Write the model to ``target`` as transformers does, with the numbers and dtypes of the checkpoint.

        Raises UserError, before anything is written, for options that transformers' Mamba does not have and for
        weights that are missing, unknown, of another shape or not readable.
        """
        config = read_config(folder / CONFIG)
        state = read_weights(folder / WEIGHTS, config)
        config.dtype = state["backbone.embeddings.weight"].dtype
        config.architectures = ["MambaForCausalLM"]
        target.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(str(target))
        save_file(state, str(target / "model.safetensors"), metadata={"format": "pt"})


def read_config(path: Path) -> Any:
    """The ``MambaConfig`` that a config.json of mamba-ssm describes; raises UserError where there is none."""
    from transformers import MambaConfig

    def unsuitable(why: str) -> UserError:
        return UserError(f"mamba-ssm config {str(path)!r} {why}")

    given = json.loads(path.read_text(encoding="utf-8"))
    # Before a config makes a list of so many layers.
    check_numbers(given, str(path.parent))
    mixer = given.get("ssm_cfg") or {}
    if not isinstance(mixer, dict):
        raise unsuitable(f"has an ssm_cfg that is not a table: {mixer!r}")
    layer = mixer.get("layer", "Mamba1")
    if layer != "Mamba1":
        raise unsuitable(f"describes a {layer} model; only the first Mamba (Mamba1) is supported")
    unknown = sorted({*given} - MODEL_OPTIONS) + sorted({*mixer} - set(MIXER_OPTIONS) - WITHOUT_EFFECT)
    if unknown:
        raise unsuitable(f"has the option {unknown[0]!r}, which is not one of mamba-ssm 2.2's")
    if given.get("attn_layer_idx"):
        raise unsuitable("describes a hybrid with attention layers; only pure Mamba models are supported")
    if given.get("d_intermediate"):
        raise unsuitable("describes a model with MLP layers (d_intermediate); only pure Mamba models are supported")
    if not given.get("rms_norm", True):
        raise unsuitable("describes a model with LayerNorm (rms_norm: false); only RMSNorm is supported")
    numbers = {"vocab_size": 50277, "pad_vocab_size_multiple": 8, **given}
    for name in ("d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple"):
        value = numbers[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise unsuitable(f"must give a positive whole number as {name}, not {value!r}")
    multiple = numbers["pad_vocab_size_multiple"]
    try:
        return MambaConfig(
            hidden_size=numbers["d_model"],
            num_hidden_layers=numbers["n_layer"],
            vocab_size=-(-numbers["vocab_size"] // multiple) * multiple,
            residual_in_fp32=given.get("residual_in_fp32", True),
            tie_word_embeddings=given.get("tie_embeddings", True),
            **{MIXER_OPTIONS[name]: value for name, value in mixer.items() if name in MIXER_OPTIONS},
        )
    # The config checks the types of its options.
    except Exception as error:
        raise unsuitable(f"is not valid: {one_line(error)}") from None


def read_weights(path: Path, config: Any) -> dict[str, torch.Tensor]:
    """The weights under transformers' names, each checked against the shape that ``config`` asks for.

    A head that is tied to the embedding is left out, as transformers does.
    """

    def unsuitable(why: str) -> UserError:
        return UserError(f"mamba-ssm weights {str(path)!r} {why}")

    if not path.is_file():
        raise UserError(f"mamba-ssm model {str(path.parent)!r} has no {path.name}")
    try:
        # Of a file of another kind torch says more than once that it is odd; the error below says it once.
        with warnings.catch_warnings(action="ignore"):
            # Tensors and plain containers only: no code in the file is run.
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise unsuitable("are damaged or hold more than tensors, which is never loaded") from None
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise unsuitable(f"cannot be read: {one_line(error)}") from None
    if not isinstance(loaded, dict) or not all(isinstance(v, torch.Tensor) for v in loaded.values()):
        raise unsuitable("are not a table of tensors")
    odd = next((k for k, v in loaded.items() if v.is_meta or v.layout != torch.strided), None)
    if odd is not None:
        raise unsuitable(f"hold {odd} as no plain tensor: it is sparse, or has no numbers")
    # A view may repeat a few numbers without end. What the file itself holds may be there twice: a head that is tied.
    if sum(v.numel() * v.element_size() for v in loaded.values()) > 2 * path.stat().st_size:
        raise unsuitable("hold tensors that are larger than the file")
    state = {str(k).replace("backbone.embedding.", "backbone.embeddings."): v for k, v in loaded.items()}
    # Somewhat larger is told with the name of what is missing.
    with no_larger_than(Allowed(8 * len(loaded) + 1000, 10**14)):
        shapes = expected_shapes(config)
    if config.tie_word_embeddings:
        head = state.pop("lm_head.weight", None)
        embedding = state.get("backbone.embeddings.weight")
        if head is not None and embedding is not None and not torch.equal(head, embedding):
            raise unsuitable("have an lm_head that differs from the embedding, to which the config ties it")
    for names, what in ((set(shapes) - set(state), "lack"), (set(state) - set(shapes), "have an unknown tensor")):
        if names:
            more = f" ({len(names)} in all)" if len(names) > 1 else ""
            raise unsuitable(f"{what} {min(names).replace('embeddings', 'embedding')}{more}")
    for name, shape in shapes.items():
        found = state[name]
        if found.shape != shape or not found.is_floating_point():
            what = f"{str(found.dtype).removeprefix('torch.')} {list(found.shape)}"
            raise unsuitable(f"hold {name} as {what} where the config asks for floating-point {list(shape)}")
    del loaded, found
    # Copies, one at a time: safetensors takes no tensors that share their memory.
    return {name: state.pop(name).clone(memory_format=torch.contiguous_format) for name in shapes}


def expected_shapes(config: Any) -> dict[str, torch.Size]:
    """Name -> shape of every weight that transformers' model of ``config`` stores; UserError if there can be none."""
    from transformers import MambaForCausalLM

    try:
        with torch.device("meta"):
            model = MambaForCausalLM(config)
    # No tensor can have such a size, or the mixer's options contradict each other.
    except Exception as error:
        raise UserError(f"mamba-ssm config describes a model that cannot be built: {one_line(error)}") from None
    found = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del found["lm_head.weight"]
    return found
