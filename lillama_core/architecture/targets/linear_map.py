"""Linear maps: the matrices W [out, in] inside a model, wherever they are stored."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class TargetLinear:
    """One matrix W [out_features, in_features] inside a block."""

    name: str
    """Path from the block: ``mlp.up_proj``."""
    out_features: int
    in_features: int
    group: str | None = None
    """Maps of one group have the same task for different tokens (the experts of a layer): the statistics of a map
    that saw few rows are blended with those of its group."""
    token_fraction: float = 1.0
    """Fraction of the tokens that the map multiplies, between 0 and 1: below 1 for an expert."""
    cut: int = 0
    """Number of features on the side, out or in, along which the experts of a shared map lie; 0 for other maps. A
    token meets the fraction ``token_fraction`` of them; the low-rank stage without that side multiplies every token."""

    @property
    def parameters(self) -> int:
        """Parameters of the dense matrix, its bias left out (a bias stays as it is in every format)."""
        return self.out_features * self.in_features

    @property
    def full_rank(self) -> int:
        """The largest rank that a product of factors can have."""
        return min(self.out_features, self.in_features)


@dataclass(frozen=True)
class MapChoice:
    """Which maps of a block to take, beyond and against the architecture's own choice."""

    include: tuple[str, ...] = ()
    """Paths from the block of maps that the architecture leaves to the user (``Architecture.optional``)."""
    exclude: tuple[str, ...] = ()
    """Paths from the block of maps to leave alone."""
    share_experts: bool = False
    """One input projection for all experts of a layer, and one output projection for their second maps."""


def kind_of(path: str) -> str:
    """Return ``path`` with each number in it as ``*``: the kind that the map shares with those of other experts.

    A number counts behind a dot only: ``mlp.experts.down.3`` gives ``mlp.experts.down.*``.
    """
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)


def path_matches(path: str, pattern: str) -> bool:
    """Whether a dotted path equals a pattern in which ``*`` stands for one component."""
    parts, wanted = path.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(w in ("*", p) for p, w in zip(parts, wanted, strict=True))


def matches_any(path: str, patterns: tuple[str, ...]) -> bool:
    """Whether a dotted path equals one of ``patterns``."""
    return any(path_matches(path, pattern) for pattern in patterns)


def is_asked_for(path: str, only: tuple[str, ...], exclude: tuple[str, ...], choice: MapChoice) -> bool:
    """Whether ``only`` or ``choice.include`` names ``path``, left alone by default; ``choice.exclude`` wins."""
    own = matches_any(path, only) and not matches_any(path, exclude)
    return (own or matches_any(path, choice.include)) and not matches_any(path, choice.exclude)


def lies_within(pattern: str, path: str) -> bool:
    """Whether ``pattern`` names the module at ``path`` or something in it."""
    return path_matches(path, ".".join(pattern.split(".")[: path.count(".") + 1]))
