"""AA-SVD (arXiv 2604.02119), its anchored and adaptive factors alone: one ratio for all maps, no training.

A map reads x in the dense model and x' in the model compressed so far. Its factors of rank r minimise
E|W x - B A x'|^2, the dense output from the compressed model's inputs (theorem 3.2): with C = E[x x'^T],
S = E[x' x'^T] = R R^T, and U, s, V the singular vectors and values of M = W C R^-T, B = U_r s_r and A = V_r^T R^-1.
Block by block and, within a block, in the order of its maps; those that read one tensor together.

Deviations: the refinement of each block by gradients, which the paper has afterwards and which it finds to do most, is
left out. S and C have a small ridge on the diagonal, which draws W' to W. A map with a bias b gets
b + W E[x] - W' E[x'], and C and S are covariances then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lillama_core.initialization import StudentStatistics, Whitened, root
from lillama_core.initialization.eigen import descending_eigenpairs, symmetric_product

OPTIONS: Mapping[str, Any] = {
    "init": {"name": "anchored", "input_damping": 1e-6},
    "allocation": "uniform",
    "format": "factored",
}
"""The damping is what fp32 can tell from nothing."""


class Anchored(Whitened):
    """The smallest error of the map's dense outputs, from what the compressed model reads (theorem 3.2)."""

    name = "anchored"
    corrects = False
    adapts = True
    compares = True

    def adapt(
        self, weight: torch.Tensor, B: torch.Tensor, A: torch.Tensor, seen: StudentStatistics
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        # They are asked for.
        assert seen.cross is not None
        assert seen.dense_center is not None
        W, rank = weight.double(), len(A)
        C, S = seen.cross.double(), seen.inputs.double()
        if seen.has_bias:
            C = C - torch.outer(seen.dense_center, seen.center).double()
            S = S - torch.outer(seen.center, seen.center).double()
        R = root(S, self.options.input_damping)
        # With its ridge, whatever that had to be, on both.
        C = C + (symmetric_product(R, R.T) - S)
        M = torch.linalg.solve_triangular(R, C.T @ W.T, upper=False).T
        if W.shape[0] <= W.shape[1]:
            left = descending_eigenpairs(symmetric_product(M, M.T))[1][:, :rank]
            kept = left.T @ M
        else:
            kept = descending_eigenpairs(symmetric_product(M.T, M))[1][:, :rank].T
            left = M @ kept.T
        right = torch.linalg.solve_triangular(R.T, kept.T, upper=True).T
        shift = None
        if seen.has_bias:
            shift = (W @ seen.dense_center.double() - left @ (right @ seen.center.double())).float()
        return left.float(), right.float(), shift
