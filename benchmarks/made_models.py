"""Models of any shape with random weights, made on disk: no network is needed, and none is ever whole in memory.

The weights are those that transformers begins a training with, and have no meaning: what can be measured on such a
model is time, memory and disk, and that what is written is what was computed. Its quality says nothing.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from lillama_core.architecture.blocks import find_blocks
from lillama_core.architecture.find import find_architecture
from lillama_core.data.modality import modality_of
from lillama_core.models.loading import count_parameters, meta_model
from lillama_core.models.source import INDEX
from lillama_core.models.transformers_adapter import initialize, nearest_model, save_settings
from lillama_core.output.directory import MERGE_BELOW
from lillama_core.output.shards import names_on_disk
from lillama_core.system.files import write_json


@dataclass(frozen=True)
class MadeModel:
    """A model that lies in ``folder``."""

    folder: Path
    bytes: int
    """Of its weights."""
    parameters: int
    blocks: int


def block_paths(model: nn.Module, stacks: dict[str, str]) -> list[str]:
    """The paths of all blocks, stack by stack."""
    return [f"{path}.{name}" for path in stacks.values() for name, _ in model.get_submodule(path).named_children()]


def make_model(
    folder: Path,
    config: Any,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> MadeModel:
    """Write a model of a transformers ``config`` into ``folder``, a shard for each block and one for what is around.

    With it a byte-level tokenizer of 384 tokens, or the processor that the architecture needs; ``config`` is changed
    to fit it where it must. Nothing is forced to the disk: who loses the power makes the model again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    architecture = find_architecture(config)
    generation = write_processor(folder, config, modality_of(architecture).name)
    config.dtype = dtype
    model: Any = meta_model(copy.deepcopy(config), architecture)
    if generation:
        # What came from the model's config is made from it again when the model is loaded.
        model.generation_config._from_model_config = False
        model.generation_config.update(**generation)
    parameters = count_parameters(model)
    paths = block_paths(model, dict(architecture.stacks))
    weight_map: dict[str, str] = {}
    total = 0
    torch.manual_seed(seed)
    count = len(paths) + 1
    for number, path in enumerate(["", *paths], 1):
        tensors = _shell(model, paths) if not path else _block(model, path)
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        stored = {k: v.contiguous() for k, v in names_on_disk(model, tensors).items()}
        save_file(stored, str(folder / name), {"format": "pt"})
        weight_map |= dict.fromkeys(stored, name)
        total += sum(t.numel() * t.element_size() for t in stored.values())
        if number == count or number % 16 == 0:
            report(f"Made {number} of {count} shards, {total / 1e9:.1f} GB")
    save_settings(model, folder)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return MadeModel(folder, total, parameters, len(paths))


def block_bytes(config: Any, dtype: torch.dtype = torch.bfloat16) -> tuple[int, int]:
    """Bytes of the weights of one block of the first stack, and of all that is in no block."""
    architecture = find_architecture(config)
    model = meta_model(copy.deepcopy(config), architecture)
    paths = block_paths(model, dict(architecture.stacks))
    blocks = [count_parameters(model.get_submodule(path)) for path in paths]
    return blocks[0] * dtype.itemsize, (count_parameters(model) - sum(blocks)) * dtype.itemsize


def disk_needed(config: Any, reduction: float, positions: int, dtype: torch.dtype = torch.bfloat16) -> float:
    """Bytes on the disk at the most: both models, what a run keeps of each map, and its hidden states.

    ``positions`` is how many tokens, or frames, are carried through the blocks.
    """
    architecture = find_architecture(config)
    model = meta_model(copy.deepcopy(config), architecture)
    blocks = [block for stack in find_blocks(architecture, model).values() for block in stack]
    maps = [m for block in blocks for m in block.maps]
    # In fp32: left and right vectors of every map, in full.
    vectors = 4 * sum((m.in_features + m.out_features) * min(m.in_features, m.out_features) for m in maps)
    states = 4 * positions * config.hidden_size * (len(blocks) + 1)
    dense = count_parameters(model) * dtype.itemsize
    result = (1 - reduction) * dense
    # A small result is merged into one file while its blocks are still there.
    return dense + vectors + states + result * (2 if result < MERGE_BELOW else 1)


def check_disk(work: Path, needed: float) -> None:
    """Say what is needed and what is free; end the program when it is not enough."""
    free = shutil.disk_usage(work).free
    print(f"Disk: about {needed / 1e9:.1f} GB are needed at {work}, {free / 1e9:.1f} GB are free", flush=True)
    if free < needed:
        raise SystemExit("not enough disk: choose another folder by --work, or a smaller model")


def _block(model: Any, path: str) -> dict[str, torch.Tensor]:
    """New weights of the block at ``path``, by name in ``model``, which keeps its block on the meta device."""
    block = copy.deepcopy(model.get_submodule(path))
    _fill(block, nearest_model(model, path), ())
    return {f"{path}.{name}": tensor for name, tensor in block.state_dict().items()}


def _shell(model: Any, paths: Collection[str]) -> dict[str, torch.Tensor]:
    """New weights of all that is in no block."""
    shell = copy.deepcopy(model)
    blocks = [shell.get_submodule(path) for path in paths]
    _fill(shell, shell, blocks)
    shell.tie_weights()
    inside = tuple(f"{path}." for path in paths)
    return {name: tensor for name, tensor in shell.state_dict().items() if not name.startswith(inside)}


def _fill(module: nn.Module, owner: Any, skip: Collection[nn.Module]) -> None:
    """Give ``module`` weights in memory, as transformers begins a training, but for the modules in ``skip``."""
    inside = {id(part) for outer in skip for part in outer.modules()}
    for part in module.modules():
        if id(part) in inside:
            continue
        for name, tensor in [*part._parameters.items(), *part._buffers.items()]:
            if tensor is not None and tensor.is_meta:
                empty = torch.empty_like(tensor, device="cpu")
                if isinstance(tensor, nn.Parameter):
                    part._parameters[name] = nn.Parameter(empty, requires_grad=False)
                else:
                    part._buffers[name] = empty
    initialize(module, owner, skip)


def write_processor(folder: Path, config: Any, modality: str) -> dict[str, Any]:
    """Write what a model of a modality is fed by; set in ``config``, and return for writing text, what follows from it.

    A vocabulary that is larger than the tokenizer's stays as it is: its other rows are never read.
    """
    from lillama_testing.tiny import MATERIALS

    changes = MATERIALS[modality].write(folder)
    if modality == "text":
        config.bos_token_id, config.eos_token_id, config.pad_token_id = 0, 1, 1
        return {}
    generation: dict[str, Any] = changes.pop("generation")
    for name, value in changes.items():
        # Sizes stay those of the model that was asked for.
        if name.endswith(("token_id", "tokens")):
            setattr(config, name, value)
    _enlarge_features(folder, config)
    return generation


def _enlarge_features(folder: Path, config: Any) -> None:
    """Let the speech processor in ``folder`` give as many bands, of as long a recording, as ``config`` asks for."""
    from transformers import WhisperFeatureExtractor, WhisperProcessor

    processor = WhisperProcessor.from_pretrained(folder)
    # Two frames of 10 ms make a position of the encoder.
    seconds = config.max_source_positions * 2 // 100
    extractor = WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=seconds)
    WhisperProcessor(extractor, processor.tokenizer).save_pretrained(folder)
