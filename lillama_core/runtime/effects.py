"""Whether what maps give matters to what their blocks give: found by a gradient, before it is relied on."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch import nn

from lillama_core.errors import UserError

if TYPE_CHECKING:
    from lillama_core.architecture.blocks import Block
    from lillama_core.architecture.targets.linear_map import TargetLinear
    from lillama_core.runtime.block_runner import BlockRunner


class Effects:
    """Which maps of the blocks of a stack have an effect on the output of their block.

    A map that multiplies rows in vain would be taken for useless, and made as small as can be. It may be so in a block
    or two, whose weights are zero. In all blocks it is a mistake: they read what an earlier run of them has left. A map
    that no row is sent to, such as an expert's, says nothing either way.
    """

    def __init__(self) -> None:
        self._alike: dict[str, list[str]] = defaultdict(list)
        """Pattern of names within a block -> the paths from the model of such maps that multiplied rows."""
        self._reached: dict[str, torch.Tensor] = {}
        """Path -> whether a gradient came back to the map; on the device until all are asked for at once."""

    def look(self, block: Block, module: nn.Module, runner: BlockRunner, hidden: torch.Tensor) -> torch.Tensor:
        """Run ``block`` on ``hidden``, which enters it in the first batch, and return its output.

        It must have been run for that batch before: what it has kept of it would make no difference otherwise.
        """

        def watch(map_: TargetLinear, output: torch.Tensor) -> None:
            name = block.full_name(map_)
            if not output.numel():
                return
            if name not in self._reached:
                self._alike[map_.name if map_.group is None else f"{map_.group}.*"].append(name)
                self._reached[name] = torch.zeros((), dtype=torch.bool, device=output.device)
            if not output.requires_grad:
                output.requires_grad_(True)
            output.register_hook(lambda gradient: self._reached.update({name: self._reached[name] | gradient.any()}))

        with torch.enable_grad(), contextlib.ExitStack() as observe:
            for target in block.targets:
                observe.enter_context(target.observe(module, on_output=watch))
            # A copy: what hangs on a graph may be changed in place.
            found = runner(module, block, 0, hidden.detach().requires_grad_(True).clone())
            # Behind a norm the sum of all outputs is the same whatever enters it: each counts otherwise.
            found.backward(torch.arange(found.numel(), device=found.device).sin().view_as(found))
        return found.detach()

    def idle(self) -> tuple[str, ...]:
        """Paths of the maps without effect; raises UserError where none of its like has one."""
        found = torch.stack(list(self._reached.values())).tolist() if self._reached else []
        has_effect = dict(zip(self._reached, found, strict=True))
        for pattern, names in self._alike.items():
            if not any(has_effect[name] for name in names):
                raise UserError(
                    f"{names[0]} has no effect on what its block gives, and its like in no other block: blocks do not"
                    " compute anew what they are given a second time, or these maps are useless; leave them dense with"
                    f" --exclude '{pattern}'"
                )
        return tuple(name for name, reached in has_effect.items() if not reached)
