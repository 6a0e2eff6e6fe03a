"""Functions whose source is written beside the weights of a standalone export, with that of the low-rank modules.

They put low-rank modules into a model that transformers has just built, by the table ``low_rank`` of its config. They
use nothing but torch and the modules that are written with them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lillama_core.architecture.targets.bands import band_sizes
from lillama_core.architecture.targets.convolution import PatchLinear
from lillama_core.architecture.targets.embedding_modules import (
    Band,
    BandedEmbedding,
    BandedHead,
    LowRankEmbedding,
    LowRankHead,
    PivotedProjection,
    PlainProjection,
    Projection,
    TiedEmbedding,
)
from lillama_core.architecture.targets.expert_modules import (
    LowRankExperts,
    SharedExperts,
    fused_bias,
    fused_weight,
    gate_of,
    parts_of,
)
from lillama_core.architecture.targets.grouped import GroupMaps
from lillama_core.architecture.targets.sorted_rows import SortedMaps
from lillama_core.formats.factored import FactoredLinear
from lillama_core.formats.pivoted import InputPivotedLinear, OutputPivotedLinear, index_dtype


def look_up(ids: torch.Tensor, packing: None, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The rows ``ids`` of ``weight``; what is exported is not held in few bits, so that ``packing`` is None."""
    return functional.embedding(ids, weight)


def product(x: torch.Tensor, packing: None, weight: torch.Tensor) -> torch.Tensor:
    """x W^T; what is exported is not held in few bits, so that ``packing`` is None."""
    return functional.linear(x, weight)


def dtype_of(layer: nn.Linear) -> torch.dtype:
    """The dtype of a layer's weight."""
    return layer.weight.dtype


