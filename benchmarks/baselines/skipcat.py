"""SkipCat (arXiv 2512.13494), its block skipping alone: whitened factors, one ratio for all maps, pivoted storage.

With B and A of SVD-LLM, and the columns of A permuted so that A = [A_1 | A_2] with A_1 [r, r] well conditioned,
B A x = B A_1 (x_1 + A_1^-1 A_2 x_2) (section 3). B A_1 and A_1^-1 A_2 are stored: r (m + n - r) parameters. A map that
keeps the fraction rho of its parameters has the rank r = (m + n - sqrt((m + n)^2 - 4 rho m n)) / 2. That is the format
``pivoted``.

Deviations: maps that read the same input share no projection (the paper's Cat). Pivots are found by exchanges after an
LU decomposition, in place of a strong rank-revealing QR; on a map with more inputs than outputs the identity stands on
the side of the outputs, at as many parameters. Permutations are made room for by parameters. Whitening deviates as in
`lillama_benchmarks.baselines.svd_llm`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lillama_benchmarks.baselines.svd_llm import WHITENED

OPTIONS: Mapping[str, Any] = {"init": WHITENED, "allocation": "uniform", "format": "pivoted"}
