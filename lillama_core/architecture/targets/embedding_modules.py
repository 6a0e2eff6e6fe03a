"""Low-rank modules that take the place of a token embedding and of an output head tied to it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional

from lillama_core.formats.factored import FactoredLinear
from lillama_core.formats.pivoted import InputPivotedLinear, index_of
from lillama_core.quantization.modules import dtype_of, look_up, product
from lillama_core.quantization.packing import Packing


class PlainProjection(nn.Module):
    """The projection A [r, width], stored whole as ``down.weight``."""

    def __init__(self, layer: FactoredLinear) -> None:
        super().__init__()
        self.down = layer.down
        self.width = layer.in_features

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., width] -> A x [..., r]."""
        z: torch.Tensor = self.down(x)
        return z

    def restore(self, z: torch.Tensor) -> torch.Tensor:
        """z [..., r] -> A^T z [..., width]."""
        return z @ self.down.weight

    @property
    def dtype(self) -> torch.dtype:
        """That of A."""
        return dtype_of(self.down)


class PivotedProjection(nn.Module):
    """A = [I | T] with its columns permuted; ``mix.weight`` is T [r, width - r]."""

    permutation: torch.Tensor
    orders = ("permutation",)

    def __init__(self, layer: InputPivotedLinear) -> None:
        super().__init__()
        self.mix = layer.mix
        self.rank = layer.rank
        self.width = layer.in_features
        self.register_buffer("permutation", layer.permutation)

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., width] -> A x [..., r]."""
        x = x.index_select(-1, index_of(self))
        z: torch.Tensor = x[..., : self.rank] + self.mix(x[..., self.rank :])
        return z

    def restore(self, z: torch.Tensor) -> torch.Tensor:
        """z [..., r] -> A^T z [..., width]."""
        whole = torch.cat((z, z @ self.mix.weight), dim=-1)
        return whole.index_select(-1, torch.argsort(self.permutation.long()))

    @property
    def dtype(self) -> torch.dtype:
        """That of T."""
        return dtype_of(self.mix)


Projection = PlainProjection | PivotedProjection


class LowRankEmbedding(nn.Module):
    """Look up rows s U[ids] A [..., width], where s is the factor that the dense module multiplies its rows by."""

    projection: Projection
    packing: Packing | None = None
    """How U lies in the bytes of ``weight``; None: it is U itself."""

    def __init__(self, weight: nn.Parameter, projection: Projection, scale: float, owns: bool) -> None:
        super().__init__()
        self.weight = weight
        self.scale = scale
        _hold(self, projection, owns)

    @property
    def vocabulary(self) -> int:
        """How many rows the table has."""
        return len(self.weight) if self.packing is None else self.packing.rows

    def rows(self, ids: torch.Tensor, scale: float) -> torch.Tensor:
        """The rows [..., width] of ``ids`` [...], times ``scale``."""
        rows = self.projection.restore(look_up(ids, self.packing, self.weight, self.projection.dtype))
        return rows if scale == 1.0 else rows * scale

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """The products [..., vocabulary] of x [..., width] with all rows."""
        return product(self.projection.reduce(x), self.packing, self.weight)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.rows(ids, self.scale)


class LowRankHead(nn.Module):
    """Compute the logits (x A^T) U^T + bias [..., vocabulary] of an output head tied to the embedding."""

    projection: Projection

    def __init__(self, weight: nn.Parameter, projection: Projection, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        _hold(self, projection, owns=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(self.projection.reduce(x), self.weight, self.bias)


class Band(nn.Module):
    """Rows of a table [n, width]: stored whole, or as U [n, r] of which ``projection`` makes the rows U A."""

    projection: Projection | None
    packing: Packing | None = None

    def __init__(self, weight: nn.Parameter, projection: Projection | None) -> None:
        super().__init__()
        self.weight = weight
        self.projection = projection


class BandedEmbedding(nn.Module):
    """Look up rows of a table in bands, times ``scale``; ``positions`` [vocabulary] says where each token's row is.

    The matrix of the first band, of the most needed tokens, is ``weight``, the name that a table has, to which output
    heads are tied.
    """

    positions: torch.Tensor
    orders = ("positions",)
    projection: Projection | None
    packing: Packing | None = None
    """Of the first band."""

    def __init__(self, bands: list[Band], positions: torch.Tensor, width: int, scale: float) -> None:
        super().__init__()
        self.weight = bands[0].weight
        self.projection = bands[0].projection
        self.rest = nn.ModuleList(bands[1:])
        self.width = width
        self.scale = scale
        self.register_buffer("positions", positions)

    def _bands(self) -> Iterator[tuple[torch.Tensor, Packing | None, Projection | None]]:
        yield self.weight, self.packing, self.projection
        for band in self.rest:
            assert isinstance(band, Band)
            yield band.weight, band.packing, band.projection

    def _dtype(self) -> torch.dtype:
        """What rows are in where bytes do not say it."""
        like: torch.Tensor | None = getattr(self, "like", None)
        return self.weight.dtype if like is None else like.dtype

    @property
    def vocabulary(self) -> int:
        """How many rows the table has."""
        return len(self.positions)

    def rows(self, ids: torch.Tensor, scale: float) -> torch.Tensor:
        """The rows [..., width] of ``ids`` [...], times ``scale``."""
        places = self.positions[ids.long()].long()
        found: torch.Tensor | None = None
        start = 0
        # Every band looks up something for every token: which tokens are a band's is not waited for, so that shapes do
        # not depend on them. A low-rank row costs as much as one of a linear map in a block.
        for weight, packing, projection in self._bands():
            size = len(weight) if packing is None else packing.rows
            rows = look_up((places - start).clamp(0, size - 1), packing, weight, self._dtype())
            rows = rows if projection is None else projection.restore(rows)
            found = rows if found is None else torch.where((places >= start)[..., None], rows, found)
            start += size
        assert found is not None
        return found if scale == 1.0 else found * scale

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """The products [..., vocabulary] of x [..., width] with all rows."""
        found = [
            product(x if projection is None else projection.reduce(x), packing, weight)
            for weight, packing, projection in self._bands()
        ]
        return torch.cat(found, dim=-1).index_select(-1, self.positions.int())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.rows(ids, self.scale)


class TiedEmbedding(nn.Module):
    """Look up rows of a `BandedEmbedding`, times a ``scale`` of its own."""

    def __init__(self, table: BandedEmbedding, scale: float) -> None:
        super().__init__()
        self.weight = table.weight
        self.scale = scale
        # Referred to only, so that it is saved once.
        self.__dict__["table"] = table

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        table: BandedEmbedding = self.__dict__["table"]
        return table.rows(ids, self.scale)


class BandedHead(nn.Module):
    """Compute the logits x W^T + bias [..., vocabulary] of an output head tied to a `BandedEmbedding`."""

    def __init__(self, table: BandedEmbedding, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = table.weight
        self.bias = bias
        self.__dict__["table"] = table

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table: BandedEmbedding = self.__dict__["table"]
        scores = table.scores(x)
        return scores if self.bias is None else scores + self.bias


def _hold(module: nn.Module, projection: Projection, owns: bool) -> None:
    """Register A in the module that owns it; let the others refer to it only, so that it is saved once."""
    if owns:
        module.projection = projection
    else:
        module.__dict__["projection"] = projection
