"""Low-rank blocks from their untrained factors to the file of a run that holds them finished, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lillama_core.architecture.blocks import Block
from lillama_core.errors import LillamaError
from lillama_core.formats import Factored, FactoredLinear
from lillama_core.formats.base import Format
from lillama_core.initialization import Decomposition, Initializer
from lillama_core.system.files import read_json, read_tensors, write_json, write_tensors
from lillama_core.system.names import safe_file_stem


@dataclass(frozen=True)
class FinishedBlocks:
    """The blocks of a run that are done, a file of weights and one of notes each; and how blocks get there."""

    folder: Path
    initializer: Initializer
    format: Format
    """In which the maps are written."""
    dtype: torch.dtype
    """In which the weights are written."""
    device: torch.device
    """Where blocks run."""
    seed: int

    def path(self, block: Block) -> Path:
        """The file of a block's weights."""
        return self.folder / f"{safe_file_stem(block.name)}.safetensors"

    def has(self, block: Block) -> bool:
        return self.path(block).is_file()

    def note(self, block: Block) -> dict[str, Any]:
        """What was noted of a finished block."""
        found: dict[str, Any] = read_json(self.path(block).with_suffix(".json"))
        return found

    def generator(self, block: Block) -> torch.Generator:
        """Random numbers for the factors of a block."""
        return torch.Generator().manual_seed(self.seed * 100_003 + block.index)

    def factor(
        self, block: Block, module: nn.Module, ranks: Mapping[str, int], found: Mapping[str, Decomposition]
    ) -> None:
        """Put the untrained factors of the maps that have ``ranks`` into a dense block, ready to be trained."""
        generator = self.generator(block)
        for target in block.targets:
            layers: dict[str, nn.Module] = {}
            for map_ in target.maps:
                if map_.name in ranks:
                    weight = target.weight(module, map_)
                    B, A = self.initializer.factors(weight, ranks[map_.name], found[map_.name], generator)
                    bias = found[map_.name].bias(target.bias(module, map_), weight, B, A)
                    layers[map_.name] = Factored().from_factors(B, A, bias)
            target.replace(module, layers)

    def write(self, block: Block, module: nn.Module, ranks: Mapping[str, int], note: Mapping[str, Any]) -> None:
        """Convert the factors in ``module`` and write the block; raises LillamaError where numbers overflow."""
        for target in block.targets:
            converted: dict[str, nn.Module] = {}
            for map_ in target.maps:
                if map_.name in ranks:
                    layer = target.layer(module, map_)
                    assert isinstance(layer, FactoredLinear)
                    bias = None if layer.bias is None else layer.bias.cpu()
                    converted[map_.name] = self.format.from_factors(
                        layer.up.weight.data.cpu(), layer.down.weight.data.cpu(), bias
                    )
            target.replace(module, converted)
        state = rounded(module, self.dtype, block.path)
        write_json(self.path(block).with_suffix(".json"), dict(note))
        # Last: the weights say that the block is done.
        write_tensors(self.path(block), state)

    def read(self, block: Block, module: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
        """``module``, the dense block, made what was written of it, in fp32.

        What follows learns to live with its rounding, and a resumed run sees the same as an uninterrupted one.
        """
        for target in block.targets:
            layers: dict[str, nn.Module] = {}
            for map_ in target.maps:
                if map_.name in ranks:
                    has_bias = target.bias(module, map_) is not None
                    layers[map_.name] = self.format.module(
                        map_.out_features, map_.in_features, ranks[map_.name], has_bias, torch.float32, "cpu"
                    )
            target.replace(module, layers)
        module.load_state_dict(read_tensors(self.path(block)))
        return module.to(self.device).eval().requires_grad_(False)


def rounded(module: nn.Module, dtype: torch.dtype, path: str) -> dict[str, torch.Tensor]:
    """The state of ``module`` with its real numbers in ``dtype``; LillamaError where they overflow."""
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in module.state_dict().items()}
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            shown = str(dtype).removeprefix("torch.")
            raise LillamaError(f"{path}.{name} does not fit {shown}: values overflow; try --dtype bfloat16")
    return state
