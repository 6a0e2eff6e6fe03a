"""Decompositions of all maps on disk, one file a block."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch

from lillama_core.allocation import Spectrum
from lillama_core.architecture.blocks import Block
from lillama_core.initialization import Decomposition
from lillama_core.system.files import read_tensors, write_tensors
from lillama_core.system.names import safe_file_stem


class DecompositionStore:
    """Decompositions of all maps, one file a block: together they are as large as the model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _file(self, block: Block) -> Path:
        return self.folder / f"{safe_file_stem(block.name)}.safetensors"

    def has(self, block: Block) -> bool:
        return self._file(block).is_file()

    def save(
        self,
        block: Block,
        found: dict[str, Decomposition],
        fisher_factor: torch.Tensor | None,
        counts: dict[str, float],
    ) -> None:
        """Store what was found of a block's maps, its output metric if there is one, and the rows that maps saw."""
        tensors: dict[str, torch.Tensor] = {} if fisher_factor is None else {"metric": fisher_factor}
        tensors |= {f"count.{name}": torch.tensor(count) for name, count in counts.items()}
        for name, d in found.items():
            tensors[f"energies.{name}"] = d.spectrum.squared_singular_values
            tensors[f"left.{name}"] = d.left
            tensors[f"right.{name}"] = d.right
            tensors[f"flags.{name}"] = torch.tensor([d.spectrum.comparable, d.on_outputs])
            if d.center is not None:
                tensors[f"center.{name}"] = d.center
        write_tensors(self._file(block), tensors)

    def counts(self, block: Block) -> dict[str, float]:
        """How many rows each map of a block saw."""
        tensors = read_tensors(self._file(block))
        return {m.name: float(tensors[f"count.{m.name}"]) for m in block.maps if f"count.{m.name}" in tensors}

    def _gradients_file(self, block: Block) -> Path:
        return self.folder / f"{safe_file_stem(block.name)}-gradients.safetensors"

    def has_gradients(self, block: Block) -> bool:
        return self._gradients_file(block).is_file()

    def save_gradients(self, block: Block, found: dict[str, torch.Tensor]) -> None:
        """Store what the sensitivity pass found for a block."""
        write_tensors(self._gradients_file(block), found)

    def gradients(self, block: Block) -> dict[str, torch.Tensor]:
        """What the sensitivity pass found for a block; empty if it did not run."""
        return read_tensors(self._gradients_file(block)) if self.has_gradients(block) else {}

    def load(
        self, block: Block, names: Collection[str] | None = None
    ) -> tuple[dict[str, Decomposition], torch.Tensor | None]:
        """The decompositions of a block's maps by name, or of those in ``names`` alone, and its metric."""
        wanted = {m.name for m in block.maps} if names is None else set(names)
        tensors = read_tensors(self._file(block), lambda key: key == "metric" or key.partition(".")[2] in wanted)
        found = {}
        for map_ in (m for m in block.maps if m.name in wanted):
            comparable, on_outputs = tensors[f"flags.{map_.name}"].tolist()
            spectrum = Spectrum(tensors[f"energies.{map_.name}"], comparable)
            left, right = tensors[f"left.{map_.name}"], tensors[f"right.{map_.name}"]
            center = tensors.get(f"center.{map_.name}")
            found[map_.name] = Decomposition(spectrum, left, right, on_outputs, center)
        return found, tensors.get("metric")
