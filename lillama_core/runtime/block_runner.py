"""Running single blocks, with the arguments that the model gives them played back."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lillama_core.errors import LillamaError

if TYPE_CHECKING:
    from lillama_core.architecture.base import Architecture
    from lillama_core.architecture.blocks import Block


@dataclass
class BlockInputs:
    """The arguments that a block gets besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    added: torch.Tensor | None = None
    """What the model adds to the hidden states behind the block, before the next one; fp32."""


def share_equal(previous: list[BlockInputs] | None, calls: list[BlockInputs]) -> list[BlockInputs]:
    """``calls`` with tensors that equal those of ``previous`` replaced by them.

    Masks and rotary tables are the same for every batch of one shape; holding one copy keeps memory flat.
    """
    if previous is None:
        return calls
    known: dict[int, Any] = {}

    def shared(old: Any, new: Any) -> Any:
        if isinstance(new, torch.Tensor):
            if id(new) not in known:
                same = isinstance(old, torch.Tensor) and old.shape == new.shape and torch.equal(old, new)
                known[id(new)] = (old if same else new, new)
            return known[id(new)][0]
        if isinstance(new, tuple) and isinstance(old, tuple) and len(old) == len(new):
            return tuple(shared(o, n) for o, n in zip(old, new, strict=True))
        return new

    return [
        BlockInputs(
            shared(before.args, call.args),
            {k: shared(before.kwargs.get(k), v) for k, v in call.kwargs.items()},
            shared(before.added, call.added),
        )
        for before, call in zip(previous, calls, strict=True)
    ]


class BlockRunner:
    """Runs single blocks on batches of hidden states, with the arguments recorded for each batch."""

    def __init__(
        self,
        architecture: Architecture,
        calls: list[list[BlockInputs]],
        device: torch.device,
        autocast_dtype: torch.dtype | None,
    ) -> None:
        self.architecture = architecture
        self.calls = calls
        """For each batch, for each block of the stack."""
        self.device = device
        self.autocast_dtype = autocast_dtype

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Half-precision matrix products where the device is good at them; everything else stays fp32."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def inputs(self, block: Block, batch: int) -> BlockInputs:
        """The arguments of ``block`` for ``batch`` besides the hidden states."""
        return self.calls[batch][block.index]

    def __call__(self, module: nn.Module, block: Block, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output in fp32 for the hidden states of ``batch`` [rows, length, width]."""
        call = self.calls[batch][block.index]
        with self.autocast():
            out = self.architecture.call_block(module, hidden.to(self.device), call.args, call.kwargs)
        # Once infinite, every later number is; with gradients the loss is looked at instead. A sum is made
        # without a table of flags, and is never finite when one of them is not.
        if not torch.is_grad_enabled() and not out.sum(dtype=torch.float32).isfinite() and not out.isfinite().all():
            raise LillamaError(
                f"block {block.path} gives activations that are infinite or not a number; its weights, or the"
                " rounding of its factors, are too large for the arithmetic"
            )
        between = self.architecture.between_blocks(block.index, out.float())
        return between if call.added is None else between + call.added.to(between.device)

    def advance(self, module: nn.Module, block: Block, stream: list[torch.Tensor]) -> None:
        """Replace every batch of a stream by the block's output for it: one stream in memory, not two."""
        with torch.no_grad():
            for i, hidden in enumerate(stream):
                stream[i] = self(module, block, i, hidden).to(hidden.device)
