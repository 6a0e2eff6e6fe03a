"""Gradients from the blocks of one stack to what the stacks below it gave.

A block's other arguments may be made of an earlier stack's output: a decoder's blocks read what the encoder says,
behind a norm. Blocks are run one at a time, so that the graph is cut at these arguments: each stands as a leaf that
gathers its gradient over all blocks, and is tied to the earlier output again when the first block has been passed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lillama_core.data.modality import Inputs
from lillama_core.runtime.block_runner import BlockInputs

if TYPE_CHECKING:
    from lillama_core.runtime.harness import StackHarness
    from lillama_core.runtime.recording import Recorder


class LinkedInputs:
    """What enters the blocks of a stack for one batch, and the way back to the outputs of earlier stacks."""

    def __init__(
        self, recorder: Recorder, harness: StackHarness, inputs: Inputs, earlier: Sequence[torch.Tensor]
    ) -> None:
        """``earlier`` is what the last blocks of all earlier stacks give; empty where the model runs them itself."""
        self._earlier = [hidden.detach().to(recorder.device).requires_grad_(True) for hidden in earlier]
        with recorder.runner([]).autocast():
            hidden, calls = harness.record(recorder.on_device(inputs), self._earlier, with_graph=True)
        # Where nothing of an earlier stack enters the first block there is no way back from it.
        self._hidden = hidden if hidden.requires_grad else None
        self._tied: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.calls = [
            BlockInputs(*(self._cut(part) for part in (call.args, call.kwargs, call.added))) for call in calls
        ]
        """The other arguments of every block, cut off from the graph."""

    @property
    def leaves(self) -> list[torch.Tensor]:
        """The arguments that gather gradients, in the order in which they were met."""
        return [leaf for _, leaf in self._tied.values()]

    def _cut(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if not value.requires_grad:
                return value
            if id(value) not in self._tied:
                self._tied[id(value)] = (value, value.detach().requires_grad_(True))
            return self._tied[id(value)][1]
        if isinstance(value, dict):
            return {k: self._cut(v) for k, v in value.items()}
        if isinstance(value, list | tuple) and type(value) in (list, tuple):
            return type(value)(self._cut(v) for v in value)
        return value

    def pull(self, gradient: torch.Tensor) -> list[torch.Tensor]:
        """The gradients at the outputs of the earlier stacks; ``gradient`` is that at the entry of the first block."""
        ends = [(tied, leaf.grad) for tied, leaf in self._tied.values() if leaf.grad is not None]
        if self._hidden is not None:
            ends.append((self._hidden, gradient.to(self._hidden.device)))
        if ends:
            torch.autograd.backward([tensor for tensor, _ in ends], [given for _, given in ends])
        return [torch.zeros_like(hidden) if hidden.grad is None else hidden.grad for hidden in self._earlier]
