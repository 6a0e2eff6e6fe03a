"""Grouped projections as targets, on request: one matrix that holds a map for each group of features.

Such a module is a subclass of ``nn.Linear`` that says its number of groups as ``n_groups``. Its weight [g o, i] are g
matrices [o, i], one below the other; each multiplies its own group of x [..., g, i], and what they give is [..., g, o].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lillama_core.architecture.targets.base import TargetModule
from lillama_core.architecture.targets.linear_map import MapChoice, is_asked_for
from lillama_core.architecture.targets.stacked import StackedTarget
from lillama_core.errors import LillamaError


class GroupMaps(nn.Module):
    """A linear module, dense or low rank, for each group: [..., g, i] -> [..., g, o]."""

    def __init__(self, maps: list[nn.Module]) -> None:
        super().__init__()
        self.maps = nn.ModuleList(maps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([map_(x[..., g, :]) for g, map_ in enumerate(self.maps)], -2)


class GroupedTarget(StackedTarget):
    """A grouped projection without a bias; its maps are ``<name>.0``, ``<name>.1`` …"""

    kind = "grouped"
    low_rank = GroupMaps
    maps_are = "groups"

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        """Whether ``module`` says of itself that it is a grouped projection."""
        groups = getattr(module, "n_groups", None)
        if not isinstance(module, nn.Linear) or not isinstance(groups, int) or groups < 1:
            return False
        return module.bias is None and module.weight.shape[0] % groups == 0

    @classmethod
    def at(cls, name: str, module: nn.Module) -> GroupedTarget:
        if not cls.accepts(module) and not isinstance(module, GroupMaps):
            raise LillamaError(f"{name!r} is a {type(module).__name__}, not a grouped projection without a bias")
        return cls(name, module)

    @staticmethod
    def matrices(module: Any) -> torch.Tensor:
        weight: torch.Tensor = module.weight
        return weight.unflatten(0, (module.n_groups, -1))

    @staticmethod
    def rows(call: tuple[Any, ...]) -> Sequence[torch.Tensor]:
        (x,) = call
        found: tuple[torch.Tensor, ...] = x.unbind(-2)
        return found

    @staticmethod
    def together(outputs: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(outputs, -2)


def grouped_targets(
    block: nn.Module, only: tuple[str, ...] = (), exclude: tuple[str, ...] = (), choice: MapChoice | None = None
) -> list[TargetModule]:
    """The grouped projections of a block that ``only`` or ``choice.include`` name, in module order; never any others.

    They are named as modules, which takes all of their maps. ``exclude`` and ``choice.exclude`` as in `linear_targets`.
    """
    named = (only, exclude, choice or MapChoice())
    found = [(n, m) for n, m in block.named_modules() if GroupedTarget.accepts(m)]
    return [GroupedTarget(n, m) for n, m in found if is_asked_for(n, *named)]
