"""Which channels a net can spare, and what the map that reads them becomes without them.

With W [out, n] the map behind the channels, H = E[h h^T] what it reads (with a ridge) and L L^T a weight on what it
gives, the best map of the channels K alone is W' = W H_:K H_KK^-1, and taking out one channel c more costs
|L^T W'_c|^2 / P_cc with P = H_KK^-1: the optimal brain surgeon (Hassibi and Stork, 1993), for whole columns (as in
ZipLM, arXiv 2302.04089, section 3). The cheapest go first, some at a time; the cost of those that go together is exact.

In the order found, with H = C C^T there, all is read off one triangle: W' of the first k channels is
(W C)[:, :k] C[:k, :k]^-1, and the error the squared norm of the columns of L^T W C behind them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from lillama_core.allocation import ChannelCurve

STEPS = 48
"""About how many numbers of channels are offered; they are multiples of a power of two, which kernels and quantisers
like."""
LEAST_PART = 4
"""A quarter of the channels stays in any case."""


@dataclass(frozen=True)
class Elimination:
    """Channels in the order in which they matter, and what refits the map behind them."""

    curve: ChannelCurve
    order: torch.Tensor
    """[n]: those that stay longest first."""
    root: torch.Tensor
    """C [n, n], lower triangular: C C^T is the second moment of the channels in this order, with its ridge."""
    center: torch.Tensor | None = None
    """E[h] [n] in the dense model's order, where a bias takes up the difference."""

    def kept(self, count: int) -> torch.Tensor:
        """The ``count`` channels that stay, in the dense model's order."""
        return self.order[:count].sort().values

    def refit(
        self, weight: torch.Tensor, bias: torch.Tensor | None, count: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The map [out, count] of the channels `kept`, and its bias, in place of ``weight`` [out, n], in fp32."""
        order, root = self.order.to(weight.device), self.root.to(weight.device)
        spread = weight.float()[:, order] @ root[:, :count]
        found = torch.linalg.solve_triangular(root[:count, :count], spread, upper=False, left=False)
        found = found[:, order[:count].argsort()]
        if bias is None or self.center is None:
            return found, bias
        center = self.center.to(weight.device)
        return found, bias.float() + weight.float() @ center - found @ center[self.kept(count).to(center.device)]


def step_of(size: int) -> int:
    """How many channels are taken out at a time: the largest power of two that makes at least STEPS steps."""
    return 1 << max(0, (size // STEPS).bit_length() - 1)


def eliminate(
    inputs: torch.Tensor, factor: torch.Tensor, weighted: torch.Tensor, center: torch.Tensor | None = None
) -> Elimination:
    """Order channels by what they matter to the map that reads them.

    ``inputs`` [n, n] is their second moment, positive definite, ``factor`` its lower Cholesky factor, which is
    overwritten, and ``weighted`` = L^T W [out, n]. In fp64.
    """
    size, step = len(inputs), step_of(len(inputs))
    inverse = torch.cholesky_inverse(factor, out=factor)
    columns = weighted.clone()
    absent = torch.zeros(size, dtype=torch.bool, device=inputs.device)
    gone: list[torch.Tensor] = []
    left = size
    while left > max(1, size // LEAST_PART):
        # The first step may be shorter, so that the numbers of those that stay are multiples.
        count = min(left % step or step, left - 1)
        costs = columns.square().sum(0) / inverse.diagonal()
        # Dead channels first, whose cost is zero.
        costs.masked_fill_(absent, torch.inf)
        leaving = torch.topk(costs, count, largest=False).indices
        rows = inverse[leaving]
        solved = torch.cholesky_solve(rows, torch.linalg.cholesky_ex(rows[:, leaving]).L)
        columns.addmm_(columns[:, leaving], solved, alpha=-1)
        inverse.addmm_(rows.T, solved, alpha=-1)
        absent.index_fill_(0, leaving, True)
        columns.index_fill_(1, leaving, 0)
        inverse.index_fill_(0, leaving, 0).index_fill_(1, leaving, 0).diagonal().index_fill_(0, leaving, 1)
        gone.append(leaving)
        left -= count
    staying = (~absent).nonzero()[:, 0]
    strength = columns[:, staying].square().sum(0) / inverse.diagonal()[staying]
    del columns
    order = torch.cat([staying[strength.argsort(descending=True)], *reversed(gone)])
    counts = torch.tensor(list(itertools.accumulate((len(g) for g in reversed(gone)), initial=left)))
    return in_order(order, counts, inputs, weighted, center)


def in_order(
    order: torch.Tensor,
    counts: torch.Tensor,
    inputs: torch.Tensor,
    weighted: torch.Tensor,
    center: torch.Tensor | None = None,
) -> Elimination:
    """The elimination that takes channels out from the end of ``order`` [n], offered at ``counts``, rising.

    ``inputs`` and ``weighted`` are those of `eliminate`.
    """
    root = torch.linalg.cholesky(inputs[order[:, None], order])
    tails = (weighted[:, order] @ root).square().sum(0)
    tails = torch.cat([tails.flip(0).cumsum(0).flip(0), tails.new_zeros(1)])
    energies = (weighted.square().sum(0) * inputs.diagonal())[order]
    shares = torch.cat([energies.new_zeros(1), energies.cumsum(0) / energies.sum().clamp(min=1e-300)])
    errors, shares = tails.float().cpu()[counts], shares.clamp(max=1.0).float().cpu()[counts]
    return Elimination(ChannelCurve(counts, errors, shares), order.cpu(), root.float().cpu(), center)
