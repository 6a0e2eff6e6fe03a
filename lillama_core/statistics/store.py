"""Decompositions of all maps on disk: for each block a file of energies, and one of vectors."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from lillama_core.allocation import ChannelCurve, Spectrum
from lillama_core.architecture.blocks import Block
from lillama_core.initialization import Decomposition
from lillama_core.initialization.elimination import Elimination
from lillama_core.system.files import read_tensors, write_tensors
from lillama_core.system.names import safe_file_stem

Gradients = Mapping[str, torch.Tensor]
"""What the backward pass found for a block, as `GradientObserver.statistics` names it."""


CURVE = ("counts", "errors", "shares")
STRIPS = 8
"""Of a triangle that is written; in so many its other half takes a sixteenth of the whole instead of a half."""


def strips(size: int) -> list[tuple[int, int]]:
    """The rows, from a to b, of each strip of a lower triangle [size, size]; it ends with column b."""
    bounds = [round(i * size / STRIPS) for i in range(STRIPS + 1)]
    return [(a, b) for a, b in itertools.pairwise(bounds) if b > a]


"""The tensors of a `ChannelCurve`, in its order."""


class DecompositionStore:
    """Decompositions of all maps: together they are as large as the model. What shares out ranks reads energies alone.

    The files survive the process, but perhaps not a power cut: they can be made again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _file(self, block: Block, what: str) -> Path:
        return self.folder / f"{safe_file_stem(block.name)}-{what}.safetensors"

    def has(self, block: Block) -> bool:
        return self._file(block, "energies").is_file()

    def save(
        self,
        block: Block,
        found: Mapping[str, Decomposition],
        seen: Gradients = MappingProxyType({}),
        counts: Mapping[str, float] = MappingProxyType({}),
        last_map: str | None = None,
        curves: Mapping[str, ChannelCurve] = MappingProxyType({}),
    ) -> None:
        """Store what was found of a block's maps and channels, the rows that the maps saw, and what ends the block.

        Of what the backward pass has ``seen``, the metric of the block's output is kept, and the gradients at that map.
        What else was found of channels is there already: `save_elimination`.
        """
        vectors: dict[str, torch.Tensor] = {"metric": seen["output"]} if "output" in seen else {}
        energies = {f"count.{name}": torch.tensor(count) for name, count in counts.items()}
        for name, d in found.items():
            energies[f"energies.{name}"] = d.spectrum.squared_singular_values
            energies[f"comparable.{name}"] = torch.tensor(d.spectrum.comparable)
            vectors[f"left.{name}"] = d.left
            vectors[f"right.{name}"] = d.right
            vectors[f"on_outputs.{name}"] = torch.tensor(d.on_outputs)
            if d.center is not None:
                vectors[f"center.{name}"] = d.center
        if last_map is not None:
            energies[f"last.{last_map}"] = torch.tensor(True)
            for kind in ("gradients", "scale"):
                if f"{kind}.{last_map}" in seen:
                    vectors[f"{kind}.{last_map}"] = seen[f"{kind}.{last_map}"]
        for name, curve in curves.items():
            energies |= {f"{k}.{name}": getattr(curve, k) for k in CURVE}
        write_tensors(self._file(block, "vectors"), vectors, durable=False)
        # Last: it says that the block is done.
        write_tensors(self._file(block, "energies"), energies, durable=False)

    def save_elimination(self, block: Block, name: str, found: Elimination) -> None:
        """Store the order of the channels ``name`` of a block, and what refits the map behind them."""
        tensors = {"order": found.order} if found.center is None else {"order": found.order, "center": found.center}
        tensors |= {f"root{i}": found.root[a:b, :b] for i, (a, b) in enumerate(strips(len(found.root)))}
        write_tensors(self._file(block, safe_file_stem(name)), tensors, durable=False)

    def spectra(self, block: Block) -> dict[str, Spectrum]:
        """The spectra of a block's maps, by name."""
        tensors = read_tensors(self._file(block, "energies"))
        return {
            m.name: Spectrum(tensors[f"energies.{m.name}"], bool(tensors[f"comparable.{m.name}"])) for m in block.maps
        }

    def curves(self, block: Block) -> dict[str, ChannelCurve]:
        """What taking out a block's channels costs, by their name; none where it cannot be done, or was not asked."""
        tensors = read_tensors(self._file(block, "energies"))
        return {
            c.name: ChannelCurve(*(tensors[f"{k}.{c.name}"] for k in CURVE))
            for c in block.channels
            if f"{CURVE[0]}.{c.name}" in tensors
        }

    def elimination(self, block: Block, name: str) -> Elimination:
        """What `save_elimination` has stored."""
        tensors = read_tensors(self._file(block, safe_file_stem(name)))
        order = tensors["order"]
        root = torch.zeros(len(order), len(order))
        for i, (a, b) in enumerate(strips(len(order))):
            root[a:b, :b] = tensors.pop(f"root{i}")
        return Elimination(self.curves(block)[name], order, root, tensors.get("center"))

    def counts(self, block: Block) -> dict[str, float]:
        """How many rows each map of a block saw."""
        tensors = read_tensors(self._file(block, "energies"), lambda key: key.startswith("count."))
        return {key.removeprefix("count."): float(count) for key, count in tensors.items()}

    def last_map(self, block: Block) -> str | None:
        """The name of the map that ends a block, if one does and was looked for."""
        tensors = read_tensors(self._file(block, "energies"), lambda key: key.startswith("last."))
        return next((key.removeprefix("last.") for key in tensors), None)

    def load(self, block: Block, names: Collection[str]) -> dict[str, Decomposition]:
        """The decompositions of the maps ``names`` of a block."""
        spectra = self.spectra(block)
        kinds = ("left", "right", "on_outputs", "center")
        wanted = {f"{kind}.{name}" for kind in kinds for name in names}
        tensors = read_tensors(self._file(block, "vectors"), wanted.__contains__)
        return {
            name: Decomposition(
                spectra[name],
                tensors[f"left.{name}"],
                tensors[f"right.{name}"],
                bool(tensors[f"on_outputs.{name}"]),
                tensors.get(f"center.{name}"),
            )
            for name in names
        }

    def metric(self, block: Block) -> torch.Tensor | None:
        """E[g g^T] [width, width] at the block's output, or None if no backward pass ran."""
        return read_tensors(self._file(block, "vectors"), lambda key: key == "metric").get("metric")

    def gradients(self, block: Block, last_map: str) -> tuple[torch.Tensor | None, float]:
        """F, as in `MapStatistics`, and its mean diagonal, of the map that ends a block; None and 0 if nothing ran."""
        names = {f"gradients.{last_map}", f"scale.{last_map}"}
        tensors = read_tensors(self._file(block, "vectors"), names.__contains__)
        return tensors.get(f"gradients.{last_map}"), float(tensors.get(f"scale.{last_map}", 0.0))

    def has_moments(self, block: Block) -> bool:
        return self._file(block, "moments").is_file()

    def save_moments(self, block: Block, tensors: dict[str, torch.Tensor]) -> None:
        """Keep what the forward pass saw of a block, until the backward pass comes by."""
        write_tensors(self._file(block, "moments"), tensors, durable=False)

    def moments(self, block: Block) -> dict[str, torch.Tensor]:
        return read_tensors(self._file(block, "moments"))

    def forget_moments(self, block: Block) -> None:
        self._file(block, "moments").unlink(missing_ok=True)
