"""The map through which a block can make up for what those below it have lost: the one that ends it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import nn

from lillama_core.architecture.blocks import Block
from lillama_core.architecture.targets.base import TargetModule
from lillama_core.architecture.targets.linear_map import TargetLinear


def find_last_map(
    block: Block, module: nn.Module, run: Callable[[], torch.Tensor]
) -> tuple[TargetModule, TargetLinear] | None:
    """The last map that ``module``, a dense block, calls, if its output is added to the block's as it is.

    ``run`` gives the block's output [rows, length, width] for some batch. Found out by trying: with that map's output
    negated, the block's must change by twice as much. None for blocks that end otherwise (experts, a norm), and for a
    map with more outputs than inputs, of whose gradients only what W makes of them is known.
    """
    calls: list[tuple[TargetModule, TargetLinear, torch.Tensor]] = []
    with torch.no_grad():
        with contextlib.ExitStack() as observe:
            for target in block.targets:
                observe.enter_context(target.observe(module, on_output=_noting(target, calls)))
            before = run()
        if not calls:
            return None
        target, last, output = calls[-1]
        if target.kind != "linear":
            return None
        alone = sum(map_.name == last.name for _, map_, _ in calls) == 1
        # Some blocks flatten rows and positions on the way.
        if output.numel() != before.numel() or not alone or last.out_features > last.in_features:
            return None
        change = -2 * output.float().view_as(before)
        with target.observe(module, on_output=lambda map_, out: _negate(out) if map_.name == last.name else None):
            difference = run() - before - change.to(before.device)
    return (target, last) if difference.norm() <= 1e-3 * change.norm() else None


def _noting(
    target: TargetModule, calls: list[tuple[TargetModule, TargetLinear, torch.Tensor]]
) -> Callable[[TargetLinear, torch.Tensor], None]:
    return lambda map_, output: calls.append((target, map_, output.clone()))


def _negate(tensor: torch.Tensor) -> None:
    tensor.neg_()
