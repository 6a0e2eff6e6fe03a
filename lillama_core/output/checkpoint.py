"""The compressed model as it is on disk: one block at a time, there and back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from lillama_core.errors import LillamaError
from lillama_core.models.shards import BlockReader
from lillama_core.models.transformers_adapter import save_settings
from lillama_core.output.quantizer import LillamaConfig
from lillama_core.output.shards import compressed_meta_model, names_on_disk

if TYPE_CHECKING:
    from lillama_core.architecture.base import Architecture


@dataclass(frozen=True)
class CompressedCheckpoint:
    """The compressed model on the meta device, and its names on disk."""

    model: Any
    reader: BlockReader
    """Of the model, without files."""

    @classmethod
    def of(
        cls,
        architecture: Architecture,
        dense: Any,
        targets: Mapping[str, Any],
        dtype: torch.dtype,
        trust_remote_code: bool,
    ) -> CompressedCheckpoint:
        """The model that ``dense`` becomes when its ``targets`` (see `target_entries`) are low rank, in ``dtype``."""
        config = copy.deepcopy(dense.config)
        config.dtype = dtype
        model = compressed_meta_model(architecture, config, LillamaConfig(targets), trust_remote_code)
        model.generation_config = getattr(dense, "generation_config", None)
        return cls(model, BlockReader(model, {}, architecture, dtype))

    def on_disk(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """``tensors`` of whole blocks, or of all that is in none, by the names that they have on disk."""
        return names_on_disk(self.model, tensors)

    def block(self, path: str, file: Path) -> nn.Module:
        """The block at ``path`` with the weights in ``file``, on the CPU."""
        try:
            with safe_open(file, framework="pt") as opened:
                files = dict.fromkeys(opened.keys(), file)
        except (SafetensorError, OSError) as error:
            raise LillamaError(f"{str(file)!r} is damaged ({error}); start anew with --overwrite") from None
        return self.reader.over(files).block(path)

    def save_settings(self, folder: Path) -> None:
        """Write everything of the model's directory but its weights."""
        save_settings(self.model, folder)
