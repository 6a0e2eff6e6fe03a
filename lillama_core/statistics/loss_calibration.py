"""Predicted against measured: how much more, or less, the errors of a map cost than its energies say.

Energies add up the errors of maps and of positions as if they were independent (K-FAC), and to second order. Some
blocks and some kinds of map are further from that than others: in SmolLM2 a value projection costs three times what its
energies say, the query projection beside it two thirds. So one part of the model at a time is made low rank, untrained,
and the divergence of the predictions is set against the energies that were left out: up to ten runs of consecutive
blocks of a stack, and each kind of map in all of its blocks. The product of both quotients scales a map's energies
before the ranks are shared out for good. All of these variants go through the blocks side by side.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from lillama_core.allocation import ChannelCurve, Spectrum
from lillama_core.architecture.blocks import Block
from lillama_core.architecture.targets.channels import Channels
from lillama_core.architecture.targets.linear_map import kind_of
from lillama_core.evaluation.fidelity import measure_costs
from lillama_core.runtime.activations import ActivationStore
from lillama_core.runtime.harness import StackHarness
from lillama_core.runtime.weight_source import WeightSource
from lillama_core.system.memory import release_memory
from lillama_core.system.processes import ALONE, World
from lillama_core.system.progress import Progress

ByMap = Mapping[str, float]
"""A number for maps of a block, by the names that they have there."""
Ranks = Mapping[str, int]
"""Likewise; and by the names of channels, how many of these stay."""


@dataclass(frozen=True)
class Variant:
    """The dense model with some of its maps low rank, untrained."""

    name: str
    """For the progress."""
    ranks: Mapping[str, Ranks]
    """By the names of blocks."""


@dataclass(frozen=True)
class Ablation:
    """A chain of stacks of the dense model in which maps are made low rank, and a few rows to see what it does."""

    chain: Sequence[StackHarness]
    source: WeightSource
    activations: ActivationStore
    """Of the dense model, for the rows."""
    compressed: Callable[[Block, nn.Module, Ranks], nn.Module]
    """A dense block with untrained factors of these ranks in it, and without channels; what is given stays as it is."""
    progress: Progress
    world: World = ALONE
    """The processes that have the rows."""

    def costs(self, variants: Sequence[Variant]) -> list[float]:
        """What the predictions of each variant diverge from the dense model's, in one pass over the blocks.

        Twice the divergence, in nats a row; of outputs that are no predictions the relative error, which is as good for
        comparing parts of one model. Each block is read once, and a variant takes part from where it first differs.
        """
        stores: list[ActivationStore | None] = [None] * len(variants)
        dense = self.activations
        for position, harness in enumerate(self.chain):
            below = dense.record(harness)
            streams = [None if store is None else store.record(harness) for store in stores]
            for block in harness.blocks:
                module = self.source.block(block, dense.recorder.autocast_dtype)
                for i, variant in enumerate(variants):
                    mine = variant.ranks.get(block.name, {})
                    if mine and streams[i] is None:
                        streams[i] = below.fork()
                    stream = streams[i]
                    if stream is not None:
                        stream.advance(self.compressed(block, module, mine) if mine else module, block)
                below.advance(module, block)
                release_memory()
                self.progress.step(block.name)
            if position < len(self.chain) - 1:
                for i, stream in enumerate(streams):
                    if stream is not None:
                        store = stores[i] = stores[i] or dense.select(range(len(dense.batches)))
                        store.keep_output(harness.stack, stream.hidden)
                dense.keep_output(harness.stack, below.hidden)
        changed = [stream.hidden for stream in streams if stream is not None]
        found = iter(
            measure_costs(
                self.chain[-1], below.batches, below.hidden, changed, dense.recorder.autocast_dtype, self.world
            )
        )
        return [0.0 if stream is None else next(found) for stream in streams]


@dataclass(frozen=True)
class StackErrors:
    """A stack's maps at some ranks, and what is predicted to be lost."""

    blocks: Sequence[Block]
    ranks: Mapping[str, Ranks]
    """By the names of blocks."""
    left_out: Mapping[str, Callable[[Ranks], ByMap]]
    """By the names of blocks, what tells the energies that some of the ranks leave out: `predicted_errors`."""

    def variants(self, parts: int) -> list[Variant]:
        """First at most ``parts`` runs of blocks, then each kind of map in all blocks."""
        found = [
            Variant(part[-1].name, {b.name: self.ranks[b.name] for b in part if b.name in self.ranks})
            for part in parts_of(self.blocks, parts)
        ]
        for kind in kinds_of(self.ranks):
            low = {name: {n: r for n, r in mine.items() if kind_of(n) == kind} for name, mine in self.ranks.items()}
            found.append(Variant(kind, low))
        return found

    def predicted(self, parts: int) -> list[float]:
        """The energies that each of the `variants` leaves out, all together."""
        return [sum(self._lost(name, mine) for name, mine in v.ranks.items()) for v in self.variants(parts)]

    def scales(self, parts: int, costs: Sequence[float]) -> dict[str, float]:
        """What the energies of each map count for, by its path; ``costs`` are those of the `variants`."""
        runs, variants = parts_of(self.blocks, parts), self.variants(parts)
        predicted = self.predicted(parts)[: len(runs)]
        of_runs, of_kinds = costs[: len(runs)], costs[len(runs) :]
        typical = safe_ratio(sum(of_runs), sum(predicted), 1.0)
        of_block = {
            block.name: safe_ratio(cost, expected, typical)
            for run, cost, expected in zip(runs, of_runs, predicted, strict=True)
            for block in run
        }
        of_kind = {}
        for variant, cost in zip(variants[len(runs) :], of_kinds, strict=True):
            expected = sum(of_block[name] * self._lost(name, mine) for name, mine in variant.ranks.items())
            of_kind[variant.name] = safe_ratio(cost, expected, 1.0)
        return {
            block.path_of(name): of_block[block.name] * of_kind.get(kind_of(name), 1.0)
            for block in self.blocks
            for name in [*(m.name for m in block.maps), *(c.name for c in block.channels)]
        }

    def _lost(self, name: str, ranks: Ranks) -> float:
        return sum(self.left_out[name](ranks).values())


def predicted_errors(
    spectra: Mapping[str, Spectrum], curves: Mapping[str, ChannelCurve], channels: Sequence[Channels], ranks: Ranks
) -> dict[str, float]:
    """The energies of a block's maps beyond their ranks, and what its ``channels`` cost that are taken out.

    As an allocator counts them: errors of maps between which channels are taken out are of those that stay.
    """
    found, shares = dict[str, float](), dict[str, float]()
    for own in channels:
        if own.name in ranks:
            curve = curves[own.name]
            share = float(curve.shares[curve.counts == ranks[own.name]])
            shares |= {m.name: share for m in (*own.sources, own.sink)}
    for name, number in ranks.items():
        if name in curves:
            curve = curves[name]
            found[name] = float(curve.errors[curve.counts == number])
        else:
            found[name] = shares.get(name, 1.0) * spectra[name].squared_singular_values[number:].sum().item()
    return found


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
