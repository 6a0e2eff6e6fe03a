"""CTranslate2 (faster-whisper) directories as transformers checkpoints: the same numbers under other names.

CTranslate2 stacks the projections that read one tensor (q, k, v; in cross-attention k, v); transformers keeps them
apart, and keeps no bias for k. Leaving it out changes nothing even where it is not zero: it adds the same number to
all scores of a query, which softmax ignores.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lillama_core.errors import UserError, one_line

from .model_file import ModelFile, read_model_file

if TYPE_CHECKING:
    # Loading transformers takes seconds; finding the plugins must not.
    from transformers import GenerationConfig, WhisperConfig, WhisperProcessor

SPECIFICATION = "WhisperSpec"
NORMALIZER = Path(__file__).parent / "data" / "normalizer.json"
GELU = 3
"""CTranslate2's number of the only activation that Whisper has."""
SETTINGS = {"activation": GELU, "pre_norm": 1}
"""What these scalars must be; ``num_heads`` and the alignment (for time stamps of words) are free, all others 0."""


@dataclass(frozen=True)
class Converted:
    """A Whisper checkpoint in transformers' terms."""

    config: WhisperConfig
    generation_config: GenerationConfig
    state: dict[str, Tensor]
    """By the names of WhisperForConditionalGeneration, tied embedding once, in the file's own type."""
    processor: WhisperProcessor


class CTranslate2Checkpoint:
    """Reads directories as ``ct2-transformers-converter`` writes them; of their kinds, Whisper."""

    name = "ctranslate2"
    version = 1

    def accepts(self, folder: Path) -> bool:
        """Whether there is a model.bin, of whatever kind of model, and nothing that transformers would load."""
        return (folder / "model.bin").is_file() and not any(folder.glob("*.safetensors"))

    def convert(self, folder: Path, target: Path) -> None:
        """Write the model and its processor to ``target``; raises UserError as :func:`convert` does."""
        save(convert(folder), target)


def convert(directory: Path) -> Converted:
    """The Whisper model in a CTranslate2 ``directory`` (model.bin, config.json, vocabulary, tokenizer.json).

    Raises UserError, naming the file, for another kind of model, integer weights, a truncated or damaged file, a
    missing one, or a tensor that has no place in transformers' Whisper.
    """
    path = directory / "model.bin"
    config, state = convert_weights(path, read_model_file(path, SPECIFICATION))
    processor = _processor(directory, config)
    generation_config = _generation_config(directory, config, processor)
    return Converted(config, generation_config, state, processor)


def save(converted: Converted, folder: Path) -> None:
    """Write ``converted`` as a complete transformers checkpoint (safetensors) into ``folder``."""
    model = build(converted)
    model.save_pretrained(str(folder))
    save_processor(converted.processor, folder)


def build(converted: Converted) -> Any:
    """The transformers model that holds the converted weights."""
    from transformers import WhisperForConditionalGeneration

    with torch.device("meta"):
        model = WhisperForConditionalGeneration(converted.config)
    missing, unexpected = model.load_state_dict(converted.state, strict=False, assign=True)
    # The head is tied to the embedding.
    if set(missing) - {"proj_out.weight"} or unexpected:
        raise AssertionError(f"the conversion is incomplete: {missing}, {unexpected}")
    model.tie_weights()
    model.generation_config = converted.generation_config
    return model.eval()


def save_processor(processor: Any, folder: Path) -> None:
    """All files of a Whisper processor: its own ``save_pretrained`` leaves out some that loading it wants."""
    processor.save_pretrained(str(folder))
    processor.feature_extractor.save_pretrained(str(folder))
    processor.tokenizer.save_vocabulary(str(folder))


