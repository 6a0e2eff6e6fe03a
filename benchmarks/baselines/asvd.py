"""ASVD (arXiv 2312.05821): inputs scaled by their size before the decomposition, one ratio for all maps, no training.

With S = diag(s), s_i = (mean |x_i|)^alpha (equation 8), alpha = 0.5, and the singular value decomposition
W S = U Sigma V^T: W' = U_r Sigma_r V_r^T S^-1.

Deviations: statistics hold second moments, so that s_i = (E[x_i^2]^1/2)^alpha here; where inputs differ in scale alone,
the two are proportional, and W' is the same. Ranks are uniform: the paper's search (section 3.4) measures perplexity
with one map cut at a time, for every map at each of several ratios: hundreds of runs of the model, which are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field

from lillama_core.initialization import Decomposition, Initializer, MapStatistics, Whitened
from lillama_core.initialization.second_moments import WhitenedOptions
from lillama_core.strategies import StrategyOptions

OPTIONS: Mapping[str, Any] = {"init": "activation-scaled", "allocation": "uniform", "format": "factored"}

SQUARED_RIDGE = 1e-12
"""The paper's code adds 1e-6 to every scale, so that it can divide by those of dead inputs."""


class ActivationScaledOptions(StrategyOptions):
    """How much the size of inputs counts."""

    alpha: float = Field(0.5, description="power of an input's size; 0 is plain SVD", ge=0.0, le=1.0)


class ActivationScaled(Initializer):
    """The best approximation of W diag(s), which is whitening with the diagonal moment diag(s^2)."""

    name = "activation-scaled"
    Options = ActivationScaledOptions
    options: ActivationScaledOptions
    needs_inputs = True

    def decompose(self, weight: torch.Tensor, statistics: MapStatistics) -> Decomposition:
        inputs = statistics.inputs
        squared_scales = None if inputs is None else inputs.double().diagonal().clamp(min=0) ** self.options.alpha
        whitened = Whitened(WhitenedOptions(input_damping=SQUARED_RIDGE))
        # Without the mean of the inputs: the bias stays as it is.
        return whitened.decompose(
            weight, MapStatistics(inputs=None if squared_scales is None else torch.diag(squared_scales))
        )
