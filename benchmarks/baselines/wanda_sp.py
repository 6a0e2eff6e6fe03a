"""Wanda-sp (arXiv 2312.11983, after Wanda, 2306.11695), of feed-forward nets alone: channels by size, nothing refitted.

Of the map W behind the channels x of a net, the channels j of the largest sum_i |W_ij| E[x_j^2]^1/2 stay, the same part
in every net, and the columns of the others are left out. It stands beside `lillama_benchmarks.baselines.modegpt` for
what the choice of channels and the refit give.

Deviations: heads of attention, which the paper's code takes out by the same scores, stay. Inputs are those of the dense
model; the paper's code takes those behind the blocks that are narrower already.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lillama_core.initialization import MapStatistics, Whitened
from lillama_core.initialization.elimination import Elimination, in_order

OPTIONS: Mapping[str, Any] = {
    "init": "channel-size",
    # So smooth that all give up the same part.
    "allocation": {"name": "block-influence", "smoothing": 1e9},
    "format": "factored",
}


class ChannelSize(Whitened):
    """Channels by the size of what they give; ranks, where any are lowered, as ``whitened`` does."""

    name = "channel-size"
    corrects = False

    def eliminate(self, weight: torch.Tensor, statistics: MapStatistics) -> Elimination | None:
        if statistics.inputs is None:
            return None
        W, squares = weight.double(), statistics.inputs.double().diagonal().clamp(min=0)
        order = (W.abs().sum(0) * squares.sqrt()).argsort(descending=True, stable=True)
        # As if channels were uncorrelated: then what stays is best as it is. Dead ones, too, have a root.
        moment = torch.diag(squares + self.options.input_damping * squares.mean().clamp(min=1e-30))
        return in_order(order, torch.arange(1, len(order) + 1), moment, W)
