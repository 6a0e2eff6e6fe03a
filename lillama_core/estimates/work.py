"""Work as a ledger: products, bytes that move, kernels that start, decompositions, and what passes through the disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace


@dataclass(frozen=True)
class Work:
    """Amounts of everything that takes time. Products count two operations a multiply-add."""

    products: float = 0.0
    """Operations of matrix products in the arithmetic of the run."""
    full: float = 0.0
    """Operations of products that stay in fp32 whatever the arithmetic: second moments, factors."""
    exact: float = 0.0
    """Operations of products, triangular solves and Cholesky factors in fp64."""
    eigh: Mapping[int, float] = field(default_factory=dict)
    """Size -> number of eigendecompositions in fp64 of symmetric matrices of that size."""
    pivoting: float = 0.0
    """Operations of QR with column pivoting, which runs on the host."""
    moved: float = 0.0
    """Bytes that everything else reads and writes in memory."""
    operations: float = 0.0
    """Kernels that are started."""
    drawn: float = 0.0
    """Probabilities out of which labels are drawn, on the host."""
    read: float = 0.0
    """Bytes from disk."""
    written: float = 0.0
    """Bytes to disk."""
    crossed: float = 0.0
    """Bytes between host and device; nothing where they are one."""
    starts: float = 0.0
    """Fresh processes that load all libraries."""

    def __add__(self, other: Work) -> Work:
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name != "eigh"}
        sizes = {n: self.eigh.get(n, 0.0) + other.eigh.get(n, 0.0) for n in {*self.eigh, *other.eigh}}
        return Work(**sums, eigh=sizes)

    def __mul__(self, factor: float) -> Work:
        scaled = {f.name: getattr(self, f.name) * factor for f in fields(self) if f.name != "eigh"}
        return Work(**scaled, eigh={n: count * factor for n, count in self.eigh.items()})

    def on(self, rows: float, calls: float) -> Work:
        """This work of one row done for ``rows`` in so many ``calls``: kernels are started once a call."""
        return replace(self * rows, operations=self.operations * calls)


def total(works: list[Work]) -> Work:
    """The sum of ``works``."""
    found = Work()
    for work in works:
        found = found + work
    return found
