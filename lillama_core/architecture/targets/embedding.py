"""The token embedding as a map: ``--compress-embeddings``.

Rows W [n, width] of the table become U A with U [n, r]: a token's row is U[i] A, and the logits of an output head tied
to it are (x A^T) U^T. The first U keeps the name of the table and stays tied wherever the table was, so that it is
saved once; all else is held by the input embedding alone. On disk the table's name has another shape, at which a loader
that does not know the format stops.

Its rows are taken in bands, see `targets.bands`, each of which has a U and an A of its own, or stays as it is. The
factors minimise, to second order, what both uses do to the model's predictions:

- the head: tr(F dW G dW^T), with G = t^2 E[x x^T] of the hidden states x that it reads, t what its outputs are
  multiplied by to be the logits, and F the Fisher information of these;
- the lookup: tr(D dW S dW^T), with D the frequencies of the tokens (diagonal) and S = s^2 E[g g^T] of the gradients
  at the entry of the first block; s is what rows are multiplied by on the way there.

Models multiply in code of their own, so s and t are measured: s by taking the rows out, t by the gradients on both
sides. F is about diag(p) with p the predicted probabilities; p and D are about alike, and with their mean on the output
side of both the sum is tr((diag(p) + D) / 2 dW (G + S) dW^T), the same problem as for every other map, in the same
unit, and solved in closed form on the input side. Some of the mean is spread over all tokens: text of another kind has
others. An untied table has the lookup's part alone. The factors are not trained.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lillama_core.architecture.targets.bands import band_bounds
from lillama_core.architecture.targets.base import OnRows, TargetModule, make_hook
from lillama_core.architecture.targets.block import Block
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
from lillama_core.architecture.targets.linear_map import TargetLinear
from lillama_core.errors import LillamaError, UserError
from lillama_core.formats.base import Format
from lillama_core.formats.factored import FactoredLinear
from lillama_core.formats.pivoted import InputPivotedLinear
from lillama_core.models.transformers_adapter import tied_weights
from lillama_core.runtime.modules import replace_module


class EmbeddingTarget(TargetModule):
    """A model's input embedding together with every module that is tied to it; ``block`` is the whole model."""

    kind = "embedding"

    def __init__(self, name: str, module: nn.Module) -> None:
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        width = module.projection.width if isinstance(module, LowRankEmbedding) else weight.shape[1]
        super().__init__(name, (TargetLinear(name, weight.shape[0], width),))

    @classmethod
    def at(cls, name: str, module: nn.Module) -> EmbeddingTarget:
        if not isinstance(module, LowRankEmbedding) and not is_embedding(module):
            raise LillamaError(f"{name!r} is a {type(module).__name__}, not a token embedding")
        return cls(name, module)

    def check(self, format_: Format) -> None:
        for map_ in self.maps:
            layer = format_.module(map_.out_features, map_.in_features, 1, False, torch.float32, "meta")
            if not isinstance(layer, FactoredLinear | InputPivotedLinear):
                raise UserError(
                    f"--compress-embeddings: the embedding {self.name!r}, of which rows"
                    f" [{map_.out_features}, {map_.in_features}] are low rank, cannot be stored in format"
                    f" {format_.name!r}; use --format factored"
                )

    def weight(self, block: nn.Module, map_: TargetLinear) -> torch.Tensor:
        weight = block.get_submodule(self.name).weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def bias(self, block: nn.Module, map_: TargetLinear) -> torch.Tensor | None:
        return None

    def modules(self, block: nn.Module) -> dict[str, nn.Module]:
        """Path -> module of the embedding and of all that is tied to it."""
        return {path: block.get_submodule(path) for path in (self.name, *tied_paths(block, self.name))}

    @contextlib.contextmanager
    def observe(
        self, block: nn.Module, on_input: OnRows | None = None, on_output: OnRows | None = None
    ) -> Iterator[None]:
        # A lookup multiplies nothing: what is shown are the rows of the heads, once for all maps.
        hook = make_hook(self.maps[0], on_input, on_output)
        heads = [m for m in self.modules(block).values() if isinstance(m, nn.Linear)]
        handles = [head.register_forward_hook(hook) for head in heads]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def replace(self, block: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        layer = layers.get(self.name)
        if layer is None:
            return
        projection: Projection
        if isinstance(layer, FactoredLinear):
            projection = PlainProjection(layer)
        else:
            assert isinstance(layer, InputPivotedLinear)
            projection = PivotedProjection(layer)
        weight = layer.up.weight
        assert isinstance(weight, nn.Parameter)
        for path, old in self.modules(block).items():
            new: nn.Module
            if isinstance(old, nn.Linear | LowRankHead):
                new = LowRankHead(weight, projection, old.bias)
            else:
                new = LowRankEmbedding(weight, projection, scale_of(old), owns=path == self.name)
            replace_module(block, path, new)

    def layer(self, block: nn.Module, map_: TargetLinear) -> nn.Module:
        return block.get_submodule(self.name)

    def paths(self, block: nn.Module) -> list[str]:
        return list(self.modules(block))

    def dense_tensors(self, block: nn.Module, dense: nn.Module) -> dict[str, torch.Tensor]:
        modules = self.modules(block)
        with torch.no_grad():
            table = _whole_table(modules[self.name])
        found = {}
        for path, module in modules.items():
            found[f"{path}.weight"] = table
            bias = getattr(module, "bias", None)
            if bias is not None:
                found[f"{path}.bias"] = bias.detach()
        return found

    def renamings(self, block: nn.Module, ranks: Mapping[str, int], format_: Format) -> list[tuple[str, str]]:
        # The name of the table is that of U already.
        return []


class BandedEmbeddingTarget(EmbeddingTarget):
    """The same table in bands, see `targets.bands`: a map for each of them, which may be low rank or dense."""

    kind = "banded-embedding"
    order: torch.Tensor | None
    """Token by position [vocabulary]; None until it is known, as in a model that is about to be loaded."""

    def __init__(self, name: str, module: nn.Module, multiplies: bool = True) -> None:
        """``multiplies``: whether a head is tied to the table; a lookup by itself multiplies nothing."""
        if isinstance(module, BandedEmbedding):
            vocabulary, width = len(module.positions), module.width
        else:
            assert isinstance(module.weight, torch.Tensor)
            vocabulary, width = module.weight.shape
        self.vocabulary, self.width = vocabulary, width
        self.bounds = band_bounds(vocabulary, width)
        maps = tuple(
            TargetLinear(f"{name}.{i}", stop - start, width, token_fraction=float(multiplies))
            for i, (start, stop) in enumerate(self.bounds)
        )
        TargetModule.__init__(self, name, maps)
        self.order = None

    @classmethod
    def at(cls, name: str, module: nn.Module) -> BandedEmbeddingTarget:
        if not isinstance(module, BandedEmbedding) and not is_embedding(module):
            raise LillamaError(f"{name!r} is a {type(module).__name__}, not a token embedding")
        return cls(name, module)

    def weight(self, block: nn.Module, map_: TargetLinear) -> torch.Tensor:
        start, stop = self.bounds[self.maps.index(map_)]
        table = block.get_submodule(self.name).weight
        assert isinstance(table, torch.Tensor)
        return table[start:stop] if self.order is None else table[self.order[start:stop].to(table.device)]

    def replace(self, block: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        if not any(map_.name in layers for map_ in self.maps):
            return
        bands = [self._band(block, map_, layers.get(map_.name)) for map_ in self.maps]
        device = bands[0].weight.device
        order = torch.empty(self.vocabulary, dtype=torch.int32, device=device)
        if self.order is not None:
            order = torch.argsort(self.order).to(device, torch.int32)
        modules = self.modules(block)
        table = BandedEmbedding(bands, order, self.width, scale_of(modules[self.name]))
        for path, old in modules.items():
            new: nn.Module = table
            if isinstance(old, nn.Linear | BandedHead):
                new = BandedHead(table, old.bias)
            elif path != self.name:
                new = TiedEmbedding(table, scale_of(old))
            replace_module(block, path, new)

    def _band(self, block: nn.Module, map_: TargetLinear, layer: nn.Module | None) -> Band:
        """A band of the table: what stands for it, or its own rows."""
        if layer is None:
            old = self.weight(block, map_)
            return Band(nn.Parameter(old.detach().clone(), old.requires_grad), None)
        if isinstance(layer, FactoredLinear):
            return Band(_parameter(layer.up.weight), PlainProjection(layer))
        assert isinstance(layer, InputPivotedLinear)
        return Band(_parameter(layer.up.weight), PivotedProjection(layer))


def _parameter(weight: torch.Tensor) -> nn.Parameter:
    assert isinstance(weight, nn.Parameter)
    return weight


def _whole_table(module: nn.Module) -> torch.Tensor:
    """The table [vocabulary, width] that a low-rank embedding stands for, not scaled; computed in fp32."""
    assert isinstance(module, LowRankEmbedding | BandedEmbedding)
    exact = copy.deepcopy(module).float()
    if isinstance(exact, BandedEmbedding):
        table = exact.rows(torch.arange(len(exact.positions)), 1.0)
    else:
        table = exact.projection.restore(exact.weight)
    return table.to(module.weight.dtype)


def is_embedding(module: nn.Module) -> bool:
    """Whether ``module`` looks rows up in its table, and at most multiplies them by a number."""
    return type(module) is nn.Embedding or (
        isinstance(module, nn.Embedding) and type(module).__name__.endswith("ScaledWordEmbedding")
    )


def scale_of(module: nn.Module) -> float:
    """What an embedding multiplies looked-up rows by."""
    if isinstance(module, LowRankEmbedding | BandedEmbedding | TiedEmbedding):
        return module.scale
    # As a number where there is one: the buffer of the same value may be on the meta device.
    return float(getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", 1.0)))


def tied_paths(model: nn.Module, name: str) -> list[str]:
    """Paths of the modules whose weight is the same parameter as that of the module ``name``."""
    own = f"{name}.weight"
    names = {own}
    ties = tied_weights(model)
    for _ in ties:
        names |= {n for pair in ties if names & set(pair) for n in pair}
    return sorted(n.removesuffix(".weight") for n in names - {own})


def embedding_block(model: nn.Module) -> Block:
    """The token embedding of ``model`` as a block of its own, whose path is the model; UserError if it has none."""
    kind = type(model).__name__
    getter: Any = getattr(model, "get_input_embeddings", None)
    found: nn.Module | None = None
    # Code that comes with a model may not say where its embedding is.
    with contextlib.suppress(NotImplementedError, AttributeError):
        found = None if getter is None else getter()
    path = next((n for n, m in model.named_modules() if m is found), None)
    if found is None or path is None or not is_embedding(found):
        raise UserError(f"--compress-embeddings: {kind} has no token embedding that can be compressed")
    target = BandedEmbeddingTarget(path, found, multiplies=bool(tied_paths(model, path)))
    for tied, module in target.modules(model).items():
        if not is_embedding(module) and type(module) is not nn.Linear:
            raise UserError(
                f"--compress-embeddings: {tied!r} of {kind}, which shares the embedding's table, is a"
                f" {type(module).__name__}"
            )
    return Block("embedding", 0, "", (target,))


def embedding_target(block: Block) -> BandedEmbeddingTarget:
    """Return the only target of the block that `embedding_block` made."""
    (target,) = block.targets
    assert isinstance(target, BandedEmbeddingTarget)
    return target
