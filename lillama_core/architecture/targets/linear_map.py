"""Linear maps: the matrices W [out, in] inside a model, wherever they are stored."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TargetLinear:
    """One matrix W [out_features, in_features] inside a block, and the site that holds it."""

    name: str
    """Path from the block: ``mlp.up_proj``."""
    out_features: int
    in_features: int
    group: str | None = None
    """Maps of one group do the same for different inputs (the experts of a layer): where one saw few rows, the
    statistics of the group help out."""
    token_fraction: float = 1.0
    """Part of the rows that the map multiplies: that of an expert is used by some tokens only."""
    cut: int = 0
    """Features of the side, out or in, that is cut up by expert, if experts share the map: ``share`` is then the part
    of them that a row meets, and of two low-rank stages the one without that side multiplies every row."""

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


def path_matches(path: str, pattern: str) -> bool:
    """Whether a dotted path equals a pattern in which ``*`` stands for one component."""
    parts, wanted = path.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(w in ("*", p) for p, w in zip(parts, wanted, strict=True))


def matches_any(path: str, patterns: tuple[str, ...]) -> bool:
    """Whether a dotted path equals one of ``patterns``."""
    return any(path_matches(path, pattern) for pattern in patterns)


def lies_within(pattern: str, path: str) -> bool:
    """Whether ``pattern`` names the module at ``path`` or something in it."""
    return path_matches(path, ".".join(pattern.split(".")[: path.count(".") + 1]))
