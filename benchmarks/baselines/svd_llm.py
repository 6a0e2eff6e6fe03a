"""SVD-LLM (arXiv 2403.07378): truncation-aware whitening of every map's inputs, one ratio for all maps, no training.

Section 3.1: with the Cholesky factor S S^T = sum of x x^T and the singular value decomposition W S = U Sigma V^T,
W' = U_r Sigma_r V_r^T S^-1, stored as B = U_r Sigma_r^1/2 and A = Sigma_r^1/2 V_r^T S^-1 of rank r = rho m n / (m + n)
for an m x n map that keeps the fraction rho. |(W - W') S|_F^2 is the sum of the squared singular values left out, the
least that rank r can reach. That is the initialiser ``whitened``. The paper's code adds a ridge only where there is no
Cholesky factor; so does the smallest damping here, which grows until there is one.

Deviations: the parameter update of section 3.2 is left out; the paper's code advises whitening alone up to 30 %. A map
with a bias shifts it by (W - W') E[x], and its inputs' covariance is whitened in place of their second moment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WHITENED: Mapping[str, Any] = {"name": "whitened", "input_damping": 1e-10}
"""Without a ridge to speak of: rounding of the sums alone is larger."""

OPTIONS: Mapping[str, Any] = {"init": WHITENED, "allocation": "uniform", "format": "factored"}
