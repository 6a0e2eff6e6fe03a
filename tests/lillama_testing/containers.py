"""Binary files of models from plain values, so that faults can be put into what they say.

CTranslate2's, GGUF and safetensors. The writers take values of any kind: what does not fit is written as something that
does.
"""

from __future__ import annotations

import json
import math
import struct
from typing import Any

WIDTH, MELS, INNER, SOURCE, TARGET = 2, 4, 3, 6, 5
"""Sizes of the smallest Whisper."""


def whole(value: Any, bits: int) -> int:
    """A number that an unsigned field of ``bits`` bits holds."""
    number = int(value) if isinstance(value, int | float) and math.isfinite(value) else 0
    return number % 2**bits


def items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def raw(text: Any) -> bytes:
    return str(text).encode("utf-8", "surrogatepass")


def model_bin(value: Any) -> bytes:
    """CTranslate2's model.bin; ``[version, specification, [[name, shape, type, bytes]], [[alias, name]]]``."""

    def string(text: Any) -> bytes:
        data = raw(text)[:65000] + b"\0"
        return struct.pack("<H", len(data)) + data

    version, specification, variables, aliases = (*items(value), None, None, None, None)[:4]
    parts = [struct.pack("<I", whole(version, 32)), string(specification), struct.pack("<I", 3)]
    parts.append(struct.pack("<I", len(items(variables))))
    for entry in items(variables):
        name, shape, kind, size = (*items(entry), None, None, None, None)[:4]
        parts.append(string(name) + struct.pack("<B", whole(len(items(shape)), 8)))
        parts += [struct.pack("<I", whole(n, 32)) for n in items(shape)]
        parts.append(struct.pack("<BI", whole(kind, 8), whole(size, 32)))
        # A scalar is the number 1, all else zeros.
        parts.append(b"\1".ljust(whole(size, 32), b"\0") if size in (1, 2) else bytes(min(whole(size, 32), 10**6)))
    parts.append(struct.pack("<I", len(items(aliases))))
    parts += [string(part) for entry in items(aliases) for part in items(entry)]
    return b"".join(parts)


def whisper_variables(vocabulary: int) -> list[Any]:
    """The smallest Whisper's entries for `model_bin`: float32 tensors, and the scalars that there are."""
    found: list[Any] = []

    def tensor(name: str, *shape: int) -> None:
        found.append([name, list(shape), 0, 4 * math.prod(shape)])

    def linear(name: str, rows: int, columns: int) -> None:
        tensor(f"{name}/weight", rows, columns)
        tensor(f"{name}/bias", rows)

    def norm(name: str) -> None:
        tensor(f"{name}/gamma", WIDTH)
        tensor(f"{name}/beta", WIDTH)

    tensor("decoder/embeddings/weight", vocabulary, WIDTH)
    for name, inputs in (("encoder/conv1", MELS), ("encoder/conv2", WIDTH)):
        tensor(f"{name}/weight", WIDTH, inputs, 3)
        tensor(f"{name}/bias", WIDTH)
    for side, positions in (("encoder", SOURCE), ("decoder", TARGET)):
        found += [[f"{side}/num_heads", [], 2, 2], [f"{side}/pre_norm", [], 1, 1]]
        tensor(f"{side}/position_encodings/encodings", positions, WIDTH)
        norm(f"{side}/layer_norm")
        layer = f"{side}/layer_0"
        linear(f"{layer}/self_attention/linear_0", 3 * WIDTH, WIDTH)
        linear(f"{layer}/self_attention/linear_1", WIDTH, WIDTH)
        norm(f"{layer}/self_attention/layer_norm")
        if side == "decoder":
            for part, rows in enumerate((1, 2, 1)):
                linear(f"{layer}/attention/linear_{part}", rows * WIDTH, WIDTH)
            norm(f"{layer}/attention/layer_norm")
        linear(f"{layer}/ffn/linear_0", INNER, WIDTH)
        linear(f"{layer}/ffn/linear_1", WIDTH, INNER)
        norm(f"{layer}/ffn/layer_norm")
    return found


