"""Low-rank maps as balanced factors while they are trained, whatever the format that they are stored in.

A step of one size suits all entries of balanced factors. Of a format that pivots, whose matrix beside the identity has
entries of the order of one while those of the other factor are those of a weight, it suits neither.
"""

from __future__ import annotations

import torch
from torch import nn

from lillama_core.formats import Factored
from lillama_core.formats.base import Format, LowRankLinear
from lillama_core.runtime.modules import replace_module


@torch.no_grad()
def unfold(model: nn.Module) -> dict[str, Format]:
    """Replace every low-rank map of ``model`` by the factors of its truncated SVD, and return the formats by path."""
    found = {path: m for path, m in model.named_modules() if isinstance(m, LowRankLinear)}
    for path, module in found.items():
        B, A = balanced(*module.format.to_factors(module))
        bias = getattr(module, "bias", None)
        replace_module(model, path, Factored().from_factors(B, A, None if bias is None else bias.data))
    return {path: module.format for path, module in found.items()}


@torch.no_grad()
def fold(model: nn.Module, formats: dict[str, Format]) -> None:
    """Undo `unfold`: the same function in the formats that it returned."""
    for path, format_ in formats.items():
        module = model.get_submodule(path)
        assert isinstance(module, LowRankLinear)
        bias = getattr(module, "bias", None)
        B, A = module.format.to_factors(module)
        replace_module(model, path, format_.from_factors(B.data, A.data, None if bias is None else bias.data))


def balanced(B: torch.Tensor, A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return U S^1/2 and S^1/2 V^T with U S V^T = B A, for B [out, r] and A [r, in], in their dtype.

    The SVD is that of an r x r matrix, between orthonormal bases of both factors.
    """
    left, R = torch.linalg.qr(B.float())
    right, L = torch.linalg.qr(A.float().T)
    U, S, Vh = torch.linalg.svd(R @ L.T)
    root = S.sqrt()
    return ((left @ U) * root).to(B.dtype), (root[:, None] * (Vh @ right.T)).to(A.dtype)
