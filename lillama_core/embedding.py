"""The token embedding as a map: ``--compress-embeddings``.

The table W [vocabulary, width] becomes U A with U [vocabulary, r]: a token's row is U[id] A, and the logits of an
output head tied to it are (x A^T) U^T. U keeps the name of the table and stays tied wherever the table was, so that it
is saved once; A is held by the input embedding alone. On disk the table's name has another shape, at which a loader
that does not know the format stops.

The factors minimise, to second order, what both uses do to the model's predictions:

- the head: tr(F dW G dW^T), with G = E[x x^T] of the hidden states that it reads, F the Fisher information of its
  logits;
- the lookup: tr(D dW S dW^T), with D the frequencies of the tokens (diagonal) and S = s^2 E[g g^T] of the gradients
  at the entry of the first block; s is what rows are multiplied by on the way there.

F is about diag(p) with p the predicted probabilities, whose means are about D; with (F + D) / 2 on the output side of
both the sum is tr((F + D) / 2 dW (G + S) dW^T), the same problem as for every other map, in the same unit, and solved
in closed form on the input side. An untied table has the lookup's part alone. The factors are not trained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lillama_core.architecture import Block
from lillama_core.errors import LillamaError, UserError
from lillama_core.formats.base import Format
from lillama_core.formats.factored import FactoredLinear
from lillama_core.formats.pivoted import InputPivotedLinear
from lillama_core.initialization import MapStatistics
from lillama_core.maps import LinearMap
from lillama_core.modality import Samples
from lillama_core.sites import KINDS, OnRows, Site, showing
from lillama_core.statistics import SecondMoment, flat_rows


class PlainProjection(nn.Module):
    """A [r, width] as it is."""

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


class PivotedProjection(nn.Module):
    """A = [I | T] with its columns permuted; ``mix.weight`` is T [r, width - r]."""

    permutation: torch.Tensor

    def __init__(self, layer: InputPivotedLinear) -> None:
        super().__init__()
        self.mix = layer.mix
        self.width = layer.in_features
        self.register_buffer("permutation", layer.permutation)

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., width] -> A x [..., r]."""
        x = x.index_select(-1, self.permutation.int())
        rank = self.mix.out_features
        z: torch.Tensor = x[..., :rank] + self.mix(x[..., rank:])
        return z

    def restore(self, z: torch.Tensor) -> torch.Tensor:
        """z [..., r] -> A^T z [..., width]."""
        whole = torch.cat((z, z @ self.mix.weight), dim=-1)
        return whole.index_select(-1, torch.argsort(self.permutation.long()))


Projection = PlainProjection | PivotedProjection


class LowRankEmbedding(nn.Module):
    """Rows U[ids] A, times the factor that the dense module multiplies its rows by."""

    projection: Projection

    def __init__(self, weight: nn.Parameter, projection: Projection, scale: float, owns: bool) -> None:
        super().__init__()
        self.weight = weight
        self.scale = scale
        _hold(self, projection, owns)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = self.projection.restore(functional.embedding(ids, self.weight))
        return rows if self.scale == 1.0 else rows * self.scale


