"""What enters the blocks of a stack: recorded for every batch, once, and looked at before it is relied on."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch

from lillama_core.architecture import Architecture
from lillama_core.blocks import BlockCall, BlockRunner, Parent, share_equal
from lillama_core.errors import LillamaError, UserError, is_out_of_memory, one_line
from lillama_core.modality import Inputs
from lillama_core.weights import ResidentSource

Recorded = tuple[list[list[BlockCall]], list[torch.Tensor]]
"""For every batch the other arguments of each block of a stack, and the hidden states that enter the first."""


@dataclass(frozen=True)
class Recorder:
    """Records what enters blocks, and makes the runners that play it back, on one device in one arithmetic."""

    architecture: Architecture
    device: torch.device
    autocast_dtype: torch.dtype | None
    """Of matrix products; None: fp32."""

    def record(self, parent: Parent, batches: list[Inputs]) -> Recorded:
        """The arguments of all blocks for every batch, and the hidden states that enter the first."""
        calls: list[list[BlockCall]] = []
        stream: list[torch.Tensor] = []
        # Another stack's blocks run for real on the way to this one's: they deserve the fast arithmetic, too.
        runs_blocks = len(self.architecture.stacks) > 1
        for inputs in batches:
            with self.runner([]).autocast() if runs_blocks else contextlib.nullcontext():
                hidden, found = parent.record(self.on_device(inputs))
            calls.append(share_equal(calls[-1] if calls else None, found))
            stream.append(hidden.cpu())
        return calls, stream

    def runner(self, calls: list[list[BlockCall]]) -> BlockRunner:
        return BlockRunner(self.architecture, calls, self.device, self.autocast_dtype)

    def on_device(self, inputs: Inputs) -> Inputs:
        return {k: v.to(self.device) for k, v in inputs.items()}

    def check(self, parent: Parent, inputs: Inputs, source: ResidentSource) -> None:
        """Blocks run one after the other must give what the model gives, or nothing that follows means anything.

        Raises UserError where they do not.
        """
        # Two rows: what a block is given besides the hidden states may depend on their number.
        short = {k: v[:2] for k, v in self.on_device(inputs).items()}
        calls, stream = self.record(parent, [short])
        runner = self.runner(calls)

        def run_live(index: int, entering: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
            with runner.autocast():
                module = source.block(parent.blocks[index])
                return self.architecture.call_block(module, entering.float(), args, kwargs)

        expected = parent.last_output(short, run_live)
        unsuitable = f"architecture {self.architecture.name!r} does not describe this model"
        try:
            with torch.no_grad():
                chained = stream[0].to(self.device)
                for block in parent.blocks:
                    chained = runner(source.block(block), block, 0, chained)
        except LillamaError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise UserError(
                f"the blocks of {parent.blocks[0].stack!r} cannot be run one by one: {unsuitable} ({one_line(error)})"
            ) from error
        # A wrong argument shows as a difference of the order of the values; rounding does not.
        difference = (chained - expected).norm() / expected.norm().clamp(min=1e-30)
        if not difference < 0.02:
            raise UserError(
                f"the blocks of {parent.blocks[0].stack!r} run one by one differ from the whole model by"
                f" {difference:.2%}: {unsuitable}"
            )
