"""Independent random streams from one seed."""

from __future__ import annotations

import hashlib

import torch


def stream(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator that depends on ``seed`` and ``purpose`` alone, not on what was drawn before."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A seed below 2**63 for one purpose."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def permutation(length: int, seed: int, *purpose: str | int) -> list[int]:
    """A random order of ``range(length)``."""
    order: list[int] = torch.randperm(length, generator=stream(seed, *purpose)).tolist()
    return order
