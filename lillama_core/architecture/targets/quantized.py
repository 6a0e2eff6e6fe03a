"""Which weights of a model are held in few bits, and how their modules are swapped: when a model is quantised, and
before the bytes of a quantised one are loaded.

A weight goes by the path of the module that holds it: a linear layer, dense or within a low-rank map; a token
embedding, with the output head that is tied to it; a band of one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from lillama_core.architecture.targets.embedding import is_embedding, tied_paths
from lillama_core.architecture.targets.embedding_modules import (
    Band,
    BandedEmbedding,
    BandedHead,
    LowRankEmbedding,
    LowRankHead,
    TiedEmbedding,
)
from lillama_core.architecture.targets.linear import LinearTarget
from lillama_core.errors import LillamaError
from lillama_core.models.transformers_adapter import forget_ties
from lillama_core.quantization.modules import (
    QuantizedEmbedding,
    QuantizedHead,
    QuantizedLinear,
    QuantizedLookup,
    follow,
)
from lillama_core.quantization.packing import Packing, packing_of
from lillama_core.runtime.modules import replace_module

Pack = Callable[[torch.Tensor, Packing], torch.Tensor]
"""Gives the bytes that stand for a matrix; when a model is about to be loaded, memory for them."""

_TABLES = (LowRankEmbedding, BandedEmbedding, Band)


def weights_of(model: Any, left_out: Iterable[str] = ()) -> dict[str, bool]:
    """Paths of the modules whose weights can be held in few bits -> whether it is a table of tokens or an output head.

    ``left_out`` are paths of modules that are not looked into.
    """
    outside = tuple(left_out)
    # Other embeddings are of positions: small, and some families write into them when they are loaded.
    words = _told(model, "get_input_embeddings")
    tables = [p for p, m in model.named_modules() if isinstance(m, _TABLES) or (m is words and is_embedding(m))]
    # What is tied to a table comes with it.
    tied = {
        other for path in tables if not isinstance(model.get_submodule(path), Band) for other in tied_paths(model, path)
    }
    head = _told(model, "get_output_embeddings")
    found = {}
    for path, module in model.named_modules():
        if path in tied or any(path == name or path.startswith(f"{name}.") for name in outside):
            continue
        if path in tables:
            found[path] = True
        elif LinearTarget.accepts(module):
            # What a low-rank table is multiplied by is a part of it.
            found[path] = module is head or any(path.startswith(f"{table}.") for table in tables)
    return found


def _told(model: Any, getter: str) -> Any:
    """What a method of a model gives; None where it has none, or one without an answer, as code of its own may have."""
    with contextlib.suppress(NotImplementedError, AttributeError):
        return getattr(model, getter)()
    return None


def _is_table(module: nn.Module) -> bool:
    return is_embedding(module) or isinstance(module, _TABLES)


def matrix(model: nn.Module, path: str) -> torch.Tensor:
    """The weight of the module at ``path`` as [out, in]; a table's as [rows, width]; raises LillamaError for others."""
    module = model.get_submodule(path)
    if LinearTarget.accepts(module):
        (map_,) = (target := LinearTarget(path, module)).maps
        return target.weight(model, map_)
    if not _is_table(module) or getattr(module, "packing", None) is not None:
        raise LillamaError(f"{path!r} is a {type(module).__name__}, whose weight cannot be held in few bits")
    assert isinstance(module.weight, torch.Tensor)
    return module.weight


def hold(model: nn.Module, path: str, bits: int, pack: Pack) -> None:
    """Let the module at ``path``, and what is tied to it, hold what ``pack`` makes of its weight, at ``bits`` or 8."""
    weight, module = matrix(model, path), model.get_submodule(path)
    packing = packing_of(weight, bits)
    packed = pack(weight.detach(), packing)
    if LinearTarget.accepts(module):
        bias = module.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        replace_module(model, path, QuantizedLinear(packing, packed, bias, weight.dtype))
        return
    if isinstance(module, Band):
        _store(module, packing, packed)
        follow(model.get_submodule(path.rpartition(".rest.")[0]), weight.dtype, packed.device)
        return
    tied = tied_paths(model, path)
    if isinstance(module, LowRankEmbedding | BandedEmbedding):
        _store(module, packing, packed)
        if isinstance(module, BandedEmbedding):
            follow(module, weight.dtype, packed.device)
        table: Any = module
    else:
        table = QuantizedEmbedding(packing, packed, _scale(module), weight.dtype)
        replace_module(model, path, table)
    for other in tied:
        old: Any = model.get_submodule(other)
        new: nn.Module
        if isinstance(old, nn.Linear | LowRankHead | BandedHead):
            new = QuantizedHead(table, old.bias)
        else:
            new = QuantizedLookup(table, _scale(old))
        replace_module(model, other, new)
    forget_ties(model, f"{path}.weight")


def _store(module: LowRankEmbedding | BandedEmbedding | Band, packing: Packing, packed: torch.Tensor) -> None:
    """Let bytes take the place of the table's parameter, under its name."""
    del module.weight
    module.register_buffer("weight", packed)
    module.packing = packing


def _scale(module: nn.Module) -> float:
    if isinstance(module, LowRankEmbedding | TiedEmbedding):
        return module.scale
    return float(getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", 1.0)))
