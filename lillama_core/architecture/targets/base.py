"""Sites: the modules that are swapped. A site lists its maps, reads and watches them, and takes their replacements."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lillama_core.architecture.targets.linear_map import TargetLinear
from lillama_core.formats.base import Format

OnRows = Callable[[TargetLinear, torch.Tensor], None]
"""Receives a map and rows [..., in] that it multiplies, or its output [..., out]."""


class TargetModule(ABC):
    """One module of a block with the maps that it holds, dense or low rank.

    ``block`` in the methods is the module that the site's name starts from: a block, or a whole model when the
    name is a path from there.
    """

    kind: str
    """How the site is called in the config of a compressed model."""

    def __init__(self, name: str, maps: tuple[TargetLinear, ...]) -> None:
        self.name = name
        self.maps = maps

    @classmethod
    @abstractmethod
    def at(cls, name: str, module: nn.Module) -> TargetModule:
        """The site for ``module``, dense or low rank already; raises LillamaError when it is of another kind."""

    @abstractmethod
    def weight(self, block: nn.Module, map_: TargetLinear) -> torch.Tensor:
        """W [out, in] of ``map_`` while dense, a view on the block's parameter."""

    @abstractmethod
    def bias(self, block: nn.Module, map_: TargetLinear) -> torch.Tensor | None:
        """The bias [out] added to the map's output, or None; dense or low rank."""

    @abstractmethod
    def observe(
        self, block: nn.Module, on_input: OnRows | None = None, on_output: OnRows | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """While open, the rows that each dense map multiplies are shown, and its outputs, as part of the graph.

        Maps that read the same tensor are shown the same object.
        """

    @abstractmethod
    def replace(self, block: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        """Put low-rank modules in the place of the maps named, which may be low rank already; others stay."""

    @abstractmethod
    def layer(self, block: nn.Module, map_: TargetLinear) -> nn.Module:
        """What ``put`` has put in the place of ``map_``."""

    @abstractmethod
    def renamings(self, block: nn.Module, ranks: Mapping[str, int], format_: Format) -> list[tuple[str, str]]:
        """Names of tensors (on disk, in memory) that differ, as paths from ``block``.

        At least one name on disk must be that of a dense parameter whose shape is another, so that a loader which
        does not know the format stops with an error instead of filling the maps with random numbers.
        """

    def check(self, format_: Format) -> None:  # noqa: B027  most sites take any format
        """Raise UserError when the site's maps cannot be stored in ``format_``."""

    def local_name(self, map_: TargetLinear) -> str:
        """The map's name within its site; empty for the site's only map."""
        return map_.name.removeprefix(self.name).removeprefix(".")


def make_hook(map_: TargetLinear, on_input: OnRows | None, on_output: OnRows | None) -> Callable[..., None]:
    """A forward hook for a module that multiplies its first input by ``map_``."""

    def hook(_: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        if on_input is not None:
            on_input(map_, inputs[0])
        if on_output is not None:
            on_output(map_, output)

    return hook