class LowRankHead(nn.Module):
    """Logits (x A^T) U^T + bias of an output head that is tied to the embedding."""

    projection: Projection

    def __init__(self, weight: nn.Parameter, projection: Projection, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        _hold(self, projection, owns=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(self.projection.reduce(x), self.weight, self.bias)


def _hold(module: nn.Module, projection: Projection, owns: bool) -> None:
    """The module that owns A lists its parameters; the others only refer to it, so that it is saved once."""
    if owns:
        module.projection = projection
    else:
        module.__dict__["projection"] = projection


class EmbeddingSite(Site):
    """A model's input embedding together with every module that is tied to it; ``block`` is the whole model."""

    kind = "embedding"

    def __init__(self, name: str, module: nn.Module) -> None:
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        width = module.projection.width if isinstance(module, LowRankEmbedding) else weight.shape[1]
        super().__init__(name, (LinearMap(name, weight.shape[0], width),))
        self.scale = _scale(module)
        """What looked-up rows are multiplied by."""

    @classmethod
    def at(cls, name: str, module: nn.Module) -> EmbeddingSite:
        if not isinstance(module, LowRankEmbedding) and not is_embedding(module):
            raise LillamaError(f"{name!r} is a {type(module).__name__}, not a token embedding")
        return cls(name, module)

    def check(self, format_: Format) -> None:
        (map_,) = self.maps
        layer = format_.module(map_.out_features, map_.in_features, 1, False, torch.float32, "meta")
        if not isinstance(layer, FactoredLinear | InputPivotedLinear):
            raise UserError(
                f"--compress-embeddings: the embedding {self.name!r} [{map_.out_features}, {map_.in_features}] cannot"
                f" be stored in format {format_.name!r}; use --format factored"
            )

    def weight(self, block: nn.Module, map_: LinearMap) -> torch.Tensor:
        weight = block.get_submodule(self.name).weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def bias(self, block: nn.Module, map_: LinearMap) -> torch.Tensor | None:
        return None

    def modules(self, block: nn.Module) -> dict[str, nn.Module]:
        """Path -> module of the embedding and of all that is tied to it."""
        return {path: block.get_submodule(path) for path in (self.name, *tied_paths(block, self.name))}

    @contextlib.contextmanager
    def watching(
        self, block: nn.Module, on_input: OnRows | None = None, on_output: OnRows | None = None
    ) -> Iterator[None]:
        # A lookup multiplies nothing: what is shown are the rows of the heads.
        (map_,) = self.maps

        hook = showing(map_, on_input, on_output)
        heads = [m for m in self.modules(block).values() if isinstance(m, nn.Linear)]
        handles = [head.register_forward_hook(hook) for head in heads]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def put(self, block: nn.Module, layers: Mapping[str, nn.Module]) -> None:
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
                new = LowRankEmbedding(weight, projection, _scale(old), owns=path == self.name)
            replace_module(block, path, new)

    def layer(self, block: nn.Module, map_: LinearMap) -> nn.Module:
        return block.get_submodule(self.name)

    def renamings(self, block: nn.Module, ranks: Mapping[str, int], format_: Format) -> list[tuple[str, str]]:
        # The name of the table is that of U already.
        return []


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` at ``path``."""
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def is_embedding(module: nn.Module) -> bool:
    """Whether ``module`` looks rows up in its table, and at most multiplies them by a number."""
    return type(module) is nn.Embedding or (
        isinstance(module, nn.Embedding) and type(module).__name__.endswith("ScaledWordEmbedding")
    )


def _scale(module: nn.Module) -> float:
    if isinstance(module, LowRankEmbedding):
        return module.scale
    # As a number where there is one: the buffer of the same value may be on the meta device.
    return float(getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", 1.0)))


def tied_paths(model: nn.Module, name: str) -> list[str]:
    """Paths of the modules whose weight is the same parameter as that of the module ``name``."""
    own = f"{name}.weight"
    names = {own}
    ties = list((getattr(model, "all_tied_weights_keys", None) or {}).items())
    for _ in ties:
        names |= {n for pair in ties if names & set(pair) for n in pair}
    return sorted(n.removesuffix(".weight") for n in names - {own})


def embedding_block(model: nn.Module) -> Block:
    """The token embedding of ``model`` as a block of its own, whose path is the model; UserError if it has none."""
    kind = type(model).__name__
    getter: Any = getattr(model, "get_input_embeddings", None)
    found: nn.Module | None = None if getter is None else getter()
    path = next((n for n, m in model.named_modules() if m is found), None)
    if found is None or path is None or not is_embedding(found):
        raise UserError(f"--compress-embeddings: {kind} has no token embedding that can be compressed")
    site = EmbeddingSite(path, found)
    for tied, module in site.modules(model).items():
        if not is_embedding(module) and type(module) is not nn.Linear:
            raise UserError(
                f"--compress-embeddings: {tied!r} of {kind}, which shares the embedding's table, is a"
                f" {type(module).__name__}"
            )
    return Block("embedding", 0, "", (site,))


def embedding_site(block: Block) -> EmbeddingSite:
    """The only site of what `embedding_block` gave."""
    (site,) = block.sites
    assert isinstance(site, EmbeddingSite)
    return site


@contextlib.contextmanager
def exchanged(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """While open, other modules stand at the given paths of ``model``: the dense tables, say."""
    own = {path: model.get_submodule(path) for path in modules}
    try:
        for path, module in modules.items():
            replace_module(model, path, module)
        yield
    finally:
        for path, module in own.items():
            replace_module(model, path, module)


class EmbeddingObserver:
    """Accumulates what the factors of the embedding are chosen by, during the sensitivity pass."""

    def __init__(self, site: EmbeddingSite) -> None:
        self.site = site
        self.inputs = SecondMoment()
        """G, of the rows that the heads read."""
        self.gradients = SecondMoment()
        """W^T F W, of the gradients at those rows."""
        self.entry = SecondMoment()
        """S, of the gradients at the entry of the first block."""
        self._squares = 0.0

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """While open, forward and backward passes through the heads are observed."""

        def observe_input(_: LinearMap, x: torch.Tensor) -> None:
            if x.requires_grad:
                rows = x.detach()
                x.register_hook(lambda g: self._add(rows, g))

        def observe_output(_: LinearMap, y: torch.Tensor) -> None:
            if y.requires_grad:
                y.register_hook(self._add_squares)

        with self.site.watching(model, observe_input, observe_output):
            yield

    @contextlib.contextmanager
    def lookups(self, model: nn.Module) -> Iterator[list[str]]:
        """While open, the paths of the tables in which rows are looked up are listed: none below an audio encoder."""
        seen: list[str] = []
        tables = {p: m for p, m in self.site.modules(model).items() if is_embedding(m)}
        handles = [m.register_forward_hook(lambda *_, p=p: seen.append(p)) for p, m in tables.items()]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, rows: torch.Tensor, gradients: torch.Tensor) -> None:
        rows, gradients = rows.flatten(0, -2), gradients.flatten(0, -2)
        # Where nothing is predicted, behind the end of a row, there is no gradient: what is read there is no matter.
        counted = (gradients != 0).any(-1)
        self.inputs.add(rows[counted])
        self.gradients.add(gradients[counted])

    def _add_squares(self, gradient: torch.Tensor) -> None:
        self._squares += gradient.float().square().sum().item()

    def statistics(self, weight: torch.Tensor, data: Samples) -> MapStatistics:
        """What an initialiser needs for W [vocabulary, width]; nothing if no gradient came by."""
        # A gradient at a row that is multiplied on its way in counts as often at the table's.
        parts = ((self.entry, self.site.scale**2), (self.inputs, 1.0))
        moments = [factor * m.mean().to(weight.device) for m, factor in parts if m.count]
        # A model may project the rows to another width before its first block.
        inputs = sum((m for m in moments if len(m) == weight.shape[1]), torch.zeros((), device=weight.device))
        if not inputs.dim():
            return MapStatistics()
        (map_,) = self.site.maps
        frequency = torch.zeros(map_.out_features)
        for name, ids in data.inputs.items():
            if name.endswith("input_ids"):
                # Padding is looked up as well, and matters to nothing.
                rows, counts = flat_rows(ids[..., None].cpu(), tuple(data.masks.values()))
                counts = torch.ones(len(rows)) if counts is None else counts.float()
                frequency += torch.bincount(rows[:, 0], counts, map_.out_features)[: map_.out_features]
        tokens = frequency.sum().item()
        frequency = (frequency / max(1.0, tokens)).to(weight.device)
        W = weight.float()
        moment, scale = W.T @ (frequency[:, None] * W), 1 / map_.out_features
        if self.inputs.count:
            moment = (moment + self.gradients.mean().to(weight.device)) / 2
            scale = (scale + self._squares / self.inputs.count / map_.out_features) / 2
        return MapStatistics(inputs, moment, scale, tokens / max(1, len(data)))


KINDS[EmbeddingSite.kind] = EmbeddingSite
