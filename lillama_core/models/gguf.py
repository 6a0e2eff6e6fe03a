"""A GGUF file unpacked into safetensors, block by block: its numbers need more memory than the file."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lillama_core.errors import UserError, one_line
from lillama_core.models.loading import load_model, meta_model
from lillama_core.models.source import INDEX, ModelSource, made_once
from lillama_core.models.transformers_adapter import GgufTensors
from lillama_core.system.files import write_json, write_tensors
from lillama_core.system.quiet import quiet

if TYPE_CHECKING:
    from lillama_core.architecture.base import Architecture

VERSION = 1
"""Raised when what is made of a file changes, so that older ones are made anew."""
SHARD = "5GB"
"""What transformers wrote at most into a file by default for years; larger ones are awkward to copy."""


def shards_of_gguf(source: ModelSource, architecture: Architecture, config: Any) -> Path:
    """Return a directory with the weights of a GGUF file in float16, as safetensors; made once, kept in the cache.

    They are what ``from_pretrained(gguf_file=…, dtype=torch.float16)`` loads. ``config`` is the model's. Of memory it
    takes what the weights around the blocks need, or a block; all of them for the few architectures whose GGUF files
    transformers keeps packed. Raises UserError for a file that cannot be unpacked.
    """
    import transformers

    assert source.gguf_file is not None
    file = Path(source.location) / source.gguf_file

    def make(folder: Path) -> None:
        _unpack(source, file, architecture, config, folder)

    return made_once(f"gguf {VERSION} {transformers.__version__}", file, [file], make)


def _unpack(source: ModelSource, file: Path, architecture: Architecture, config: Any, folder: Path) -> None:
    from gguf import GGUFReader, dequantize

    try:
        reader = GGUFReader(str(file))
        kind = str(reader.fields["general.architecture"].contents())
        if not GgufTensors.can_read(kind):
            resident: Any = load_model(source, architecture, torch.float16)
            with quiet():
                resident.save_pretrained(folder, max_shard_size=SHARD)
            return
        config = copy.deepcopy(config)
        config.dtype = torch.float16
        model = meta_model(config, architecture, source.trust_remote_code)
        with quiet():
            tensors = GgufTensors(str(file), kind, model)
        groups: dict[str, list[Any]] = {}
        for entry in reader.tensors:
            # Layers of an encoder and a decoder, or of one stack.
            block = re.match(r"(?:\w+\.)?blk\.\d+\.", entry.name)
            groups.setdefault(block.group() if block else "", []).append(entry)
        written: dict[str, str] = {}
        for i, group in enumerate(groups.values(), 1):
            found: dict[str, torch.Tensor] = {}
            for entry in group:
                tensors.add(entry.name, dequantize(entry.data, entry.tensor_type), found)
                # At once: what is unpacked is in fp32.
                found.update({k: v.half() for k, v in found.items() if v.dtype != torch.float16})
            name = f"model-{i:05d}-of-{len(groups):05d}.safetensors"
            if found:
                write_tensors(folder / name, found)
                written.update(dict.fromkeys(found, name))
        write_json(folder / INDEX, {"metadata": {}, "weight_map": written})
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
    except (KeyError, ValueError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"cannot load model {source.spec!r}: {one_line(error)}") from None
