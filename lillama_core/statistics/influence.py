"""How much each block changes the hidden states that pass through it: Block Influence (ShortGPT, arXiv 2403.03853)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import cosine_similarity

from lillama_core.runtime.activations import ActivationStore
from lillama_core.runtime.harness import StackHarness
from lillama_core.runtime.weight_source import WeightSource
from lillama_core.system.memory import release_memory
from lillama_core.system.processes import ALONE, World
from lillama_core.system.progress import Progress


def block_influences(
    chain: Sequence[StackHarness],
    source: WeightSource,
    activations: ActivationStore,
    progress: Progress,
    world: World = ALONE,
) -> dict[tuple[str, int], float]:
    """1 - E[cos(h, h')] of what enters and leaves each block, by stack and number of the block.

    ``activations`` are those of the dense model for this process's rows; the mean is over the positions of all rows of
    all processes, without padding.
    """
    found: dict[tuple[str, int], float] = {}
    for position, harness in enumerate(chain):
        stream = activations.record(harness)
        for block in harness.blocks:
            entering = list(stream.hidden)
            stream.advance(source.block(block, activations.recorder.autocast_dtype), block)
            alike = positions = 0.0
            for before, after, masks in zip(entering, stream.hidden, stream.masks, strict=True):
                cosines = cosine_similarity(before.double(), after.double(), dim=-1).reshape(-1)
                weights = masks.weights(after)
                counts = torch.ones_like(cosines) if weights is None else weights.to(cosines)
                alike += (counts * cosines).sum().item()
                positions += counts.sum().item()
            alike, positions = world.sums([alike, positions])
            found[harness.stack, block.index] = 1 - alike / positions
            release_memory()
            progress.step(block.name)
        if position < len(chain) - 1:
            activations.keep_output(harness.stack, stream.hidden)
    return found
