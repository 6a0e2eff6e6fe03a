"""A block of a stack: where it stands in the model, and its targets."""

from __future__ import annotations

from dataclasses import dataclass

from lillama_core.architecture.targets.base import TargetModule
from lillama_core.architecture.targets.linear_map import TargetLinear


@dataclass(frozen=True)
class Block:
    """One block of a stack, by position."""

    stack: str
    index: int
    path: str
    """Path of the block from the model: ``model.layers.3``; empty for the model itself."""
    targets: tuple[TargetModule, ...]

    @property
    def name(self) -> str:
        return f"{self.stack}.{self.index}"

    @property
    def maps(self) -> list[TargetLinear]:
        return [m for target in self.targets for m in target.maps]

    def full_name(self, map_: TargetLinear) -> str:
        """The map's path from the model."""
        return f"{self.path}.{map_.name}" if self.path else map_.name