def convert_weights(path: Path, found: ModelFile) -> tuple[WhisperConfig, dict[str, Tensor]]:
    """Configuration (without token ids) and weights; ``path`` is named in errors.

    Raises UserError as :func:`convert`.
    """
    from transformers import WhisperConfig

    source = _Variables(path, found)
    vocabulary, width = source.shape("decoder/embeddings/weight", 2)
    _, mels, _ = source.shape("encoder/conv1/weight", 3)
    layers = {side: source.layers(side) for side in ("encoder", "decoder")}
    inner = {side: source.shape(f"{side}/layer_0/ffn/linear_0/weight", 2)[0] for side in layers}
    positions = {side: source.shape(f"{side}/position_encodings/encodings", 2)[0] for side in layers}
    heads = {side: source.scalar(f"{side}/num_heads") for side in layers}
    for side, count in heads.items():
        if count < 1 or width % count:
            raise UserError(f"{path} is damaged: {side}/num_heads is {count} for a width of {width}")
    source.check_settings()

    state: dict[str, Tensor] = {
        "model.decoder.embed_tokens.weight": source.take("decoder/embeddings/weight", vocabulary, width),
        "model.encoder.conv1.weight": source.take("encoder/conv1/weight", width, mels, 3),
        "model.encoder.conv1.bias": source.take("encoder/conv1/bias", width),
        "model.encoder.conv2.weight": source.take("encoder/conv2/weight", width, width, 3),
        "model.encoder.conv2.bias": source.take("encoder/conv2/bias", width),
    }
    for side in layers:
        state[f"model.{side}.embed_positions.weight"] = source.take(
            f"{side}/position_encodings/encodings", positions[side], width
        )
        state |= source.norm(f"{side}/layer_norm", f"model.{side}.layer_norm", width)
        for index in range(layers[side]):
            there, here = f"{side}/layer_{index}", f"model.{side}.layers.{index}"
            state |= source.stacked(
                f"{there}/self_attention/linear_0", [f"{here}.self_attn.{x}_proj" for x in "qkv"], width
            )
            state |= source.linear(f"{there}/self_attention/linear_1", f"{here}.self_attn.out_proj", width, width)
            state |= source.norm(f"{there}/self_attention/layer_norm", f"{here}.self_attn_layer_norm", width)
            if side == "decoder":
                state |= source.linear(f"{there}/attention/linear_0", f"{here}.encoder_attn.q_proj", width, width)
                state |= source.stacked(
                    f"{there}/attention/linear_1", [f"{here}.encoder_attn.{x}_proj" for x in "kv"], width
                )
                state |= source.linear(f"{there}/attention/linear_2", f"{here}.encoder_attn.out_proj", width, width)
                state |= source.norm(f"{there}/attention/layer_norm", f"{here}.encoder_attn_layer_norm", width)
            state |= source.linear(f"{there}/ffn/linear_0", f"{here}.fc1", inner[side], width)
            state |= source.linear(f"{there}/ffn/linear_1", f"{here}.fc2", width, inner[side])
            state |= source.norm(f"{there}/ffn/layer_norm", f"{here}.final_layer_norm", width)
    source.check_all_used()
    config = WhisperConfig(
        vocab_size=vocabulary,
        num_mel_bins=mels,
        d_model=width,
        encoder_layers=layers["encoder"],
        decoder_layers=layers["decoder"],
        encoder_attention_heads=heads["encoder"],
        decoder_attention_heads=heads["decoder"],
        encoder_ffn_dim=inner["encoder"],
        decoder_ffn_dim=inner["decoder"],
        max_source_positions=positions["encoder"],
        max_target_positions=positions["decoder"],
        dtype=state["model.decoder.embed_tokens.weight"].dtype,
        architectures=["WhisperForConditionalGeneration"],
    )
    return config, state


