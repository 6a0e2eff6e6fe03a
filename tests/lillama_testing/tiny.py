"""Tiny models of any type, seeded, with all that it takes to compress them: made from the defaults of their config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lillama_core.architecture.base import Architecture
from lillama_core.architecture.find import find_architecture
from lillama_core.data.modality import modality_of
from lillama_core.data.shipped import OFFLINE_TEXT
from lillama_core.errors import UserError, one_line
from lillama_core.models.loading import auto_class, count_parameters, load_config, load_model, meta_model
from lillama_core.models.outputs import main_output
from lillama_core.models.source import locate
from lillama_core.recipe.model import Recipe

WIDTH, HEADS, LAYERS = 32, 4, 2
VOCABULARY = 384
SOUND_SECONDS = 10
"""Length of what a tiny speech model hears, instead of 30 s."""
START, END = 0, 1
"""Tokens at the beginning and the end of a text."""

SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff"), 2 * WIDTH),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    "num_key_value_heads": HEADS // 2,
    **dict.fromkeys(("head_dim", "d_kv"), WIDTH // HEADS),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    "state_size": 4,
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 128),
    # Shorter than the rows, so that it matters.
    "sliding_window": 8,
    "vocab_size": VOCABULARY,
    "bos_token_id": START,
    "eos_token_id": END,
    "pad_token_id": END,
}
"""What the configs of transformers call their dimensions, and how small they are to be."""

MOST_PARAMETERS = 20_000_000
"""Of a model that is still tiny: it is compressed within seconds."""

QUICK: dict[str, Any] = {
    "tokens": 1024, "sequence_length": 32, "samples": 8, "batch_size": 4, "sensitivity_tokens": 128,
    "rescaling_tokens": 128, "steps": 2, "self_share": 0.0, "compute": "float32",
}  # fmt: skip
"""Options of a recipe with which a tiny model is compressed within seconds."""


@dataclass(frozen=True)
class TinyModel:
    """A model on disk that an architecture is tried on."""

    architecture: Architecture
    model_type: str
    folder: Path
    """Weights, config, tokenizer or processor."""
    calibration: tuple[str, ...]
    """Sources of calibration data, as ``--calibration`` takes them."""

    def load(self) -> Any:
        """The model anew, in fp32 and eval mode, with all its dropout set to 0."""
        model: Any = load_model(locate(str(self.folder)), self.architecture, torch.float32)
        without_dropout(model)
        return model

    def recipe(self, **options: Any) -> Recipe:
        """A recipe that is quick and takes this specimen's data."""
        stacks = tuple(self.architecture.stacks)
        return Recipe(calibration=self.calibration, stacks=stacks, **{**QUICK, **options})


def specimen_at(folder: Path, architecture: str | None, calibration: tuple[str, ...]) -> TinyModel:
    """A model of the user's as a specimen.

    Raises UserError when it is none, when no architecture claims it, and when it lacks a tokenizer or the data is none.
    """
    source = locate(str(folder))
    config = load_config(source)
    found = find_architecture(config, architecture)
    tiny = TinyModel(found, str(config.model_type), folder, calibration or _materials(found).calibration)
    try:
        modality_of(found).check(tiny.recipe())
        modality_of(found).load_processor(source, None)
        model = tiny.load()
    except UserError:
        raise
    except Exception:  # what the architecture makes of a loaded model may raise anything: each check says it
        return tiny
    check_runs(model, found)
    return tiny


def make_tiny_model(architecture: Architecture, model_type: str, folder: Path) -> TinyModel:
    """Write a tiny model of ``model_type`` with random weights, the same at every call, into ``folder``.

    Its dimensions are those of SIZES that its config knows, under ``architecture.tiny_config``. Raises UserError when
    no model can be made of them, or when the kit has no data for the architecture's modality.
    """
    materials = _materials(architecture)
    folder.mkdir(parents=True, exist_ok=True)
    changes = materials.write(folder)
    try:
        model = _tiny_model(architecture, model_type, changes)
        check_runs(model, architecture)
    except Exception as error:
        raise UserError(
            f"no tiny {model_type!r} can be made ({one_line(error)}); say the sizes that it needs"
            f" in tiny_config of architecture {architecture.name!r}"
        ) from error
    model.save_pretrained(folder)
    return TinyModel(architecture, model_type, folder, materials.calibration)


def check_runs(model: Any, architecture: Architecture) -> None:
    """Raise UserError when a dense model cannot be run: no check could say anything of its architecture then."""
    modality = modality_of(architecture)
    architecture.adapt(model)
    try:
        with torch.no_grad():
            output = main_output(model.eval()(**modality.dummy_inputs(model.config)))
        wrong = None if output.isfinite().all() else "its outputs are infinite or not a number"
    except Exception as error:  # whatever the model's own code raises
        wrong = one_line(error)
    if wrong is not None:
        raise UserError(
            f"the dense {model.config.model_type!r} model cannot be run on made-up input of the modality"
            f" {modality.name!r} ({wrong})"
        )