class LowRankLinear(nn.Module):
    """x -> B A x + bias with B [out, r] and A [r, in], in two stages."""

    in_features: int
    out_features: int

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, A)."""
        raise NotImplementedError

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> A x [..., r]."""
        raise NotImplementedError

    def expand(self, z: torch.Tensor) -> torch.Tensor:
        """z [..., r] -> B z + bias [..., out]."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.expand(self.reduce(x))

    @property
    def weight(self) -> torch.Tensor:
        """B A [out, in], multiplied out at each access, for code that looks at the weight of a layer."""
        B, A = self.matrices()
        return B @ A

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def factored(out_features: int, in_features: int, rank: int, bias: bool) -> FactoredLinear:
    return FactoredLinear(nn.Linear(in_features, rank, bias=False), nn.Linear(rank, out_features, bias=bias))


def pivoted(out_features: int, in_features: int, rank: int, bias: bool) -> nn.Module:
    if in_features <= out_features:
        mix, up = nn.Linear(in_features - rank, rank, bias=False), nn.Linear(rank, out_features, bias=bias)
        return InputPivotedLinear(mix, up, torch.arange(in_features, dtype=index_dtype(in_features)))
    down, mix = nn.Linear(in_features, rank, bias=False), nn.Linear(rank, out_features - rank, bias=False)
    order = torch.arange(out_features, dtype=index_dtype(out_features))
    return OutputPivotedLinear(down, mix, order, nn.Parameter(torch.zeros(out_features)) if bias else None)


FORMATS = {"factored": factored, "pivoted": pivoted}


def put_linear(model: Any, path: str, how: dict[str, Any]) -> None:
    """Replace a linear layer."""
    dense = model.get_submodule(path)
    out_features, in_features = dense.weight.shape
    if not isinstance(dense, nn.Linear):
        # Conv1D of transformers stores its matrix the other way round.
        out_features, in_features = in_features, out_features
    bias = getattr(dense, "bias", None) is not None
    # Inner features of a net may be fewer than in the dense model.
    out_features, in_features = how.get("shape", (out_features, in_features))
    if "rank" in how:
        layer = FORMATS[how["format"]](out_features, in_features, how["rank"], bias)
    else:
        layer = nn.Linear(in_features, out_features, bias=bias)
    model.set_submodule(path, layer)


def put_convolution(model: Any, path: str, how: dict[str, Any]) -> None:
    """Replace a convolution by a low-rank map of its patches."""
    dense = model.get_submodule(path)
    layer = FORMATS[how["format"]](len(dense.weight), dense.weight[0].numel(), how["rank"], dense.bias is not None)
    model.set_submodule(path, PatchLinear(dense, layer))


def low_rank_maps(count: int, out_features: int, in_features: int, how: dict[str, Any]) -> list[nn.Module]:
    """A module for each of ``count`` maps that lie in one weight."""
    maps: list[nn.Module] = []
    for number in range(count):
        rank = how["ranks"].get(str(number))
        if rank is None:
            maps.append(nn.Linear(in_features, out_features, bias=False))
        else:
            maps.append(FORMATS[how["format"]](out_features, in_features, rank, False))
    return maps


def put_grouped(model: Any, path: str, how: dict[str, Any]) -> None:
    """Replace a grouped projection by a module for each group."""
    dense = model.get_submodule(path)
    rows, in_features = dense.weight.shape
    model.set_submodule(path, GroupMaps(low_rank_maps(dense.n_groups, rows // dense.n_groups, in_features, how)))


def put_sorted(model: Any, path: str, how: dict[str, Any]) -> None:
    """Replace stacked matrices for rows that are sorted by expert by a module for each expert."""
    experts, out_features, in_features = model.get_submodule(path).weight.shape
    model.set_submodule(path, SortedMaps(low_rank_maps(experts, out_features, in_features, how)))


def put_experts(model: Any, path: str, how: dict[str, Any]) -> None:
    """Replace the fused experts of a layer by a module for each matrix."""
    dense = model.get_submodule(path)
    maps: dict[str, list[nn.Module]] = {part: [] for part in parts_of(dense)}
    for part, layers in maps.items():
        _, out_features, in_features = fused_weight(dense, part).shape
        bias = fused_bias(dense, part) is not None
        for number in range(len(fused_weight(dense, "down"))):
            name = f"{part}.{number}"
            # Inner features of an expert may be fewer than in the dense model.
            out, in_ = how.get("shapes", {}).get(name, (out_features, in_features))
            if name in how["ranks"]:
                layers.append(FORMATS[how["format"]](out, in_, how["ranks"][name], bias))
            else:
                layers.append(nn.Linear(in_, out, bias=bias))
    model.set_submodule(path, LowRankExperts(dense, maps))


def put_shared_experts(model: Any, path: str, how: dict[str, Any]) -> None:
    """Replace the fused experts of a layer by two maps that all experts share one side of."""
    dense = model.get_submodule(path)
    experts, twice, width = fused_weight(dense, "gate_up").shape

    def layer(part: str, out_features: int, in_features: int) -> nn.Module:
        rank = how["ranks"].get(part)
        if rank is None:
            return nn.Linear(in_features, out_features, bias=False)
        return FORMATS[how["format"]](out_features, in_features, rank, False)

    gate_up, down = layer("gate_up", experts * twice, width), layer("down", width, experts * twice // 2)
    model.set_submodule(path, SharedExperts(gate_of(dense), gate_up, down, experts))


def tied_to(model: Any, path: str) -> list[str]:
    """Paths of the modules whose weight is the same parameter as that of the module at ``path``."""
    own = f"{path}.weight"
    names = {own}
    for _ in model.all_tied_weights_keys:
        names |= {n for pair in model.all_tied_weights_keys.items() if names & set(pair) for n in pair}
    return sorted(name.removesuffix(".weight") for name in names - {own})


def scale_of(module: nn.Module) -> float:
    """What an embedding multiplies its rows by."""
    return float(getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", 1.0)))


def low_rank_rows(rows: int, width: int, rank: int, format: str) -> tuple[nn.Parameter, Projection]:
    """U [rows, r], and A [r, width] in a format."""
    layer = FORMATS[format](rows, width, rank, False)
    if isinstance(layer, FactoredLinear):
        return nn.Parameter(layer.up.weight), PlainProjection(layer)
    assert isinstance(layer, InputPivotedLinear)
    return nn.Parameter(layer.up.weight), PivotedProjection(layer)


def put_embedding(model: Any, path: str, how: dict[str, Any]) -> None:
    """Replace a token embedding, and what is tied to it, by a table of low rank."""
    dense = model.get_submodule(path)
    vocabulary, width = dense.weight.shape
    weight, projection = low_rank_rows(vocabulary, width, how["rank"], how["format"])
    for tied in [path, *tied_to(model, path)]:
        old = model.get_submodule(tied)
        if isinstance(old, nn.Linear):
            model.set_submodule(tied, LowRankHead(weight, projection, old.bias))
        else:
            model.set_submodule(tied, LowRankEmbedding(weight, projection, scale_of(old), owns=tied == path))


def put_banded_embedding(model: Any, path: str, how: dict[str, Any]) -> None:
    """Replace a token embedding, and what is tied to it, by a table in bands of tokens, each of a rank of its own."""
    dense = model.get_submodule(path)
    vocabulary, width = dense.weight.shape
    bands = []
    for number, rows in enumerate(band_sizes(vocabulary, width)):
        rank = how["ranks"].get(str(number))
        if rank is None:
            bands.append(Band(nn.Parameter(torch.zeros(rows, width)), None))
        else:
            bands.append(Band(*low_rank_rows(rows, width, rank, how["format"])))
    table = BandedEmbedding(bands, torch.arange(vocabulary, dtype=torch.int32), width, scale_of(dense))
    for tied in [path, *tied_to(model, path)]:
        old = model.get_submodule(tied)
        if tied == path:
            model.set_submodule(tied, table)
        elif isinstance(old, nn.Linear):
            model.set_submodule(tied, BandedHead(table, old.bias))
        else:
            model.set_submodule(tied, TiedEmbedding(table, scale_of(old)))


def own_path(model: Any, name: str) -> str | None:
    """``name``, a path from the model with its head, as a path from ``model``, which may have none; None: not there."""
    for path in (name, name.removeprefix(f"{model.base_model_prefix}.")):
        try:
            model.get_submodule(path)
        except AttributeError:
            continue
        return path
    return None


def put_low_rank_modules(model: Any, low_rank: dict[str, Any] | None, kinds: dict[str, Any]) -> None:
    """Replace every module that ``low_rank`` names; ``kinds`` says how a kind of module is replaced."""
    for name, how in (low_rank or {}).items():
        path = own_path(model, name)
        if path is not None:
            kinds[how["kind"]](model, path, how)


KINDS = {
    "linear": put_linear,
    "convolution": put_convolution,
    "grouped": put_grouped,
    "sorted": put_sorted,
    "experts": put_experts,
    "shared-experts": put_shared_experts,
    "embedding": put_embedding,
    "banded-embedding": put_banded_embedding,
}
"""Kind of target -> the function that replaces such a module."""
