"""Modules that hold their weights as packed bytes and compute with what these stand for."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from lillama_core.quantization.packing import ALIGNMENT, Packing

FEW_ROWS = 32
"""Up to so many rows torch's kernel for 8-bit weights is used where there is one, which does not unpack them first:
0.26 of the time of a bfloat16 product for one row, 0.5 for 16 (1536 x 576, a CPU with AVX-512 but no bfloat16)."""


class QuantizedLinear(nn.Module):
    """x [..., in] -> x W^T + bias [..., out] for W [out, in] held as ``packed``."""

    packed: torch.Tensor
    like: torch.Tensor

    def __init__(self, packing: Packing, packed: torch.Tensor, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.packing = packing
        self.out_features, self.in_features = packing.rows, packing.columns
        self.register_buffer("packed", packed)
        self.bias = bias
        follow(self, dtype, packed.device)

    @property
    def weight(self) -> torch.Tensor:
        """W [out, in], unpacked anew at each access, in the dtype of the model; for code that looks at a weight."""
        return self.packing.dense(self.packed, self.like.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return product(x, self.packing, self.packed, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.packing.bits}"


class Table(Protocol):
    """A token embedding that gives rows of its table, and the products with all of them."""

    def rows(self, ids: torch.Tensor, scale: float) -> torch.Tensor:
        """The rows [..., width] of ``ids`` [...], times ``scale``."""
        ...

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """The products [..., vocabulary] of x [..., width] with all rows."""
        ...

    @property
    def vocabulary(self) -> int:
        """How many rows there are."""
        ...


class QuantizedEmbedding(nn.Module):
    """Look up rows s W[ids] of a table W [n, width], held as bytes under the name of the table's ``weight``."""

    weight: torch.Tensor
    like: torch.Tensor

    def __init__(self, packing: Packing, packed: torch.Tensor, scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.packing = packing
        self.num_embeddings, self.embedding_dim = packing.rows, packing.columns
        self.register_buffer("weight", packed)
        self.scale = scale
        follow(self, dtype, packed.device)

    @property
    def vocabulary(self) -> int:
        return self.packing.rows

    def rows(self, ids: torch.Tensor, scale: float) -> torch.Tensor:
        """The rows [..., width] of ``ids`` [...], times ``scale``."""
        found = self.packing.some_rows(self.weight, ids, self.like.dtype)
        return found if scale == 1.0 else found * scale

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """The products [..., n] of x [..., width] with all rows."""
        return product(x, self.packing, self.weight)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.rows(ids, self.scale)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.packing.bits}"


class _OfTable(nn.Module):
    """What is tied to a table: it holds no bytes of its own, and refers to the table, so that they are saved once."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.__dict__["table"] = table

    @property
    def weight(self) -> torch.Tensor:
        """W [n, width], unpacked anew at each access, in the dtype of the model; for code that looks at a weight."""
        table: Any = self.__dict__["table"]
        device = table.weight.device
        found: torch.Tensor = table.rows(torch.arange(table.vocabulary, device=device), 1.0)
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        # transformers ties by setting it.
        if name != "weight":
            super().__setattr__(name, value)


class QuantizedHead(_OfTable):
    """The logits x W^T + bias of an output head that is tied to a table."""

    def __init__(self, table: Table, bias: nn.Parameter | None) -> None:
        super().__init__(table)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.__dict__["table"].scores(x)
        return scores if self.bias is None else scores + self.bias


class QuantizedLookup(_OfTable):
    """Look up rows of a table that another embedding holds, times a ``scale`` of its own."""

    def __init__(self, table: Table, scale: float) -> None:
        super().__init__(table)
        self.scale = scale

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.__dict__["table"].rows(ids, self.scale)
        return found


def product(
    x: torch.Tensor, packing: Packing | None, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x W^T + bias for ``weight``, which is W itself where ``packing`` is None."""
    if packing is None:
        return functional.linear(x, weight, bias)
    y = _by_kernel(x, packing, weight) if packing.bits == 8 and x.dtype == torch.bfloat16 else None
    if y is None and packing.bits == 8 and x.dtype in (torch.float32, torch.bfloat16):
        # Scaling the outputs is less work than scaling the weights; sums of codes are beyond what float16 holds.
        codes = packing.stored_codes(weight).view(torch.int8).to(x.dtype)
        y = functional.linear(x, codes) * packing.scales(weight).flatten().to(x.dtype)
    if y is not None:
        return y if bias is None else y + bias
    return functional.linear(x, packing.dense(weight, x.dtype), bias)


def _by_kernel(x: torch.Tensor, packing: Packing, weight: torch.Tensor) -> torch.Tensor | None:
    """x W^T by torch's kernel for 8-bit weights; None where it is not there, not faster, or would not be safe."""
    kernel: Any = getattr(torch, "_weight_int8pack_mm", None)
    if (
        kernel is None
        or x.device.type != "cpu"
        or x.numel() > FEW_ROWS * packing.columns
        # It reads whole vectors from where they should begin, and crashes where they do not.
        or packing.columns % 32 != 0
        or torch.compiler.is_compiling()
        or (torch.is_grad_enabled() and x.requires_grad)
    ):
        return None
    rows = x.reshape(-1, packing.columns).contiguous()
    codes = packing.stored_codes(weight).view(torch.int8)
    if rows.data_ptr() % ALIGNMENT or codes.data_ptr() % ALIGNMENT:
        return None
    y: torch.Tensor = kernel(rows, codes, packing.scales(weight).flatten()).view(*x.shape[:-1], packing.rows)
    return y


def look_up(ids: torch.Tensor, packing: Packing | None, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The rows ``ids`` of ``weight``, which is the table itself where ``packing`` is None, else in ``dtype``."""
    if packing is None:
        return functional.embedding(ids, weight)
    return packing.some_rows(weight, ids, dtype)


def dtype_of(layer: nn.Module) -> torch.dtype:
    """The dtype of a linear layer's weight, which is not unpacked for it."""
    found = layer.like if isinstance(layer, QuantizedLinear) else layer.weight
    assert isinstance(found, torch.Tensor)
    return found.dtype


def follow(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Let ``module.like.dtype`` be the dtype that the model is loaded in or cast to: bytes say nothing of it."""
    module.register_buffer("like", torch.empty(0, dtype=dtype, device=device), persistent=False)
