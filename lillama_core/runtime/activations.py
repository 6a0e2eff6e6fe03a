"""Activations of calibration rows: who owns them, and for how long.

An `ActivationStore` belongs to one version of a model (dense, or compressed so far) and some batches of rows. Asked for
a stack, it gives `StackActivations`: the hidden stream at the first block, the recorded other arguments of every block,
and the masks. A stack that has been run leaves its last output in the store, where the stacks that read it find it; the
rest goes when `StackActivations` goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from lillama_core.data.modality import Samples
from lillama_core.runtime.block_runner import BlockRunner
from lillama_core.runtime.harness import StackHarness
from lillama_core.runtime.masks import StackMasks
from lillama_core.runtime.states import rows_of

if TYPE_CHECKING:
    from lillama_core.architecture.blocks import Block
    from lillama_core.runtime.recording import Recorder


@dataclass
class StackActivations:
    """What the blocks of one stack are fed, batch by batch."""

    batches: list[Samples]
    hidden: list[torch.Tensor]
    """The hidden stream [rows, length, width] at the block that comes next; on the CPU."""
    masks: list[StackMasks]
    runner: BlockRunner
    """Holds the recorded other arguments of every block."""

    def advance(self, module: nn.Module, block: Block) -> None:
        """Replace the stream by what ``block``, run as ``module``, gives for it: one stream in memory, not two."""
        self.runner.advance(module, block, self.hidden)

    def fork(self) -> StackActivations:
        """A second stream over the same recorded arguments."""
        return StackActivations(self.batches, list(self.hidden), self.masks, self.runner)


class ActivationStore:
    """The activations of one version of a model on ``batches``, and what its finished stacks gave."""

    def __init__(self, recorder: Recorder, batches: Sequence[Samples]) -> None:
        self.recorder = recorder
        self.batches = list(batches)
        self._outputs: dict[str, list[torch.Tensor]] = {}

    def record(self, harness: StackHarness) -> StackActivations:
        """Record what enters the blocks of a stack.

        Stacks below it that this store has the output of are not run again, if nothing else of them reaches the blocks.
        """
        below = self.outputs_below(harness)
        upstream = {other.stack: hidden for other, hidden in zip(harness.earlier, below, strict=False)}
        calls, hidden = self.recorder.record(harness, [batch.inputs for batch in self.batches], upstream)
        masks = [StackMasks.of(harness.stack, batch.masks) for batch in self.batches]
        return StackActivations(self.batches, hidden, masks, self.recorder.runner(calls))

    def outputs_below(self, harness: StackHarness) -> list[list[torch.Tensor]]:
        """What each earlier stack gave for every batch, if that is known and all that the blocks get of them."""
        known = [self._outputs[below.stack] for below in harness.earlier if below.stack in self._outputs]
        complete = harness.depends_only_on_upstream_output and len(known) == len(harness.earlier)
        return known if complete else []

    def keep_output(self, stack: str, hidden: Sequence[torch.Tensor]) -> None:
        """Keep what the last block of ``stack`` gave for every batch, for the stacks that read it."""
        self._outputs[stack] = list(hidden)

    def forget_outputs(self, *stacks: str) -> None:
        """Drop the outputs of ``stacks``, which nothing that is still to be recorded reads; without, those of all."""
        for stack in stacks or tuple(self._outputs):
            self._outputs.pop(stack, None)

    def select(self, indices: Sequence[int]) -> ActivationStore:
        """A store of some of the batches, in the same memory."""
        chosen = ActivationStore(self.recorder, [self.batches[i] for i in indices])
        chosen._outputs = {stack: [hidden[i] for i in indices] for stack, hidden in self._outputs.items()}
        return chosen

    def first_rows(
        self, rows: int, rows_per_batch: int, device: torch.device
    ) -> tuple[ActivationStore, list[tuple[int, slice]]]:
        """A store of the first ``rows`` rows on ``device``, in batches of at most ``rows_per_batch``.

        And for each of these the position of the batch that it is a part of, and which rows of it.
        """
        chosen = ActivationStore(self.recorder, [])
        chosen._outputs = {stack: [] for stack in self._outputs}
        taken: list[tuple[int, slice]] = []
        for index, batch in enumerate(self.batches):
            for start in range(0, len(batch), rows_per_batch):
                stop = min(start + min(rows_per_batch, rows), len(batch))
                if rows <= 0:
                    return chosen, taken
                taken.append((index, slice(start, stop)))
                chosen.batches.append(batch.part(start, stop).to(device))
                for stack, hidden in self._outputs.items():
                    chosen._outputs[stack].append(rows_of(hidden[index], taken[-1][1], len(batch)).to(device))
                rows -= stop - start
        return chosen, taken
