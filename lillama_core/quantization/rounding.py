"""Rounding of a matrix to codes and scales: w is about scale x code, with one scale for a row or a group of columns.

8 bits: the scale lets the largest entry be 127, and each entry goes to the nearest code. 4 bits, codes -8 to 7: of
scales that let the largest entry be 5.5 to 9 steps of either sign, so that some entries may be cut off, the one of the
smallest squared error is taken, and fitted once more to the codes that it gave by least squares. Where it is known how
large the vectors are that the matrix multiplies, the error of a column counts as much as they are large there.
"""

from __future__ import annotations

import torch
from torch import nn

from lillama_core.quantization.packing import GROUP, SCALE, Packing

STEPS = (7.0, -8.0, -7.5, 7.5, -7.0, 6.5, -6.5, 8.0, -8.5, 6.0, -6.0, 8.5, -9.0, -5.5, 5.5)
"""Steps that the largest entry of a group may be from zero; the first is plain rounding."""
ROWS_AT_ONCE = 2**22
"""Entries that are rounded together: what the search needs is several times as much."""


def quantize(weight: torch.Tensor, bits: int, importance: torch.Tensor | None = None) -> tuple[Packing, torch.Tensor]:
    """Return how W [rows, columns] is packed at ``bits``, and the bytes; ``importance`` as for `round_rows`."""
    packing = Packing(weight.shape[0], weight.shape[1], bits)
    step = max(1, ROWS_AT_ONCE // weight.shape[1])
    found = [round_rows(rows, bits, importance) for rows in weight.float().split(step)]
    codes, scales = (torch.cat(parts) for parts in zip(*found, strict=True))
    return packing, packing.pack(codes, scales)


def round_rows(
    weight: torch.Tensor, bits: int, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [rows, columns] and scales [rows, groups] of W in fp32, see above.

    ``importance`` [columns], E[x_j^2] of the vectors x that W multiplies, is looked at for 4 bits; None: all alike.
    """
    if bits == 8:
        scales = usable(weight.abs().amax(1, keepdim=True) / 127)
        return (weight / scales.float()).round().clamp(-127, 127).to(torch.int8), scales
    rows, columns = weight.shape
    groups = -(-columns // GROUP)
    padding = (0, groups * GROUP - columns)
    w = nn.functional.pad(weight, padding).view(rows, groups, GROUP)
    h = torch.ones(columns, device=w.device) if importance is None else importance.to(w)
    # A group that nothing reaches is rounded as if all did alike.
    h = nn.functional.pad(h, padding).view(groups, GROUP)
    h = h / h.mean(-1, keepdim=True).clamp(min=torch.finfo(h.dtype).tiny)
    h = torch.where(h.sum(-1, keepdim=True) > 0, h, 1.0)
    best, codes, scales = _searched(w, h)
    # Least squares for these codes, and the codes of that scale: never worse but for the rounding of the scale.
    fitted = usable((w * codes * h).sum(-1) / (codes.square() * h).sum(-1).clamp(min=1e-12))
    again = four_bits(w, fitted)
    better = _error(w, again, fitted, h) < best
    codes, scales = torch.where(better[..., None], again, codes), torch.where(better, fitted, scales)
    return codes.view(rows, -1)[:, :columns].to(torch.int8), scales


def _searched(w: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of groups w [rows, groups, GROUP] the squared error, codes and scales of the best of `STEPS`.

    ``h`` [groups, GROUP] says what the entries count for.
    """
    largest = w.gather(-1, w.abs().argmax(-1, keepdim=True)).squeeze(-1)
    best: torch.Tensor | None = None
    for steps in STEPS:
        scale = usable(largest / steps)
        code = four_bits(w, scale)
        error = _error(w, code, scale, h)
        if best is None:
            best, codes, scales = error, code, scale
            continue
        better = error < best
        best = torch.where(better, error, best)
        codes, scales = torch.where(better[..., None], code, codes), torch.where(better, scale, scales)
    assert best is not None
    return best, codes, scales


def four_bits(w: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The nearest of the codes -8 to 7 for w [..., n] and scales [...]."""
    return (w / scales.float()[..., None]).round().clamp(-8, 7)


def _error(w: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    return ((codes * scales.float()[..., None] - w).square() * h).sum(-1)


def usable(scales: torch.Tensor) -> torch.Tensor:
    """``scales`` as they are stored; 1 for those of nothing but zeros."""
    stored = scales.to(SCALE)
    return torch.where(stored == 0, torch.ones_like(stored), stored)
