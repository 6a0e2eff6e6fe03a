"""Predicted against measured: how much more, or less, the errors of a map cost than its energies say.

Energies add up the errors of maps and of positions as if they were independent (K-FAC), and to second order. Some
blocks and some kinds of map are further from that than others: in SmolLM2 a value projection costs three times what its
energies say, the query projection beside it two thirds. So one part of the model at a time is made low rank, untrained,
and the divergence of the predictions is set against the energies that were left out: first up to ten runs of
consecutive blocks of a stack, then each kind of map in all of its blocks. The product of both quotients scales a map's
energies before the ranks are shared out for good.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from lillama_core.allocation import Spectrum
from lillama_core.architecture.blocks import Block
from lillama_core.architecture.targets.linear_map import kind_of
from lillama_core.evaluation.fidelity import measure_fidelity
from lillama_core.initialization import Decomposition
from lillama_core.runtime.activations import StackActivations
from lillama_core.runtime.harness import StackHarness
from lillama_core.runtime.weight_source import WeightSource

ByMap = Mapping[str, float]
"""A number for maps of a block, by the names that they have there."""
Ranks = Mapping[str, int]
"""Likewise."""


@dataclass(frozen=True)
class Ablation:
    """A stack of the dense model in which maps are made low rank for a while, and a few rows to see what it does."""

    harness: StackHarness
    source: WeightSource
    activations: StackActivations
    """What enters the stack for the rows; its stream stays as it is."""
    low_rank: Callable[[Block, Ranks], nn.Module]
    """A dense block with untrained factors of these ranks."""

    def advance(
        self, stream: Sequence[torch.Tensor], blocks: Sequence[Block], ranks: Mapping[str, Ranks]
    ) -> list[torch.Tensor]:
        """What comes out of consecutive ``blocks`` of which some have ``ranks``, by their names."""
        stream = list(stream)
        for block in blocks:
            mine = ranks.get(block.name)
            self.activations.runner.advance(
                self.low_rank(block, mine) if mine else self.source.block(block), block, stream
            )
        return stream

    def cost(self, dense: Sequence[torch.Tensor], changed: Sequence[torch.Tensor]) -> float:
        """Twice the divergence of the predictions, in nats a row, from what the last block gives in either case.

        Of outputs that are no predictions the relative error, which is as good for comparing parts of one model.
        """
        held = list(zip(self.activations.batches, dense, changed, strict=True))
        found = measure_fidelity(self.harness, held, self.activations.runner.autocast_dtype, {})
        if found["divergence"] is None:
            return float(found["relative_error"])
        return float(2 * found["divergence"] * found["tokens"] / sum(len(batch) for batch in self.activations.batches))


def measure_scales(
    ablation: Ablation,
    ranks: Mapping[str, Ranks],
    left_out: Mapping[str, ByMap],
    parts: int,
    report: Callable[[str], None],
) -> dict[str, float]:
    """What the energies of each map of a stack count for, by its path.

    ``ranks`` and ``left_out``, the energies beyond them, are by the names of blocks. At most ``parts`` runs of blocks
    are measured apart. ``report`` hears what has been measured.
    """
    blocks = ablation.harness.blocks
    dense = ablation.advance(ablation.activations.hidden, blocks, {})
    entering, rest = ablation.activations.hidden, blocks
    measured: list[tuple[Sequence[Block], float, float]] = []
    for part in parts_of(blocks, parts):
        low = {block.name: ranks[block.name] for block in part if block.name in ranks}
        cost = ablation.cost(dense, ablation.advance(entering, rest, low)) if low else 0.0
        measured.append((part, cost, sum(sum(left_out[name].values()) for name in low)))
        rest = rest[len(part) :]
        entering = ablation.advance(entering, part, {}) if rest else entering
        report(part[-1].name)
    typical = safe_ratio(sum(cost for _, cost, _ in measured), sum(predicted for _, _, predicted in measured), 1.0)
    of_block = {
        block.name: safe_ratio(cost, predicted, typical) for part, cost, predicted in measured for block in part
    }

    of_kind: dict[str, float] = {}
    for kind in kinds_of(ranks):
        low = {name: {n: r for n, r in mine.items() if kind_of(n) == kind} for name, mine in ranks.items()}
        expected = sum(of_block[name] * left_out[name][n] for name, mine in low.items() for n in mine)
        of_kind[kind] = safe_ratio(
            ablation.cost(dense, ablation.advance(ablation.activations.hidden, blocks, low)), expected, 1.0
        )
        report(kind)
    return {
        block.full_name(map_): of_block[block.name] * of_kind.get(kind_of(map_.name), 1.0)
        for block in blocks
        for map_ in block.maps
    }


def truncation_error(found: Mapping[str, Decomposition], ranks: Ranks) -> dict[str, float]:
    """The energies of a block's maps beyond their ranks."""
    return {name: found[name].spectrum.squared_singular_values[rank:].sum().item() for name, rank in ranks.items()}


def safe_ratio(cost: float, predicted: float, otherwise: float) -> float:
    """Measured over predicted, or ``otherwise`` where there is nothing to divide."""
    return cost / predicted if cost > 0 and predicted > 0 else otherwise


def parts_of(blocks: Sequence[Block], parts: int) -> list[Sequence[Block]]:
    """``blocks`` in at most ``parts`` runs of about equal length."""
    bounds = [round(i * len(blocks) / parts) for i in range(parts + 1)]
    return [blocks[a:b] for a, b in itertools.pairwise(bounds) if b > a]


def kinds_of(ranks: Mapping[str, Ranks]) -> list[str]:
    """The kinds of the maps that have ranks, in the order in which they come."""
    return list(dict.fromkeys(kind_of(n) for mine in ranks.values() for n in mine))


def scaled_spectrum(spectrum: Spectrum, scale: float) -> Spectrum:
    """A spectrum whose errors count ``scale`` times as much."""
    return replace(spectrum, squared_singular_values=spectrum.squared_singular_values * scale)
