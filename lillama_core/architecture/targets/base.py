"""The interface of a target: a module whose linear maps are listed, read, observed and replaced."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lillama_core.architecture.targets.linear_map import TargetLinear
from lillama_core.errors import LillamaError
from lillama_core.formats.base import Format

if TYPE_CHECKING:
    from lillama_core.architecture.targets.channels import Channels

CLOSE = 0.02
"""Relative difference of two computations of one thing, in half precision perhaps."""

OnRows = Callable[[TargetLinear, torch.Tensor], None]
"""Receives a map and rows [..., in] that it multiplies, or its output [..., out]."""


class TargetModule(ABC):
    """One module of a block with the maps that it holds, dense or low rank.

    ``block`` in the methods is the module from which the target's name is a path: a block, or the whole model.
    """

    kind: str
    """Name of this class of targets in the config of a compressed model."""
    runs: int = 1
    """In how many runs of equal length the outputs of its map lie, of which each may have become shorter."""

    def __init__(self, name: str, maps: tuple[TargetLinear, ...]) -> None:
        self.name = name
        self.maps = maps

    @classmethod
    @abstractmethod
    def at(cls, name: str, module: nn.Module) -> TargetModule:
        """Return the target for ``module``, dense or low rank already; raise LillamaError for one of another kind."""

    @abstractmethod
    def weight(self, block: nn.Module, map_: TargetLinear) -> torch.Tensor:
        """Return W [out, in] of the dense map ``map_``, a view on the block's parameter where that is possible."""

    @abstractmethod
    def bias(self, block: nn.Module, map_: TargetLinear) -> torch.Tensor | None:
        """Return the bias [out] of the map, dense or low rank, or None."""

    @abstractmethod
    def observe(
        self, block: nn.Module, on_input: OnRows | None = None, on_output: OnRows | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """While open, pass the inputs of each dense map to ``on_input`` and its outputs to ``on_output``.

        The tensors are part of the autograd graph. Maps that read the same tensor pass the same object.
        """

    @abstractmethod
    def replace(self, block: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        """Put ``layers``, by map name, in the place of maps that are dense or low rank; leave all others."""

    @abstractmethod
    def layer(self, block: nn.Module, map_: TargetLinear) -> nn.Module:
        """Return the module that `replace` has put in the place of ``map_``."""

    def path_of(self, map_: TargetLinear) -> str:
        """Return the path from the block of the module that `replace` puts in the place of ``map_``."""
        return self.name

    def nets(self) -> list[Channels]:
        """Return the channels between maps of this target; where each map is a target of its own there are none."""
        return []

    @abstractmethod
    def renamings(self, block: nn.Module, ranks: Mapping[str, int], format_: Format) -> list[tuple[str, str]]:
        """Return pairs of names (on disk, in memory) of the tensors whose names differ, as paths from ``block``.

        At least one name on disk must be that of a dense parameter whose shape is another, so that a loader which
        does not know the format stops with an error instead of filling the maps with random numbers.
        """

    def dense_tensors(self, block: nn.Module, dense: nn.Module) -> dict[str, torch.Tensor]:
        """Return the tensors of the dense modules that the low-rank ones of ``block`` stand for.

        Products of factors are multiplied out. By path from ``dense``, the block without low-rank modules, which is on
        the meta device and gives names and shapes. All parameters and stored buffers below `paths` are among them. A
        target that does not override it raises LillamaError.
        """
        raise LillamaError(f"the plugin of targets of kind {self.kind!r} does not say how {self.name!r} becomes dense")

    def idle(self, block: nn.Module) -> list[torch.Tensor]:
        """Return views on what the dense modules hold beside their maps and never multiply by; mostly nothing."""
        return []

    def paths(self, block: nn.Module) -> list[str]:
        """Return the paths from ``block`` of the modules that `replace` puts others in the place of."""
        return [self.name]

    def separate(self, block: nn.Module) -> None:
        """Put a linear layer in the place of every map, without a change of what is computed.

        For modules that hold several maps as one parameter; raises LillamaError where there is nothing to separate.
        """
        raise LillamaError(f"{self.name!r} holds no maps that could be separated; the config is of another model")

    def check(self, format_: Format) -> None:  # noqa: B027  most targets take any format
        """Raise UserError when the maps cannot be stored in ``format_``."""

    def local_name(self, map_: TargetLinear) -> str:
        """Return the map's name within its target; empty for the only map of a target."""
        return map_.name.removeprefix(self.name).removeprefix(".")


def make_hook(map_: TargetLinear, on_input: OnRows | None, on_output: OnRows | None) -> Callable[..., None]:
    """Return a forward hook for a module that multiplies its first input by ``map_``."""

    def hook(_: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        if on_input is not None:
            on_input(map_, inputs[0])
        if on_output is not None:
            on_output(map_, output)

    return hook


def is_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether both, of one shape, are the same but for rounding."""
    difference = (found.detach() - expected.detach()).float().norm()
    return bool(difference <= CLOSE * expected.detach().float().norm())
