"""How many directions of a matrix matter, told by its singular values."""

from __future__ import annotations

import torch


def stable_rank(energies: torch.Tensor) -> float:
    """|W|_F^2 / |W|_2^2 of a matrix whose squared singular values are ``energies`` [k]; 0 of a matrix of zeros.

    Rudelson and Vershynin, Sampling from large matrices, 2007.
    """
    largest = energies.double().max()
    return float((energies.double().sum() / largest).item()) if largest > 0 else 0.0


def effective_rank(energies: torch.Tensor) -> float:
    """exp of the entropy of the singular values, which are taken as parts of their sum; 0 of a matrix of zeros.

    ``energies`` [k] are their squares. Roy and Vetterli, The effective rank, EUSIPCO 2007, definition 2.
    """
    values = energies.double().clamp(min=0).sqrt()
    total = values.sum()
    if total <= 0:
        return 0.0
    parts = values / total
    return float(torch.special.entr(parts).sum().exp().item())
