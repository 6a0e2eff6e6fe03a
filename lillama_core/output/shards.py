"""The weights of a result in parts: names on disk of some of a model's tensors, and one directory of many files."""

from __future__ import annotations

import copy
import json
import os
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from lillama_core.errors import LillamaError
from lillama_core.models.integrity import StoredTensor, check_safetensors
from lillama_core.models.loading import meta_model
from lillama_core.models.shards import BlockReader, first_dtype
from lillama_core.models.source import INDEX, WEIGHTS, ModelSource, weight_files
from lillama_core.models.transformers_adapter import as_saved, set_generation_config
from lillama_core.output.quantizer import LillamaConfig, LillamaHfQuantizer, attach
from lillama_core.system.files import write_json

if TYPE_CHECKING:
    from lillama_core.architecture.base import Architecture

BUFFER = 1 << 24
"""Bytes that are held while files are copied."""


def compressed_meta_model(
    architecture: Architecture, config: Any, targets_config: LillamaConfig, trust_remote_code: bool = False
) -> Any:
    """The compressed model on the meta device, in the dtype of ``config``: its modules are low rank, it can be saved.

    ``config``, that of the dense model, is not changed. ``architecture.adapt`` has been called. Raises LillamaError
    where ``targets_config`` is of another model.
    """
    model: Any = meta_model(copy.deepcopy(config), architecture, trust_remote_code)
    LillamaHfQuantizer(targets_config, pre_quantized=True).preprocess_model(model)
    attach(model, targets_config)
    # What loading would leave: the weights are plain numbers.
    model.is_quantized = False
    architecture.adapt(model)
    return model


def compressed_reader(
    source: ModelSource, config: Any, architecture: Architecture
) -> tuple[BlockReader, LillamaConfig]:
    """The reader of the blocks of a compressed directory, in the dtype of its weights, and what is low rank in them.

    ``config`` is that of the directory, and is not changed. Raises UserError for a config or weights that are broken.
    """
    files = weight_files(source)
    config = copy.deepcopy(config)
    targets = LillamaConfig(
        **{k: v for k, v in quantization_of(config).items() if k in ("sites", "version", "quantization")}
    )
    del config.quantization_config
    if config.dtype is None:
        config.dtype = first_dtype(files)
    config.name_or_path = source.location
    model = compressed_meta_model(architecture, config, targets, source.trust_remote_code)
    set_generation_config(model, source.location)
    return BlockReader(model, files, architecture, model.dtype), targets


def quantization_of(config: Any) -> dict[str, Any]:
    """What a compressed model's config says of its modules."""
    found = config.quantization_config
    said: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
    return said


def names_on_disk(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return ``tensors``, by name in memory from ``model``, as ``model.save_pretrained`` writes them: by name on disk.

    ``model`` is the compressed one with its quantizer attached, of which all weights may be on the meta device. The
    tensors are those of whole blocks, or all that is not in one: tensors that are stored as one must come together, and
    of those that are one parameter a single one is returned. Some are views, of the given tensors.
    """
    for name, tensor in tensors.items():
        if tensor.device.type == "meta":
            raise LillamaError(f"{name} has no values to be written")
    return as_saved(model, tensors)


def assemble(folder: Path, shards: Sequence[Path], merge_below: int) -> None:
    """Make the weights of the model directory ``folder`` out of the safetensors files ``shards``, in their order.

    Less than ``merge_below`` bytes of weights in all become one file; more become numbered files, links to ``shards``
    where the file system has them, and an index. Weights of an earlier call are replaced. Raises LillamaError when two
    shards hold a tensor of one name.
    """
    held = {shard: check_safetensors(shard) for shard in shards}
    home: dict[str, Path] = {}
    for shard, tensors in held.items():
        for name in tensors:
            if name in home:
                raise LillamaError(f"{name} is in both {str(home[name])!r} and {str(shard)!r}")
            home[name] = shard
    total = sum(t.end - t.start for tensors in held.values() for t in tensors.values())
    for old in [*folder.glob("model-*-of-*.safetensors"), folder / WEIGHTS, folder / INDEX]:
        old.unlink(missing_ok=True)
    if total < merge_below:
        _merge(folder / WEIGHTS, held)
        return
    names = {shard: f"model-{i:05d}-of-{len(held):05d}.safetensors" for i, shard in enumerate(held, 1)}
    for shard, name in names.items():
        _link(shard, folder / name)
    weight_map = {name: names[home[name]] for name in sorted(home)}
    # Last: transformers takes the directory for a model once it has the index.
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _merge(path: Path, held: dict[Path, dict[str, StoredTensor]]) -> None:
    """Write one safetensors file of what several hold. Layout: https://github.com/huggingface/safetensors#format"""
    found = [(name, shard, tensor) for shard, tensors in held.items() for name, tensor in tensors.items()]
    # By the size of a number first, so that all lie at multiples of it: the format knows no gaps.
    found.sort(key=lambda entry: (-_item_size(entry[2]), entry[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, _, tensor in found:
        size = tensor.end - tensor.start
        offsets = [position, position + size]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as target:
        target.write(struct.pack("<Q", len(text)) + text)
        for _, shard, tensor in found:
            with shard.open("rb") as source:
                source.seek(tensor.start)
                _copy(source, target, tensor.end - tensor.start)
        target.flush()
        os.fsync(target.fileno())
    temporary.replace(path)


def _item_size(tensor: StoredTensor) -> int:
    count = 1
    for size in tensor.shape:
        count *= size
    return (tensor.end - tensor.start) // count if count else 0


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size:
        data = source.read(min(size, BUFFER))
        if not data:
            raise LillamaError(f"{source.name!r} has become shorter while it was read")
        target.write(data)
        size -= len(data)


def _link(source: Path, target: Path) -> None:
    try:
        # Not of a link: the file itself.
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
