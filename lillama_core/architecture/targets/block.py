"""A block of a stack: where it stands in the model, and its targets."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from lillama_core.architecture.targets.base import TargetModule
from lillama_core.architecture.targets.channels import Channels, find_channels
from lillama_core.architecture.targets.linear_map import TargetLinear


@dataclass(frozen=True)
class Block:
    """One block of a stack, by position."""

    stack: str
    index: int
    path: str
    """Path of the block from the model: ``model.layers.3``; empty for the model itself."""
    targets: tuple[TargetModule, ...]
    plain: frozenset[str] = frozenset()
    """Paths from the block of modules in which all weights are those of linear layers."""

    @property
    def name(self) -> str:
        return f"{self.stack}.{self.index}"

    @property
    def maps(self) -> list[TargetLinear]:
        return [m for target in self.targets for m in target.maps]

    @functools.cached_property
    def channels(self) -> tuple[Channels, ...]:
        """What may be channels that can be taken out, by names and shapes."""
        return find_channels(self.targets, self.plain)

    def full_name(self, map_: TargetLinear) -> str:
        """The map's path from the model."""
        return self.path_of(map_.name)

    def path_of(self, name: str) -> str:
        """``name``, a path from the block, as one from the model."""
        return f"{self.path}.{name}" if self.path else name
