"""OBD-LLM (arXiv 2604.00821): every map whitened on both sides by K-FAC, one ratio for all maps, no training.

With L_x L_x^T = E[x x^T] of the inputs and L_g L_g^T = E[g g^T] of the gradients at the outputs, both with a ridge of a
tenth of their mean diagonal, and L_g^T W L_x = U Sigma V^T: B = L_g^-T U_r Sigma_r^1/2, A = Sigma_r^1/2 V_r^T L_x^-1.
That is the initialiser ``fisher``.

Deviations: gradients are those of labels drawn from the model's own predictions, and of as many tokens as ``fast``
takes for them, a quarter of all. A map with a bias shifts it by (W - W') E[x].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OPTIONS: Mapping[str, Any] = {
    "init": {"name": "fisher", "input_damping": 0.1, "gradient_damping": 0.1},
    "allocation": "uniform",
    "format": "factored",
}
