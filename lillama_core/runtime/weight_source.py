"""Where the dense weights come from: one block at a time, of a model in memory or of files."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from lillama_core.models.loading import check_finite
from lillama_core.runtime.modules import exact
from lillama_core.system.memory import release_memory

if TYPE_CHECKING:
    from lillama_core.architecture.blocks import Block
    from lillama_core.models.shards import BlockReader


class WeightSource(Protocol):
    """Gives the dense model's blocks, one at a time, as fp32 modules that the caller owns."""

    def block(self, block: Block, arithmetic: torch.dtype | None = None) -> nn.Module:
        """A fresh fp32 copy of ``block`` on the compute device, in eval mode, without gradients.

        To run it as it is, and not to train it, ``arithmetic`` is that of autocast; see `runtime.modules.exact`.
        """
        ...


class ResidentSource:
    """Blocks of a model that is held in memory, in whatever dtype it was loaded."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = model
        self.device = device

    def block(self, block: Block, arithmetic: torch.dtype | None = None) -> nn.Module:
        module = copy.deepcopy(self.model.get_submodule(block.path))
        # A copy must run for itself, whatever stands in for the block in its model.
        module.__dict__.pop("forward", None)
        return exact(module, self.device, arithmetic)


class StreamedSource:
    """Blocks that are read from files when they are asked for, and the next one meanwhile."""

    def __init__(self, reader: BlockReader, device: torch.device) -> None:
        self.reader = reader
        self.device = device
        self._sound: set[str] = set()
        self._before = -1

    def block(self, block: Block, arithmetic: torch.dtype | None = None) -> nn.Module:
        paths = self.reader.paths
        position = paths.index(block.path)
        module = self.reader.block(block.path)
        # Passes go up or down: what follows is on the other side of the one that came before.
        following = position + (1 if position >= self._before else -1)
        self._before = position
        if 0 <= following < len(paths):
            self.reader.prefetch(paths[following])
        if block.path not in self._sound:
            check_finite(module, block.path)
            self._sound.add(block.path)
        return exact(module, self.device, arithmetic)


def run_blocks_from(model: nn.Module, paths: Iterable[str], load: Callable[[str], nn.Module]) -> None:
    """Let ``model`` run what ``load`` gives for the path of a block in the place of that block, and drop it again."""

    def forward_of(path: str) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            # Without its hooks, which run for the call that this stands in for.
            found = load(path).forward(*args, **kwargs)
            # Blocks of low rank are all of other sizes, so that what one leaves may not hold the next: without
            # this a run of 176 of them reached 3.9 GB, where dense ones of one size took 0.6.
            release_memory()
            return found

        return forward

    for path in paths:
        # Not by a module put there: what is asked of the block besides, its attributes, is still answered.
        model.get_submodule(path).__dict__["forward"] = forward_of(path)
