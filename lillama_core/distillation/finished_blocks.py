"""Low-rank blocks from their untrained factors to the file of a run that holds them finished, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from lillama_core.architecture.blocks import Block
from lillama_core.architecture.targets.channels import bias_of, layers_without, weight_of
from lillama_core.errors import LillamaError
from lillama_core.formats import Factored, FactoredLinear
from lillama_core.formats.base import Format
from lillama_core.initialization import Initializer
from lillama_core.initialization.base import balance
from lillama_core.runtime.modules import exact
from lillama_core.statistics.store import DecompositionStore
from lillama_core.system.files import read_json, write_json, write_tensors
from lillama_core.system.names import safe_file_stem


class Checkpoint(Protocol):
    """How the compressed model names its tensors on disk, and what it makes of them when it is loaded."""

    def on_disk(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """``tensors`` of whole blocks, by their paths in the model, by the names that they have in its files."""
        ...

    def block(self, path: str, file: Path) -> nn.Module:
        """The block at ``path`` of the compressed model with the weights in ``file``, on the CPU."""
        ...


@dataclass(frozen=True)
class FinishedBlocks:
    """The blocks of a run that are done: for each a file of weights, as the result will have it, and one of notes."""

    folder: Path
    checkpoint: Checkpoint
    format: Format
    """In which the maps are written."""
    dtype: torch.dtype
    """In which the weights are written."""
    device: torch.device
    """Where blocks run."""
    arithmetic: torch.dtype | None
    """In which autocast makes their products; None: fp32."""

    def path(self, block: Block) -> Path:
        """The file of a block's weights."""
        return self.folder / f"{safe_file_stem(block.name)}.safetensors"

    def has(self, block: Block) -> bool:
        return self.path(block).is_file()

    def note(self, block: Block) -> dict[str, Any]:
        """What was noted of a finished block."""
        found: dict[str, Any] = read_json(self.path(block).with_suffix(".json"))
        return found

    def write(self, block: Block, module: nn.Module, ranks: Mapping[str, int], note: Mapping[str, Any]) -> None:
        """Convert the factors in ``module`` and write the block; raises LillamaError where numbers overflow."""
        for target in block.targets:
            converted: dict[str, nn.Module] = {}
            for map_ in target.maps:
                if map_.name in ranks:
                    layer = target.layer(module, map_)
                    assert isinstance(layer, FactoredLinear)
                    bias = None if layer.bias is None else layer.bias.data
                    converted[map_.name] = self.format.from_factors(layer.up.weight.data, layer.down.weight.data, bias)
            target.replace(module, converted)
        self.keep(block, module, note)

    def keep(self, block: Block, module: nn.Module, note: Mapping[str, Any]) -> None:
        """Write a block whose maps are in their format already; raises LillamaError where numbers overflow."""
        state = rounded(module, self.dtype, block.path)
        write_json(self.path(block).with_suffix(".json"), dict(note))
        # Last: the weights say that the block is done.
        tensors = {f"{block.path}.{k}": v.cpu() for k, v in state.items()}
        write_tensors(self.path(block), self.checkpoint.on_disk(tensors))

    def read(self, block: Block) -> nn.Module:
        """The block as whoever loads the result will have it, in fp32.

        What follows learns to live with its rounding, and a resumed run sees the same as an uninterrupted one.
        """
        return exact(self.checkpoint.block(block.path, self.path(block)), self.device, self.arithmetic)


def generator_of(block: Block, seed: int) -> torch.Generator:
    """Random numbers for the factors of a block."""
    return torch.Generator().manual_seed(seed * 100_003 + block.index)


def narrowed(block: Block, module: nn.Module, counts: Mapping[str, int], store: DecompositionStore) -> nn.Module:
    """A dense block without the channels of which ``counts``, by name, says how many stay; ``module`` stays as it is.

    The maps that read them are refitted, in fp32.
    """
    layers: dict[str, nn.Module] = {}
    for channels in (c for c in block.channels if c.name in counts):
        eliminated, count = store.elimination(block, channels.name), counts[channels.name]
        weight, bias = weight_of(block, module, channels.sink), bias_of(block, module, channels.sink)
        refitted = eliminated.refit(weight, bias, count)
        layers |= layers_without(block, module, channels, eliminated.kept(count), *refitted)
    return block.with_layers(module, layers) if layers else module


def factored_layers(
    block: Block,
    dense: nn.Module,
    narrow: nn.Module,
    ranks: Mapping[str, int],
    counts: Mapping[str, int],
    store: DecompositionStore,
    initializer: Initializer,
    seed: int,
) -> dict[str, nn.Module]:
    """Untrained factors, by map, of the maps of a block that have ``ranks``.

    ``narrow`` is what `narrowed` made of ``dense`` for ``counts``.
    """
    generator, found = generator_of(block, seed), store.load(block, ranks)
    writes = {m.name: c for c in block.channels if c.name in counts for m in c.sources}
    reads = {c.sink.name: c for c in block.channels if c.name in counts}
    layers: dict[str, nn.Module] = {}
    for map_ in (m for m in block.maps if m.name in ranks):
        target, own, channels = block.target_of(map_), found[map_.name], reads.get(map_.name) or writes.get(map_.name)
        weight = target.weight(narrow, map_)
        # Vectors of the side that has lost channels are those of all channels.
        apart_there = channels is not None and own.on_outputs == (map_.name in writes)
        B, A = initializer.factors(
            target.weight(dense, map_) if apart_there else weight, ranks[map_.name], own, generator
        )
        if channels is not None and (apart_there or own.center is not None):
            eliminated, count = store.elimination(block, channels.name), counts[channels.name]
            kept = eliminated.kept(count)
            if apart_there and map_.name in writes:
                B, A = balance(B[channels.rows(kept).to(B.device)], A)
            elif apart_there:
                B, A = balance(B, eliminated.refit(A, None, count)[0])
            if own.center is not None and map_.name in reads:
                own = replace(own, center=own.center[kept])
        bias = own.bias(target.bias(narrow, map_), weight, B, A)
        layers[map_.name] = Factored().from_factors(B, A, bias)
    return layers


def rounded(module: nn.Module, dtype: torch.dtype, path: str) -> dict[str, torch.Tensor]:
    """The state of ``module`` with its real numbers in ``dtype``; LillamaError where they overflow."""
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in module.state_dict().items()}
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            shown = str(dtype).removeprefix("torch.")
            raise LillamaError(f"{path}.{name} does not fit {shown}: values overflow; try --dtype bfloat16")
    return state