class _Variables:
    """A file's tensors, each to be taken once, with the shape that it must have."""

    def __init__(self, path: Path, found: ModelFile) -> None:
        self._path = path
        self._tensors = {name: tensor for name, tensor in found.variables.items() if tensor.dim()}
        self._scalars: dict[str, int] = {}
        for name, tensor in found.variables.items():
            if tensor.dim():
                continue
            # Also false of what is not a number or infinite.
            if not float(tensor.item()).is_integer():
                raise UserError(f"{path} is damaged: {name} is {tensor.item()}, not a whole number")
            self._scalars[name] = int(tensor)
        for name, tensor in self._tensors.items():
            if not tensor.is_floating_point():
                kind = str(tensor.dtype).removeprefix("torch.")
                raise UserError(
                    f"{path} holds integer weights ({name}: {kind}); float32, float16 and bfloat16 are supported: "
                    "convert the original model with --quantization float16"
                )
        if any(alias != "decoder/projection/weight" for alias in found.aliases):
            raise UserError(f"{path} shares tensors that Whisper does not share: {', '.join(found.aliases)}")

    def _find(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise UserError(f"{self._path} is damaged or of an unknown layout: it has no tensor {name}")
        return self._tensors[name]

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        """The shape of a tensor that has ``rank`` dimensions, none of them 0."""
        shape = tuple(self._find(name).shape)
        if len(shape) != rank or 0 in shape:
            raise UserError(f"{self._path} is damaged: {name} has the shape {list(shape)}")
        return shape

    def scalar(self, name: str) -> int:
        if name not in self._scalars:
            raise UserError(f"{self._path} is damaged or of an unknown layout: it has no number {name}")
        return self._scalars[name]

    def layers(self, side: str) -> int:
        """The number of layers that follow each other from 0 on."""
        count = 0
        while f"{side}/layer_{count}/self_attention/linear_0/weight" in self._tensors:
            count += 1
        return count

    def take(self, name: str, *shape: int) -> Tensor:
        tensor = self._find(name)
        if tuple(tensor.shape) != shape:
            raise UserError(
                f"{self._path} is damaged: {name} has the shape {list(tensor.shape)}, "
                f"which the others contradict (they say {list(shape)})"
            )
        return self._tensors.pop(name)

    def linear(self, there: str, here: str, rows: int, columns: int) -> dict[str, Tensor]:
        return {
            f"{here}.weight": self.take(f"{there}/weight", rows, columns),
            f"{here}.bias": self.take(f"{there}/bias", rows),
        }

    def stacked(self, there: str, here: Sequence[str], width: int) -> dict[str, Tensor]:
        """Projections of ``width`` outputs each, one above the other in the file."""
        both = self.linear(there, "both", len(here) * width, width)
        state = {}
        for name, weight, bias in zip(
            here, both["both.weight"].split(width), both["both.bias"].split(width), strict=True
        ):
            state[f"{name}.weight"] = weight.clone()
            if not name.endswith(".k_proj"):
                state[f"{name}.bias"] = bias.clone()
        return state

    def norm(self, there: str, here: str, width: int) -> dict[str, Tensor]:
        return {
            f"{here}.weight": self.take(f"{there}/gamma", width),
            f"{here}.bias": self.take(f"{there}/beta", width),
        }

    def check_settings(self) -> None:
        """Raise UserError for a setting that transformers' Whisper cannot express."""
        for name, value in self._scalars.items():
            setting = name.rsplit("/", 1)[-1]
            if setting.startswith("alignment") or setting == "num_heads":
                continue
            if value != SETTINGS.get(setting, 0):
                raise UserError(f"{self._path}: {name} is {value}, which transformers' Whisper does not know")

    def check_all_used(self) -> None:
        if self._tensors:
            raise UserError(
                f"{self._path} holds {len(self._tensors)} tensors that transformers' Whisper has no place for, "
                f"such as {min(self._tensors)}"
            )


def _read_json(path: Path, what: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; {what}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}; {what}") from error


def _vocabulary(directory: Path) -> list[str] | None:
    """The model's tokens by id; None when the directory has no list of them."""
    path = directory / "vocabulary.json"
    if path.is_file():
        found = _read_json(path, "it lists the model's tokens")
        if not isinstance(found, list) or not all(isinstance(token, str) for token in found):
            raise UserError(f"{path} is damaged: it is not a list of tokens")
        return found
    path = directory / "vocabulary.txt"
    if path.is_file():
        try:
            # Not splitlines: some tokens are line ends of Unicode's.
            return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {one_line(error)}; it lists the model's tokens") from error
    return None


def _processor(directory: Path, config: WhisperConfig) -> WhisperProcessor:
    """Tokenizer and feature extractor with all that transformers keeps beside a model."""
    from transformers import WhisperProcessor

    return WhisperProcessor(_feature_extractor(directory, config), _tokenizer(directory, config))


def _tokenizer(directory: Path, config: WhisperConfig) -> Any:
    """The tokenizer with all tokens of the model; UserError when they are more than it has, or others."""
    from transformers import AddedToken, WhisperTokenizer

    path = directory / "tokenizer.json"
    found = _read_json(path, "a CTranslate2 Whisper directory needs its tokenizer to be converted")
    try:
        vocabulary = dict(found["model"]["vocab"])
        merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in found["model"]["merges"]]
        added = [AddedToken(t["content"], special=t["special"], normalized=False) for t in found["added_tokens"]]
        tokenizer = WhisperTokenizer(vocab=vocabulary, merges=merges, normalizer_file=str(NORMALIZER))
        special = [token for token in added if token.special]
        tokenizer.add_special_tokens({"extra_special_tokens": special})
        tokenizer.add_tokens([token for token in added if not token.special])
    except Exception as error:  # the tokenizers library has no class of its own for what it refuses
        raise UserError(f"{path} is not the tokenizer of a Whisper model: {one_line(error)}") from error
    tokens = _vocabulary(directory)
    if tokens is not None:
        try:
            # faster-whisper's tokenizer.json leaves out the time stamps at the end.
            tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in tokens[len(tokenizer) :]])
        except ValueError as error:  # half of a character
            raise UserError(f"the vocabulary beside {path} is damaged: {one_line(error)}") from error
        known = tokenizer.get_vocab()
        for index, token in enumerate(tokens):
            if known.get(token) != index:
                raise UserError(f"{path} and the vocabulary beside it differ: token {index} is {token!r} only in one")
    # Ids may have gaps.
    count = max(len(tokenizer), max(tokenizer.get_vocab().values(), default=0) + 1)
    if count > config.vocab_size:
        raise UserError(f"{path} has {count} tokens, the model {config.vocab_size}; they do not belong together")
    return tokenizer