def tiny_sizes(default: Any) -> dict[str, Any]:
    """The dimensions of SIZES that the config ``default`` knows, and those of the configs in it."""
    found: dict[str, Any] = {n: SIZES[n] for n in SIZES if _is_setting(default, n)}
    for name in default.sub_configs:
        inner = getattr(default, name, None)
        if inner is not None:
            found[name] = {"model_type": inner.model_type, **tiny_sizes(inner)}
    return found


def _is_setting(config: Any, name: str) -> bool:
    """Whether ``name`` is a setting of ``config`` by itself: no alias of one, nothing computed, one for all layers."""
    if name in config.attribute_map or isinstance(getattr(type(config), name, None), property):
        return False
    try:
        return hasattr(config, name)
    except Exception:  # what is not the same in all layers is refused by an error of transformers' own
        return False


def merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``settings`` under ``changes``, those within a config of its own one by one."""
    nested = {
        name: merged(settings[name], change)
        for name, change in changes.items()
        if isinstance(change, Mapping) and isinstance(settings.get(name), Mapping)
    }
    return {**settings, **changes, **nested}


def _tiny_model(architecture: Architecture, model_type: str, changes: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    generation = changes.pop("generation", {})
    if default.is_encoder_decoder:
        # Not a setting that every such config knows by itself.
        changes = {"decoder_start_token_id": START, **changes}
    config = config_class(**merged(tiny_sizes(default) | changes, architecture.tiny_config))
    size = count_parameters(meta_model(config, architecture))
    if size > MOST_PARAMETERS:
        raise UserError(f"it would have {size:,} parameters")
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    try:
        model = auto_class(architecture).from_config(config, dtype=torch.float32)
        with torch.no_grad():
            # A bias of zero, or a norm's weight of one, would hide that it is forgotten.
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    finally:
        torch.set_rng_state(generator_state)
    if generation:
        # What came from the model's config is made from it again when the model is loaded.
        model.generation_config._from_model_config = False
    for name, value in generation.items():
        setattr(model.generation_config, name, value)
    return model


CHANCES = ("drop", "mask_time_prob", "mask_feature_prob")
"""Parts of the names of settings that say how much is left out at random: of values, of layers, of a spectrogram."""


def without_dropout(model: nn.Module) -> None:
    """Set every probability of dropout in ``model`` to 0, so that training mode is a function of its input.

    Some are read from the config each time: those of leaving out whole layers, or parts of a spectrogram.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        config = getattr(module, "config", None)
        for owner in (module, config) if config is not None else (module,):
            for name, value in list(vars(owner).items()):
                if any(part in name for part in CHANCES) and isinstance(value, float):
                    setattr(owner, name, 0.0)


@dataclass(frozen=True)
class Materials:
    """What models of one modality need besides their weights."""

    write: Callable[[Path], dict[str, Any]]
    """Writes tokenizer or processor into a folder; gives the settings of the config that follow from it."""
    calibration: tuple[str, ...]


def _materials(architecture: Architecture) -> Materials:
    name = modality_of(architecture).name
    if name not in MATERIALS:
        raise UserError(
            f"the kit has no data for the modality {name!r} of architecture {architecture.name!r};"
            " give a model and its data with --model and --calibration"
        )
    return MATERIALS[name]


def byte_level_tokenizer(text: str, tokens: int, **special: str) -> Any:
    """Return a byte-level BPE tokenizer of ``tokens`` tokens, trained on ``text``.

    ``special`` are its special tokens by the argument that transformers has for them (``eos_token="</s>"``), the
    first with id 0. None of them is added to a text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=tokens,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def _write_tokenizer(folder: Path) -> dict[str, Any]:
    text = OFFLINE_TEXT.read_text(encoding="utf-8")[:20_000]
    byte_level_tokenizer(text, VOCABULARY, bos_token="<s>", eos_token="</s>").save_pretrained(str(folder))
    return {}


def _write_speech_processor(folder: Path) -> dict[str, Any]:
    """Whisper's processor with a vocabulary of single bytes and the special tokens, the end of a text the first."""
    from tokenizers import pre_tokenizers
    from transformers import WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer

    special = ["<|endoftext|>", "<|startoftranscript|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*letters, special[0]])}
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"extra_special_tokens": special})
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=SOUND_SECONDS)
    WhisperProcessor(extractor, tokenizer).save_pretrained(str(folder))
    end, start, _, _, silent = tokenizer.convert_tokens_to_ids(special)
    ends = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": start}
    return {
        **ends,
        "vocab_size": len(tokenizer),
        # An encoder's position is 20 ms long.
        "max_source_positions": 50 * SOUND_SECONDS,
        "suppress_tokens": [],
        "begin_suppress_tokens": [],
        "generation": {
            **ends,
            "no_timestamps_token_id": silent,
            "is_multilingual": False,
            "suppress_tokens": [],
            "begin_suppress_tokens": [],
            "return_timestamps": False,
            "max_initial_timestamp_index": 50,
            "max_length": 448,
        },
    }


MATERIALS = {
    "text": Materials(_write_tokenizer, (str(OFFLINE_TEXT),)),
    "speech": Materials(
        _write_speech_processor, (str(OFFLINE_TEXT.parent / "speech" / "synthetic" / "manifest.jsonl"),)
    ),
}
"""By the name of the modality."""
