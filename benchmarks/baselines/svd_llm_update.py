"""SVD-LLM (arXiv 2403.07378) with the closed-form update of its weights, one ratio for all maps, no training.

Factors B, A are those of `lillama_benchmarks.baselines.svd_llm`. Then, block by block from the first, A stays and B is
fitted to the inputs x' that the map has in the compressed model: argmin_B E|W x' - B A x'|^2 =
W S A^T (A S A^T)^-1 with S = E[x' x'^T]. That is the layer-wise closed-form update of the paper's first versions, and
of its code (there least squares on the rows, W x' being what the dense map gives for them). The published version
trains in its place: LoRA on the one factor, then on the other, by gradients through the whole model (section 3.2),
which is no closed form and is left out.

Deviations: within a block, x' of a map is taken after the maps before it have their factors; the paper's code takes
all of a block with its maps dense, and what compressed blocks below give. It updates on 16 rows, here all rows that are
fitted to count. A map with a bias shifts it by (W - W') E[x'], and S is the covariance then. Other deviations are those
of `svd-llm`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lillama_benchmarks.baselines.svd_llm import WHITENED
from lillama_core.initialization import StudentStatistics, Whitened, root

OPTIONS: Mapping[str, Any] = {
    "init": {**WHITENED, "name": "whitened-update"},
    "allocation": "uniform",
    "format": "factored",
}


class WhitenedUpdate(Whitened):
    """``whitened``, the left factors fitted to what the compressed model reads."""

    name = "whitened-update"
    corrects = False
    adapts = True

    def adapt(
        self, weight: torch.Tensor, B: torch.Tensor, A: torch.Tensor, seen: StudentStatistics
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        W, right, S = weight.double(), A.double(), seen.inputs.double()
        if seen.has_bias:
            S = S - torch.outer(seen.center, seen.center).double()
        SA = S @ right.T
        # With a ridge as small as that of the whitening: no input may come by that A passes on.
        left = torch.cholesky_solve((W @ SA).T, root(right @ SA, self.options.input_damping)).T
        shift = (W - left @ right) @ seen.center.double() if seen.has_bias else None
        return left.float(), A, None if shift is None else shift.float()
