"""What each position of a hidden stream counts for, by stack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class StackMasks:
    """The masks [rows, length] that matter to the blocks of one stack; 0 at padding."""

    own: torch.Tensor | None = None
    """Of the stack's own hidden stream; None: all positions count alike."""
    upstream: tuple[torch.Tensor, ...] = ()
    """Of the streams of the other stacks, whose outputs the blocks may read."""

    @classmethod
    def of(cls, stack: str, masks: Mapping[str, torch.Tensor]) -> StackMasks:
        """The masks of a batch as the blocks of ``stack`` see them."""
        return cls(masks.get(stack), tuple(mask for name, mask in masks.items() if name != stack))

    def weights(self, tensor: torch.Tensor, reads_upstream: bool = False) -> torch.Tensor | None:
        """What each row of ``tensor`` [..., d] counts for [n], or None when all count alike.

        ``reads_upstream`` says that the rows follow another stack's stream. Else they follow the stack's own, unless
        only another stack's has their number of positions.
        """
        upstream_first = (*self.upstream, self.own)
        own_first = (self.own, *self.upstream)
        for mask in upstream_first if reads_upstream else own_first:
            if mask is not None and _same_positions(tensor, mask):
                return mask.reshape(-1).to(tensor.device)
        return None


def _same_positions(tensor: torch.Tensor, mask: torch.Tensor) -> bool:
    """Whether the leading dimensions of ``tensor`` count the positions of ``mask``, flattened or not."""
    return tensor.shape[:-1] == mask.shape or (tensor.dim() == 2 and len(tensor) == mask.numel())


def upstream_tensors(arguments: Any) -> set[int]:
    """Addresses of the real-valued tensors among a block's recorded arguments; outputs of other stacks are there."""
    found: set[int] = set()
    if isinstance(arguments, torch.Tensor):
        if arguments.is_floating_point() and arguments.numel():
            found.add(arguments.data_ptr())
    elif isinstance(arguments, Mapping):
        for value in arguments.values():
            found |= upstream_tensors(value)
    elif isinstance(arguments, list | tuple):
        for value in arguments:
            found |= upstream_tensors(value)
    return found
