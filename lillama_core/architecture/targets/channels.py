"""Channels: the inner features of a small net within a block, each of them in no more than a few maps.

Between the maps that widen a block's stream and the one that brings it back stand elementwise steps: an activation, a
product of two. What one channel gives depends on one row of every map before them, and enters one column of the map
behind. So a channel can be taken out whole, and every map stays a matrix, only smaller. Where gate and values are one
map, its rows are two runs, and a channel is a row of each. Names and shapes say where that may be so; whether it is, is
tried.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from lillama_core.architecture.targets.linear_map import TargetLinear
from lillama_core.runtime.modules import shared_copy

if TYPE_CHECKING:
    from lillama_core.architecture.targets.base import TargetModule
    from lillama_core.architecture.targets.block import Block


@dataclass(frozen=True)
class Channels:
    """The ``size`` features between some maps of a block that write them and the one map that reads them."""

    sources: tuple[TargetLinear, ...]
    """[size, width] each, with size > width; or one [2 size, width] that writes gate and values after each other."""
    sink: TargetLinear
    """[width, size]."""

    @property
    def name(self) -> str:
        """Path-like, from the block: ``mlp.down_proj.channels``."""
        return f"{self.sink.name}.channels"

    @property
    def size(self) -> int:
        return self.sink.in_features

    @property
    def runs(self) -> int:
        """How many rows of each source a channel is; those of all channels lie in as many runs."""
        return self.sources[0].out_features // self.size


def find_channels(targets: Sequence[TargetModule], plain: Collection[str] = ()) -> tuple[Channels, ...]:
    """Return what may be channels, by the shapes of the linear maps that have one parent; see `are_channels`.

    One map that writes gate and values counts where the two maps are all that their parent holds, which ``plain`` says:
    a state-space mixer looks alike from its maps.
    """
    maps = [m for target in targets if target.kind == "linear" for m in target.maps]
    found = []
    for sink in maps:
        size, parent = sink.in_features, sink.name.rpartition(".")[0]
        near = [m for m in maps if m.name.rpartition(".")[0] == parent]
        sources = tuple(m for m in near if m.out_features == size and m.in_features < size)
        readers = [m for m in near if m.in_features == size]
        if not sources and len(near) == 2 and parent in plain:
            sources = tuple(m for m in near if m.out_features == 2 * size and m.in_features < size)
        if sources and len(readers) == 1 and sink.out_features < size:
            found.append(Channels(sources, sink))
    return tuple(found)


def are_channels(block: Block, module: nn.Module, channels: Channels, run: Callable[[nn.Module], torch.Tensor]) -> bool:
    """Whether channels of a dense block can be taken out, found by trying.

    ``run`` gives the output of the block, or of a copy of it, for some batch. With every second channel taken out of
    all maps the output must be the one that the whole block gives when the sink does not read those channels.
    """
    kept = torch.arange(0, channels.size, 2)
    weight = weight_of(block, module, channels.sink)
    masked, narrow = shared_copy(module), shared_copy(module)
    silent = torch.zeros_like(weight)
    silent[:, kept] = weight[:, kept]
    _put(block, masked, channels.sink, silent, bias_of(block, module, channels.sink))
    take_out(block, narrow, channels, kept, weight[:, kept], bias_of(block, module, channels.sink))
    with torch.no_grad():
        expected = run(masked)
        try:
            found = run(narrow)
        except (RuntimeError, ValueError, IndexError, AssertionError):
            # Something else than these maps knows how many there are.
            return False
        whole = run(module)
    # Of a batch in which those channels do nothing nothing is learnt.
    seen = (expected - whole).norm()
    return found.shape == expected.shape and bool((found - expected).norm() <= 1e-2 * seen)


def take_out(
    block: Block,
    module: nn.Module,
    channels: Channels,
    kept: torch.Tensor,
    sink: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    """Put plain linear layers in the places of the maps of ``channels`` in ``module``, a dense block.

    The sources keep their rows ``kept``; ``sink`` [width, kept] and ``bias`` are what the map behind them becomes.
    """
    for source in channels.sources:
        own, shift = weight_of(block, module, source), bias_of(block, module, source)
        rows = torch.cat([kept + run * channels.size for run in range(channels.runs)]).to(own.device)
        _put(block, module, source, own[rows], None if shift is None else shift[rows])
    _put(block, module, channels.sink, sink, bias)


def weight_of(block: Block, module: nn.Module, map_: TargetLinear) -> torch.Tensor:
    """The weight [out, in] of a dense map."""
    return _target(block, map_).weight(module, map_).detach()


def bias_of(block: Block, module: nn.Module, map_: TargetLinear) -> torch.Tensor | None:
    """The bias [out] of a map, if it has one."""
    bias = _target(block, map_).bias(module, map_)
    return None if bias is None else bias.detach()


def _target(block: Block, map_: TargetLinear) -> TargetModule:
    return next(target for target in block.targets if map_ in target.maps)


def _put(block: Block, module: nn.Module, map_: TargetLinear, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    layer = nn.utils.skip_init(
        nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype, device=weight.device
    )
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
    _target(block, map_).replace(module, {map_.name: layer})
