"""Which matrices are held in 8 bits and which in 4, so that all fit into a number of bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """A matrix that may be held in fewer bits."""

    bytes_more: int
    """In 8 bits."""
    bytes_less: int
    """In 4 bits."""
    error: float
    """What the 4 bits cost, in a unit that all candidates have."""


def fewest_errors(candidates: Mapping[str, Candidate], limit: int) -> set[str]:
    """Names of those in 4 bits: all together take at most ``limit`` bytes, and cost as little as can be.

    They are taken by what a byte that is saved costs, the cheapest first, which is the best choice up to the last one
    taken: of those before it, any that are not needed any more are given back, the dearest first. Raises ValueError
    where 4 bits throughout take more.
    """
    excess = sum(c.bytes_more for c in candidates.values()) - limit
    saving = {name: c.bytes_more - c.bytes_less for name, c in candidates.items()}
    order = sorted((n for n in candidates if saving[n] > 0), key=lambda n: (candidates[n].error / saving[n], n))
    taken: list[str] = []
    for name in order:
        if excess <= 0:
            break
        taken.append(name)
        excess -= saving[name]
    if excess > 0:
        raise ValueError(f"{limit + excess:,} bytes are needed")
    for name in sorted(taken, key=lambda n: -candidates[n].error):
        if excess + saving[name] <= 0:
            taken.remove(name)
            excess += saving[name]
    return set(taken)