def safetensors(value: Any) -> bytes:
    """A safetensors file of ``[header, bytes of data]``."""
    header, size = (*items(value), None, None)[:2]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(min(whole(size, 64), 10**6))


def gguf(value: Any) -> bytes:
    """A GGUF file; ``[version, [[key, value]], [[name, shape, type, offset]], bytes of data]``."""

    def string(text: Any) -> bytes:
        return struct.pack("<Q", len(raw(text))) + raw(text)

    def typed(value: Any) -> tuple[int, bytes]:
        if isinstance(value, bool):
            return 7, bytes([value])
        if isinstance(value, int):
            return (4, struct.pack("<I", value)) if 0 <= value < 2**32 else (10, struct.pack("<Q", whole(value, 64)))
        if isinstance(value, float):
            return 12, struct.pack("<d", value)
        if isinstance(value, list) and not (value and isinstance(value[0], list)):
            kinds = [typed(v) for v in value]
            kind = kinds[0][0] if kinds else 4
            return 9, struct.pack("<IQ", kind, len(kinds)) + b"".join(data for _, data in kinds)
        return 8, string(value)

    version, fields, tensors, size = (*items(value), None, None, None, None)[:4]
    parts = [b"GGUF", struct.pack("<IQQ", whole(version, 32), len(items(tensors)), len(items(fields)))]
    for entry in items(fields):
        key, given = (*items(entry), None, None)[:2]
        kind, data = typed(given)
        parts.append(string(key) + struct.pack("<I", kind) + data)
    for entry in items(tensors):
        name, shape, kind, offset = (*items(entry), None, None, None, None)[:4]
        parts.append(string(name) + struct.pack("<I", len(items(shape))))
        parts += [struct.pack("<Q", whole(n, 64)) for n in items(shape)]
        parts.append(struct.pack("<IQ", whole(kind, 32), whole(offset, 64)))
    header = b"".join(parts)
    return header + bytes(-len(header) % 32 + min(whole(size, 64), 10**6))


def gguf_llama(vocabulary: list[str]) -> list[Any]:
    """The smallest Llama for `gguf`: two blocks, all weights zero in float32."""
    width, inner = 4, 8
    sizes = {"block_count": 2, "context_length": 16, "embedding_length": width, "feed_forward_length": inner}
    sizes |= {"attention.head_count": 2, "attention.head_count_kv": 1, "rope.dimension_count": width // 2}
    fields: list[Any] = [["general.architecture", "llama"], ["general.name", "tiny"]]
    fields += [[f"llama.{name}", size] for name, size in sizes.items()]
    fields += [["llama.attention.layer_norm_rms_epsilon", 1e-5], ["llama.vocab_size", len(vocabulary)]]
    fields += [["tokenizer.ggml.model", "gpt2"], ["tokenizer.ggml.tokens", vocabulary]]
    fields += [["tokenizer.ggml.merges", []], ["tokenizer.ggml.bos_token_id", 0], ["tokenizer.ggml.eos_token_id", 1]]
    shapes: dict[str, list[int]] = {"token_embd": [width, len(vocabulary)], "output_norm": [width]}
    for i in range(2):
        of_a_block = {
            "attn_q": [width, width], "attn_k": [width, width // 2], "attn_v": [width, width // 2],
            "attn_output": [width, width], "ffn_gate": [width, inner], "ffn_up": [width, inner],
            "ffn_down": [inner, width], "attn_norm": [width], "ffn_norm": [width],
        }  # fmt: skip
        shapes |= {f"blk.{i}.{name}": shape for name, shape in of_a_block.items()}
    tensors, end = [], 0
    for name, shape in shapes.items():
        tensors.append([f"{name}.weight", shape, 0, end])
        end += -(-4 * math.prod(shape) // 32) * 32
    return [3, fields, tensors, end]
