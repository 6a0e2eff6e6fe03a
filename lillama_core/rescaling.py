"""Predicted against measured: how much more, or less, an error in one part of the model costs than its energies say.

Energies add up the errors of maps and of positions as if they were independent (K-FAC), and to second order. Some parts
of a model are further from that than others: the first block of Whisper's decoder costs ten times what its energies
say, the others four times. So each part is made low rank by itself once, untrained, and the divergence of the
predictions is set against the energies that were left out. Their quotient scales the part's energies before the ranks
are shared out for good.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from lillama_core.allocation import Spectrum
from lillama_core.architecture import Block
from lillama_core.blocks import BlockRunner, Parent
from lillama_core.fidelity import measure_fidelity
from lillama_core.modality import Samples
from lillama_core.plan import RankPlan
from lillama_core.profile import Profile
from lillama_core.weights import WeightSource

PARTS = 10
"""Parts of a stack that are measured apart, each with as many blocks as the others or one more."""


@dataclass(frozen=True)
class Part:
    """Consecutive blocks of a stack, and what their low rank alone costs."""

    blocks: list[Block]
    predicted: float
    """Sum of the energies that the plan leaves out: twice the divergence, in nats a row."""
    measured: float
    """The same as it was measured."""


def parts_of(blocks: list[Block], parts: int) -> list[list[Block]]:
    """``blocks`` in at most ``parts`` runs of about equal length."""
    bounds = [round(i * len(blocks) / parts) for i in range(parts + 1)]
    return [blocks[a:b] for a, b in itertools.pairwise(bounds) if b > a]


def measure_parts(
    parent: Parent,
    source: WeightSource,
    runner: BlockRunner,
    batches: list[Samples],
    stream: list[torch.Tensor],
    profile: Profile,
    plan: RankPlan,
    low_rank: Callable[[Block], nn.Module],
) -> Iterator[Part]:
    """Every part of a stack in turn; ``low_rank`` gives a block as ``plan`` has it, untrained.

    ``stream`` is what enters the first block for each of ``batches``, whose calls ``runner`` holds.
    """
    stream = list(stream)
    ends = list(stream)
    for block in parent.blocks:
        runner.advance(source.block(block), block, ends)
    rest = list(parent.blocks)
    for part in parts_of(parent.blocks, PARTS):
        rest = rest[len(part) :]
        changed = list(stream)
        for block in part:
            runner.advance(low_rank(block), block, changed)
            if rest:
                runner.advance(source.block(block), block, stream)
        for block in rest:
            runner.advance(source.block(block), block, changed)
        found = measure_fidelity(parent, list(zip(batches, ends, changed, strict=True)), runner.autocast_dtype, {})
        rows = sum(len(batch) for batch in batches)
        divergence, tokens = found["divergence"], found["tokens"]
        # Of outputs that are no predictions the error is in a unit of its own: all parts of a model share it.
        measured = found["relative_error"] if divergence is None else 2 * divergence * tokens / rows
        yield Part(part, sum(left_out(block, profile, plan) for block in part), measured)


def left_out(block: Block, profile: Profile, plan: RankPlan) -> float:
    """The energies of a block's maps beyond their ranks in ``plan``."""
    found, _ = profile.load(block)
    ranks = {m.name: plan.ranks.get(block.full_name(m)) for m in block.maps}
    return sum(found[name].spectrum.energies[rank:].sum().item() for name, rank in ranks.items() if rank is not None)


def scales_of(parts: list[Part]) -> dict[str, float]:
    """What the energies of each block count for, by its name; a part of which nothing is left out is as the others."""
    predicted, measured = sum(p.predicted for p in parts), sum(p.measured for p in parts)
    if not (predicted > 0 and measured > 0):
        return {}
    typical = measured / predicted
    return {
        block.name: part.measured / part.predicted if part.predicted > 0 and part.measured > 0 else typical
        for part in parts
        for block in part.blocks
    }


def rescaled(spectrum: Spectrum, scale: float) -> Spectrum:
    """A spectrum whose errors count ``scale`` times as much."""
    return replace(spectrum, energies=spectrum.energies * scale)
