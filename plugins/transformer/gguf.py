"""``gguf``: a dense file for llama.cpp, of models of the family Llama.

llama.cpp reads tensors under fixed names, dense. It rotates neighbouring numbers of a head, where transformers rotates
its halves: the rows of q and k are interleaved, head by head. Matrices are written
in the model's dtype, vectors in fp32, as llama.cpp wants them; its own tools quantise the file. Layout:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lillama_core.exporting import (
    PLAIN_CHECK,
    Agreement,
    CompressedModel,
    Exporter,
    ExportJob,
    allowed,
    run_without_lillama,
    write_probe,
)

FILE = "model.gguf"
FAMILY = "llama"
"""`model_type` of transformers, which is llama.cpp's name of the architecture too."""
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Types of tokens."""
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
SPLITS = {_WORDS + r"|\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"|\p{N}" + _REST: "qwen2"}
"""The expression by which a tokenizer splits text before it merges -> llama.cpp's name for it."""


class GgufExporter(Exporter):
    """A dense GGUF file for llama.cpp, with the tokenizer in it."""

    name = "gguf"

    def cannot_hold(self, model: CompressedModel) -> str | None:
        config = model.config
        if config.model_type != FAMILY:
            return f"its model type is {config.model_type!r}, and {FAMILY!r} is the only one that is written"
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type", "default") != "default":
            return f"its positions are scaled ({rope['rope_type']!r})"
        return why_no_tokenizer(model.folder)

    def write(self, model: CompressedModel, job: ExportJob) -> None:
        import gguf

        dtype = job.dtype or model.dtype
        writer = gguf.GGUFWriter(job.folder / FILE, FAMILY)
        write_settings(writer, model.config, dtype)
        write_tokenizer(writer, model)
        names = Names(model)
        kinds = gguf.GGMLQuantizationType
        matrices = {torch.float32: kinds.F32, torch.float16: kinds.F16, torch.bfloat16: kinds.BF16}[dtype]
        for name, shape in names.expected():
            raw = matrices if len(shape) > 1 else kinds.F32
            # Four bytes or two: the shape counts numbers, where numpy has no such type.
            size = (4 if raw is kinds.F32 else 2) * torch.Size(shape).numel()
            writer.add_tensor_info(names.there(name), shape, _numpy_type(raw), size, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        # In the order in which they were announced, one block in memory at a time.
        waiting = names.expected()
        job.progress.phase("Multiplying the factors out", len(model.reader.paths) + 1)
        for part in model.dense_parts(dtype):
            for name in sorted(set(part) & names.wanted):
                announced, _ = next(waiting)
                assert announced == name
                writer.write_tensor_data(_bytes(names.arranged(name, part[name]), dtype))
            job.progress.step()
        writer.close()

    def verify(self, model: CompressedModel, job: ExportJob) -> list[Agreement]:
        inputs = model.inputs()
        probe = write_probe(job.scratch / "probe.safetensors", inputs, {"logits": model.output(inputs)})
        auto_class = model.architecture.auto_class
        found = run_without_lillama(PLAIN_CHECK, job.scratch, job.folder, probe, auto_class, "--gguf", FILE)
        return [Agreement("logits", found["logits"], allowed(model, job.dtype or model.dtype))]

    def usage(self, model: CompressedModel) -> str:
        return (
            f"`{FILE}` is dense: the low-rank factors are multiplied out, since llama.cpp reads dense matrices, and the"
            " file has the size of the original model's. Quantise it with `llama-quantize`. It was checked by"
            " transformers' own reader of GGUF; llama.cpp itself was not run.\n\n"
            f"```sh\nllama-cli -m {FILE} -p 'Once upon a time'\n```\n"
        )


def write_settings(writer: Any, config: Any, dtype: torch.dtype) -> None:
    """Write what llama.cpp has to know of the sizes."""
    import gguf

    types = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_type("model")
    writer.add_file_type(getattr(gguf.LlamaFileType, types[dtype]))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


class Names:
    """The tensors of the dense model by their names there and here, in the order in which they are written."""

    def __init__(self, model: CompressedModel) -> None:
        import gguf

        config = self.config = model.config
        self._map = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
        self._blocks = model.reader.paths
        shapes = {name: tuple(tensor.shape) for name, tensor in model.dense_outline().state_dict().items()}
        if config.tie_word_embeddings:
            # The reader takes the table of the input where there is none for the output.
            shapes.pop("lm_head.weight", None)
        self._shapes = shapes
        self.wanted = set(shapes)

    def there(self, name: str) -> str:
        """llama.cpp's name of a tensor."""
        found: str | None = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise KeyError(f"llama.cpp has no name for {name}")
        return found

    def expected(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape, first of what is in no block, then block by block."""

        def home(name: str) -> int:
            return next((i for i, path in enumerate(self._blocks) if name.startswith(f"{path}.")), -1)

        for name in sorted(self._shapes, key=lambda name: (home(name), name)):
            yield name, self._shapes[name]

    def arranged(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as llama.cpp wants it: rows of q and k are (first half, second half) of a head, in turns."""
        if ".q_proj." not in name and ".k_proj." not in name:
            return tensor
        heads = self.config.num_attention_heads if ".q_proj." in name else self.config.num_key_value_heads
        return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def _numpy_type(raw: Any) -> Any:
    import numpy as np

    return np.dtype(np.float32 if raw.name == "F32" else np.float16)


def _bytes(tensor: torch.Tensor, dtype: torch.dtype) -> Any:
    tensor = tensor.to(dtype if tensor.dim() > 1 else torch.float32).contiguous()
    # numpy knows no bfloat16: the bytes are the same.
    return tensor.view(torch.int16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


# Tokenizer


def _tokenizer(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return found


def why_no_tokenizer(folder: Path) -> str | None:
    """Return why the tokenizer in ``folder`` cannot be written; None when it can."""
    try:
        found = _tokenizer(folder)
        if found["model"]["type"] != "BPE" or found["model"].get("byte_fallback"):
            return "its tokenizer is no byte-level BPE"
        if found.get("normalizer") not in (None, {"type": "NFC"}) or split_name(found) is None:
            return "its tokenizer splits text in a way that llama.cpp has no name for, as far as is known here"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "its tokenizer.json is missing or broken"
    return None


def split_name(tokenizer: dict[str, Any]) -> str | None:
    """llama.cpp's name for how a tokenizer.json splits text before merging; None where it is not known."""
    before = tokenizer["pre_tokenizer"]
    steps = before["pretokenizers"] if before["type"] == "Sequence" else [before]
    *first, last = steps
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if not first and last.get("use_regex", True):
        return "gpt-2"
    if len(first) != 1:
        return None
    if first[0]["type"] == "Digits" and first[0]["individual_digits"] and last.get("use_regex", True):
        return "smollm"
    if first[0]["type"] == "Split" and not last.get("use_regex", True):
        return SPLITS.get(first[0]["pattern"].get("Regex"))
    return None


def write_tokenizer(writer: Any, model: CompressedModel) -> None:
    """Write vocabulary, merges, special tokens and chat template."""
    from transformers import AutoTokenizer

    found = _tokenizer(model.folder)
    tokens = {index: token for token, index in found["model"]["vocab"].items()}
    types = dict.fromkeys(tokens, NORMAL)
    for entry in found["added_tokens"]:
        tokens[entry["id"]] = entry["content"]
        types[entry["id"]] = CONTROL if entry["special"] else USER_DEFINED
    # As many as the table has rows: more than the tokenizer knows, for some models.
    size = model.config.vocab_size
    merges = [m if isinstance(m, str) else " ".join(m) for m in found["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split_name(found))
    writer.add_token_list([tokens.get(i, f"[PAD{i}]") for i in range(size)])
    writer.add_token_types([types.get(i, UNUSED) for i in range(size)])
    writer.add_token_merges(merges)
    tokenizer = AutoTokenizer.from_pretrained(model.folder, trust_remote_code=model.source.trust_remote_code)
    for add, index in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if index is not None:
            add(index)
    writer.add_add_bos_token(
        tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    )
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
