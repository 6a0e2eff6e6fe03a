"""A block of a stack: where it stands in the model, and its targets."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from lillama_core.architecture.targets.base import TargetModule
from lillama_core.architecture.targets.channels import Channels, find_channels
from lillama_core.architecture.targets.linear_map import TargetLinear
from lillama_core.runtime.modules import shared_copy


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

    @property
    def nets(self) -> list[list[Channels]]:
        """The channels that are what they seem all together, or not: those between maps of one target."""
        found: dict[str, list[Channels]] = {}
        for channels in self.channels:
            found.setdefault(self.target_of(channels.sink).name, []).append(channels)
        return list(found.values())

    def target_of(self, map_: TargetLinear) -> TargetModule:
        """The target that holds a map."""
        return next(target for target in self.targets if map_ in target.maps)

    def put(self, module: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        """Put ``layers``, by map, into ``module``, in the places of the maps."""
        for target in self.targets:
            target.replace(module, {m.name: layers[m.name] for m in target.maps if m.name in layers})

    def with_layers(self, module: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
        """A copy of ``module`` with ``layers``, by map, in the places of the maps; all else is shared."""
        found = shared_copy(module)
        self.put(found, layers)
        return found

    def full_name(self, map_: TargetLinear) -> str:
        """The map's path from the model."""
        return self.path_of(map_.name)

    def path_of(self, name: str) -> str:
        """``name``, a path from the block, as one from the model."""
        return f"{self.path}.{name}" if self.path else name
