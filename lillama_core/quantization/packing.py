"""The layout of a matrix in few bits: one row of bytes, of another shape than the dense weight whose name it has.

First the scales, bfloat16, row by row: one for a row of 8-bit codes, one for each group of 32 columns of 4-bit codes;
then zeros up to a multiple of 64 bytes, where kernels want a matrix to begin. Then the codes: int8, or two in a byte.
Of a group of 4-bit codes byte j holds column j in its low half and column j + 16 in its high half, each plus 8; the
last group of a row is filled up with zeros. Bytes are never converted when a model is, so that what is stored stays
what it was whatever dtype a model is loaded or cast to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

GROUP = 32
BITS = (8, 4)
ALIGNMENT = 64
SCALE = torch.bfloat16


@dataclass(frozen=True)
class Packing:
    """How a matrix [rows, columns] lies in bytes at a number of bits."""

    rows: int
    columns: int
    bits: int

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return 1 if self.bits == 8 else -(-self.columns // GROUP)

    @property
    def row_bytes(self) -> int:
        """Bytes of the codes of a row."""
        return self.columns if self.bits == 8 else self.groups * GROUP // 2

    @property
    def _begin(self) -> int:
        """Where the codes begin."""
        return -(-self.rows * self.groups * SCALE.itemsize // ALIGNMENT) * ALIGNMENT

    @property
    def nbytes(self) -> int:
        """Bytes of everything."""
        return self._begin + self.rows * self.row_bytes

    def empty(self, device: torch.device | str) -> torch.Tensor:
        """Memory for it, not initialised: uint8 [nbytes]."""
        return torch.empty(self.nbytes, dtype=torch.uint8, device=device)

    def pack(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Bytes [nbytes] of int8 ``codes`` [rows, columns] and ``scales`` [rows, groups]."""
        if self.bits == 4:
            padding = self.groups * GROUP - self.columns
            shifted = (nn.functional.pad(codes, (0, padding)) + 8).to(torch.uint8)
            low, high = shifted.view(self.rows, self.groups, 2, GROUP // 2).unbind(2)
            codes = (low | (high << 4)).flatten(1)
        packed = torch.zeros(self.nbytes, dtype=torch.uint8, device=codes.device)
        self.scales(packed).copy_(scales)
        self.stored_codes(packed).copy_(codes.view(torch.uint8))
        return packed

    def scales(self, packed: torch.Tensor) -> torch.Tensor:
        """The scales [rows, groups], a view."""
        return packed[: self.rows * self.groups * SCALE.itemsize].view(SCALE).view(self.rows, self.groups)

    def stored_codes(self, packed: torch.Tensor) -> torch.Tensor:
        """The codes as they are stored, uint8 [rows, row_bytes], a view."""
        return packed[self._begin :].view(self.rows, self.row_bytes)

    def dense(self, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The matrix [rows, columns] in ``dtype``."""
        return self._numbers(self.stored_codes(packed), self.scales(packed), dtype)

    def some_rows(self, packed: torch.Tensor, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The rows ``ids`` [...] of the matrix, [..., columns]."""
        flat = ids.flatten()
        found = self._numbers(self.stored_codes(packed)[flat], self.scales(packed)[flat], dtype)
        return found.view(*ids.shape, self.columns)

    def _numbers(self, stored: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        scales = scales.to(dtype)
        if self.bits == 8:
            return stored.view(torch.int8).to(dtype) * scales
        halves = torch.stack((stored & 15, stored >> 4), dim=-2).view(len(stored), 2, self.groups, GROUP // 2)
        codes = halves.transpose(1, 2).to(dtype) - 8
        return (codes * scales[:, :, None, None]).reshape(len(stored), -1)[:, : self.columns]


def packing_of(weight: torch.Tensor, bits: int) -> Packing:
    """The packing of a matrix at ``bits``; at 8 where 4 take no fewer bytes, since few columns do not fill a group."""
    rows, columns = weight.shape
    eight, asked = Packing(rows, columns, 8), Packing(rows, columns, bits)
    return asked if asked.nbytes < eight.nbytes else eight
