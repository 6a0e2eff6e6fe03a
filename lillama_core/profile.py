"""One pass over the dense model that takes every map apart, ready for any rank."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch

from lillama_core.allocation import Spectrum
from lillama_core.architecture import Block, safe_file_stem
from lillama_core.blocks import BlockRunner
from lillama_core.initialization import Decomposition, Initializer, MapStatistics
from lillama_core.memory import release_memory
from lillama_core.progress import Progress
from lillama_core.run_directory import read_tensors, write_tensors
from lillama_core.statistics import InputObserver, Masks, map_statistics
from lillama_core.weights import WeightSource


class Profile:
    """Decompositions of all maps, one file a block: together they are as large as the model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _file(self, block: Block) -> Path:
        return self.folder / f"{safe_file_stem(block.name)}.safetensors"

    def has(self, block: Block) -> bool:
        return self._file(block).is_file()

    def save(
        self, block: Block, found: dict[str, Decomposition], metric: torch.Tensor | None, counts: dict[str, float]
    ) -> None:
        """Store what was found of a block's maps, its output metric if there is one, and the rows that maps saw."""
        tensors: dict[str, torch.Tensor] = {} if metric is None else {"metric": metric}
        tensors |= {f"count.{name}": torch.tensor(count) for name, count in counts.items()}
        for name, d in found.items():
            tensors[f"energies.{name}"] = d.spectrum.energies
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


def profile_blocks(
    blocks: list[Block],
    source: WeightSource,
    runner: BlockRunner,
    stream: list[torch.Tensor],
    initializer: Initializer,
    masks: list[Masks],
    profile: Profile,
    progress: Progress,
) -> None:
    """Decompose every map of ``blocks`` into ``profile``.

    ``stream`` enters the first block, and is in the end what leaves the last one, if the initializer looks at inputs.

    ``masks`` say for each batch which positions count.

    ``profile`` holds what the sensitivity pass found, if it ran. Blocks that it has decomposed already are only
    passed through, for the sake of the stream.
    """
    progress.phase("Statistics of the dense blocks", len(blocks))
    # Decompositions are done in fp64, which not every accelerator has.
    device = runner.device if runner.device.type == "cuda" else torch.device("cpu")
    sequences = sum(len(hidden) for hidden in stream)
    for block in blocks:
        done = profile.has(block)
        module = source.block(block)
        observer = InputObserver(block)
        if initializer.needs_inputs:
            with torch.no_grad(), observer.watching(module):
                for index, hidden in enumerate(stream):
                    observer.next_batch(masks[index])
                    stream[index] = runner(module, block, index, hidden).to(hidden.device)
        if not done:
            seen = profile.gradients(block)
            found = {}
            for site in block.sites:
                for map_ in site.maps:
                    weight = site.weight(module, map_).to(device)
                    has_bias = site.bias(module, map_) is not None
                    statistics = (
                        map_statistics(map_, weight, observer, seen, sequences, device, has_bias)
                        if initializer.needs_inputs
                        else MapStatistics()
                    )
                    found[map_.name] = initializer.decompose(weight, statistics)
            counts = {m.name: observer.count(m.name) for m in block.maps} if initializer.needs_inputs else {}
            profile.save(block, found, seen.get("output"), counts)
        release_memory()
        progress.step(block.name)


def tell_rare(blocks: list[Block], profile: Profile, progress: Progress) -> dict[str, float]:
    """How many rows each map of a group saw, by its path; says which saw too few to span their inputs."""
    seen: dict[str, float] = {}
    rare, never = 0, []
    for block in blocks:
        if all(m.group is None for m in block.maps):
            continue
        counts = profile.counts(block)
        for map_ in block.maps:
            if map_.group is not None and map_.name in counts:
                seen[block.full_name(map_)] = counts[map_.name]
                rare += 0 < counts[map_.name] < map_.in_features
                never += [block.full_name(map_)] if not counts[map_.name] else []
    if rare:
        progress.line(
            f"{rare} of {len(seen)} maps of experts saw fewer rows than they have inputs: the others help out"
        )
    if never:
        progress.line(f"{len(never)} maps of experts saw no row, their weights alone decide; the first is {never[0]}")
    return seen
