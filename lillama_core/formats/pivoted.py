"""``pivoted``: one factor holds an r x r identity after a permutation, r (m + n - r) parameters.

B A = (B R) (R^-1 A) for every invertible R. With R = A[:, J] for r pivot columns J, the new second factor is
[I | T] up to a permutation, and the identity is neither stored nor multiplied (SkipCat, arXiv 2512.13494,
section 3; an interpolative decomposition). The same holds for rows of B. Any r < min(m, n) saves parameters:
mn - r (m + n - r) = (m - r)(n - r) > 0.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from lillama_core.formats.base import Format, LowRankLinear, empty_linear
from lillama_core.system.devices import exact_device


def index_of(module: nn.Module) -> torch.Tensor:
    """The order ``module.permutation`` as int32 [n], kept from call to call: a gather takes it fastest.

    On disk it is int16. Widening it for each token took 18 of the 46 us of a 576 x 576 map of rank 200, whose products
    take 24 (one thread, fp32).
    """
    order = module.permutation
    assert isinstance(order, torch.Tensor)
    if torch.compiler.is_compiling():
        # What is traced must keep nothing.
        return order.int()
    # Whoever loads weights puts another tensor there, or writes into this one.
    version = 0 if order.is_inference() else order._version
    kept = module.__dict__.get("_index")
    if kept is None or kept[0] is not order or kept[1] != version:
        kept = (order, version, order.int())
        if type(kept[2]) is torch.Tensor:
            # A tensor that only plays one is for this call alone.
            module.__dict__["_index"] = kept
    index: torch.Tensor = kept[2]
    return index


class InputPivotedLinear(LowRankLinear):
    """y = U (x_J + T x_rest) + bias: the identity stands on the input side.

    ``permutation`` [in] lists the pivots J first; ``mix.weight`` is T [r, in - r], ``up.weight`` U [out, r].
    """

    permutation: torch.Tensor
    orders = ("permutation",)

    def __init__(self, mix: nn.Linear, up: nn.Linear, permutation: torch.Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features = mix.in_features + mix.out_features, up.out_features
        self.rank = mix.out_features
        self.mix = mix
        self.up = up
        self.register_buffer("permutation", permutation)

    @property
    def bias(self) -> torch.Tensor | None:
        return self.up.bias

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(B [out, r], A [r, in]); gradients reach the parameters."""
        T = self.mix.weight
        A = torch.cat((torch.eye(T.shape[0], dtype=T.dtype, device=T.device), T), dim=1)
        return self.up.weight, A[:, torch.argsort(self.permutation.long())]

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        # One gather of the whole input is cheaper than two of its parts.
        x = x.index_select(-1, index_of(self))
        z: torch.Tensor = x[..., : self.rank] + self.mix(x[..., self.rank :])
        return z

    def expand(self, z: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.up(z)
        return y


class OutputPivotedLinear(LowRankLinear):
    """z = D x, y = [z; T z] put back in order, + bias: the identity stands on the output side.

    ``permutation`` [out] says where in [z; T z] each output feature is found; ``down.weight`` is D [r, in],
    ``mix.weight`` T [out - r, r]; ``bias`` [out], if any.
    """

    permutation: torch.Tensor
    orders = ("permutation",)

    def __init__(self, down: nn.Linear, mix: nn.Linear, permutation: torch.Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.in_features, self.out_features = down.in_features, mix.in_features + mix.out_features
        self.down = down
        self.mix = mix
        self.register_buffer("permutation", permutation)
        self.bias = bias

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(B [out, r], A [r, in]); gradients reach the parameters."""
        T = self.mix.weight
        B = torch.cat((torch.eye(T.shape[1], dtype=T.dtype, device=T.device), T), dim=0)
        return B[self.permutation.long()], self.down.weight

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        z: torch.Tensor = self.down(x)
        return z

    def expand(self, z: torch.Tensor) -> torch.Tensor:
        y = torch.cat((z, self.mix(z)), dim=-1).index_select(-1, index_of(self))
        return y if self.bias is None else y + self.bias


def index_dtype(size: int) -> torch.dtype:
    """The smallest integer type that indexes ``size`` features: permutations are bytes on disk, too."""
    return torch.int16 if size <= 2**15 else torch.int32


LARGEST_ENTRY = 1.2
"""Swaps stop once no entry of T exceeds this. Pivoted QR leaves 1.0 to 1.4 and the same error after rounding to 16
bits; LU alone leaves 1.3 to 3.0 and an error up to 1.6 times as large (factors of SmolLM2, ranks 150 to 400 of 576)."""


def pivots(Q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose r well-conditioned columns J of Q [r, n] with orthonormal rows, and solve for the others.

    Returns a permutation [n] that lists J first, and T = Q[:, J]^-1 Q[:, rest] [r, n - r]. Partial pivoting of an LU
    decomposition of Q^T makes the first choice; exchanging the pair of columns of the largest entry of T multiplies
    |det Q[:, J]| by that entry (Goreinov et al., How to find a good submatrix, 2010), so the exchanges come to an end.
    """
    r, n = Q.shape
    if r == n:
        return torch.arange(n, device=Q.device), Q.new_empty(r, 0)
    P, L, _ = torch.lu_unpack(*torch.linalg.lu_factor(Q.T))
    order = P.argmax(0)
    # Q^T[order] = L U, so T^T = L2 U (L1 U)^-1 = L2 L1^-1: no part of U is needed.
    T = torch.linalg.solve_triangular(L[:r].T, L[r:].T, upper=True, unitriangular=True).contiguous()
    # 1 to 17 exchanges were needed at n = 576, 19 at n = 4096; the bound only keeps rounding from going in circles.
    for _ in range(n):
        row, column = divmod(int(T.abs().argmax().item()), n - r)
        pivot = T[row, column].item()
        if abs(pivot) <= LARGEST_ENTRY:
            break
        leaving, entering = T[:, column].clone(), T[row].clone()
        T.addr_(leaving, entering, alpha=-1 / pivot)
        T[row] = entering / pivot
        T[:, column] = -leaving / pivot
        T[row, column] = 1 / pivot
        exchanged = torch.tensor([row, r + column], device=order.device)
        order[exchanged] = order[exchanged.flip(0)]
    return order, T


@torch.no_grad()
def interpolate(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Write A [r, n] as R [I | T] with permuted columns: the permutation [n], R [r, r] and T [r, n - r].

    T depends on the row space alone. An orthonormal basis Q of it keeps a bad scaling of A out of the choice of
    columns, and is never singular where A is (a map of zeros, or of a rank below r): A = M Q, so T = Q1^-1 Q2.
    Computed where A is, in fp32 unless A is fp64.
    """
    A, r = rows if rows.dtype == torch.float64 else rows.float(), rows.shape[0]
    Q = torch.linalg.qr(A.T, mode="reduced").Q.T
    order, T = pivots(Q)
    if A.dtype != torch.float64 and exact_device(A) == A.device:
        # fp32 alone changes the map by up to 2e-5 of its outputs; after one step of refinement it is 1e-6.
        left, right = Q[:, order[:r]], Q[:, order[r:]]
        residual = right.double() - left.double() @ T.double()
        T = (T.double() + torch.linalg.solve(left, residual.float())).float()
    return order, A[:, order[:r]], T


class Pivoted(Format):
    """Store one factor without the identity that it holds: r (m + n - r) parameters of an m x n map at rank r."""

    name = "pivoted"

    @staticmethod
    def pivots_inputs(out_features: int, in_features: int) -> bool:
        """Whether the identity stands on the input side: the smaller side, where permuting costs less."""
        return in_features <= out_features

    def stored_as_weight(self, out_features: int, in_features: int) -> str:
        return "up" if self.pivots_inputs(out_features, in_features) else "down"

    def parameters(self, out_features: int, in_features: int, rank: int) -> int:
        return rank * (out_features + in_features - rank)

    def index_bytes(self, out_features: int, in_features: int) -> int:
        side = in_features if self.pivots_inputs(out_features, in_features) else out_features
        return side * index_dtype(side).itemsize

    def largest_rank(self, out_features: int, in_features: int, parameters: int) -> int:
        # The smaller root of r (m + n - r) = p, in integers: the discriminant (m + n)^2 - 4 p is exact.
        total = out_features + in_features
        parameters = min(parameters, out_features * in_features - 1)
        if parameters <= 0:
            return 0
        root = math.isqrt(total * total - 4 * parameters)
        rank = (total - root) // 2
        # isqrt rounds down, which can put the rank one too high.
        while rank * (total - rank) > parameters:
            rank -= 1
        return rank

    def module(
        self, out_features: int, in_features: int, rank: int, bias: bool, dtype: torch.dtype, device: str
    ) -> nn.Module:
        if self.pivots_inputs(out_features, in_features):
            return InputPivotedLinear(
                empty_linear(in_features - rank, rank, False, dtype, device),
                empty_linear(rank, out_features, bias, dtype, device),
                torch.empty(in_features, dtype=index_dtype(in_features), device=device),
            )
        return OutputPivotedLinear(
            empty_linear(in_features, rank, False, dtype, device),
            empty_linear(rank, out_features - rank, False, dtype, device),
            torch.empty(out_features, dtype=index_dtype(out_features), device=device),
            nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None,
        )

    def from_factors(self, B: torch.Tensor, A: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
        (out_features, rank), in_features = B.shape, A.shape[1]
        layer = self.module(out_features, in_features, rank, bias is not None, B.dtype, str(B.device))
        if isinstance(layer, InputPivotedLinear):
            order, R, T = interpolate(A)
            layer.permutation = order.to(index_dtype(in_features))
            layer.mix.weight.data = T.to(B.dtype)
            layer.up.weight.data = (B.to(R.dtype) @ R).to(B.dtype)
            if bias is not None:
                layer.up.bias.data = bias.detach().to(B.dtype, copy=True)
        else:
            assert isinstance(layer, OutputPivotedLinear)
            order, R, T = interpolate(B.T)
            # Row i of the output is entry inverse[i] of [z; T z].
            layer.permutation = torch.argsort(order).to(index_dtype(out_features))
            layer.mix.weight.data = T.T.to(B.dtype).contiguous()
            layer.down.weight.data = (R.T @ A.to(R.dtype)).to(B.dtype)
            if bias is not None and layer.bias is not None:
                layer.bias.data = bias.detach().to(B.dtype, copy=True)
        return layer

    def to_factors(self, module: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        assert isinstance(module, InputPivotedLinear | OutputPivotedLinear)
        return module.matrices()


InputPivotedLinear.format = OutputPivotedLinear.format = Pivoted()
