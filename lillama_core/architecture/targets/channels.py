"""Channels: the inner features of a small net within a block, each of them in no more than a few maps.

Between the maps that widen a block's stream and the one that brings it back stand elementwise steps: an activation, a
product of two. What one channel gives depends on one row of every map before them, and enters one column of the map
behind. So a channel can be taken out whole, and every map stays a matrix, only smaller. Where gate and values are one
map, a channel is two of its rows. An expert of a mixture is such a net, and loses channels of its own. Names and shapes
say where that may be so; whether it is, is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from lillama_core.architecture.targets.linear_map import TargetLinear
from lillama_core.formats.base import empty_linear

if TYPE_CHECKING:
    from lillama_core.architecture.targets.base import TargetModule
    from lillama_core.architecture.targets.block import Block


@dataclass(frozen=True)
class Channels:
    """The ``size`` features between some maps of a block that write them and the one map that reads them."""

    sources: tuple[TargetLinear, ...]
    """[size, width] each; or one [2 size, width] that writes gate and values."""
    sink: TargetLinear
    """[width, size]."""
    in_turns: bool = False
    """Whether gate and values of one map are rows in turns, instead of one run after the other."""

    @property
    def name(self) -> str:
        """Path-like, from the block: ``mlp.down_proj.channels``."""
        return f"{self.sink.name}.channels"

    @property
    def size(self) -> int:
        return self.sink.in_features

    @property
    def runs(self) -> int:
        """How many rows of each source a channel is."""
        return self.sources[0].out_features // self.size

    def rows(self, kept: torch.Tensor) -> torch.Tensor:
        """The rows of each source that the channels ``kept`` are, in the order that the net expects."""
        runs = torch.arange(self.runs, device=kept.device)
        if self.in_turns:
            return (kept[:, None] * self.runs + runs).flatten()
        return (kept + runs[:, None] * self.size).flatten()


def find_channels(targets: Sequence[TargetModule], plain: Collection[str] = ()) -> tuple[Channels, ...]:
    """Return what may be channels; see `are_channels`.

    Of linear maps that have one parent shapes tell: between them are more features than they begin and end with. One
    map that writes gate and values counts where the two maps are all that their parent holds, which ``plain`` says: a
    state-space mixer looks alike from its maps. A target of several maps says itself which of them are nets.
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
    return (*found, *(channels for target in targets for channels in target.nets()))


def are_channels(
    block: Block, module: nn.Module, nets: Sequence[Channels], run: Callable[[nn.Module], torch.Tensor]
) -> bool:
    """Whether the channels of the ``nets`` of a dense block can be taken out, found by trying.

    ``run`` gives the output of the block, or of a copy of it, for some batch. With every second channel taken out of
    all maps the output must be the one that the whole block gives when the sinks do not read those channels.
    """
    kept = {channels: torch.arange(0, channels.size, 2) for channels in nets}
    weights = {c: weight_of(block, module, c.sink) for c in nets}
    biases = {c: bias_of(block, module, c.sink) for c in nets}
    with torch.no_grad():
        layers: dict[str, nn.Module] = {}
        for c in nets:
            silent = torch.zeros_like(weights[c]).index_copy_(1, kept[c].to(weights[c].device), weights[c][:, kept[c]])
            layers[c.sink.name] = plain_layer(silent, biases[c])
        expected = run(block.with_layers(module, layers))
        layers.clear()
        for c in nets:
            layers |= layers_without(block, module, c, kept[c], weights[c][:, kept[c]], biases[c])
        try:
            found = run(block.with_layers(module, layers))
        except (RuntimeError, ValueError, IndexError, AssertionError):
            # Something else than these maps knows how many there are.
            return False
        whole = run(module)
    # Of a batch in which those channels do nothing nothing is learnt.
    seen = (expected - whole).norm()
    return found.shape == expected.shape and bool((found - expected).norm() <= 1e-2 * seen)


def layers_without(
    block: Block,
    module: nn.Module,
    channels: Channels,
    kept: torch.Tensor,
    sink: torch.Tensor,
    bias: torch.Tensor | None,
) -> dict[str, nn.Module]:
    """Plain linear layers, by map, for the places of the maps of ``channels`` in ``module``, a dense block.

    The sources keep the rows of the channels ``kept``; ``sink`` [width, kept] and ``bias`` are what the map behind them
    becomes.
    """
    found: dict[str, nn.Module] = {}
    for source in channels.sources:
        own, shift = weight_of(block, module, source), bias_of(block, module, source)
        rows = channels.rows(kept).to(own.device)
        found[source.name] = plain_layer(own[rows], None if shift is None else shift[rows])
    return {**found, channels.sink.name: plain_layer(sink, bias)}


def weight_of(block: Block, module: nn.Module, map_: TargetLinear) -> torch.Tensor:
    """The weight [out, in] of a dense map."""
    return block.target_of(map_).weight(module, map_).detach()


def bias_of(block: Block, module: nn.Module, map_: TargetLinear) -> torch.Tensor | None:
    """The bias [out] of a map, if it has one."""
    bias = block.target_of(map_).bias(module, map_)
    return None if bias is None else bias.detach()


def plain_layer(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A linear layer of ``weight`` [out, in] and ``bias`` [out], which may be of a higher precision."""
    layer = empty_linear(weight.shape[1], weight.shape[0], bias is not None, weight.dtype, "meta")
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
    return layer


def filled(tensor: torch.Tensor, rows: int, runs: int = 1) -> torch.Tensor:
    """``tensor`` [n, ...] with zeros in the places of channels that were taken out, [rows, ...].

    They are put behind each of ``runs`` of equal length: which channels a net has lost does not matter.
    """
    parts = tensor.unflatten(0, (runs, -1))
    missing = parts.new_zeros(runs, (rows - len(tensor)) // runs, *tensor.shape[1:])
    return torch.cat([parts, missing], 1).flatten(0, 1)