def _feature_extractor(directory: Path, config: WhisperConfig) -> Any:
    """What computes the mel bands, as the directory says or as all Whispers have it."""
    from transformers import WhisperFeatureExtractor

    path = directory / "preprocessor_config.json"
    if not path.is_file():
        return WhisperFeatureExtractor(feature_size=config.num_mel_bins)
    found = _read_json(path, "it says how sound becomes mel bands")
    bands = found.get("feature_size") if isinstance(found, dict) else None
    # Before a table of so many bands is made.
    if isinstance(bands, int) and bands != config.num_mel_bins:
        raise UserError(
            f"{path} computes {bands} mel bands, the model reads {config.num_mel_bins}; they do not belong together"
        )
    try:
        return WhisperFeatureExtractor.from_dict({"feature_size": config.num_mel_bins, **found})
    except Exception as error:  # whatever its computation of the filters meets
        raise UserError(f"{path} is not that of a Whisper model: {one_line(error)}") from error


def _generation_config(directory: Path, config: WhisperConfig, processor: WhisperProcessor) -> GenerationConfig:
    """How to transcribe; the special tokens' ids go into ``config`` as well."""
    from transformers import GenerationConfig

    found = _read_json(directory / "config.json", "it says which tokens the decoder never writes")
    tokenizer = processor.tokenizer
    known = tokenizer.get_vocab()
    # One language and its task more than English alone has (openai/whisper, tokenizer.py).
    multilingual = config.vocab_size >= 51865
    settings: dict[str, Any] = {}
    try:
        end, start, silent = (known[t] for t in ("<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"))
        suppressed, at_start = (
            [int(i) for i in found.get(key) or []] for key in ("suppress_ids", "suppress_ids_begin")
        )
        # The converter writes null for what the model's settings leave out.
        if not {"suppress_ids", "suppress_ids_begin", "alignment_heads", "lang_ids"} & set(found):
            raise KeyError("suppress_ids")
        heads = [[int(layer), int(head)] for layer, head in found.get("alignment_heads") or []]
        if any(abs(i) >= 2**31 for i in (*suppressed, *at_start)):
            raise ValueError("a token's number in suppress_ids")
        if multilingual:
            tokens = {index: token for token, index in known.items()}
            settings["lang_to_id"] = {tokens[i]: i for i in found.get("lang_ids", []) if i in tokens}
            settings["task_to_id"] = {task: known[f"<|{task}|>"] for task in ("transcribe", "translate")}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{directory}: config.json or tokenizer.json is not of a Whisper model "
            f"({one_line(error)} is missing or wrong)"
        ) from error
    config.bos_token_id = config.eos_token_id = config.pad_token_id = end
    config.decoder_start_token_id = start
    return GenerationConfig(
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=start,
        no_timestamps_token_id=silent,
        prev_sot_token_id=known.get("<|startofprev|>"),
        suppress_tokens=suppressed or None,
        begin_suppress_tokens=at_start or None,
        alignment_heads=heads,
        is_multilingual=multilingual,
        max_length=config.max_target_positions,
        max_initial_timestamp_index=50,
        return_timestamps=False,
        **settings,
    )
