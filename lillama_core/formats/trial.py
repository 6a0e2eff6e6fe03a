"""A format is tried on a pair of random factors before a run relies on it."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lillama_core.errors import UserError, is_out_of_memory, one_line
from lillama_core.formats.base import Format

TOLERANCE = 1e-3
"""Relative error in fp32 that rounding does not make at such ranks; another function makes one near 1."""


def check_format(format_: Format, shapes: Iterable[tuple[int, int]]) -> None:
    """Raise UserError, naming the format, unless it keeps what it promises of maps of ``shapes`` (out, in).

    At rank 1 or 2, which costs next to nothing: its module computes x -> B A x + bias, gives these factors back, and
    holds as many parameters as the format says.
    """
    for out_features, in_features in sorted(set(shapes)):
        try:
            wrong = _what_is_wrong(format_, out_features, in_features)
        except Exception as error:  # a plugin's own code may raise anything
            if is_out_of_memory(error):
                raise
            wrong = f"fails ({type(error).__name__}: {one_line(error)})"
        if wrong is not None:
            raise UserError(
                f"format {format_.name!r} cannot be used: for a map [{out_features}, {in_features}] it {wrong}"
            )


def _what_is_wrong(format_: Format, out_features: int, in_features: int) -> str | None:
    """What the format does wrong, in words; None: nothing."""
    rank = min(2, format_.largest_rank(out_features, in_features, out_features * in_features - 1))
    if rank < 1:
        return None
    generator = torch.Generator().manual_seed(0)
    B, A, bias, x = (
        torch.randn(shape, generator=generator)
        for shape in ((out_features, rank), (rank, in_features), (out_features,), (3, in_features))
    )
    promised = format_.parameters(out_features, in_features, rank) + out_features
    layer = format_.from_factors(B, A, bias)
    empty = format_.module(out_features, in_features, rank, True, torch.float32, "meta")
    for module in (layer, empty):
        held = sum(p.numel() for p in module.parameters())
        if held != promised:
            return f"promises {promised - out_features:,} parameters at rank {rank}, and holds {held - out_features:,}"
    if {n: t.shape for n, t in layer.state_dict().items()} != {n: t.shape for n, t in empty.state_dict().items()}:
        return "holds other tensors when it is made of factors than when it is loaded"
    with torch.no_grad():
        if _differ(layer(x), (x @ A.T) @ B.T + bias):
            return "computes something else than B A x + bias"
        back_B, back_A = format_.to_factors(layer)
        if _differ((x @ back_A.T) @ back_B.T, (x @ A.T) @ B.T):
            return "gives other factors back than those that it was made of"
    return None


def _differ(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.shape != expected.shape or not (found - expected).norm() <= TOLERANCE * expected.norm()
